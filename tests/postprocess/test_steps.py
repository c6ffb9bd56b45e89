"""Lists of steps: names, options, errors that name the field, order, and determinism."""

from __future__ import annotations

import pytest
import torch

from ghn_service.errors import InvalidOptionError
from ghn_service.postprocess.steps import POSTPROCESSORS, Step, apply_steps, parse_steps
from tests.postprocess.layer_examples import PLAIN, chain_graph, random_parameters


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
    steps = [Step("noise", {"beta": "0.1"}), Step("noise", {"beta": "0.1", "scale": "relative"})]
    first, again, other = (apply_steps(parameters, graph, steps, seed=seed)[0] for seed in (7, 7, 8))
    assert torch.equal(first["hidden.weight"], again["hidden.weight"])
    assert not torch.equal(first["hidden.weight"], other["hidden.weight"])


def test_steps_are_applied_in_the_order_given() -> None:
    graph = chain_graph(PLAIN)
    parameters = random_parameters(graph)
    noise, orthogonal = Step("noise", {"beta": "0.5"}), Step("orthogonal")
    last_orthogonal, records = apply_steps(parameters, graph, [noise, orthogonal], seed=0)
    last_noise, _ = apply_steps(parameters, graph, [orthogonal, noise], seed=0)
    columns = [values["hidden.weight"].T @ values["hidden.weight"] for values in (last_orthogonal, last_noise)]
    assert torch.allclose(columns[0], torch.eye(4), atol=1e-5)
    assert not torch.allclose(columns[1], torch.eye(4), atol=1e-2)
    assert [record.name for record in records] == ["noise", "orthogonal"]


def test_relative_noise_has_the_asked_share_of_the_layers_deviation() -> None:
    graph = chain_graph(PLAIN)
    parameters = random_parameters(graph)
    noisy, _ = apply_steps(parameters, graph, [Step("noise", {"beta": "0.1", "scale": "relative"})], seed=0)
    weight = parameters["wide.weight"]
    assert float((noisy["wide.weight"] - weight).std() / weight.std()) == pytest.approx(0.1, rel=0.1)


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
