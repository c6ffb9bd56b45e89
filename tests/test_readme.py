"""What the README and the docs promise: links lead somewhere, commands exist, the example runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ghn_architectures.registry import build_network
from ghn_client.client import GHNClient
from ghn_service.hypernetwork.checkpoint import save_checkpoint
from tests.hypernetwork.small_graphs import small_ghn

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`make ([a-z-]+)", page.read_text()))
    named |= set(re.findall(r"^\$ make ([a-z-]+)", page.read_text(), re.MULTILINE))
    assert named <= targets


def test_the_python_example_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own_checkpoint = tmp_path / "small.safetensors"
    save_checkpoint(small_ghn(), own_checkpoint)
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    module = build_network("resnet20", num_classes=10)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with GHNClient.embedded(own_checkpoint) as client:
        monkeypatch.setattr(GHNClient, "embedded", classmethod(lambda cls: cls(client.address)))
        namespace = {"module": module, "torch": torch}
        exec(code, namespace)
    assert namespace["report"].is_complete
    assert not torch.equal(before["head.classifier.weight"], module.state_dict()["head.classifier.weight"])


@pytest.mark.parametrize("command", ["ghn_service", "ghn_client", "ghn_service.training"])
def test_commands_have_a_version_or_help(command: str) -> None:
    result = subprocess.run([sys.executable, "-m", command, "--help"], capture_output=True, text=True, check=False)
    assert result.returncode == 0


@pytest.mark.skipif(
    not list((ROOT / "ghn_service" / "checkpoints").glob("*.safetensors")), reason="no checkpoint is bundled yet"
)
def test_the_bundled_checkpoint_predicts_without_being_named() -> None:
    module = build_network("resnet20", num_classes=10)
    with GHNClient.embedded() as client:
        prediction = client.predict(module, torch.zeros(1, 3, 32, 32))
    assert prediction.load_into(module).is_complete
    assert set(prediction.origins.values()) == {"predicted"}
