"""Whether to trust a prediction: a verdict with reasons, so that a user knows how much to expect of the weights.

Each graph becomes a few numbers (sizes, depth, widths, mix of op types). Training keeps their mean and spread over the
architectures that it used, and the distances that those architectures themselves have from the mean. The score of a new
graph is the root mean square of its z-scores, and its percentile says how many training graphs are nearer.

``benchmarks/calibrate_trust.py`` sets the verdict beside the gain over He initialisation.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from ghn_service.errors import CheckpointError
from ghn_service.graph.architecture import ArchitectureGraph, longest_paths
from ghn_service.graph.op_types import OP_TYPE_NAMES
from ghn_service.parameters import PREDICTED, TILED
from ghn_service.postprocess.weighted_layers import weighted_layers

METADATA_KEY = "graph_statistics"
NUM_QUANTILES = 101
LARGEST_Z = 10.0
LEAST_SOURCE, MOST_FALLBACK, TYPICAL_PERCENTILE = 0.5, 0.5, 95
# The least spread that counts: a share that never varied in training may still differ by a percent.
LEAST_SHARE_SPREAD, LEAST_SPREAD = 0.02, 0.25

TYPICAL, UNUSUAL, FAR, UNKNOWN = "typical", "unusual", "far", "unknown"
_ADVICE = {
    TYPICAL: "like the networks that this hypernetwork was trained on: expect a clear gain over a random start",
    UNUSUAL: "the gain over a random start varies with networks like this one",
    FAR: "expect no gain over a random start; compare both under the same budget",
    UNKNOWN: "this checkpoint does not say which architectures it was trained on",
}
_ADVICE_OF_SOURCE = {
    TYPICAL: "most weights are those of a trained network: expect a clear gain over a random start",
    UNUSUAL: "most weights are cut from a trained network of another shape: the gain may need some training",
}


@dataclass(frozen=True, slots=True)
class GraphStatistics:
    """What the training architectures look like.

    Attributes:
        num_graphs: How many were seen.
        mean: Mean by feature.
        spread: Standard deviation by feature.
        score_quantiles: Scores of the training graphs themselves at 0%, 1%, ..., 100%.
    """

    num_graphs: int
    mean: Mapping[str, float]
    spread: Mapping[str, float]
    score_quantiles: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Trust:
    """How much to expect of a prediction.

    Attributes:
        verdict: ``typical``, ``unusual``, ``far``, or ``unknown`` where the checkpoint has no statistics.
        advice: What the verdict means; half a sentence.
        reasons: What speaks against the prediction or is worth knowing; sentences.
        shares: Shares of the trainable scalars, 0 to 1: ``source`` (from a trained network), ``predicted`` (by the
            hypernetwork), ``fallback`` (by a rule), which add up to 1; and ``copied``, the part of ``predicted`` that
            repeats other values of its tensor.
        score: Distance from the training architectures: root mean square of the z-scores; None if unknown.
        percentile: Share of training graphs with a smaller score, 0 to 100; None if unknown.
        deviations: The features that differ most: name, value here, mean in training, z-score.
    """

    verdict: str
    advice: str
    reasons: tuple[str, ...]
    shares: Mapping[str, float]
    score: float | None
    percentile: float | None
    deviations: tuple[tuple[str, float, float, float], ...]


@dataclass(frozen=True, slots=True)
class KnownData:
    """What is known of the data that a hypernetwork was trained on; 0 and None where nothing is."""

    num_classes: int = 0
    channels: int = 0
    image_size: int = 0
    graphs: GraphStatistics | None = None


def graph_features(graph: ArchitectureGraph) -> dict[str, float]:
    """The numbers that describe a graph; logarithms are base 2."""
    widths = [layer.spec.torch_shape[0] for layer in weighted_layers(graph)] or [1]
    kernels = [math.prod(layer.spec.torch_shape[2:]) for layer in weighted_layers(graph)] or [1]
    counts = dict.fromkeys(OP_TYPE_NAMES, 0)
    for node in graph.nodes:
        counts[node.op_type] += 1
    shares = {f"share of {name}": count / graph.num_nodes for name, count in counts.items() if name != "input"}
    return {
        "log nodes": math.log2(graph.num_nodes),
        "log parameters": math.log2(max(graph.num_parameters, 1)),
        "log depth": math.log2(1 + max(longest_paths(graph))),
        "log median width": math.log2(statistics.median(widths)),
        "log largest width": math.log2(max(widths)),
        "log mean kernel area": math.log2(statistics.fmean(kernels)),
        "edges per node": len(graph.edges) / graph.num_nodes,
        **shares,
    }


def summarize_graphs(graphs: Iterable[ArchitectureGraph]) -> GraphStatistics:
    """Statistics of training architectures, to be stored in the checkpoint's card under ``METADATA_KEY``.

    Raises:
        ValueError: There are fewer than two graphs.
    """
    features = [graph_features(graph) for graph in graphs]
    if len(features) < 2:
        raise ValueError(f"expected at least two graphs, got {len(features)}")
    names = list(features[0])
    mean = {name: statistics.fmean(item[name] for item in features) for name in names}
    least = {name: LEAST_SHARE_SPREAD if name.startswith("share") else LEAST_SPREAD for name in names}
    spread = {name: max(statistics.stdev(item[name] for item in features), least[name]) for name in names}
    scores = sorted(_score(item, mean, spread) for item in features)
    places = [round(step * (len(scores) - 1) / (NUM_QUANTILES - 1)) for step in range(NUM_QUANTILES)]
    return GraphStatistics(len(features), mean, spread, tuple(scores[place] for place in places))


def judge(
    graph: ArchitectureGraph,
    origins: Mapping[str, str],
    copied: Mapping[str, int],
    known: KnownData,
    *,
    is_near: bool | None = None,
) -> Trust:
    """The verdict on a prediction.

    Args:
        graph: The architecture.
        origins: Origin of each of its tensors by name, as in ``ParameterSet``.
        copied: How many values of a tensor repeat others of it, by name.
        known: What the hypernetwork was trained on.
        is_near: Whether the source that gives some of the weights is of a near shape; None without one.
    """
    shares = _shares(graph, origins, copied)
    score, percentile, deviations = _distance(graph, known.graphs)
    if is_near is not None and shares["source"] >= LEAST_SOURCE:  # the hypernetwork matters little then
        verdict, reasons = TYPICAL if is_near else UNUSUAL, _reasons_of_origin(shares)
        return Trust(verdict, _ADVICE_OF_SOURCE[verdict], tuple(reasons), shares, score, percentile, deviations)
    verdict = _verdict(graph, shares, percentile)
    reasons = [
        *_reasons_of_origin(shares),
        *_reasons_of_distance(percentile, deviations),
        *_reasons_of_task(graph, known),
    ]
    return Trust(verdict, _ADVICE[verdict], tuple(reasons), shares, score, percentile, deviations)


def _shares(graph: ArchitectureGraph, origins: Mapping[str, str], copied: Mapping[str, int]) -> dict[str, float]:
    counts = dict.fromkeys(("source", PREDICTED, "fallback"), 0)
    for spec in graph.parameters():
        kind = origins[spec.name].partition(":")[0]
        counts[PREDICTED if kind == TILED else kind] += spec.num_elements
    total = sum(counts.values()) or 1
    copies = sum(number for name, number in copied.items() if origins[name] == TILED)
    return {name: count / total for name, count in counts.items()} | {"copied": copies / total}


def _distance(
    graph: ArchitectureGraph, known: GraphStatistics | None
) -> tuple[float | None, float | None, tuple[tuple[str, float, float, float], ...]]:
    """Score, percentile and the features that differ most."""
    if known is None:
        return None, None, ()
    features = graph_features(graph)
    score = _score(features, known.mean, known.spread)
    below = sum(quantile < score for quantile in known.score_quantiles)
    percentile = 100.0 * min(below, NUM_QUANTILES - 1) / (NUM_QUANTILES - 1)
    rows = [
        (name, features[name], mean, (features[name] - mean) / known.spread[name])
        for name, mean in known.mean.items()
        if name in features
    ]
    return (
        score,
        percentile,
        tuple(sorted((row for row in rows if abs(row[3]) >= 2.0), key=lambda row: -abs(row[3]))[:5]),
    )


def _verdict(graph: ArchitectureGraph, shares: Mapping[str, float], percentile: float | None) -> str:
    """The rule that ``benchmarks/calibrate_trust.py`` checks."""
    if shares["fallback"] > MOST_FALLBACK:
        return FAR
    if percentile is None:
        return UNKNOWN
    if _has_batchnorm(graph):
        return TYPICAL if percentile < TYPICAL_PERCENTILE else UNUSUAL
    return UNUSUAL if percentile < 100 else FAR


def _has_batchnorm(graph: ArchitectureGraph) -> bool:
    """Whether there is a batch normalisation."""
    return any(node.op_type == "bn" for node in graph.nodes)


def _reasons_of_origin(shares: Mapping[str, float]) -> list[str]:
    """What of the shares is worth knowing."""
    reasons = []
    if shares["source"]:
        reasons.append(f"{_percent(shares['source'])} of the weights come from a trained network")
    if shares["fallback"] >= 0.01:
        reasons.append(f"{_percent(shares['fallback'])} of the weights are not predicted: a standard rule draws them")
    if shares["copied"] >= 0.1:
        reasons.append(
            f"{_percent(shares['copied'])} of the weights are copies: layers wider than what is predicted repeat it"
        )
    return reasons


def _reasons_of_distance(percentile: float | None, deviations: Sequence[tuple[str, float, float, float]]) -> list[str]:
    """How far the graph is from those of training, and in what."""
    if percentile is None:
        return ["it is not known which architectures this hypernetwork was trained on"]
    if percentile < TYPICAL_PERCENTILE:
        return []
    told = []
    for name, here, mean, _ in deviations[:3]:
        is_log = name.startswith("log ")
        values = (f"{2**value:,.0f}" if is_log else f"{value:.2g}" for value in (here, mean))
        told.append("{} {} (training: {})".format(name.removeprefix("log "), *values))
    farther = "all" if percentile >= 100 else f"{percentile:.0f}%"
    return [f"the graph is farther from the training graphs than {farther} of these: {', '.join(told) or 'in sum'}"]


def _reasons_of_task(graph: ArchitectureGraph, known: KnownData) -> list[str]:
    """What of the task differs from the hypernetwork's data, and whether there is no BatchNorm."""
    reasons = []
    if not _has_batchnorm(graph):
        reasons.append("there is no BatchNorm, with which predicted weights gain most")
    if known.num_classes and graph.num_classes not in (0, known.num_classes):
        reasons.append(f"{graph.num_classes} classes, the hypernetwork's data have {known.num_classes}")
    first = next((node for node in graph.nodes if node.layer is not None and node.weight is not None), None)
    if first is not None and first.weight is not None and first.layer is not None and first.layer.stride:
        channels = first.weight.torch_shape[1] * first.layer.groups
        if known.channels and channels != known.channels:
            reasons.append(f"images of {channels} channels, the hypernetwork's data have {known.channels}")
        side = math.isqrt(first.layer.positions) * first.layer.stride[0]
        if known.image_size and side and not 0.75 <= side / known.image_size <= 1.5:
            reasons.append(f"images of about {side} pixels, the hypernetwork's data have {known.image_size}")
    return reasons


