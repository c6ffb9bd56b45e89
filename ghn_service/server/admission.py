"""Who may hold how much: places for calls, and memory, together and for one peer; and how much memory there is.

Every kind of call has its places, fewer together than the server has threads, so that no kind starves another. Memory
is one budget: reading, predictions, the replies on their way and those that are kept all hold parts of it, and what is
held is known before it is taken. Only of a request that arrives nobody knows how much comes, so few do at once.
"""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from ghn_client.wire.codec import SERVICE
from ghn_service.errors import (
    DeadlineExceededError,
    InvalidOptionError,
    LimitExceededError,
    OverloadedError,
    RequestCancelledError,
    UnavailableError,
)
from ghn_service.server.access import peer_identity
from ghn_service.server.watchdog import Watchdog

SERVER = ""
"""Holds what belongs to no peer: replies that are kept."""
POLL_S = 0.05
ARRIVALS = 16
"""Requests of a kind that arrive at once; the others wait. What gRPC has received of them is in no budget of memory."""
MEBIBYTE = 2**20


class Budget:
    """An amount of something that peers hold parts of.

    Args:
        what: What it is an amount of, for messages.
        total: The most that is held at once.
        peer_share: Fraction of it that one peer may hold; who holds nothing else may take any part.
        make_room: Called with an amount that is missing; lets go of what nobody needs.
    """

    def __init__(
        self, what: str, total: int, peer_share: float, *, make_room: Callable[[int], None] = lambda missing: None
    ) -> None:
        self.what = what
        self.total = total
        self.peer_share = peer_share
        self.make_room = make_room
        self._used = 0
        self._by_peer: defaultdict[str, int] = defaultdict(int)
        self._returned: deque[tuple[str, int]] = deque()
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        """What is held now."""
        with self._lock:
            self._settle()
            return self._used

    def hold(self, amount: int, peer: str, *, own: int = 0) -> Holding:
        """Takes a part, until it is released; ``own`` is what the same request holds already.

        Raises:
            LimitExceededError: The whole budget would not do.
            OverloadedError: Too much is held now, by all or by this peer.
        """
        if own + amount > self.total:
            raise LimitExceededError(
                f"this needs {own + amount:,} {self.what}, and this server has {self.total:,}; ask for less, such as "
                "a part of the tensors or float16"
            )
        with self._lock:
            self._settle()
            missing = self._used + amount - self.total
        if missing > 0:
            self.make_room(missing)
        with self._lock:
            self._settle()
            held = self._by_peer[peer]
            if peer != SERVER and held > own and held + amount > self.peer_share * self.total:
                raise OverloadedError(
                    f"your calls hold {held:,} {self.what}, and {amount:,} more would be over the share of one peer; "
                    "try again when some of them have ended"
                )
            if self._used + amount > self.total:
                raise OverloadedError(
                    f"this needs {amount:,} {self.what}, and {self._used:,} of {self.total:,} are taken; "
                    "try again later"
                )
            self._add(peer, amount)
        return Holding(self, peer, amount)

    def give_back(self, peer: str, amount: int) -> None:
        """Called from finalizers too, at any point of any thread, so it takes no lock."""
        self._returned.append((peer, amount))

    def _settle(self) -> None:
        while self._returned:
            peer, amount = self._returned.popleft()
            self._add(peer, -amount)

    def _add(self, peer: str, amount: int) -> None:
        self._used += amount
        self._by_peer[peer] += amount
        if not self._by_peer[peer]:
            del self._by_peer[peer]


class Holding:
    """A part of a budget; a context manager that releases it."""

    def __init__(self, budget: Budget, peer: str, amount: int) -> None:
        self._budget = budget
        self._peer = peer
        self._amount = amount

    def __enter__(self) -> Holding:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.shrink(0)

    def shrink(self, amount: int) -> None:
        """Keeps ``amount`` of it, or all if that is less."""
        surplus, self._amount = max(0, self._amount - amount), min(self._amount, amount)
        if surplus:
            self._budget.give_back(self._peer, surplus)

    def move(self, peer: str) -> None:
        """Lets another peer hold it."""
        old, self._peer = self._peer, peer
        self._budget.give_back(old, self._amount)
        self._budget.give_back(peer, -self._amount)


class Request:
    """One request from its arrival to its end: until when it is wanted, and the memory that it holds.

    A context manager: leaving it releases the memory.

    Args:
        memory: Where it holds memory.
        peer: Who asks.
        deadline: ``time.monotonic()`` at which the answer is worthless.
        message_bytes: Memory that its message takes for as long.

    Raises:
        LimitExceededError: The whole budget would not hold the message.
        OverloadedError: Too much is held now.
    """

    def __init__(self, memory: Budget, peer: str, deadline: float, message_bytes: int = 0) -> None:
        self.peer = peer
        self.message_bytes = message_bytes
        self.deadline = deadline
        self.memory = memory
        self.on_cancel: Callable[[], None] = lambda: None
        self._cancelled = False
        self._holdings = ExitStack()
        self._holdings.enter_context(memory.hold(message_bytes, peer))

    def __enter__(self) -> Request:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._holdings.close()

    def cancel(self) -> None:
        """Gives the request up, from any thread."""
        self._cancelled = True
        self.on_cancel()

    def check(self) -> None:
        """Raises if the request has been given up or is out of time."""
        if self._cancelled:
            raise RequestCancelledError("the request was cancelled")
        if time.monotonic() > self.deadline:
            raise DeadlineExceededError("the request ran out of time")

    def hold(self, num_bytes: int) -> Holding:
        """Memory for this request, released with it or before; raises as ``Budget.hold`` does."""
        return self._holdings.enter_context(self.memory.hold(num_bytes, self.peer, own=self.message_bytes))


