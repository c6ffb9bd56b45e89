"""The page of a prediction: self-contained, with the report inside unharmed, and drawn without a fault by a browser."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from ghn_architectures.architecture import Interface
from ghn_architectures.resnet import ResNetConfiguration
from ghn_client import GHNClient, Prediction
from ghn_client.report_page import render_page
from ghn_service.hypernetwork.checkpoint import save_checkpoint
from tests.hypernetwork.small_graphs import small_ghn

REPORT = {"format": "ghn-prediction-report/1", "layers": [{"parameter": "</script><script>alert(1)</script>"}]}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
NETWORKS = {"resnet20": (3, 3, 3), "of 450 nodes": (30, 30, 30)}


def embedded_report(page: str) -> dict:
    (body,) = re.findall(r'<script type="application/json" id="report">(.*?)</script>', page, flags=re.DOTALL)
    return json.loads(body)


def test_the_report_is_inside_the_page_unchanged() -> None:
    assert embedded_report(render_page(REPORT)) == REPORT


def test_the_page_requests_nothing_from_outside() -> None:
    page = render_page(REPORT)
    assert not re.search(r"""(src|href)\s*=|url\(|@import|fetch\(|XMLHttpRequest|https?://""", page)


def test_names_from_a_file_cannot_become_code() -> None:
    assert "<script>alert(1)" not in render_page(REPORT)


@pytest.fixture(scope="module")
def predictions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Prediction]:
    """ResNet-20 and a network of 450 nodes with reports, and ResNet-20 without one."""
    path = tmp_path_factory.mktemp("pages") / "small.safetensors"
    save_checkpoint(small_ghn(), path)
    image = torch.zeros(1, 3, 32, 32)
    with GHNClient.embedded(path) as client:
        networks = {name: ResNetConfiguration((8, 16, 32), depths) for name, depths in NETWORKS.items()}
        built = {name: configuration.build(Interface()) for name, configuration in networks.items()}
        found = {name: client.predict(module, image, report=True) for name, module in built.items()}
        return {**found, "without a report": client.predict(built["resnet20"], image)}


def test_a_page_has_verdict_and_network_with_a_report_and_without(predictions: dict[str, Prediction]) -> None:
    for prediction in predictions.values():
        shown = embedded_report(prediction.report_page())
        drawn = {tensor[0] for node in shown["graph"]["nodes"] for tensor in node[1:]}
        assert drawn == set(prediction)
        assert shown["trust"]["verdict"] == prediction.trust.verdict
    assert len(embedded_report(predictions["of 450 nodes"].report_page())["graph"]["nodes"]) >= 440


def test_a_notebook_shows_the_page_apart_from_its_own_styles(predictions: dict[str, Prediction]) -> None:
    shown = predictions["resnet20"]._repr_html_()
    assert re.match(r'<iframe srcdoc="[^"]+" [^>]*></iframe>$', shown)


def browse(page: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Opens a page in a browser without a window."""
    if BROWSER is None:
        pytest.skip("no Chromium is installed")
    file = folder / "page.html"
    file.write_text(page, encoding="utf-8")
    common = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=3000")
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [BROWSER, *common, profile, "--enable-logging=stderr", *options, file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not re.findall(r"CONSOLE.*(?:Uncaught|Error)[^\n]*", done.stderr)
    return done


@pytest.mark.parametrize("name", [*NETWORKS, "without a report"])
@pytest.mark.parametrize(
    ("width", "theme"), [(420, ()), (1280, ("--force-dark-mode",))], ids=["narrow", "wide and dark"]
)
def test_a_browser_draws_the_page(
    predictions: dict[str, Prediction], name: str, width: int, theme: tuple[str, ...], tmp_path: Path
) -> None:
    image = pytest.importorskip("PIL.Image")
    target = tmp_path / "page.png"
    page = predictions[name].report_page()
    browse(page, tmp_path, f"--window-size={width},1600", f"--screenshot={target}", *theme)
    pixels = image.open(io.BytesIO(target.read_bytes())).convert("RGB")
    background = pixels.getpixel((2, 2))
    assert (sum(background) < 200) == bool(theme)
    colours = pixels.getcolors(maxcolors=1 << 20)
    blue = sum(count for count, (red, _, value) in colours if value > red + 60)
    assert len(colours) > 50  # text is drawn
    assert blue > 1000  # predicted tensors are drawn


def test_every_tensor_has_its_box(predictions: dict[str, Prediction], tmp_path: Path) -> None:
    prediction = predictions["of 450 nodes"]
    graph = embedded_report(prediction.report_page())["graph"]
    dom = browse(prediction.report_page(), tmp_path, "--window-size=1280,900", "--dump-dom").stdout
    assert len(re.findall(r'<g class="node" [^>]*data-name="[^$]', dom)) == sum(
        len(node) > 1 for node in graph["nodes"]
    )
    assert f'<span class="verdict {prediction.trust.verdict}">' in dom
