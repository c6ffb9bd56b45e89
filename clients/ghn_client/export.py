"""Exports the structure of a torch module as ONNX, every parameter under its name in ``state_dict``.

Measured ways (docs/client.md): torch's exporter with ``dynamo=True, optimize=False`` keeps every name, but traces and
prepares twice; the translation of the traced program alone takes a fraction of the trace's own time. So that is tried
first; what it cannot do takes torch's way, and as a last resort the older exporter, which needs a module with memory.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import onnx
import onnx_ir
import torch

from ghn_client.errors import ExportError
from ghn_client.structure import encode_structure, lift_constants
from ghn_client.tracing import ExampleInputs, as_example_inputs, on_one_device, trace, tracing_mode
from ghn_client.translation import NotTranslatableError, translate

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


@contextmanager
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
