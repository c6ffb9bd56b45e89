"""The experiments with sources: their parts run, resume, and fill the page; and the rival is what it claims to be."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks import transfer as experiments
from ghn_architectures.architecture import Interface
from ghn_architectures.registry import SOURCES
from ghn_client.onnx.export import export_architecture
from ghn_service.transfer.library import save_source
from ghn_service.transfer.source import SourceCard
from tests.training.written_images import write_image_folder


def test_the_threshold_takes_the_source_where_it_pays():
    pairs = [(0.2, 0.1, 0.5), (0.6, 0.7, 0.5), (0.4, 0.4, 0.5), (0.8, 0.4, 0.5), (0.9, 0.8, 0.5)]
    assert experiments.best_threshold(pairs) == (0.6, pytest.approx((0.5 + 0.5 + 0.7 + 0.4 + 0.8) / 5))
    assert experiments.best_threshold([(0.3, 0.1, 0.5)]) == (1.0, 0.5)


def test_selection_is_evenly_spaced_and_kernels_stay_centred():
    source, target = nn.Conv2d(2, 9, 3, bias=False), nn.Conv2d(2, 5, 5, bias=False)
    selected = experiments.select_evenly(target, {"weight": source.weight.detach()})["weight"]
    assert torch.equal(selected[:, :, 1:4, 1:4], source.weight[::2])
    assert selected.count_nonzero() == selected[:, :, 1:4, 1:4].count_nonzero()


def test_odd_variants_are_buildable_and_different():
    variants = [experiments.odd_configuration(number) for number in range(12)]
    assert len({repr(variant) for variant in variants}) == 12
    assert not {repr(variant) for variant in variants} & {repr(source) for source in SOURCES.values()}
    with torch.device("meta"):
        for variant in variants:
            assert variant.build(Interface())(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.slow
def test_every_part_runs_and_resumes(tmp_path, capsys):
    write_image_folder(tmp_path / "data", classes=3, size=32, count=120)
    (tmp_path / "sources").mkdir()
    for name in ("small_resnet", "small_vgg11_bn"):
        module = SOURCES[name].build(Interface(3)).eval()
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):  # trained channels differ
                nn.init.uniform_(part.weight, 0.5, 1.5)
        card = SourceCard(class_names=("class0", "class1", "class2"))
        structure = export_architecture(module, torch.zeros(1, 3, 32, 32))
        save_source(tmp_path / "sources" / f"{name}.safetensors", structure, module.state_dict(), card=card)
    blocks = ("threshold", "zero-shot", "cutting", "fine-tuning on data", "to the end on data")
    page = tmp_path / "transfer.md"
    page.write_text("".join(f"<!-- {block} -->\n<!-- end -->\n" for block in blocks))
    folders = [f"--{name}={tmp_path / name}" for name in ("data", "sources", "cache")]
    sizes = ["--networks=2", "--variants=1", "--seeds=1", "--images=64", "--test-images=60", "--quick"]
    sizes += ["--references=resnet20", "--cut", "small_resnet"]
    for part in ("threshold", "zero-shot", "cutting", "fine-tuning", "to-the-end"):
        command = [part, *folders, f"--cells={tmp_path / 'cells.jsonl'}", f"--output={tmp_path}", *sizes]
        experiments.main(command)
        lines = (tmp_path / "cells.jsonl").read_text()
        experiments.main(command)
        assert (tmp_path / "cells.jsonl").read_text() == lines
    assert page.read_text().count("|---") > 20
    assert "contained" in page.read_text()
