"""How commands are made: options that several share, the server that they ask, and how they end.

Nothing here or in ``app`` imports torch at once, so that help and shell completion are quick.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import json
import os
import signal
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer import Option
from typer.core import TyperGroup

from ghn_client.errors import AuthenticationError, GhnClientError, InvalidOptionError

if typing.TYPE_CHECKING:
    from ghn_client.client import GHNClient
    from ghn_client.sources import Source

INTERRUPTED = 130
TERMINATED = 143
DELTA = Path("delta.safetensors")


class Dtype(StrEnum):
    """Element types of a reply."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Head(StrEnum):
    """What becomes of a classifier."""

    AUTO = "auto"
    PREDICTED = "predicted"
    RESET = "reset"


def _server(name: str, metavar: str | None, text: str, **settings: Any) -> Any:
    return Option(envvar=f"GHN_{name}", metavar=metavar, help=text, rich_help_panel="Server", **settings)


Network = Annotated[
    str,
    typer.Argument(
        metavar="MODEL.onnx|-|timm:NAME|SCRIPT:FACTORY",
        help="A file, - for stdin, a network of timm, or a function that returns one; its weights stay here.",
    ),
]
NamedNetwork = Annotated[
    str,
    typer.Argument(
        metavar="MODEL.onnx|timm:NAME|SCRIPT:FACTORY", help="A file, a network of timm, or a function that returns one."
    ),
]
ImageSize = Annotated[int | None, Option(min=1, help="Pixels per side; else what the network declares, or 32.")]
Model = Annotated[str, _server("MODEL", "NAME", "One of `ghn-client models`.")]
ElementType = Annotated[Dtype, Option(help="Element type of the weights.")]
LowRank = Annotated[
    str, Option(metavar="RULE=VALUE[,method=M]", help="Factors instead of dense weights, such as energy=0.9.")
]
Classifier = Annotated[
    Head,
    Option("--head", help="The classifier: predicted, reset (drawn anew), or auto (reset for other class counts)."),
]
ShowAll = Annotated[bool, Option("--all", help="Show every layer.")]
Json = Annotated[bool, Option("--json", help="Print JSON for programs instead of tables for people.")]


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """Which server a command asks; a flag beats the environment (``GHN_*``)."""

    address: Annotated[str, _server("ADDRESS", "HOST:PORT", "A running server; else one starts in this process.")] = ""
    checkpoint: Annotated[
        str | None,
        _server(
            "CHECKPOINT",
            "FILE|NAME|hf://...",
            "Hypernetwork of the server in this process: a file, or what `ghn-server checkpoints` lists.",
        ),
    ] = None
    token_file: Annotated[
        Path | None,
        _server("TOKEN_FILE", "FILE", "A token, else that in GHN_TOKEN; sent over TLS or to this machine only."),
    ] = None
    tls: Annotated[bool, _server("TLS", None, "Encrypt the connection.")] = False
    ca_file: Annotated[Path | None, _server("CA_FILE", "PEM", "Authorities to trust.")] = None
    cert_file: Annotated[
        Path | None, _server("CERT_FILE", "PEM", "Certificate of this client, for servers that ask for one.")
    ] = None
    key_file: Annotated[Path | None, _server("KEY_FILE", "PEM", "Its key.")] = None
    server_name: Annotated[
        str, _server("SERVER_NAME", "NAME", "Name in the server's certificate, if it is not the address.")
    ] = ""
    timeout: Annotated[
        float | None, _server("TIMEOUT", "SECONDS", "Seconds that the call may take, retries included.", min=0.001)
    ] = None

    def connect(self, *, needs_token: bool = True) -> GHNClient:
        """A client of the server that the options name; without the token where none is needed."""
        from ghn_client.client import GHNClient

        if self.address and self.checkpoint is not None:
            raise InvalidOptionError(
                "--address asks for a running server and --checkpoint for one inside this process; give one"
            )
        if not self.address:
            return GHNClient.embedded(self.checkpoint, timeout_s=self.timeout)
        return GHNClient(
            self.address,
            token=_read_token(self.token_file) if needs_token else None,
            tls=self.tls,
            root_certificates=self.ca_file,
            client_certificate=self.cert_file,
            client_key=self.key_file,
            server_name=self.server_name,
            timeout_s=self.timeout,
        )


