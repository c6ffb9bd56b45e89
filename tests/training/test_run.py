"""What a checkpoint's card says of its training networks."""

from __future__ import annotations

import pytest

from ghn_architectures.architecture import Interface
from ghn_service.hypernetwork.checkpoint import ModelCard, save_checkpoint
from ghn_service.training.networks import Pool
from ghn_service.training.run import _begin, _export_checkpoint, graph_statistics
from ghn_service.training.settings import TrainingSettings
from ghn_service.training.state import save_state
from ghn_service.trust import KnownData, decode_statistics, judge
from tests.training.training_cases import make_trainer


def test_training_networks_are_typical_of_themselves() -> None:
    settings, source = TrainingSettings().sampling, Pool("train", Interface(), 1000)
    known = decode_statistics(graph_statistics(source, settings, num_graphs=30))
    assert known.num_graphs == 30
    graph = source(3).graph()
    origins = {spec.name: "predicted" for spec in graph.parameters()}
    assert judge(graph, origins, {}, KnownData(graphs=known)).verdict in ("typical", "unusual")


@pytest.mark.parametrize("name", ["ghn.safetensors", "state.pt"])
def test_the_card_names_the_pools_of_the_runs_before(tmp_path, name) -> None:
    parent = make_trainer(tmp_path / "parent", "sampling.split=broad", "sampling.pool=12")
    parent.earlier_pools = {"train": 5}
    save_state(parent.state(), tmp_path / "parent")
    _export_checkpoint(parent, tmp_path / "parent" / "ghn.safetensors", "made up")
    child = make_trainer(tmp_path / "child", "sampling.pool=3")
    _begin(child, tmp_path / "child", "auto", tmp_path / "parent" / name)
    save_state(child.state(), tmp_path / "child")
    resumed = make_trainer(tmp_path / "child", "sampling.pool=3")
    _begin(resumed, tmp_path / "child", "auto", None)
    card = _export_checkpoint(resumed, tmp_path / "child" / "ghn.safetensors", "made up").card
    assert card.details["earlier_pools"] == {"broad": 12, "train": 5}


def test_a_parent_that_does_not_say_its_pool_adds_none(tmp_path) -> None:
    save_checkpoint(make_trainer(tmp_path).hypernetwork, tmp_path / "ghn.safetensors", card=ModelCard())
    child = make_trainer(tmp_path / "child")
    _begin(child, tmp_path / "child", "auto", tmp_path / "ghn.safetensors")
    assert not any(child.earlier_pools.values())
