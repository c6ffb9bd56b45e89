"""Which graphs a hypernetwork was trained on, so that an evaluation can leave them out.

Small families of random networks repeat: a network of split ``test`` may be the same graph as one of the training
pool. Digests of the pool's graphs are computed once and kept; a larger pool begins with the same networks.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghn_architectures.generator import GENERATOR_VERSION
from ghn_client.atomic_file import write_file
from ghn_service.graph.architecture import DIGEST_VERSION
from ghn_service.training.networks import Pool, Task
from ghn_service.training.sampling import find_candidate

logger = logging.getLogger(__name__)
SAVE_EVERY = 250


@dataclass(frozen=True)
class TrainingPool:
    """The training networks of a checkpoint.

    Attributes:
        size: Networks in the pool; 0 where the checkpoint does not say.
        digests: Digests of their graphs.
    """

    size: int
    digests: frozenset[str]


def pool_size(details: Mapping[str, Any]) -> int:
    """The size of the training pool in the card of a checkpoint that ``ghn-train fit`` wrote; 0 where it says none."""
    return int(details.get("settings", {}).get("sampling", {}).get("pool", 0))


def pool_split(details: Mapping[str, Any]) -> str:
    """The split that this pool was drawn from."""
    return str(details.get("settings", {}).get("sampling", {}).get("split", "train"))


def training_pool(size: int, task: Task, cache: Path | None, split: str = "train") -> TrainingPool:
    """The digests of the first ``size`` training networks, from the cache as far as it has them.

    About 20 ms of processor time per network; progress is kept, so an interruption costs a few seconds.

    Args:
        size: Networks in the pool.
        task: Sizes of input and output, which are part of a graph.
        cache: Folder for digests; nothing is kept where omitted.
        split: Split of the generator that they come from.
    """
    path = _cache_path(cache, task, split) if cache else None
    digests = _read(path)
    source = Pool(split, task, max(size, 1))
    if len(digests) < size:
        logger.info("digests of the training networks: %d of %d are known", len(digests), size)
    for index in range(len(digests), size):
        candidate = find_candidate(source, index)
        digests.append(candidate.graph().digest() if candidate else "")
        if path and (len(digests) % SAVE_EVERY == 0 or len(digests) == size):
            _write(path, digests)
    return TrainingPool(size, frozenset(digests[:size]) - {""})


def _cache_path(cache: Path, task: Task, split: str) -> Path:
    sizes = f"{task.num_classes}-{task.in_channels}-{task.image_size}"
    return cache / f"graphs-{split}-v{GENERATOR_VERSION}.{DIGEST_VERSION}-{sizes}.json"


def _read(path: Path | None) -> list[str]:
    if path is None or not path.is_file():
        return []
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return [str(item) for item in known]
    except (OSError, ValueError, TypeError) as error:
        logger.warning("ignoring a broken cache file %s: %s", path.name, error)
        return []


def _write(path: Path, digests: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(digests))
