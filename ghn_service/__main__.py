"""The command ``ghn-server``: serve, and look after checkpoints."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    name="ghn-server",
    help="Predicts starting weights for neural networks from their architecture alone, over gRPC.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

EXIT_FAILED = 1
WIDTH = 160
"""Of tables where no terminal says how wide it is."""


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """An error of ours ends the command with one line and status 1."""
    from ghn_client.errors import GhnClientError
    from ghn_service.errors import GhnServiceError

    try:
        yield
    except (GhnServiceError, GhnClientError) as error:
        typer.echo(f"ghn-server: {error}", err=True)
        raise typer.Exit(EXIT_FAILED) from error


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ghn-server {version('ghn-service')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Predicts starting weights for neural networks from their architecture alone, over gRPC."""


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option(envvar="GHN_CONFIG")] = None,
) -> None:
    """Run the server until SIGTERM or SIGINT; `ghn-server serve --help` lists its options."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # gRPC's own lines about a port that is taken; ours says it
    from ghn_service.server.access import load_access
    from ghn_service.server.settings import check_port, checkpoint_files, load_settings

    with _one_line_errors():
        settings = load_settings(config, arguments=context.args)
        checkpoint_files(settings)
        load_access(settings)
        check_port(settings)
        from ghn_service.server.app import serve as run  # imports torch, which takes seconds
        from ghn_service.server.logging import configure_logging

        configure_logging(settings.log_format, settings.log_level)
        run(settings)


@app.command()
def make_token(
    name: Annotated[str, typer.Argument(help="Whose it is; shown in logs.")],
    tokens: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The server's tokens file, to which the token is added.")
    ] = None,
) -> None:
    """Make a token for clients, and print it; the server keeps only its hash."""
    from ghn_service.server.access import append_token
    from ghn_service.server.access import make_token as make

    with _one_line_errors():
        token, line = make(name)
        if tokens is not None:
            append_token(tokens, line)
    if tokens is None:
        typer.echo(
            f"the line for the file of `ghn-server serve --tokens FILE`:\n{line}\nthe token, shown once:", err=True
        )
    typer.echo(token)


@app.command()
def import_checkpoint(
    source: Annotated[Path, typer.Argument(help="A published .pt file, or .safetensors with .config.json beside it.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The checkpoint to write, .safetensors.")],
) -> None:
    """Convert a published GHN-2 or GHN-3; no pickled code is run."""
    from ghn_service.hypernetwork.import_checkpoint import import_checkpoint as convert

    with _one_line_errors():
        summary = convert(source, output)
    typer.echo(f"{output}: {summary.kind}, {summary.num_parameters:,} parameters, sha256 {summary.digest}")


@app.command()
def pull(
    names: Annotated[list[str], typer.Argument(metavar="NAME|hf://OWNER/REPO/FILE[@REVISION]...")],
    force: Annotated[bool, typer.Option("--force", help="Fetch again what is in the cache.")] = False,
) -> None:
    """Fetch hypernetworks into the cache and convert them, so that they can be served at once, also offline."""
    from ghn_service.hypernetwork.checkpoint import load_checkpoint
    from ghn_service.hypernetwork.download import find_checkpoint

    for name in names:
        with _one_line_errors():
            path = find_checkpoint(name, force=force)
            _, summary = load_checkpoint(path)
        typer.echo(f"{name}: {summary.kind}, {summary.num_parameters:,} parameters, sha256 {summary.digest}")
        typer.echo(path)


@app.command()
def checkpoints(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the hypernetworks that have a name, and what is in the cache."""
    from ghn_service.hypernetwork.download import cached_checkpoint, cached_checkpoints
    from ghn_service.published import PUBLISHED

    known = {name: (item, cached_checkpoint(name)) for name, item in PUBLISHED.items()}
    found = {path for _, path in known.values()}
    others = {source: path for source, path in cached_checkpoints() if path not in found}
    if as_json:
        rows = [
            {"name": name, **dataclasses.asdict(item), "file": None if path is None else str(path)}
            for name, (item, path) in known.items()
        ]
        rows += [{"name": source, "file": str(path)} for source, path in others.items()]
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table("name", "kind", "parameters", "download", "trained on", "licence", "here", box=None, pad_edge=False)
    for name, (item, path) in known.items():
        download = "bundled" if "/" not in item.location else f"{4 * item.num_parameters / 1e6:,.0f} MB"
        here = "yes" if path is not None else "no: ghn-server pull " + name
        table.add_row(name, item.kind, f"{item.num_parameters:,}", download, item.dataset, item.licence, here)
    for source in others:
        table.add_row(source, "", "", "", "", "", "yes")
    Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False).print(table)
    typer.echo("others: hf://OWNER/REPO/FILE[@REVISION] or https://HOST/FILE, wherever a checkpoint can be given")


