"""``Settings``: all that can be chosen about a server. Each field is a flag of ``serve``, a variable and a TOML key."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ByteSize, Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from ghn_service.errors import CheckpointError, ConfigurationError
from ghn_service.graph.raw_graph import GraphLimits
from ghn_service.published import BUNDLED_CHECKPOINTS, HUB, WEB, is_remote, model_name
from ghn_service.transfer import BUNDLED_SOURCES

DEFAULT_LIMITS = GraphLimits()
MEBIBYTE = 2**20
DIGEST_MARKER = "@sha256:"

OPTIONAL = ("tls_certificate", "tls_key", "tls_client_ca", "tokens", "health_port", "metrics_port")
"""Settings for which empty text is none."""

Names = Annotated[tuple[str, ...], NoDecode]


class Settings(BaseSettings):
    """Runs the server until SIGTERM or SIGINT.

    Every option is also a variable GHN_* and a key of the TOML file that --config FILE or GHN_CONFIG names; a flag
    beats the variable, which beats the file. Lists take an option several times, or one with commas.
    """

    model_config = SettingsConfigDict(
        env_prefix="GHN_",
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        cli_prog_name="ghn-server serve",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_shortcuts={"checkpoints": "checkpoint"},
        cli_exit_on_error=False,
    )

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all of IPv4, [::] for all."""
    port: int = Field(default=50051, ge=0, le=65535)
    """Port to listen on; 0 for any free one."""
    checkpoints: Names = ()
    """Hypernetworks to load, each NAME=FILE or FILE (its stem is the name; a published name or hf://OWNER/REPO/FILE may
    stand for it, see `ghn-server checkpoints`), with @sha256:DIGEST behind it to refuse any
    other file; the first is the default one, and without any those that come with the package are loaded."""
    sources: Names = ()
    """Folders with trained networks to take weights from, as `ghn-server add-source` writes them; those that come with
    the package are there without."""
    device: Names = ("auto",)
    """Devices that predict: auto, cpu, cuda or cuda:N; each has a worker, and one that is named twice has two."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Element type in which weights of two and more axes are decoded; bfloat16 takes half the memory and, on processors
    that know it, less than half the time, and deviates by about one part in a hundred."""
    tls_certificate: Path | None = None
    """PEM file of the server's certificate and what leads to its authority; taken up anew when it is renewed."""
    tls_key: Path | None = None
    """PEM file of the certificate's key, without a password."""
    tls_client_ca: Path | None = None
    """PEM file of authorities; clients without a certificate of theirs are refused."""
    tokens: Path | None = None
    """File of hashed tokens (ghn-server make-token); calls without one are refused. Read again when it changes."""
    health_port: int | None = Field(default=None, ge=0, le=65535)
    """Port that answers health alone and in plain text, for probes without TLS; 0 for any free one, none if empty."""
    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    """Port that tells metrics to Prometheus over HTTP; 0 for any free one, none if empty."""
    metrics_host: str = "127.0.0.1"
    """Address of that port."""
    tracing: bool = False
    """Whether calls are traced with OpenTelemetry, to where OTEL_* variables say; needs the extra tracing."""
    max_queue: int = Field(default=16, ge=0, le=10_000)
    """Predictions that may wait for a device."""
    max_calls: int = Field(default=128, ge=1, le=1_000)
    """Calls that are served at once, waiting and streaming ones included; each takes a thread."""
    max_peer_share: float = Field(default=0.5, gt=0, le=1)
    """Fraction of calls and memory that one peer (token, certificate, else address) may hold at once; who holds nothing
    may ask for anything. 1 where all clients come through one proxy."""
    memory_bytes: ByteSize | None = None
    """Memory for requests, predictions and replies, such as 6GiB; if empty, three quarters of the container's or
    machine's, less 512 MiB and the checkpoints."""
    cache_bytes: ByteSize | None = None
    """Memory of it for the last replies, which answer equal requests; 0 for none, a tenth if empty."""
    max_request_bytes: int = Field(default=8 * MEBIBYTE, ge=1024, le=2**31 - 1)
    """Bytes of a request; up to 56 that arrive at once may take them beside memory_bytes."""
    max_nodes: int = Field(default=DEFAULT_LIMITS.max_nodes, ge=1)
    """Nodes of an ONNX model, after functions are expanded."""
    max_graph_nodes: int = Field(default=DEFAULT_LIMITS.max_graph_nodes, ge=1)
    """Nodes of the architecture's graph; memory grows with their square."""
    max_edges: int = Field(default=DEFAULT_LIMITS.max_edges, ge=1)
    """Edges of the architecture's graph; time to read it grows with them."""
    max_tensors: int = Field(default=DEFAULT_LIMITS.max_tensors, ge=1)
    """Tensors of an ONNX model."""
    max_parameters: int = Field(default=DEFAULT_LIMITS.max_parameters, ge=1)
    """Trainable scalars of a network."""
    max_seconds: float = Field(default=600.0, gt=0, le=86_400, allow_inf_nan=False)
    """Seconds that a request may take, the stream included."""
    send_idle_seconds: float = Field(default=30.0, gt=0, le=86_400, allow_inf_nan=False)
    """Seconds that a client may read nothing before its stream is cancelled, and that its request may take to come."""
    min_bytes_per_second: ByteSize = ByteSize(256 * 1024)
    """Least rate at which a client reads its stream, send_idle_seconds allowed for; 0 for any."""
    worker_seconds: float = Field(default=300.0, gt=0, le=86_400, allow_inf_nan=False)
    """Seconds without a sign of life after which a worker counts as hung; a server of hung workers is not ready."""
    keepalive_seconds: float = Field(default=60.0, ge=1, le=86_400, allow_inf_nan=False)
    """Seconds without traffic after which the server asks a client whether it is still there."""
    keepalive_timeout_seconds: float = Field(default=20.0, gt=0, le=3_600, allow_inf_nan=False)
    """Seconds that the answer may take before the connection is closed."""
    min_ping_seconds: float = Field(default=10.0, ge=0, le=3_600, allow_inf_nan=False)
    """The least time between such questions of a client; one that asks more often is sent away."""
    max_connection_seconds: float = Field(default=600.0, ge=0, le=86_400, allow_inf_nan=False)
    """Seconds after which a client is asked to connect anew, so that it sees new replicas; its running calls are
    finished first. 0 for never."""
    reflection: bool = True
    """Whether the server describes its protocol to tools such as grpcurl; with tokens off unless asked for."""
    exit_on_error: bool = True
    """Whether the server ends if a checkpoint cannot be loaded; else it stays up and is not ready."""
    drain_seconds: float = Field(default=0.0, ge=0, le=3_600, allow_inf_nan=False)
    """Seconds between saying "not serving" and refusing calls, when the server is stopped."""
    grace_seconds: float = Field(default=30.0, ge=0, le=3_600, allow_inf_nan=False)
    """Seconds that running requests get to finish, when the server is stopped."""
    log_format: Literal["console", "json"] = "console"
    """How lines of the log are written: for people, or for machines."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least level that is logged."""

    @field_validator("checkpoints", "sources", "device", mode="before")
    @classmethod
    def _split_commas(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator(*OPTIONAL, "reflection", "memory_bytes", "cache_bytes", mode="before")
    @classmethod
    def _empty_is_none(cls, value: Any) -> Any:
        return None if value == "" else value

    @field_validator("log_level", mode="before")
    @classmethod
    def _upper_case(cls, value: Any) -> Any:
        return value.upper() if isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _hide_behind_tokens(cls, values: Any) -> Any:
        return {"reflection": False, **values} if isinstance(values, dict) and values.get("tokens") else values

    @property
    def limits(self) -> GraphLimits:
        """The largest architecture that is read."""
        return GraphLimits(
            max_bytes=self.max_request_bytes,
            max_nodes=self.max_nodes,
            max_graph_nodes=self.max_graph_nodes,
            max_edges=self.max_edges,
            max_tensors=self.max_tensors,
            max_parameters=self.max_parameters,
        )


def load_settings(config: Path | None = None, *, arguments: Sequence[str] | None = None, **values: Any) -> Settings:
    """Settings from the command line, ``GHN_*`` variables and a TOML file, in this order of precedence.

    Args:
        config: The TOML file, with the names of ``Settings`` as top-level keys; None for none.
        arguments: Flags of the command line; None where there is none.
        **values: What a program chooses; None for what it leaves open.

    Raises:
        ConfigurationError: A value is impossible, a name is unknown, or the file cannot be read; one line.
    """

    class WithFile(Settings):
        __doc__ = Settings.__doc__

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml_file=config)

    given = {name: value for name, value in values.items() if value is not None}
    try:
        if config is not None and not config.is_file():
            raise ConfigurationError(f"there is no configuration file {str(config)!r}")
        flags = None if arguments is None else list(arguments)
        found = WithFile(_cli_parse_args=flags, **given)  # type: ignore[call-arg]
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise ConfigurationError(f"the settings are not usable: {'; '.join(faults)}") from error
    except SettingsError as error:
        raise ConfigurationError(f"the options cannot be read: {error}; see ghn-server serve --help") from error
    except (OSError, ValueError) as error:  # tomllib's, or an integer of too many digits
        raise ConfigurationError(f"the configuration file {str(config)!r} cannot be read: {error}") from error
    return Settings.model_construct(**found.model_dump())


