"""Who may come in: TLS whose files may be renewed, bearer tokens, and the identity of a caller.

Tokens are kept as hashes, one per line of a file: ``NAME SALT:HASH`` or ``NAME HASH``, where HASH is the sha256 of salt
and token together, in hexadecimal, and SALT is hexadecimal too. Neither a token nor a line of the file is ever logged.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
import ssl
import threading
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import grpc

from ghn_service.errors import ConfigurationError, UnauthenticatedError
from ghn_service.server.settings import Settings, usable

logger = logging.getLogger(__name__)

TOKEN_NAME: ContextVar[str] = ContextVar("token_name", default="")
"""Name of the token that the present call came with; "" for none."""
TOKEN_LINE = re.compile(r"(?P<name>[\w.@-]{1,64})\s+(?:(?P<salt>[0-9a-f]{1,128}):)?(?P<hash>[0-9a-f]{64})", re.ASCII)
TOKEN_PREFIX = "ghn_"
"""Lets scanners for leaked secrets know a token when they see one."""
AUTHORIZATION = "authorization"
SCHEME = "bearer "
MAX_TOKEN_CHARACTERS = 1024
ValueT = TypeVar("ValueT")


@dataclass(frozen=True, slots=True)
class Access:
    """How a server is entered.

    Attributes:
        credentials: TLS; None for plain text.
        tokens: Who may call; None for everyone.
    """

    credentials: grpc.ServerCredentials | None
    tokens: Tokens | None


def load_access(settings: Settings) -> Access:
    """Reads the files that the settings name.

    Raises:
        ConfigurationError: One is missing or unusable, or belongs to another that is not given.
    """
    certificate, key, client_ca = settings.tls_certificate, settings.tls_key, settings.tls_client_ca
    if (certificate is None) != (key is None) or (client_ca is not None and certificate is None):
        raise ConfigurationError("TLS needs both --tls-certificate FILE and --tls-key FILE")
    tokens = Tokens(settings.tokens) if settings.tokens is not None else None
    if certificate is None or key is None:
        return Access(None, tokens)
    return Access(_follow_certificates(certificate, key, client_ca), tokens)


def exposure_warning(settings: Settings) -> str:
    """What a server on a network lacks, and what to do about it; "" if it is safe or on this machine only."""
    host = settings.host.strip("[]")
    is_local = host in ("localhost", "::1") or host.startswith("127.")
    has_tls, has_names = settings.tls_certificate is not None, bool(settings.tokens or settings.tls_client_ca)
    if is_local or (has_tls and has_names):
        return ""
    faults = [] if has_names else ["use this server (--tokens FILE asks for one that `ghn-server make-token` made)"]
    if not has_tls:
        faults.append("read what goes over it (--tls-certificate FILE and --tls-key FILE encrypt it)")
    return f"EVERYONE who reaches {settings.host}:{settings.port} can {' and '.join(faults)}; else use --host 127.0.0.1"


def peer_identity(context: grpc.ServicerContext) -> str:
    """Who makes a call: ``token:NAME``, else ``certificate:NAME``, else ``host:ADDRESS`` without the port.

    The same for all connections of one peer; call it on the thread of the call.
    """
    if name := TOKEN_NAME.get():
        return f"token:{name}"
    properties: Any = context.auth_context()  # names with lists of bytes, whatever the stubs say
    for name in properties.get("x509_common_name", ()):
        return f"certificate:{name.decode(errors='replace')}"
    peer = context.peer()  # such as ipv4:127.0.0.1:4321, ipv6:%5B::1%5D:4321 or unix:
    return f"host:{peer.rpartition(':')[0].partition(':')[2] or peer}"


# ---- tokens ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TokenHash:
    """One line of a tokens file."""

    name: str
    salt: str
    digest: bytes


class Tokens:
    """The tokens of a file, which is read again when it changes.

    Raises:
        ConfigurationError: The file cannot be read, a line is no token's, or there is none.
    """

    def __init__(self, path: Path) -> None:
        self._file = FollowedFiles((path,), lambda contents: parse_tokens(contents[0], path), "the tokens")
        if not self._file.value():
            raise ConfigurationError(
                f"there is no token in {str(path)!r}; `ghn-server make-token NAME --tokens FILE` adds one"
            )

    def admit(self, metadata: Sequence[tuple[str, str | bytes]]) -> str:
        """Name of the token that a call brings; every hash is compared, so that time tells nothing.

        Raises:
            UnauthenticatedError: It brings none, or none of these.
        """
        values = [value for key, value in metadata if key == AUTHORIZATION and isinstance(value, str)]
        if len(values) != 1 or not values[0].lower().startswith(SCHEME):
            raise UnauthenticatedError("this server asks for a token: metadata 'authorization' with 'Bearer TOKEN'")
        token, name = values[0][len(SCHEME) :].strip()[:MAX_TOKEN_CHARACTERS], ""
        for line in self._file.value():
            digest = hashlib.sha256((line.salt + token).encode()).digest()
            name = line.name if hmac.compare_digest(digest, line.digest) else name
        if not name:
            raise UnauthenticatedError("the token is none of this server's; it may be old, or another server's")
        return name


def parse_tokens(content: bytes, path: Path) -> tuple[TokenHash, ...]:
    """The lines of a tokens file; empty ones and those that begin with # are left out.

    Raises:
        ConfigurationError: A line is of another form; the message has its number, not its text.
    """
    hashes = []
    for number, line in enumerate(content.decode(errors="replace").splitlines(), start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = TOKEN_LINE.fullmatch(text)
        if match is None:
            raise ConfigurationError(
                f"line {number} of {str(path)!r} is not `NAME SALT:HASH` or `NAME HASH` with a sha256 in lower-case "
                "hexadecimal; `ghn-server make-token NAME` prints such a line"
            )
        hashes.append(TokenHash(match["name"], match["salt"] or "", bytes.fromhex(match["hash"])))
    return tuple(hashes)


def make_token(name: str) -> tuple[str, str]:
    """A new token, and the line of a tokens file that lets it in.

    Raises:
        ConfigurationError: The name does not fit a line.
    """
    token, salt = TOKEN_PREFIX + secrets.token_urlsafe(32), secrets.token_hex(16)
    line = f"{name} {salt}:{hashlib.sha256((salt + token).encode()).hexdigest()}"
    if not TOKEN_LINE.fullmatch(line):
        raise ConfigurationError(f"expected a name of 1 to 64 letters, digits and -_.@, got {name!r}")
    return token, line


def append_token(path: Path, line: str) -> None:
    """Adds a line to a tokens file, which only its owner may read if it is new.

    Raises:
        ConfigurationError: It is no tokens file, or cannot be written.
    """
    try:
        content = path.read_bytes() if path.exists() else b""
        parse_tokens(content, path)
        separator = "\n" if content and not content.endswith(b"\n") else ""
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "w") as file:
            file.write(f"{separator}{line}\n")
    except OSError as error:
        raise ConfigurationError(f"cannot add to the tokens file {str(path)!r}: {error.strerror}") from error


# ---- TLS ------------------------------------------------------------------------------------------------------------


def _follow_certificates(certificate: Path, key: Path, client_ca: Path | None) -> grpc.ServerCredentials:
    """Credentials that new connections take from the files as they are then."""

    def read(contents: list[bytes]) -> grpc.ServerCertificateConfiguration:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # only to see whether the files are usable
        try:
            context.load_cert_chain(certificate, key, password="")
            if client_ca is not None:
                context.load_verify_locations(client_ca)
        except ssl.SSLError as error:
            raise ConfigurationError(
                f"expected PEM files of a certificate, of its key without a password, and of authorities: {error}"
            ) from error
        roots = contents[2] if client_ca is not None else None
        return grpc.ssl_server_certificate_configuration([(contents[1], contents[0])], root_certificates=roots)

    paths = (certificate, key) if client_ca is None else (certificate, key, client_ca)
    files = FollowedFiles(paths, read, "the TLS certificate")
    present = files.value()

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        nonlocal present
        present, before = files.value(), present
        return None if present is before else present

    return grpc.dynamic_ssl_server_credentials(
        present,
        renewed,  # type: ignore[arg-type]  # None is for "as before", which the stubs do not know
        require_client_authentication=client_ca is not None,
    )


# ---- files that change ----------------------------------------------------------------------------------------------


class FollowedFiles(Generic[ValueT]):
    """What a few files say, read again when one of them has changed; what is broken then is logged and not taken up.

    Args:
        paths: The files.
        read: Makes the value of their contents.
        what: What they hold, for messages.

    Raises:
        ConfigurationError: They cannot be read at first.
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[list[bytes]], ValueT], what: str) -> None:
        self._paths, self._read, self._what = tuple(paths), read, what
        self._lock = threading.Lock()
        self._signature = self._sign()
        self._value = self._load()

    def value(self) -> ValueT:
        """The newest usable value; never raises."""
        with self._lock:
            signature = self._sign()
            if signature != self._signature:
                try:
                    value = self._load()
                    if signature == self._sign():  # else they are being written, and the next call looks again
                        self._value, self._signature = value, signature
                        logger.info("%s has been read again", self._what)
                except ConfigurationError as error:
                    self._signature = signature
                    logger.error("%s stays as it was: %s", self._what, error)
            return self._value

    def _sign(self) -> tuple[tuple[int, ...], ...]:
        """Changes when a file does, also when it goes away."""
        return tuple(
            (stat.st_mtime_ns, stat.st_size, stat.st_ino) if (stat := _stat(path)) else () for path in self._paths
        )

    def _load(self) -> ValueT:
        with usable(f"cannot read {self._what}"):
            return self._read([path.read_bytes() for path in self._paths])


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except (OSError, ValueError):
        return None
