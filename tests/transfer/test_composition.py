"""What is done with a network that started from a source: tuning, deltas, factors, steps, other servers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ghn_client import GHNClient, Prediction, Source, export_architecture, recalibrate_batchnorm
from ghn_client.finetune import factorize_module, load_complete_model, load_delta, prepare, save_delta
from ghn_client.finetune.handle import FineTuneHandle, combine
from ghn_service.server.app import RunningServer, start_server
from ghn_service.server.settings import Settings
from ghn_service.transfer.library import save_source
from tests.finetune.networks import train_a_little
from tests.transfer.networks import EXAMPLE, Residual, images, trained

SOURCE = trained()
SIZES = {"exact": {}, "grown": {"width": 20, "depth": 4}, "cut": {"width": 6}, "other classes": {"classes": 7}}
STRATEGIES: dict[str, dict[str, Any]] = {
    "all": {},
    "norm-only": {},
    "norm-only, statistics kept": {"statistics": "keep"},
    "bias-only": {},
    "head-only": {},
    "additive": {"width": 4},
    "low-rank-update": {"rank": 2},
}


Start = Callable[[str], nn.Module]


@pytest.fixture(scope="module")
def start(client: GHNClient) -> Start:
    """Makes a network with the weights of the source, as a user has it before tuning."""
    found = {case: client.predict(Residual(**SIZES[case]), EXAMPLE, source=SOURCE, seed=3) for case in ("grown", "cut")}

    def make(case: str) -> nn.Module:
        target = Residual(**SIZES[case])
        found[case].load_into(target)
        if found[case].needs_recalibration:
            recalibrate_batchnorm(target, [images(16)])
        return target.eval()

    return make


def tuned(module: nn.Module, strategy: str, **options: Any) -> FineTuneHandle:
    handle = prepare(module, strategy, **options)
    train_a_little(handle.module, handle.parameters(), images(), steps=2)
    return handle


# ---- tuning and deltas -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", STRATEGIES)
@pytest.mark.parametrize("sizes", ["grown", "cut"])
def test_a_delta_fits_the_same_start_from_a_source(start: Start, tmp_path: Path, case: str, sizes: str) -> None:
    handle = tuned(start(sizes), case.partition(",")[0], **STRATEGIES[case])
    save_delta(handle, tmp_path / "delta.safetensors")
    again = load_delta(start(sizes), tmp_path / "delta.safetensors")
    assert torch.equal(again.module.eval()(images()), handle.module(images()))
    with again.disabled() as base:
        torch.testing.assert_close(base.eval()(images()), start(sizes)(images()))


def test_strategies_combine_on_a_start_from_a_source(start: Start, tmp_path: Path) -> None:
    norm = prepare(start("grown"), "norm-only", head=False, statistics="freeze")
    both = combine(norm, prepare(norm.module, "additive", width=4))
    train_a_little(both.module, both.parameters(), images(), steps=2)
    save_delta(both, tmp_path / "delta.safetensors")
    again = load_delta(start("grown"), tmp_path / "delta.safetensors")
    assert torch.equal(again.module.eval()(images()), both.module(images()))


def test_a_request_with_its_source_makes_the_base_again(client: GHNClient, start: Start, tmp_path: Path) -> None:
    handle = tuned(start("grown"), "norm-only")
    save_delta(handle, tmp_path / "delta.safetensors", request={"seed": 3, "source": "Residual"})

    def predict(request: dict[str, Any]) -> dict[str, torch.Tensor]:
        assert request == {"seed": 3, "source": "Residual"}
        prediction = client.predict(Residual(**SIZES["grown"]), EXAMPLE, source=SOURCE, seed=request["seed"])
        return {**prediction.state_dict(), **prediction.statistics}

    whole = load_complete_model(Residual(**SIZES["grown"]), tmp_path / "delta.safetensors", predict).merge()
    assert torch.equal(whole.eval()(images()), handle.module(images()))


# ---- factors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", ["grown", "cut"])
def test_factors_of_full_rank_keep_the_start(client: GHNClient, sizes: str) -> None:
    target = Residual(**SIZES[sizes])
    dense = client.predict(target, EXAMPLE, source=SOURCE)
    factors = client.predict(target, EXAMPLE, source=SOURCE, low_rank="fraction=1,method=spectral")
    small = factorize_module(target, factors)
    dense.load_into(target)
    torch.testing.assert_close(small.eval()(images()), target.eval()(images()), rtol=1e-3, atol=1e-4)


def test_factors_are_trained_and_come_back_as_a_delta(client: GHNClient, tmp_path: Path) -> None:
    target = Residual(**SIZES["grown"])
    factors = client.predict(target, EXAMPLE, source=SOURCE, low_rank="rank=3")
    handle = tuned(factorize_module(target, factors), "low-rank")
    save_delta(handle, tmp_path / "delta.safetensors")
    again = load_delta(factorize_module(target, factors), tmp_path / "delta.safetensors")
    assert torch.equal(again.module.eval()(images()), handle.module(images()))


def test_what_changes_a_source_says_so_and_needs_new_statistics(client: GHNClient, tmp_path: Path) -> None:
    noise = [("noise", {"beta": 0.1, "layer": 1})]
    requests: list[tuple[dict[str, Any], bool]] = [
        ({"source": SOURCE, "steps": noise}, False),
        ({"source": Source(SOURCE, post_process=True), "steps": noise}, True),
        ({"source": Source(SOURCE, post_process=True)}, False),
        ({"source": SOURCE, "low_rank": "rank=3"}, True),
    ]
    for options, is_changed in requests:
        client.predict(Residual(), EXAMPLE, **options).save(tmp_path / "w.safetensors")
        prediction = Prediction.load(tmp_path / "w.safetensors")
        assert prediction.transfer is not None
        assert prediction.transfer.is_exact == (not is_changed)
        assert prediction.needs_recalibration == prediction.transfer.is_changed == is_changed


# ---- post-processing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("post_process", [False, True])
def test_steps_reach_what_is_predicted_and_the_source_where_one_asks(client: GHNClient, post_process: bool) -> None:
    target = Residual(**SIZES["other classes"])
    plain = client.predict(target, EXAMPLE, source=SOURCE, head="predicted")
    given = {name for name, origin in plain.origins.items() if origin.startswith("source")}
    for step in ("orthogonal", ("noise", {"beta": 0.1, "layer": 1}), "auto"):
        source = Source(SOURCE, post_process=post_process)
        stepped = client.predict(target, EXAMPLE, source=source, head="predicted", steps=[step])
        different = {name for name, value in stepped.items() if not torch.equal(value, plain[name])}
        assert post_process or not different & given
        assert not post_process or different & given or step in ("orthogonal", "auto")  # which find nothing to mend
        assert all(torch.equal(stepped.statistics[name], value) for name, value in plain.statistics.items())


# ---- the same from anywhere ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    save_source(folder / "narrow.safetensors", export_architecture(SOURCE, EXAMPLE), SOURCE.state_dict())
    return folder


@pytest.fixture(scope="module")
def server(library: Path) -> Iterator[RunningServer]:
    with start_server(Settings(port=0, sources=(str(library),))) as running:
        running.wait_ready(60)
        yield running


@pytest.mark.parametrize("sizes", ["grown", "other classes"])
def test_a_server_elsewhere_gives_the_same_bytes(
    client: GHNClient, server: RunningServer, library: Path, sizes: str
) -> None:
    target = Residual(**SIZES[sizes])
    here = client.predict(target, EXAMPLE, source=library / "narrow.safetensors", seed=7)
    with GHNClient(server.address) as remote:
        first, second, other = (remote.predict(target, EXAMPLE, source="narrow", seed=seed) for seed in (7, 7, 8))
    assert first.digest == second.digest == here.digest
    assert other.digest != first.digest
