"""What a server is sent of an architecture: ONNX without weights, every parameter under its name in ``state_dict``.

For a module, measured ways (docs/client.md): torch's exporter with ``dynamo=True, optimize=False`` keeps every name,
but traces and prepares twice; the translation of the traced program alone takes a fraction of the trace's own time. So
that is tried first; what it cannot do takes torch's way, and as a last resort the older exporter, which needs a module
with memory.

The module is traced without memory for weights, in the mode that it is in, because auxiliary heads exist in training
mode only. What makes noise or gathers statistics (dropout, batch normalisation) is traced as in evaluation, so that it
stays one operator.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import logging
import os
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only

from ghn_client.errors import ExportError, InvalidArchitectureError
from ghn_client.onnx.strip import encode_structure, lift_constants, strip_weights
from ghn_client.onnx.translate import NotTranslatableError, translate

META = torch.device("meta")

Architecture = torch.nn.Module | str | Path | bytes
"""A torch module, the path of an ONNX file, or the bytes of one."""

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""What a module is called with; only shapes and types matter."""

_SHIFT = 2
"""Which operand of BatchNormalization the bias is; running statistics come after it."""

_LOGGER = logging.getLogger(__name__)
_TURN = threading.Lock()  # torch traces with global state: exports of several threads take turns


@dataclass(frozen=True, eq=False)
class ModelSource:
    """An architecture as it is sent, and where the model to fill is."""

    structure: bytes = field(repr=False)  # ONNX without weights
    path: Path | None = None  # the user's file, whose other tensors are read again when it is filled
    original: bytes | None = field(default=None, repr=False)  # the user's bytes
    values: Mapping[str, torch.Tensor] = field(default_factory=dict)  # buffers and constants of an exported module


def read_source(architecture: Architecture, example_inputs: Any = None) -> ModelSource:
    """What is sent of ``architecture``, without weights; see ``export_architecture`` for ``example_inputs``.

    Raises:
        ExportError: The module cannot be exported.
        InvalidArchitectureError: The file cannot be read, or is no ONNX model.
    """
    if isinstance(architecture, torch.nn.Module):
        return _export(architecture, example_inputs)
    if isinstance(architecture, bytes | bytearray | memoryview):
        original = bytes(architecture)
        return ModelSource(strip_weights(original), original=original)
    given: object = architecture  # whatever its type was said to be
    if not isinstance(given, str | os.PathLike):
        name = given.__name__ if isinstance(given, type) else type(given).__name__
        what = f"the class {name}: build it first, {name}(...)" if isinstance(given, type) else f"a {name}"
        raise InvalidArchitectureError(
            f"expected a torch module, the path of an ONNX file or its bytes, got {what}", field="architecture"
        )
    path = Path(architecture)
    try:
        return ModelSource(strip_weights(path.read_bytes()), path=path.absolute())
    except OSError as error:
        raise InvalidArchitectureError(f"cannot read the model {str(path)!r}: {error.strerror}") from error


def export_architecture(module: torch.nn.Module, example_inputs: Any = None) -> bytes:
    """The structure of ``module`` as ONNX without weights.

    The module may live on any device, the meta device included; it is left as it was, and of its values, only
    buffers other than running statistics are read, which are told apart by digests.
    It is exported in the mode it is in: in training mode, auxiliary heads are part of the network. Batch
    normalisation stays as it is written, and dropout makes no difference. Tied parameters have the name that
    ``named_parameters`` gives them.

    Args:
        module: The network.
        example_inputs: What it is called with: a tensor (or numpy array, or shape), a tuple of positional arguments,
            or a dict of keyword arguments; only shapes and types matter. May be left out for a module that declares
            its inputs (``example_input_array``, timm's ``pretrained_cfg``, a ``config`` or ``dummy_inputs`` of
            transformers).

    Returns:
        A serialised ``onnx.ModelProto``. Parameters and buffers are typed graph inputs, listed in the metadata
        ``ghn.parameters`` and ``ghn.buffers``; ``ghn.contents`` says what buffers and constants hold.

    Raises:
        ExportError: The module cannot be exported, or its inputs are missing or do not fit.
    """
    return _export(module, example_inputs).structure


