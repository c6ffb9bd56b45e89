"""How unlike the training architectures a network is, so that a user knows how much to expect of its weights.

Each graph becomes a few numbers (sizes, depth, widths, mix of op types). Training keeps their mean and spread over the
architectures that it used, and the distances that those architectures themselves have from the mean. The score of a new
graph is the root mean square of its z-scores, and its percentile says how many training graphs are nearer.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from ghn_service.errors import CheckpointError
from ghn_service.graph.architecture import ArchitectureGraph, longest_paths
from ghn_service.graph.op_types import OP_TYPE_NAMES
from ghn_service.postprocess.weighted_layers import weighted_layers

METADATA_KEY = "graph_statistics"
NUM_QUANTILES = 101
LARGEST_Z = 10.0
# The least spread that counts: a share that never varied in training may still differ by a percent.
LEAST_SHARE_SPREAD, LEAST_SPREAD = 0.02, 0.25
_ADVICE = {
    "typical": "This architecture is like those the hypernetwork was trained on.",
    "unusual": "This architecture is at the edge of what the hypernetwork was trained on; expect a smaller gain.",
    "far": "This architecture is unlike anything the hypernetwork was trained on; expect little from its prediction, "
    "and compare with a standard initialisation under the same budget.",
    "unknown": "This checkpoint does not say which architectures it was trained on.",
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
class DistributionShift:
    """How far a graph is from those of training.

    Attributes:
        verdict: ``typical``, ``unusual``, ``far``, or ``unknown`` where the checkpoint has no statistics.
        score: Root mean square of the z-scores; None if unknown.
        percentile: Share of training graphs with a smaller score, 0 to 100; None if unknown.
        reasons: The features that differ most: name, value here, mean in training, z-score.
        advice: One sentence for the user.
    """

    verdict: str
    score: float | None
    percentile: float | None
    reasons: tuple[tuple[str, float, float, float], ...]
    advice: str


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


def measure_shift(graph: ArchitectureGraph, known: GraphStatistics | None) -> DistributionShift:
    """The distance of a graph from the training graphs; ``unknown`` without statistics."""
    if known is None:
        return DistributionShift("unknown", None, None, (), _ADVICE["unknown"])
    features = graph_features(graph)
    score = _score(features, known.mean, known.spread)
    below = sum(quantile < score for quantile in known.score_quantiles)
    percentile = 100.0 * min(below, NUM_QUANTILES - 1) / (NUM_QUANTILES - 1)
    verdict = "unusual" if score <= 1.25 * known.score_quantiles[-1] else "far"
    if percentile < 95:
        verdict = "typical"
    rows = [
        (name, features[name], mean, (features[name] - mean) / known.spread[name])
        for name, mean in known.mean.items()
        if name in features
    ]
    reasons = sorted((row for row in rows if abs(row[3]) >= 2.0), key=lambda row: -abs(row[3]))[:5]
    return DistributionShift(verdict, score, percentile, tuple(reasons), _ADVICE[verdict])


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
