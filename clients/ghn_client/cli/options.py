"""How commands are made: options that several share, the server that they ask, and how they end.

Nothing here or in ``app`` imports torch at once, so that help and shell completion are quick.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import os
import signal
import sys
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console
from typer import Option

from ghn_client.errors import AuthenticationError, GhnClientError, InvalidOptionError

if typing.TYPE_CHECKING:
    from ghn_client.client import GHNClient

INTERRUPTED = 130
TERMINATED = 143


class Dtype(StrEnum):
    """Element types of a reply."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def _server_option(name: str, text: str, **settings: Any) -> Any:
    return Option(envvar=f"GHN_{name}", help=text, rich_help_panel="Server", **settings)


ModelFile = Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="The network; its weights stay here.")]
Model = Annotated[str, _server_option("MODEL", "One of `ghn-client models`.", metavar="NAME")]
ElementType = Annotated[Dtype, Option(help="Element type of the weights.")]
LowRank = Annotated[
    str, Option(metavar="RULE=VALUE[,method=M]", help="Factors instead of dense weights, such as energy=0.9.")
]
ShowAll = Annotated[bool, Option("--all", help="Show every layer.")]
Json = Annotated[bool, Option("--json", help="Print JSON for programs instead of tables for people.")]


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """Which server a command asks; a flag beats the environment (``GHN_*``)."""

    address: Annotated[
        str,
        _server_option(
            "ADDRESS", "A running server; without it, one is started inside this process.", metavar="HOST:PORT"
        ),
    ] = ""
    checkpoint: Annotated[
        Path | None,
        _server_option(
            "CHECKPOINT", "Hypernetwork of the server inside this process; else the bundled one.", metavar="FILE"
        ),
    ] = None
    token_file: Annotated[
        Path | None,
        _server_option("TOKEN_FILE", "The server's token; sent over TLS or to this machine only.", metavar="FILE"),
    ] = None
    tls: Annotated[bool, _server_option("TLS", "Encrypt the connection.")] = False
    ca_file: Annotated[Path | None, _server_option("CA_FILE", "Authorities to trust.", metavar="PEM")] = None
    cert_file: Annotated[
        Path | None,
        _server_option("CERT_FILE", "Certificate of this client, for servers that ask for one.", metavar="PEM"),
    ] = None
    key_file: Annotated[Path | None, _server_option("KEY_FILE", "Its key.", metavar="PEM")] = None
    timeout: Annotated[
        float | None,
        _server_option("TIMEOUT", "Seconds that the call may take, retries included.", metavar="SECONDS", min=0.001),
    ] = None

    def connect(self) -> GHNClient:
        """A client of the server that the options name.

        Raises:
            GhnClientError: The options are impossible, or the server inside this process cannot start.
        """
        from ghn_client.client import GHNClient

        if self.address and self.checkpoint is not None:
            raise InvalidOptionError(
                "--address asks for a running server and --checkpoint for one inside this process; give one"
            )
        if not self.address:
            return GHNClient.embedded(self.checkpoint, timeout_s=self.timeout)
        return GHNClient(
            self.address,
            token=_read_token(self.token_file) if self.token_file else None,
            tls=self.tls,
            root_certificates=self.ca_file,
            client_certificate=self.cert_file,
            client_key=self.key_file,
            timeout_s=self.timeout,
        )


