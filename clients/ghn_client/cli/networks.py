"""Networks that a command line names: a function of a script, or an ONNX file; and what they start from."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ghn_client.cli.options import ServerOptions, open_client
from ghn_client.cli.outcome import messages, refuse

if TYPE_CHECKING:
    import onnx
    from torch import nn

    from ghn_client.prediction import Prediction

DEFAULT_IMAGE_SIZE = 32


@dataclass(frozen=True)
class StartOptions:
    """What a network starts from.

    Attributes:
        server: That predicts.
        weights: Predicted weights in a file, instead.
        own: The network's own weights, instead.
        hypernetwork: Name of the hypernetwork; empty for the default.
        seed: Of the prediction.
        image_size: Pixels per side, ``None`` for what the file says, or 32.
    """

    server: ServerOptions
    weights: Path | None
    own: bool
    hypernetwork: str
    seed: int
    image_size: int | None


@dataclass(frozen=True, eq=False)
class Start:
    """A network with its starting weights.

    Attributes:
        network: The module.
        request: What the prediction was asked, ``None`` for its own weights.
        image_size: Pixels per side.
        to_onnx: Turns the tuned module into a filled file, where the network came from one.
    """

    network: nn.Module
    request: dict[str, Any] | None
    image_size: int
    to_onnx: Callable[[nn.Module], onnx.ModelProto] | None = None


def is_factory(model: str) -> bool:
    """Whether ``model`` is SCRIPT:FACTORY rather than the path of a file."""
    return ":" in model and not Path(model).exists()


def start_network(model: str, options: StartOptions) -> Start:
    """The network that ``SCRIPT:FACTORY`` or ``MODEL.onnx`` names, with the weights to start from.

    Raises:
        GhnClientError: It cannot be read, predicted for, or turned into a torch module.
    """
    if is_factory(model):
        return _start_of_factory(model, options)
    if not Path(model).is_file():
        raise refuse(f"expected SCRIPT.py:FACTORY, package.module:FACTORY or an ONNX file, {model!r} is none of them")
    return _start_of_file(Path(model), options)


def build_network(model: str) -> nn.Module:
    """What the function of ``SCRIPT.py:FACTORY`` or ``package.module:FACTORY`` returns."""
    script, _, factory = model.rpartition(":")
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


def _start_of_factory(model: str, options: StartOptions) -> Start:
    import torch

    network, size = build_network(model), options.image_size or DEFAULT_IMAGE_SIZE
    if options.own:
        return Start(network, None, size)
    prediction = _predict(network, torch.zeros(1, 3, size, size), options)
    messages().print(str(prediction.load_into(network)))
    return Start(network, _request(prediction), size)


def _start_of_file(path: Path, options: StartOptions) -> Start:
    import torch

    from ghn_client.onnx.edit import read_model
    from ghn_client.onnx.export import read_source
    from ghn_client.onnx.fill import fill_model
    from ghn_client.onnx.from_torch import to_onnx
    from ghn_client.onnx.to_torch import module_from_onnx

    parameters, prediction = None, None
    if options.own:
        filled = read_model(path)
    else:
        prediction = _predict(path, None, options)
        filled = fill_model(prediction, prediction.source or read_source(path))
        parameters = {*prediction, *(note.initializer for note in prediction.notes.values() if note.initializer)}
        messages().print(f"{len(prediction)} tensors filled")
    shape = _image_shape(filled, options.image_size)
    example = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    network = module_from_onnx(filled, example, parameters=parameters)
    request = None if prediction is None else _request(prediction)
    return Start(network, request, shape[-1], lambda tuned: to_onnx(tuned, network, filled))


def _image_shape(model: onnx.ModelProto, wanted: int | None) -> tuple[int, ...]:
    """Shape of an example, with the sizes that the file leaves free filled in."""
    from ghn_client.onnx.to_torch import input_shape

    shape = input_shape(model)
    fits = len(shape) == 4 and shape[1] in (0, 3) and shape[2] == shape[3]
    if not fits or (wanted is not None and shape[3] not in (0, wanted)):
        size = wanted or "S"
        raise refuse(f"expected an input of square colour images (B, 3, {size}, {size}), the file has {shape}")
    size = shape[3] or wanted or DEFAULT_IMAGE_SIZE
    return (shape[0] or 1, 3, size, size)


def _predict(architecture: Any, example: Any, options: StartOptions) -> Prediction:
    from ghn_client.prediction import Prediction

    if options.weights is not None:
        return Prediction.load(options.weights)
    with open_client(options.server) as client:
        return client.predict(architecture, example, seed=options.seed, model=options.hypernetwork)


def _request(prediction: Prediction) -> dict[str, Any]:
    metadata = prediction.metadata
    return {
        "graph_digest": metadata.graph_digest,
        "model": metadata.model,
        "model_digest": metadata.model_digest,
        "seed": metadata.seed,
        "dtype": metadata.dtype,
    }
