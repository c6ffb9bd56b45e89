"""Networks that look alike: called exact where they compute the same, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional

from ghn_client.onnx.export import export_architecture
from ghn_client.outputs import largest_relative_difference
from ghn_service.transfer.source import Source
from ghn_service.transfer.transfer import plan_transfer
from tests.transfer.pairs import make_source, randomise, transfer_between

IMAGE = torch.zeros(1, 3, 8, 8)


class Function(nn.Module):
    """A function of an input, with the parts that it is given as ``self``; tensors become buffers."""

    def __init__(self, function: Callable[..., object], **parts: nn.Module | torch.Tensor) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, x: torch.Tensor) -> object:
        return self.function(self, x)


def conv(width: int = 8, channels: int = 3) -> nn.Module:
    return nn.Conv2d(channels, width, 3, padding=1)


def pooled(x: torch.Tensor) -> torch.Tensor:
    return x.mean((2, 3))


# ---- several outputs -------------------------------------------------------------------------------------------------


def two_heads(activation: Callable[[torch.Tensor], torch.Tensor], width: int = 8, boxes: int = 4) -> nn.Module:
    def forward(self: Function, x: torch.Tensor) -> object:
        h = pooled(torch.relu(self.stem(x)))
        return self.classes(h), self.boxes(activation(self.hidden(h)))

    parts = {"classes": nn.Linear(width, 5), "hidden": nn.Linear(width, width), "boxes": nn.Linear(width, boxes)}
    return Function(forward, stem=conv(width), **parts)


def pyramid(width: int = 8, last: int = 1) -> nn.Module:
    def forward(self: Function, x: torch.Tensor) -> object:
        fine = torch.relu(self.fine(x))
        coarse = torch.relu(self.coarse(fine))
        up = functional.interpolate(self.inner(coarse), scale_factor=2.0)
        return {"coarse": self.out(coarse), "fine": self.out_fine((up + self.lateral(fine)) * last)}

    parts = {"coarse": nn.Conv2d(width, width, 3, 2, 1), "inner": nn.Conv2d(width, width, 1)}
    parts |= {"lateral": nn.Conv2d(width, width, 1), "out": conv(5, width), "out_fine": conv(5, width)}
    return Function(forward, fine=conv(width), **parts)


def maps(width: int) -> nn.Module:
    def forward(self: Function, x: torch.Tensor) -> object:
        first = torch.relu(self.first(x))
        return self.second(first), first

    return Function(forward, first=conv(width), second=conv(5, width))


# ---- values that are not each other ----------------------------------------------------------------------------------


def gated(first: slice, second: slice, width: int = 16) -> nn.Module:
    def forward(self: Function, x: torch.Tensor) -> object:
        h = self.stem(x)
        return self.head(pooled(h[:, first] * torch.sigmoid(h[:, second])))

    return Function(forward, stem=conv(width), head=nn.Linear(width // 2, 5))


def corner(start: int) -> nn.Module:
    def forward(self: Function, x: torch.Tensor) -> object:
        return self.head(torch.relu(self.stem(x))[:, :4, start : start + 4].flatten(1))

    return Function(forward, stem=conv(), head=nn.Linear(4 * 4 * 8, 5))


def altered(alter: Callable[[torch.Tensor], torch.Tensor], width: int = 8) -> nn.Module:
    def forward(self: Function, x: torch.Tensor) -> object:
        return self.head(pooled(alter(torch.relu(self.stem(x)) * 4)))

    return Function(forward, stem=conv(width), head=nn.Linear(width, 5))


def rounded_blocks(depth: int) -> nn.Module:
    def forward(self: Function, x: torch.Tensor) -> object:
        x = torch.relu(self.stem(x)) * 4
        for block in self.blocks:
            x = torch.relu(x.int().float() + block(x))
        return self.head(pooled(x))

    return Function(forward, stem=conv(), blocks=nn.ModuleList(conv(8, 8) for _ in range(depth)), head=nn.Linear(8, 5))


# ---- inserted depth --------------------------------------------------------------------------------------------------


def shared_blocks(times: int) -> nn.Module:
    def forward(self: Function, x: torch.Tensor) -> object:
        x = torch.relu(self.stem(x))
        for _ in range(times):
            x = torch.relu(x + self.block(x))
        return self.head(pooled(x))

    return Function(forward, stem=conv(), block=conv(8, 8), head=nn.Linear(8, 5))


def new_shared_blocks(depth: int) -> nn.Module:
    """Blocks that are used twice each."""

    def forward(self: Function, x: torch.Tensor) -> object:
        x = torch.relu(self.stem(x))
        for index, block in enumerate(self.blocks):
            for _ in range(2 if index else 1):
                x = torch.relu(x + block(x))
        return self.head(pooled(x))

    blocks = nn.ModuleList(conv(8, 8) for _ in range(depth))
    return Function(forward, stem=conv(), blocks=blocks, head=nn.Linear(8, 5))


def normed_blocks(depth: int, *, affine: bool) -> nn.Module:
    def forward(self: Function, x: torch.Tensor) -> object:
        x = torch.relu(self.stem(x))
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return self.head(pooled(x))

    norms = (nn.BatchNorm2d(8, affine=affine) for _ in range(depth))
    blocks = nn.ModuleList(nn.Sequential(conv(8, 8), nn.ReLU(), conv(8, 8), norm) for norm in norms)
    return Function(forward, stem=conv(), blocks=blocks, head=nn.Linear(8, 5))


def clipped(*bounds: float) -> nn.Module:
    layers = [part for i, bound in enumerate(bounds) for part in (conv(8, 8 if i else 3), nn.Hardtanh(0, bound))]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 64, 5))


# ---- what the reply does not carry -----------------------------------------------------------------------------------


def normalised(mean: torch.Tensor, width: int = 8) -> nn.Module:
    def forward(self: Function, x: torch.Tensor) -> object:
        return self.head(pooled(torch.relu(self.stem(x - self.mean))))

    return Function(forward, mean=mean.view(3, 1, 1), stem=conv(width), head=nn.Linear(width, 5))


def normalised_inline(*means: float) -> nn.Module:
    def forward(self: Function, x: torch.Tensor) -> object:
        return self.head(pooled(torch.relu(self.stem(x - torch.tensor(means).view(3, 1, 1)))))

    return Function(forward, stem=conv(), head=nn.Linear(8, 5))


def projected(seed: int, width: int = 8, features: int = 16) -> nn.Module:
    def forward(self: Function, x: torch.Tensor) -> object:
        return self.head(torch.sin(pooled(torch.relu(self.stem(x))) @ self.projection))

    projection = torch.randn(width, features, generator=torch.Generator().manual_seed(seed))
    return Function(forward, projection=projection, stem=conv(width), head=nn.Linear(features, 5))


def filtered(kernel: torch.Tensor) -> nn.Module:
    def forward(self: Function, x: torch.Tensor) -> object:
        pad = self.kernel.shape[-1] // 2
        x = functional.conv2d(torch.relu(self.stem(x)), self.kernel, padding=pad, groups=8)
        return self.head(x.flatten(1))

    return Function(forward, kernel=kernel, stem=conv(), head=nn.Linear(8 * 64, 5))


def windowed(window: int) -> nn.Module:
    def forward(self: Function, x: torch.Tensor) -> object:
        x = self.stem(x).flatten(2).transpose(1, 2)
        logits = (x @ x.transpose(1, 2)).masked_fill(~self.mask, -1e4)
        return self.head((logits.softmax(-1) @ x).mean(1))

    distances = torch.arange(64)[:, None] - torch.arange(64)
    return Function(forward, mask=distances.abs() < window, stem=conv(), head=nn.Linear(8, 5))


def normed(width: int, *, affine: bool) -> nn.Module:
    norm = nn.BatchNorm2d(width, affine=affine)
    return nn.Sequential(conv(width), norm, nn.ReLU(), nn.Flatten(), nn.Linear(64 * width, 5))


def spectral(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    first = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 8))
    return Function(lambda self, x: self.head(torch.relu(self.first(pooled(x)))), first=first, head=nn.Linear(8, 5))


@dataclass(frozen=True)
class Case:
    """Builders of source and target, and whether the target contains the source."""

    source: Callable[[], nn.Module]
    target: Callable[[], nn.Module]
    is_exact: bool


MEANS = torch.tensor([0.1, 0.2, 0.3])
FIRST, SECOND, EVEN, ODD = slice(0, 8), slice(8, 16), slice(0, None, 2), slice(1, None, 2)


def sums(x: torch.Tensor) -> torch.Tensor:
    return torch.cumsum(x, 1)


def column_sums(x: torch.Tensor) -> torch.Tensor:
    return torch.cumsum(x, 2)


def triangle(x: torch.Tensor) -> torch.Tensor:
    return torch.tril(x.transpose(1, 3)).transpose(1, 3)


CASES = {
    "two heads": Case(lambda: two_heads(torch.relu), lambda: two_heads(torch.relu), True),
    "two wider heads": Case(lambda: two_heads(torch.relu), lambda: two_heads(torch.relu, 12), True),
    "another second head": Case(lambda: two_heads(torch.relu), lambda: two_heads(functional.gelu), False),
    "larger second output": Case(lambda: two_heads(torch.relu), lambda: two_heads(torch.relu, boxes=6), False),
    "pyramid": Case(pyramid, lambda: pyramid(12), True),
    "pyramid, another map": Case(pyramid, lambda: pyramid(last=3), False),
    "larger second map": Case(lambda: maps(8), lambda: maps(12), False),
    "gate, wider": Case(lambda: gated(FIRST, SECOND), lambda: gated(slice(12), slice(12, 24), 24), True),
    "gate by the other half": Case(lambda: gated(FIRST, SECOND), lambda: gated(SECOND, FIRST), False),
    "gate, every other": Case(lambda: gated(EVEN, ODD), lambda: gated(EVEN, ODD), True),
    "gate by the other ones": Case(lambda: gated(EVEN, ODD), lambda: gated(ODD, EVEN), False),
    "same pixels and channels": Case(lambda: corner(0), lambda: corner(0), True),
    "other pixels of some channels": Case(lambda: corner(0), lambda: corner(2), False),
    "whole numbers": Case(lambda: altered(lambda x: x.int().float()), lambda: altered(lambda x: x), False),
    "whole numbers, deeper": Case(lambda: rounded_blocks(1), lambda: rounded_blocks(2), False),
    "sums over channels": Case(lambda: altered(sums), lambda: altered(sums), True),
    "sums over channels, wider": Case(lambda: altered(sums), lambda: altered(sums, 12), False),
    "sums over pixels, wider": Case(lambda: altered(column_sums), lambda: altered(column_sums, 12), True),
    "triangles of pixels, wider": Case(lambda: altered(torch.tril), lambda: altered(torch.tril, 12), True),
    "triangles of channels": Case(lambda: altered(triangle), lambda: altered(triangle), True),
    "triangles of channels, wider": Case(lambda: altered(triangle), lambda: altered(triangle, 12), False),
    "a shared block, used more often": Case(lambda: shared_blocks(2), lambda: shared_blocks(3), False),
    "a new block, used twice": Case(lambda: new_shared_blocks(1), lambda: new_shared_blocks(2), True),
    "norms, deeper": Case(lambda: normed_blocks(1, affine=True), lambda: normed_blocks(2, affine=True), True),
    "norms alone, deeper": Case(lambda: normed_blocks(1, affine=False), lambda: normed_blocks(2, affine=False), False),
    "clipped, deeper": Case(lambda: clipped(6), lambda: clipped(6, 6), True),
    "clipped elsewhere, deeper": Case(lambda: clipped(6), lambda: clipped(6, 0.5), False),
    "buffer, wider": Case(lambda: normalised(MEANS), lambda: normalised(MEANS, 12), True),
    "another buffer": Case(lambda: normalised(MEANS), lambda: normalised(MEANS + 0.5), False),
    "constants": Case(lambda: normalised_inline(0.1, 0.2, 0.3), lambda: normalised_inline(0.1, 0.2, 0.3), True),
    "other constants": Case(lambda: normalised_inline(0.1, 0.2, 0.3), lambda: normalised_inline(0.9, 0.2, 0.3), False),
    "projection": Case(lambda: projected(0), lambda: projected(0), True),
    "another projection": Case(lambda: projected(0), lambda: projected(1), False),
    "wider projection": Case(lambda: projected(0), lambda: projected(1, 12, 24), False),
    "filter": Case(lambda: filtered(torch.ones(8, 1, 3, 3)), lambda: filtered(torch.ones(8, 1, 3, 3)), True),
    "larger filter": Case(lambda: filtered(torch.ones(8, 1, 3, 3)), lambda: filtered(torch.ones(8, 1, 5, 5)), False),
    "mask": Case(lambda: windowed(4), lambda: windowed(4), True),
    "another mask": Case(lambda: windowed(4), lambda: windowed(40), False),
    "norm alone, wider": Case(lambda: normed(8, affine=False), lambda: normed(12, affine=False), True),
    "norm alone to a scaling one": Case(lambda: normed(8, affine=False), lambda: normed(12, affine=True), True),
    "scaling norm to one alone": Case(lambda: normed(8, affine=True), lambda: normed(8, affine=False), False),
    "spectral norm": Case(lambda: spectral(0), lambda: spectral(1), False),
}


def as_one(output: object) -> torch.Tensor:
    """All outputs in one row per image."""
    values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else (output,)
    return torch.cat([value.flatten(1) for value in values], 1)


@pytest.mark.parametrize("name", CASES)
def test_what_looks_alike_is_exact_only_where_it_computes_the_same(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    source, target = (randomise(build(), IMAGE, seed=i) for i, build in enumerate((case.source, case.target)))
    plan = transfer_between(source, target, IMAGE).plan
    assert plan.is_exact == case.is_exact, plan.warnings
    if case.is_exact:
        images = torch.randn(4, *IMAGE.shape[1:])
        with torch.no_grad():
            assert largest_relative_difference(as_one(source(images)), as_one(target(images))) <= 1e-4


@pytest.mark.parametrize("is_swapped", [False, True])
def test_inputs_are_told_apart(is_swapped: bool) -> None:
    class Difference(nn.Module):
        def __init__(self, is_swapped: bool) -> None:
            super().__init__()
            self.head, self.is_swapped = nn.Linear(6, 3), is_swapped

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.head(y - x if self.is_swapped else x - y)

    example = torch.zeros(1, 6), torch.zeros(1, 6)
    structures = [export_architecture(Difference(swapped), example) for swapped in (False, is_swapped)]
    plan = plan_transfer(Source("trained", structures[0], Difference(False).state_dict()), structures[1])
    assert plan.is_exact == (not is_swapped)


def test_an_auxiliary_head_does_not_cost_the_class_layer() -> None:
    with_two, with_one = two_heads(torch.relu), two_heads(torch.relu)
    function = with_one.function
    with_one.function = lambda self, x: function(self, x)[0]
    for source, target in ((with_one, with_two), (with_two, with_one)):
        plan = plan_transfer(make_source(source, IMAGE), export_architecture(target, IMAGE))
        assert not plan.is_exact
        assert plan.origins["classes.weight"] == "exact"
        assert plan.origins.get("boxes.weight", "none") == "none"
