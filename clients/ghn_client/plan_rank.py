"""``ghn-client plan-rank``: what low rank would cost and save in each layer of a model, before anything is predicted.

The mathematics lives in the service; this command needs the full ``ghn-service`` package, as the embedded server does,
and reaches it lazily by name, so that the light client installs without it.
"""

from __future__ import annotations

import html
import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ghn_client.errors import InvalidArchitectureError, InvalidOptionError, UnsupportedOptionError

FORMATS = ("table", "json", "svg")
METHODS = ("spectral", "function", "function_optimized")
RANK_RULES = ("rank", "fraction", "energy", "function_error", "parameter_budget", "multiply_add_budget")


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
        graph = service.graph.read_onnx(data)
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
    """The plan as columns and rows of text, with the error at each fraction of the full rank that is smaller."""
    fractions = [float(share) for share in plan["fractions"]]
    columns = ["layer", "shape", "then", "full", "even", *(f"err {share:.3g}" for share in fractions)]
    has_choice = plan["chosen"] is not None
    columns += ["chosen", "err"] if has_choice else []
    columns += ["parameters", "note"]
    return columns, [_row(entry, fractions, has_choice=has_choice) for entry in plan["layers"]]


def plan_summary(plan: Mapping[str, Any]) -> str:
    """The plan in one or two sentences."""
    network, chosen = plan["network"], plan["chosen"]
    text = (
        f"{network['parameters']:,} parameters, {network['weighted_parameters']:,} of them in {len(plan['layers'])} "
        f"weighted layers; weights: {plan['weights']}; method: {plan['method']}."
    )
    if chosen is None:
        return text
    saved = 1 - chosen["parameters"] / max(network["parameters"], 1)
    text += f" Chosen ranks leave {chosen['parameters']:,} parameters ({saved:.0%} fewer)"
    if network["positions_known"] and network["multiply_adds"]:
        fewer = 1 - chosen["multiply_adds"] / network["multiply_adds"]
        text += f" and {chosen['multiply_adds']:,} multiply-adds ({fewer:.0%} fewer)"
    return f"{text} in {chosen['factored']} factored layers."


def plan_svg(plan: Mapping[str, Any]) -> str:
    """Error against rank of every layer that can be factored, as a self-contained SVG image."""
    entries = [entry for entry in plan["layers"] if len(entry["points"]) > 1]
    width, height, left, top, right, bottom = 760, 420, 56, 30, 20, 48
    across, up = width - left - right, height - top - bottom
    worst = max((point["function_error"] for entry in entries for point in entry["points"]), default=1.0) or 1.0

    def place(share: float, error: float) -> str:
        return f"{left + across * share:.1f},{top + up * (1 - error / worst):.1f}"

    lines = []
    for number, entry in enumerate(entries):
        points = " ".join(place(p["rank"] / entry["full_rank"], p["function_error"]) for p in entry["points"])
        hue = round(240 * (1 - number / max(len(entries) - 1, 1)))
        name = html.escape(entry["parameter"])
        lines.append(
            f'<polyline points="{points}" fill="none" stroke="hsl({hue} 60% 48%)" stroke-width="1.5" opacity="0.8">'
            f"<title>{name}</title></polyline>"
        )
    ticks = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        x, y = left + across * share, top + up * (1 - share)
        ticks.append(f'<line x1="{left}" x2="{left + across}" y1="{y}" y2="{y}" stroke="#8884"/>')
        ticks.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{share * worst:.2g}</text>')
        ticks.append(f'<text x="{x}" y="{top + up + 18}" text-anchor="middle">{share:g}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12" fill="#888"><text x="{left}" y="18" font-size="14">Relative function error against rank, '
        f"blue (input) to red (output)</text>{''.join(ticks)}{''.join(lines)}"
        f'<text x="{left + across / 2}" y="{height - 8}" text-anchor="middle">rank / full rank</text></svg>\n'
    )


def plan_json(plan: Mapping[str, Any]) -> str:
    """The plan as indented JSON."""
    return json.dumps(plan, indent=2)


def _row(entry: Mapping[str, Any], fractions: Sequence[float], *, has_choice: bool) -> list[str]:
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
        cells.append(f"{point['function_error']:.3f}" if point and point["is_smaller"] else "-")
    if has_choice:
        point = points.get(entry["chosen_rank"])
        cells += [str(entry["chosen_rank"]), f"{point['function_error']:.3f}"] if point else ["dense", ""]
    return [*cells, f"{entry['parameters']:,}", str(entry["note"])]


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
            self.graph = importlib.import_module("ghn_service.graph")
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