class Turns:
    """Lets a few requests at a time do what keeps Python's interpreter busy.

    Args:
        num_at_once: How many.
    """

    def __init__(self, num_at_once: int) -> None:
        self._free = threading.Semaphore(num_at_once)

    @contextmanager
    def turn(self, request: Request) -> Iterator[None]:
        """Waits for a turn as long as the request is wanted."""
        while not self._free.acquire(timeout=POLL_S):
            request.check()
        try:
            request.check()
            yield
        finally:
            self._free.release()


@dataclass(frozen=True, slots=True)
class Kind:
    """What calls of some methods may hold of the threads.

    Attributes:
        name: In messages and metrics.
        places: Calls at once; one peer may hold a share of them.
        seconds: Seconds that its request may take to come; then it is cancelled.
        is_bounded: Whether the seconds are for the whole call, which nothing else ends.
    """

    name: str
    places: int
    seconds: float
    is_bounded: bool = True


CHECK = Kind("check", 32, 10.0)
WATCH = Kind("watch", 64, 60.0)
"""A client that watches asks again; when no place is free it is told that there is no such method, and does without."""
REFLECTION = Kind("reflection", 8, 10.0)
SIDE_KINDS = (CHECK, WATCH, REFLECTION)


class Gate:
    """Gives every call a place, or none: the places of all kinds are fewer than the threads that serve them.

    Args:
        kinds: The kind of our own methods first, then ``SIDE_KINDS``.
        peer_share: Fraction of the places of a kind that one peer may hold.
        watchdog: Ends calls that take too long.
    """

    def __init__(self, kinds: tuple[Kind, ...], peer_share: float, watchdog: Watchdog) -> None:
        self.own = kinds[0]
        self._watchdog = watchdog
        self.places = {kind.name: Budget(f"places for {kind.name} calls", kind.places, peer_share) for kind in kinds}
        self.arriving = {kind.name: Budget(f"arriving {kind.name} calls", ARRIVALS, peer_share) for kind in kinds}
        self._sides: set[grpc.ServicerContext] = set()
        self._is_closed = False

    @property
    def num_places(self) -> int:
        """Places of all kinds together."""
        return sum(budget.total for budget in self.places.values())

    @property
    def is_empty(self) -> bool:
        """Whether no call holds a place."""
        return not any(budget.used for budget in self.places.values())

    def kind_of(self, method: str) -> Kind:
        """The kind of a method by its full name."""
        service, _, name = method.removeprefix("/").rpartition("/")
        if service == SERVICE:
            return self.own
        return {"Check": CHECK, "Watch": WATCH}.get(name, REFLECTION)

    @contextmanager
    def enter(self, kind: Kind, context: grpc.ServicerContext) -> Iterator[None]:
        """A place for a call while the body serves it.

        Raises:
            OverloadedError: None is free, or this peer holds its share.
            UnavailableError: The gate is closed for calls of this kind.
        """
        with ExitStack() as stack:
            stack.enter_context(self.places[kind.name].hold(1, peer_identity(context)))
            if kind.is_bounded:
                self._sides.add(context)
                stack.callback(self._sides.discard, context)
                if self._is_closed:
                    raise UnavailableError("the server is stopping; try again")
                stack.enter_context(self._watchdog.limit(context.cancel, kind.seconds))
            yield

    def receive(self, kind: Kind, messages: Iterator[Any], context: grpc.ServicerContext) -> Any:
        """The one request of a call; it stays with the client until it is among the few that may arrive.

        Raises:
            InvalidOptionError: There is none.
            RequestCancelledError: It had to wait too long, or the client went away meanwhile.
            grpc.RpcError: It did not come in time, or the client went away.
        """
        with self._watchdog.limit(context.cancel, kind.seconds), self._arrival(kind, context):
            request = next(messages, None)
        if request is None:
            raise InvalidOptionError("expected one request message, got none")
        return request

    def _arrival(self, kind: Kind, context: grpc.ServicerContext) -> Holding:
        """Waits to be among those that arrive, as long as the call lasts."""
        while context.is_active():
            try:
                return self.arriving[kind.name].hold(1, peer_identity(context))
            except OverloadedError:
                time.sleep(POLL_S)
        raise RequestCancelledError("the request was not received in time")

    def close(self) -> None:
        """Ends the calls that nothing else ends, and lets no more of them in."""
        self._is_closed = True
        for context in list(self._sides):
            context.cancel()


def default_memory_bytes(resident_bytes: int, *, root: Path = Path("/")) -> int:
    """The budget where none is chosen: three quarters of what there is, less this process and what it keeps.

    What there is: the limit of the control group (of version 2 or 1, whichever of its ancestors has the least), or the
    machine's memory.

    Args:
        resident_bytes: What the hypernetworks take.
        root: Where the file system is.
    """
    limit = min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_group_limits(root)])
    return max(limit * 3 // 4 - 512 * MEBIBYTE - resident_bytes, limit // 8)


def _group_limits(root: Path) -> Iterator[int]:
    """Limits of the control groups that this process is in; in a container they may be seen as the root."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / ("sys/fs/cgroup/memory" if controllers else "sys/fs/cgroup")
        folder = top / path.lstrip("/")
        for place in (folder, *folder.parents):
            if place.is_relative_to(top):
                try:
                    text = (place / ("memory.limit_in_bytes" if controllers else "memory.max")).read_text().strip()
                except OSError:
                    continue
                if text.isdigit():
                    yield int(text)
