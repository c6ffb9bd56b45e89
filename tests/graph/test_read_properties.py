"""Whatever the bytes, reading gives a graph or a typed error; order and names in the file do not matter."""

from __future__ import annotations

import functools
import random

import onnx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ghn_service.graph.onnx.reader import read_onnx
from ghn_service.graph.raw_graph import GraphLimits
from tests.data.regenerate import stored_model
from tests.fuzzing.targets import read_or_refuse

SMALL = (("resnet18", "dynamo-eval-optimize"), ("squeezenet1_1", "script-eval"), ("mobilenet_v3_small", "script-eval"))
few = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@functools.cache
def stored(name: str, form: str) -> bytes:
    return stored_model(name, form)


@few
@given(st.binary(max_size=400))
def test_arbitrary_bytes(data: bytes) -> None:
    assert read_or_refuse(data) is None


@few
@given(st.sampled_from(SMALL), st.integers(0, 2**32), st.integers(1, 8))
@example(("resnet18", "dynamo-eval-optimize"), 53407, 3)  # metadata that is no longer text
def test_changed_bytes(model: tuple[str, str], seed: int, count: int) -> None:
    generator = random.Random(seed)
    data = bytearray(stored(*model))
    for _ in range(count):
        data[generator.randrange(len(data))] = generator.randrange(256)
    read_or_refuse(bytes(data), limits=GraphLimits())


@few
@given(st.sampled_from(SMALL), st.floats(0, 1, exclude_max=True))
def test_truncated_bytes(model: tuple[str, str], share: float) -> None:
    data = stored(*model)
    read_or_refuse(data[: int(share * len(data))], limits=GraphLimits())


def shuffle_nodes(proto: onnx.ModelProto, generator: random.Random) -> None:
    """Puts the nodes into another topological order."""
    nodes = list(proto.graph.node)
    writer = {name: index for index, node in enumerate(nodes) for name in node.output}
    sources = [{writer[name] for name in node.input if name in writer} for node in nodes]
    readers: list[list[int]] = [[] for _ in nodes]
    for index, found in enumerate(sources):
        for source in found:
            readers[source].append(index)
    waiting = [len(found) for found in sources]
    ready = [index for index, count in enumerate(waiting) if count == 0]
    order: list[int] = []
    while ready:
        index = ready.pop(generator.randrange(len(ready)))
        order.append(index)
        for reader in readers[index]:
            waiting[reader] -= 1
            if waiting[reader] == 0:
                ready.append(reader)
    copies = [onnx.NodeProto.FromString(nodes[index].SerializeToString()) for index in order]
    del proto.graph.node[:]
    proto.graph.node.extend(copies)


def rename_values(proto: onnx.ModelProto, generator: random.Random) -> None:
    """Gives every value and node another name, as another exporter would."""
    names: dict[str, str] = {"": ""}

    def renamed(name: str) -> str:
        return names.setdefault(name, f"t{len(names)}_{generator.randrange(1000)}")

    proto.producer_name = "another exporter"
    graph = proto.graph
    for item in (*graph.initializer, *graph.input, *graph.output, *graph.value_info):
        item.name = renamed(item.name)
    for node in graph.node:
        node.name = f"node{generator.randrange(10**9)}"
        node.input[:] = [renamed(name) for name in node.input]
        node.output[:] = [renamed(name) for name in node.output]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("name", "form"),
    [("googlenet", "script-eval"), ("vit_b_16", "dynamo-train"), ("shufflenet_v2_x0_5", "dynamo-train")],
)
def test_the_order_of_nodes_does_not_matter(name: str, form: str, seed: int) -> None:
    proto = onnx.ModelProto.FromString(stored(name, form))
    shuffle_nodes(proto, random.Random(seed))
    assert read_onnx(proto.SerializeToString()).digest() == read_onnx(stored(name, form)).digest()


@pytest.mark.parametrize(
    ("name", "form"),
    [("resnet18", "dynamo-train"), ("mobilenet_v3_small", "dynamo-train"), ("densenet121", "dynamo-train")],
)
def test_names_do_not_matter(name: str, form: str) -> None:
    proto = onnx.ModelProto.FromString(stored(name, form))
    rename_values(proto, random.Random(0))
    assert read_onnx(proto.SerializeToString()).digest() == read_onnx(stored(name, form)).digest()


def test_reading_twice_gives_the_same_graph() -> None:
    data = stored("swin_t", "dynamo-eval-optimize")
    assert read_onnx(data) == read_onnx(data)
