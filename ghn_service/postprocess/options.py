"""Options of post-processing steps: text from the wire becomes the fields of a frozen dataclass."""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from ghn_service.errors import InvalidOptionError

OptionsT = TypeVar("OptionsT")

_SWITCHES = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)


def parse_options(kind: type[OptionsT], options: Mapping[str, str], *, field: str) -> OptionsT:
    """Builds a dataclass, whose fields are ``int``, ``float``, ``bool`` or ``str`` or None, from options given as text.

    ``field`` is the path of the options in the request, as ``"steps[1].options"``; errors name the option below it.

    Raises:
        InvalidOptionError: An option is unknown, is not of its type, or has an impossible value.
    """
    hints = typing.get_type_hints(kind)
    known = [item.name for item in dataclasses.fields(kind)]  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for name, text in options.items():
        if name not in known:
            raise unknown_name("option", name, known, field=f"{field}.{name}")
        values[name] = _parse_value(hints[name], text, field=f"{field}.{name}")
    try:
        return kind(**values)
    except InvalidOptionError as error:
        raise InvalidOptionError(str(error), field=f"{field}.{error.field}" if error.field else field) from error


def unknown_name(what: str, name: str, known: Iterable[str], *, field: str) -> InvalidOptionError:
    """The error for a name that is not in a table: it lists the known ones, and the likely one first."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return InvalidOptionError(f"unknown {what} {name!r}: {hint}known are {', '.join(sorted(names))}", field=field)


def _parse_value(hint: Any, text: str, *, field: str) -> Any:
    (kind,) = (kind for kind in typing.get_args(hint) or (hint,) if kind is not type(None))
    word = text.strip()
    if kind is bool:
        if word.lower() not in _SWITCHES:
            raise InvalidOptionError(f"expected true or false, got {text!r}", field=field)
        return _SWITCHES[word.lower()]
    try:
        return kind(word)
    except ValueError:
        wanted = {int: "a whole number", float: "a number"}[kind]
        raise InvalidOptionError(f"expected {wanted}, got {text!r}", field=field) from None


def require_at_least(value: float, minimum: float, *, field: str) -> None:
    """Raises ``InvalidOptionError`` unless ``value`` is a finite number of at least ``minimum``."""
    if not math.isfinite(value) or value < minimum:
        raise InvalidOptionError(f"expected a finite number of at least {minimum:g}, got {value}", field=field)


def require_share(value: float, *, field: str, zero: bool = False, one: bool = True) -> None:
    """Raises ``InvalidOptionError`` unless ``value`` is a number between 0 and 1, the ends included as told."""
    low = value >= 0 if zero else value > 0
    high = value <= 1 if one else value < 1
    if not (low and high):
        interval = f"{'[' if zero else '('}0, 1{']' if one else ')'}"
        raise InvalidOptionError(f"expected a number in {interval}, got {value}", field=field)


def require_known(value: str, known: Iterable[str], *, field: str) -> None:
    """Raises ``InvalidOptionError`` unless ``value`` is one of ``known``."""
    if value not in (names := list(known)):
        raise unknown_name(field, value, names, field=field)
