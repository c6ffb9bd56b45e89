"""The commands ``plan`` and ``finetune``; ``app.py`` registers them, ``docs/finetuning.md`` describes them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ghn_client.cli import options as shared
from ghn_client.cli.finetuning import Tuning, tune
from ghn_client.cli.networks import StartOptions, build_network, is_factory
from ghn_client.cli.outcome import ending_well, refuse

_UNITS = {"k": 2**10, "m": 2**20, "g": 2**30}


def plan(
    model: Annotated[
        str, typer.Argument(metavar="MODEL.onnx|SCRIPT:FACTORY", help="The network; weights may be missing.")
    ],
    samples: Annotated[int, typer.Option(min=1, metavar="N", help="Training samples.")],
    changed: Annotated[
        int | None, typer.Option(metavar="M", help="Labels that have to change; all by default.")
    ] = None,
    classes: Annotated[int | None, typer.Option(metavar="C", help="Classes; those of the head by default.")] = None,
    memory: Annotated[str, typer.Option(metavar="SIZE", help="Memory for gradients and optimizer, such as 500M.")] = "",
    rank: Annotated[int, typer.Option(min=1, help="Of the low-rank update.")] = 8,
    optimizer: Annotated[str, typer.Option(help="sgd or adamw.")] = "sgd",
    as_json: shared.Json = False,
) -> None:
    """Say what each way of fine-tuning would train, store and be able to change for a network."""
    with ending_well():
        from ghn_client.finetune.planner import facts_of_module
        from ghn_client.finetune.planner import plan as make_plan
        from ghn_client.onnx.facts import facts_of_onnx

        facts = facts_of_module(build_network(model)) if is_factory(model) else facts_of_onnx(model)
        result = make_plan(
            facts,
            samples=samples,
            changed=changed,
            classes=classes,
            memory_bytes=_bytes(memory),
            rank=rank,
            optimizer=optimizer,
        )
        typer.echo(result.to_json() if as_json else str(result))


def finetune(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="SCRIPT:FACTORY|MODEL.onnx", help="A function that returns the network, or a file.")
    ],
    data: Annotated[Path, typer.Option(metavar="DIR", help="Images: parquet, cifar-10-batches-py or class folders.")],
    strategy: Annotated[str, typer.Option(help="norm-only, additive, low-rank-update, all, ...")] = "norm-only",
    option: Annotated[
        list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="Of the strategy; may be repeated.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where the delta goes.")] = Path(
        "delta.safetensors"
    ),
    model_out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the tuned network, too: .safetensors, or .onnx for an ONNX file."),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Predicted weights to start from, instead of asking a server.")
    ] = None,
    own_start: Annotated[
        bool, typer.Option("--own-start", help="Start from the network's own initial weights.")
    ] = False,
    epochs: Annotated[int, typer.Option(min=1)] = 10,
    learning_rate: Annotated[float, typer.Option("--lr", min=0.0)] = 0.05,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Pixels per side; what the file says, or 32, by default.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use at most so many images of each split.")] = None,
    patience: Annotated[int | None, typer.Option(min=1, help="Stop after so many epochs without progress.")] = None,
    resume: Annotated[Path | None, typer.Option(metavar="FILE", help="Checkpoint to write, and to go on from.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    address: shared.Address = "",
    checkpoint: shared.Checkpoint = None,
    hypernetwork: shared.Model = "",
    as_json: shared.Json = False,
    token_file: shared.TokenFile = None,
    tls: shared.Tls = False,
    root_certificates: shared.RootCertificates = None,
    certificate: shared.Certificate = None,
    private_key: shared.PrivateKey = None,
    timeout: shared.Timeout = None,
) -> None:
    """Predict, load, recalibrate, tune and save in one go, for image classification."""
    with ending_well():
        if weights is not None and own_start:
            raise refuse("--weights and --own-start ask for different starts; give one")
        server = shared.server_options(
            context, address, checkpoint, token_file, tls, root_certificates, certificate, private_key, timeout
        )
        start = StartOptions(server, weights, own_start, hypernetwork, seed, image_size)
        run = Tuning(strategy, option or [], epochs, learning_rate, batch_size, limit, patience, resume, device, seed)
        tune(model, data, start, run, output, model_out, as_json=as_json)


def _bytes(text: str) -> int | None:
    if not text:
        return None
    unit = _UNITS.get(text[-1].lower(), 1)
    number = text[:-1] if unit > 1 else text
    if not number.replace(".", "", 1).isdigit():
        raise refuse(f"expected a size such as 500M or 2G, got {text!r}")
    return int(float(number) * unit)
