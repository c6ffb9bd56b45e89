"""What a server tells about itself and about an architecture, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ghn_client.options import decode_method
from ghn_client.wire import ghn_pb2
from ghn_client.wire.metadata import TensorInfo, TensorUse


@dataclass(frozen=True, slots=True)
class RankCost:
    """A layer at a rank (0: dense): relative error of its function, values, multiply-adds per example (0: unknown)."""

    rank: int
    function_error: float
    parameters: int
    multiply_adds: int


@dataclass(frozen=True, slots=True)
class LowRankLayer:
    """What low rank would do with a weighted layer.

    Attributes:
        parameter: Name of the weight.
        method: How its factors would be computed: not the method asked for where that cannot help.
        activation: The activation that factors are fitted to; "" for none.
        normalized: Whether a normalisation sits between the layer and the activation.
        note: What to know about this layer, such as why it stays dense; a sentence or "".
        dense: The layer as it is.
        chosen: The layer as ``predict`` with these options would return it.
        curve: The layer at a few ranks, ascending; empty where it always stays dense.
    """

    parameter: str
    method: str
    activation: str
    normalized: bool
    note: str
    dense: RankCost
    chosen: RankCost
    curve: tuple[RankCost, ...]


@dataclass(frozen=True, slots=True)
class Analysis:
    """What a prediction would do with an architecture.

    Attributes:
        model: The hypernetwork that would predict.
        graph_digest: Digest of the architecture, independent of names and order.
        num_nodes: Nodes of the graph.
        num_edges: Edges of the graph, before virtual ones.
        num_parameters: Trainable scalars.
        num_predicted_parameters: Trainable scalars that the hypernetwork would predict; a rule initialises the rest.
        total_bytes: Bytes of the reply.
        tensors: Every trainable tensor.
        buffers: Float tensors that are no weights: left to the client.
        warnings: What the user should know.
        op_type_counts: Nodes per op type.
        unknown_operators: Operators that data passes through as if they were element-wise.
        low_rank: What low rank would do with each weighted layer, if it was asked for.
    """

    model: str
    graph_digest: str
    num_nodes: int
    num_edges: int
    num_parameters: int
    num_predicted_parameters: int
    total_bytes: int
    tensors: tuple[TensorInfo, ...]
    buffers: tuple[str, ...]
    warnings: tuple[str, ...]
    op_type_counts: Mapping[str, int]
    unknown_operators: tuple[str, ...]
    low_rank: tuple[LowRankLayer, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A hypernetwork that a server has loaded; the fields are those of ``ghn.v1.ModelInfo``."""

    name: str
    digest: str
    kind: str
    num_parameters: int
    num_classes: int
    dataset: str
    is_default: bool
    device: str


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a server is; ``limits`` has the fields of ``ghn.v1.Limits``."""

    version: str
    torch_version: str
    devices: tuple[str, ...]
    limits: Mapping[str, float]
    uptime_seconds: float


@dataclass(frozen=True, slots=True)
class Health:
    """Whether a server is there, and whether it can predict."""

    alive: bool
    ready: bool


def decode_analysis(reply: ghn_pb2.AnalyzeArchitectureResponse) -> Analysis:
    """The value of a reply."""
    return Analysis(
        model=reply.model,
        graph_digest=reply.graph_digest,
        num_nodes=reply.num_nodes,
        num_edges=reply.num_edges,
        num_parameters=reply.num_parameters,
        num_predicted_parameters=reply.num_predicted_parameters,
        total_bytes=reply.total_bytes,
        tensors=tuple(
            TensorInfo(
                name=item.name,
                origin=item.origin,
                initializer=item.initializer,
                torch_name=item.torch_name,
                permutation=tuple(item.permutation),
                uses=tuple(TensorUse(use.node, use.input_index) for use in item.uses),
                shape=tuple(item.shape),
                op_type=item.op_type,
            )
            for item in reply.tensors
        ),
        buffers=tuple(reply.buffers),
        warnings=tuple(reply.warnings),
        op_type_counts=dict(reply.op_type_counts),
        unknown_operators=tuple(reply.unknown_operators),
        low_rank=tuple(_decode_layer(layer) for layer in reply.low_rank_layers),
    )


def _decode_layer(layer: ghn_pb2.LowRankLayer) -> LowRankLayer:
    def decode_cost(cost: ghn_pb2.RankCost) -> RankCost:
        return RankCost(cost.rank, cost.function_error, cost.parameters, cost.multiply_adds)

    return LowRankLayer(
        parameter=layer.parameter,
        method=decode_method(layer.method),
        activation=layer.activation,
        normalized=layer.normalized,
        note=layer.note,
        dense=decode_cost(layer.dense),
        chosen=decode_cost(layer.chosen),
        curve=tuple(decode_cost(cost) for cost in layer.curve),
    )


def decode_models(reply: ghn_pb2.ListModelsResponse) -> tuple[ModelInfo, ...]:
    """The values of a reply, the default model first."""
    return tuple(
        ModelInfo(**{name: getattr(item, name) for name in ModelInfo.__dataclass_fields__}) for item in reply.models
    )


def decode_server_info(reply: ghn_pb2.GetServerInfoResponse) -> ServerInfo:
    """The value of a reply."""
    limits: dict[str, Any] = {item.name: getattr(reply.limits, item.name) for item in reply.limits.DESCRIPTOR.fields}
    return ServerInfo(reply.version, reply.torch_version, tuple(reply.devices), limits, reply.uptime_seconds)
