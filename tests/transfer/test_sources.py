"""Weights of a trained network through the whole service: every kind of source, and what is said of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ghn_client import GHNClient, Prediction, Source, export_architecture
from ghn_client.errors import (
    ExportError,
    FileError,
    GhnClientError,
    InvalidOptionError,
    LoadError,
    SourceError,
    UnknownModelError,
)
from ghn_client.sources import LocalSource, SourceLike, as_source, read_local
from ghn_service.transfer.library import save_source
from tests.transfer.networks import EXAMPLE, Residual, images, trained

SOURCE = trained()


def save_onnx(network: nn.Module, path: Path) -> Path:
    """With its normalisations, which an export in evaluation mode folds away, and their statistics as they are."""
    network = copy.deepcopy(network).train()
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 0.0
    torch.onnx.export(
        network, (EXAMPLE,), path, dynamo=False, do_constant_folding=False, training=torch.onnx.TrainingMode.PRESERVE
    )
    return path


def state(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


# ---- what a source gives ---------------------------------------------------------------------------------------------


def test_the_same_network_gets_the_same_values(client: GHNClient) -> None:
    target = Residual()
    prediction = client.predict(target, EXAMPLE, source=SOURCE)
    report = prediction.load_into(target)
    assert set(prediction.origins.values()) == {"source:Residual (exact)"}
    assert all(torch.equal(value, state(SOURCE)[name]) for name, value in state(target).items() if value.dim())
    assert len(report.statistics) == len(prediction.statistics) == 10
    assert prediction.verify(SOURCE, target, images()) == 0.0
    assert prediction.transfer is not None
    assert prediction.transfer.is_exact
    assert not prediction.needs_recalibration


@pytest.mark.parametrize("sizes", [{"width": 20}, {"depth": 4}, {"width": 13, "depth": 3}], ids=str)
def test_a_larger_network_computes_the_same(client: GHNClient, sizes: dict[str, int]) -> None:
    target = Residual(**sizes)
    prediction = client.predict(target, EXAMPLE, source=SOURCE)
    assert prediction.transfer is not None
    assert prediction.transfer.is_exact
    assert "source:Residual (grown)" in prediction.origins.values()
    assert prediction.verify(SOURCE, target, images()) < 1e-4
    assert not prediction.needs_recalibration


def test_a_smaller_network_says_what_was_cut(client: GHNClient) -> None:
    target = Residual(width=6, depth=1)
    prediction = client.predict(target, EXAMPLE, source=SOURCE)
    transfer = prediction.transfer
    assert transfer is not None
    assert (transfer.is_exact, bool(transfer.cut_groups), bool(transfer.left_out)) == (False, True, True)
    assert 0 < transfer.similarity < 1
    assert "source:Residual (cut)" in prediction.origins.values()
    assert prediction.needs_recalibration
    assert "cut" in str(transfer)


class Smooth(Residual):
    """The same layers with another activation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.blocks(torch.tanh(self.bn1(self.conv1(x)))).mean((2, 3)))


def test_statistics_are_measured_anew_where_the_function_changed_without_a_cut(client: GHNClient) -> None:
    prediction = client.predict(Smooth(), EXAMPLE, source=SOURCE)
    transfer = prediction.transfer
    assert transfer is not None
    assert (transfer.is_exact, transfer.contains_source, transfer.cut_groups, transfer.left_out) == (
        False,
        False,
        (),
        (),
    )
    assert prediction.needs_recalibration


def test_the_hypernetwork_fills_what_no_source_fits(client: GHNClient) -> None:
    target = Residual(classes=7)
    prediction = client.predict(target, EXAMPLE, source=SOURCE, seed=3)
    alone = client.predict(target, EXAMPLE, seed=3, include=["fc.*"])
    origins = {name: origin for name, origin in prediction.origins.items() if not origin.startswith("source")}
    assert set(origins) == {"fc.weight", "fc.bias"}
    assert origins == {name: alone.origins[name] for name in origins}
    assert all(torch.equal(prediction[name], alone[name]) for name in origins)