def _read_token(path: Path) -> str:
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise AuthenticationError(f"cannot read the token file {str(path)!r}: {error}") from error
    if not token or not token.isprintable() or not token.isascii():
        raise AuthenticationError(f"expected one line of printable ASCII in the token file {str(path)!r}")
    return token


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuning:
    """What a network starts from and how it is tuned."""

    data: Annotated[Path, Option(metavar="DIR", help="Images: parquet, cifar-10-batches-py or class folders.")]
    strategy: Annotated[str, Option(help="norm-only, additive, low-rank-update, all, ...")] = "norm-only"
    option: Annotated[list[str] | None, Option(metavar="KEY=VALUE", help="Of the strategy; may be repeated.")] = None
    output: Annotated[Path, Option("--output", "-o", metavar="FILE", help="Where the delta goes.")] = Path(
        "delta.safetensors"
    )
    model_out: Annotated[
        Path | None,
        Option(metavar="FILE", help="Write the tuned network, too: .safetensors, or .onnx for an ONNX file."),
    ] = None
    weights: Annotated[
        Path | None, Option(metavar="FILE", help="Predicted weights to start from, instead of asking a server.")
    ] = None
    own_start: Annotated[bool, Option("--own-start", help="Start from the network's own initial weights.")] = False
    epochs: Annotated[int, Option(min=1)] = 10
    learning_rate: Annotated[float, Option("--lr", min=0.0)] = 0.05
    batch_size: Annotated[int, Option(min=1)] = 64
    image_size: Annotated[int | None, Option(min=1, help="Pixels per side; what the file says, or 32, by default.")] = (
        None
    )
    limit: Annotated[int | None, Option(min=1, help="Use at most so many images of each split.")] = None
    patience: Annotated[int | None, Option(min=1, help="Stop after so many epochs without progress.")] = None
    resume: Annotated[Path | None, Option(metavar="FILE", help="Checkpoint to write, and to go on from.")] = None
    device: Annotated[str, Option(help="cpu or cuda.")] = "cpu"
    seed: Annotated[int, Option(min=0)] = 0
    hypernetwork: Model = ""


# ---- commands ------------------------------------------------------------------------------------------------------


def command(app: typer.Typer) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a command; each field of a parameter that is a dataclass (``Server``) becomes an option of its own."""

    def register(body: Callable[..., None]) -> Callable[..., None]:
        hints = typing.get_type_hints(body, include_extras=True)
        groups: dict[str, Any] = {name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)}
        parameters = [_parameter("context", typer.Context)]
        for name, parameter in inspect.signature(body).parameters.items():
            if name in groups:
                fields = typing.get_type_hints(groups[name], include_extras=True)
                defaults = {field.name: field.default for field in dataclasses.fields(groups[name])}
                parameters += [_parameter(key, kind, defaults[key]) for key, kind in fields.items()]
            else:
                parameters.append(_parameter(name, hints[name], parameter.default))

        def run(context: typer.Context, **values: Any) -> None:
            with ending_well(as_json=values.get("as_json", False)):
                typed = [name for name in ("address", "checkpoint") if _is_typed(context, name)]
                if len(typed) == 1:  # it beats the other one, which is from the environment
                    values |= {"address": "", "checkpoint": None, typed[0]: values[typed[0]]}
                for name, kind in groups.items():
                    values[name] = kind(**{field.name: values.pop(field.name) for field in dataclasses.fields(kind)})
                body(**values)

        run.__name__, run.__doc__ = body.__name__, body.__doc__
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        app.command()(run)
        return body

    return register


def _parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    default = inspect.Parameter.empty if default is dataclasses.MISSING else default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _is_typed(context: typer.Context, name: str) -> bool:
    return getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"


@contextlib.contextmanager
def ending_well(*, as_json: bool = False) -> Iterator[None]:
    """Ends the command with the exit code of whatever the body raises, and one line, or JSON, that says why."""
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except GhnClientError as error:
        where = f" (request {error.request_id})" if error.request_id else ""
        messages().print(f"[bold red]error:[/bold red] {_escape(str(error))}{where}")
        if as_json:
            fields = {"message": str(error), "field": error.field, "request_id": error.request_id}
            print_json({"error": {"kind": type(error).__name__, "exit_code": error.exit_code, **fields}})
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


def _terminate(number: int, frame: FrameType | None) -> None:
    raise SystemExit(TERMINATED)


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
    messages().print(f"[yellow]warning:[/yellow] {_escape(sentence)}")


def _escape(text: str) -> str:
    return text.replace("[", "\\[")
