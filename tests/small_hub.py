"""A hub of models on this machine, as ``huggingface_hub`` asks one (``HF_ENDPOINT``), with the ways to break."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_secret"


@dataclass
class SmallHub:
    """Files of repositories, and what went on.

    Attributes:
        files: Content by ``OWNER/REPO/FILE``.
        endpoint: Address for ``HF_ENDPOINT``.
        cut_after: Bytes after which the next answers break off, one entry each.
        damage: Whether the bytes that are sent are not those that were announced.
        private: Whether a token is needed.
        sent: Requests for content: name and first byte.
    """

    files: dict[str, bytes]
    endpoint: str = ""
    cut_after: list[int] = field(default_factory=list)
    damage: bool = False
    private: bool = False
    sent: list[tuple[str, int]] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    hub: ClassVar[SmallHub]
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, *arguments: object) -> None:
        pass

    def _answer(self, *, with_body: bool) -> None:
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path.partition("?")[0])
        if match is None:
            return self._refuse(404, "EntryNotFound")
        repo, revision, file = match.groups()
        if self.hub.private and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._refuse(401, "GatedRepo")
        if not any(name.startswith(f"{repo}/") for name in self.hub.files):
            return self._refuse(404, "RepoNotFound")
        if revision not in ("main", "v1", COMMIT):
            return self._refuse(404, "RevisionNotFound")
        content = self.hub.files.get(f"{repo}/{file}")
        if content is None:
            return self._refuse(404, "EntryNotFound")
        first = int(re.sub(r"bytes=(\d+)-.*", r"\1", self.headers.get("Range", "bytes=0-")))
        etag = hashlib.sha256(content).hexdigest()
        self.send_response(206 if first else 200)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Linked-Etag", f'"{etag}"')
        self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content) - first))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if not with_body:
            return None
        self.hub.sent.append((file, first))
        body = content[first:]
        if self.hub.damage:
            body = body[:-1] + bytes([body[-1] ^ 1])
        if self.hub.cut_after:
            body = body[: self.hub.cut_after.pop(0)]
            self.close_connection = True
        self.wfile.write(body)
        return None

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def small_hub(files: dict[str, bytes]) -> Iterator[SmallHub]:
    """A hub that runs within the context."""
    hub = SmallHub(files)
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