def _read_token(path: Path | None) -> str | None:
    """The token of the file, else of the environment; never of a flag, which other users of the machine can see."""
    if path is None:
        return os.environ.get("GHN_TOKEN", "").strip() or None
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise AuthenticationError(f"cannot read the token file {str(path)!r}: {error}") from error
    if not token:
        raise AuthenticationError(f"there is no token in the file {str(path)!r}")
    return token


class ClassLayer(StrEnum):
    """What becomes of a source's class layer."""

    AUTO = "auto"
    KEEP = "keep"
    RESET = "reset"


def _source(name: str, text: str, metavar: str | None = None) -> Any:
    return Option(f"--{name}", metavar=metavar, help=text, rich_help_panel="Source")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """Which trained network weights are taken from, and how."""

    source: Annotated[
        str,
        _source(
            "source",
            "Take weights of a trained network: a file, timm:NAME, SCRIPT:FACTORY, one of `ghn-client models`, auto.",
            "S",
        ),
    ] = ""
    source_weights: Annotated[
        Path | None, _source("source-weights", "Its weights, where it has none: .safetensors or .pt.", "FILE")
    ] = None
    class_layer: Annotated[
        ClassLayer, _source("class-layer", "auto keeps the class layer where there are equally many classes.")
    ] = ClassLayer.AUTO
    steps_on_source: Annotated[bool, _source("steps-on-source", "Let --step change what the source gives, too.")] = (
        False
    )

    def chosen(self) -> Source | None:
        """What the options name, if anything."""
        from ghn_client.sources import Source

        if not self.source:
            if self.source_weights is not None:
                raise InvalidOptionError("--source-weights belong to a network: name it with --source")
            return None
        return Source(
            self.source,
            weights=self.source_weights,
            class_layer=self.class_layer.value,
            post_process=self.steps_on_source,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuning:
    """What a network starts from and how it is tuned."""

    data: Annotated[Path, Option(metavar="DIR", help="Images: parquet, cifar-10-batches-py, IDX or class folders.")]
    strategy: Annotated[str, Option(help="norm-only, additive, low-rank-update, all, ...")] = "norm-only"
    option: Annotated[list[str] | None, Option(metavar="KEY=VALUE", help="Of the strategy; may be repeated.")] = None
    output: Annotated[Path, Option("--output", "-o", metavar="FILE", help="Where the delta goes.")] = DELTA
    model_out: Annotated[Path | None, Option(metavar="FILE", help="The tuned network: .safetensors or .onnx.")] = None
    weights: Annotated[Path | None, Option(metavar="FILE", help="Start from these, without asking a server.")] = None
    own_start: Annotated[bool, Option("--own-start", help="Start from the network's own initial weights.")] = False
    epochs: Annotated[int, Option(min=1)] = 10
    learning_rate: Annotated[float, Option("--lr", min=0.0)] = 0.05
    batch_size: Annotated[int, Option(min=1)] = 64
    image_size: ImageSize = None
    limit: Annotated[int | None, Option(min=1, help="Use at most so many images of each split.")] = None
    patience: Annotated[int | None, Option(min=1, help="Stop after so many epochs without progress.")] = None
    resume: Annotated[Path | None, Option(metavar="FILE", help="Checkpoint to write, and to go on from.")] = None
    device: Annotated[str, Option(help="cpu or cuda.")] = "cpu"
    seed: Annotated[int, Option(min=0)] = 0
    model: Model = ""


def check_targets(targets: Mapping[str, Path | None], inputs: Iterable[Path | None]) -> None:
    """Refuses to overwrite an input, to write two things into one file, or to write where it cannot be.

    Args:
        targets: Files to write by option; None for those that were not asked for.
        inputs: Files that are read; those that do not exist count for nothing.
    """
    named = {flag: target for flag, target in targets.items() if target is not None}
    for target, read in itertools.product(named.values(), inputs):
        if read is not None and target.exists() and read.exists() and target.samefile(read):
            raise InvalidOptionError(f"{str(target)!r} is read by the same command; give another file to write to")
    for flag, target in named.items():
        if not target.parent.is_dir():
            raise InvalidOptionError(f"the folder {str(target.parent)!r} does not exist")
        if target.is_dir():
            raise InvalidOptionError(f"expected a file for {flag}, {str(target)!r} is a folder")
    if len({target.absolute() for target in named.values()}) < len(named):
        raise InvalidOptionError(f"two of {', '.join(named)} name the same file")


def command(app: typer.Typer) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a command; each field of a parameter that is a dataclass (``Server``) becomes an option of its own."""

    def register(body: Callable[..., None]) -> Callable[..., None]:
        parameters = [inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
        groups: dict[str, Callable[..., Any]] = {}
        for name, parameter in inspect.signature(body, eval_str=True).parameters.items():
            kind: Any = parameter.annotation
            fields = [parameter]
            if isinstance(kind, type) and dataclasses.is_dataclass(kind):
                groups[name], fields = kind, [*inspect.signature(kind, eval_str=True).parameters.values()]
            parameters += [field.replace(kind=inspect.Parameter.KEYWORD_ONLY) for field in fields]

        def run(context: typer.Context, **values: Any) -> None:
            with ending_well(as_json=values.get("as_json", False)):
                sources = {name: context.get_parameter_source(name) for name in ("address", "checkpoint")}
                typed = [name for name, source in sources.items() if getattr(source, "name", "") == "COMMANDLINE"]
                if len(typed) == 1:  # it beats the other one, which is from the environment
                    values |= {"address": "", "checkpoint": None, typed[0]: values[typed[0]]}
                for name, group in groups.items():
                    values[name] = group(**{field: values.pop(field) for field in inspect.signature(group).parameters})
                body(**values)

        run.__name__, run.__doc__ = body.__name__, body.__doc__
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        app.command()(run)
        return body

    return register


class Commands(TyperGroup):
    """A command line that makes no sense says so in JSON, too, where JSON was asked for."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command that was named."""
        given = [*getattr(ctx, "_protected_args", ()), *ctx.args]
        try:
            return super().invoke(ctx)
        except Exception as error:
            explain = getattr(error, "format_message", None)  # click's own errors have it
            if explain is not None and "--json" in given:
                _print_failure("InvalidOptionError", InvalidOptionError.exit_code, explain())
            raise


def _print_failure(kind: str, exit_code: int, message: str, *, field: str = "", request_id: str = "") -> None:
    fields = {"message": message, "field": field, "request_id": request_id}
    print_json({"error": {"kind": kind, "exit_code": exit_code, **fields}})


@contextlib.contextmanager
def ending_well(*, as_json: bool = False) -> Iterator[None]:
    """Ends the command with the exit code of whatever the body raises, and one line, or JSON, that says why."""
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        yield
    except GhnClientError as error:
        where = f" (request {error.request_id})" if error.request_id else ""
        messages().print(f"[bold red]error:[/bold red] {escape(str(error))}{where}")
        if as_json:
            name, code = type(error).__name__, error.exit_code
            _print_failure(name, code, str(error), field=error.field, request_id=error.request_id)
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt as error:
        messages().print("interrupted")
        raise typer.Exit(INTERRUPTED) from error
    except BrokenPipeError as error:
        # The reader of stdout has gone; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from error
    finally:
        signal.signal(signal.SIGTERM, previous)


def print_json(document: Any) -> None:
    """Data for programs, on stdout."""
    json.dump(document, sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")
    sys.stdout.flush()


def messages() -> Console:
    """Where people read: stderr, in colour on a terminal unless NO_COLOR is set."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def warn(sentence: str) -> None:
    """Tells the user something that does not end the command."""
    messages().print(f"[yellow]warning:[/yellow] {escape(sentence)}")
