"""Sources as files, and the library that finds them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ghn_service.errors import SourceError, UnknownModelError
from ghn_service.transfer.library import METADATA_KEY, Library, load_source, read_summary, save_source
from ghn_service.transfer.source import Source, SourceCard

STRUCTURE = b"structure" * 100
CARD = SourceCard(
    dataset="cifar10",
    class_names=("a", "b"),
    accuracy=0.5,
    recipe="20 epochs",
    seed=3,
    command="ghn-train source",
    licence="MIT",
    normalization={"mean": (0.5, 0.25), "std": (1.0, 2.0)},
    image_size=32,
    details={"epochs": 20},
)


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "conv.weight": torch.randn(4, 3, 3, 3, generator=generator),
        "bn.running_var": torch.tensor([1.0, 1e6]),
        "bn.num_batches_tracked": torch.tensor(7),
    }


def test_a_source_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    save_source(tmp_path / "net.safetensors", STRUCTURE, tensors(), card=CARD)
    source = load_source(tmp_path / "net.safetensors")
    assert (source.name, source.structure, source.card) == ("net", STRUCTURE, CARD)
    assert set(source.tensors) == {"conv.weight", "bn.running_var"}
    torch.testing.assert_close(dict(source.tensors), {n: t for n, t in tensors().items() if n in source.tensors})


def test_half_precision_keeps_what_does_not_fit_it(tmp_path: Path) -> None:
    summary = save_source(tmp_path / "net.safetensors", STRUCTURE, tensors(), dtype=torch.float16)
    written = load_file(tmp_path / "net.safetensors")
    assert {name: tensor.dtype for name, tensor in written.items()} == {
        "conv.weight": torch.float16,
        "bn.running_var": torch.float32,
    }
    assert (summary.num_parameters, summary.num_bytes) == (110, 108 * 2 + 2 * 4)


def test_equal_sources_have_equal_digests(tmp_path: Path) -> None:
    first, second = (
        save_source(tmp_path / f"{name}.safetensors", STRUCTURE, tensors(), card=CARD).digest for name in "ab"
    )
    assert first == second == load_source(tmp_path / "a.safetensors").digest


@pytest.mark.parametrize("name", ["auto.safetensors", "net.onnx", ".safetensors"])
def test_a_source_needs_a_usable_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(SourceError):
        save_source(tmp_path / name, STRUCTURE, tensors())
    assert not list(tmp_path.iterdir())


def test_a_source_has_finite_values(tmp_path: Path) -> None:
    with pytest.raises(SourceError):
        save_source(tmp_path / "net.safetensors", STRUCTURE, {"w": torch.tensor([float("nan")])})


def damaged(tmp_path: Path, kind: str) -> Path:
    """A file that is no source, in one of several ways."""
    path = tmp_path / "net.safetensors"
    if kind == "missing":
        return path
    if kind == "no safetensors":
        path.write_bytes(b"nothing" * 100)
        return path
    save_source(path, STRUCTURE, tensors())
    if kind == "cut off":
        path.write_bytes(path.read_bytes()[:-10])
        return path
    weights = {"w": torch.zeros(2, dtype=torch.int8 if kind == "quantised" else torch.float32)}
    other = {
        "no metadata": {},
        "no JSON": {METADATA_KEY: "{"},
        "another version": {METADATA_KEY: json.dumps({"format": "ghn-source/9"})},
        "no base64": {METADATA_KEY: json.dumps({"format": "ghn-source/1", "card": {}, "structure": "???"})},
        "no zlib": {METADATA_KEY: json.dumps({"format": "ghn-source/1", "card": {}, "structure": "AAAA"})},
        "a list": {METADATA_KEY: "[]"},
        "quantised": {},
    }[kind]
    save_file(weights, path, metadata=other)
    return path


KINDS = (
    "missing", "no safetensors", "cut off", "no metadata", "no JSON", "another version", "no base64", "no zlib",
    "a list", "quantised",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_source_is_refused(tmp_path: Path, kind: str) -> None:
    path = damaged(tmp_path, kind)
    with pytest.raises(SourceError):
        load_source(path)
    with pytest.raises(SourceError):
        read_summary(path)


def test_a_card_of_a_newer_version_is_read(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save_source(path, STRUCTURE, tensors(), card=CARD)
    with_more = json.loads(_metadata(path))
    with_more["card"]["colour"] = "green"
    save_file(load_file(path), path, metadata={METADATA_KEY: json.dumps(with_more)})
    card = load_source(path).card
    assert (card.dataset, dict(card.details)) == ("cifar10", {"colour": "green", "epochs": 20})


def _metadata(path: Path) -> str:
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return str(header["__metadata__"][METADATA_KEY])


def test_a_library_finds_new_files_and_passes_over_damaged_ones(tmp_path: Path) -> None:
    library = Library([tmp_path])
    assert library.summaries() == ()
    save_source(tmp_path / "b.safetensors", STRUCTURE, tensors(), card=CARD)
    save_source(tmp_path / "a.safetensors", STRUCTURE, tensors())
    (tmp_path / "c.safetensors").write_bytes(b"nothing")
    assert [summary.name for summary in library.summaries()] == ["a", "b"]
    assert list(library.failures) == ["c.safetensors"]
    changed = save_source(tmp_path / "a.safetensors", STRUCTURE + b"!", tensors())
    assert library.summaries()[0] == changed
    assert library.load("a").structure == STRUCTURE + b"!"
    assert library.size("a") == changed.num_bytes


def test_the_first_folder_counts(tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        save_source(folder / "net.safetensors", folder.name.encode(), tensors())
    library = Library(folders)
    assert (len(library.summaries()), library.load("net").structure) == (1, b"one")


@pytest.mark.parametrize("name", ["nothing", "../net", "folder/net", "", "."])
def test_a_library_reads_nothing_outside_of_its_folders(tmp_path: Path, name: str) -> None:
    (tmp_path / "sources").mkdir()
    save_source(tmp_path / "net.safetensors", STRUCTURE, tensors())
    with pytest.raises(UnknownModelError):
        Library([tmp_path / "sources"]).load(name)


def test_a_lent_source_is_known_until_it_is_given_back(tmp_path: Path) -> None:
    library = Library([tmp_path])
    with library.lend(Source("mine", STRUCTURE, tensors())) as key, library.lend(Source("mine", b"", {})) as other:
        assert library.load(key).structure == STRUCTURE
        assert library.load(other).structure == b""
        assert (library.summaries(), library.size(key)) == ((), 0)
    with pytest.raises(UnknownModelError):
        library.load(key)
