"""Published hypernetworks by short names, and how a checkpoint elsewhere is named; nothing is fetched here."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ghn_service.errors import CheckpointError

BUNDLED_CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"
HUB, WEB = "hf://", "https://"
_HUB_FORM = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)/(?P<file>[^@]+?)(?:@(?P<revision>[^@]+))?", re.ASCII)
_PPUDA = "https://github.com/facebookresearch/ppuda/raw/4673a42507a9dcd0a5ae04e74599e8c92af689b9/checkpoints"


@dataclass(frozen=True, slots=True)
class Published:
    """A hypernetwork that anyone can have.

    Attributes:
        location: ``hf://OWNER/REPO/FILE[@REVISION]``, ``https://...``, or the name of a bundled file.
        kind: ``ghn2`` or ``ghn3``.
        num_parameters: Scalars in it; a download has four bytes of each.
        dataset: Data that it was trained on.
        licence: Under which it is published.
    """

    location: str
    kind: str
    num_parameters: int
    dataset: str
    licence: str = "MIT"


PUBLISHED: Final[dict[str, Published]] = {
    "ghn-cifar10": Published("ghn-cifar10.safetensors", "ghn3", 1_395_044, "cifar10"),
    "ghn2-cifar10": Published(f"{_PPUDA}/ghn2_cifar10.pt", "ghn2", 1_620_764, "cifar10"),
    "ghn2-imagenet": Published("hf://SamsungSAILMontreal/ghn3/ghn2.pt", "ghn2", 2_319_720, "imagenet"),
    "ghn3-t": Published("hf://SamsungSAILMontreal/ghn3/ghn3tm8.pt", "ghn3", 6_906_632, "imagenet"),
    "ghn3-s": Published("hf://SamsungSAILMontreal/ghn3/ghn3sm8.pt", "ghn3", 35_810_368, "imagenet"),
    "ghn3-l": Published("hf://SamsungSAILMontreal/ghn3/ghn3lm8.pt", "ghn3", 214_668_960, "imagenet"),
    "ghn3-xl": Published("hf://SamsungSAILMontreal/ghn3/ghn3xlm16.pt", "ghn3", 654_365_184, "imagenet"),
}


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository of the Hugging Face hub; ``revision`` is a branch, tag or commit, None for the default."""

    repo: str
    file: str
    revision: str | None = None


def is_remote(text: str) -> bool:
    """Whether ``text`` names a checkpoint that is fetched: a short name, or an address."""
    return text in PUBLISHED or text.startswith((HUB, WEB))


def parse_hub(text: str) -> HubFile:
    """Reads ``hf://OWNER/REPO/FILE[@REVISION]``.

    Raises:
        CheckpointError: The text has another form.
    """
    match = _HUB_FORM.fullmatch(text)
    if match is None:
        raise CheckpointError(f"expected hf://OWNER/REPO/FILE or hf://OWNER/REPO/FILE@REVISION, got {text!r}")
    return HubFile(**match.groupdict())


def model_name(text: str) -> str:
    """What a server calls the hypernetwork in a file, or of a name, where nobody says otherwise."""
    if text in PUBLISHED:
        return text
    return Path(parse_hub(text).file if text.startswith(HUB) else text).stem


def cache_folder() -> Path:
    """Where downloads are kept in the form that is served: ``GHN_CACHE_DIR``, else a folder of the user's cache."""
    given = os.environ.get("GHN_CACHE_DIR")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ghn-service"
