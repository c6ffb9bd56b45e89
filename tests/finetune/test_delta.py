"""Delta files hold what was tuned, fit their base alone, and come back exactly."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ghn_client.errors import FileError, LoadError
from ghn_client.finetune.additive import additive
from ghn_client.finetune.delta import base_digest, load_complete_model, load_delta, read_delta, save_delta
from ghn_client.finetune.handle import combine
from ghn_client.finetune.norm_only import norm_only
from ghn_client.finetune.strategies import STRATEGIES, prepare
from tests.finetune.networks import ResidualNetwork, small_cnn, train_a_little

INPUTS = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
CASES = [
    *((name, {"samples": 20, "changed": 3} if name == "additive" else {}) for name in STRATEGIES),
    ("norm_only", {"missing": "insert", "calibration": [INPUTS]}),
    ("norm_only", {"statistics": "freeze", "head": False}),
    ("low_rank_update", {"rank": 3, "alpha": 6.0}),
    ("low_rank_update", {"rank": 2, "layers": ["0", "8"]}),
]


def tuned(network, strategy, options):
    handle = prepare(network, strategy, **options)
    train_a_little(handle.module, handle.parameters(), INPUTS)
    return handle


@pytest.mark.parametrize(("strategy", "options"), CASES, ids=lambda value: str(value)[:40])
def test_round_trip(tmp_path, strategy, options):
    handle = tuned(small_cnn(), strategy, options)
    save_delta(handle, tmp_path / "delta.safetensors")
    again = load_delta(small_cnn(), tmp_path / "delta.safetensors")
    assert torch.equal(again.module.eval()(INPUTS), handle.module(INPUTS))
    with again.disabled() as base:
        torch.testing.assert_close(base(INPUTS), small_cnn().eval()(INPUTS), atol=1e-6, rtol=1e-5)


class Tied(nn.Module):
    """A head that shares its weight with an embedding, and one BatchNorm under two names."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.middle = nn.Embedding(4, 8), nn.Linear(8, 8)
        self.norm = self.same_norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 4, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, features):
        return self.head(self.same_norm(self.norm(self.middle(features))))


@pytest.mark.parametrize("strategy", ["all", "norm_only", "head_only", "low_rank_update"])
def test_tensors_of_several_names_come_back(tmp_path, strategy):
    handle, inputs = prepare(Tied(), strategy), torch.randn(6, 8)
    train_a_little(handle.module, handle.parameters(), inputs)
    save_delta(handle, tmp_path / "delta.safetensors")
    again = load_delta(Tied(), tmp_path / "delta.safetensors")
    assert torch.equal(again.module.eval()(inputs), handle.module(inputs))
    assert torch.equal(again.restore().eval()(inputs), Tied().eval()(inputs))


class Compiled(nn.Module):
    """The names of ``torch.compile``, without its seconds."""

    def __init__(self, network):
        super().__init__()
        self._orig_mod = network

    def forward(self, inputs):
        return self._orig_mod(inputs)


@pytest.mark.parametrize("wrap", [Compiled, nn.DataParallel, lambda network: Compiled(nn.DataParallel(network))])
@pytest.mark.parametrize(
    ("strategy", "options"),
    [("norm_only", {"missing": "insert"}), ("low_rank_update", {"rank": 2}), ("additive", {"width": 3})],
    ids=lambda value: str(value),
)
def test_wrapped_networks_and_plain_ones_read_each_others_deltas(tmp_path, strategy, options, wrap):
    for base, other in ((wrap(small_cnn()), small_cnn()), (small_cnn(), wrap(small_cnn()))):
        handle = tuned(base, strategy, options)
        save_delta(handle, tmp_path / "delta.safetensors")
        again = load_delta(other, tmp_path / "delta.safetensors")
        assert torch.equal(again.module.eval()(INPUTS), handle.module(INPUTS))


def test_only_the_tuned_numbers_are_stored(tmp_path):
    handle = tuned(ResidualNetwork(8), "norm_only", {"statistics": "freeze"})
    size = save_delta(handle, tmp_path / "delta.safetensors")
    _, tensors = read_delta(tmp_path / "delta.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == handle.num_trainable
    assert size < 4 * handle.num_trainable + 4096


@pytest.mark.parametrize(
    ("strategy", "options"), [case for case in CASES if case[0] != "all"], ids=lambda v: str(v)[:40]
)
def test_another_base_is_refused_and_left_alone(tmp_path, strategy, options):
    save_delta(tuned(small_cnn(), strategy, options), tmp_path / "delta.safetensors")
    other = small_cnn(seed=5)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(LoadError):
        load_delta(other, tmp_path / "delta.safetensors")
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())
    assert all(parameter.requires_grad for parameter in other.parameters())


