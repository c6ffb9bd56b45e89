"""``ghn-client plan`` and ``ghn-client finetune`` end to end, without a server."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

import ghn_client.cli.finetune as tuning_commands
from ghn_client.cli.app import app
from ghn_client.errors import InvalidOptionError
from ghn_client.finetune.delta import load_delta, read_delta
from ghn_client.finetune.images import ImageBatches, load_images
from ghn_client.networks import find_network
from ghn_client.onnx.export import export_architecture
from tests.finetune.networks import ResidualNetwork
from tests.finetune.test_onnx_module import filled

FACTORY = "tests.finetune.networks:ResidualNetwork"


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture
def images(tmp_path):
    image = pytest.importorskip("PIL.Image")
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for label, name in enumerate(("ant", "bee", "cat", "dog")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = (40 + 50 * label + 20 * generator.random((10, 10, 3))).astype(np.uint8)
                image.fromarray(pixels).save(folder / f"{index}.png")
    return tmp_path / "images"


def test_plan_as_table_and_json():
    shown = run("plan", FACTORY, "--samples", 1000, "--changed", 10)
    assert shown.exit_code == 0
    assert "recommended: patch" in shown.stdout
    document = json.loads(run("plan", FACTORY, "--samples", 1000, "--memory", "1M", "--json").stdout)
    assert {row["strategy"] for row in document["rows"]} >= {"all", "norm_only", "patch"}


def test_plan_refuses_what_it_cannot_read(tmp_path):
    assert run("plan", tmp_path / "no.onnx", "--samples", 10).exit_code != 0
    assert run("plan", FACTORY, "--samples", 10, "--memory", "much").exit_code != 0


def test_finetune_from_the_own_start(tmp_path, images):
    delta = tmp_path / "delta.safetensors"
    result = run(
        "finetune", FACTORY, "--data", images, "--own-start", "--image-size", 8, "--epochs", 12, "--batch-size", 16,
        "--strategy", "norm-only", "--option", "head=true", "--output", delta, "--json",
        "--model-out", tmp_path / "model.safetensors",
    )  # fmt: skip
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document["accuracy"] >= 0.5
    assert delta.stat().st_size == document["delta_bytes"]
    whole = safetensors.torch.load_file(str(tmp_path / "model.safetensors"))
    assert set(whole) == set(ResidualNetwork().state_dict())
    tuned = load_delta(ResidualNetwork(), delta).merge().state_dict()
    assert all(torch.equal(whole[name], value) for name, value in tuned.items() if not name.endswith("tracked"))


def test_the_written_delta_fits_the_start(tmp_path, images):
    delta = tmp_path / "delta.safetensors"
    run(
        "finetune", FACTORY, "--data", images, "--own-start", "--image-size", 8, "--epochs", 1,
        "--strategy", "additive", "--option", "width=4", "-o", delta,
    )  # fmt: skip
    assert load_delta(ResidualNetwork(), delta).strategy == "additive"


def test_finetune_of_an_onnx_file_from_its_own_weights(tmp_path, images):
    onnx.save(filled(ResidualNetwork()), tmp_path / "model.onnx")
    result = run(
        "finetune", tmp_path / "model.onnx", "--data", images, "--own-start", "--epochs", 8, "--batch-size", 16,
        "--output", tmp_path / "delta.safetensors", "--model-out", tmp_path / "tuned.onnx", "--json",
    )  # fmt: skip
    assert result.exit_code == 0
    assert json.loads(result.stdout)["accuracy"] >= 0.5
    before, after = (onnx.load(tmp_path / name) for name in ("model.onnx", "tuned.onnx"))
    values = [{t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer} for model in (before, after)]
    assert np.array_equal(values[0]["stem.weight"], values[1]["stem.weight"])
    assert not np.array_equal(values[0]["norm.weight"], values[1]["norm.weight"])
    assert not np.array_equal(values[0]["norm.running_mean"], values[1]["norm.running_mean"])


def test_finetune_of_an_onnx_file_without_weights_predicts_them(tmp_path, images):
    structure = export_architecture(ResidualNetwork(), torch.zeros(1, 3, 8, 8))
    (tmp_path / "structure.onnx").write_bytes(structure)
    delta = tmp_path / "delta.safetensors"
    result = run(
        "finetune", tmp_path / "structure.onnx", "--data", images, "--epochs", 1, "--output", delta, "--json",
        "--model-out", tmp_path / "tuned.onnx",
    )  # fmt: skip
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document["request"]["graph_digest"]
    assert document["trust"]["verdict"] in ("typical", "unusual", "far")
    assert read_delta(delta)[0].request is not None
    session = onnxruntime.InferenceSession(tmp_path / "tuned.onnx")
    (logits,) = session.run(None, {session.get_inputs()[0].name: np.zeros((1, 3, 8, 8), np.float32)})
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("kind", ["factory", "onnx"])
def test_finetune_starts_from_a_source(tmp_path, images, kind):
    torch.save(ResidualNetwork(seed=3).state_dict(), tmp_path / "trained.pt")
    (tmp_path / "target.onnx").write_bytes(export_architecture(ResidualNetwork(), torch.zeros(1, 3, 8, 8)))
    common = (FACTORY if kind == "factory" else tmp_path / "target.onnx", "--data", images, "--epochs", 1, "--json")
    common = (*common, "--source", FACTORY, "--source-weights", tmp_path / "trained.pt", "-o", tmp_path / "d")
    if kind == "factory":
        common = (*common, "--image-size", 8)
    result = run("finetune", *common, "--strategy", "head-only", "--option", "statistics=freeze")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["request"]["source"].startswith("ResidualNetwork@")
    assert "the source's running statistics" in result.stderr
    if kind == "factory":  # what was trained is the base of the delta
        assert load_delta(ResidualNetwork(seed=3), tmp_path / "d").strategy == "head_only"
    for other in (("--own-start",), ("--weights", tmp_path / "w.safetensors")):
        assert run("finetune", *common, *other).exit_code == 2


def test_onnx_files_of_other_inputs_are_refused(tmp_path, images):
    onnx.save(filled(ResidualNetwork()), tmp_path / "model.onnx")
    (tmp_path / "structure.onnx").write_bytes(export_architecture(ResidualNetwork(), torch.zeros(1, 3, 8, 8)))
    (tmp_path / "damaged.onnx").write_bytes(b"not a model")
    for arguments in (
        (tmp_path / "model.onnx", "--image-size", 16),
        (tmp_path / "structure.onnx",),
        (tmp_path / "damaged.onnx",),
    ):
        result = run("finetune", *arguments, "--data", images, "--own-start")
        assert result.exit_code not in (0, 70)
    result = run("finetune", FACTORY, "--data", images, "--own-start", "--model-out", tmp_path / "tuned.onnx")
    assert result.exit_code not in (0, 70)


def test_a_file_without_norms_gets_them_and_keeps_its_function(tmp_path, images):
    torch.manual_seed(0)
    bare = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 4),
    )  # fmt: skip
    onnx.save(filled(bare), tmp_path / "bare.onnx")
    common = (tmp_path / "bare.onnx", "--data", images, "--own-start", "--epochs", 1, "-o", tmp_path / "d.safetensors")
    refused = run("finetune", *common)
    assert refused.exit_code == 4
    nobody = ("--address", "localhost:1")  # so that a prediction would be another failure
    assert run("finetune", *(item for item in common if item != "--own-start"), *nobody).exit_code == 4
    assert "--option missing=insert" in refused.stderr
    options = ("--option", "missing=insert", "--model-out", tmp_path / "tuned.onnx", "--json")
    result = run("finetune", *common, *options)
    assert result.exit_code == 0, result.output
    _, held_out = load_images(images, image_size=8)
    session = onnxruntime.InferenceSession(tmp_path / "tuned.onnx")
    pixels = ImageBatches(held_out, batch_size=1, augment=False)
    right = [
        int(session.run(None, {session.get_inputs()[0].name: image.numpy()})[0].argmax()) == int(label)
        for image, label in pixels
    ]
    assert np.mean(right) == pytest.approx(json.loads(result.stdout)["accuracy"])


@pytest.mark.parametrize("kind", ["script", "onnx"])
def test_a_network_of_gray_images_is_given_gray_images(tmp_path, images, kind):
    (tmp_path / "gray.py").write_text(
        "import torch\nfrom torch import nn\ndef make():\n    torch.manual_seed(0)\n    return nn.Sequential("
        "nn.Conv2d(1, 8, 8), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4))\n"
    )
    network = f"{tmp_path / 'gray.py'}:make"
    arguments = (network, "--image-size", 8)
    if kind == "onnx":
        model = filled(find_network(network).eval(), way="dynamo", example=torch.zeros(1, 1, 8, 8))
        onnx.save(model, tmp_path / "gray.onnx")
        arguments = (tmp_path / "gray.onnx",)
    # 48 images in batches of 47: BatchNorm, here on one value per channel, cannot be trained on the one left over
    common = ("--data", images, "--own-start", "--epochs", 1, "--batch-size", 47, "-o", tmp_path / "d")
    result = run("finetune", *arguments, *common)
    assert result.exit_code == 0, result.output
    assert load_delta(find_network(network), tmp_path / "d").strategy == "norm_only"


@pytest.mark.parametrize(
    "arguments",
    [
        ("--output", "nowhere/d"),
        ("--output", "."),
        ("--model-out", "nowhere/m.safetensors"),
        ("--resume", "nowhere/state"),
        ("--output", "m.safetensors", "--model-out", "m.safetensors"),
        ("--weights", "w.safetensors", "--output", "w.safetensors"),
        ("--device", "tape"),
        ("--device", "meta"),
        pytest.param(("--device", "cuda"), marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")),
    ],
)
def test_places_that_are_not_there_are_refused_before_the_work(tmp_path, images, arguments, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.safetensors").touch()
    monkeypatch.setattr(tuning_commands, "load_images", None)
    assert run("finetune", FACTORY, "--data", images, *arguments).exit_code == 2


def test_what_cannot_be_tuned_is_refused_before_anything_is_predicted(tmp_path, images):
    nobody = ("--address", "localhost:1", "--image-size", 8)
    (tmp_path / "small.py").write_text(
        "import torch\ndef make():\n    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), "
        "torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 2))\n"
    )
    for arguments in (
        (FACTORY, "--data", tmp_path / "no-images"),
        (FACTORY, "--data", images, "--strategy", "magic"),
        (FACTORY, "--data", images, "--option", "colour=red"),
        (f"{tmp_path / 'small.py'}:make", "--data", images),  # two outputs for four classes
    ):
        assert run("finetune", *arguments, *nobody).exit_code in (1, 2)
    assert run("finetune", FACTORY, "--data", images, *nobody, "--timeout", 1).exit_code in (5, 6)


def test_an_interruption_keeps_the_best_finished_epoch(tmp_path, images, monkeypatch):
    batches, passes = ImageBatches.__iter__, []

    def interrupted(self):
        passes.append(self)
        if len(passes) > 4:  # training and validation of two epochs
            raise KeyboardInterrupt
        return batches(self)

    monkeypatch.setattr(ImageBatches, "__iter__", interrupted)
    delta = tmp_path / "delta.safetensors"
    result = run(
        "finetune", FACTORY, "--data", images, "--own-start", "--image-size", 8, "--epochs", 9, "--output", delta,
        "--resume", tmp_path / "state",
    )  # fmt: skip
    assert result.exit_code == 130
    assert "goes on from" in result.stderr
    assert load_delta(ResidualNetwork(), delta).strategy == "norm_only"


@pytest.mark.parametrize(
    "arguments",
    [
        ("model.onnx",),
        ("nowhere.py:make",),
        ("no.such.module:make",),
        ("tests.finetune.networks:missing",),
        (FACTORY, "--strategy", "magic"),
        (FACTORY, "--option", "head"),
    ],
)
def test_impossible_requests_end_with_an_error(images, arguments):
    result = run("finetune", *arguments, "--data", images, "--own-start", "--image-size", 8)
    assert result.exit_code not in (0, 70)


def test_image_folders_are_read_in_class_order(images):
    training, validation = load_images(images, image_size=8)
    assert training.images.shape == (48, 3, 8, 8)
    assert training.num_classes == 4
    assert len(validation.labels) == 16
    means = [float(training.images[training.labels == c].float().mean()) for c in range(4)]
    assert means == sorted(means)


def test_folders_without_images_are_refused(tmp_path):
    with pytest.raises(InvalidOptionError):
        load_images(tmp_path, image_size=8)
    with pytest.raises(InvalidOptionError):
        load_images(tmp_path / "nothing", image_size=8)
