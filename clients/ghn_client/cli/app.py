"""The commands. Data goes to stdout, words to stderr; ``docs/cli.md`` has the exit codes."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ghn_client import __version__
from ghn_client.cli import options as shared
from ghn_client.cli import tuning
from ghn_client.cli.outcome import ending_well, refuse, warn
from ghn_client.cli.progress import shown_progress

if TYPE_CHECKING:
    from ghn_client.prediction import Prediction

DEFAULT_HEALTH_ADDRESS = "localhost:50051"

app = typer.Typer(
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
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of the command as a whole."""


@app.command()
def predict(
    context: typer.Context,
    model_file: shared.ModelFile,
    output: shared.Output = None,
    onnx_out: shared.OnnxOut = None,
    address: shared.Address = "",
    checkpoint: shared.Checkpoint = None,
    model: shared.Model = "",
    dtype: shared.ElementType = shared.Dtype.FLOAT32,
    seed: shared.Seed = 0,
    step: shared.Steps = None,
    low_rank: shared.LowRank = "",
    include: shared.Include = None,
    report: shared.Report = None,
    show_all: shared.ShowAll = False,
    as_json: shared.Json = False,
    token_file: shared.TokenFile = None,
    tls: shared.Tls = False,
    root_certificates: shared.RootCertificates = None,
    certificate: shared.Certificate = None,
    private_key: shared.PrivateKey = None,
    timeout: shared.Timeout = None,
) -> None:
    """Predict weights for a network, and write them to a file."""
    with ending_well():
        server = shared.server_options(
            context, address, checkpoint, token_file, tls, root_certificates, certificate, private_key, timeout
        )
        weights = output or Path(model_file.with_suffix(".safetensors").name)
        _check_targets(model_file, weights, onnx_out, report)
        start = time.perf_counter()
        with shared.open_client(server) as client, shown_progress() as on_progress:
            prediction = client.predict(
                model_file,
                dtype=dtype.value,
                seed=seed,
                steps=step or (),
                low_rank=_parse_low_rank(low_rank),
                model=model,
                include=include or (),
                report=report is not None,
                on_progress=on_progress,
            )
        prediction.save(weights)
        if onnx_out is not None:
            prediction.to_onnx(onnx_out)
        if report is not None:
            _write_report(prediction, report)
        seconds = time.perf_counter() - start
        _report_prediction(prediction, weights, onnx_out, seconds, show_all=show_all, as_json=as_json)


def _check_targets(model_file: Path, weights: Path, onnx_out: Path | None, report: Path | None) -> None:
    """Refuses to overwrite the model, to write two things into one file, or to write where it cannot be."""
    targets = [target for target in (weights, onnx_out, report) if target is not None]
    for target in targets:
        if target.exists() and model_file.exists() and target.samefile(model_file):
            raise refuse(f"{str(target)!r} is the model itself; give another file to write to")
        if not target.parent.is_dir():
            raise refuse(f"the folder {str(target.parent)!r} does not exist")
    if len({target.absolute() for target in targets}) < len(targets):
        raise refuse("two of --output, --onnx-out and --report name the same file")
    if report is not None and report.suffix.lower() not in (".json", ".html"):
        raise refuse(f"expected --report FILE.json or FILE.html, got {str(report)!r}")


def _write_report(prediction: Prediction, path: Path) -> None:
    from ghn_client.report_html import write_report

    if prediction.report is None:
        warn("the server sent no report; it may be older than this client")
    else:
        write_report(prediction.report, path)


def _parse_low_rank(text: str) -> dict[str, Any] | None:
    if not text:
        return None
    values: dict[str, Any] = {}
    for pair in text.split(","):
        key, separator, value = pair.partition("=")
        if not separator:
            raise refuse(f"expected --low-rank RULE=VALUE[,method=M], got {text!r}")
        try:
            number = float(value)
        except ValueError:
            values[key.strip()] = value.strip()
        else:
            values[key.strip()] = int(number) if number.is_integer() and key.strip() != "energy" else number
    return values