def _percent(share: float) -> str:
    """A share in words; neither 0% nor 100% where it is not."""
    text = f"{share:.1%}"
    return {"100.0%": "100%" if share == 1 else "over 99.9%", "0.0%": "below 0.1%"}.get(text, text)


def encode_statistics(known: GraphStatistics) -> str:
    """The statistics as JSON."""
    return json.dumps(asdict(known), separators=(",", ":"))


def decode_statistics(text: str) -> GraphStatistics:
    """The statistics that ``encode_statistics`` wrote.

    Raises:
        CheckpointError: The text is not such a document.
    """
    try:
        body = json.loads(text)
        mean = {str(name): float(value) for name, value in body["mean"].items()}
        spread = {str(name): float(body["spread"][name]) for name in mean}
        quantiles = tuple(float(value) for value in body["score_quantiles"])
        if len(quantiles) != NUM_QUANTILES or any(value <= 0 for value in spread.values()):
            raise ValueError(f"expected {NUM_QUANTILES} quantiles and positive spreads")
        return GraphStatistics(int(body["num_graphs"]), mean, spread, quantiles)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the checkpoint's graph statistics cannot be read: {error}") from error


def _score(features: Mapping[str, float], mean: Mapping[str, float], spread: Mapping[str, float]) -> float:
    # Features that only one side knows (a longer vocabulary) are left out.
    shared = [name for name in mean if name in features]
    squares = [min(abs(features[name] - mean[name]) / spread[name], LARGEST_Z) ** 2 for name in shared]
    return math.sqrt(statistics.fmean(squares)) if squares else 0.0
