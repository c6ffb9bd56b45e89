"""``python -m benchmarks.large_hypernetwork``: a GHN-3 of the published XL size predicts resnet50, by compute dtype.

Values are drawn, which changes neither time nor memory. CPU seconds of one thread; products are the share of the matrix
products in them, by torch's profiler. Deviations are of weights of two and more axes, from float32, relative.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time

import torch

from benchmarks.measure import MIB, status_bytes
from benchmarks.serving import PUBLISHED, save_untrained
from ghn_service.graph.onnx.reader import read_onnx
from ghn_service.graph.op_types import OP_TYPE_NAMES
from ghn_service.predictor import Predictor
from ghn_service.training.evaluation.report import markdown_table
from tests.zoo_support import build_torchvision, export

PRODUCTS = ("aten::addmm", "aten::mm", "aten::bmm", "aten::baddbmm")
HEADER = ["compute dtype", "memory, MiB", "prediction, s", "products", "deviation: median", "largest"]


def main() -> None:
    """Prints a table with a row for each compute dtype."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=PUBLISHED, default="XL")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module, example = build_torchvision("resnet50")
    graph = read_onnx(export(module, example, "dynamo-train"))
    config = dataclasses.replace(PUBLISHED[options.size], op_types=OP_TYPE_NAMES[:15])
    exact, rows = None, []
    with tempfile.TemporaryDirectory() as folder:
        path = save_untrained(folder, config)
        for dtype in ("float32", "bfloat16"):
            before = status_bytes("RssAnon")
            predictor = Predictor.from_checkpoint(path, device="cpu", compute_dtype=dtype)
            memory, seconds = (status_bytes("RssAnon") - before) / MIB, []
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
            times = [f"{memory:,.0f}", f"{statistics.median(seconds[1:]):.2f}", f"{products:.0%}"]
            rows.append([dtype, *times, f"{statistics.median(off):.1e}", f"{max(off):.1e}"])
            del predictor, found
    print("\n".join(markdown_table(HEADER, rows)))


if __name__ == "__main__":
    main()
