"""``ParameterSet``: named tensors that belong to one architecture, with where each came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from ghn_client.huge_pages import HUGE_PAGES_FROM_BYTES, allocate_buffer
from ghn_service.errors import PredictionError
from ghn_service.graph.architecture import ParameterSpec

PREDICTED = "predicted"
TILED = "tiled"


def fallback_origin(rule: str) -> str:
    """The origin of a tensor that the rule ``rule`` of ``hypernetwork/fill.py`` initialised."""
    return f"fallback:{rule}"


def source_origin(source: str, how: str) -> str:
    """The origin of a tensor that comes from a source: ``how`` is ``exact``, ``grown`` or ``cut``."""
    return f"source:{source} ({how})"


def allocate_tensors(
    specs: Mapping[str, ParameterSpec], *, dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    """Uninitialised tensors of these shapes, one behind the other in one piece of memory.

    On Linux the memory asks for huge pages: fresh memory costs a page fault per page, and that is most of the time of
    predicting a large network.

    Args:
        specs: What each tensor is.
        dtype: Element type.
        device: Where the memory is.
    """
    sizes = [spec.num_elements for spec in specs.values()]
    num_bytes = sum(sizes) * dtype.itemsize
    if device.type == "cpu" and num_bytes >= HUGE_PAGES_FROM_BYTES:
        memory = torch.frombuffer(allocate_buffer(num_bytes), dtype=dtype)
    else:
        memory = torch.empty(sum(sizes), dtype=dtype, device=device)
    pieces = torch.split(memory, sizes) if sizes else ()
    return {name: piece.view(spec.shape) for (name, spec), piece in zip(specs.items(), pieces, strict=True)}


@dataclass(frozen=True, eq=False)
class ParameterSet(Mapping[str, torch.Tensor]):
    """An ordered, immutable mapping of parameter name to tensor.

    Every tensor has the shape of its spec, in the layout of the file that named it.

    Attributes:
        specs: What each tensor is; same keys and order as ``tensors``.
        tensors: The values.
        origins: ``predicted``, ``tiled`` (predicted, then repeated to fit), ``fallback:<rule>`` or
            ``source:<name> (<how>)``, per tensor.
        warnings: What the user should know about these values; sentences.

    Raises:
        PredictionError: A tensor is missing, surplus or of another shape than its spec.
    """

    specs: Mapping[str, ParameterSpec]
    tensors: Mapping[str, torch.Tensor]
    origins: Mapping[str, str]
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for what, mapping in (("tensors", self.tensors), ("origins", self.origins)):
            if list(mapping) != list(self.specs):
                odd = sorted(set(mapping) ^ set(self.specs))[:5]
                raise PredictionError(f"{what} and specs must have the same names in the same order; differing: {odd}")
        for name, spec in self.specs.items():
            if tuple(self.tensors[name].shape) != spec.shape:
                raise PredictionError(
                    f"parameter {name!r} has shape {tuple(self.tensors[name].shape)}, expected {spec.shape}"
                )

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    @property
    def num_bytes(self) -> int:
        """Bytes of all values together."""
        return sum(tensor.nbytes for tensor in self.tensors.values())
