"""Where settings come from, which source wins, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ghn_service.errors import ConfigurationError
from ghn_service.server.access import load_access
from ghn_service.server.settings import (
    CheckpointFile,
    Settings,
    check_port,
    checkpoint_files,
    load_settings,
    source_folders,
)


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"GHN_{name.upper()}", raising=False)


def write(folder: Path, text: str) -> Path:
    path = folder / "server.toml"
    path.write_text(text)
    return path


def test_a_flag_beats_a_variable_which_beats_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write(tmp_path, "port = 1\nmax_queue = 1\ngrace_seconds = 1.0\n")
    monkeypatch.setenv("GHN_PORT", "2")
    monkeypatch.setenv("GHN_MAX_QUEUE", "2")
    settings = load_settings(config, arguments=["--port", "3"])
    assert (settings.port, settings.max_queue, settings.grace_seconds) == (3, 2, 1.0)
    assert settings.max_calls == Settings().max_calls


def test_lists_are_split_at_commas_in_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GHN_CHECKPOINTS", "a=one.safetensors, two.safetensors")
    monkeypatch.setenv("GHN_DEVICE", "cpu")
    settings = load_settings()
    assert (settings.checkpoints, settings.device) == (("a=one.safetensors", "two.safetensors"), ("cpu",))


def test_flags_of_lists_may_be_repeated() -> None:
    settings = load_settings(arguments=["--checkpoint", "a=one.safetensors", "--checkpoint", "two", "--device", "cpu"])
    assert (settings.checkpoints, settings.device) == (("a=one.safetensors", "two"), ("cpu",))


def test_flags_of_choices_can_be_negated() -> None:
    assert not load_settings(arguments=["--no-reflection"]).reflection


def test_a_program_chooses_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GHN_PORT", "2")
    assert (load_settings(port=3).port, load_settings(port=None).port) == (3, 2)


def test_lists_are_lists_in_files(tmp_path: Path) -> None:
    assert load_settings(write(tmp_path, 'device = ["cuda:0", "cuda:1"]')).device == ("cuda:0", "cuda:1")


def test_other_variables_with_the_prefix_are_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GHN_SHARED", "/anything")
    load_settings()


@pytest.mark.parametrize(
    "text",
    [
        "prot = 1",
        "port = 99999",
        "port = 'x'",
        "max_seconds = nan",
        "max_seconds = -1",
        "port =",
        pytest.param(f"max_nodes = {5000 * '9'}", id="5,000 digits"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_settings(write(tmp_path, text))
    assert "\n" not in str(caught.value).strip()


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError):
        load_settings(tmp_path / "none.toml")


def test_limits_reach_the_reader() -> None:
    limits = load_settings(
        max_nodes=7, max_graph_nodes=6, max_tensors=8, max_parameters=9, max_request_bytes=2048
    ).limits
    assert (limits.max_nodes, limits.max_graph_nodes, limits.max_tensors) == (7, 6, 8)
    assert (limits.max_parameters, limits.max_bytes) == (9, 2048)


def test_the_largest_graph_by_default_fits_a_small_machine() -> None:
    """About 136 bytes per pair of nodes with 16 heads: 2 GiB (docs/server.md)."""
    assert 1_000 <= load_settings().max_graph_nodes <= 4_000


def test_checkpoints_are_named_by_their_stem_or_by_hand(tmp_path: Path) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    first.touch()
    second.touch()
    files = checkpoint_files(Settings(checkpoints=(str(first), f"mine={second}")))
    assert list(files.items()) == [("first", CheckpointFile(str(first))), ("mine", CheckpointFile(str(second)))]


def test_a_file_with_an_equals_sign_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a=b.safetensors"
    path.touch()
    assert checkpoint_files(Settings(checkpoints=(str(path),))) == {"a=b": CheckpointFile(str(path))}


def test_a_checkpoint_may_be_pinned_to_a_digest(tmp_path: Path) -> None:
    path, odd = tmp_path / "a.safetensors", tmp_path / f"b@sha256:{'0' * 64}"
    path.touch()
    odd.touch()
    digest = "AB" * 32
    files = checkpoint_files(
        Settings(checkpoints=(f"mine={path}@sha256:{digest}", f"{path}@sha256:{digest}", str(odd)))
    )
    pinned = CheckpointFile(str(path), digest.lower())
    assert files == {"mine": pinned, "a": pinned, odd.stem: CheckpointFile(str(odd))}
    with pytest.raises(ConfigurationError):
        checkpoint_files(Settings(checkpoints=(f"{path}@sha256:{digest[1:]}",)))


LONG = 300 * "a"


@pytest.mark.parametrize(
    ("use", "values"),
    [
        (checkpoint_files, {"checkpoints": (LONG,)}),
        (checkpoint_files, {"checkpoints": (f"name={LONG}",)}),
        (checkpoint_files, {"checkpoints": (f"{LONG}@sha256:{'0' * 64}",)}),
        (source_folders, {"sources": (LONG,)}),
        (check_port, {"host": 80 * "ü"}),
        (check_port, {"host": "a\0b"}),
        (check_port, {"host": "\udcff"}),
        (load_access, {"tokens": LONG}),
        (load_access, {"tokens": "a\0b"}),
        (load_access, {"tls_certificate": "a\0b", "tls_key": "key.pem"}),
    ],
)
def test_a_name_that_no_system_takes_is_one_line(use: Callable[[Settings], object], values: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        use(Settings(port=0, **values))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("entries", [("missing.safetensors",), ("=x",), ("a=missing.safetensors",)])
def test_a_missing_checkpoint_is_an_error(entries: tuple[str, ...]) -> None:
    with pytest.raises(ConfigurationError):
        checkpoint_files(Settings(checkpoints=entries))


def test_two_checkpoints_of_one_name_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "same.safetensors"
    path.touch()
    with pytest.raises(ConfigurationError):
        checkpoint_files(Settings(checkpoints=(str(path), str(path))))


def test_bundled_checkpoints_are_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bundled.safetensors").touch()
    monkeypatch.setattr("ghn_service.server.settings.BUNDLED_CHECKPOINTS", tmp_path)
    assert list(checkpoint_files(Settings())) == ["bundled"]
