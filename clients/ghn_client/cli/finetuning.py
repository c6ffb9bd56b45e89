"""What ``ghn-client finetune`` does: load, tune, evaluate, save."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ghn_client.atomic_file import write_file
from ghn_client.cli.networks import Start, StartOptions, start_network
from ghn_client.cli.outcome import messages, refuse

if TYPE_CHECKING:
    from ghn_client.finetune.fit import EpochReport, FitReport
    from ghn_client.finetune.handle import FineTuneHandle
    from ghn_client.finetune.images import ImageSet


@dataclass(frozen=True)
class Tuning:
    """How a network is tuned; the options of the command of the same names."""

    strategy: str
    options: list[str]
    epochs: int
    learning_rate: float
    batch_size: int
    limit: int | None
    patience: int | None
    checkpoint: Path | None
    device: str
    seed: int


def tune(
    model: str, data: Path, start: StartOptions, tuning: Tuning, output: Path, model_out: Path | None, *, as_json: bool
) -> None:
    """Tunes the network that ``model`` names, writes the delta and prints the outcome.

    Raises:
        GhnClientError: An option is impossible, the network or the data cannot be read, or no weights come.
    """
    import torch

    from ghn_client.finetune.delta import save_delta
    from ghn_client.finetune.images import load_images

    torch.manual_seed(tuning.seed)
    begun = start_network(model, start)
    if model_out is not None and model_out.suffix == ".onnx" and begun.to_onnx is None:
        raise refuse("--model-out can be an ONNX file only where the network was given as one")
    training, validation = load_images(data, image_size=begun.image_size, limit=tuning.limit)
    handle, report = _fit(begun, training, validation, tuning)
    request = begun.request
    size = save_delta(handle, output, request=request if _is_complete(handle) else None)
    if model_out is not None:
        _save_model(handle, begun, model_out)
    _report(handle, report, output, size, request, as_json=as_json)


def _fit(start: Start, training: ImageSet, validation: ImageSet, tuning: Tuning) -> tuple[FineTuneHandle, FitReport]:
    from ghn_client.batchnorm import recalibrate_batchnorm
    from ghn_client.finetune.fit import FitSettings, fit
    from ghn_client.finetune.images import ImageBatches
    from ghn_client.finetune.strategies import prepare

    batches = ImageBatches(training, batch_size=tuning.batch_size, augment=True, seed=tuning.seed)
    held_out = ImageBatches(validation, batch_size=tuning.batch_size, augment=False)
    if start.request is not None:
        recalibrate_batchnorm(start.network, batches, num_batches=20)
    options = _options(tuning.options, tuning.strategy, len(training.labels))
    handle = prepare(start.network, tuning.strategy, **options)
    messages().print(repr(handle))
    report = fit(
        handle,
        batches,
        settings=FitSettings(epochs=tuning.epochs, learning_rate=tuning.learning_rate, patience=tuning.patience),
        validation=held_out,
        device=tuning.device,
        checkpoint=tuning.checkpoint,
        on_epoch=_show,
    )
    return handle, report


def _is_complete(handle: FineTuneHandle) -> bool:
    """Whether request and delta give the whole network: measured statistics must travel, since no request has them."""
    travelling = {name.removeprefix("base.") for part in handle.parts for name in part.buffers}
    measured = {name for name, _ in handle.base.named_buffers() if name.endswith(("running_mean", "running_var"))}
    return measured <= travelling


def _save_model(handle: FineTuneHandle, start: Start, path: Path) -> None:
    from safetensors.torch import save

    if path.suffix == ".onnx":
        from ghn_client.onnx.edit import write_model

        assert start.to_onnx is not None
        write_model(start.to_onnx(handle.merge()), path)
        return
    values = {name: value.cpu().contiguous().clone() for name, value in handle.merge().state_dict().items()}
    write_file(path, save(values))


def _options(pairs: list[str], strategy: str, samples: int) -> dict[str, Any]:
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