def test_a_part_that_cannot_be_prepared_leaves_the_module_as_it_was(tmp_path):
    path, impossible = tmp_path / "delta.safetensors", ["head_only", {"head": False}]
    save_delta(tuned(small_cnn(), "low_rank_update", {"rank": 2}), path)
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    metadata["parts"] = json.dumps([*json.loads(metadata["parts"]), impossible])
    save_file(tensors, path, metadata)
    network = small_cnn()
    with pytest.raises(LoadError):
        load_delta(network, path)
    assert network.state_dict().keys() == small_cnn().state_dict().keys()
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_combined_strategies_that_share_tensors_give_the_base_back(tmp_path):
    network = small_cnn()
    both = combine(norm_only(network), prepare(network, "low_rank_update", rank=2))
    train_a_little(both.module, both.parameters(), INPUTS)
    save_delta(both, tmp_path / "delta.safetensors")
    again = load_delta(small_cnn(), tmp_path / "delta.safetensors")
    assert torch.equal(again.module.eval()(INPUTS), both.module(INPUTS))
    assert torch.equal(again.restore().eval()(INPUTS), small_cnn().eval()(INPUTS))


def test_combined_strategies_travel_together(tmp_path):
    network = small_cnn()
    norm = norm_only(network, head=False)
    both = combine(norm, additive(norm.module, width=3))
    train_a_little(both.module, both.parameters(), INPUTS)
    save_delta(both, tmp_path / "delta.safetensors")
    again = load_delta(small_cnn(), tmp_path / "delta.safetensors")
    assert again.strategy == "norm_only+additive"
    assert torch.equal(again.module.eval()(INPUTS), both.module(INPUTS))


def test_digest_is_the_same_before_and_after_preparation():
    network = small_cnn()
    before = base_digest(network)
    for strategy in ("norm_only", "low_rank_update"):
        handle = prepare(network, strategy, **({"missing": "insert"} if strategy == "norm_only" else {}))
        assert base_digest(network) == before
        handle.restore()
    assert base_digest(network) == before


def test_digest_sees_one_changed_bit():
    network = small_cnn()
    before = base_digest(network)
    network[0].weight.data[0, 0, 0, 0] += 1e-6
    assert base_digest(network) != before
    assert base_digest(network, without=["0.weight"]) == base_digest(small_cnn(), without=["0.weight"])


REQUEST = {"architecture": "sha256:abc", "model": "tiny", "seed": 3}


def test_a_request_with_its_gammas_is_a_complete_model(tmp_path):
    handle = tuned(small_cnn(seed=3), "norm_only", {})
    save_delta(handle, tmp_path / "delta.safetensors", request=REQUEST)
    asked = []

    def predict(request):
        asked.append(request)
        return small_cnn(seed=request["seed"]).state_dict()

    model = load_complete_model(small_cnn(seed=0), tmp_path / "delta.safetensors", predict).module.eval()
    assert asked == [REQUEST]
    assert torch.equal(model(INPUTS), handle.module(INPUTS))


def test_a_base_that_was_rounded_differently_needs_the_same_request(tmp_path):
    save_delta(tuned(small_cnn(), "norm_only", {}), tmp_path / "delta.safetensors", request=REQUEST)
    nearly = small_cnn()
    nearly[0].weight.data *= 1 + 1e-7
    with pytest.raises(LoadError):
        load_delta(nearly, tmp_path / "delta.safetensors")
    with pytest.raises(LoadError):
        load_delta(nearly, tmp_path / "delta.safetensors", request={**REQUEST, "seed": 4})
    assert load_delta(nearly, tmp_path / "delta.safetensors", request=dict(reversed(REQUEST.items()))).num_trainable


def test_files_that_are_no_deltas_are_refused(tmp_path):
    (tmp_path / "text").write_text("hello")
    save_file({"a": torch.zeros(2)}, str(tmp_path / "plain"))
    handle = tuned(small_cnn(), "norm_only", {})
    save_delta(handle, tmp_path / "delta.safetensors")
    whole = (tmp_path / "delta.safetensors").read_bytes()
    (tmp_path / "cut").write_bytes(whole[:-10])
    for name in ("text", "plain", "cut", "absent"):
        with pytest.raises(FileError):
            read_delta(tmp_path / name)
    with pytest.raises(FileError):
        load_complete_model(small_cnn(), tmp_path / "delta.safetensors", lambda request: {})


def test_a_delta_of_another_architecture_is_refused(tmp_path):
    save_delta(tuned(small_cnn(), "norm_only", {}), tmp_path / "delta.safetensors")
    with pytest.raises(LoadError):
        load_delta(ResidualNetwork(8), tmp_path / "delta.safetensors")


def test_metadata_is_readable_json(tmp_path):
    save_delta(tuned(small_cnn(), "low_rank_update", {"rank": 2}), tmp_path / "delta.safetensors")
    info, _ = read_delta(tmp_path / "delta.safetensors")
    assert info.parts[0][0] == "low_rank_update"
    assert set(json.loads(json.dumps(info.parts[0][1]))["rank"].values()) == {2}
