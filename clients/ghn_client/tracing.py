"""A module as torch's exported program, traced without memory for weights and without a trace left on the module.

The module keeps its mode, because auxiliary heads exist in training mode only. Only what makes noise or gathers
statistics (dropout, batch normalisation) is traced as in evaluation, so that it stays one operator.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree

from ghn_client.errors import ExportError

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
