"""What every strategy promises: starts at the base, tunes only its own, can be switched off, undone and merged."""

from __future__ import annotations

import pytest
import torch

from ghn_client.errors import InvalidOptionError
from ghn_client.finetune.delta import save_delta
from ghn_client.finetune.fit import fit
from ghn_client.finetune.handle import combine
from ghn_client.finetune.peft_format import export_peft
from ghn_client.finetune.strategies import STRATEGIES, prepare
from tests.finetune.networks import small_cnn, train_a_little

INPUTS = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
CASES = [(name, {}) for name in STRATEGIES if name != "additive"] + [
    ("norm_only", {"missing": "insert"}),
    ("norm_only", {"missing": "insert", "calibration": [INPUTS]}),
    ("norm_only", {"statistics": "freeze", "head": False}),
    ("bias_only", {"head": True, "statistics": "keep"}),
]


@pytest.fixture(params=CASES, ids=lambda case: "-".join([case[0], *case[1]]))
def case(request):
    name, options = request.param
    network = small_cnn().eval()
    return network, name, options


def values(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items() if not name.endswith("tracked")}


def test_starts_at_the_base_function(case):
    network, name, options = case
    before = network(INPUTS)
    handle = prepare(network, name, **options)
    torch.testing.assert_close(handle.module.eval()(INPUTS), before, atol=1e-6, rtol=1e-5)


def test_changes_the_function_when_trained(case):
    network, name, options = case
    before = network(INPUTS)
    handle = prepare(network, name, **options)
    train_a_little(handle.module, handle.parameters(), INPUTS)
    assert (handle.module(INPUTS) - before).abs().max() > 1e-4


def test_changes_nothing_but_its_own_parameters(case):
    network, name, options = case
    handle = prepare(network, name, **options)
    tuned = set(handle.parts[0].state())
    before = values(handle.module)
    train_a_little(handle.module, handle.parameters(), INPUTS)
    changed = {
        key for key, value in handle.module.state_dict().items() if key in before and not value.equal(before[key])
    }
    assert changed <= tuned


def test_disabled_block_computes_the_base_function(case):
    network, name, options = case
    before = network(INPUTS)
    handle = prepare(network, name, **options)
    train_a_little(handle.module, handle.parameters(), INPUTS)
    tuned = handle.module(INPUTS)
    with handle.disabled() as base:
        torch.testing.assert_close(base(INPUTS), before, atol=1e-6, rtol=1e-5)
    assert torch.equal(handle.module(INPUTS), tuned)


def test_restore_gives_the_base_back_bit_for_bit(case):
    network, name, options = case
    before, flags = values(network), {key: p.requires_grad for key, p in network.named_parameters()}
    handle = prepare(network, name, **options)
    train_a_little(handle.module, handle.parameters(), INPUTS)
    restored = handle.restore()
    after = values(restored)
    assert set(after) == set(before)
    assert all(after[key].equal(before[key]) for key in before)
    assert {key: p.requires_grad for key, p in restored.named_parameters()} == flags


def test_merge_keeps_the_tuned_function_under_the_base_names(case):
    network, name, options = case
    names = set(network.state_dict())
    handle = prepare(network, name, **options)
    train_a_little(handle.module, handle.parameters(), INPUTS)
    tuned = handle.module(INPUTS)
    merged = handle.merge().eval()
    torch.testing.assert_close(merged(INPUTS), tuned, atol=1e-5, rtol=1e-4)
    assert not any("parametrizations" in key or "inserted_norm" in key for key in merged.state_dict())
    assert names <= set(merged.state_dict())


def test_parameter_groups_have_no_weight_decay_and_only_trainable_parameters(case):
    network, name, options = case
    handle = prepare(network, name, **options)
    groups = handle.parameters()
    listed = [parameter for group in groups for parameter in group["params"]]
    trainable = [parameter for parameter in handle.module.parameters() if parameter.requires_grad]
    assert all(group["weight_decay"] == 0 for group in groups)
    assert {id(p) for p in listed} == {id(p) for p in trainable}
    assert len(listed) == len(trainable)
    assert handle.num_trainable == sum(p.numel() for p in trainable)


def test_closed_handles_refuse_to_act():
    handle = prepare(small_cnn(), "norm_only")
    handle.merge()
    with pytest.raises(InvalidOptionError):
        handle.restore()


