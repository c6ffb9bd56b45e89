"""``source="auto"``: which network of a library an architecture takes its weights from, and why.

The largest that the architecture contains, as it then computes what that network computes; else the most similar, where
similarity was seen to pay; else none, which means the hypernetwork.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ghn_service.errors import (
    InvalidArchitectureError,
    LimitExceededError,
    SourceError,
    UnsupportedArchitectureError,
)
from ghn_service.graph.architecture import ParameterSpec
from ghn_service.graph.raw_graph import GraphLimits, never_ends
from ghn_service.transfer.library import Library
from ghn_service.transfer.source import Source
from ghn_service.transfer.transfer import Head, TransferPlan, plan_transfer

UNREADABLE = (InvalidArchitectureError, LimitExceededError, UnsupportedArchitectureError)
MINIMUM_SIMILARITY = 0.8
"""From this similarity on a source that is not contained is taken (TransferPlan.similarity).

``python -m benchmarks.transfer threshold`` compares both on validation networks and images: from 0.8 on the source was
ahead on every one, below 0.6 the hypernetwork.
"""


@dataclass(frozen=True, eq=False, slots=True)
class Choice:
    """What ``auto`` chose.

    Attributes:
        source: The trained network; None where the hypernetwork alone serves the architecture better.
        plan: What fits, with a source.
        reasons: A sentence on every network of the library, the chosen one first; where none is, first why.
    """

    source: Source | None
    plan: TransferPlan | None
    reasons: tuple[str, ...]


def choose_source(
    library: Library,
    structure: bytes,
    *,
    head: Head = "auto",
    minimum_similarity: float = MINIMUM_SIMILARITY,
    limits: GraphLimits | None = None,
    parameters: Sequence[ParameterSpec] = (),
    check: Callable[[], None] = never_ends,
) -> Choice:
    """The network of ``library`` from which an architecture should take its weights.

    Args:
        library: Trained networks.
        structure: The architecture, as serialised ONNX, with or without weights.
        head: What becomes of the class layer; a layer that is reset does not count.
        minimum_similarity: Similarity, 0 to 1, below which a source that is not contained is left alone.
        limits: The largest network that is read; one that cannot be read has no source.
        parameters: As in ``plan_transfer``.
        check: As in ``plan_transfer``.

    Raises:
        SourceError: A file of the library is damaged.
    """
    found: list[tuple[tuple[bool, float], Source, TransferPlan]] = []
    refused: list[str] = []
    for summary in library.summaries():
        source = library.outline(summary.name)
        try:
            plan = plan_transfer(source, structure, head=head, limits=limits, parameters=parameters, check=check)
        except (SourceError, *UNREADABLE) as error:
            refused.append(f"{summary.name}: {error}.")
            continue
        rank = (True, float(summary.num_parameters)) if plan.contains_source else (False, plan.similarity)
        found.append((rank, source, plan))
    found.sort(key=lambda item: item[0], reverse=True)
    reasons = [_describe(source, plan) for _, source, plan in found]
    if found:
        (contained, score), source, plan = found[0]
        if contained or score >= minimum_similarity:
            return Choice(library.load(source.name), plan, (*reasons, *refused))
    none = f"none is contained or has a similarity of at least {minimum_similarity:g}."
    return Choice(None, None, (none, *reasons, *refused))


def _describe(source: Source, plan: TransferPlan) -> str:
    """Why a source is a better or worse choice."""
    if plan.contains_source:
        return f"{source.name}: the architecture contains it."
    return f"{source.name}: not contained, similarity {plan.similarity:.2f}."
