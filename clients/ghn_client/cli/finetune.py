"""What ``ghn-client plan`` and ``finetune`` do: find a network, start it, tune it, write what was learned."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import nn
from torch.utils._pytree import tree_leaves

from ghn_client.atomic_file import write_file
from ghn_client.batchnorm import UPDATE, evaluation_mode, travelling_statistics
from ghn_client.cli.options import Server, Sources, Tuning, check_targets, messages, warn
from ghn_client.errors import InvalidOptionError, UnsupportedModuleError
from ghn_client.finetune.delta import save_delta
from ghn_client.finetune.fit import EpochReport, FitSettings, fit
from ghn_client.finetune.handle import FineTuneHandle
from ghn_client.finetune.images import ImageBatches, load_images
from ghn_client.finetune.norm_only import norm_only
from ghn_client.finetune.planner import NetworkFacts, Plan, facts_of_module
from ghn_client.finetune.planner import plan as make_plan
from ghn_client.finetune.strategies import prepare, strategy_of
from ghn_client.initialization import measure_batchnorm
from ghn_client.networks import DEFAULT_IMAGE_SIZE, find_network, image_example
from ghn_client.onnx.edit import OnnxModel, parse_onnx, read_model, write_model
from ghn_client.onnx.export import read_source
from ghn_client.onnx.facts import facts_of_onnx
from ghn_client.onnx.fill import fill_model
from ghn_client.onnx.torch_module import input_shape, module_from_onnx, to_onnx
from ghn_client.options import parse_pairs
from ghn_client.prediction import Prediction

_UNITS = {"k": 2**10, "m": 2**20, "g": 2**30}


def plan_network(model: str, memory: str, **settings: Any) -> Plan:
    """The plan for the network that ``SCRIPT:FACTORY`` or a path names, within ``memory`` such as ``500M``."""
    unit = _UNITS.get(memory[-1:].lower(), 1)
    number = memory[:-1] if unit > 1 else memory
    if memory and not number.replace(".", "", 1).isdigit():
        raise InvalidOptionError(f"expected a size such as 500M or 2G, got {memory!r}")
    facts = _facts(find_network(model))
    return make_plan(facts, memory_bytes=int(float(number) * unit) if memory else None, **settings)


def _facts(network: nn.Module | Path) -> NetworkFacts:
    return facts_of_onnx(network) if isinstance(network, Path) else facts_of_module(network)


def tune(model: str, server: Server, tuning: Tuning, sources: Sources) -> tuple[dict[str, Any], str]:
    """Tunes the network that ``model`` names and writes the delta; the outcome for programs, and one for people."""
    starts = {"--weights": tuning.weights, "--own-start": tuning.own_start, "--source": sources.source}
    if len(given := [flag for flag, value in starts.items() if value]) > 1:
        raise InvalidOptionError(f"{' and '.join(given)} ask for different starts; give one")
    targets = {"--output": tuning.output, "--model-out": tuning.model_out, "--resume": tuning.resume}
    check_targets(targets, [Path(model), tuning.weights, sources.source_weights, Path(sources.source)])
    _require_device(tuning.device)
    torch.manual_seed(tuning.seed)
    network = find_network(model)
    if tuning.model_out is not None and tuning.model_out.suffix == ".onnx" and not isinstance(network, Path):
        raise InvalidOptionError("--model-out can be an ONNX file only where the network was given as one")
    strategy = strategy_of(tuning.strategy, options := _strategy_options(tuning, samples=1))
    (_, channels, _, size), outputs = _shape_and_outputs(network, tuning)
    training, held_out = load_images(tuning.data, image_size=size, channels=channels, limit=tuning.limit)
    if outputs and training.num_classes > outputs:
        raise InvalidOptionError(
            f"expected a network with at least {training.num_classes} outputs, one for each class of {tuning.data}, "
            f"got one with {outputs}"
        )
    if strategy is norm_only and "missing" not in options:
        _require_norm_layers(network)
    start = _start(network, server, tuning, sources)
    for sentence in start.prediction.warnings if start.prediction is not None else ():
        warn(sentence)

    def show(epoch: EpochReport) -> None:
        accuracy = "" if epoch.accuracy is None else f", accuracy {epoch.accuracy:.2%}"
        messages().print(f"epoch {epoch.epoch}: loss {epoch.train_loss:.4f}{accuracy} ({epoch.seconds:.1f} s)")

    batches = ImageBatches(training, batch_size=tuning.batch_size, augment=True, seed=tuning.seed)
    if start.prediction is not None:
        messages().print(f"BatchNorm: {measure_batchnorm(start.network, batches, start.prediction)}")
    handle = prepare(start.network, tuning.strategy, **_strategy_options(tuning, len(training.labels)))
    messages().print(repr(handle))
    try:
        report = fit(
            handle,
            batches,
            settings=FitSettings(epochs=tuning.epochs, learning_rate=tuning.learning_rate, patience=tuning.patience),
            validation=ImageBatches(held_out, batch_size=tuning.batch_size, augment=False),
            device=tuning.device,
            checkpoint=tuning.resume,
            on_epoch=show,
        )
    except KeyboardInterrupt:
        save_delta(handle, tuning.output, request=start.request if _is_complete(handle) else None)
        again = (
            f"the same command goes on from {tuning.resume}" if tuning.resume else "with --resume FILE it could go on"
        )
        messages().print(f"{tuning.output} has the best of the epochs that were finished; {again}")
        raise
    size = save_delta(handle, tuning.output, request=start.request if _is_complete(handle) else None)
    trainable, total = handle.num_trainable, handle.num_total  # merging takes inserted layers off
    if tuning.model_out is not None and tuning.model_out.suffix == ".onnx":
        assert start.to_onnx is not None
        write_model(start.to_onnx(handle.merge()), tuning.model_out)
    elif tuning.model_out is not None:
        values = {name: value.cpu().contiguous().clone() for name, value in handle.merge().state_dict().items()}
        write_file(tuning.model_out, save(values))
    document = {
        "strategy": handle.strategy,
        "trainable": trainable,
        "total": total,
        "accuracy": report.accuracy,
        "best_epoch": report.best_epoch,
        "epochs": len(report.epochs),
        "delta": str(tuning.output),
        "delta_bytes": size,
        "request": start.request,
        "trust": dataclasses.asdict(start.prediction.trust) if start.prediction is not None else None,
    }
    accuracy = "" if report.accuracy is None else f", accuracy {report.accuracy:.2%} (epoch {report.best_epoch})"
    tuned = f"{trainable:,} of {total:,} parameters tuned{accuracy}"
    return document, f"{tuned}; {tuning.output} has {size:,} bytes"


def _require_device(name: str) -> None:
    """Refuses a device that this machine, or this build of torch, does not have."""
    try:
        torch.zeros(1, device=name).item()
    except Exception as error:  # torch raises many types, an AssertionError where it was built without CUDA
        raise InvalidOptionError(f"cannot compute on the device {name!r}: {error}", field="device") from error


def _require_norm_layers(network: nn.Module | Path) -> None:
    """Refuses a network whose norm layers are to be tuned and that has none; says why a file may have lost them."""
    if not _facts(network).norm_parameters:
        raise UnsupportedModuleError(
            "this network has no norm layer to tune. A file that torch.onnx.export writes by default has lost its "
            "BatchNorm: export without optimisation (torch.onnx.export(model.train(), args, optimize=False), "
            "or training=TrainingMode.TRAINING and do_constant_folding=False for the older exporter), or use "
            "ghn_client.export_architecture; to tune this one, insert norm layers: --option missing=insert"
        )


def _strategy_options(tuning: Tuning, samples: int) -> dict[str, Any]:
    """The options of the strategy; values are JSON where they can be read as such, else text."""
    values: dict[str, Any] = {}
    for key, value in parse_pairs(tuning.option or (), "--option KEY=VALUE").items():
        name = key.replace("-", "_")
        values[name] = value
        with contextlib.suppress(json.JSONDecodeError):
            values[name] = json.loads(value)
    if tuning.strategy == "additive" and "width" not in values:
        values.setdefault("samples", samples)
        values.setdefault("changed", max(1, samples // 20))
    return values


def _is_complete(handle: FineTuneHandle) -> bool:
    """Whether request and delta give the whole network: measured statistics must travel, since no request has them."""
    travelling = {name.removeprefix("base.") for part in handle.parts for name in part.buffers}
    return travelling.issuperset(travelling_statistics(handle.base, UPDATE))


class _Start(NamedTuple):
    """A network with its starting weights, and where they are from; None for its own weights.

    ``request`` is what gives these weights again, as far as that is known. ``to_onnx`` turns the tuned module into a
    filled file, where the network came from one.
    """

    network: nn.Module
    prediction: Prediction | None
    request: dict[str, Any] | None
    to_onnx: Callable[[nn.Module], OnnxModel] | None = None


def _shape_and_outputs(network: nn.Module | Path, tuning: Tuning) -> tuple[tuple[int, ...], int]:
    """Shape (B, C, S, S) of the images that the network takes, and the logits that it returns; 0 for unknown ones."""
    if isinstance(network, Path):
        model = parse_onnx(network.read_bytes())
        del model.graph.input[1:]  # where weights are missing, they are inputs
        sizes = [axis.dim_value for axis in model.graph.output[0].type.tensor_type.shape.dim]
        return _image_shape(model, tuning.image_size), sizes[1] if len(sizes) == 2 else 0
    image = _image_of(network, tuning)
    place = next(network.parameters()).device
    try:
        with torch.no_grad(), evaluation_mode(network):
            logits: Any = network(torch.zeros(image.shape, device=place))
    except Exception as error:  # whatever a foreign forward raises
        raise InvalidOptionError(
            f"{type(network).__name__} cannot be called with images {tuple(image.shape)} (--image-size): {error}"
        ) from error
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2:
        found = f"shape {tuple(logits.shape)}" if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise InvalidOptionError(f"expected a network that returns logits (B, classes), got {found}")
    return tuple(image.shape), logits.shape[1]


def _image_of(network: nn.Module, tuning: Tuning) -> torch.Tensor:
    example = image_example(network, tuning.image_size)
    image = example if isinstance(example, torch.Tensor) else next(iter(tree_leaves(example)), None)
    shape = tuple(image.shape) if isinstance(image, torch.Tensor) else ()
    if not isinstance(image, torch.Tensor) or len(shape) != 4 or shape[1] not in (1, 3):
        raise InvalidOptionError(
            f"expected a network of images, gray (B, 1, S, S) or in colour (B, 3, S, S), {type(network).__name__} "
            f"takes {shape or 'something else'}"
        )
    return image


def _start(path: nn.Module | Path, server: Server, tuning: Tuning, sources: Sources) -> _Start:
    """The network with the weights to start from."""
    if isinstance(path, nn.Module):
        prediction, request = _predict(path, image_example(path, tuning.image_size), server, tuning, sources)
        if prediction is not None:
            messages().print(str(prediction.load_into(path)))
        return _Start(path, prediction, request)
    (prediction, request), parameters = _predict(path, None, server, tuning, sources), None
    if prediction is None:
        filled = read_model(path)
    else:
        filled = fill_model(prediction, prediction.source or read_source(path))
        parameters = {*prediction, *(note.initializer for note in prediction.notes.values() if note.initializer)}
        messages().print(f"{len(prediction)} tensors filled; trust: {prediction.trust}")
    shape = _image_shape(filled, tuning.image_size)
    example = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    network = module_from_onnx(filled, example, parameters=parameters)
    return _Start(network, prediction, request, lambda tuned: to_onnx(tuned, network, filled))


def _image_shape(model: OnnxModel, wanted: int | None) -> tuple[int, ...]:
    """Shape of an example, with the sizes that the file leaves free filled in."""
    shape = input_shape(model)
    fits = len(shape) == 4 and shape[1] in (0, 1, 3) and shape[2] == shape[3]
    if not fits or (wanted is not None and shape[3] not in (0, wanted)):
        size = wanted or "S"
        raise InvalidOptionError(
            f"expected an input of square images, gray (B, 1, {size}, {size}) or in colour (B, 3, {size}, {size}), "
            f"the file has {shape}"
        )
    size = shape[3] or wanted or DEFAULT_IMAGE_SIZE
    return (shape[0] or 1, shape[1] or 3, size, size)


def _predict(
    architecture: nn.Module | Path, example: Any, server: Server, tuning: Tuning, sources: Sources
) -> tuple[Prediction | None, dict[str, Any] | None]:
    """The weights to start from and what they were asked with; None for the network's own."""
    if tuning.own_start:
        return None, None
    if tuning.weights is not None:
        prediction = Prediction.load(tuning.weights)
    else:
        with server.connect() as client:
            prediction = client.predict(
                architecture, example, seed=tuning.seed, model=tuning.model, source=sources.chosen()
            )
    keys = ("graph_digest", "model", "model_digest", "seed", "dtype")
    request = {key: getattr(prediction.metadata, key) for key in keys}
    if prediction.transfer is None:
        return prediction, request
    if tuning.weights is not None:  # a file does not say what was asked of its source
        return prediction, None
    found = prediction.transfer.source
    return prediction, request | {"source": f"{found.name}@{found.digest}", "class_layer": sources.class_layer.value}
