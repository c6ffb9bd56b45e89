"""The servers that the serving benchmark measures, each in a process of its own with one thread."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import torch

from ghn_service.server.app import start_server
from ghn_service.server.settings import Settings

CHUNK_BYTES = 2**20
RAW_METHOD = "/raw.Raw/Stream"

_SPAWN = multiprocessing.get_context("spawn")


@contextmanager
def running(target: Any, *arguments: Any) -> Iterator[tuple[str, int]]:
    """Runs ``target(pipe, *arguments)`` in a new process; yields the address it sent, and its process id."""
    ours, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=target, args=(theirs, *arguments), daemon=True)
    process.start()
    try:
        yield ours.recv(), int(process.pid or 0)
    finally:
        ours.send("stop")
        process.join(10)
        if process.is_alive():
            process.kill()


def serve_hypernetwork(pipe: Connection, checkpoint: Path, values: Mapping[str, Any] | None = None) -> None:
    """ghn-service on a free port, with these settings."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    fixed = {"port": 0, "checkpoints": (f"benchmark={checkpoint}",), "device": ("cpu",), "log_level": "ERROR"}
    settings = Settings(**{**fixed, **(values or {})})
    with start_server(settings) as server:
        server.wait_ready(60)
        pipe.send(server.address)
        pipe.recv()


def serve_raw_bytes(pipe: Connection) -> None:
    """A server that does nothing but stream bytes: the limit of gRPC itself, without protobuf.

    The request is the number of bytes wanted, as decimal text.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    chunk = bytes(range(256)) * (CHUNK_BYTES // 256)

    def stream(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        remaining = int(request)
        while remaining > 0:
            yield chunk if remaining >= CHUNK_BYTES else chunk[:remaining]
            remaining -= CHUNK_BYTES

    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_stream_rpc_method_handler(stream)
    server = grpc.server(ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("raw.Raw", {"Stream": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    pipe.send(f"127.0.0.1:{port}")
    pipe.recv()
    server.stop(None)


def receive_raw_bytes(
    channel: grpc.Channel, num_bytes: int, allocate: Callable[[int], bytearray | memoryview] = bytearray
) -> memoryview:
    """Receives that many bytes from ``serve_raw_bytes`` into one buffer.

    Args:
        channel: To that server.
        num_bytes: How many bytes.
        allocate: Makes the buffer: a bytearray as anybody would take, or ``allocate_buffer`` as our client does.
    """
    view = memoryview(allocate(num_bytes))
    position = 0
    method: grpc.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(RAW_METHOD)
    for chunk in method(str(num_bytes).encode()):
        view[position : position + len(chunk)] = chunk
        position += len(chunk)
    if position != num_bytes:
        raise RuntimeError(f"expected {num_bytes} bytes, received {position}")
    return view
