"""Equal requests share one prediction: those that come while it is made follow it, later ones get the kept reply.

A reply depends on the architecture, the names of its tensors, the hypernetwork and the options, and on nothing else, so
a kept one has the bytes of a new one.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass

from cachetools import LRUCache

from ghn_service.graph.architecture import ArchitectureGraph
from ghn_service.predictor import PredictionOptions
from ghn_service.server.admission import SERVER, Budget, Holding, Request
from ghn_service.server.models import LoadedModel
from ghn_service.server.queue import Job, JobState, StageCallback, WorkQueue
from ghn_service.server.reply import Reply

MAX_KNOWN_FILES = 1024

MakeReply = Callable[[int, StageCallback], Reply]
"""Work of a job."""


def file_key(data: bytes, model: LoadedModel, options: PredictionOptions, source: str) -> str:
    """Of a request before its file is read: equal keys, equal replies. ``source`` says what it takes from where."""
    return _digest(data, model, repr(options), source)


def reply_key(graph: ArchitectureGraph, model: LoadedModel, options: PredictionOptions) -> str:
    """Of a request without a source, whatever its file says beyond the architecture and the names of its tensors.

    What a source gives depends on the whole file, such as the epsilon of a BatchNorm: there the file's key is the key.
    """
    nodes = [
        (
            *(node.op_type, node.weight, node.norm_bias, node.kernel_shape, node.is_head, node.layer),
            node.layer.attention if node.layer else None,  # which a layer's repr leaves out
        )
        for node in graph.nodes
    ]
    rest = (graph.edges, graph.other_parameters, graph.buffers, graph.warnings, graph.unknown_operators)
    return _digest(repr((nodes, rest)).encode(), model, repr(options))


def _digest(content: bytes, model: LoadedModel, *more: str) -> str:
    parts = hashlib.sha256(content).hexdigest(), model.name, model.summary.digest, *more
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()


@dataclass(eq=False, slots=True)
class Shared:
    """A prediction that is made or was made, and its memory, which the peer holds that began to follow it."""

    key: str
    job: Job[Reply]
    holding: Holding


class SharedReplies:
    """Predictions that are being made, and the last replies.

    Args:
        work_queue: Where predictions wait.
        memory: Where they hold memory; replies are let go of when it is needed.
        cache_bytes: Bytes of the replies that are kept; 0 for none.

    Attributes:
        num_hits: Requests that were answered by a kept reply.
        num_followed: Requests that followed another one's prediction.
        num_misses: Requests that were predicted.
    """

    def __init__(self, work_queue: WorkQueue, memory: Budget, cache_bytes: int) -> None:
        self.num_hits = self.num_followed = self.num_misses = 0
        self._queue = work_queue
        self._memory = memory
        self._made: dict[str, Shared] = {}
        self._kept: LRUCache[str, Shared] = LRUCache(cache_bytes, getsizeof=lambda item: item.job.result().memory_bytes)
        self._keys: LRUCache[str, str] = LRUCache(MAX_KNOWN_FILES)
        self._lock = threading.RLock()
        memory.make_room = self._make_room

    @property
    def kept_bytes(self) -> int:
        """Memory of the kept replies."""
        return int(self._kept.currsize)

    def find(self, file: str, request: Request) -> Shared | None:
        """The prediction for a file that was read before, followed from now on; None if there is none any more."""
        with self._lock:
            return self._join(self._keys.get(file, ""), request)

    def find_or_start(self, file: str, key: str, request: Request, num_bytes: int, make: MakeReply) -> Shared:
        """The prediction of this key, followed from now on; a new one if there is none.

        Args:
            file: Of ``file_key``.
            key: Of ``reply_key``; with a source, of ``file_key`` too.
            request: Who asks.
            num_bytes: Memory that a new prediction takes at most.
            make: Work of a new one.

        Raises:
            LimitExceededError: A new one would not fit into the whole memory.
            OverloadedError: It does not fit now, or too many wait.
            UnavailableError: The server is stopping.
        """
        with self._lock:
            self._keys[file] = key
            found = self._join(key, request)
            if found is not None:
                return found
            holding = self._memory.hold(num_bytes, request.peer, own=request.message_bytes)

            def make_and_account(device_index: int, on_stage: StageCallback) -> Reply:
                try:
                    reply = make(device_index, on_stage)
                except BaseException:
                    holding.shrink(0)
                    raise
                holding.shrink(reply.memory_bytes)
                weakref.finalize(reply, holding.shrink, 0)
                return reply

            try:
                shared = Shared(key, self._queue.submit(make_and_account), holding)
            except BaseException:
                holding.shrink(0)
                raise
            self._made[key] = shared
            self.num_misses += 1
            return shared

    def leave(self, shared: Shared) -> None:
        """A request follows no longer; what was made is kept for the next one."""
        job, key = shared.job, shared.key
        with self._lock:
            self._queue.leave(job)
            if not job.num_followers:
                shared.holding.move(SERVER)
            if self._made.get(key) is shared and (job.state is JobState.ENDED or not job.num_followers):
                del self._made[key]
                has_reply = job.state is JobState.ENDED and not job.has_failed
                if has_reply and job.result().memory_bytes <= self._kept.maxsize:
                    self._kept[key] = shared
            if job.has_failed:
                shared.holding.shrink(0)  # what was never run held its memory until now

    def _join(self, key: str, request: Request) -> Shared | None:
        for items in (self._made, self._kept):
            shared = items.get(key)
            if shared is not None and self._queue.join(shared.job):
                if shared.job.num_followers == 1:
                    shared.holding.move(request.peer)
                self.num_hits += items is self._kept
                self.num_followed += items is self._made
                return shared
        return None

    def _make_room(self, missing: int) -> None:
        """Lets go of the replies that were not asked for the longest."""
        with self._lock:
            while missing > 0 and self._kept:
                missing -= self._kept.popitem()[1].job.result().memory_bytes
