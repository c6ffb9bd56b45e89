"""Options that several commands share; a flag beats the environment (``GHN_*``), which beats the default."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ghn_client.cli.outcome import refuse
from ghn_client.errors import AuthenticationError

if TYPE_CHECKING:
    from ghn_client.client import GHNClient


class Dtype(StrEnum):
    """Element types of a reply."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


_SERVER = "Server"
ModelFile = Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="The network; its weights stay here.")]
Address = Annotated[
    str,
    typer.Option(
        envvar="GHN_ADDRESS",
        metavar="HOST:PORT",
        help="A running server; without it, one is started inside this process.",
        rich_help_panel=_SERVER,
    ),
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        envvar="GHN_CHECKPOINT",
        metavar="FILE",
        help="The hypernetwork of the server inside this process; without it, the one that comes with ghn-service.",
        rich_help_panel=_SERVER,
    ),
]
Model = Annotated[
    str,
    typer.Option(envvar="GHN_MODEL", metavar="NAME", help="One of `ghn-client models`.", rich_help_panel=_SERVER),
]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        envvar="GHN_TOKEN_FILE",
        metavar="FILE",
        help="File with the token of the server; sent over TLS or to this machine only.",
        rich_help_panel=_SERVER,
    ),
]
Tls = Annotated[bool, typer.Option(envvar="GHN_TLS", help="Encrypt the connection.", rich_help_panel=_SERVER)]
RootCertificates = Annotated[
    Path | None,
    typer.Option(
        "--ca-file", envvar="GHN_CA_FILE", metavar="PEM", help="Authorities to trust.", rich_help_panel=_SERVER
    ),
]
Certificate = Annotated[
    Path | None,
    typer.Option(
        "--cert-file",
        envvar="GHN_CERT_FILE",
        metavar="PEM",
        help="Certificate of this client, for servers that ask for one.",
        rich_help_panel=_SERVER,
    ),
]
PrivateKey = Annotated[
    Path | None,
    typer.Option("--key-file", envvar="GHN_KEY_FILE", metavar="PEM", help="Its key.", rich_help_panel=_SERVER),
]
Timeout = Annotated[
    float | None,
    typer.Option(
        min=0.001,
        envvar="GHN_TIMEOUT",
        metavar="SECONDS",
        help="Seconds that the call may take, retries included.",
        rich_help_panel=_SERVER,
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", metavar="FILE", help="Where the weights go, as safetensors; MODEL.safetensors if not given."
    ),
]
OnnxOut = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the model with its predicted weights, too.")]
ElementType = Annotated[Dtype, typer.Option(help="Element type of the weights.")]
Seed = Annotated[int, typer.Option(min=0, max=2**64 - 1, help="The same seed gives the same bytes.")]
Steps = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME:KEY=VALUE,...", help="Post-processing; may be repeated, applied in order."),
]
LowRank = Annotated[
    str, typer.Option(metavar="RULE=VALUE[,method=M]", help="Factors instead of dense weights, such as energy=0.9.")
]
Include = Annotated[
    list[str] | None, typer.Option(metavar="GLOB", help="Only tensors whose names match; may be repeated.")
]
Report = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Measure the weights' diversity; FILE.json for programs, FILE.html for people."),
]
ShowAll = Annotated[bool, typer.Option("--all", help="Show every layer.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of tables for people.")]


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Which server a command talks to."""

    address: str = ""
    checkpoint: Path | None = None
    token_file: Path | None = None
    tls: bool = False
    root_certificates: Path | None = None
    certificate: Path | None = None
    private_key: Path | None = None
    timeout_s: float | None = None


def server_options(
    context: typer.Context,
    address: str,
    checkpoint: Path | None,
    token_file: Path | None,
    tls: bool,
    root_certificates: Path | None,
    certificate: Path | None,
    private_key: Path | None,
    timeout_s: float | None,
) -> ServerOptions:
    """The options as one value; of address and checkpoint, one on the command line beats one of the environment.

    Raises:
        InvalidOptionError: Both are given on the command line.
    """
    if address and checkpoint is not None:
        typed = {
            name: getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
            for name in ("address", "checkpoint")
        }
        if typed["address"] == typed["checkpoint"]:
            raise refuse("--address asks for a running server and --checkpoint for one inside this process; give one")
        address, checkpoint = (address, None) if typed["address"] else ("", checkpoint)
    return ServerOptions(address, checkpoint, token_file, tls, root_certificates, certificate, private_key, timeout_s)


def open_client(options: ServerOptions) -> GHNClient:
    """A client of the server that the options name.

    Raises:
        GhnClientError: The options are impossible, or the server inside this process cannot start.
    """
    from ghn_client.client import GHNClient

    if not options.address:
        return GHNClient.embedded(options.checkpoint, timeout_s=options.timeout_s)
    return GHNClient(
        options.address,
        token=_read_token(options.token_file) if options.token_file else None,
        tls=options.tls,
        root_certificates=options.root_certificates,
        client_certificate=options.certificate,
        client_key=options.private_key,
        timeout_s=options.timeout_s,
    )


def _read_token(path: Path) -> str:
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise AuthenticationError(f"cannot read the token file {str(path)!r}: {error}") from error
    if not token or not token.isprintable() or not token.isascii():
        raise AuthenticationError(f"expected one line of printable ASCII in the token file {str(path)!r}")
    return token
