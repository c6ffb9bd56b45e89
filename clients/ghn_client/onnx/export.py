"""Exports the structure of a torch module as ONNX, every parameter under its name in ``state_dict``.

Measured ways (docs/client.md): torch's exporter with ``dynamo=True, optimize=False`` keeps every name, but traces and
prepares twice; the translation of the traced program alone takes a fraction of the trace's own time. So that is tried
first; what it cannot do takes torch's way, and as a last resort the older exporter, which needs a module with memory.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree

from ghn_client.errors import ExportError, InvalidArchitectureError
from ghn_client.onnx.edit import parse_onnx
from ghn_client.onnx.strip import encode_structure, lift_constants, strip_model
from ghn_client.onnx.translate import NotTranslatableError, translate

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ExportedStructure:
    """What an export gives.

    Attributes:
        onnx_bytes: The structure-only ONNX model.
        values: Values of the tensors that the model needs and that are no weights: buffers and constants.
    """

    onnx_bytes: bytes
    values: Mapping[str, torch.Tensor] = field(default_factory=dict)


def export_architecture(module: torch.nn.Module, example_inputs: Any = None) -> bytes:
    """The structure of ``module`` as ONNX without weights.

    The module may live on any device, the meta device included; its values are never read, and it is left as it was.
    It is exported in the mode it is in: in training mode, auxiliary heads are part of the network. Batch
    normalisation stays as it is written, and dropout makes no difference. Tied parameters have the name that
    ``named_parameters`` gives them.

    Args:
        module: The network.
        example_inputs: What it is called with: a tensor, a tuple of positional arguments, or a dict of keyword
            arguments; only shapes and types matter. May be left out for a module that declares its inputs
            (``example_input_array``, timm's ``pretrained_cfg``, transformers' ``dummy_inputs``).

    Returns:
        A serialised ``onnx.ModelProto``. Parameters and buffers are typed graph inputs, listed in the metadata
        ``ghn.parameters`` and ``ghn.buffers``.

    Raises:
        ExportError: The module cannot be exported, or its inputs are missing or do not fit.
    """
    return export_structure(module, example_inputs).onnx_bytes


def export_structure(module: torch.nn.Module, example_inputs: Any = None) -> ExportedStructure:
    """As ``export_architecture``, with the values of buffers and constants beside the bytes.

    Raises:
        ExportError: The module cannot be exported, or its inputs are missing or do not fit.
    """
    inputs = as_example_inputs(module, example_inputs)
    ways: tuple[tuple[str, Callable[[torch.nn.Module, ExampleInputs], onnx_ir.Model]], ...] = (
        ("translation", _by_translation),
        ("torch.onnx", _by_decomposition),
        ("torchscript", _by_torchscript),
    )
    failures: list[tuple[str, Exception]] = []
    for name, way in ways:
        try:
            with _quiet():
                model = way(module, inputs)
        except Exception as error:
            _LOGGER.debug("export by %s failed", name, exc_info=True)
            failures.append((name, error))
        else:
            return _finish(module, model)
    raise _explain(module, failures) from failures[-2][1]


def _by_translation(module: torch.nn.Module, inputs: ExampleInputs) -> onnx_ir.Model:
    return translate(trace(module, inputs))


def _by_decomposition(module: torch.nn.Module, inputs: ExampleInputs) -> onnx_ir.Model:
    program = torch.onnx.export(trace(module, inputs), dynamo=True, optimize=False, verbose=False)
    assert program is not None
    model: onnx_ir.Model = program.model
    return model


def _by_torchscript(module: torch.nn.Module, inputs: ExampleInputs) -> onnx_ir.Model:
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        raise NotTranslatableError("the older exporter runs the module, which has no memory on the meta device")
    module, inputs = on_one_device(module, inputs)
    file = io.BytesIO()
    with tracing_mode(module), torch.no_grad():
        torch.onnx.export(
            module,
            inputs.args,
            file,  # type: ignore[arg-type]  # the older exporter writes to buffers, its signature forgets them
            kwargs=dict(inputs.kwargs),
            dynamo=False,
            export_params=False,
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
        )
    model = onnx_ir.from_proto(onnx.ModelProto.FromString(file.getvalue()))
    _weights_to_initializers(model, {name for name, _ in _named_tensors(module)})
    return model


def _weights_to_initializers(model: onnx_ir.Model, names: set[str]) -> None:
    for value in [value for value in model.graph.inputs if value.name in names]:
        model.graph.inputs.remove(value)
        model.graph.initializers.add(value)
    for node in list(model.graph):
        alias = node.outputs[0]
        if node.op_type == "Identity" and alias.name in names and node.inputs[0] is not None:
            _give_own_value(model, node, alias, node.inputs[0])


def _give_own_value(model: onnx_ir.Model, node: onnx_ir.Node, alias: onnx_ir.Value, original: onnx_ir.Value) -> None:
    """Undoes the merging of tensors with equal values, which the exporter hides behind Identity nodes."""
    own = onnx_ir.Value(name=alias.name, shape=original.shape, type=original.type)
    alias.replace_all_uses_with(own, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)
    model.graph.initializers.add(own)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps torch's progress remarks and warnings from the user; what matters is in the error."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "torch._dynamo", "onnxscript")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _named_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _finish(module: torch.nn.Module, model: onnx_ir.Model) -> ExportedStructure:
    _merge_tied(module, model)
    lift_constants(model)
    tensors = dict(_named_tensors(module))
    parameters = {name for name, parameter in module.named_parameters() if parameter.dtype.is_floating_point} & set(
        model.graph.initializers
    )
    values = {}
    for name, value in model.graph.initializers.items():
        if name in parameters or not value.uses():
            continue
        tensor = tensors[name] if name in tensors else _constant(value)
        if tensor is not None and not tensor.is_meta:
            values[name] = tensor
    return ExportedStructure(encode_structure(model, parameters), values)


def _constant(value: onnx_ir.Value) -> torch.Tensor | None:
    if value.const_value is None:
        return None
    try:
        return torch.from_numpy(value.const_value.numpy().copy())
    except Exception:
        return None


def _merge_tied(module: torch.nn.Module, model: onnx_ir.Model) -> None:
    """Gives all names of one tensor the first of them."""
    first: dict[int, str] = {}
    for name, tensor in _named_tensors(module):
        canonical = first.setdefault(id(tensor), name)
        value = model.graph.initializers.get(name)
        if canonical == name or value is None:
            continue
        kept = model.graph.initializers.get(canonical)
        if kept is not None:
            value.replace_all_uses_with(kept, replace_graph_outputs=True)
            del model.graph.initializers[name]
        else:
            del model.graph.initializers[name]
            value.name = canonical
            model.graph.initializers.add(value)


def _explain(module: torch.nn.Module, failures: list[tuple[str, Exception]]) -> ExportError:
    name, parameters = type(module).__name__, list(module.parameters())
    reasons = "; ".join(dict.fromkeys(f"{_root_cause(error)}" for _, error in failures))
    hint = "check that the example inputs fit: calling the module with them must work"
    if any(parameter.is_meta for parameter in parameters):
        hint += "; a module with values (not on the meta device) can be exported in one more way"
    return ExportError(
        f"{name} could not be exported: {reasons}. What to do: {hint}; data-dependent control flow cannot be exported; "
        "or export an ONNX file yourself and give that to predict()"
    )


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"


# ---- tracing ---------------------------------------------------------------------------------------------------------

META = torch.device("meta")


@dataclass(frozen=True, eq=False)
class ExampleInputs:
    """What a module is called with: positional and keyword arguments; only shapes and types matter."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> ExampleInputs:
        """The same arguments with every tensor changed."""

        def apply(leaf: Any) -> Any:
            return change(leaf) if isinstance(leaf, torch.Tensor) else leaf

        args, kwargs = _pytree.tree_map(apply, (self.args, dict(self.kwargs)))
        return ExampleInputs(args, kwargs)


