"""Tracing: rules on small modules with known graphs, cost, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ghn_architectures.layers import SelfAttention, SqueezeExcite
from ghn_architectures.registry import reference_architecture
from ghn_architectures.tracing import trace
from ghn_service.errors import InvalidArchitectureError, UnsupportedArchitectureError
from ghn_service.graph.architecture import ArchitectureGraph


def wiring(graph: ArchitectureGraph) -> set[tuple[str, str]]:
    labels = [node.weight.name if node.weight is not None else node.op_type for node in graph.nodes]
    return {(labels[source], labels[target]) for source, target in graph.edges}


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.b = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.unused = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        self.unused(a)
        joined = F.relu(self.b(F.relu(a))) + 2.0 * a
        return joined + joined


def test_sums_need_two_sources_and_dead_ends_vanish() -> None:
    graph = trace(Branches(), (3, 8, 8)).graph
    assert wiring(graph) == {
        ("input", "a.weight"),
        ("a.weight", "b.weight"),
        ("a.weight", "sum"),
        ("b.weight", "sum"),
    }
    assert [spec.name for spec in graph.other_parameters] == ["unused.weight", "unused.bias"]


def test_activations_are_noted_at_their_layers() -> None:
    graph = trace(Branches(), (3, 8, 8)).graph
    layers = {node.name: node.layer for node in graph.nodes if node.layer is not None}
    assert layers["b.weight"] is not None
    assert layers["b.weight"].activation == "relu"


def test_the_squeeze_of_a_gate_has_no_node() -> None:
    graph = trace(nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), SqueezeExcite(8, 4)), (3, 8, 8)).graph
    assert "glob_avg" not in [node.op_type for node in graph.nodes]
    assert ("0.weight", "1.reduce.weight") in wiring(graph)
    assert ("0.weight", "cse") in wiring(graph)
    assert ("1.expand.bias", "cse") in wiring(graph)


def test_attention_written_out_and_fused_have_one_graph() -> None:
    class Tokens(nn.Module):
        def __init__(self, *, is_fused: bool) -> None:
            super().__init__()
            self.attention = SelfAttention(16, 2)
            self.is_fused = is_fused

        def forward(self, x: Tensor) -> Tensor:
            bias = None if self.is_fused else torch.zeros(1)
            return self.attention(x.flatten(2).transpose(1, 2), logit_bias=bias)  # type: ignore[no-any-return]

    fused, written = (trace(Tokens(is_fused=value), (16, 4, 4)) for value in (True, False))
    assert fused.graph.digest() == written.graph.digest()
    assert fused.multiply_adds == written.multiply_adds
    assert ("attention.qkv.bias", "attention.proj.weight") not in wiring(fused.graph)


def test_multiply_adds_match_torchs_own_count() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for name in ("resnet20", "se_mobilenet_mini", "convnext_atto", "swin_mini", "mixer_small", "densenet40"):
        architecture = reference_architecture(name)
        module = architecture.build(initialize=False).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(torch.zeros(1, *architecture.interface.input_shape))
        assert 2 * architecture.multiply_adds == counter.get_total_flops()


def test_a_module_is_left_in_its_mode() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout())
    module[2].eval()
    trace(module, (3, 8, 8))
    assert [layer.training for layer in module] == [True, True, False]
    assert module[1].num_batches_tracked == 0


def test_running_statistics_are_buffers() -> None:
    graph = trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), (3, 8, 8)).graph
    assert [(buffer.name, buffer.kind) for buffer in graph.buffers] == [
        ("1.running_mean", "running_mean"),
        ("1.running_var", "running_var"),
    ]


def test_unknown_functions_are_errors() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.fft(x)

    with pytest.raises(UnsupportedArchitectureError):
        trace(Odd(), (3, 8, 8))


def test_shared_weights_are_errors() -> None:
    layer = nn.Conv2d(3, 3, 1)
    with pytest.raises(InvalidArchitectureError):
        trace(nn.Sequential(layer, layer), (3, 8, 8))
