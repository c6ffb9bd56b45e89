"""``auto``: the largest source that is contained, else the most similar where that pays, else none."""

from __future__ import annotations

import pytest
import torch

from ghn_client import export_architecture
from ghn_service.errors import SourceError
from ghn_service.graph.raw_graph import GraphLimits
from ghn_service.transfer import auto
from ghn_service.transfer.auto import choose_source
from ghn_service.transfer.library import Library, save_source
from ghn_service.transfer.transfer import TransferPlan

SIZES = {"large": 300, "medium": 200, "small": 100}


@pytest.fixture
def choose(tmp_path, monkeypatch):
    """``choose_source`` among three sources with these similarities; 1 is contained, None has nothing in common."""
    for name, size in SIZES.items():
        save_source(tmp_path / f"{name}.safetensors", b"structure", {"weight": torch.ones(size)})

    def choose(**similarities):
        def plan(source, structure, **_):
            similarity = similarities.get(source.name)
            if similarity is None:
                raise SourceError("nothing in common")
            return TransferPlan({}, similarity, False, contains_source=similarity == 1.0)

        monkeypatch.setattr(auto, "plan_transfer", plan)
        choice = choose_source(Library((tmp_path,)), b"target", minimum_similarity=0.5)
        assert all(any(name in reason for reason in choice.reasons) for name in SIZES)
        return choice.source and choice.source.name

    return choose


def test_the_largest_contained_source_is_taken(choose):
    assert choose(large=0.9, medium=1.0, small=1.0) == "medium"


def test_without_one_the_most_similar_that_pays_is_taken(choose):
    assert choose(large=0.3, medium=None, small=0.6) == "small"


def test_without_one_that_pays_it_is_the_hypernetwork(choose):
    assert choose(large=0.3, medium=0.49) is None
    assert choose() is None


def test_a_network_that_cannot_be_read_has_no_source():
    structure = export_architecture(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)), (1, 4))
    for unreadable, limits in ((structure, GraphLimits(max_nodes=1)), (b"no model", None)):
        choice = choose_source(Library(), unreadable, limits=limits)
        assert choice.source is None
        assert len(choice.reasons) == 1 + len(Library().summaries())


def test_an_empty_library_leaves_it_to_the_hypernetwork(tmp_path):
    choice = choose_source(Library((tmp_path,)), b"target")
    assert (choice.source, choice.plan) == (None, None)
    assert choice.reasons
