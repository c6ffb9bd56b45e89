"""What fine-tuning can refuse: one family, one cause each.

Messages say what was expected, what came and what to do about it.
"""

from __future__ import annotations

from typing import ClassVar

from ghn_client.errors import GhnClientError


class FineTuneError(GhnClientError):
    """Base of everything that ``ghn_client.finetune`` raises on purpose."""

    exit_code: ClassVar[int] = 3


class NothingToTuneError(FineTuneError):
    """The strategy finds no parameter that it could tune in this module."""


class UnknownNameError(FineTuneError):
    """A strategy, layer or option name that does not exist; the message lists the known ones."""


class InvalidOptionError(FineTuneError):
    """An option has an impossible value."""


class UnsupportedModuleError(FineTuneError):
    """The module has a structure for which the operation has no proof or no meaning."""


class NotAffineError(FineTuneError):
    """A norm layer whose output is not an affine function of its input (LayerNorm-like layers)."""


class TrainModeError(FineTuneError):
    """A BatchNorm layer normalises with batch statistics, so the module is no fixed function."""


class InfeasibleError(FineTuneError):
    """The exact problem has no solution here: a network too narrow, or a system without full rank."""


class PrecisionError(FineTuneError):
    """The solution exists but does not survive rounding to the asked precision."""


class ConflictingLabelsError(FineTuneError):
    """Two samples that the side network cannot tell apart want different labels."""


class CertificateError(FineTuneError):
    """A finished construction failed its own check; nothing is returned."""


class DeltaFormatError(FineTuneError):
    """A delta file is damaged, of another kind, or does not fit the module."""


class WrongBaseError(FineTuneError):
    """A delta was made for other base weights than those of this module."""


class MissingExtraError(FineTuneError):
    """An optional library is needed; the message names it."""
