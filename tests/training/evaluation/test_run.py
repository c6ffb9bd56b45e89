"""``evaluate`` from a checkpoint file and a data folder to the report, over the generator's networks."""

from __future__ import annotations

import dataclasses
import math
import shutil
import signal
import time

import pytest
import torch

from ghn_architectures.architecture import Interface
from ghn_service.errors import DataError
from ghn_service.hypernetwork.checkpoint import ModelCard, save_checkpoint
from ghn_service.hypernetwork.ghn import GHNConfig, GraphHyperNetwork
from ghn_service.training.evaluation import run as evaluate_module
from ghn_service.training.evaluation.fine_tune import FineTuneSettings
from ghn_service.training.evaluation.measurements import EvaluationSettings, Measurement, make_context
from ghn_service.training.evaluation.report import markdown_report
from ghn_service.training.evaluation.run import evaluate
from ghn_service.training.evaluation.zero_shot import KnownPredictions
from ghn_service.training.images import load_training_data
from ghn_service.training.networks import find_network
from ghn_service.training.settings import DataSettings
from tests.training.training_cases import small_source
from tests.training.written_images import write_image_folder

CONFIG = GHNConfig(hidden_channels=8, num_heads=2, num_layers=1, max_shape=(8, 8, 7, 7), num_classes=4)
PLAN = EvaluationSettings(
    splits={"test": 2},
    test_images=64,
    calibration_images=64,
    fine_tune_networks=1,
    fine_tune_images=(0, 16),
    fine_tune_test_images=64,
    validation_images=16,
    fine_tune=FineTuneSettings(learning_rates=(0.01, 0.1), choose_at=2, budgets=(2,), longest=4, every=2, batch_size=8),
    novelty_networks=2,
    precision="float32",
)


@pytest.fixture
def files(tmp_path):
    hypernetwork = GraphHyperNetwork(CONFIG, generator=torch.Generator().manual_seed(0))
    save_checkpoint(hypernetwork, tmp_path / "ghn.safetensors", card=ModelCard(dataset="made up"))
    write_image_folder(tmp_path / "data", classes=4)
    return tmp_path / "ghn.safetensors", tmp_path / "data"


def comparable(evaluation):
    """Values of an evaluation without its time; NaN made equal to itself."""
    return repr(dataclasses.replace(evaluation, seconds=0.0))


def quick(**changes):
    """A plan of zero-shot scores alone."""
    return dataclasses.replace(PLAN, **{"fine_tune_networks": 0, "novelty_networks": 0, **changes})


def count_measurements(monkeypatch):
    """The jobs that are really done from now on."""
    done = []

    def counted(context, task):
        done.append(task[0])
        return measure(context, task)

    measure = evaluate_module.measure
    monkeypatch.setattr(evaluate_module, "measure", counted)
    return done


def test_the_number_of_processes_changes_nothing(files):
    one = evaluate(*files, PLAN, workers=1)
    assert [item.name for item in one.zero_shot] == ["0", "1"]
    assert all(math.isfinite(item.copied) for item in one.zero_shot)
    assert {item.images for item in one.fine_tuned} == {0, 16}
    assert one.num_images == {"training": 77, "validation": 19, "test": 96}
    two = evaluate(*files, PLAN, workers=2)
    assert comparable(one) == comparable(two)


def test_finished_measurements_are_not_repeated(tmp_path, files, monkeypatch):
    results = tmp_path / "measurements.jsonl"
    whole = evaluate(*files, PLAN)
    evaluate(*files, quick(splits={"test": 1}, novelty_networks=2), results=results)
    done = count_measurements(monkeypatch)
    evaluation = evaluate(*files, PLAN, results=results)
    assert len(done) == whole.jobs - 1
    assert comparable(evaluation) == comparable(whole)
    done.clear()
    assert comparable(evaluate(*files, PLAN, results=results)) == comparable(whole)
    assert done == []


@pytest.mark.parametrize(
    "change", [{"test_images": 32}, {"calibration_images": 32}, {"zero_shot_precision": "bfloat16"}]
)
def test_results_of_another_protocol_are_measured_again(tmp_path, files, monkeypatch, change):
    results = tmp_path / "measurements.jsonl"
    evaluate(*files, quick(), results=results)
    done = count_measurements(monkeypatch)
    evaluate(*files, quick(**change), results=results)
    assert len(done) == 2


def test_results_of_other_images_of_equal_number_are_not_taken(files):
    context = make_context(*files, PLAN, None)
    job = Measurement("zero-shot", "test", "0")
    keys = {context.key(job)}
    for name in ("training", "validation", "test"):
        images = getattr(context.data, name)
        turned = dataclasses.replace(images, images=images.images.flip(3))
        keys.add(dataclasses.replace(context, data=dataclasses.replace(context.data, **{name: turned})).key(job))
    assert len(keys) == 4


def other_checkpoint(path):
    hypernetwork = GraphHyperNetwork(CONFIG, generator=torch.Generator().manual_seed(1))
    save_checkpoint(hypernetwork, path, card=ModelCard(dataset="made up"))
    return path


def test_the_he_side_serves_every_checkpoint(tmp_path, files, monkeypatch):
    results = tmp_path / "measurements.jsonl"
    baseline = evaluate(*files, dataclasses.replace(PLAN, is_baseline_only=True), results=results)
    assert (baseline.finished, baseline.fine_tuned, baseline.zero_shot) == (2, (), ())
    done = count_measurements(monkeypatch)
    evaluation = evaluate(other_checkpoint(tmp_path / "other.safetensors"), files[1], PLAN, results=results)
    assert {job.kind for job in done} == {"zero-shot", "predicted"}
    assert len(evaluation.fine_tuned) == 2


