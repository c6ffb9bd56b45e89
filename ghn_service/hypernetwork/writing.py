"""From decoded blocks to the tensors of a prediction: blocks come shape by shape, tensors are filled in order.

Whoever watches (the server hashes what it will send) can work on the first tensors while the later ones are filled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ghn_service.errors import PredictionError
from ghn_service.graph.architecture import ArchitectureGraph, ParameterSpec
from ghn_service.hypernetwork.blocks import drawn_generator
from ghn_service.hypernetwork.fallbacks import fallback_rule
from ghn_service.hypernetwork.features import Target
from ghn_service.hypernetwork.tiling import write_tiled
from ghn_service.parameters import ParameterSet

MAX_ELEMENTS_HELD = 4 * 2**20

OnWritten = Callable[[ParameterSet, int], None]
"""Called while tensors are filled in order: with all of them, and how many from the first on are final."""


class ParameterWriter:
    """Fills tensors with decoded blocks, in the tensors' order as far as blocks can be held until then.

    Blocks are small while they are repeated to fill large tensors. Where they are not, tensors are filled as their
    blocks come, so that no more than ``MAX_ELEMENTS_HELD`` values and one group are in memory twice.

    Args:
        parameters: The tensors to fill.
        on_written: Told how many are final, from the first on; None if nobody watches.
        drawn: Gives the generator of a tensor that no block fills, by its name.
    """

    def __init__(
        self, parameters: ParameterSet, on_written: OnWritten | None, *, drawn: Callable[[str], torch.Generator]
    ) -> None:
        self._parameters = parameters
        self._on_written = on_written or (lambda parameters, count: None)
        self._drawn = drawn
        self._held: dict[str, Tensor] = {}
        self._num_held = 0
        self._written: set[str] = set()

    def take(self, targets: Sequence[Target], blocks: Tensor) -> None:
        """Checks the blocks of a group and holds them; fills their tensors if too much is held.

        Args:
            targets: Tensors of one shape.
            blocks: Their values, (P, *block).

        Raises:
            PredictionError: A value is not finite.
        """
        out = self._parameters[targets[0].name]
        blocks = blocks.to(device=out.device, dtype=out.dtype)
        if not torch.isfinite(blocks).all():
            raise PredictionError(
                f"the values predicted for {targets[0].name!r} are not all finite; the checkpoint is damaged, or this "
                "architecture is far from all it was trained on"
            )
        self._held.update(zip((target.name for target in targets), blocks.unbind(), strict=True))
        self._num_held += blocks.numel()
        if self._num_held > MAX_ELEMENTS_HELD:
            for name, block in self._held.items():
                self._write(name, block)
            self._written.update(self._held)
            self._held, self._num_held = {}, 0

    def finish(self) -> None:
        """Fills the rest in order, once every block has come."""
        self._on_written(self._parameters, 0)
        for count, name in enumerate(self._parameters, start=1):
            if name in self._held:
                self._write(name, self._held[name])
            elif name not in self._written:
                self._write_fallback(name)
            self._on_written(self._parameters, count)

    def _write(self, name: str, block: Tensor) -> None:
        """Repeats a block to fill its tensor."""
        write_tiled(_to_file_layout(block, self._parameters.specs[name]), self._parameters[name])

    def _write_fallback(self, name: str) -> None:
        """Draws a tensor that the hypernetwork does not predict."""
        spec = self._parameters.specs[name]
        values = torch.empty(spec.torch_shape)
        fallback_rule(spec.fallback)(values, self._drawn(name))
        self._parameters[name].copy_(_to_file_layout(values, spec))


def drawn_generators(graph: ArchitectureGraph, seed: int) -> Callable[[str], torch.Generator]:
    """The generator of each tensor by name; it does not depend on which other tensors are wanted."""
    draws = {spec.name: draw for draw, spec in enumerate(graph.parameters())}
    return lambda name: drawn_generator(seed, draws[name])


def _to_file_layout(tensor: Tensor, spec: ParameterSpec) -> Tensor:
    """From torch's axes to those of the file."""
    if not spec.permutation:
        return tensor
    return tensor.permute([spec.permutation.index(axis) for axis in range(tensor.dim())])
