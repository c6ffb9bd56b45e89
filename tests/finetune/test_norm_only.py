"""Which layers are norm layers, what is tuned in them, and what happens to running statistics."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ghn_client.errors import GhnClientError, InvalidOptionError, UnsupportedModuleError
from ghn_client.finetune.handle import combine
from ghn_client.finetune.inserted_norms import insert_norms, layers_without_norm
from ghn_client.finetune.lora import low_rank_update
from ghn_client.finetune.matrix_layers import norm_kind
from ghn_client.finetune.norm_only import norm_only
from tests.finetune.networks import ResidualNetwork, mlp, small_cnn, train_a_little
from tests.finetune.public_libraries import public_library

INPUTS = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class ForeignRmsNorm(nn.Module):
    """As in language models: a weight, no bias, and an epsilon of another name."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = 1e-6

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


class LayerScale(nn.Module):
    """One parameter per channel, but no norm layer: it has no epsilon."""

    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (nn.BatchNorm1d(4), "batch_norm"),
        (nn.BatchNorm2d(4), "batch_norm"),
        (nn.BatchNorm3d(4), "batch_norm"),
        (nn.SyncBatchNorm(4), "batch_norm"),
        (nn.InstanceNorm2d(4, affine=True), "instance_norm"),
        (nn.LayerNorm(4), "layer_norm"),
        (nn.GroupNorm(2, 4), "group_norm"),
        (nn.RMSNorm(4), "rms_norm"),
        (ForeignRmsNorm(4), "rms_norm"),
        (LayerScale(4), None),
        (nn.Linear(4, 4), None),
        (nn.PReLU(4), None),
        (nn.Sequential(nn.BatchNorm1d(4)), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_kind(layer, kind):
    assert norm_kind(layer) == kind


def test_norm_layers_of_transformers_are_found_by_structure():
    llama = public_library("transformers.models.llama.modeling_llama")
    t5 = public_library("transformers.models.t5.modeling_t5")
    assert norm_kind(llama.LlamaRMSNorm(8)) == "rms_norm"
    assert norm_kind(t5.T5LayerNorm(8)) == "rms_norm"


def test_tunes_exactly_the_affine_parameters_and_the_head():
    handle = norm_only(ResidualNetwork(8))
    trainable = {name for name, p in handle.module.named_parameters() if p.requires_grad}
    norms = ["norm", "blocks.0.bn1", "blocks.0.bn2", "blocks.1.bn1", "blocks.1.bn2"]
    assert trainable == {f"{n}.{p}" for n in norms for p in ("weight", "bias")} | {"head.weight", "head.bias"}
    assert [group["name"] for group in handle.parameters()] == ["norm", "head"]


def test_head_can_be_left_out_or_named():
    assert norm_only(ResidualNetwork(8), head=False).num_trainable == 5 * 16
    assert norm_only(ResidualNetwork(8), head="head").num_trainable == 5 * 16 + 36
    with pytest.raises(InvalidOptionError):
        norm_only(ResidualNetwork(8), head="classifier")


@pytest.mark.parametrize("layer", [nn.LayerNorm(8), nn.RMSNorm(8), nn.GroupNorm(2, 8), ForeignRmsNorm(8)])
def test_norm_layers_without_statistics_are_tuned(layer):
    network = nn.Sequential(nn.Linear(5, 8), layer, nn.ReLU(), nn.Linear(8, 3))
    handle = norm_only(network, head=False)
    assert handle.num_trainable == sum(p.numel() for p in layer.parameters())


def test_a_network_without_norm_layers_is_refused_and_the_message_helps():
    with pytest.raises(UnsupportedModuleError, match="insert"):
        norm_only(mlp(5, 8, 3))


def test_insertion_leaves_the_function_and_the_names_of_the_weights():
    network = mlp(5, 8, 8, 3).eval()
    inputs = torch.randn(20, 5)
    before, names = network(inputs), set(network.state_dict())
    handle = norm_only(network, head=False, missing="insert", calibration=[inputs])
    assert handle.num_trainable == 2 * 16
    assert names <= set(network.state_dict())
    torch.testing.assert_close(network(inputs), before, atol=1e-5, rtol=1e-5)


def test_insertion_skips_layers_that_have_a_norm_layer_and_the_head():
    assert layers_without_norm(small_cnn()) == ("3", "7.v", "7.u")
    assert layers_without_norm(ResidualNetwork(8)) == ()
    with pytest.raises(UnsupportedModuleError):
        insert_norms(ResidualNetwork(8))


def test_insertion_makes_norm_layers_without_affine_parameters_affine():
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)
    )
    network.eval()
    before = network(INPUTS)
    handle = norm_only(network, head=False, missing="insert")
    assert handle.num_trainable == 8
    assert torch.equal(network(INPUTS), before)
    handle.restore()
    assert network[1].weight is None


