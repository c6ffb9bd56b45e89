"""``ghn-train``: train and evaluate graph hypernetworks.

Examples:
    ghn-train fit --data data/cifar10 --out runs/first --set limits.minutes=60
    torchrun --nproc-per-node 4 -m ghn_service.training fit --data data/cifar10 --out runs/four
    ghn-train source small_resnet --data data/cifar10 --out runs/small_resnet
    ghn-train evaluate --checkpoint runs/first/ghn.safetensors --data data/cifar10
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from ghn_client.atomic_file import write_file
from ghn_client.errors import GhnClientError
from ghn_service.errors import GhnServiceError, InvalidOptionError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

DataFolder = Annotated[Path, typer.Option("--data", help="Folder with labelled images (parquet, CIFAR batches, ...).")]
Cache = Annotated[Path | None, typer.Option("--cache", help="Folder that keeps decoded images.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ghn-train {version('ghn-service')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train and evaluate graph hypernetworks."""


def _reported(command: Callable[..., None]) -> Callable[..., None]:
    """Turns errors of ours into one line on standard error and exit status 1."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
        try:
            command(*arguments, **options)
        except (GhnServiceError, GhnClientError) as error:
            where = f"{error.field}: " if error.field and not str(error).startswith(error.field) else ""
            typer.echo(f"error: {where}{error}", err=True)
            raise typer.Exit(1) from error
        except OSError as error:  # a full disk, most often
            typer.echo(f"error: {error.filename or 'a file'}: {error.strerror or error}", err=True)
            raise typer.Exit(1) from error

    return run


@app.command()
@_reported
def fit(
    data: DataFolder,
    out: Annotated[Path, typer.Option("--out", help="Folder of the run: state, log, checkpoint.")],
    config: Annotated[Path | None, typer.Option(help="TOML file with settings.")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Change one setting; may be repeated.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Settings to begin with: gpu.")] = None,
    resume: Annotated[str, typer.Option(help="auto: go on with the run in --out; never: refuse to.")] = "auto",
    state_parts: Annotated[bool, typer.Option("--state-parts", help="Save states in files below 16 MiB.")] = False,
    start_from: Annotated[
        str | None,
        typer.Option(metavar="FILE|NAME|hf://...", help="Checkpoint or state whose weights a new run begins with."),
    ] = None,
    cache: Cache = None,
) -> None:
    """Train a hypernetwork on random architectures and a folder of labelled images."""
    from ghn_service.hypernetwork.download import find_checkpoint
    from ghn_service.training.run import fit as run_fit
    from ghn_service.training.settings import TrainingSettings, load_settings

    parts = [f"limits.state_part_bytes={15 * 2**20}"] if state_parts else []
    settings = load_settings(config, [*(changes or ()), *parts], TrainingSettings, preset=preset)
    start = find_checkpoint(start_from) if start_from else None
    progress = run_fit(data, out, settings, resume=resume, start_from=start, cache=cache)
    typer.echo(
        f"{progress.networks} networks in {progress.step} steps and {progress.elapsed_s / 60:.1f} minutes; "
        f"checkpoint in {out}"
    )


@app.command()
@_reported
def source(
    network: Annotated[str, typer.Argument(help="Name of a small or reference network, or a TOML file.")],
    data: DataFolder,
    out: Annotated[Path, typer.Option("--out", help="Folder of the run: state, and NETWORK.safetensors at the end.")],
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Change the recipe; may be repeated.")
    ] = None,
    licence: Annotated[str, typer.Option(help="Terms under which the weights may be used, for the card.")] = "",
    cache: Cache = None,
) -> None:
    """Train a small network, from which others take their weights, or go on with the run in --out."""
    from ghn_service.training.settings import SourceRecipe, load_settings
    from ghn_service.training.source import train_source

    recipe = load_settings(None, changes or (), SourceRecipe)
    summary = train_source(network, data, out, recipe, licence=licence, cache=cache)
    if summary is None:
        typer.echo(f"stopped; the same command goes on in {out}")
    else:
        typer.echo(f"{summary.name}: {summary.card.accuracy:.2%} of test images; sha256 {summary.digest}")


@app.command()
@_reported
def evaluate(
    checkpoint: Annotated[
        str, typer.Option(metavar="FILE|NAME|hf://...", help="File that ghn-train fit wrote, or a published one.")
    ],
    data: DataFolder,
    splits: Annotated[
        str, typer.Option(help="Splits, separated by commas, each with its number of networks if not --networks.")
    ] = "test,wide,deep,dense,bnfree,reference",
    networks: Annotated[int, typer.Option(help="Networks per split.")] = 50,
    test_images: Annotated[int, typer.Option(help="Test images for zero-shot accuracy.")] = 2000,
    precision: Annotated[str, typer.Option(help="Number format of zero-shot passes: float32, bfloat16.")] = "float32",
    fine_tune: Annotated[int, typer.Option(help="Networks in the fine-tuning comparison; 0: none.")] = 20,
    fine_tune_images: Annotated[
        str, typer.Option(help="Training-set sizes of the comparison, separated by commas; 0: all images.")
    ] = "0,1000",
    learning_rates: Annotated[str, typer.Option(help="Grid of the comparison, separated by commas.")] = "0.01,0.03,0.1",
    seeds: Annotated[int, typer.Option(help="Seeds of the comparison.")] = 1,
    largest_macs: Annotated[float, typer.Option(help="Leave networks of more multiply-adds per image out.")] = 1.5e9,
    novelty_networks: Annotated[int, typer.Option(help="Training networks in the novelty check; 0: none.")] = 32,
    baseline_only: Annotated[
        bool, typer.Option("--baseline-only", help="Measure only the He side, which serves every checkpoint.")
    ] = False,
    workers: Annotated[int, typer.Option(help="Processes, one thread each.")] = 2,
    minutes: Annotated[float | None, typer.Option(help="End after this time, with a report of what is known.")] = None,
    results: Annotated[
        Path | None, typer.Option(help="File of finished measurements, which are not repeated; in --out by default.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for evaluation.md and evaluation.json.")] = None,
    cache: Cache = None,
) -> None:
    """Measure a hypernetwork: zero-shot accuracy, fine-tuning against He initialisation, and novelty."""
    from ghn_service.hypernetwork.download import find_checkpoint
    from ghn_service.training.evaluation import report
    from ghn_service.training.evaluation.fine_tune import FineTuneSettings
    from ghn_service.training.evaluation.measurements import EvaluationSettings
    from ghn_service.training.evaluation.run import evaluate as run_evaluation

    settings = EvaluationSettings(
        splits=_splits(splits, networks),
        test_images=test_images,
        fine_tune_networks=fine_tune,
        fine_tune_images=_numbers(fine_tune_images, int, "fine-tune-images"),
        seeds=tuple(range(seeds)),
        fine_tune=FineTuneSettings(learning_rates=_numbers(learning_rates, float, "learning-rates")),
        novelty_networks=novelty_networks,
        zero_shot_precision=precision,
        largest_macs=largest_macs,
        is_baseline_only=baseline_only,
    )
    evaluation = run_evaluation(
        find_checkpoint(checkpoint),
        data,
        settings,
        workers=workers,
        cache=cache or (out / "cache" if out else None),
        results=results or (out / "measurements.jsonl" if out else None),
        minutes=minutes,
    )
    text = report.markdown_report(evaluation)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        write_file(out / "evaluation.md", text)
        write_file(out / "evaluation.json", report.json_report(evaluation))
    typer.echo(text)


def _splits(text: str, networks: int) -> dict[str, int]:
    """Splits with their numbers of networks, from ``test=50,wide``."""
    from ghn_architectures.generator import SPLITS

    known = SPLITS.keys() - {"train", "val"}
    counts: dict[str, int] = {}
    for part in text.split(","):
        name, _, count = part.partition("=")
        if name not in known or (count and not count.isdecimal()):
            raise InvalidOptionError(
                f"expected splits among {', '.join(sorted(known))}, perhaps with numbers (test=50), got {part!r}",
                field="splits",
            )
        counts[name] = int(count) if count else networks
    return counts


def _numbers(text: str, kind: Callable[[str], Any], field: str) -> tuple[Any, ...]:
    """Numbers separated by commas."""
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise InvalidOptionError(f"expected numbers separated by commas, got {text!r}", field=field) from error


def main() -> None:
    """Entry point of ``ghn-train``."""
    app()


if __name__ == "__main__":
    main()
