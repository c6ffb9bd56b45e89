"""Hypernetworks by name, from a hub on this machine that serves the seeded checkpoints of the reference."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from ghn_client import GHNClient
from ghn_service import __main__ as command
from ghn_service.errors import CheckpointError
from ghn_service.hypernetwork.checkpoint import load_checkpoint
from ghn_service.hypernetwork.download import cached_checkpoint, find_checkpoint
from ghn_service.predictor import Predictor
from ghn_service.published import BUNDLED_CHECKPOINTS, PUBLISHED
from ghn_service.server.settings import checkpoint_files, load_settings
from tests.golden_checkpoints import golden_ghn
from tests.server.small_models import TINY
from tests.shared_data import shared_path
from tests.small_hub import COMMIT, TOKEN, SmallHub, small_hub

REPO = "SamsungSAILMontreal/ghn3"
T = "ghn3tm8.pt"


def joblib_dump(name: str) -> bytes:
    return pickle.dumps(load_file(shared_path(f"golden/{name}.safetensors")), protocol=4)


def torch_file(name: str) -> bytes:
    buffer = io.BytesIO()
    config = json.loads(shared_path(f"golden/{name}.config.json").read_text())["config"]
    torch.save({"state_dict": load_file(shared_path(f"golden/{name}.safetensors")), "config": config}, buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    golden = "ghn2_cifar10_seeded"
    return {
        f"{REPO}/{T}": joblib_dump("ghn3_seeded"),
        f"{REPO}/ghn2.pt": torch_file("ghn2_seeded"),
        "someone/nets/folder/own.safetensors": (BUNDLED_CHECKPOINTS / "ghn-cifar10.safetensors").read_bytes(),
        "someone/nets/official.safetensors": shared_path(f"golden/{golden}.safetensors").read_bytes(),
        "someone/nets/official.config.json": shared_path(f"golden/{golden}.config.json").read_bytes(),
        "someone/nets/other.pt": pickle.dumps({"layer.weight": torch.zeros(2, 2)}),
        "someone/nets/notes.txt": b"no checkpoint",
    }


@pytest.fixture
def hub(files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallHub]:
    with small_hub(dict(files)) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        monkeypatch.setenv("GHN_CACHE_DIR", str(tmp_path / "ours"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        yield running


def check_is(path: Path, golden: str) -> None:
    loaded, summary = load_checkpoint(path)
    torch.testing.assert_close(loaded.state_dict(), golden_ghn(golden).state_dict(), rtol=0, atol=0)
    assert summary.card.dataset in ("", "imagenet")


@pytest.mark.parametrize(
    ("name", "golden"),
    [
        ("ghn3-t", "ghn3_seeded"),
        ("ghn2-imagenet", "ghn2_seeded"),
        (f"hf://{REPO}/{T}", "ghn3_seeded"),
        (f"hf://{REPO}/{T}@v1", "ghn3_seeded"),
        (f"hf://{REPO}/{T}@{COMMIT}", "ghn3_seeded"),
        ("hf://someone/nets/official.safetensors", "ghn2_cifar10_seeded"),
    ],
)
def test_names_lead_to_the_published_weights(hub: SmallHub, name: str, golden: str) -> None:
    check_is(find_checkpoint(name), golden)


def test_a_file_of_ours_needs_no_conversion(hub: SmallHub) -> None:
    path = find_checkpoint("hf://someone/nets/folder/own.safetensors")
    assert path.read_bytes() == hub.files["someone/nets/folder/own.safetensors"]


def test_a_file_is_fetched_and_converted_once(hub: SmallHub) -> None:
    first = find_checkpoint("ghn3-t")
    written = first.stat().st_mtime_ns
    assert find_checkpoint("ghn3-t") == first == find_checkpoint(f"hf://{REPO}/{T}@v1") == cached_checkpoint("ghn3-t")
    assert first.stat().st_mtime_ns == written
    assert hub.sent == [(T, 0)]
    find_checkpoint("ghn3-t", force=True)
    assert hub.sent == [(T, 0), (T, 0)]


def test_a_broken_download_goes_on_where_it_stopped(hub: SmallHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)
    monkeypatch.setattr("time.sleep", lambda _: None)  # between the library's own attempts
    hub.cut_after = [1 << 18] * 3
    check_is(find_checkpoint("ghn3-t"), "ghn3_seeded")
    assert [first >> 18 for _, first in hub.sent] == [0, 1, 2, 3]


def test_a_download_that_breaks_for_good_leaves_nothing_half(hub: SmallHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.cut_after = [1000] * 20
    with pytest.raises(CheckpointError):
        find_checkpoint("ghn3-t")
    assert cached_checkpoint("ghn3-t") is None
    hub.cut_after = []
    check_is(find_checkpoint("ghn3-t"), "ghn3_seeded")


def test_a_damaged_download_is_refused_and_fetched_again(hub: SmallHub) -> None:
    hub.damage = True
    with pytest.raises(CheckpointError):
        find_checkpoint("ghn3-t")
    hub.damage = False
    check_is(find_checkpoint("ghn3-t"), "ghn3_seeded")


@pytest.mark.parametrize("is_converted", [True, False])
def test_without_a_network_the_cache_serves(hub: SmallHub, monkeypatch: pytest.MonkeyPatch, is_converted: bool) -> None:
    if is_converted:
        find_checkpoint("ghn3-t")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda _: None)  # between the library's own attempts
    if is_converted:
        check_is(find_checkpoint("ghn3-t"), "ghn3_seeded")
    else:
        with pytest.raises(CheckpointError):
            find_checkpoint("ghn3-t")


def test_converted_files_serve_where_the_hub_s_cache_is_gone(
    hub: SmallHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    find_checkpoint("ghn3-t")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    check_is(find_checkpoint("ghn3-t"), "ghn3_seeded")


@pytest.mark.parametrize(
    "name",
    [
        "ghn3-s",  # the repository has no such file
        "hf://nobody/nothing/file.pt",
        f"hf://{REPO}/{T}@no-such-revision",
        "hf://someone/nets/other.pt",
        "hf://someone/nets/notes.txt",
        "hf://someone/nets",
        "hf://someone",
    ],
)
def test_what_is_no_hypernetwork_is_refused(hub: SmallHub, name: str) -> None:
    with pytest.raises(CheckpointError):
        find_checkpoint(name)


def test_pickled_code_is_not_run(hub: SmallHub, tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "run",)

    hub.files["someone/nets/bad.pt"] = pickle.dumps({"a": Malicious()})
    with pytest.raises(CheckpointError):
        find_checkpoint("hf://someone/nets/bad.pt")
    assert not (tmp_path / "run").exists()


def test_private_repositories_take_the_token_of_the_environment(hub: SmallHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.private = True
    with pytest.raises(CheckpointError):
        find_checkpoint("ghn3-t")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    check_is(find_checkpoint("ghn3-t"), "ghn3_seeded")


def test_a_file_of_the_web_is_fetched_once(hub: SmallHub, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(url: str, destination: str, **_: object) -> None:
        asked.append(url)
        Path(destination).write_bytes(torch_file("ghn2_cifar10_seeded"))

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        path = find_checkpoint("ghn2-cifar10")
    check_ghn, summary = load_checkpoint(path)
    torch.testing.assert_close(check_ghn.state_dict(), golden_ghn("ghn2_cifar10_seeded").state_dict(), rtol=0, atol=0)
    assert summary.card.dataset == "cifar10"
    assert asked == [PUBLISHED["ghn2-cifar10"].location]


def test_a_web_without_network_is_an_error(hub: SmallHub) -> None:
    with pytest.raises(CheckpointError):
        find_checkpoint("https://127.0.0.1:9/nothing.pt")


def test_the_bundled_one_has_a_name() -> None:
    path = find_checkpoint("ghn-cifar10")
    assert load_checkpoint(path)[1].num_parameters == PUBLISHED["ghn-cifar10"].num_parameters


def test_the_predictor_and_the_embedded_server_take_names(hub: SmallHub) -> None:
    summary = Predictor.from_checkpoint("ghn3-t").summary
    assert summary is not None
    with GHNClient.embedded(f"hf://{REPO}/{T}@v1") as client:
        assert [model.digest for model in client.models()] == [summary.digest]
        assert client.predict(TINY).metadata.model == "ghn3tm8"


@pytest.mark.parametrize(
    ("entry", "name", "source"),
    [
        ("ghn3-t", "ghn3-t", "ghn3-t"),
        ("big=ghn3-xl", "big", "ghn3-xl"),
        (f"hf://{REPO}/{T}@v1", "ghn3tm8", f"hf://{REPO}/{T}@v1"),
        (f"t=hf://{REPO}/{T}", "t", f"hf://{REPO}/{T}"),
        ("https://host/file.pt?a=b", "file", "https://host/file.pt?a=b"),
    ],
)
def test_servers_take_names_and_digests(entry: str, name: str, source: str) -> None:
    for suffix, digest in (("", ""), (f"@sha256:{'a' * 64}", "a" * 64)):
        (found,) = checkpoint_files(load_settings(checkpoints=(entry + suffix,))).items()
        assert (found[0], found[1].source, found[1].digest) == (name, source, digest)


def test_a_wrong_digest_is_refused(hub: SmallHub) -> None:
    with pytest.raises(Exception, match="sha256"):
        GHNClient.embedded(f"ghn3-t@sha256:{'0' * 64}")


def run(*arguments: str) -> str:
    result = CliRunner().invoke(command.app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


def test_the_commands_fetch_and_list(hub: SmallHub) -> None:
    by_name = {row["name"]: row for row in json.loads(run("checkpoints", "--json"))}
    assert set(by_name) == set(PUBLISHED)
    assert [name for name, row in by_name.items() if row["file"]] == ["ghn-cifar10"]
    digest = load_checkpoint(find_checkpoint("ghn3-t"))[1].digest
    assert digest in run("pull", "ghn3-t")
    run("pull", "hf://someone/nets/official.safetensors")
    by_name = {row["name"]: row for row in json.loads(run("checkpoints", "--json"))}
    assert by_name["ghn3-t"]["file"]
    assert f"hf://someone/nets/official.safetensors@{COMMIT}" in by_name
    assert "MIT" in run("checkpoints")
    assert json.loads(run("show-checkpoint", "ghn3-t"))["digest"] == digest
    assert CliRunner().invoke(command.app, ["pull", "ghn3-xl"]).exit_code == 1