def chain():
    """Two convolutions of one shape without norm layers, and a head; for inputs (B, 8, 4, 4)."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(128, 3))


def tie(network):
    network[2].weight = network[0].weight


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "computed",
    [tie, lambda network: nn.utils.parametrizations.weight_norm(network[2]), lambda n: nn.utils.weight_norm(n[2])],
    ids=["tied", "parametrized", "hook"],
)
def test_merging_keeps_the_function_where_a_weight_is_not_the_layers_own(computed):
    network, inputs = chain(), torch.randn(6, 8, 4, 4)
    computed(network)
    handle = norm_only(network, missing="insert")
    train_a_little(network, handle.parameters(), inputs)
    before = network(inputs)
    torch.testing.assert_close(handle.merge()(inputs), before, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("norms_first", [True, False])
def test_inserted_norms_fold_into_merged_low_rank_updates(norms_first):
    network, inputs = chain(), torch.randn(6, 8, 4, 4)
    names = set(network.state_dict())
    steps = [lambda: norm_only(network, missing="insert"), lambda: low_rank_update(network, rank=2, head=False)]
    handle = combine(*(step() for step in (steps if norms_first else reversed(steps))))
    train_a_little(network, handle.parameters(), inputs)
    before = network(inputs)
    torch.testing.assert_close(handle.merge()(inputs), before, atol=1e-5, rtol=1e-4)
    assert set(network.state_dict()) == names


def test_a_second_norm_behind_the_same_layer_is_refused():
    network = chain()
    norm_only(network, missing="insert", after=["0"])
    with pytest.raises(InvalidOptionError):
        insert_norms(network, after=["2", "0"])
    assert not hasattr(network[2], "inserted_norm")


@pytest.mark.parametrize(
    ("first", "options"),
    [
        (nn.Conv2d(3, 4, 3), {"after": ["nowhere"]}),
        (nn.ConvTranspose2d(3, 4, 3), {}),
        (nn.Conv2d(3, 4, 3), {"calibration": []}),
    ],
    ids=["unknown layer", "transposed", "no batch"],
)
def test_an_impossible_insertion_changes_nothing(first, options):
    network = nn.Sequential(first, nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, affine=False), nn.Linear(4, 2))
    names = list(network.state_dict())
    with pytest.raises(GhnClientError):
        norm_only(network, missing="insert", **options)
    assert list(network.state_dict()) == names


def test_new_affine_parameters_have_the_precision_of_the_network():
    network = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2)).double()
    norm_only(network, missing="insert")
    assert network(torch.randn(6, 5).double()).dtype == torch.float64
    assert network[1].weight.dtype == torch.float64


@pytest.mark.parametrize(
    ("statistics", "moves", "batch"), [("update", True, True), ("keep", False, True), ("freeze", False, False)]
)
def test_statistics_policy(statistics, moves, batch):
    network = ResidualNetwork(8)
    reference = network.eval()(INPUTS)
    norm_only(network, statistics=statistics)
    before = network.norm.running_mean.clone()
    output = network.train()(INPUTS)
    assert (not torch.equal(network.norm.running_mean, before)) == moves
    assert (not torch.allclose(output, reference, atol=1e-5)) == batch


def test_statistics_policy_ends_with_the_handle():
    network = ResidualNetwork(8)
    norm_only(network, statistics="freeze").restore()
    norm_only(network, statistics="keep").restore()
    before = network.norm.running_mean.clone()
    network.train()(INPUTS)
    assert not torch.equal(network.norm.running_mean, before)


@pytest.mark.parametrize("statistics", ["update", "keep", "freeze"])
def test_restoring_gives_modes_and_counters_back(statistics):
    network = ResidualNetwork(8).train()
    handle = norm_only(network, statistics=statistics)
    network(INPUTS)
    handle.restore()
    assert all(layer.training for layer in network.modules())
    assert network.norm.num_batches_tracked == 0


class FrozenNorm(nn.Module):
    """As in detection models: statistics without a momentum."""

    def __init__(self, width):
        super().__init__()
        self.running_mean, self.running_var = nn.Buffer(torch.zeros(width)), nn.Buffer(torch.ones(width))

    def forward(self, features):
        return (features - self.running_mean) / self.running_var


@pytest.mark.parametrize("statistics", ["update", "keep", "freeze"])
def test_layers_whose_statistics_never_move_are_left_alone(statistics):
    network = nn.Sequential(nn.Linear(5, 8), FrozenNorm(8), nn.LayerNorm(8), nn.Linear(8, 3))
    handle = norm_only(network, statistics=statistics)
    assert torch.equal(handle.restore()[1].running_mean, torch.zeros(8))


def test_unknown_options_are_refused():
    with pytest.raises(GhnClientError):
        norm_only(ResidualNetwork(8), statistics="sometimes")
    with pytest.raises(InvalidOptionError):
        norm_only(ResidualNetwork(8), missing="perhaps")


def test_tuned_norms_survive_tracing_to_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    network = mlp(5, 8, 3).eval()
    handle = norm_only(network, missing="insert")
    inputs = torch.randn(4, 5)
    train_a_little(handle.module, handle.parameters(), inputs)
    torch.onnx.export(network, (inputs,), str(tmp_path / "tuned.onnx"), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "tuned.onnx"))
    (output,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), network(inputs).detach(), atol=1e-5, rtol=1e-4)
