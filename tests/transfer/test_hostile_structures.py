"""Structures of strangers: small files that say endless things end in typed errors, or are served without structure."""

import contextlib

import numpy
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from ghn_client.onnx.export import export_architecture
from ghn_service.errors import GhnServiceError, LimitExceededError
from ghn_service.graph.raw_graph import GraphLimits
from ghn_service.predictor import plan_source
from ghn_service.server import service
from ghn_service.transfer import work
from ghn_service.transfer.axes import Dim, concatenation, nesting, unify
from ghn_service.transfer.library import AUTO, Library
from ghn_service.transfer.reading import read_network
from ghn_service.transfer.source import Source
from ghn_service.transfer.transfer import plan_transfer, transfer_weights
from tests.transfer.pairs import make_source, transfer_between

node = helper.make_node
HUGE = 2**62
WEIGHTS = {"v": (4, 6), "w": (6, 5)}


class StoppedError(Exception):
    """What a check raises."""


class Stop:
    """A check that ends the work when it is called for the ``count``-th time."""

    def __init__(self, count):
        self.left = count

    def __call__(self):
        self.left -= 1
        if self.left <= 0:
            raise StoppedError


def structure(nodes, weights=(), constants=(), functions=()):
    """Two linear layers x -> h -> y, and more nodes."""
    tensors = [
        TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
        for name, shape in (*WEIGHTS.items(), *dict(weights).items())
    ]
    tensors += [numpy_helper.from_array(numpy.array(value), name) for name, value in dict(constants).items()]
    nodes = [node("Gemm", ["x", "v"], ["h"]), *nodes, node("Gemm", ["h", "w"], ["y"])]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 4))]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 5))]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("odd", 1), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9, functions=functions).SerializeToString()


def source(**shapes):
    """What the two linear layers, and further weights of these shapes, were trained to."""
    names = {**WEIGHTS, **shapes}
    return Source("trained", structure([], shapes), {name: torch.randn(shape) for name, shape in names.items()})


def tower(depth, name="t", *, joined=""):
    """An axis of 4**depth parts, or with ``joined`` one that nests as deeply."""
    made = "h"
    for i in range(depth):
        yield node("Concat", [made, made], [f"{name}a{i}"], axis=0)
        yield node("Flatten", [f"{name}a{i}"], [f"{name}b{i}"], axis=0)
        made = f"{name}{i}"
        yield node("Concat", [f"{name}b{i}", joined or f"{name}b{i}"], [made], axis=1)


def staircase(depth):
    """Axes that are parts of each other: every layer adds another one and a bit to itself."""
    weights = {f"w{i}": (4, 1 + depth - i) for i in range(depth)} | {"w1x": (4, 1)}
    nodes = [node("Gemm", ["x", name], [f"out_{name}"]) for name in weights]
    for i in range(depth - 1):
        nodes += [
            node("Concat", [f"out_w{i + 1}", "out_w1x"], [f"c{i}"], axis=1),
            node("Add", [f"out_w{i}", f"c{i}"], [f"s{i}"]),
        ]
    return structure(nodes, weights)


@pytest.mark.parametrize("depth", [16, 31, 200])
def test_axes_of_endlessly_many_parts_are_refused(depth, monkeypatch):
    monkeypatch.setattr(work, "MAX_WORK", 100_000)
    nodes = [*tower(depth), node("Mystery", [f"t{min(depth, 20) - 1}"], ["z"], domain="odd")]
    with pytest.raises(LimitExceededError) as caught:
        plan_transfer(source(), structure(nodes))
    assert caught.value.field == "architecture.onnx_model"


def test_planning_notices_that_nobody_waits():
    nodes = [*tower(25), node("Mystery", ["t24"], ["z"], domain="odd")]
    library = Library()
    with pytest.raises(StoppedError):
        plan_transfer(source(), structure(nodes), check=Stop(5))
    for name in (library.summaries()[0].name, AUTO):
        with pytest.raises(StoppedError):
            plan_source(library, name, structure(nodes), check=Stop(5))
    with pytest.raises(StoppedError):
        transfer_weights(source(), structure([]), plan_transfer(source(), structure([])), check=Stop(2))


def test_the_server_can_end_planning(client, monkeypatch):
    found = []

    def plan(*args, check, **options):
        found.append(check())
        return plan_source(*args, check=check, **options)

    monkeypatch.setattr(service, "plan_source", plan)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1568, 10))
    client.analyze(module, torch.zeros(1, 3, 16, 16), source=AUTO)
    assert found == [None]


