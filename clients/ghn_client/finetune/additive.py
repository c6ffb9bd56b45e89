"""``additive``: a frozen network plus a small ReLU network, ``f + g``, with the width that capacity theory asks for.

Sohn, Kwon, An and Lee, "Memorization Capacity for Additive Fine-Tuning with Small ReLU Networks", UAI 2024,
arXiv:2408.00359; the constants of the widths are derived by us, see ``patch/capacity.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from ghn_client.batchnorm import FREEZE, evaluation_mode, travelling_statistics
from ghn_client.errors import InvalidOptionError, UnsupportedModuleError, require_known
from ghn_client.finetune.handle import FineTuneHandle, Lifecycle, Part
from ghn_client.finetune.matrix_layers import find_head
from ghn_client.finetune.patch.capacity import hidden_widths
from ghn_client.finetune.side_network import SideNetwork

LOGITS, FEATURES = "logits", "features"


class AdditiveModule(nn.Module):
    """``f + g``: the output of ``base`` plus that of ``side``; stacks, and switches off with ``enabled = False``.

    ``side`` reads the input of ``base`` or, with the dotted path of a ``head`` inside it, the features the head reads.
    """

    def __init__(self, base: nn.Module, side: nn.Module, *, head: str | None = None) -> None:
        super().__init__()
        self.base, self.side, self.head, self.enabled = base, side, head, True

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """The output of ``base`` with that of ``side`` added."""
        if not self.enabled:
            return self.base(*inputs, **options)
        if self.head is None:
            output = self.base(*inputs, **options)
            if not isinstance(output, torch.Tensor):
                raise UnsupportedModuleError(
                    f"at='logits' needs a network that returns a tensor, {type(self.base).__name__} returns"
                    f" {type(output).__name__}; use at='features'"
                )
            return output + self.side(inputs[0])
        hook = self.base.get_submodule(self.head).register_forward_hook(self._add)
        try:
            return self.base(*inputs, **options)
        finally:
            hook.remove()

    def _add(self, _head: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        added: torch.Tensor = output + self.side(inputs[0])
        return added

    @contextmanager
    def disabled(self) -> Iterator[nn.Module]:
        """Within the block the module computes f alone."""
        before, self.enabled = self.enabled, False
        try:
            yield self
        finally:
            self.enabled = before


def base_head(module: nn.Module, head: str | None = None) -> str:
    """Dotted path of the head of the innermost base of ``module``."""
    prefix = ""
    while isinstance(module, AdditiveModule):
        module, prefix = module.base, prefix + "base."
    return prefix + (head or find_head(module))


@torch.no_grad()
def head_features(module: nn.Module, head: str, inputs: torch.Tensor) -> torch.Tensor:
    """What the layer ``head`` reads when ``module`` runs on ``inputs``, flattened to (B, D)."""
    seen: list[torch.Tensor] = []
    hook = module.get_submodule(head).register_forward_pre_hook(lambda _layer, given: seen.append(given[0]))
    try:
        module(inputs)
    finally:
        hook.remove()
    if not seen:
        raise UnsupportedModuleError(f"the layer {head!r} did not run; name the head of this network")
    return seen[-1].flatten(1)


@torch.no_grad()
def run_in_batches(module: nn.Module, inputs: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Outputs of ``module`` for all ``inputs``, ``batch_size`` at a time."""
    return torch.cat([module(chunk) for chunk in torch.split(inputs, batch_size)])


def additive(
    module: nn.Module,
    *,
    samples: int | None = None,
    changed: int | None = None,
    depth: int = 2,
    width: str | int | Sequence[int] = "auto",
    at: str = FEATURES,
    head: str | None = None,
    example_inputs: torch.Tensor | None = None,
    in_features: int | None = None,
    outputs: int | None = None,
    seed: int = 0,
    statistics: str = FREEZE,
) -> FineTuneHandle:
    """Freezes ``module`` and adds a small trainable ReLU network that starts at zero.

    Args:
        module: Any network; stays as it is inside ``handle.module``.
        samples: Training samples K; needed for ``width="auto"``.
        changed: Labels N that g must be able to change; default all samples.
        depth: Layers of weights of g, 2 or 3.
        width: ``auto`` for the width that surely suffices, one width, or one per hidden layer.
        at: ``features``: g reads what the head reads, and adds to the head's output. ``logits``: g reads the input.
        head: Dotted path of the head; default the last linear layer.
        example_inputs: A batch; needed for ``at="logits"`` and for heads that are not linear.
        in_features: Numbers per sample that g reads, instead of ``example_inputs``.
        outputs: Outputs C, instead of ``example_inputs``.
        seed: Of the first layers.
        statistics: What happens to the running statistics of ``module``; frozen, since f shall not change.

    Raises:
        InvalidOptionError: An option is impossible, or the sizes cannot be known without ``example_inputs``.
    """
    require_known(at, (LOGITS, FEATURES), field="at")
    path = base_head(module, head) if at == FEATURES else None
    if in_features is None or outputs is None:
        in_features, outputs = _sizes(module, path, example_inputs)
    hidden = _hidden(width, depth, samples, changed, outputs)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed other devices too
        side = SideNetwork(in_features, hidden, outputs)
    reference = next(module.parameters(), torch.zeros(()))
    side.to(device=reference.device, dtype=reference.dtype).train(module.training)
    whole = AdditiveModule(module, side, head=path)
    whole.training = module.training
    config = {"depth": len(hidden) + 1, "width": list(hidden), "at": at, "head": head, "seed": seed}
    config.update(in_features=in_features, outputs=outputs, statistics=statistics)
    names = [f"side.{name}" for name, _ in side.named_parameters()]
    buffers = [f"base.{name}" for name in travelling_statistics(module, statistics)]
    part = Part("additive", config, whole, {"side": names}, buffers)
    lifecycle = Lifecycle(switch=partial(setattr, whole, "enabled"))
    return FineTuneHandle(part, base=module, statistics=statistics, lifecycle=lifecycle)


def _sizes(module: nn.Module, head: str | None, example: torch.Tensor | None) -> tuple[int, int]:
    if head is not None:
        layer = module.get_submodule(head)
        if isinstance(layer, nn.Linear):
            return layer.in_features, layer.out_features
    if example is None:
        raise InvalidOptionError("pass example_inputs (one batch): the input and output sizes cannot be known without")
    with torch.no_grad(), evaluation_mode(module):
        width = head_features(module, head, example).shape[1] if head else example.flatten(1).shape[1]
        return width, module(example).shape[-1]


def _hidden(
    width: str | int | Sequence[int], depth: int, samples: int | None, changed: int | None, outputs: int
) -> tuple[int, ...]:
    if width == "auto":
        if samples is None:
            raise InvalidOptionError("width='auto' needs samples=K (and changed=N, if not all labels may change)")
        return hidden_widths(depth, changed=samples if changed is None else changed, samples=samples, outputs=outputs)
    if isinstance(width, str):
        raise InvalidOptionError(f"width must be 'auto', a number or one number per hidden layer, got {width!r}")
    require_known(depth, (2, 3), field="depth")
    widths = (width,) * (depth - 1) if isinstance(width, int) else tuple(width)
    if len(widths) != depth - 1 or min(widths) < 1:
        raise InvalidOptionError(f"depth {depth} has {depth - 1} hidden layers of at least one neuron, got {widths}")
    return widths