def _export(module: torch.nn.Module, example_inputs: Any) -> ModelSource:
    """As ``export_architecture``, with the values of buffers and constants beside the bytes."""
    inputs = _as_inputs(module, example_inputs)
    failures: list[Exception] = []
    ways = {"translation": _by_translation, "torch.onnx": _by_decomposition, "the older exporter": _by_torchscript}
    with _TURN:
        for name, way in ways.items():
            try:
                with _quiet():
                    model = way(module, inputs)
            except Exception as error:
                _LOGGER.debug("export by %s failed", name, exc_info=True)
                failures.append(error)
                continue
            if failures:
                _LOGGER.warning(
                    "%s was exported by %s, which takes several times as long as by translation; that failed: %s",
                    type(module).__name__,
                    name,
                    _root_cause(failures[0]),
                )
            return _finish(module, model)
    hint = "check that the example inputs fit: calling the module with them must work"
    if any(parameter.is_meta for parameter in module.parameters()):
        hint += "; a module with values (not on the meta device) can be exported in one more way"
    if getattr(getattr(module, "config", None), "use_cache", False):
        hint = "set config.use_cache = False, since caches of a decoder cannot be exported; " + hint
    raise ExportError(
        f"{type(module).__name__} could not be exported: {'; '.join(dict.fromkeys(map(_root_cause, failures)))}. "
        f"What to do: {hint}; data-dependent control flow cannot be exported; "
        "or export an ONNX file yourself and give that to predict()"
    ) from failures[-2]


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps torch's progress remarks and warnings from the user; what matters is in the error."""
    names = ("torch.onnx", "torch.export", "torch._dynamo", "torch.fx.experimental.symbolic_shapes", "onnxscript")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    printed = io.StringIO()
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stderr(printed):  # torch prints half a graph there
            warnings.simplefilter("ignore")
            yield
    finally:
        if printed.getvalue():
            _LOGGER.debug("torch said: %s", printed.getvalue())
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# ---- the three ways --------------------------------------------------------------------------------------------------


def _by_translation(module: torch.nn.Module, inputs: Inputs) -> onnx_ir.Model:
    return translate(_trace(module, inputs))


def _by_decomposition(module: torch.nn.Module, inputs: Inputs) -> onnx_ir.Model:
    program = torch.onnx.export(_trace(module, inputs), dynamo=True, optimize=False, verbose=False)
    assert program is not None
    model: onnx_ir.Model = program.model
    return model


def _by_torchscript(module: torch.nn.Module, inputs: Inputs) -> onnx_ir.Model:
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        raise NotTranslatableError("the older exporter runs the module, which has no memory on the meta device")
    module, (args, kwargs) = _on_one_device(module, inputs)
    file = io.BytesIO()
    with _tracing_mode(module), torch.no_grad():
        torch.onnx.export(
            module,
            args,
            file,  # type: ignore[arg-type]  # the older exporter writes to buffers, its signature forgets them
            kwargs=kwargs,
            dynamo=False,
            export_params=False,
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
        )
    model = onnx_ir.from_proto(onnx.ModelProto.FromString(file.getvalue()))
    graph, names = model.graph, _named_tensors(module)
    for value in [value for value in graph.inputs if value.name in names]:
        graph.inputs.remove(value)
        graph.initializers.add(value)
    for node in list(graph):  # Identity nodes hide that tensors with equal values were merged
        alias, original = node.outputs[0], node.inputs[0] if node.inputs else None
        if node.op_type == "Identity" and alias.name in names and original is not None:
            own = onnx_ir.Value(name=alias.name, shape=original.shape, type=original.type)
            alias.replace_all_uses_with(own, replace_graph_outputs=True)
            graph.remove(node, safe=True)
            graph.initializers.add(own)
    return model


def _named_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])


def _finish(module: torch.nn.Module, model: onnx_ir.Model) -> ModelSource:
    """The exported model without weights, and the values of what is no weight; tied tensors have their first name."""
    initializers, first, tensors = model.graph.initializers, dict[int, str](), _named_tensors(module)
    for name, tensor in tensors.items():
        kept = first.setdefault(id(tensor), name)
        if kept != name and name in initializers:
            value = initializers.pop(name)
            if kept in initializers:
                value.replace_all_uses_with(initializers[kept], replace_graph_outputs=True)
            else:
                value.name = kept
                initializers.add(value)
    lift_constants(model)
    parameters = {name for name, parameter in module.named_parameters() if parameter.dtype.is_floating_point}
    values = {}
    for name, value in initializers.items():
        if name not in parameters and value.uses():
            held = tensors[name] if name in tensors else _constant(value)
            if held is not None and not held.is_meta:
                values[name] = held
    contents = {
        name: _content(value)
        for name, value in values.items()
        if not value.is_quantized
        and not any(use.node.op_type == "BatchNormalization" and use.idx > _SHIFT for use in initializers[name].uses())
    }
    return ModelSource(encode_structure(model, parameters & set(initializers), contents), values=values)


def _content(tensor: torch.Tensor) -> str:
    """The number that all elements of a float32 tensor are, or else a digest."""
    flat = tensor.detach().cpu().reshape(-1).contiguous()
    if flat.dtype == torch.float32 and flat.numel() and bool((flat == flat[0]).all()):
        return f"all {flat[0].item():.9g}"
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()[:32]


