"""Ways from a torch module to an ONNX structure with exact names: CPU seconds of each, and whether it keeps the names.

Run with ``python -m benchmarks.export_ways [MODEL ...]``; one thread, after one warm-up on another network. *First* is
what our export takes without the warm-up, in a process of its own: it includes torch's and onnxscript's set-up.
"""

from __future__ import annotations

import io
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import onnx
import torch
from torch import nn

from ghn_client import export_architecture
from tests.zoo_support import build_torchvision

MODELS = ("resnet50", "vit_b_16", "convnext_tiny", "efficientnet_b0", "swin_t")
WARM_UP = "resnet18"
HEADER = "| network | torch.export alone | ours | ratio | ours, first | torch.onnx, dynamo | torch.onnx, torchscript |"
RULE = "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"


def seconds(action: Callable[[], object], repeats: int = 3) -> float:
    """The least CPU seconds of a few runs."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        action()
        times.append(time.process_time() - start)
    return min(times)


def by_dynamo(module: nn.Module, example: torch.Tensor) -> object:
    """Torch's newer exporter, the way that keeps names."""
    return torch.onnx.export(module, (example,), dynamo=True, optimize=False, verbose=False)


def by_torchscript(module: nn.Module, example: torch.Tensor) -> onnx.ModelProto:
    """Torch's older exporter, the way that keeps names; it needs a module with memory."""
    buffer = io.BytesIO()
    torch.onnx.export(
        module,
        (example,),
        buffer,  # type: ignore[arg-type]
        dynamo=False,
        export_params=False,
        do_constant_folding=False,
        training=torch.onnx.TrainingMode.PRESERVE,
    )
    return onnx.load_model_from_string(buffer.getvalue())


def measure(name: str) -> str:
    """One row of the table."""
    module, example = build_torchvision(name)
    module.train()
    alone = seconds(lambda: torch.export.export(module, (example,), strict=False))
    ours = seconds(lambda: export_architecture(module, example))
    dynamo = seconds(lambda: by_dynamo(module, example), repeats=1)
    torchscript = seconds(lambda: by_torchscript(module, example), repeats=1)
    first = first_seconds(name)
    return (
        f"| {name} | {alone:.2f} | {ours:.2f} | {ours / alone:.2f} | {first:.2f} | {dynamo:.2f} | {torchscript:.2f} |"
    )


def first_seconds(name: str) -> float:
    """CPU seconds of our first export in a new process, imports of torch and torchvision not counted."""
    code = (
        "import time, torch, ghn_client.export; torch.set_num_threads(1)\n"
        "from tests.zoo_support import build_torchvision\n"
        f"module, example = build_torchvision({name!r})\n"
        "start = time.process_time(); ghn_client.export.export_architecture(module, example)\n"
        "print(time.process_time() - start)\n"
    )
    finished = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    return float(finished.stdout.split()[-1])


def main(models: tuple[str, ...] = MODELS) -> None:
    """Prints the table."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    module, example = build_torchvision(WARM_UP)
    for action in (export_architecture, by_dynamo, by_torchscript):
        action(module, example)
    print(HEADER)
    print(RULE)
    for name in models:
        print(measure(name), flush=True)


if __name__ == "__main__":
    main(tuple(sys.argv[1:]) or MODELS)
