"""Structure-aware fuzzing, a few hundred cases of it; ``make fuzz`` goes on for as long as it is given."""

from __future__ import annotations

from pathlib import Path
from random import Random

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ghn_client.wire import ghn_pb2
from ghn_service.graph.raw_graph import GraphLimits
from tests.data.regenerate import stored_model
from tests.fuzzing import targets
from tests.fuzzing.models import MUTATIONS, Mutation, build_network, mutate, spoil_text
from tests.fuzzing.targets import CORPUS, TARGETS, check_cost, read_or_refuse, reader

STORED = (("resnet18", "dynamo-eval-optimize"), ("squeezenet1_1", "script-eval"), ("vit_b_16", "dynamo-train"))

randoms = st.randoms(use_true_random=False)
some = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
few = settings(some, max_examples=15)


@few
@given(randoms)
def test_an_undamaged_network_is_predicted(random: Random) -> None:
    assert reader(build_network(random).SerializeToString())


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda item: item.__name__)
@few
@given(randoms)
def test_one_damage(mutation: Mutation, random: Random) -> None:
    proto = build_network(random)
    mutation(proto, random)
    reader(proto.SerializeToString())


@some
@given(randoms, st.integers(2, 6))
def test_several_damages(random: Random, count: int) -> None:
    proto = build_network(random)
    mutate(proto, random, count)
    reader(proto.SerializeToString())


@some
@given(randoms)
def test_text_that_is_not_utf8(random: Random) -> None:
    reader(spoil_text(build_network(random).SerializeToString(), random))


@few
@given(st.sampled_from(STORED), randoms, st.integers(1, 4))
def test_damaged_exports(model: tuple[str, str], random: Random, count: int) -> None:
    proto = onnx.ModelProto.FromString(stored_model(*model))
    mutate(proto, random, count)
    read_or_refuse(proto.SerializeToString(), limits=GraphLimits())


@some
@given(st.binary(max_size=300))
def test_requests_of_any_bytes(data: bytes) -> None:
    targets.request(data)


@some
@given(
    st.builds(
        ghn_pb2.PostProcessingStep,
        name=st.sampled_from(["noise", "orthogonal", "", "magic"]),
        options=st.dictionaries(
            st.sampled_from(["beta", "scale", "method", "tensors", "", "☃"]),
            st.sampled_from(["nan", "-1", "1e999", "", "0", "1e-5", "true", "*", "☃"]),
            max_size=3,
        ),
    )
)
def test_steps_of_any_kind(step: ghn_pb2.PostProcessingStep) -> None:
    targets.request(ghn_pb2.PredictWeightsRequest(steps=[step]).SerializeToString())


@pytest.mark.parametrize("path", sorted(CORPUS.rglob("*.*")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_what_fuzzing_once_found(path: Path) -> None:
    check_cost(TARGETS[path.parent.name], path.read_bytes())
