"""What a server tells about itself and about an architecture, as plain values."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from ghn_client.errors import listed
from ghn_client.wire import ghn_pb2
from ghn_client.wire.codec import decode_enum
from ghn_client.wire.metadata import TensorInfo, TensorUse

Value = TypeVar("Value")


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
class SourceInfo:
    """A trained network to take weights from.

    Attributes:
        name: Name to use in requests; of a network of this machine, what origins call it.
        digest: sha256 of what it holds.
        num_parameters: Scalars in its tensors.
        dataset: Data that it was trained on; "" if unknown.
        class_names: Names of its classes, in order; empty if unknown.
        accuracy: Share of test images that it gets right; None if unknown.
        licence: Terms under which its weights may be used; "" if unknown.
        card: All that is known: recipe, seed, command, normalisation of its images, and more.
    """

    name: str
    digest: str
    num_parameters: int
    dataset: str
    class_names: tuple[str, ...]
    accuracy: float | None
    licence: str
    card: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Transfer:
    """What a source gives an architecture.

    Attributes:
        source: The source.
        is_exact: Whether the network computes what the source does: nothing was cut, left out or changed.
        cut_groups: Channel groups of the source of which the network keeps a part.
        left_out: Blocks of the source that the network has no place for.
        similarity: How near the architectures are, 0 to 1.
        statistics: Running statistics that come with the weights.
        is_changed: Whether post-processing or low rank then changed what the source gave.
        contains_source: Whether the network computes what the source does up to the class layer.
    """

    source: SourceInfo
    is_exact: bool
    cut_groups: tuple[str, ...]
    left_out: tuple[str, ...]
    similarity: float
    statistics: tuple[str, ...]
    is_changed: bool = False
    contains_source: bool = False

    def __str__(self) -> str:
        if self.is_exact:
            return f"the function of {self.source.name}, exactly"
        parts = [f"parts of {self.source.name}, similarity {self.similarity:.2f}"]
        for what, names in (("cut", self.cut_groups), ("left out", self.left_out)):
            if names:
                parts.append(f"{what}: {listed(names)}")
        if self.is_changed:
            parts.append("changed by post-processing or low rank")
        return "; ".join(parts)


@dataclass(frozen=True, slots=True)
class Trust:
    """How much to expect of a prediction; ``str()`` says it in one line.

    Attributes:
        verdict: ``typical``, ``unusual``, ``far``, or ``unknown`` where the checkpoint does not say what it was trained
            on. ``docs/results.md`` shows what each is worth.
        advice: What the verdict means; half a sentence.
        reasons: What speaks against the prediction, or is worth knowing; half sentences.
        shares: Shares of the trainable scalars, 0 to 1: ``source`` (from a trained network), ``predicted`` (by the
            hypernetwork) and ``fallback`` (by a rule), which add up to 1; and ``copied``, the part of ``predicted``
            that repeats other values of its tensor.
        score: Distance of the graph from the training graphs; None if unknown.
        percentile: Training graphs that are nearer than this one, 0 to 100; None if unknown.
    """

    verdict: str = "unknown"
    advice: str = "the file does not say how much to expect of its weights"
    reasons: tuple[str, ...] = ()
    shares: Mapping[str, float] = field(default_factory=dict)
    score: float | None = None
    percentile: float | None = None

    def __str__(self) -> str:
        return "; ".join((f"{self.verdict}: {self.advice}", *self.reasons))

    def describe_shares(self) -> str:
        """Where the weights of the whole network come from; "" if unknown. Copies are a part of what is predicted."""
        copies = f" ({self.shares['copied']:.1%} of all are copies)" if self.shares.get("copied") else ""
        words = {
            "source": "from a trained network",
            "predicted": f"predicted{copies}",
            "fallback": "by a fallback rule",
        }
        return ", ".join(f"{self.shares[kind]:.1%} {text}" for kind, text in words.items() if self.shares.get(kind))


@dataclass(frozen=True, slots=True)
class Analysis:
    """What a prediction would do with an architecture.

    Attributes:
        model: The hypernetwork that would predict.
        graph_digest: Digest of the architecture, independent of names and order.
        num_nodes: Nodes of the graph.
        num_edges: Edges of the graph, before virtual ones.
        num_parameters: Trainable scalars.
        num_predicted_parameters: Trainable scalars that the hypernetwork would predict, copies included.
        total_bytes: Bytes of the reply.
        tensors: Every trainable tensor.
        buffers: Float tensors that are no weights: left to the client.
        warnings: What the user should know.
        op_type_counts: Nodes per op type.
        unknown_operators: Operators that data passes through as if they were element-wise.
        low_rank: What low rank would do with each weighted layer, if it was asked for.
        transfer: What the source would give, if one was named; None too where ``auto`` finds none that pays.
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
    transfer: Transfer | None = None
    trust: Trust = Trust()


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
    tensors = (_decode(TensorInfo, item, uses=decode_all(TensorUse, item.uses)) for item in reply.tensors)
    layers = (
        _decode(
            LowRankLayer,
            layer,
            method=decode_enum(ghn_pb2.LowRankMethod, layer.method),
            dense=_decode(RankCost, layer.dense),
            chosen=_decode(RankCost, layer.chosen),
            curve=decode_all(RankCost, layer.curve),
        )
        for layer in reply.low_rank_layers
    )
    counts = dict(reply.op_type_counts)
    transfer = decode_transfer(reply.transfer) if reply.HasField("transfer") else None
    return _decode(
        Analysis,
        reply,
        tensors=tuple(tensors),
        op_type_counts=counts,
        low_rank=tuple(layers),
        transfer=transfer,
        trust=_decode_trust(reply),
    )


def decode_transfer(summary: ghn_pb2.TransferSummary) -> Transfer:
    """The value of a message."""
    return _decode(Transfer, summary, source=decode_source(summary.source))


def decode_source(source: ghn_pb2.SourceInfo) -> SourceInfo:
    """The value of a message."""
    accuracy = source.accuracy if source.HasField("accuracy") else None
    return _decode(SourceInfo, source, accuracy=accuracy, card=json.loads(source.card_json or "{}"))


def _decode_trust(reply: ghn_pb2.AnalyzeArchitectureResponse | ghn_pb2.StreamTrailer) -> Trust:
    """The verdict in a reply; unknown where an older server sent none."""
    if not reply.HasField("trust"):
        return Trust()
    message = reply.trust
    measured = {name: getattr(message, name) if message.HasField(name) else None for name in ("score", "percentile")}
    return _decode(Trust, message, shares=dict(message.shares), **measured)


def decode_server_info(reply: ghn_pb2.GetServerInfoResponse) -> ServerInfo:
    """The value of a reply."""
    limits = {item.name: getattr(reply.limits, item.name) for item in reply.limits.DESCRIPTOR.fields}
    return _decode(ServerInfo, reply, limits=limits)


def _decode(kind: type[Value], message: Any, **known: Any) -> Value:
    """A value whose fields are those of the message with the same name, but for those that are ``known``."""
    for item in dataclasses.fields(cast("Any", kind)):
        if item.name not in known:
            value = getattr(message, item.name)
            known[item.name] = tuple(value) if item.type.startswith("tuple") else value
    return kind(**known)


def decode_all(kind: type[Value], messages: Iterable[Any]) -> tuple[Value, ...]:
    """The values of messages; the fields of ``kind`` are named as theirs."""
    return tuple(_decode(kind, message) for message in messages)
