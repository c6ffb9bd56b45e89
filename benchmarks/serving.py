"""Speed and memory of serving: from ONNX bytes to weights in the client, beside what no server could beat.

``python -m benchmarks.serving`` prints three tables for public networks and an untrained GHN of the published T size
(6.9M parameters), everything on one thread:

1. *server*: seconds to read, encode and decode, beside a plain copy of the same number of bytes into fresh memory.
2. *client*: seconds of a whole call and of its stream (as the server measures it: from the first chunk to the last),
   beside a raw gRPC stream of as many bytes in chunks of the same size, which carries nothing and
   checks nothing, once into a bytearray and once (*bare*) into a buffer of our client's kind, in
   huge pages; and how far memory grows on both sides.
3. *export*: CPU seconds from a module to its structure, beside ``torch.export`` alone, and seconds to loaded weights.

Every figure is the median of ``--repeats`` calls after one uncounted; rival and subject alternate in the same process,
and their ratio is the median of the pairs' ratios. Before each of them, as much memory is touched and freed as
it needs: a virtual machine may have given free pages back to its host, and then takes up to ten times as long for the
first use of a page as for all that is measured. Before each export, garbage is collected, for the same reason.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import torch

from benchmarks.measure import MIB, PeakMemory, median_seconds, paired_cpu_seconds, timed, warm_memory
from benchmarks.processes import receive_raw_bytes, running, serve_hypernetwork, serve_raw_bytes
from ghn_client import GHNClient, export_architecture
from ghn_client.huge_pages import allocate_buffer
from ghn_service.hypernetwork.checkpoint import save_checkpoint
from ghn_service.hypernetwork.config import GHNConfig
from ghn_service.hypernetwork.ghn import GraphHyperNetwork
from ghn_service.predictor import Predictor
from ghn_service.training.evaluation.report import markdown_table
from tests.zoo_support import build_torchvision

MODELS = ("resnet50", "vit_b_16", "convnext_tiny", "efficientnet_b0", "swin_t")
EXPORT_REPEATS = 5
#: Channels, layers and heads of the published sizes of GHN-3.
_SIZES = {"T": (64, 3, 8), "S": (128, 5, 16), "L": (256, 12, 16), "XL": (384, 24, 16)}
PUBLISHED = {
    size: GHNConfig(hidden_channels=width, num_layers=layers, num_heads=heads, max_shape=(width, width, 16, 16))
    for size, (width, layers, heads) in _SIZES.items()
}

Row = dict[str, Any]
"""Figures of one network by name; seconds (``_s``), bytes (``_bytes``), MiB (``_mib``) and shares."""


def save_untrained(folder: str | Path, config: GHNConfig = PUBLISHED["T"], *, dtype: torch.dtype | None = None) -> Path:
    """Writes an untrained hypernetwork, whose values change neither time nor memory."""
    path = Path(folder) / "benchmark.safetensors"
    save_checkpoint(GraphHyperNetwork(config, generator=torch.Generator().manual_seed(0)).to(dtype=dtype), path)
    return path


def measure_server(predictor: Predictor, onnx_bytes: bytes, repeats: int) -> Row:
    """Median seconds by stage, and of a plain copy of as many bytes."""
    runs, copies, num_bytes = [], [], 0
    for _ in range(repeats + 1):
        warm_memory(num_bytes)
        result = predictor.run(onnx_bytes)
        num_bytes = result.parameters.num_bytes
        runs.append(result.seconds)
        del result
        warm_memory(2 * num_bytes)
        source = torch.ones(num_bytes, dtype=torch.uint8)
        copies.append(timed(source.clone)[0])
        del source
    stages = {f"{name}_s": statistics.median(run[name] for run in runs[1:]) for name in runs[0]}
    total_s, copy_s = stages["reading_s"] + stages["encoding_s"] + stages["decoding_s"], statistics.median(copies[1:])
    sizes = {"weight_bytes": num_bytes, "weight_mib": num_bytes / MIB}
    return {**stages, **sizes, "total_s": total_s, "copy_s": copy_s, "total_per_copy": total_s / copy_s}


def measure_client(address: str, raw_address: str, server_pid: int, onnx_bytes: bytes, repeats: int) -> Row:
    """Calls and raw streams in turns: median seconds, shares pair by pair, and the most that memory grew."""
    calls, streams, raws, bares = [], [], [], []
    server_growth, client_growth = [], []
    num_bytes = 0
    server_memory, client_memory = PeakMemory(server_pid), PeakMemory()
    with GHNClient(address) as client, grpc.insecure_channel(raw_address) as raw_channel:
        for _ in range(repeats + 1):
            warm_memory(2 * num_bytes)  # the server takes as much
            server_memory.reset()
            client_memory.reset()
            seconds, prediction = timed(lambda: client.predict(onnx_bytes))
            server_growth.append(server_memory.grown_bytes())
            client_growth.append(client_memory.grown_bytes())
            calls.append(seconds)
            streams.append(prediction.seconds["streaming"])
            num_bytes = len(prediction.buffer)
            del prediction
            warm_memory(num_bytes)
            raws.append(timed(partial(receive_raw_bytes, raw_channel, num_bytes))[0])
            warm_memory(num_bytes)
            bares.append(timed(partial(receive_raw_bytes, raw_channel, num_bytes, allocate_buffer))[0])
    return {
        "call_s": statistics.median(calls[1:]),
        "stream_s": statistics.median(streams[1:]),
        "raw_stream_s": statistics.median(raws[1:]),
        "raw_share": _median_share(raws[1:], streams[1:]),
        "bare_stream_s": statistics.median(bares[1:]),
        "bare_share": _median_share(bares[1:], streams[1:]),
        "server_growth_bytes": max(server_growth[1:]),
        "client_growth_bytes": max(client_growth[1:]),
    }


def _median_share(limits: Sequence[float], streams: Sequence[float]) -> float:
    return statistics.median(limit / stream for limit, stream in zip(limits, streams, strict=True))


def measure_export(model: str, address: str, weight_bytes: int, repeats: int) -> Row:
    """Median CPU seconds of ``torch.export`` alone and of our export; seconds from module to loaded weights."""
    module, example = build_torchvision(model)
    module.train()

    def export_only() -> object:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(module, (example,), strict=False)

    export_s, ours_s = paired_cpu_seconds(export_only, lambda: export_architecture(module, example), repeats)
    with GHNClient(address) as client:
        load = lambda: client.predict(module, example).load_into(module)  # noqa: E731
        loaded_s = median_seconds(load, repeats, prepare=lambda: warm_memory(2 * weight_bytes))
    ratio = ours_s / export_s
    return {"torch_export_s": export_s, "export_s": ours_s, "export_ratio": ratio, "module_to_weights_s": loaded_s}


def measure(model: str, predictor: Predictor, address: str, raw_address: str, server_pid: int, repeats: int) -> Row:
    """All figures of one network."""
    module, example = build_torchvision(model)
    onnx_bytes = export_architecture(module, example)
    del module
    server = measure_server(predictor, onnx_bytes, repeats)
    client = measure_client(address, raw_address, server_pid, onnx_bytes, repeats)
    weight_bytes = server["weight_bytes"]
    exports = measure_export(model, address, weight_bytes, min(repeats, EXPORT_REPEATS))
    client["server_growth_mib"] = (client["server_growth_bytes"] - weight_bytes) / MIB
    client["client_growth_share"] = client["client_growth_bytes"] / weight_bytes
    return {"model": model, **server, **client, **exports}


#: Title of each table, and its columns as they are filled with the figures of a network.
TABLES = {
    "Server, seconds from ONNX bytes to weights": {
        "network": "{model}",
        "MiB": "{weight_mib:.0f}",
        "read": "{reading_s:.4f}",
        "encode": "{encoding_s:.4f}",
        "decode": "{decoding_s:.4f}",
        "total": "{total_s:.4f}",
        "plain copy": "{copy_s:.4f}",
        "total / copy": "{total_per_copy:.1f}",
    },
    "Client, seconds of a call; memory beyond what was resident before": {
        "network": "{model}",
        "call": "{call_s:.3f}",
        "stream": "{stream_s:.3f}",
        "raw": "{raw_stream_s:.3f}",
        "raw / stream": "{raw_share:.0%}",
        "bare": "{bare_stream_s:.3f}",
        "bare / stream": "{bare_share:.0%}",
        "server, MiB": "{server_growth_mib:.0f}",
        "client": "{client_growth_share:.2f}",
    },
    "Export, CPU seconds; seconds to loaded weights": {
        "network": "{model}",
        "torch.export alone": "{torch_export_s:.2f}",
        "export_architecture": "{export_s:.2f}",
        "ratio": "{export_ratio:.2f}",
        "module to loaded weights": "{module_to_weights_s:.2f}",
    },
}


def report(rows: Sequence[Row]) -> None:
    """Prints the tables."""
    for title, columns in TABLES.items():
        print(f"\n{title}:\n")
        print(
            "\n".join(
                markdown_table(list(columns), [[text.format(**row) for text in columns.values()] for row in rows])
            )
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(MODELS), help="torchvision classifiers")
    parser.add_argument("--repeats", type=int, default=5, help="counted calls")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = save_untrained(folder)
        predictor = Predictor.from_checkpoint(checkpoint, device="cpu")
        with (
            running(serve_hypernetwork, checkpoint) as (address, server_pid),
            running(serve_raw_bytes) as (raw_address, _),
        ):
            rows = [
                measure(model, predictor, address, raw_address, server_pid, options.repeats) for model in options.models
            ]
    report(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