@pytest.mark.parametrize("way", ["class_layer", "head"])
def test_the_class_layer_is_reset_where_one_asks(client: GHNClient, way: str) -> None:
    if way == "head":
        prediction = client.predict(Residual(), EXAMPLE, source=SOURCE, head="reset")
    else:
        prediction = client.predict(Residual(), EXAMPLE, source=Source(SOURCE, class_layer="reset"))
    from_hypernetwork = {name for name, origin in prediction.origins.items() if not origin.startswith("source")}
    assert from_hypernetwork == {"fc.weight", "fc.bias"}
    assert prediction.transfer is not None
    assert not prediction.transfer.is_exact
    assert not prediction.needs_recalibration


@pytest.mark.parametrize("sizes", [{}, {"width": 20, "depth": 3}, {"width": 6}, {"classes": 7}], ids=str)
def test_a_dry_run_says_what_comes(client: GHNClient, sizes: dict[str, int]) -> None:
    target = Residual(**sizes)
    analysis = client.analyze(target, EXAMPLE, source=SOURCE, dtype="float16")
    prediction = client.predict(target, EXAMPLE, source=SOURCE, dtype="float16")
    assert {item.name: item.origin for item in analysis.tensors} == dict(prediction.origins)
    assert analysis.transfer == prediction.transfer
    assert analysis.total_bytes == len(prediction.buffer)


# ---- where sources come from -----------------------------------------------------------------------------------------


def external(folder: Path) -> Path:
    model = onnx.load(save_onnx(SOURCE, folder / "whole.onnx"))
    onnx.save_model(model, folder / "outside.onnx", save_as_external_data=True, location="data", size_threshold=0)
    assert (folder / "data").stat().st_size > 4 * sum(value.numel() for value in SOURCE.parameters())
    return folder / "outside.onnx"


def source_file(folder: Path) -> Path:
    structure = export_architecture(SOURCE, EXAMPLE)
    save_source(folder / "mine.safetensors", structure, SOURCE.state_dict())
    return folder / "mine.safetensors"


def safetensors(folder: Path) -> Path:
    save_file(state(SOURCE), folder / "weights.safetensors")
    return folder / "weights.safetensors"


def checkpoint(folder: Path) -> Path:
    wrapped = {f"module.{name}": value for name, value in SOURCE.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": wrapped}, folder / "run.pt")
    return folder / "run.pt"


def script(folder: Path) -> str:
    (folder / "networks_of_mine.py").write_text(
        "from tests.transfer.networks import trained\n\n\ndef network():\n    return trained()\n"
    )
    return f"{folder / 'networks_of_mine.py'}:network"


KINDS: dict[str, Callable[[Path], SourceLike]] = {
    "module with its inputs": lambda folder: Source(SOURCE, torch.zeros(2, 3, 16, 16)),
    "onnx file": lambda folder: save_onnx(SOURCE, folder / "net.onnx"),
    "onnx file as text": lambda folder: str(save_onnx(SOURCE, folder / "net.onnx")),
    "onnx bytes": lambda folder: save_onnx(SOURCE, folder / "net.onnx").read_bytes(),
    "onnx with external data": external,
    "structure and safetensors": lambda folder: (export_architecture(SOURCE, EXAMPLE), safetensors(folder)),
    "structure and state dict": lambda folder: (export_architecture(SOURCE, EXAMPLE), SOURCE.state_dict()),
    "module and checkpoint": lambda folder: (Residual(), checkpoint(folder)),
    "module and safetensors": lambda folder: (Residual(), str(safetensors(folder))),
    "source file": source_file,
    "script": script,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_gives_the_same(client: GHNClient, tmp_path: Path, kind: str) -> None:
    target = Residual(width=12, depth=3)
    wanted = client.predict(target, EXAMPLE, source=SOURCE)
    found = client.predict(target, EXAMPLE, source=KINDS[kind](tmp_path))
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert all(torch.equal(found.statistics[name], tensor) for name, tensor in wanted.statistics.items())


def test_a_source_has_the_name_that_it_is_given(client: GHNClient) -> None:
    prediction = client.predict(Residual(), EXAMPLE, source=Source(SOURCE, name="mine"))
    assert prediction.origins["conv1.weight"] == "source:mine (exact)"
    assert prediction.transfer is not None
    assert len(prediction.transfer.source.digest) == 64


def test_tied_weights_may_have_any_of_their_names() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 4)
            self.head = nn.Linear(4, 5, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.table(x))

    value = torch.randn(5, 4)
    local = read_local(as_source((Tied(), {"head.weight": value})), torch.zeros(1, 3, dtype=torch.long))
    assert torch.equal(local.tensors["table.weight"], value)


# ---- what is refused -------------------------------------------------------------------------------------------------


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return Residual()


def of_vectors() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))