@dataclass(frozen=True, slots=True)
class CheckpointFile:
    """A checkpoint to load.

    Attributes:
        source: Its path, or where it is fetched from when it is loaded (``published.is_remote``).
        digest: sha256 that it must have, in lower-case hexadecimal; "" for any.
    """

    source: str
    digest: str = ""


def checkpoint_files(settings: Settings) -> dict[str, CheckpointFile]:
    """Checkpoint by name of the hypernetwork, the default one first.

    Raises:
        ConfigurationError: There is none, a name is given twice, a file is missing, or a digest is none.
    """
    entries = settings.checkpoints or tuple(str(path) for path in sorted(BUNDLED_CHECKPOINTS.glob("*.safetensors")))
    if not entries:
        raise ConfigurationError(
            "no trained checkpoint comes with this version, so --checkpoint FILE is needed "
            "(`ghn-server checkpoints` lists published ones)"
        )
    files: dict[str, CheckpointFile] = {}
    for entry in entries:
        name, file = _split_entry(entry)
        if name in files:
            raise ConfigurationError(f"two checkpoints are called {name!r}; name them with --checkpoint NAME=FILE")
        if not is_remote(file.source) and not _is_file(file.source):
            raise ConfigurationError(
                f"there is no checkpoint {file.source!r}; `ghn-server checkpoints` lists published ones, others are "
                "hf://OWNER/REPO/FILE"
            )
        files[name] = file
    return files


