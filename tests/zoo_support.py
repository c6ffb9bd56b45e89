"""Networks of public model zoos for tests: how to import torchvision beside a CPU build of torch, and how to export.

torchvision's compiled operators do not load beside a CPU build of torch; then two operator schemas are defined before
the import, and classification models build, run and export (docs/testing.md). The product never imports a zoo.
"""

from __future__ import annotations

import importlib
import io
import sys
import warnings
from types import ModuleType
from typing import Any

import onnx
import pytest
import torch
from torch import nn

_SCHEMA = "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_LIBRARIES: list[torch.library.Library] = []
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16)
CIFAR_SUFFIX = "_cifar10"


def declare_torchvision_operators() -> None:
    """Defines the two schemas that a torchvision of another build lacks, only where the plain import fails.

    Raises:
        RuntimeError: torchvision does not load for another reason.
    """
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        return
    except RuntimeError as error:
        if "nms" not in str(error):
            raise
        for loaded in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[loaded]
        library = torch.library.Library("torchvision", "DEF")
        for schema in (_SCHEMA, _SCHEMA.replace("nms", "qnms")):
            library.define(schema)
        _LIBRARIES.append(library)


def import_torchvision() -> ModuleType:
    """torchvision, or a skipped test where it is not installed."""
    declare_torchvision_operators()
    return pytest.importorskip("torchvision")


def import_timm() -> ModuleType:
    """timm, which imports torchvision, or a skipped test."""
    import_torchvision()
    return pytest.importorskip("timm")


def build_torchvision(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A torchvision classifier without weights, and an example batch of two.

    ``<name>_cifar10`` is the variant for 32x32 images of the reference data: ten classes, first convolution 3x3 with
    stride 1, no first pooling.
    """
    models = import_torchvision().models
    if name.endswith(CIFAR_SUFFIX):
        module = models.get_model(name.removesuffix(CIFAR_SUFFIX), weights=None, num_classes=10)
        module.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        module.maxpool = nn.Identity()
        return module, torch.zeros(2, 3, 32, 32)
    options: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = models.get_model(name, weights=None, **options)
    size = 299 if name == "inception_v3" else 224
    return module, torch.zeros(2, 3, size, size)


def export(module: nn.Module, example: torch.Tensor, form: str) -> bytes:
    """The module as ONNX without weight data.

    Args:
        module: Any module of one input; on the meta device too, for ``dynamo`` without ``optimize``.
        example: Its input.
        form: Parts joined by ``-``: exporter ``dynamo`` or ``script``; mode ``eval`` or ``train``; and ``optimize``
            for the exporter's own optimisations (folding of constants and batch normalization).
    """
    exporter, mode, *rest = form.split("-")
    module.train(mode == "train")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if exporter == "dynamo":
            return _export_dynamo(module, example, optimize="optimize" in rest)
        return _export_script(module, example, mode, fold="optimize" in rest)


def _export_dynamo(module: nn.Module, example: torch.Tensor, *, optimize: bool) -> bytes:
    program = torch.onnx.export(module, (example,), dynamo=True, optimize=optimize, verbose=False)
    assert program is not None
    is_meta = any(parameter.is_meta for parameter in module.parameters())
    if not is_meta:
        return strip(program.model_proto)
    import onnx_ir

    graph = program.model.graph
    headers = [
        (value.name, tuple(int(size) for size in value.shape), int(value.dtype))
        for value in graph.initializers.values()
        if value.const_value is not None
        and isinstance(value.const_value, onnx_ir.TensorProtocol)
        and value.dtype in _FLOATS
        and value.shape is not None
    ]
    infos = {name: graph.initializers[name] for name, _, _ in headers}
    for name in infos:
        del graph.initializers[name]
    proto = onnx_ir.to_proto(program.model)
    for name, shape, data_type in headers:
        proto.graph.initializer.append(onnx.TensorProto(name=name, dims=shape, data_type=data_type))
        info = onnx.helper.make_tensor_value_info(name, data_type, shape)
        for key, value in infos[name].metadata_props.items():
            info.metadata_props.add(key=key, value=str(value))
        proto.graph.value_info.append(info)
    return strip(proto)


def _export_script(module: nn.Module, example: torch.Tensor, mode: str, *, fold: bool) -> bytes:
    buffer = io.BytesIO()
    training = torch.onnx.TrainingMode.TRAINING if mode == "train" else torch.onnx.TrainingMode.EVAL
    torch.onnx.export(module, (example,), buffer, dynamo=False, do_constant_folding=fold, training=training)
    return strip(onnx.load_model_from_string(buffer.getvalue()))


def strip(model: onnx.ModelProto, *, keep_elements: int = 16, keep_stack_traces: bool = False) -> bytes:
    """The model with the data of its float initializers removed, and without stack traces."""
    for tensor in model.graph.initializer:
        count = 1
        for size in tensor.dims:
            count *= size
        if tensor.data_type in _FLOATS and count > keep_elements:
            for field in ("raw_data", "float_data", "double_data", "int32_data"):
                tensor.ClearField(field)
    if not keep_stack_traces:
        for node in model.graph.node:
            kept = [entry for entry in node.metadata_props if entry.key != "pkg.torch.onnx.stack_trace"]
            kept = [onnx.StringStringEntryProto(key=entry.key, value=entry.value) for entry in kept]
            del node.metadata_props[:]
            node.metadata_props.extend(kept)
            node.doc_string = ""
    return model.SerializeToString(deterministic=True)
