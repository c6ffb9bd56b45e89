"""Options as users write them and as they travel."""

from __future__ import annotations

import pytest

from ghn_client import LowRankOptions, Step
from ghn_client.errors import InvalidOptionError
from ghn_client.options import encode_low_rank, encode_step, parse_step
from ghn_client.wire import ghn_pb2


@pytest.mark.parametrize(
    "step",
    [
        "noise:beta=3e-05,members=2",
        ("noise", {"beta": 3e-5, "members": 2}),
        Step("noise", {"beta": 3e-5, "members": "2"}),
    ],
)
def test_the_forms_of_a_step_are_one_message(step: object) -> None:
    expected = ghn_pb2.PostProcessingStep(name="noise", options={"beta": "3e-05", "members": "2"})
    assert encode_step(step) == expected


def test_numbers_travel_exactly() -> None:
    value = 0.1 + 0.2
    assert float(encode_step(("noise", {"beta": value})).options["beta"]) == value


def test_switches_and_lists_have_a_text() -> None:
    options = encode_step(("orthogonal", {"exact": True, "layers": ["a", 1]})).options
    assert dict(options) == {"exact": "true", "layers": "a,1"}


@pytest.mark.parametrize("text", ["", ":", "noise:", "noise:beta", "noise:=1", "noise:a=1,,b=2"])
def test_malformed_steps_are_refused(text: str) -> None:
    with pytest.raises(InvalidOptionError):
        parse_step(text)


@pytest.mark.parametrize(
    ("rule", "value"),
    [
        ("rank", 4),
        ("fraction", 0.25),
        ("energy", 0.9),
        ("function_error", 0.1),
        ("parameter_budget", 1000),
        ("multiply_add_budget", 10**9),
    ],
)
def test_each_rank_rule_travels(rule: str, value: float) -> None:
    message = encode_low_rank({rule: value, "method": "spectral"})
    assert message == encode_low_rank(LowRankOptions(**{rule: value}, method="spectral"))
    assert message.WhichOneof("rank_rule") == rule
    assert getattr(message, rule) == value
    assert message.method == ghn_pb2.LOW_RANK_METHOD_SPECTRAL


def test_text_is_the_same_as_fields() -> None:
    assert encode_low_rank("energy=0.9, method=spectral") == encode_low_rank({"energy": 0.9, "method": "spectral"})
    assert encode_low_rank("rank=4,force=true") == encode_low_rank({"rank": 4, "force": True})
    assert encode_low_rank("rank=4,force=true").force
    assert encode_low_rank("parameter_budget=5e6") == encode_low_rank({"parameter_budget": 5_000_000})


@pytest.mark.parametrize(
    "text", ["", "rank", "rank=", "ranks=1", "rank=1,energy=1", "rank=many", "energy=0.9,", "rank=1,force=maybe"]
)
def test_malformed_low_rank_text_is_refused(text: str) -> None:
    with pytest.raises(InvalidOptionError):
        encode_low_rank(text)


@pytest.mark.parametrize("options", [{"rank": -1}, {"rank": 0.5}, {"energy": 0.9, "method": "best"}, {"rank": 2**40}])
def test_impossible_low_rank_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(InvalidOptionError):
        encode_low_rank(options)