def as_example_inputs(module: torch.nn.Module, example_inputs: Any) -> ExampleInputs:
    """Reads the forms in which users give inputs: one tensor, a tuple of arguments, or a dict of keyword arguments.

    ``None`` is accepted where the module itself declares what it takes: ``example_input_array`` (Lightning),
    ``pretrained_cfg`` (timm), ``dummy_inputs`` (transformers).

    Raises:
        ExportError: There are no inputs, and the module declares none.
    """
    if example_inputs is None:
        example_inputs = _declared_inputs(module)
    if isinstance(example_inputs, Mapping):
        return ExampleInputs(kwargs=dict(example_inputs))
    if isinstance(example_inputs, list | tuple):
        return ExampleInputs(args=tuple(example_inputs))
    return ExampleInputs(args=(example_inputs,))


def _declared_inputs(module: torch.nn.Module) -> Any:
    declared = getattr(module, "example_input_array", None)
    if declared is not None:
        return declared
    config = getattr(module, "pretrained_cfg", None)
    if isinstance(config, Mapping) and config.get("input_size"):
        return torch.zeros(1, *config["input_size"], device=META)
    dummy = getattr(module, "dummy_inputs", None)
    if isinstance(dummy, Mapping) and dummy:
        return dummy
    raise ExportError(
        f"{type(module).__name__} does not say what it takes, and its input is not guessed: pass example_inputs, such "
        "as torch.zeros(1, 3, 224, 224); a tuple holds positional arguments, a dict keyword arguments"
    )


