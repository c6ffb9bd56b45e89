from __future__ import annotations

import dataclasses

import pytest
import torch

from ghn_service.errors import CheckpointError, DeviceLostError, InvalidOptionError, OutOfMemoryError, PredictionError
from ghn_service.graph.architecture import ArchitectureGraph, Node, ParameterSpec
from ghn_service.graph.op_types import OP_TYPE_NAMES
from ghn_service.hypernetwork.checkpoint import ModelCard, save_checkpoint
from ghn_service.hypernetwork.features import build_features, collate
from ghn_service.hypernetwork.fill import FALLBACKS
from ghn_service.parameters import ParameterSet
from ghn_service.postprocess.low_rank.ranks import LowRank
from ghn_service.postprocess.steps import Step
from ghn_service.postprocess.weighted_layers import weighted_layers
from ghn_service.predictor import PredictionOptions, Predictor, choose_device
from tests.hypernetwork.small_graphs import CONFIGS, SMALL, chain, conv, small_ghn, small_network

WIDE = small_network(40)


@pytest.fixture(scope="module", params=CONFIGS)
def predictor(request) -> Predictor:
    return Predictor(small_ghn(CONFIGS[request.param]))


@pytest.fixture(scope="module")
def ghn3() -> Predictor:
    return Predictor(small_ghn())


def equal(first: ParameterSet, second: ParameterSet) -> bool:
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def test_served_values_are_the_differentiable_ones(predictor):
    (expected,) = predictor.ghn(collate([build_features(WIDE, predictor.ghn.config)]))
    found = predictor.predict(WIDE)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor.detach(), rtol=1e-5, atol=1e-6)


def test_every_trainable_tensor_is_there_in_order(predictor):
    found = predictor.predict(WIDE)
    assert list(found) == [spec.name for spec in WIDE.parameters()]
    assert all(tensor.is_contiguous() and torch.isfinite(tensor).all() for tensor in found.values())


def test_origins_say_what_was_repeated_and_what_was_not_predicted(ghn3):
    assert dict(ghn3.predict(WIDE).origins) == {
        "stem": "tiled",
        "stem_norm.weight": "tiled",
        "stem_norm.bias": "tiled",
        "depthwise": "tiled",
        "depthwise_bias": "tiled",
        "row": "tiled",
        "row_norm.weight": "tiled",
        "row_norm.bias": "tiled",
        "positions": "tiled",
        "head.weight": "tiled",
        "head.bias": "predicted",
        "class_token": "fallback:truncated_normal",
    }


def test_analysis_says_what_a_prediction_does(predictor):
    analysis, found = predictor.analyze(WIDE), predictor.predict(WIDE)
    assert dict(analysis.origins) == dict(found.origins)
    assert list(analysis.specs) == list(found)
    assert analysis.op_types["row_norm.bias"] == "ln"
    assert analysis.op_types["class_token"] == ""
    assert analysis.num_predicted_parameters == WIDE.num_parameters - 80


@pytest.mark.parametrize("permutation", [(1, 0, 2, 3), (2, 3, 1, 0), (3, 1, 2, 0)], ids=str)
def test_values_come_in_the_layout_of_the_file(ghn3, permutation):
    shape = (20, 12, 3, 5)
    stored = tuple(shape[permutation.index(axis)] for axis in range(4))
    plain = ghn3.predict(chain(conv("w", *shape)))["w"]
    spec = ParameterSpec("w", stored, permutation=permutation)
    found = ghn3.predict(chain(Node("conv", "w", weight=spec)))["w"]
    assert torch.equal(found.permute(permutation), plain)


def test_earlier_predictions_leave_no_trace(predictor):
    first = predictor.predict(WIDE)
    predictor.predict(small_network(3))
    assert equal(first, predictor.predict(WIDE))


def test_the_seed_decides_what_is_drawn_and_nothing_else(ghn3):
    first, other = (ghn3.predict(WIDE, options=PredictionOptions(seed=seed)) for seed in (1, 2))
    assert {name for name in first if not torch.equal(first[name], other[name])} == {"positions", "class_token"}


