"""Checkpoints that lie elsewhere: fetched once, converted once without running pickled code, and kept.

Files of the Hugging Face hub go through its own library, so its cache, tokens (``HF_TOKEN``), mirrors (``HF_ENDPOINT``)
and offline mode (``HF_HUB_OFFLINE``) are those that its users know. What is served lies in the folder
``checkpoints/OWNER--REPO/COMMIT`` of ours (``published.cache_folder``).
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError

import torch
from safetensors import SafetensorError, safe_open

from ghn_client.atomic_file import file_digest, replaced_file
from ghn_service.errors import CheckpointError
from ghn_service.hypernetwork.checkpoint import METADATA_KEY
from ghn_service.hypernetwork.import_checkpoint import import_checkpoint
from ghn_service.published import (
    BUNDLED_CHECKPOINTS,
    HUB,
    PUBLISHED,
    HubFile,
    cache_folder,
    is_remote,
    parse_hub,
)

OFFLINE = "HF_HUB_OFFLINE"
SHA256 = re.compile("[0-9a-f]{64}")


def find_checkpoint(text: str, *, force: bool = False) -> Path:
    """The file of a checkpoint, fetched and converted where it has to be.

    Args:
        text: The path of a file, one of ``PUBLISHED``, ``hf://OWNER/REPO/FILE[@REVISION]`` or ``https://HOST/FILE``; a
            file that exists is taken as it stands.
        force: Whether to fetch and convert again what is in the cache.

    Raises:
        CheckpointError: It cannot be fetched, or is no hypernetwork.
    """
    if Path(text).is_file() or not is_remote(text):
        return Path(text)
    known = PUBLISHED.get(text)
    location, dataset = (known.location, known.dataset) if known else (text, "")
    if location.startswith(HUB):
        return _from_hub(parse_hub(location), dataset, force=force)
    if known and (BUNDLED_CHECKPOINTS / location).is_file():
        return BUNDLED_CHECKPOINTS / location
    return _from_web(location, dataset, force=force)


def cached_checkpoints() -> Iterator[tuple[str, Path]]:
    """What was fetched and converted: where it came from, and its file."""
    root = cache_folder() / "checkpoints"
    for path in sorted(root.rglob("*.safetensors")):
        owner_repo, commit, *inside = path.relative_to(root).with_suffix("").parts
        owner, separator, repo = owner_repo.partition("--")
        yield (f"{HUB}{owner}/{repo}/{'/'.join(inside)}@{commit}" if separator else f"{commit}/{inside[-1]}"), path


def cached_checkpoint(name: str) -> Path | None:
    """The newest file of a published hypernetwork in the cache, or the bundled one; None if it was not fetched."""
    location = PUBLISHED[name].location
    if location.startswith(HUB):
        return _newest(parse_hub(location))
    path = BUNDLED_CHECKPOINTS / location if "/" not in location else _web_target(location)
    return path if path.is_file() else None


def _from_hub(wanted: HubFile, dataset: str, *, force: bool) -> Path:
    path = _download(wanted, force=force)
    if path is None:  # no network, and not in the hub's cache either
        converted = None if wanted.revision else _newest(wanted)
        if converted is None:
            raise CheckpointError(
                f"{wanted.file!r} of {wanted.repo} is not in the cache and cannot be fetched: there is no network, or "
                f"{OFFLINE} is set; fetch it where there is one (ghn-server pull), and copy the cache"
            )
        return converted
    commit = path.parents[len(Path(wanted.file).parts) - 1].name
    target = _hub_folder(wanted.repo) / commit / f"{wanted.file}.safetensors"
    if path.suffix == ".safetensors":
        if _is_ours(path):
            return path
        _download(HubFile(wanted.repo, str(Path(wanted.file).with_suffix(".config.json")), commit), force=force)
    if target.is_file() and not force:
        return target
    _check_digest(path)
    return _convert(path, target, dataset, where=f"{HUB}{wanted.repo}/{wanted.file}")


def _download(wanted: HubFile, *, force: bool) -> Path | None:
    """The file in the hub's cache; None where neither network nor cache have it.

    Raises:
        CheckpointError: The hub refuses it, has no such file, or broke off.
    """
    from huggingface_hub import errors, hf_hub_download  # a third of a second, for those alone who download

    try:
        # Revisions that were asked for by name may move, so the hub is asked where it can be.
        endpoint = os.environ.get("HF_ENDPOINT") or None
        found = hf_hub_download(
            wanted.repo, wanted.file, revision=wanted.revision, force_download=force, endpoint=endpoint
        )
        return Path(found)
    except errors.LocalEntryNotFoundError:
        return None
    except (errors.GatedRepoError, errors.RepositoryNotFoundError) as error:
        raise CheckpointError(
            f"the hub has no repository {wanted.repo!r}, or it is not open to you; a token goes into HF_TOKEN"
        ) from error
    except (errors.EntryNotFoundError, errors.RevisionNotFoundError) as error:
        raise CheckpointError(
            f"the repository {wanted.repo!r} has no {wanted.file!r} at revision {wanted.revision or 'main'!r}"
        ) from error
    except Exception as error:  # of httpx, of the hub's other protocols, of the disk: all mean that it is not here
        raise CheckpointError(
            f"{wanted.file!r} of {wanted.repo} could not be fetched: "
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason'}"
        ) from error


def _from_web(url: str, dataset: str, *, force: bool) -> Path:
    """A file of the web, which is not asked for again once it is converted."""
    target = _web_target(url)
    if target.is_file() and not force:
        return target
    download = cache_folder() / "downloads" / Path(url).name
    try:
        download.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(download), progress=sys.stderr.isatty())
        if download.suffix == ".safetensors" and _is_ours(download):
            with replaced_file(_made(target)) as part:
                part.write_bytes(download.read_bytes())
            return target
        return _convert(download, target, dataset, where=url)
    except (URLError, OSError) as error:  # an HTTP status is a URLError
        raise CheckpointError(f"{url!r} could not be fetched: {getattr(error, 'reason', None) or error}") from error
    finally:
        download.unlink(missing_ok=True)


def _convert(path: Path, target: Path, dataset: str, *, where: str) -> Path:
    try:
        import_checkpoint(path, _made(target), dataset=dataset)
    except CheckpointError as error:
        raise CheckpointError(f"{where} cannot be used: {error}") from error
    return target


def _check_digest(path: Path) -> None:
    """Refuses and removes a file that is not what the hub announced: it names large files by their sha256.

    Raises:
        CheckpointError: The file is damaged.
    """
    blob = path.resolve()
    if not SHA256.fullmatch(blob.name):
        return
    found = file_digest(blob)
    if found != blob.name:
        blob.unlink()
        path.unlink(missing_ok=True)
        raise CheckpointError(
            f"{path.name!r} arrived damaged (sha256 {found}, expected {blob.name}) and was removed; fetch it again"
        )


def _is_ours(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return METADATA_KEY in (file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path.name!r} is no safetensors file: {error}") from error


def _made(path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"the cache cannot be written ({error.strerror}); GHN_CACHE_DIR names another folder"
        ) from error
    return path


def _hub_folder(repo: str) -> Path:
    return cache_folder() / "checkpoints" / repo.replace("/", "--")


def _newest(wanted: HubFile) -> Path | None:
    found = _hub_folder(wanted.repo).glob(f"*/{wanted.file}.safetensors")
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _web_target(url: str) -> Path:
    address = hashlib.sha256(url.encode()).hexdigest()[:16]
    return cache_folder() / "checkpoints" / "web" / address / f"{Path(url).name}.safetensors"
