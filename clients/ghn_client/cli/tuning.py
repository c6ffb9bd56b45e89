"""The commands ``plan`` and ``finetune``; ``app.py`` registers them, ``docs/finetuning.md`` describes them."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ghn_client.cli import options as shared
from ghn_client.cli.outcome import ending_well, messages, refuse

if TYPE_CHECKING:
    from torch import nn

    from ghn_client.finetune.fit import EpochReport, FitReport
    from ghn_client.finetune.handle import FineTuneHandle

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
        from ghn_client.finetune.plan import plan as make_plan
        from ghn_client.finetune.plan_facts import facts_of_module, facts_of_onnx

        is_factory = ":" in model and not Path(model).exists()
        facts = facts_of_module(_build(model)) if is_factory else facts_of_onnx(model)
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
        Path | None, typer.Option(metavar="FILE", help="Write all values of the tuned network, too, as safetensors.")
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
    image_size: Annotated[int, typer.Option(min=1, help="Pixels per side.")] = 32,
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
        import torch

        from ghn_client.finetune.delta import save_delta
        from ghn_client.finetune.fit import FitSettings, fit
        from ghn_client.finetune.image_data import ImageBatches, load_images
        from ghn_client.finetune.strategies import prepare
        from ghn_client.recalibrate import recalibrate_batchnorm

        if weights is not None and own_start:
            raise refuse("--weights and --own-start ask for different starts; give one")
        torch.manual_seed(seed)
        network = _build(model)
        training, validation = load_images(data, image_size=image_size, limit=limit)
        batches = ImageBatches(training, batch_size=batch_size, augment=True, seed=seed)
        held_out = ImageBatches(validation, batch_size=batch_size, augment=False)
        request = None
        if not own_start:
            server = shared.server_options(
                context, address, checkpoint, token_file, tls, root_certificates, certificate, private_key, timeout
            )
            request = _predict(network, weights, server, hypernetwork, seed, (1, 3, image_size, image_size))
            recalibrate_batchnorm(network, batches, num_batches=20)
        settings = _options(option or [], strategy, len(training.labels), network, (1, 3, image_size, image_size))
        handle = prepare(network, strategy, **settings)
        messages().print(repr(handle))
        report = fit(
            handle,
            batches,
            settings=FitSettings(epochs=epochs, learning_rate=learning_rate, patience=patience),
            validation=held_out,
            device=device,
            checkpoint=resume,
            on_epoch=_show,
        )
        size = save_delta(handle, output, request=request if _is_complete(handle) else None)
        if model_out is not None:
            _save_model(handle, model_out)
        _report(handle, report, output, size, request, as_json=as_json)


def _is_complete(handle: FineTuneHandle) -> bool:
    """Whether request and delta give the whole network: measured statistics must travel, since no request has them."""
    travelling = {name.removeprefix("base.") for part in handle.parts for name in part.buffers}
    measured = {name for name, _ in handle.base.named_buffers() if name.endswith(("running_mean", "running_var"))}
    return measured <= travelling


def _save_model(handle: FineTuneHandle, path: Path) -> None:
    from safetensors.torch import save_file

    values = {name: value.cpu().contiguous().clone() for name, value in handle.merge().state_dict().items()}
    save_file(values, str(path))


def _build(model: str) -> nn.Module:
    """The network that ``SCRIPT:FACTORY`` or ``MODEL.onnx`` names."""
    script, separator, factory = model.rpartition(":")
    if not separator:
        raise refuse(
            f"this needs a torch module: give SCRIPT.py:FACTORY or package.module:FACTORY, got {model!r}. An ONNX"
            " file has an architecture but no training code; convert it (for example with onnx2torch) in a factory"
        )
    if script.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(script).stem, script)
        if spec is None or spec.loader is None or not Path(script).is_file():
            raise refuse(f"the script {script!r} does not exist")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(script)
        except ModuleNotFoundError as error:
            raise refuse(f"cannot import {script!r}: {error}") from error
    made = getattr(module, factory, None)
    if made is None:
        raise refuse(f"{script!r} has no {factory!r}")
    network: nn.Module = made() if callable(made) else made
    return network


def _predict(
    network: nn.Module,
    weights: Path | None,
    server: shared.ServerOptions,
    hypernetwork: str,
    seed: int,
    shape: tuple[int, ...],
) -> dict[str, Any]:
    """Loads predicted weights into ``network``; returns the request that made them."""
    import torch

    from ghn_client.prediction import Prediction

    if weights is not None:
        prediction = Prediction.load(weights)
    else:
        with shared.open_client(server) as client:
            prediction = client.predict(network, torch.zeros(shape), seed=seed, model=hypernetwork)
    messages().print(str(prediction.load_into(network)))
    metadata = prediction.metadata
    return {
        "graph_digest": metadata.graph_digest,
        "model": metadata.model,
        "model_digest": metadata.model_digest,
        "seed": metadata.seed,
        "dtype": metadata.dtype,
    }


def _options(
    pairs: list[str], strategy: str, samples: int, network: nn.Module, shape: tuple[int, ...]
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator:
            raise refuse(f"expected --option KEY=VALUE, got {pair!r}")
        try:
            values[key.replace("-", "_")] = json.loads(value)
        except json.JSONDecodeError:
            values[key.replace("-", "_")] = value
    if strategy == "additive" and "width" not in values:
        values.setdefault("samples", samples)
        values.setdefault("changed", max(1, samples // 20))
    return values


def _show(epoch: EpochReport) -> None:
    accuracy = "" if epoch.accuracy is None else f", accuracy {epoch.accuracy:.2%}"
    messages().print(f"epoch {epoch.epoch}: loss {epoch.train_loss:.4f}{accuracy} ({epoch.seconds:.1f} s)")


def _report(
    handle: FineTuneHandle, report: FitReport, output: Path, size: int, request: dict[str, Any] | None, *, as_json: bool
) -> None:
    if as_json:
        document = {
            "strategy": handle.strategy,
            "trainable": handle.num_trainable,
            "total": handle.num_total,
            "accuracy": report.accuracy,
            "best_epoch": report.best_epoch,
            "epochs": len(report.epochs),
            "delta": str(output),
            "delta_bytes": size,
            "request": request,
        }
        json.dump(document, sys.stdout, indent=2)
        sys.stdout.write("\n")
        return
    accuracy = "" if report.accuracy is None else f", accuracy {report.accuracy:.2%} (epoch {report.best_epoch})"
    typer.echo(
        f"{handle.num_trainable:,} of {handle.num_total:,} parameters tuned{accuracy}; {output} has {size:,} bytes"
    )


def _bytes(text: str) -> int | None:
    if not text:
        return None
    unit = _UNITS.get(text[-1].lower(), 1)
    number = text[:-1] if unit > 1 else text
    if not number.replace(".", "", 1).isdigit():
        raise refuse(f"expected a size such as 500M or 2G, got {text!r}")
    return int(float(number) * unit)
