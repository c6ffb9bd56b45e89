"""The commands. Data goes to stdout, words to stderr; ``docs/client.md`` has the exit codes."""

from __future__ import annotations

import dataclasses
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from ghn_client import __version__
from ghn_client.cli.options import (
    Classifier,
    Commands,
    Dtype,
    ElementType,
    Head,
    ImageSize,
    Json,
    LowRank,
    Model,
    NamedNetwork,
    Network,
    Server,
    ShowAll,
    Sources,
    Tuning,
    check_targets,
    command,
    print_json,
    warn,
)
from ghn_client.errors import InvalidOptionError

DEFAULT_HEALTH_ADDRESS = "localhost:50051"
HEALTH_TIMEOUT_S = 5.0
STREAM = "-"
"""In the place of a file: stdin for the network, stdout for its weights."""

app = typer.Typer(
    cls=Commands,
    help="Predicts starting weights of neural networks from their architecture alone.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ghn-client {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of the command as a whole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """Where the results of a prediction go."""

    output: Annotated[
        Path | None,
        Option("--output", "-o", metavar="FILE", help="The weights, as safetensors; - for stdout."),
    ] = None
    onnx_out: Annotated[Path | None, Option(metavar="FILE", help="The model with its predicted weights, too.")] = None
    report: Annotated[
        Path | None,
        Option(metavar="FILE", help="The page of the prediction: FILE.html for people, FILE.json for programs."),
    ] = None

    def check(self, model_file: Path, weights: Path) -> None:
        """Refuses what ``check_targets`` refuses, and reports of an unknown kind."""
        output = weights if str(weights) != STREAM else None
        check_targets({"--output": output, "--onnx-out": self.onnx_out, "--report": self.report}, [model_file])
        if self.report is not None and self.report.suffix.lower() not in (".json", ".html"):
            raise InvalidOptionError(f"expected --report FILE.json or FILE.html, got {str(self.report)!r}")


@command(app)
def predict(
    server: Server,
    network: Network,
    targets: Targets,
    sources: Sources,
    model: Model = "",
    image_size: ImageSize = None,
    dtype: ElementType = Dtype.FLOAT32,
    seed: Annotated[int, Option(min=0, max=2**64 - 1, help="The same seed gives the same bytes.")] = 0,
    step: Annotated[
        list[str] | None,
        Option(metavar="NAME:KEY=VALUE,...", help="Post-processing; may be repeated, applied in order."),
    ] = None,
    low_rank: LowRank = "",
    head: Classifier = Head.AUTO,
    include: Annotated[
        list[str] | None, Option(metavar="GLOB", help="Only tensors whose names match; may be repeated.")
    ] = None,
    show_all: ShowAll = False,
    as_json: Json = False,
) -> None:
    """Predict weights for a network, and write them to a file."""
    from ghn_client.cli import tables
    from ghn_client.networks import file_stem, find_network, image_example
    from ghn_client.report_page import write_report

    weights = targets.output or Path(STREAM if network == STREAM else f"{file_stem(network)}.safetensors")
    if str(weights) == STREAM and as_json:
        raise InvalidOptionError("the weights and --json both go to stdout; give --output FILE")
    targets.check(Path(network), weights)
    architecture = sys.stdin.buffer.read() if network == STREAM else find_network(network)
    example = None if isinstance(architecture, Path | bytes) else image_example(architecture, image_size)
    with server.connect() as client, tables.shown_progress() as on_progress:
        start = time.perf_counter()  # a server inside this process has started by now
        prediction = client.predict(
            architecture,
            example,
            dtype=dtype,
            seed=seed,
            steps=step or (),
            low_rank=low_rank or None,
            model=model,
            include=include or (),
            head=head,
            report=targets.report is not None,
            source=sources.chosen(),
            on_progress=on_progress,
        )
    if str(weights) == STREAM:
        sys.stdout.buffer.write(prediction.buffer)
        sys.stdout.buffer.flush()
    else:
        prediction.save(weights)
    if targets.onnx_out is not None:
        prediction.to_onnx(targets.onnx_out)
    for sentence in prediction.warnings:
        warn(sentence)
    if targets.report is not None and prediction.report is not None:
        write_report(prediction, targets.report)
    elif targets.report is not None:
        warn("the server sent no report; it may be older than this client")
    seconds = time.perf_counter() - start
    written = [str(path) for path in (weights, targets.onnx_out) if path is not None]
    if as_json:
        print_json(tables.prediction_document(prediction, written, seconds))
    elif str(weights) != STREAM:
        tables.print_prediction(prediction, written, seconds, show_all=show_all)


@command(app)
def analyze(
    server: Server,
    network: Network,
    sources: Sources,
    model: Model = "",
    image_size: ImageSize = None,
    dtype: ElementType = Dtype.FLOAT32,
    low_rank: LowRank = "",
    head: Classifier = Head.AUTO,
    show_all: ShowAll = False,
    as_json: Json = False,
) -> None:
    """Say what a prediction would do with each tensor; with --low-rank, what ranks cost and save in each layer."""
    from ghn_client.cli import tables
    from ghn_client.networks import find_network, image_example

    architecture = sys.stdin.buffer.read() if network == STREAM else find_network(network)
    example = None if isinstance(architecture, Path | bytes) else image_example(architecture, image_size)
    with server.connect() as client:
        analysis = client.analyze(
            architecture,
            example,
            dtype=dtype,
            model=model,
            low_rank=low_rank or None,
            source=sources.chosen(),
            head=head,
        )
    for sentence in analysis.warnings:
        warn(sentence)
    if as_json:
        print_json(dataclasses.asdict(analysis))
    else:
        tables.print_analysis(analysis, show_all=show_all)


@command(app)
def models(server: Server, as_json: Json = False) -> None:
    """List the hypernetworks that a server has loaded, and the trained networks of its library."""
    from ghn_client.cli import tables

    with server.connect() as client:
        found, sources, steps = client.models(), client.sources(), client.steps()
    if as_json:
        loaded, known = ([dataclasses.asdict(item) for item in found], [dataclasses.asdict(item) for item in sources])
        print_json({"models": loaded, "sources": known, "steps": list(steps)})
    else:
        tables.print_models(found, sources, steps)


@command(app)
def health(
    server: Server,
    live: Annotated[bool, Option("--live", help="Ask only whether the server is alive.")] = False,
    as_json: Json = False,
) -> None:
    """Say whether a server is alive and can predict; exits with 0 if so, 1 if it is not ready, 5 if it is not there."""
    # Health needs no token, and a server inside this process would be pointless.
    address, timeout = server.address or DEFAULT_HEALTH_ADDRESS, server.timeout or HEALTH_TIMEOUT_S
    server = dataclasses.replace(server, address=address, timeout=timeout, checkpoint=None)
    with server.connect(needs_token=False) as client:
        state = client.health()
    if as_json:
        print_json(dataclasses.asdict(state))
    else:
        typer.echo("ready" if state.ready else "alive, but not ready" if state.alive else "not there")
    if not (state.ready or (live and state.alive)):
        raise typer.Exit(1 if state.alive else 5)


@command(app)
def plan(
    network: NamedNetwork,
    samples: Annotated[int, Option(min=1, metavar="N", help="Training samples.")],
    changed: Annotated[int | None, Option(metavar="M", help="Labels that have to change; all by default.")] = None,
    classes: Annotated[int | None, Option(metavar="C", help="Classes; those of the head by default.")] = None,
    memory: Annotated[str, Option(metavar="SIZE", help="Memory for gradients and optimizer, such as 500M.")] = "",
    rank: Annotated[int, Option(min=1, help="Of the low-rank update.")] = 8,
    optimizer: Annotated[str, Option(help="sgd or adamw.")] = "sgd",
    as_json: Json = False,
) -> None:
    """Say what each way of fine-tuning would train, store and be able to change for a network."""
    from ghn_client.cli.finetune import plan_network

    made = plan_network(
        network, memory, samples=samples, changed=changed, classes=classes, rank=rank, optimizer=optimizer
    )
    typer.echo(made.to_json() if as_json else str(made))


@command(app)
def finetune(
    server: Server,
    network: NamedNetwork,
    tuning: Tuning,
    sources: Sources,
    as_json: Json = False,
) -> None:
    """Predict, load, recalibrate, tune and save in one go, for image classification."""
    from ghn_client.cli.finetune import tune

    document, sentence = tune(network, server, tuning, sources)
    if as_json:
        print_json(document)
    else:
        typer.echo(sentence)