def on_one_device(module: torch.nn.Module, inputs: ExampleInputs) -> tuple[torch.nn.Module, ExampleInputs]:
    """Module and inputs on one device with values, or as fake tensors of the CPU, which take no memory.

    A module on the meta device often makes or keeps plain tensors on the CPU (a mean, a mask), which real operators
    refuse to mix; fake tensors say that they are on the CPU too.
    """
    devices = {tensor.device for tensor in (*module.parameters(), *module.buffers())}
    if len(devices) == 1 and META not in devices:
        device = next(iter(devices))
        return module, inputs.map(lambda tensor: torch.zeros_like(tensor, device=device) if tensor.is_meta else tensor)
    if not devices:
        return module, inputs
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        with mode:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")

    copied = _fake_copy(module, fake)
    return copied, inputs.map(lambda tensor: tensor if tensor.device.type == "cpu" else fake(tensor))


def _fake_copy(module: torch.nn.Module, fake: Callable[[torch.Tensor], torch.Tensor]) -> torch.nn.Module:
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = torch.nn.Parameter(fake(parameter), requires_grad=parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = fake(buffer) if buffer.is_meta or buffer.device.type != "cpu" else buffer
    for part in module.modules():
        plain = [value for value in vars(part).values() if isinstance(value, torch.Tensor)]
        memo.update({id(tensor): fake(tensor) for tensor in plain if tensor.device.type != "cpu"})
    return copy.deepcopy(module, memo)


@contextlib.contextmanager
def tracing_mode(module: torch.nn.Module) -> Iterator[None]:
    """Puts noise and statistics into evaluation mode, and attention on its plain path; restores all of it."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    modes = [(part, part.training) for part in module.modules()]
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for part, _ in modes:
            if _is_noise_or_statistics(part):
                part.training = False
        yield
    finally:
        for part, training in modes:
            part.training = training
        torch.backends.mha.set_fastpath_enabled(fast_path)


def _is_noise_or_statistics(part: torch.nn.Module) -> bool:
    is_leaf = next(part.children(), None) is None
    is_bare = next(part.parameters(), None) is None
    return isinstance(part, _BatchNorm) or (is_leaf and is_bare)


def trace(module: torch.nn.Module, inputs: ExampleInputs) -> torch.export.ExportedProgram:
    """The program of ``module`` at the level of torch's own operators, for inputs of exactly these shapes."""
    module, inputs = on_one_device(module, inputs)
    with tracing_mode(module), torch.no_grad():
        return torch.export.export(module, inputs.args, dict(inputs.kwargs), strict=False)


# ---- what is sent ----------------------------------------------------------------------------------------------------

Architecture = torch.nn.Module | str | Path | bytes
"""A torch module, the path of an ONNX file, or the bytes of one."""


@dataclass(frozen=True, eq=False)
class ModelSource:
    """An architecture as it is sent, and where the model to fill is.

    Attributes:
        structure: Structure-only ONNX.
        path: The user's file, whose other tensors are read again when it is filled; None without one.
        original: The user's bytes; None without.
        values: Buffers and constants of an exported module.
    """

    structure: bytes
    path: Path | None = None
    original: bytes | None = None
    values: Mapping[str, torch.Tensor] = field(default_factory=dict)


def read_source(architecture: Architecture, example_inputs: Any = None) -> ModelSource:
    """What is sent of ``architecture``, without weights.

    Args:
        architecture: A module, a path, or bytes.
        example_inputs: What a module is called with; see ``export_architecture``.

    Raises:
        ExportError: The module cannot be exported.
        InvalidArchitectureError: The file cannot be read, or is no ONNX model.
    """
    if isinstance(architecture, torch.nn.Module):
        exported = export_structure(architecture, example_inputs)
        return ModelSource(exported.onnx_bytes, values=exported.values)
    if isinstance(architecture, bytes | bytearray | memoryview):
        original = bytes(architecture)
        return ModelSource(_stripped(original), original=original)
    path = Path(architecture)
    return ModelSource(_stripped(_read_bytes(path)), path=path)


def _stripped(onnx_bytes: bytes) -> bytes:
    proto = parse_onnx(onnx_bytes)
    strip_model(proto)
    return proto.SerializeToString()


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidArchitectureError(f"cannot read the model {str(path)!r}: {error.strerror}") from error