def test_many_operators_on_one_long_concatenation_cost_little(monkeypatch):
    nodes = [node("ReduceSum", ["h"], ["s"], keepdims=0), node("Concat", ["u"] * 1000, ["p"], axis=0)]
    nodes += [node("Mul", ["p", "s"], ["r0"]), *(node("Relu", [f"r{i}"], [f"r{i + 1}"]) for i in range(500))]
    monkeypatch.setattr(work, "MAX_WORK", 100_000)
    plan = plan_transfer(source(), structure(nodes, {"u": (2,)}))
    assert plan.origins["v"] == "exact"


@pytest.mark.parametrize(
    ("nodes", "constants"),
    [
        pytest.param(
            [*tower(300, joined="h"), *tower(300, "q", joined="h"), node("Add", ["t299", "q299"], ["z"])],
            {},
            id="towers",
        ),
        pytest.param(
            [node("Expand", ["h", "k"], ["e"]), node("Flatten", ["e"], ["f"], axis=0)],
            {"k": [HUGE] * 15 + [6]},
            id="flat",
        ),
        pytest.param(
            [node("Expand", ["h", "k"], ["e"]), node("Gather", ["e", "i"], ["z"], axis=0)],
            {"k": [HUGE, 6], "i": [[0, 0], [0, 0]]},
            id="gather",
        ),
        pytest.param(
            [node("Max", ["a", "b", "c"], ["z"]), node("Where", ["a", "b", "c"], ["q"])],
            {"a": numpy.ones((1024, 1, 1), int), "b": numpy.ones((1024, 1), int), "c": numpy.ones(1024, int)},
            id="broadcast",
        ),
        pytest.param([node("Concat", ["a"] * 90, ["z"], axis=0)], {"a": [1] * 1024}, id="numbers"),
        pytest.param([node("Unsqueeze", ["h", "a"], ["z"])], {"a": list(range(5000))}, id="unsqueeze"),
        pytest.param([node("ReduceSum", ["h", "a"], ["z"])], {"a": [0] * 1000}, id="reduce"),
        pytest.param([node("MatMul", [], ["z"], domain="com.microsoft")], {}, id="product of nothing"),
        pytest.param([node("Identity", [], ["z"], domain="com.microsoft")], {}, id="copy of nothing"),
        pytest.param([node("Odd", [], ["z"], domain="odd", axis=-1)], {}, id="axis of nothing"),
        pytest.param([node("Split", ["h"], ["p", "q"], axis=1, split=[-2, 8])], {}, id="split"),
    ],
)
def test_impossible_structures_are_served_without_structure(nodes, constants, monkeypatch):
    monkeypatch.setattr(work, "MAX_WORK", 1_000_000)
    result = transfer_weights(source(), structure(nodes, constants=constants))
    assert set(result.tensors) == {"v", "w"}


def test_numbers_of_a_hundred_axes_end_in_a_plan_or_a_refusal():
    model = onnx.load_from_string(structure([]))
    model.graph.initializer.add(name="a", dims=[1] * 100, data_type=TensorProto.INT64, raw_data=bytes(8))
    with contextlib.suppress(GhnServiceError):
        plan_transfer(source(), model.SerializeToString())


def test_numbers_that_are_kept_are_counted(monkeypatch):
    monkeypatch.setattr(work, "MAX_WORK", 100_000)
    nodes = [node("Add", [f"a{i}" if i else "a", "a"], [f"a{i + 1}"]) for i in range(200)]
    with pytest.raises(LimitExceededError):
        plan_transfer(source(), structure(nodes, constants={"a": [1] * 1024}))


def test_pieces_of_sequences_are_counted(monkeypatch):
    monkeypatch.setattr(work, "MAX_WORK", 100_000)
    nodes = [node("SplitToSequence", ["h", "one"], [f"s{i}"], axis=1) for i in range(2000)]
    with pytest.raises(LimitExceededError):
        plan_transfer(source(), structure(nodes, constants={"one": 1}))