def _report_prediction(
    prediction: Prediction, weights: Path, onnx_out: Path | None, seconds: float, *, show_all: bool, as_json: bool
) -> None:
    from ghn_client.cli.tables import bytes_text, data_console, print_prediction

    for sentence in prediction.warnings:
        warn(sentence)
    metadata = prediction.metadata
    if as_json:
        _print_json(
            {
                "output": str(weights),
                "onnx_output": str(onnx_out) if onnx_out else None,
                "bytes": len(prediction.buffer),
                "model": metadata.model,
                "model_digest": metadata.model_digest,
                "graph_digest": metadata.graph_digest,
                "seed": metadata.seed,
                "dtype": metadata.dtype,
                "num_parameters": prediction.num_parameters,
                "tensors": [
                    {
                        "name": name,
                        "shape": list(tensor.shape),
                        "origin": prediction.origins.get(name, ""),
                        "torch_name": prediction.notes[name].torch_name if name in prediction.notes else "",
                    }
                    for name, tensor in prediction.items()
                ],
                "warnings": list(prediction.warnings),
                "server_seconds": dict(prediction.seconds),
                "seconds": round(seconds, 3),
            }
        )
        return
    console = data_console()
    print_prediction(console, prediction, show_all=show_all)
    written = f"{weights} ({bytes_text(len(prediction.buffer))})" + (f" and {onnx_out}" if onnx_out else "")
    console.print(f"written to {written} in {seconds:.1f} s; hypernetwork {metadata.model}, seed {metadata.seed}")


@app.command()
def analyze(
    context: typer.Context,
    model_file: shared.ModelFile,
    address: shared.Address = "",
    checkpoint: shared.Checkpoint = None,
    model: shared.Model = "",
    dtype: shared.ElementType = shared.Dtype.FLOAT32,
    low_rank: shared.LowRank = "",
    show_all: shared.ShowAll = False,
    as_json: shared.Json = False,
    token_file: shared.TokenFile = None,
    tls: shared.Tls = False,
    root_certificates: shared.RootCertificates = None,
    certificate: shared.Certificate = None,
    private_key: shared.PrivateKey = None,
    timeout: shared.Timeout = None,
) -> None:
    """Say what a prediction would do with each tensor; with --low-rank, what ranks cost and save in each layer."""
    with ending_well():
        server = shared.server_options(
            context, address, checkpoint, token_file, tls, root_certificates, certificate, private_key, timeout
        )
        with shared.open_client(server) as client:
            analysis = client.analyze(model_file, dtype=dtype.value, model=model, low_rank=_parse_low_rank(low_rank))
        for sentence in analysis.warnings:
            warn(sentence)
        if as_json:
            _print_json(dataclasses.asdict(analysis))
        else:
            from ghn_client.cli.tables import data_console, print_analysis, print_low_rank

            print_analysis(data_console(), analysis, show_all=show_all)
            if analysis.low_rank:
                print_low_rank(data_console(), analysis.low_rank)


@app.command()
def models(
    context: typer.Context,
    address: shared.Address = "",
    checkpoint: shared.Checkpoint = None,
    as_json: shared.Json = False,
    token_file: shared.TokenFile = None,
    tls: shared.Tls = False,
    root_certificates: shared.RootCertificates = None,
    certificate: shared.Certificate = None,
    private_key: shared.PrivateKey = None,
    timeout: shared.Timeout = None,
) -> None:
    """List the hypernetworks that a server has loaded."""
    with ending_well():
        server = shared.server_options(
            context, address, checkpoint, token_file, tls, root_certificates, certificate, private_key, timeout
        )
        with shared.open_client(server) as client:
            found, steps = client.models(), client.steps()
        if as_json:
            _print_json({"models": [dataclasses.asdict(item) for item in found], "steps": list(steps)})
        else:
            from ghn_client.cli.tables import data_console, print_models

            console = data_console()
            print_models(console, found)
            console.print(f"post-processing steps: {', '.join(steps) or 'none'}")


@app.command()
def health(
    address: shared.Address = DEFAULT_HEALTH_ADDRESS,
    live: Annotated[bool, typer.Option("--live", help="Ask only whether the server is alive.")] = False,
    as_json: shared.Json = False,
    tls: shared.Tls = False,
    root_certificates: shared.RootCertificates = None,
    certificate: shared.Certificate = None,
    private_key: shared.PrivateKey = None,
    timeout: shared.Timeout = 5.0,
) -> None:
    """Say whether a server is alive and can predict; exits with 0 if so, 1 if it is not ready, 5 if it is not there."""
    with ending_well():
        server = shared.ServerOptions(
            address or DEFAULT_HEALTH_ADDRESS,
            tls=tls,
            root_certificates=root_certificates,
            certificate=certificate,
            private_key=private_key,
            timeout_s=timeout,
        )
        with shared.open_client(server) as client:
            state = client.health()
        if as_json:
            _print_json(dataclasses.asdict(state))
        else:
            typer.echo("ready" if state.ready else "alive, but not ready" if state.alive else "not there")
        if not (state.ready or (live and state.alive)):
            raise typer.Exit(1 if state.alive else 5)


def _print_json(document: Any) -> None:
    json.dump(document, sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")
    sys.stdout.flush()


app.command()(tuning.plan)
app.command()(tuning.finetune)
