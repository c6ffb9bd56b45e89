# Everything a user or engineer runs. `make predict` and `make test` need only Python 3.11 and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
EXAMPLE ?= architectures/examples/resnet20.onnx
WORKERS ?= 2

export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help predict test test-slow test-gpu test-soak zoo bench reproduce-diversity reproduce-low-rank lint format proto evaluate clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 20

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt torch==2.13.0
	$(PIP) install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.train-installed: $(VENV)/.installed
	$(PIP) install --quiet -c constraints.txt -e '.[train]'
	touch $@

# torchvision and timm are installed without their dependencies: the tests build networks, they need no operators of
# torchvision's compiled part, which must not replace the torch that is there.
$(VENV)/.tests-installed: $(VENV)/.installed
	$(PIP) install --quiet -c constraints.txt -e '.[test]'
	$(PIP) install --quiet -c constraints.txt --no-deps torchvision timm
	touch $@

$(VENV)/.dev-installed: $(VENV)/.tests-installed
	$(PIP) install --quiet -c constraints.txt -e '.[test,dev]'
	touch $@

predict: $(VENV)/.installed  ## predict weights for an example network on the embedded server
	mkdir -p runs
	$(BIN)/ghn-client predict $(EXAMPLE) --output runs/$(basename $(notdir $(EXAMPLE))).safetensors

test: $(VENV)/.tests-installed  ## run the tests that take minutes at most
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

test-slow: $(VENV)/.dev-installed  ## run the tests that take long
	$(BIN)/python -m pytest -m slow

test-gpu: $(VENV)/.tests-installed  ## run the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

test-soak: $(VENV)/.tests-installed  ## run the endurance tests
	$(BIN)/python -m pytest -m soak

FUZZ_SECONDS ?= 300

.PHONY: fuzz
fuzz: $(VENV)/.tests-installed  ## fuzz what reads bytes of strangers, FUZZ_SECONDS for each of four targets
	-$(PIP) install --quiet -c constraints.txt -e '.[fuzz]'
	for target in reader request codec file; do \
		$(BIN)/python -m tests.fuzzing $$target --seconds $(FUZZ_SECONDS) || exit 1; done

zoo: $(VENV)/.tests-installed  ## predict for dozens of public networks and write docs/zoo.md
	$(BIN)/python -m pytest -m zoo -n $(WORKERS) tests/zoo --zoo-table docs/zoo.md

bench: $(VENV)/.tests-installed  ## measure speed and memory against limits measured in the same run
	$(BIN)/python -m benchmarks

DATA ?= ../shared/data/cifar10
# images that the hypernetwork has not seen; here the folder of the Debian package dataset-fashion-mnist
OTHER_DATA ?= /usr/share/datasets/fashion-mnist
GHN ?= $(firstword $(wildcard ghn_service/checkpoints/*.safetensors))

reproduce-diversity: $(VENV)/.tests-installed  ## fine-tune from He, predicted and repaired starts; fills docs/results.md
	$(BIN)/python -m benchmarks.reproduce_diversity --data $(OTHER_DATA) --checkpoint $(GHN)

reproduce-low-rank: $(VENV)/.tests-installed  ## layer errors and accuracy of low-rank networks, spectral against function
	$(BIN)/python -m benchmarks.reproduce_low_rank --data $(DATA) --other-data $(OTHER_DATA)

.PHONY: reproduce-norm-only reproduce-additive reproduce-express
reproduce-norm-only: $(VENV)/.tests-installed  ## tune norm layers against controls of the same size; fills docs/results.md
	$(BIN)/python -m benchmarks.reproduce_norm_only --data $(DATA) --other-data $(OTHER_DATA) --checkpoint $(GHN) --sizes --story

reproduce-additive: $(VENV)/.tests-installed  ## neurons against changed labels, closed form and trained; fills docs/results.md
	$(BIN)/python -m benchmarks.reproduce_additive --data $(DATA)

reproduce-express: $(VENV)/.tests-installed  ## width of sparse random networks that express any layer; fills docs/results.md
	$(BIN)/python -m benchmarks.reproduce_express

evaluate: $(VENV)/.train-installed  ## evaluate the bundled hypernetwork on the images in DATA
	$(BIN)/ghn-train evaluate --checkpoint $(GHN) --data $(DATA) --out runs/evaluation --test-images 1000 \
		--precision bfloat16 --novelty-networks 24 --splits test=50,wide=24,deep=24,dense=24,bnfree=24,reference \
		--fine-tune 50 --fine-tune-images 0

lint: $(VENV)/.dev-installed  ## format, lint, type-check, check the protocol and the Dockerfile
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/buf lint
	$(BIN)/hadolint Dockerfile

format: $(VENV)/.dev-installed  ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

proto:  ## regenerate the protocol's stubs with the pinned generator
	$(PYTHON) protos/generate.py

clean:  ## remove the virtual environment and everything built
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
