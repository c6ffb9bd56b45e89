"""Factored modules: same interface, same function as the dense product, trainable, and back again."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ghn_client.errors import InvalidOptionError
from ghn_client.factors import FactorPair, factor_pairs
from ghn_client.finetune import defactorize_module, factorize_module
from ghn_client.finetune.factored import FactoredLayer, frobenius_decay


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.feed_forward = nn.Sequential(nn.Linear(16, 40), nn.GELU(), nn.Linear(40, 16))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        attended, _ = self.attention(tokens, tokens, tokens)
        return self.feed_forward(attended)


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 24, (3, 5), padding="same", dilation=2, bias=False),
        nn.ReLU(),
        nn.Conv2d(24, 24, 3, padding=1, padding_mode="circular"),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 10),
    )


def low_rank_state(module: nn.Module, names: list[str], *, rank: int = 3) -> dict[str, torch.Tensor]:
    """A prediction as the server would give it: random factors for some weights, random values for the rest."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, tensor in module.state_dict().items():
        if name not in names:
            state[name] = torch.randn(tensor.shape, generator=generator) * 0.2
            continue
        kernel = (1,) * (tensor.dim() - 2)
        state[f"{name}.factor_in"] = torch.randn((rank, *tensor.shape[1:]), generator=generator) * 0.2
        state[f"{name}.factor_out"] = torch.randn((tensor.shape[0], rank, *kernel), generator=generator) * 0.2
    return state


def dense_reference(module: nn.Module, state: dict[str, torch.Tensor]) -> nn.Module:
    reference = copy.deepcopy(module)
    dense = {name: tensor for name, tensor in state.items() if ".factor_" not in name}
    reference.load_state_dict(dense | {name: pair.dense() for name, pair in factor_pairs(state).items()})
    return reference


CASES = {
    "convolutions": (convolutions, ["0.weight", "2.weight", "4.weight"], (2, 3, 12, 12)),
    "attention": (
        Attention,
        ["attention.in_proj_weight", "attention.out_proj.weight", "feed_forward.0.weight", "feed_forward.2.weight"],
        (2, 5, 16),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_factored_module_computes_what_the_dense_product_does(case: str) -> None:
    build, names, shape = CASES[case]
    module, inputs = build(), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    state = low_rank_state(module, names)
    factored = factorize_module(module, state)
    torch.testing.assert_close(factored(inputs), dense_reference(module, state)(inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_defactorizing_gives_the_dense_network_with_its_own_names(case: str) -> None:
    build, names, shape = CASES[case]
    module, inputs = build(), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    factored = factorize_module(module, low_rank_state(module, names))
    dense = defactorize_module(factored)
    assert set(dense.state_dict()) == set(module.state_dict())
    torch.testing.assert_close(dense(inputs), factored(inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_factoring_makes_the_network_smaller(case: str) -> None:
    build, names, _ = CASES[case]
    module = build()
    factored = factorize_module(module, low_rank_state(module, names))
    assert sum(p.numel() for p in factored.parameters()) < sum(p.numel() for p in module.parameters())


def test_the_given_module_is_left_alone() -> None:
    module = convolutions()
    before = copy.deepcopy(module.state_dict())
    factorize_module(module, low_rank_state(module, ["0.weight"]))
    assert isinstance(module[0], nn.Conv2d)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_in_place_changes_the_module_itself() -> None:
    module = convolutions()
    assert factorize_module(module, low_rank_state(module, ["0.weight"]), inplace=True) is module
    assert isinstance(module[0], FactoredLayer)


def test_a_factored_network_trains_with_frobenius_decay() -> None:
    module = convolutions()
    factored = factorize_module(module, low_rank_state(module, CASES["convolutions"][1]))
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn((16, 3, 12, 12), generator=generator), torch.arange(16) % 10
    optimizer = torch.optim.SGD(factored.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(factored(inputs), labels) + 1e-4 * frobenius_decay(factored)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_a_single_linear_layer_can_be_factored() -> None:
    layer = nn.Linear(12, 9)
    factored = factorize_module(layer, low_rank_state(layer, ["weight"]))
    assert isinstance(factored, FactoredLayer)
    assert isinstance(defactorize_module(factored), nn.Linear)


def test_encoder_layers_of_torch_read_the_dense_weight_in_their_fast_path() -> None:
    layer, inputs = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval(), torch.randn(2, 4, 16)
    state = low_rank_state(layer, ["linear1.weight", "linear2.weight"])
    with torch.no_grad():
        output = factorize_module(layer, state)(inputs)
        torch.testing.assert_close(output, dense_reference(layer, state)(inputs), rtol=1e-4, atol=1e-5)


def test_shared_weights_stay_shared() -> None:
    module = nn.ModuleDict({"embedding": nn.Embedding(30, 8), "decoder": nn.Linear(8, 30, bias=False)})
    module["decoder"].weight = module["embedding"].weight
    state = {"decoder.weight.factor_in": torch.randn(2, 8), "decoder.weight.factor_out": torch.randn(30, 2)}
    factored = factorize_module(module, state)
    assert factored["decoder"].weight is factored["embedding"].weight
    torch.testing.assert_close(factored["decoder"].weight.data, factor_pairs(state)["decoder.weight"].dense())


def test_dtype_training_mode_and_frozen_weights_are_kept() -> None:
    module = nn.Sequential(nn.Linear(12, 9)).double().eval()
    module[0].weight.requires_grad_(False)
    factored = factorize_module(module, low_rank_state(module, ["0.weight"]))
    assert factored[0].u.weight.dtype == torch.float64
    assert not factored[0].training
    assert not factored[0].v.weight.requires_grad


@pytest.mark.parametrize(
    "state",
    [
        {"0.weight.factor_in": torch.zeros(2, 3, 3, 3)},
        {"9.weight.factor_in": torch.zeros(2, 3), "9.weight.factor_out": torch.zeros(4, 2)},
        {"0.weight.factor_in": torch.zeros(2, 4, 3, 3), "0.weight.factor_out": torch.zeros(16, 2, 1, 1)},
        {"0.weight.factor_in": torch.zeros(2, 3, 3, 3), "0.weight.factor_out": torch.zeros(16, 3, 1, 1)},
        {"0.bias": torch.zeros(3)},
        {"nothing": torch.zeros(3)},
    ],
    ids=["half a pair", "unknown weight", "wrong product", "ranks differ", "wrong shape", "unknown tensor"],
)
def test_what_does_not_fit_is_refused_before_anything_changes(state: dict[str, torch.Tensor]) -> None:
    module = convolutions()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(InvalidOptionError):
        factorize_module(module, state, inplace=True)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_a_parametrized_weight_can_be_assigned_again() -> None:
    module = Attention()
    factored = factorize_module(module, low_rank_state(module, ["attention.in_proj_weight"]))
    wanted = torch.randn(48, 2) @ torch.randn(2, 16)
    factored.attention.in_proj_weight = wanted
    torch.testing.assert_close(factored.attention.in_proj_weight, wanted, rtol=1e-3, atol=1e-4)


def test_a_pair_knows_its_product() -> None:
    pair = FactorPair(torch.ones(2, 3, 1, 1), torch.ones(4, 2, 1, 1))
    assert pair.rank == 2
    torch.testing.assert_close(pair.dense(), torch.full((4, 3, 1, 1), 2.0))