def test_axes_that_nest_too_deeply_are_refused():
    plan_transfer(source(), staircase(work.MAX_NESTING // 2))
    with pytest.raises(LimitExceededError):
        plan_transfer(source(), staircase(work.MAX_NESTING * 5))


def test_unification_ends_at_one_depth_wherever_it_is_called():
    def stairs():
        first = last = Dim(200)
        for size in range(199, 1, -1):
            part = Dim(size)
            unify(last, concatenation([part, Dim(1)]))
            last = part
        return first

    first, other = stairs(), stairs()
    assert nesting(first) == 198
    with work.counted_work(), pytest.raises(RecursionError):
        unify(first, other)


def test_calls_of_a_function_share_the_constant_that_they_are_given():
    def function(name, nodes):
        made = helper.make_function("odd", name, ["a"], ["b"], nodes, [*opsets], ["held"])
        for item in made.node[:-1]:
            key = "value" if item.op_type == "Constant" else "held"
            item.attribute.add(name=key, ref_attr_name="held", type=4)
        return made

    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("odd", 1)]
    last = node("Identity", ["a"], ["b"])
    inner = function("Inner", [node("Constant", [], ["c"]), last])
    outer = function("Outer", [*(node("Inner", ["a"], [f"t{i}"], domain="odd") for i in range(5)), last])
    call = node("Outer", ["h"], ["z"], domain="odd", held=numpy_helper.from_array(numpy.arange(1000)))
    network = read_network(structure([call], functions=[inner, outer]), GraphLimits(), "")
    kept = {id(value.known) for value in network.values.values() if value.known is not None}
    assert len(kept) == 1
    assert next(value.known for value in network.values.values() if value.known is not None).tolist() == [*range(1000)]


# ---- convolutions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [4, 5, 50])
def test_a_kernel_that_padding_moves_away_is_cut(padding):
    example = torch.zeros(1, 3, 16, 16)
    trained, module = (
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=pixels), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
        for pixels in (1, padding)
    )
    result = transfer_between(trained, module, example)
    assert result.plan.origins["0.weight"] == "cut"
    assert torch.equal(module[0].weight, trained[0].weight)


@pytest.mark.parametrize(
    ("pixels", "attributes"),
    [
        ((1, 3, 16, 16), {"pads": [-5] * 4}),
        ((1, 3, 16, 16), {"pads": [2**63 - 1] * 4}),
        ((1, 3, 16, 16), {"dilations": [0, 0], "kernel": 1}),
        ((1, 3, 16, 16), {"strides": [-1, -1]}),
        ((0, 0, 0, 0), {}),
        ((1, 1, 16, 16), {}),
    ],
)
def test_impossible_convolutions_end_in_a_plan_or_a_refusal(pixels, attributes):
    def model(channels, pixels, kernel=3, **attributes):
        nodes = [
            node("Conv", ["x", "a"], ["h"], **attributes),
            node("Conv", ["h", "b"], ["g"]),
            node("GlobalAveragePool", ["g"], ["p"]),
            node("Flatten", ["p"], ["f"]),
            node("Gemm", ["f", "c"], ["y"]),
        ]
        shapes = {"a": (8, channels, kernel, kernel), "b": (8, 8, 3, 3), "c": (8, 5)}
        tensors = [TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape) for name, shape in shapes.items()]
        inputs = [helper.make_tensor_value_info("x", 1, pixels)]
        graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("y", 1, (1, 5))], tensors)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        return made.SerializeToString(), {name: torch.randn(shape) for name, shape in shapes.items()}

    trained = Source("trained", *model(3, (1, 3, 16, 16)))
    with contextlib.suppress(GhnServiceError):
        transfer_weights(trained, model(8 if pixels[1] != 3 else 3, pixels, **attributes)[0])


# ---- positions ------------------------------------------------------------------------------------------------------


class Mixer(nn.Module):
    """Patches, mixed over positions by a linear layer or a convolution, and classes."""

    def __init__(self, tokens, mix):
        super().__init__()
        self.stem, self.mix, self.head = nn.Conv2d(3, 8, 4, 4), mix(tokens), nn.Linear(8, 5)

    def forward(self, x):
        tokens = self.stem(x).flatten(2)
        mixed = self.mix(tokens) if isinstance(self.mix, nn.Linear) else self.mix(tokens.mT).mT
        return self.head((tokens + mixed).mean(2))


@pytest.mark.parametrize("mix", [lambda tokens: nn.Linear(tokens, tokens), lambda tokens: nn.Conv1d(tokens, tokens, 1)])
def test_what_mixes_another_number_of_positions_is_left_to_the_hypernetwork(mix):
    few, many = torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 32, 32)
    trained = make_source(Mixer(16, mix), few)
    result = transfer_weights(trained, export_architecture(Mixer(64, mix), many))
    assert "mix.weight" not in result.tensors
    assert torch.equal(result.tensors["head.weight"], trained.tensors["head.weight"])
