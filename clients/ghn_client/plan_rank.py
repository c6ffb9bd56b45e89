"""``ghn-client plan-rank``: what low rank would cost and save in each layer of a model, before anything is predicted.

The mathematics lives in the service; this command needs the full ``ghn-service`` package, as the embedded server does,
and reaches it lazily by name, so that the light client installs without it.
"""

from __future__ import annotations

import importlib
import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ghn_client.errors import InvalidArchitectureError, InvalidOptionError, UnsupportedOptionError
from ghn_client.rank_plot import plan_svg

FORMATS = ("table", "json", "svg")
METHODS = ("spectral", "function", "function_optimized")
RANK_RULES = ("rank", "fraction", "energy", "function_error", "parameter_budget", "multiply_add_budget")
COLUMNS = (
    "full: full rank; even: the largest rank that is smaller than the dense layer; at a share of the full rank: error "
    "of the layer's function relative to its output, and the change of its parameters and multiply-adds."
)
MOST_FRACTIONS = 4
__all__ = ["plan_json", "plan_rank", "plan_summary", "plan_svg", "plan_table"]


def plan_rank(
    model: str | Path | bytes,
    *,
    weights: str | Path | None = None,
    method: str = "function",
    fractions: Sequence[float] | None = None,
    rule: tuple[str, float] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Plans ranks for a model.

    Args:
        model: An ONNX file, or its bytes; its own weight values are not looked at.
        weights: A file of predicted weights for this model; None for He-normal weights, whose errors depend on the
            shapes alone.
        method: How factors would be computed: ``spectral``, ``function`` or ``function_optimized``.
        fractions: Ranks to look at, as shares of each layer's full rank; None for 1/32 to 1/2.
        rule: A rule, such as ``("function_error", 0.3)`` or ``("parameter_budget", 5e6)``, whose choice is to be shown.
        seed: Seeds the He-normal weights.

    Returns:
        A document of format ``ghn-rank-plan/1``: for each layer error, parameters and multiply-adds by rank.

    Raises:
        InvalidArchitectureError: The file is no such network.
        InvalidOptionError: An option is impossible, or the weights do not fit the model.
        UnsupportedOptionError: The full package is not installed.
    """
    service = _Service()
    data = model if isinstance(model, bytes) else Path(model).read_bytes()
    try:
        graph = service.reader.read_onnx(data)
        parameters = service.parameters(graph, weights, seed)
        request = service.request(rule, method)
        options = {"fractions": _checked(fractions)} if fractions is not None else {}
        plan: dict[str, Any] = service.plan.plan_ranks(parameters, graph, method=method, request=request, **options)
    except service.errors.InvalidOptionError as error:
        raise InvalidOptionError(str(error), field=error.field) from error
    except service.errors.GhnServiceError as error:
        raise InvalidArchitectureError(str(error), field=error.field) from error
    return {"weights": str(weights) if weights is not None else f"He-normal, seed {seed}", **plan}


def plan_table(plan: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The plan as columns and rows of text; ``plan_summary`` explains them.

    A cell at a fraction of the full rank holds the error there, and by how much parameters and multiply-adds change.
    """
    fractions = [float(share) for share in plan["fractions"]]
    fractions = fractions[1::2] if len(fractions) > MOST_FRACTIONS else fractions
    columns = ["layer", "shape", "then", "full", "even", *(f"at {share:.3g}" for share in fractions)]
    has_choice = plan["chosen"] is not None
    columns += ["chosen", "error"] if has_choice else []
    columns += ["parameters", "multiply-adds", "note"]
    marks = _marks(plan)
    return columns, [_row(entry, fractions, marks, has_choice=has_choice) for entry in plan["layers"]]


def plan_summary(plan: Mapping[str, Any]) -> str:
    """The plan in a few sentences, with what the marks of the table mean."""
    network, chosen = plan["network"], plan["chosen"]
    text = (
        f"{network['parameters']:,} parameters, {network['weighted_parameters']:,} of them in {len(plan['layers'])} "
        f"weighted layers; weights: {plan['weights']}; method: {plan['method']}."
    )
    notes = [COLUMNS, *(f"{mark}: {note}" for note, mark in _marks(plan).items())]
    if chosen is None:
        return "\n".join([text, *notes])
    saved = 1 - chosen["parameters"] / max(network["parameters"], 1)
    text += f" Chosen ranks leave {chosen['parameters']:,} parameters ({saved:.0%} fewer)"
    if network["positions_known"] and network["multiply_adds"]:
        fewer = 1 - chosen["multiply_adds"] / network["multiply_adds"]
        text += f" and {chosen['multiply_adds']:,} multiply-adds ({fewer:.0%} fewer)"
    return "\n".join([f"{text} in {chosen['factored']} factored layers.", *notes])


def plan_json(plan: Mapping[str, Any]) -> str:
    """The plan as indented JSON."""
    return json.dumps(plan, indent=2)


def _marks(plan: Mapping[str, Any]) -> dict[str, str]:
    """A letter for each distinct note of the layers, in order of appearance."""
    notes = dict.fromkeys(str(entry["note"]) for entry in plan["layers"] if entry["note"])
    return dict(zip(notes, string.ascii_lowercase, strict=False))


def _row(
    entry: Mapping[str, Any], fractions: Sequence[float], marks: Mapping[str, str], *, has_choice: bool
) -> list[str]:
    points = {point["rank"]: point for point in entry["points"]}
    cells = [
        str(entry["parameter"]),
        "x".join(map(str, entry["shape"])),
        ("norm " if entry["normalized"] else "") + (entry["activation"] or ("" if entry["normalized"] else "-")),
        str(entry["full_rank"]),
        str(entry["break_even_rank"]),
    ]
    for share in fractions:
        point = points.get(max(round(share * entry["full_rank"]), 1))
        if point and point["is_smaller"]:
            change = point["parameters"] / entry["parameters"] - 1
            cells.append(f"{point['function_error']:.3f} {change:+.0%}")
        else:
            cells.append("-")
    if has_choice:
        point = points.get(entry["chosen_rank"])
        cells += [str(entry["chosen_rank"]), f"{point['function_error']:.3f}"] if point else ["dense", ""]
        return [*cells, *(_change(entry, point, key) for key in ("parameters", "multiply_adds")), _mark(entry, marks)]
    return [*cells, *(_change(entry, None, key) for key in ("parameters", "multiply_adds")), _mark(entry, marks)]


def _change(entry: Mapping[str, Any], point: Mapping[str, Any] | None, key: str) -> str:
    """A cost of the layer before and, where it is factored, after."""
    return f"{_short(entry[key])} > {_short(point[key])}" if point else _short(entry[key])


def _short(value: int) -> str:
    """Three digits and a unit: 36.9k, 2.36M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return str(value)


def _mark(entry: Mapping[str, Any], marks: Mapping[str, str]) -> str:
    return marks.get(str(entry["note"]), "")


def _checked(fractions: Sequence[float]) -> list[float]:
    for share in fractions:
        if not 0 < share <= 1:
            raise InvalidOptionError(f"expected fractions in (0, 1], got {share}", field="fractions")
    return list(fractions)


class _Service:
    """The parts of the full package that planning needs."""

    def __init__(self) -> None:
        try:
            self.errors = importlib.import_module("ghn_service.errors")
            self.reader = importlib.import_module("ghn_service.graph.onnx.reader")
            self.plan = importlib.import_module("ghn_service.postprocess.rank_plan")
            self.low_rank = importlib.import_module("ghn_service.postprocess.low_rank_plan")
            self.rules = importlib.import_module("ghn_service.postprocess.rank_allocation")
        except ModuleNotFoundError as error:
            raise UnsupportedOptionError(
                f"planning ranks needs the full package, but {error.name!r} is missing; pip install ghn-service"
            ) from error

    def parameters(self, graph: Any, weights: str | Path | None, seed: int) -> Any:
        """He-normal weights, or those of a file."""
        import torch

        drawn = self.plan.he_normal_parameters(graph, generator=torch.Generator().manual_seed(seed))
        if weights is None:
            return drawn
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(weights)
        except (OSError, SafetensorError) as error:
            raise InvalidOptionError(f"cannot read the weights {weights}: {error}", field="weights") from error
        for name, spec in drawn.specs.items():
            if name not in tensors or tuple(tensors[name].shape) != spec.shape:
                raise InvalidOptionError(
                    f"the weights do not fit the model: expected {name!r} of shape {spec.shape}", field="weights"
                )
        values = {name: tensors[name].float() for name in drawn.specs}
        return type(drawn)(drawn.specs, values, drawn.origins)

    def request(self, rule: tuple[str, float] | None, method: str) -> Any:
        """The rule as a request of the service, or None."""
        if rule is None:
            # Constructing the request is what checks the method, so it is done even where no rule is shown.
            self.low_rank.LowRank(self.rules.RankRule("rank", 1), method)
            return None
        return self.low_rank.LowRank(self.rules.RankRule(*rule), method)
