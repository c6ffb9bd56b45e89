"""Lists of steps: names, options, errors that name the field, order, and determinism."""

from __future__ import annotations

import math

import pytest
import torch

from ghn_service.errors import InvalidOptionError
from ghn_service.parameters import TILED, ParameterSet
from ghn_service.postprocess.remedies import overlap_with
from ghn_service.postprocess.steps import POSTPROCESSORS, Step, apply_steps, parse_steps
from tests.postprocess.layer_examples import (
    PLAIN,
    ExampleLayer,
    chain_graph,
    random_parameters,
    tiled_weight,
    with_tensor,
)


@pytest.mark.parametrize(
    ("step", "field"),
    [
        (Step("nois"), "steps[1].name"),
        (Step("noise", {"betta": "1"}), "steps[1].options.betta"),
        (Step("noise", {"beta": "much"}), "steps[1].options.beta"),
        (Step("noise", {"beta": "nan"}), "steps[1].options.beta"),
        (Step("noise", {"beta": "inf"}), "steps[1].options.beta"),
        (Step("noise", {"beta": "-1e-5"}), "steps[1].options.beta"),
        (Step("noise", {"scale": "absolute"}), "steps[1].options.scale"),
        (Step("noise", {"layer": "-1"}), "steps[1].options.layer"),
        (Step("noise", {"layer": "1.5"}), "steps[1].options.layer"),
        (Step("orthogonal", {"method": "svd"}), "steps[1].options.method"),
        (Step("orthogonal", {"keep_rms": "maybe"}), "steps[1].options.keep_rms"),
        (Step("auto", {"copies": "1.1"}), "steps[1].options.copies"),
        (Step("auto", {"cosine": "nan"}), "steps[1].options.cosine"),
    ],
)
def test_a_bad_step_is_refused_with_the_field_named(step: Step, field: str) -> None:
    with pytest.raises(InvalidOptionError) as error:
        parse_steps([Step("noise"), step])
    assert error.value.field == field


def test_an_unknown_step_lists_the_known_ones() -> None:
    with pytest.raises(InvalidOptionError) as error:
        parse_steps([Step("orthogonol")])
    assert all(name in str(error.value) for name in POSTPROCESSORS)


def test_too_many_steps_are_refused() -> None:
    with pytest.raises(InvalidOptionError) as error:
        parse_steps([Step("noise")] * 17)
    assert error.value.field == "steps"


def test_the_same_seed_gives_the_same_values_and_another_seed_others() -> None:
    graph = chain_graph(PLAIN)
    parameters = random_parameters(graph)
    steps = [Step("noise", {"beta": "0.1", "layer": "1"}), Step("noise", {"beta": "0.1", "scale": "relative"})]
    first, again, other = (apply_steps(parameters, graph, steps, seed=seed)[0] for seed in (7, 7, 8))
    assert torch.equal(first["hidden.weight"], again["hidden.weight"])
    assert not torch.equal(first["hidden.weight"], other["hidden.weight"])


def test_steps_are_applied_in_the_order_given() -> None:
    graph = chain_graph(PLAIN)
    parameters = random_parameters(graph)
    noise, orthogonal = Step("noise", {"beta": "0.5", "layer": "1"}), Step("orthogonal", {"layer": "1"})
    last_orthogonal, records = apply_steps(parameters, graph, [noise, orthogonal], seed=0)
    last_noise, _ = apply_steps(parameters, graph, [orthogonal, noise], seed=0)
    columns = [values["hidden.weight"].T @ values["hidden.weight"] for values in (last_orthogonal, last_noise)]
    assert torch.allclose(columns[0], torch.eye(4), atol=1e-5)
    assert not torch.allclose(columns[1], torch.eye(4), atol=1e-2)
    assert [record.name for record in records] == ["noise", "orthogonal"]


def test_relative_noise_has_the_asked_share_of_the_layers_deviation() -> None:
    graph = chain_graph(PLAIN)
    parameters = random_parameters(graph)
    noisy, _ = apply_steps(
        parameters, graph, [Step("noise", {"beta": "0.1", "scale": "relative", "layer": "1"})], seed=0
    )
    weight = parameters["wide.weight"]
    assert float((noisy["wide.weight"] - weight).std() / weight.std()) == pytest.approx(0.1, rel=0.1)


def test_noise_that_keeps_the_rms_makes_a_weight_half_predicted_and_half_random() -> None:
    graph = chain_graph(PLAIN)
    parameters = with_tensor(
        random_parameters(graph), "hidden.weight", torch.zeros_like(random_parameters(graph)["hidden.weight"])
    )
    step = Step("noise", {"beta": "1", "scale": "relative", "keep_rms": "true", "layer": "1"})
    noisy, _ = apply_steps(parameters, graph, [step], seed=0)
    weight = parameters["wide.weight"]
    assert float(noisy["wide.weight"].norm() / weight.norm()) == pytest.approx(1.0, rel=1e-5)
    assert overlap_with(weight, noisy["wide.weight"]) == pytest.approx(math.sqrt(0.5), abs=0.1)
    assert not noisy["hidden.weight"].any()


@pytest.mark.parametrize("name", ["noise", "orthogonal", "auto"])
def test_a_step_without_a_layer_changes_copies_and_what_is_behind_a_tiled_layer(name: str) -> None:
    layers = [ExampleLayer(f"{letter}.weight", (16, 16)) for letter in "abcde"]
    graph = chain_graph([*layers, ExampleLayer("head.weight", (5, 16), is_head=True)])
    parameters = with_tensor(random_parameters(graph), "b.weight", tiled_weight(16, 16, 4))
    origins = {**parameters.origins, "d.weight": TILED, "head.weight": TILED}
    parameters = ParameterSet(parameters.specs, with_tensor(parameters, "d.weight", tiled_weight(16, 16, 8)), origins)
    options = {"scale": "relative"} if name == "noise" else {}
    changed, _ = apply_steps(parameters, graph, [Step(name, options)], seed=0)
    names = [layer.name for layer in layers if not torch.equal(changed[layer.name], parameters[layer.name])]
    # ``auto`` measures the layers behind a tiled one, too, and leaves a diverse one alone
    assert names == ["b.weight", "d.weight", *(["e.weight"] if name != "auto" else [])]
    everywhere, _ = apply_steps(parameters, graph, [Step(name, {**options, "layer": "1"})], seed=0)
    assert torch.equal(everywhere["b.weight"], changed["b.weight"])
    assert torch.equal(everywhere["head.weight"], parameters["head.weight"])
    assert torch.equal(everywhere["a.weight"], parameters["a.weight"]) == (name == "auto")


@pytest.mark.parametrize("name", POSTPROCESSORS)
def test_every_step_keeps_shapes_and_dtypes_and_records_every_layer(name: str) -> None:
    graph = chain_graph(PLAIN)
    parameters = random_parameters(graph)
    changed, (record,) = apply_steps(parameters, graph, [Step(name)], seed=0)
    for key, tensor in parameters.items():
        assert changed[key].shape == tensor.shape
        assert changed[key].dtype == tensor.dtype
        assert changed[key].is_contiguous()
    assert [layer.parameter for layer in record.layers] == [layer.name for layer in PLAIN]


@pytest.mark.parametrize("name", POSTPROCESSORS)
def test_no_step_changes_its_input(name: str) -> None:
    graph = chain_graph(PLAIN)
    parameters = random_parameters(graph)
    before = {key: tensor.clone() for key, tensor in parameters.items()}
    apply_steps(parameters, graph, [Step(name)], seed=0)
    assert all(torch.equal(parameters[key], before[key]) for key in before)