def test_patterns_select_tensors_without_changing_them(ghn3):
    found = ghn3.predict(WIDE, options=PredictionOptions(include=("*_norm.*", "class_token")))
    assert list(found) == ["stem_norm.weight", "stem_norm.bias", "row_norm.weight", "row_norm.bias", "class_token"]
    whole = ghn3.predict(WIDE)
    torch.testing.assert_close(dict(found), {name: whole[name] for name in found}, rtol=1e-6, atol=1e-7)


def test_patterns_may_select_nothing(ghn3):
    assert len(ghn3.predict(WIDE, options=PredictionOptions(include=("nothing",)))) == 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_other_dtypes_are_the_rounded_values(ghn3, dtype):
    found = ghn3.predict(WIDE, options=PredictionOptions(dtype=dtype))
    for name, tensor in ghn3.predict(WIDE).items():
        torch.testing.assert_close(found[name], tensor.to(getattr(torch, dtype)), rtol=0, atol=0)


@pytest.mark.parametrize("rule", FALLBACKS)
def test_tensors_outside_the_graph_are_filled_by_their_rule(ghn3, rule):
    graph = dataclasses.replace(WIDE, other_parameters=(ParameterSpec("x", (5, 4), (1, 0), fallback=rule),))
    found = ghn3.predict(graph)
    assert found.origins["x"] == f"fallback:{rule}"
    assert torch.isfinite(found["x"]).all()


def test_nodes_that_no_decoder_can_give_fall_back(ghn3):
    found = ghn3.predict(chain(conv("volume", 4, 4, 3, 3, 3), conv("w", 4, 4)))
    assert dict(found.origins) == {"volume": "fallback:kaiming_normal", "w": "predicted"}


def test_types_unknown_to_the_checkpoint_are_contracted():
    names = tuple(name for name in OP_TYPE_NAMES if name not in ("bn", "max_pool"))
    predictor = Predictor(small_ghn(dataclasses.replace(SMALL, op_types=names)))
    found = predictor.predict(WIDE)
    assert found.origins["stem_norm.weight"].startswith("fallback:")
    assert found.origins["row_norm.weight"] == "tiled"
    assert any("bn" in warning for warning in found.warnings)


def test_values_that_are_not_finite_are_no_prediction():
    predictor = Predictor(small_ghn())
    with torch.no_grad():
        predictor.ghn.decoder.output.bias[3] = torch.nan
    with pytest.raises(PredictionError):
        predictor.predict(WIDE)


def test_float16_overflow_is_no_prediction():
    predictor = Predictor(small_ghn())
    with torch.no_grad():
        predictor.ghn.decoder.output.bias[3] = 1e7
    assert predictor.predict(WIDE)
    with pytest.raises(PredictionError):
        predictor.predict(WIDE, options=PredictionOptions(dtype="float16"))


def test_stages_are_told_and_timed(ghn3):
    told = []
    options = PredictionOptions(steps=(Step("noise"),))
    result = ghn3.run(WIDE, options=options, on_stage=told.append)
    assert list(dict.fromkeys(told)) == ["encoding", "decoding", "post-processing"]
    assert list(result.seconds) == ["encoding", "decoding", "post-processing"]
    assert all(seconds > 0 for seconds in result.seconds.values())


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        (PredictionOptions(steps=(Step("noise", {"layer": "1"}),)), 1),
        (PredictionOptions(steps=(Step("noise"),)), 2),
        (PredictionOptions(report=True), 1),
        (PredictionOptions(steps=(Step("noise", {"layer": "1"}),), report=True), 3),
        (PredictionOptions(low_rank=LowRank("rank", 1)), 1),
    ],
    ids=["step", "step where it is needed", "report", "step and report", "low rank"],
)
def test_the_caller_can_end_post_processing_before_every_layer(ghn3, options, passes):
    told = []
    ghn3.run(WIDE, options=options, on_stage=told.append)
    num_layers = sum(not layer.is_head for layer in weighted_layers(WIDE))
    assert told.count("post-processing") > passes * num_layers


@pytest.mark.parametrize("last", [1, 2, 4])
def test_the_caller_can_end_a_prediction(ghn3, last):
    class CancelledError(Exception):
        pass

    told = []

    def on_stage(name):
        told.append(name)
        if len(told) == last:
            raise CancelledError

    with pytest.raises(CancelledError):
        ghn3.run(WIDE, on_stage=on_stage)
    assert len(told) == last


