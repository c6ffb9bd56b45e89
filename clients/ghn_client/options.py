"""Options of a request as users write them, and as the protocol has them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ghn_client.errors import InvalidOptionError, require_known
from ghn_client.wire import ghn_pb2
from ghn_client.wire.codec import encode_enum, enum_names

# The rules and methods are those of the protocol, under its names.
RANK_RULES = tuple(field.name for field in ghn_pb2.LowRankOutput.DESCRIPTOR.oneofs_by_name["rank_rule"].fields)
LOW_RANK_METHODS = enum_names(ghn_pb2.LowRankMethod)


@dataclass(frozen=True, slots=True)
class Step:
    """One post-processing step, such as ``Step("noise", {"beta": 3e-5})``."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


StepLike = str | tuple[str, Mapping[str, Any]] | Step
"""A step by name, as a pair of name and options, or as a value; text may hold options, as on the command line."""


@dataclass(frozen=True, slots=True)
class LowRankOptions:
    """Asks for factors wherever they are smaller; exactly one of the rank rules must be given.

    Attributes:
        rank: The same rank for every layer.
        fraction: A share of each layer's full rank.
        energy: Share of the squared singular values to keep.
        function_error: The largest relative error of a layer's function.
        parameter_budget: The most parameters of the whole network.
        multiply_add_budget: The most multiply-adds per example of the whole network.
        method: ``spectral``, ``scaled``, ``function``, ``function_optimized``, or "" for the server's choice.
        force: Use the method also where a normalisation behind the layer cancels what it does; such layers are
            ``spectral`` otherwise.

    Raises:
        InvalidOptionError: None or several rules are given, or the method is unknown.
    """

    rank: int | None = None
    fraction: float | None = None
    energy: float | None = None
    function_error: float | None = None
    parameter_budget: int | None = None
    multiply_add_budget: int | None = None
    method: str = ""
    force: bool = False

    def __post_init__(self) -> None:
        given = [rule for rule in RANK_RULES if getattr(self, rule) is not None]
        if len(given) != 1:
            raise InvalidOptionError(
                f"expected exactly one of {', '.join(RANK_RULES)}, got {', '.join(given) or 'none'}", field="low_rank"
            )
        if self.method:
            require_known(self.method, LOW_RANK_METHODS, field="low_rank.method")


LowRankLike = LowRankOptions | Mapping[str, Any] | str
"""The options as a value, as its fields by name, or as text such as ``energy=0.9,method=function``."""


def parse_pairs(texts: Iterable[str], form: str) -> dict[str, str]:
    """Reads ``key=value`` texts, where ``form`` is what the user should have written.

    Raises:
        InvalidOptionError: A text has another form.
    """
    pairs = [text.partition("=") for text in texts]
    if any(not key.strip() or not equals for key, equals, _ in pairs):
        raise InvalidOptionError(f"expected {form}, got {','.join(map(''.join, pairs))!r}")
    return {key.strip(): value.strip() for key, _, value in pairs}


def parse_step(text: str) -> Step:
    """Reads ``name`` or ``name:key=value,key=value``.

    Raises:
        InvalidOptionError: The text has another form.
    """
    name, separator, rest = text.partition(":")
    if not name.strip():
        raise InvalidOptionError(f"expected a step as name:key=value,key=value, got {text!r}", field="steps")
    return Step(name.strip(), parse_pairs(rest.split(","), f"{name}:key=value,key=value") if separator else {})


def encode_step(step: StepLike) -> ghn_pb2.PostProcessingStep:
    """The step as a message; numbers become text that reads back unchanged.

    Raises:
        InvalidOptionError: The text of a step has no such form.
    """
    if isinstance(step, str):
        step = parse_step(step)
    elif not isinstance(step, Step):
        step = Step(*step)
    return ghn_pb2.PostProcessingStep(
        name=step.name, options={key: _option_text(value) for key, value in step.options.items()}
    )


def _option_text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return ",".join(_option_text(item) for item in value)
    return value if isinstance(value, str) else repr(value)


def encode_low_rank(options: LowRankLike) -> ghn_pb2.LowRankOutput:
    """The options as a message.

    Raises:
        InvalidOptionError: An option is unknown or impossible.
    """
    if isinstance(options, str):
        pairs = parse_pairs(options.split(","), "low rank as RULE=VALUE[,method=M][,force=true]")
        options = {key: value if key == "method" else _number(value) for key, value in pairs.items()}
        if (force := options.get("force", "false")) not in ("true", "false"):
            raise InvalidOptionError(f"expected force=true or force=false, got {force!r}", field="low_rank.force")
        options["force"] = force == "true"
    if isinstance(options, Mapping):
        given = ", ".join(options)
        try:
            options = LowRankOptions(**options)
        except TypeError as error:
            known = ", ".join((*RANK_RULES, "method", "force"))
            raise InvalidOptionError(f"low_rank knows {known}; got {given}", field="low_rank") from error
    rule = next(name for name in RANK_RULES if getattr(options, name) is not None)
    try:
        return ghn_pb2.LowRankOutput(
            method=encode_enum(ghn_pb2.LowRankMethod, options.method),
            force=options.force,
            **{rule: getattr(options, rule)},
        )
    except (ValueError, TypeError) as error:
        raise InvalidOptionError(f"low_rank.{rule}: {error}", field=f"low_rank.{rule}") from error


def _number(text: str) -> int | float | str:
    try:
        value = float(text)
    except ValueError:
        return text
    return int(value) if value.is_integer() else value
