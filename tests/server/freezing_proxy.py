"""A TCP connection that stands still on demand, as when a cable is pulled: nothing arrives, and nobody is told."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class FreezingProxy:
    """Passes bytes on to a server until it is frozen.

    Args:
        target: ``host:port`` of the server.

    Attributes:
        address: Where clients dial instead.
    """

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = [self._listener]
        self._frozen = threading.Event()
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def freeze(self) -> None:
        """From now on nothing passes."""
        self._frozen.set()

    def close(self) -> None:
        """Ends every connection."""
        for item in self._sockets:
            with suppress(OSError):
                item.shutdown(socket.SHUT_RDWR)
            item.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                self._sockets += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=(source, sink), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if not self._frozen.is_set():
                    sink.sendall(data)


@contextmanager
def freezing_proxy(target: str) -> Iterator[FreezingProxy]:
    """A proxy that is closed when the body ends."""
    proxy = FreezingProxy(target)
    try:
        yield proxy
    finally:
        proxy.close()