def quantised() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Flatten(), nn.Linear(768, 10)), {nn.Linear})


REFUSED: dict[str, tuple[Callable[[Path], SourceLike], type[GhnClientError]]] = {
    "meta device": (lambda folder: on_meta(), SourceError),
    "structure alone": (lambda folder: export_architecture(SOURCE, EXAMPLE), SourceError),
    "weights of another network": (lambda folder: (Residual(width=9), SOURCE.state_dict()), SourceError),
    "no weights in the dict": (lambda folder: (Residual(), {"epoch": 3}), SourceError),  # type: ignore[dict-item]
    "missing file": (lambda folder: "nothing.onnx", InvalidOptionError),
    "missing weights": (lambda folder: (Residual(), folder / "nothing.pt"), FileError),
    "weights for a name": (lambda folder: ("resnet", SOURCE.state_dict()), InvalidOptionError),
    "three values": (lambda folder: (1, 2, 3), InvalidOptionError),  # type: ignore[return-value]
    "unknown name": (lambda folder: "nothing", UnknownModelError),
    "quantised module": (lambda folder: quantised(), (ExportError, SourceError)),  # type: ignore[dict-item]
    "safetensors without structure": (safetensors, SourceError),
    "other modality": (lambda folder: Source(of_vectors(), (1, 5)), SourceError),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_a_source_is_refused(client: GHNClient, tmp_path: Path, kind: str) -> None:
    make, error = REFUSED[kind]
    for call in (client.predict, client.analyze):
        with pytest.raises(error):
            call(Residual(), EXAMPLE, source=make(tmp_path))


def test_pickled_code_is_not_run(client: GHNClient, tmp_path: Path) -> None:
    torch.save({"network": SOURCE}, tmp_path / "whole.pt")
    with pytest.raises(FileError):
        client.predict(Residual(), EXAMPLE, source=(Residual(), tmp_path / "whole.pt"))


def test_a_bad_class_layer_is_refused(client: GHNClient) -> None:
    with pytest.raises(InvalidOptionError):
        Source(SOURCE, class_layer="maybe")  # type: ignore[arg-type]
    with pytest.raises(GhnClientError):
        client.predict(Residual(classes=7), EXAMPLE, source=Source(SOURCE, class_layer="keep"))


def test_weights_that_are_no_numbers_are_refused(client: GHNClient) -> None:
    broken = trained()
    with torch.no_grad():
        broken.conv1.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(SourceError):
        client.predict(Residual(), EXAMPLE, source=broken)


def test_weights_beyond_half_precision_are_refused(client: GHNClient) -> None:
    large = trained()
    with torch.no_grad():
        large.conv1.weight *= 1e7
    with pytest.raises(SourceError):
        client.predict(Residual(), EXAMPLE, source=large, dtype="float16")


def test_outputs_of_other_shapes_are_not_compared(client: GHNClient) -> None:
    target = Residual(classes=7)
    with pytest.raises(LoadError):
        client.predict(target, EXAMPLE, source=SOURCE).verify(SOURCE, target, images())


# ---- what it composes with -------------------------------------------------------------------------------------------


def test_equal_requests_give_equal_bytes(client: GHNClient) -> None:
    target = Residual(width=13, depth=3, classes=7)
    first, second, other = (client.predict(target, EXAMPLE, source=SOURCE, seed=seed) for seed in (1, 1, 2))
    assert first.digest == second.digest
    assert first.digest != other.digest


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_statistics_keep_single_precision(client: GHNClient, tmp_path: Path, dtype: str) -> None:
    prediction = client.predict(Residual(), EXAMPLE, source=SOURCE, dtype=dtype)
    assert {tensor.dtype for tensor in prediction.values()} == {getattr(torch, dtype)}
    prediction.save(tmp_path / "w.safetensors")
    loaded = Prediction.load(tmp_path / "w.safetensors")
    assert (loaded.transfer, loaded.origins) == (prediction.transfer, prediction.origins)
    for name, value in SOURCE.named_buffers():
        if value.dim():
            assert torch.equal(loaded.statistics[name], value)
    assert torch.equal(loaded["conv1.weight"], SOURCE.conv1.weight.detach().to(getattr(torch, dtype)))


def test_include_chooses_statistics_too(client: GHNClient) -> None:
    prediction = client.predict(Residual(), EXAMPLE, source=SOURCE, include=["bn1.*"])
    assert set(prediction) == {"bn1.weight", "bn1.bias"}
    assert set(prediction.statistics) == {"bn1.running_mean", "bn1.running_var"}


def test_low_rank_works_on_a_sources_weights(client: GHNClient) -> None:
    prediction = client.predict(Residual(), EXAMPLE, source=SOURCE, low_rank="rank=3,method=spectral")
    name = "blocks.0.conv1.weight"
    product = prediction[f"{name}.factor_out"].flatten(1) @ prediction[f"{name}.factor_in"].flatten(1)
    left, values, right = torch.linalg.svd(SOURCE.state_dict()[name].flatten(1), full_matrices=False)
    torch.testing.assert_close(product, left[:, :3] * values[:3] @ right[:3], rtol=1e-3, atol=1e-4)
    assert prediction.origins[f"{name}.factor_in"] == "source:Residual (exact)"


def test_an_onnx_file_is_filled_with_weights_and_statistics(client: GHNClient, tmp_path: Path) -> None:
    path = save_onnx(Residual(width=12), tmp_path / "target.onnx")
    client.predict(path, source=SOURCE).to_onnx(tmp_path / "filled.onnx")
    target = Residual(width=12)
    client.predict(target, EXAMPLE, source=SOURCE).load_into(target)
    filled = read_local(as_source(tmp_path / "filled.onnx"))
    assert isinstance(filled, LocalSource)
    assert all(torch.equal(filled.tensors[name], value) for name, value in target.state_dict().items() if value.dim())


def test_statistics_reach_a_module_without_memory(client: GHNClient) -> None:
    with torch.device("meta"):
        target = Residual(width=12)
    prediction = client.predict(target, EXAMPLE, source=SOURCE)
    prediction.load_into(target, assign=True)
    target.eval()
    torch.testing.assert_close(target(images()), SOURCE(images()), rtol=1e-4, atol=1e-4)


def test_statistics_that_fit_nothing_are_refused(client: GHNClient) -> None:
    prediction = client.predict(Residual(), EXAMPLE, source=SOURCE)
    other = Residual()
    other.bn1 = nn.GroupNorm(2, 8)  # type: ignore[assignment]
    before = state(other)
    with pytest.raises(LoadError):
        prediction.load_into(other)
    assert all(torch.equal(value, before[name]) for name, value in state(other).items())
    assert prediction.load_into(other, strict=False).unexpected == ("bn1.running_mean", "bn1.running_var")
