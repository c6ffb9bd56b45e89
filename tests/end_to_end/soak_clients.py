"""Ten thousand mixed requests: what the clients of the endurance test do, and what they count. Runs in processes."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ghn_client import GHNClient
from ghn_client.wire import ghn_pb2_grpc
from tests.fuzzing.models import build_network, mutate
from tests.server.fake_predictor import predict_request
from tests.server.small_models import LARGE, TINY, linear_model
from tests.server.strangers import NOISE, hold_reflection, hold_watch, say, tear_off

Code = grpc.StatusCode
MODELS = {"tiny": TINY, "small": linear_model(64, 128, 64, 10), "middle": linear_model(512, 512, 100), "large": LARGE}
GOOD = [
    (name, seed, dtype) for name in ("tiny", "small", "middle") for seed in range(4) for dtype in ("float32", "float16")
]
GOOD.append(("large", 0, "float16"))
REFUSALS = {Code.INVALID_ARGUMENT, Code.UNIMPLEMENTED, Code.RESOURCE_EXHAUSTED, Code.OK}
ENDS = {Code.OK, Code.CANCELLED, Code.DEADLINE_EXCEEDED, Code.RESOURCE_EXHAUSTED}
TIMEOUT_S = 120.0
NUM_THREADS = 4


def digest(buffer: object) -> str:
    """What two replies are compared by."""
    return hashlib.sha256(buffer).hexdigest()  # type: ignore[arg-type]


@dataclass
class Share:
    """A process's part of the work.

    Attributes:
        address: The server.
        seed: Decides the mixture.
        expected: Digest of the right reply to each of ``GOOD``.
        counts: How often each kind of request was made.
        faults: What went wrong; sentences.
    """

    address: str
    seed: int
    expected: dict[tuple[str, int, str], str]
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._seeds = random.Random(self.seed)

    def run(self, count: int) -> None:
        """Makes that many requests from a few threads."""
        seeds = [self._seeds.getrandbits(32) for _ in range(NUM_THREADS)]  # other ones in every round
        threads = [threading.Thread(target=self._run_thread, args=(count // NUM_THREADS, seed)) for seed in seeds]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _run_thread(self, count: int, seed: int) -> None:
        choose = random.Random(seed)
        kinds = [kind for kind, weight in KINDS.items() for _ in range(weight)]
        with GHNClient(self.address, max_attempts=60) as client, grpc.insecure_channel(self.address) as channel:
            for _ in range(count):
                kind = choose.choice(kinds)
                self.counts[kind.__name__] += 1
                try:
                    kind(self, choose, client, channel)
                except Exception as error:
                    self.faults.append(f"{kind.__name__}: {error!r}"[:300])

    def allow(self, stream: grpc.Call, codes: set[grpc.StatusCode], *, events: int = 10**9) -> None:
        """Reads so many events; how the call ends must be among ``codes``."""
        try:
            for number, _ in enumerate(stream):
                if number >= events:
                    stream.cancel()
        except grpc.RpcError as error:
            if error.code() not in codes:
                self.faults.append(f"{error.code()}: {error.details()}"[:300])


def good(share: Share, choose: random.Random, client: GHNClient, channel: grpc.Channel) -> None:
    key = choose.choice(GOOD[:-1]) if choose.random() < 0.97 else GOOD[-1]
    name, seed, dtype = key
    prediction = client.predict(MODELS[name], seed=seed, dtype=dtype, timeout_s=TIMEOUT_S)
    if digest(prediction.buffer) != share.expected[key]:
        share.faults.append(f"wrong bytes for {key}")


def question(share: Share, choose: random.Random, client: GHNClient, channel: grpc.Channel) -> None:
    choose.choice((client.models, client.server_info, client.health, lambda: client.analyze(TINY)))()


def bad(share: Share, choose: random.Random, client: GHNClient, channel: grpc.Channel) -> None:
    proto = build_network(choose)
    mutate(proto, choose, 3)
    data = choose.choice((proto.SerializeToString(), choose.randbytes(200), TINY[:90]))
    options = choose.choice(({}, {}, {"dtype": 99}, {"model": "x"}, {"include": ["\n\x1b[31m"]}, {"request_id": "\n"}))
    stub = ghn_pb2_grpc.GhnServiceStub(channel)
    share.allow(stub.PredictWeights(predict_request(data, **options), timeout=TIMEOUT_S), {*REFUSALS, Code.NOT_FOUND})


def cancelled(share: Share, choose: random.Random, client: GHNClient, channel: grpc.Channel) -> None:
    stream = ghn_pb2_grpc.GhnServiceStub(channel).PredictWeights(
        predict_request(choose.choice((TINY, LARGE)), seed=choose.randrange(4)), timeout=TIMEOUT_S
    )
    share.allow(stream, ENDS, events=choose.randrange(8))


def hurried(share: Share, choose: random.Random, client: GHNClient, channel: grpc.Channel) -> None:
    stream = ghn_pb2_grpc.GhnServiceStub(channel).PredictWeights(
        predict_request(choose.choice((TINY, LARGE)), seed=choose.randrange(4)),
        timeout=choose.choice((1e-4, 0.001, 0.02)),
    )
    share.allow(stream, ENDS)


def dripping(share: Share, choose: random.Random, client: GHNClient, channel: grpc.Channel) -> None:
    """Reads a stream slowly, on a connection of its own, and loses interest."""
    with grpc.insecure_channel(share.address, options=[("grpc.use_local_subchannel_pool", 1)]) as own:
        stream = ghn_pb2_grpc.GhnServiceStub(own).PredictWeights(predict_request(LARGE), timeout=5)
        try:
            for _ in range(5):
                next(stream)
                time.sleep(0.2)
        except (grpc.RpcError, StopIteration):
            return
        stream.cancel()


def holding(share: Share, choose: random.Random, client: GHNClient, channel: grpc.Channel) -> None:
    """Keeps side calls open for a while, together with a connection that says nothing."""
    with grpc.insecure_channel(share.address, options=[("grpc.use_local_subchannel_pool", 1)]) as own:
        held = [choose.choice((hold_reflection, hold_watch))(own) for _ in range(10)]
        silent = say(share.address, choose.choice(list(NOISE.values())))
        time.sleep(0.5)
        for call in held:
            call.cancel()
        tear_off(silent)


def noise(share: Share, choose: random.Random, client: GHNClient, channel: grpc.Channel) -> None:
    tear_off(say(share.address, choose.choice(list(NOISE.values()))))


KINDS = {good: 620, question: 120, bad: 100, cancelled: 80, hurried: 50, dripping: 2, holding: 3, noise: 25}
"""Kinds of requests, and how many of a thousand are of each."""


def run_share(pipe: Connection, share: Share) -> None:
    """Serves a process: does as many requests as it is told, and answers with counts and faults."""
    while count := pipe.recv():
        share.run(count)
        pipe.send((share.counts, share.faults))
        share.counts, share.faults = Counter(), []


def run_probe(pipe: Connection, address: str) -> None:
    """Serves a process: asks for the health 50 times a second until it is told to stop, and answers with seconds."""
    pipe.recv()
    seconds = []
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while not pipe.poll(0.02):
            start = time.perf_counter()
            try:
                stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
            except grpc.RpcError as error:
                seconds.append(float("inf") if error.code() is not None else 0.0)
            else:
                seconds.append(time.perf_counter() - start)
    pipe.send(seconds)