def source_folders(settings: Settings) -> tuple[Path, ...]:
    """Where the library of sources is: the operator's folders, then the one that comes with the package.

    Raises:
        ConfigurationError: There is no such folder.
    """
    for folder in map(Path, settings.sources):
        with usable(f"cannot look at {str(folder)!r}"):
            if not folder.is_dir():
                raise ConfigurationError(f"there is no folder of sources {str(folder)!r}")
    return (*map(Path, settings.sources), BUNDLED_SOURCES)


def check_port(settings: Settings) -> None:
    """Finds out that a port is taken before torch is imported, which takes seconds; gRPC's own bind has the last word.

    Raises:
        ConfigurationError: The port is taken, or the host is not ours.
    """
    host = settings.host.removeprefix("[").removesuffix("]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with usable(f"cannot listen on port {settings.port} of {settings.host!r}"), socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, settings.port))


@contextmanager
def usable(refusal: str) -> Iterator[None]:
    """Makes one error of all by which the system, or Python before it, refuses a name: too long, NUL in it, forbidden.

    Raises:
        ConfigurationError: The refusal and its cause.
    """
    try:
        yield
    except (OSError, TypeError, ValueError) as error:
        raise ConfigurationError(f"{refusal}: {error}") from error


def _is_file(text: str) -> bool:
    """Whether there is a file of this name."""
    with usable(f"cannot look at {text!r}"):
        return Path(text).is_file()


def _split_entry(entry: str) -> tuple[str, CheckpointFile]:
    """Name and file of ``[NAME=]FILE[@sha256:DIGEST]``; a file that exists is taken as it stands."""
    text, marker, digest = entry.rpartition(DIGEST_MARKER)
    if not marker or _is_file(entry):
        text, digest = entry, ""
    elif not re.fullmatch("[0-9a-fA-F]{64}", digest):
        raise ConfigurationError(f"expected 64 hexadecimal digits after {DIGEST_MARKER}, got {entry!r}")
    name, separator, rest = text.partition("=")
    if not separator or _is_file(text) or text.startswith((HUB, WEB)):
        name, rest = "", text
    elif not name.strip() or not rest.strip():
        raise ConfigurationError(f"expected --checkpoint NAME=FILE or --checkpoint FILE, got {entry!r}")
    try:
        return name.strip() or model_name(rest), CheckpointFile(rest.strip(), digest.lower())
    except CheckpointError as error:
        raise ConfigurationError(str(error)) from error
