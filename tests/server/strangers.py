"""Clients that nobody wants: what they send, hold, tear off and never read."""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.server.fake_predictor import predict_request
from tests.server.patience import PATIENCE_S

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def frame(kind: int, payload: bytes = b"", *, flags: int = 0, stream: int = 0) -> bytes:
    """An HTTP/2 frame (RFC 9113, section 4.1)."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


SETTINGS = frame(4)
# :method POST and :scheme http from the static table, a literal :path; no content type: not yet a gRPC call.
CALL = b"\x83\x86" + b"\x04\x1c" + b"/ghn.v1.GhnService/ListModel"
RAPID_RESET = b"".join(
    frame(1, CALL, flags=4, stream=number) + frame(3, bytes(4), stream=number) for number in range(1, 2001, 2)
)
NOISE = {
    "nothing": b"",
    "HTTP/1.1": b"GET / HTTP/1.1\r\nHost: ghn\r\n\r\n",
    "garbage": bytes(range(256)) * 64,
    "half a preface": PREFACE[:9],
    "preface alone": PREFACE,
    "TLS hello": b"\x16\x03\x01\x00\xc4\x01\x00\x00\xc0\x03\x03" + bytes(190),
    "settings flood": PREFACE + SETTINGS * 5000,
    "ping flood": PREFACE + SETTINGS + frame(6, bytes(8)) * 5000,
    "empty data flood": PREFACE + SETTINGS + frame(0, stream=1) * 5000,
    "rapid reset": PREFACE + SETTINGS + RAPID_RESET,
    "endless headers": PREFACE
    + SETTINGS
    + frame(1, CALL, stream=1)
    + frame(9, b"\x40\x01a\x01b" * 3000, stream=1) * 20,
    "frame over the limit": PREFACE + SETTINGS + b"\xff\xff\xff\x00\x00\x00\x00\x00\x01",
    "window overflow": PREFACE + SETTINGS + frame(8, b"\x7f\xff\xff\xff") * 2,
    "half a call": PREFACE + SETTINGS + frame(1, CALL, flags=4, stream=1) + frame(0, b"\0\xff", stream=1),
}
"""What a connection says before it falls silent."""


def say(address: str, data: bytes) -> socket.socket:
    """A connection that has said this, as far as the server takes it."""
    host, _, port = address.rpartition(":")
    connection = socket.create_connection((host, int(port)), PATIENCE_S)
    with suppress(OSError):
        connection.sendall(data)
    return connection


def tear_off(connection: socket.socket) -> None:
    """Ends a connection with RST instead of FIN."""
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def hold_reflection(channel: grpc.Channel) -> grpc.Call:
    """A reflection stream that asks one thing and then nothing more."""

    def ask_and_wait() -> Iterator[reflection_pb2.ServerReflectionRequest]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")
        ended.wait(PATIENCE_S)

    ended = threading.Event()
    call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(ask_and_wait())
    call.add_callback(ended.set)
    return call


def hold_watch(channel: grpc.Channel) -> grpc.Call:
    """A subscription to the server's health."""
    return health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())


def is_healthy(address: str) -> bool:
    """What a probe finds, on a connection of its own."""
    with grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


READ_FOREVER = """
import sys, time
import grpc
request = sys.stdin.buffer.read()
with grpc.insecure_channel(sys.argv[1]) as channel:
    while True:
        try:
            for message in channel.unary_stream("/ghn.v1.GhnService/PredictWeights")(request):
                if len(message) > 1000:
                    print("reading", flush=True)
                    time.sleep(1000)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise
        time.sleep(0.2)
"""
"""A client of a few lines: it stops in the middle of a stream; told that the server is busy, it asks again."""


@contextmanager
def reading_process(address: str, onnx_model: bytes) -> Iterator[subprocess.Popen[bytes]]:
    """A client in a process of its own, in the middle of a stream when the body begins; it is killed."""
    command = [sys.executable, "-c", READ_FOREVER, address]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(predict_request(onnx_model).SerializeToString())
        process.stdin.close()
        assert process.stdout.readline() == b"reading\n", "the client did not get a chunk"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
