"""``python -m benchmarks.large_hypernetwork``: a GHN-3 of the published XL size predicts resnet50, by compute dtype.

Values are drawn, which changes neither time nor memory. CPU seconds of one thread; products are the share of the matrix
products in them, by torch's profiler. Deviations are of weights of two and more axes, from float32, relative.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from ghn_service.graph.onnx.reader import read_onnx
from ghn_service.graph.op_types import OP_TYPE_NAMES
from ghn_service.hypernetwork.checkpoint import save_checkpoint
from ghn_service.hypernetwork.config import GHNConfig
from ghn_service.hypernetwork.ghn import GraphHyperNetwork
from ghn_service.predictor import Predictor
from tests.zoo_support import build_torchvision, export

PRODUCTS = ("aten::addmm", "aten::mm", "aten::bmm", "aten::baddbmm")
SIZES = {"t": (64, 3, 8), "s": (128, 5, 16), "l": (256, 12, 16), "xl": (384, 24, 16)}


def main() -> None:
    """Prints a table with a row for each compute dtype."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="xl")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module, example = build_torchvision("resnet50")
    graph = read_onnx(export(module, example, "dynamo-train"))
    channels, layers, heads = SIZES[options.size]
    config = GHNConfig(
        hidden_channels=channels,
        num_layers=layers,
        num_heads=heads,
        max_shape=(channels, channels, 16, 16),
        op_types=OP_TYPE_NAMES[:15],
    )
    exact = None
    print("| compute dtype | memory, MiB | prediction, s | products | deviation: median | largest |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "drawn.safetensors"
        save_checkpoint(GraphHyperNetwork(config), path)
        for dtype in ("float32", "bfloat16"):
            before = _own_memory()
            predictor = Predictor.from_checkpoint(path, device="cpu", compute_dtype=dtype)
            memory, seconds = _own_memory() - before, []
            for _ in range(1 + options.repeats):
                start = time.process_time()
                found = predictor.predict(graph)
                seconds.append(time.process_time() - start)
            with torch.profiler.profile() as profile:
                predictor.predict(graph)
            events = profile.events() or ()
            products = sum(event.self_cpu_time_total for event in events if event.name in PRODUCTS)
            products /= sum(event.self_cpu_time_total for event in events)
            exact = exact or {name: value.clone() for name, value in found.items() if value.dim() > 1}
            off = [float((found[name] - value).norm() / value.norm()) for name, value in exact.items()]
            print(
                f"| {dtype} | {memory:,.0f} | {statistics.median(seconds[1:]):.2f} | {products:.0%} "
                f"| {statistics.median(off):.1e} | {max(off):.1e} |",
                flush=True,
            )
            del predictor, found


def _own_memory() -> float:
    """MiB of this process that are no pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


if __name__ == "__main__":
    main()