def test_an_interruption_keeps_what_is_done(tmp_path, files, monkeypatch):
    measure = evaluate_module.measure

    def interrupted(context, task):
        if task[0].name == "1":
            raise KeyboardInterrupt
        return measure(context, task)

    monkeypatch.setattr(evaluate_module, "measure", interrupted)
    evaluation = evaluate(*files, quick(), results=tmp_path / "measurements.jsonl")
    assert [item.name for item in evaluation.zero_shot] == ["0"]
    assert (evaluation.finished, evaluation.jobs) == (1, 2)
    monkeypatch.undo()
    assert evaluate(*files, quick(), results=tmp_path / "measurements.jsonl").finished == 2


def end_the_time(*_):
    """Rings the alarm of ``minutes`` now, and would never return without it."""
    assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] < 3600
    signal.setitimer(signal.ITIMER_REAL, 1e-6)
    while True:
        time.sleep(60)


def test_a_running_measurement_is_cut_at_the_time_limit(files, monkeypatch):
    measure = evaluate_module.measure
    slow = lambda context, task: end_the_time() if task[0].kind == "he" else measure(context, task)  # noqa: E731
    monkeypatch.setattr(evaluate_module, "measure", slow)
    evaluation = evaluate(*files, PLAN, minutes=60)
    assert (evaluation.finished, evaluation.jobs) == (3, 6)
    assert evaluation.missing == {"fine-tuning from predictions of test": 1, "fine-tuning from He of test": 2}
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    assert all(what in markdown_report(evaluation) for what in evaluation.missing)


@pytest.mark.parametrize("part", ["make_context", "training_digests", "select_networks"])
def test_the_time_limit_holds_for_the_set_up_too(files, monkeypatch, part):
    monkeypatch.setattr(evaluate_module, part, end_the_time)
    evaluation = evaluate(*files, quick(), minutes=60)
    assert (evaluation.finished, evaluation.jobs) == (0, 0)
    assert "nothing is measured" in markdown_report(evaluation)


def test_half_of_the_time_is_left_for_measurements(files, monkeypatch):
    deadlines = []
    monkeypatch.setattr(evaluate_module, "training_digests", lambda *given: deadlines.append(given[2]) or ())
    before = time.monotonic()
    assert evaluate(*files, quick(), minutes=60).finished == 2
    assert before + 1800 <= deadlines[0] <= time.monotonic() + 1800


def test_the_first_seed_chooses_the_rates_of_all(files):
    plan = dataclasses.replace(PLAN, seeds=(0, 1), fine_tune_images=(0,), splits={"test": 1}, novelty_networks=0)
    first, second = evaluate(*files, plan).fine_tuned
    assert (first.seed, second.seed) == (0, 1)
    assert first.predicted.learning_rate == second.predicted.learning_rate
    assert first.he.learning_rate == second.he.learning_rate
    assert (first.predicted, first.he) != (second.predicted, second.he)


@pytest.mark.parametrize(
    "details",
    [
        {"settings": {"sampling": {"pool": 3}}},
        {"settings": {"sampling": {"split": "broad", "pool": 1}}, "earlier_pools": {"train": 2}},
    ],
    ids=["own run", "run before"],
)
def test_graphs_of_the_training_pools_are_passed_over(tmp_path, files, monkeypatch, details):
    hypernetwork = GraphHyperNetwork(CONFIG, generator=torch.Generator().manual_seed(0))
    save_checkpoint(hypernetwork, tmp_path / "ghn.safetensors", card=ModelCard(details=details))
    seen = find_network("test", "0", Interface(4, 3, 16)).graph().digest()
    monkeypatch.setattr(
        evaluate_module, "training_digests", lambda pool, *_: (seen if pool.split == "train" else "",) * pool.size
    )
    evaluation = evaluate(tmp_path / "ghn.safetensors", files[1], quick())
    assert [item.name for item in evaluation.zero_shot] == ["1", "2"]
    assert evaluation.in_training_pool == {"test": 1}
    assert (evaluation.pool_size, evaluation.pool_known) == (3, 3)


@pytest.mark.parametrize("has_split", [False, True])
def test_images_that_training_held_out_choose_the_rates(tmp_path, files, has_split):
    hypernetwork = GraphHyperNetwork(CONFIG, generator=torch.Generator().manual_seed(0))
    card = ModelCard(details={"settings": {"data": {"validation_images": 7, "batch_size": 8}}})
    save_checkpoint(hypernetwork, tmp_path / "ghn.safetensors", card=card)
    if has_split:
        shutil.copytree(files[1] / "test", files[1] / "validation")
    data = make_context(tmp_path / "ghn.safetensors", files[1], PLAN, None).data
    assert (len(data.training), len(data.validation)) == ((96, 96) if has_split else (89, 7))
    wanted = load_training_data(files[1], DataSettings(validation_images=7), None)
    for part, images in zip((data.training, data.validation), wanted, strict=True):
        assert torch.equal(part.images, images.images)


def test_another_class_count_is_an_error(tmp_path, files):
    write_image_folder(tmp_path / "other", classes=3)
    with pytest.raises(DataError):
        evaluate(files[0], tmp_path / "other", PLAN)


def alike(network):
    """Another network of the same width and kernel."""
    candidates = (small_source(index) for index in range(3, 5000))
    return next(
        item
        for item in candidates
        if (item.width, item.kernel) == (network.width, network.kernel) and item.depth != network.depth
    )


def test_a_training_network_is_its_own_neighbour():
    hypernetwork = GraphHyperNetwork(CONFIG, generator=torch.Generator().manual_seed(0))
    known = KnownPredictions(hypernetwork, [small_source(2)])
    own = known.novelty(small_source(2))
    assert own.distance == 0.0
    assert own.covered == 1.0
    assert known.novelty(alike(small_source(2))).distance > 0.0