def _constant(value: onnx_ir.Value) -> torch.Tensor | None:
    try:
        return torch.from_numpy(value.const_value.numpy().copy()) if value.const_value is not None else None
    except Exception:  # a constant without memory, in one of many ways
        return None


# ---- example inputs and tracing --------------------------------------------------------------------------------------


def declared_inputs(module: torch.nn.Module) -> Any:
    """What ``module`` says that it is called with; None where it does not say.

    Modules declare inputs as ``example_input_array`` (Lightning), ``pretrained_cfg`` (timm), or ``dummy_inputs``
    (transformers; for their vision models, the size of images stands in ``config``).
    """
    example = getattr(module, "example_input_array", None)
    if example is not None:
        return example
    described = getattr(module, "pretrained_cfg", None)
    if isinstance(described, Mapping) and described.get("input_size"):
        return torch.zeros(1, *described["input_size"], device=META)
    if getattr(module, "main_input_name", None) == "pixel_values":
        config: Any = getattr(module, "config", None)
        size = getattr(config, "image_size", None) or 224  # those that do not say are convolutional
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        return {"pixel_values": torch.zeros(1, getattr(config, "num_channels", 3), height, width, device=META)}
    dummy = getattr(module, "dummy_inputs", None)
    return dummy if isinstance(dummy, Mapping) and dummy else None


def _as_inputs(module: torch.nn.Module, example_inputs: Any) -> Inputs:
    """Reads what users give: a tensor or its shape, a tuple of arguments, a dict of keyword arguments, or nothing."""
    if example_inputs is None:
        example_inputs = declared_inputs(module)
    if example_inputs is None:
        raise ExportError(
            f"{type(module).__name__} does not say what it takes, and its input is not guessed: pass example_inputs,"
            " such as torch.zeros(1, 3, 224, 224); a tuple holds positional arguments, a dict keyword arguments"
        )
    example_inputs = tree_map_only(np.ndarray, torch.as_tensor, example_inputs)
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if _is_shape(example_inputs):
        return (torch.zeros(*example_inputs, device=META),), {}
    if not isinstance(example_inputs, list | tuple):
        return (example_inputs,), {}
    is_shapes = bool(example_inputs) and all(map(_is_shape, example_inputs))
    return tuple(torch.zeros(*item, device=META) if is_shapes else item for item in example_inputs), {}


def _is_shape(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(type(size) is int and size > 0 for size in value)


def _trace(module: torch.nn.Module, inputs: Inputs) -> torch.export.ExportedProgram:
    """The program of ``module`` at the level of torch's own operators, for inputs of exactly these shapes."""
    module, (args, kwargs) = _on_one_device(module, inputs)
    with _tracing_mode(module), torch.no_grad():
        return torch.export.export(module, args, kwargs, strict=False)


@contextlib.contextmanager
def _tracing_mode(module: torch.nn.Module) -> Iterator[None]:
    """Puts noise and statistics into evaluation mode, and attention on its plain path; restores all of it."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    modes = [(part, part.training) for part in module.modules()]
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for part, _ in modes:
            is_bare_leaf = not any(True for _ in part.children()) and not any(True for _ in part.parameters())
            if is_bare_leaf or isinstance(part, _BatchNorm):
                part.training = False
        yield
    finally:
        for part, training in modes:
            part.training = training
        torch.backends.mha.set_fastpath_enabled(fast_path)


def _on_one_device(module: torch.nn.Module, inputs: Inputs) -> tuple[torch.nn.Module, Inputs]:
    """Module and inputs on one device with values, or as fake tensors of the CPU, which take no memory.

    A module on the meta device often makes or keeps plain tensors on the CPU (a mean, a mask), which real operators
    refuse to mix; fake tensors say that they are on the CPU too.
    """
    devices = {tensor.device for tensor in (*module.parameters(), *module.buffers())}
    if not devices:
        return module, inputs
    if len(devices) == 1 and META not in devices:
        (device,) = devices
        return module, tree_map_only(
            torch.Tensor, lambda x: torch.zeros_like(x, device=device) if x.is_meta else x, inputs
        )
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        with mode:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")

    memo: dict[int, Any] = {}  # what a copy of the module has in the place of its tensors
    for part in module.modules():
        plain = [value for value in vars(part).values() if isinstance(value, torch.Tensor)]
        memo.update({id(tensor): fake(tensor) for tensor in plain if tensor.device.type != "cpu"})
    for buffer in module.buffers():
        memo[id(buffer)] = fake(buffer) if buffer.device.type != "cpu" else buffer
    for parameter in module.parameters():
        memo[id(parameter)] = torch.nn.Parameter(fake(parameter), requires_grad=parameter.requires_grad)
    inputs = tree_map_only(torch.Tensor, lambda x: x if x.device.type == "cpu" else fake(x), inputs)
    return copy.deepcopy(module, memo), inputs