def test_unknown_strategy_lists_the_known_ones():
    with pytest.raises(InvalidOptionError, match="norm_only"):
        prepare(small_cnn(), "everything")


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("low_rank_update", {"rank": "abc"}),
        ("low_rank_update", {"rank": 2.5}),
        ("low_rank_update", {"rank": True}),
        ("low_rank_update", {"rank": {"0": "2"}}),
        ("low_rank_update", {"layers": "0"}),
        ("low_rank_update", {"alpha": [1.0]}),
        ("norm_only", {"head": 3}),
        ("norm_only", {"calibration": 3}),
        ("norm_only", {"statistics": None}),
        ("low_rank", {"frobenius_decay": "much"}),
        ("additive", {"width": 3, "example_inputs": [1.0]}),
        ("additive", {"width": [3.0]}),
        ("head_only", {"heads": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_options_of_another_type_are_refused(strategy, options):
    with pytest.raises(InvalidOptionError):
        prepare(small_cnn(), strategy, **options)


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("low_rank_update", {"rank": {"0": 2}, "alpha": 2, "layers": ("0",), "head": "8"}),
        ("low_rank_update", {"alpha": {"0": 2}, "layers": ["0"], "head": ["8"]}),
        ("norm_only", {"missing": "insert", "calibration": iter([INPUTS]), "after": None}),
        ("low_rank", {"frobenius_decay": 0}),
        ("additive", {"width": (3,), "example_inputs": INPUTS, "head": None}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_options_of_every_type_are_taken(strategy, options):
    assert prepare(small_cnn(), strategy, **options).num_trainable


def test_names_may_be_hyphenated():
    assert prepare(small_cnn(), "norm-only").strategy == "norm_only"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_unknown_choice_of_statistics_changes_nothing(strategy):
    network = small_cnn()
    before = [(name, type(child)) for name, child in network.named_modules()]
    options = {"samples": 4} if strategy == "additive" else {}
    with pytest.raises(InvalidOptionError, match="statistics"):
        prepare(network, strategy, statistics="sometimes", **options)
    assert [(name, type(child)) for name, child in network.named_modules()] == before


def test_combine_tunes_the_union_and_restores_everything():
    network = small_cnn().eval()
    before = values(network)
    norm = prepare(network, "norm_only", head=False)
    factors = prepare(network, "low_rank", head=False)
    both = combine(norm, factors)
    train_a_little(both.module, both.parameters(), INPUTS)
    assert both.num_trainable == 2 * 8 + (8 * 2 + 2 * 8 + 8)
    after = values(both.restore())
    assert all(after[key].equal(before[key]) for key in before)


def combined():
    """Two strategies that share the head and the running statistics."""
    network = small_cnn().eval()
    return combine(prepare(network, "norm_only"), prepare(network, "low_rank_update", rank=2))


def test_tensors_that_two_parts_share_are_switched_and_restored():
    handle, base = combined(), small_cnn().eval()
    before = values(base)
    train_a_little(handle.module, handle.parameters(), INPUTS)
    tuned = values(handle.module)
    with handle.disabled() as module:
        assert torch.equal(module(INPUTS), base(INPUTS))
    assert all(torch.equal(tuned[key], value) for key, value in values(handle.module).items())
    assert all(torch.equal(before[key], value) for key, value in values(handle.restore()).items())


def test_disabled_blocks_nest():
    handle = prepare(small_cnn(), "norm_only")
    train_a_little(handle.module, handle.parameters(), INPUTS)
    with handle.disabled() as module:
        base = module(INPUTS)
        with handle.disabled():
            pass
        assert torch.equal(module(INPUTS), base)


@pytest.mark.parametrize("end", ["disable", "restore", "merge"])
def test_a_handle_whose_tuned_values_are_not_in_the_module_is_refused(tmp_path, end):
    network = small_cnn()
    handle, other = prepare(network, "low_rank_update"), prepare(network, "norm_only", head=False)
    getattr(handle, end)()
    for act in (
        lambda: save_delta(handle, tmp_path / "delta.safetensors"),
        lambda: export_peft(handle, tmp_path),
        lambda: combine(handle, other),
        lambda: fit(handle, []),
    ):
        with pytest.raises(InvalidOptionError):
            act()


def test_combine_refuses_handles_of_different_modules():
    with pytest.raises(InvalidOptionError):
        combine(prepare(small_cnn(), "norm_only"), prepare(small_cnn(), "low_rank"))


def test_combine_refuses_a_tuned_weight_that_became_computed():
    network = small_cnn()
    with pytest.raises(InvalidOptionError):
        combine(prepare(network, "all"), prepare(network, "low_rank_update"))
