"""``ghn-train``: train, watch and evaluate graph hypernetworks.

Examples:
    ghn-train fit --data data/cifar10 --out runs/first --set limits.minutes=60
    torchrun --nproc-per-node 4 -m ghn_service.training fit --data data/cifar10 --out runs/four
    ghn-train evaluate --checkpoint runs/first/ghn.safetensors --data data/cifar10
    ghn-train plot runs/first
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ghn_service.errors import GhnServiceError

app = typer.Typer(
    help="Train, watch and evaluate graph hypernetworks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

DataFolder = Annotated[Path, typer.Option("--data", help="Folder with labelled images (parquet, CIFAR batches, ...).")]
Changes = Annotated[
    Optional[list[str]], typer.Option("--set", metavar="NAME=VALUE", help="Change one setting; may be repeated.")
]
Config = Annotated[Optional[Path], typer.Option("--config", help="TOML file with settings.")]
Cache = Annotated[Optional[Path], typer.Option("--cache", help="Folder that keeps decoded images.")]


def _reported(command: Callable[..., None]) -> Callable[..., None]:
    """Turns errors of ours into one line on standard error and exit status 1."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
        try:
            command(*arguments, **options)
        except GhnServiceError as error:
            where = f"{error.field}: " if error.field and not str(error).startswith(error.field) else ""
            typer.echo(f"error: {where}{error}", err=True)
            raise typer.Exit(1) from error

    return run


@app.command()
@_reported
def fit(
    data: DataFolder,
    out: Annotated[Path, typer.Option("--out", help="Folder of the run: state, log, checkpoint.")],
    config: Config = None,
    changes: Changes = None,
    resume: Annotated[str, typer.Option(help="auto: go on with the run in --out; never: refuse to.")] = "auto",
    start_from: Annotated[
        Optional[Path], typer.Option(help="Checkpoint or state file whose weights a new run begins with.")
    ] = None,
    teacher: Annotated[Optional[Path], typer.Option(help="Soft labels made by ghn-train teacher.")] = None,
    cache: Cache = None,
) -> None:
    """Train a hypernetwork on random architectures and a folder of labelled images."""
    from ghn_service.training.fit import fit as run_fit
    from ghn_service.training.settings import load_settings

    settings = load_settings(config, changes or ())
    progress = run_fit(
        data, out, settings, resume=resume, start_from=start_from, teacher=teacher, cache=cache
    )
    typer.echo(
        f"{progress.networks} networks in {progress.step} steps and {progress.elapsed_s / 60:.1f} minutes; "
        f"checkpoint in {out}"
    )


@app.command()
@_reported
def plot(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    out: Annotated[Optional[Path], typer.Option("--out", help="SVG file; curves.svg in the folder where omitted.")] = None,
) -> None:
    """Draw the curves of a run."""
    from ghn_service.training.plot import plot_run

    typer.echo(str(plot_run(run, out)))


def main() -> None:
    """Entry point of ``ghn-train``."""
    app()


if __name__ == "__main__":
    main()