@app.command()
def show_checkpoint(
    source: Annotated[str, typer.Argument(metavar="FILE|NAME|hf://...", help="A checkpoint.")],
) -> None:
    """Print what a checkpoint holds, as JSON."""
    from ghn_service.hypernetwork.checkpoint import load_checkpoint
    from ghn_service.hypernetwork.config import encode_config
    from ghn_service.hypernetwork.download import find_checkpoint

    with _one_line_errors():
        _, summary = load_checkpoint(find_checkpoint(source))
    document = {
        "kind": summary.kind,
        "digest": summary.digest,
        "num_parameters": summary.num_parameters,
        "num_bytes": summary.num_bytes,
        **dataclasses.asdict(summary.card),
        "config": encode_config(summary.config),
    }
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False))


@app.command()
def add_source(
    networks: Annotated[
        list[str],
        typer.Argument(
            metavar="NETWORK...", help="ONNX files with weights, files of sources, timm:NAME or SCRIPT:FACTORY."
        ),
    ],
    to: Annotated[Path, typer.Option(metavar="DIR", help="The folder that `serve --sources DIR` reads.")],
    weights: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Weights of a network that has none: .safetensors or .pt.")
    ] = None,
    name: Annotated[str, typer.Option(help="Name in requests; else that of the file.")] = "",
    dataset: Annotated[str, typer.Option(help="Data that it was trained on.")] = "",
    licence: Annotated[str, typer.Option(help="Terms under which its weights may be used.")] = "",
    class_name: Annotated[list[str] | None, typer.Option(help="Names of the classes, in order; repeated.")] = None,
    accuracy: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of test images that it gets right.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Pixels per side; else what it declares, or 32.")
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Store half precision.")] = False,
) -> None:
    """Add trained networks to a library of sources; a running server finds them."""
    import torch

    from ghn_client.sources import Source as UserSource
    from ghn_client.sources import read_local
    from ghn_service.errors import ConfigurationError
    from ghn_service.transfer.library import load_source, save_source
    from ghn_service.transfer.source import Source, SourceCard
    from ghn_service.transfer.transfer import plan_transfer

    told: dict[str, Any] = {
        "dataset": dataset,
        "licence": licence,
        "class_names": tuple(class_name or ()),
        "accuracy": accuracy,
    }
    with _one_line_errors():
        if not to.is_dir():
            raise ConfigurationError(f"there is no folder {str(to)!r}")
        if len(networks) > 1 and (weights is not None or name):
            raise ConfigurationError("--weights and --name belong to one network; add one at a time")
        for network in networks:
            example = (1, 3, image_size, image_size) if image_size else None
            local = read_local(UserSource(network, example, weights, name), (1, 3, 32, 32))
            source = Source(local.name, local.structure, local.tensors, SourceCard(**local.card))
            if local.path is not None:
                source = dataclasses.replace(load_source(local.path), name=local.name)
            plan_transfer(source, source.structure)  # what the service cannot read or has no weights is refused here
            given = {key: value for key, value in told.items() if value not in ("", (), None)}
            summary = save_source(
                to / f"{source.name}.safetensors",
                source.structure,
                source.tensors,
                card=dataclasses.replace(source.card, **given),
                dtype=torch.float16 if half else None,
            )
            typer.echo(f"{summary.name}: {summary.num_parameters:,} values, sha256 {summary.digest}")


def main() -> None:
    """Entry point of ``ghn-server``."""
    app()


if __name__ == "__main__":
    main()