def test_steps_are_applied_before_selection_and_rounding(ghn3):
    steps = (Step("noise", {"beta": "0.1"}),)
    found = ghn3.run(WIDE, options=PredictionOptions(steps=steps, include=("row",), dtype="bfloat16"))
    assert list(found.parameters) == ["row"]
    assert found.parameters["row"].dtype == torch.bfloat16
    assert [record.name for record in found.records] == ["noise"]
    assert not torch.equal(found.parameters["row"], ghn3.predict(WIDE)["row"].bfloat16())


def test_low_rank_factors_take_the_place_of_weights(ghn3):
    found = ghn3.run(WIDE, options=PredictionOptions(low_rank=LowRank("rank", 2)))
    assert found.parameters["row.factor_in"].shape[0] == 2
    assert "row" not in found.parameters
    assert found.low_rank is not None
    assert any(layer.factors for layer in found.low_rank.layers)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"dtype": "int8"}, "dtype"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"steps": (Step("magic"),)}, "steps[0].name"),
    ],
)
def test_impossible_options_are_refused(options, field):
    with pytest.raises(InvalidOptionError) as caught:
        PredictionOptions(**options)
    assert caught.value.field == field


def test_the_largest_seed_works(ghn3):
    assert ghn3.predict(WIDE, options=PredictionOptions(seed=2**64 - 1))


def test_from_checkpoint(tmp_path):
    save_checkpoint(small_ghn(), tmp_path / "ghn.safetensors", card=ModelCard("cifar10"))
    predictor = Predictor.from_checkpoint(str(tmp_path / "ghn.safetensors"), device="cpu")
    assert predictor.summary is not None
    assert predictor.summary.card.dataset == "cifar10"
    assert equal(predictor.predict(WIDE), Predictor(small_ghn()).predict(WIDE))


def test_missing_checkpoints_are_refused(tmp_path):
    with pytest.raises(CheckpointError):
        Predictor.from_checkpoint(tmp_path / "absent")


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "meta", ""])
def test_devices_that_are_not_here_are_refused(name):
    with pytest.raises(InvalidOptionError):
        choose_device(name)


def test_tensors_share_one_piece_of_memory(ghn3):
    found = ghn3.predict(WIDE)
    starts = [tensor.data_ptr() for tensor in found.values()]
    ends = [start + tensor.nbytes for start, tensor in zip(starts, found.values(), strict=True)]
    assert starts[1:] == ends[:-1]


def test_large_networks_use_huge_pages_without_changing_values(ghn3, monkeypatch):
    expected = ghn3.predict(WIDE)
    monkeypatch.setattr("ghn_service.parameters.HUGE_PAGES_FROM_BYTES", 1)
    assert equal(ghn3.predict(WIDE), expected)


def test_an_architecture_without_parameters_is_predicted(ghn3):
    assert len(ghn3.predict(ArchitectureGraph((Node("input"),), ()))) == 0


@pytest.mark.parametrize("huge_pages_from", [0, 2**63], ids=["mapped", "allocated"])
def test_networks_beyond_memory_are_told_so(ghn3, huge_pages_from, monkeypatch):
    monkeypatch.setattr("ghn_service.parameters.HUGE_PAGES_FROM_BYTES", huge_pages_from)
    with pytest.raises(OutOfMemoryError):
        ghn3.predict(chain(conv("w", 2**30, 2**29)))  # more than any address space


def test_other_errors_of_a_caller_pass_unchanged(ghn3):
    def on_stage(name):
        raise OSError(name)

    with pytest.raises(OSError, match="encoding"):
        ghn3.run(WIDE, on_stage=on_stage)


@pytest.mark.parametrize(("works", "error"), [(True, torch.AcceleratorError), (False, DeviceLostError)])
def test_a_device_that_fails_at_everything_is_lost(works, error, ghn3, monkeypatch):
    def on_stage(name):
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    monkeypatch.setattr("ghn_service.predictor.device_works", lambda device: works)
    with pytest.raises(error):
        ghn3.run(WIDE, on_stage=on_stage)


@pytest.mark.gpu
def test_cuda_gives_the_cpu_s_values():
    cpu, cuda = Predictor(small_ghn()), Predictor(small_ghn().cuda())
    found = cuda.predict(WIDE)
    for name, tensor in cpu.predict(WIDE).items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
