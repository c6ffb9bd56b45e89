"""The file of finished measurements: round trips, cut-off lines, keys."""

from __future__ import annotations

import math

import pytest

from ghn_service.errors import DataError
from ghn_service.training.evaluation.fine_tune import Curve
from ghn_service.training.evaluation.results import ResultsFile, ZeroShot, decode_result, encode_result, result_key

CURVE = Curve(0.03, (0, 50), (0.1, 0.25))
SCORE = ZeroShot("test", "4", 0.5, 0.4, 0.1, novelty=0.25, covered=0.5, copied=0.375, layers=8, width=16, likeness=0.9)


@pytest.mark.parametrize("result", [CURVE, SCORE])
def test_round_trip(result):
    assert decode_result(encode_result(result)) == result


def test_what_was_not_measured_comes_back_as_nan():
    again = decode_result(encode_result(ZeroShot("test", "4", 0.5, 0.4, 0.1)))
    assert math.isnan(again.novelty)
    assert again.batch == 0.5


def test_results_are_there_after_reopening(tmp_path):
    path = tmp_path / "new" / "measurements.jsonl"
    known = ResultsFile(path)
    known.add("a", CURVE, checkpoint="0123")
    known.add("b", SCORE)
    again = ResultsFile(path)
    assert (again.get("a"), again.get("b"), again.get("c")) == (CURVE, SCORE, None)


def test_a_line_that_was_cut_off_is_dropped_and_the_file_goes_on(tmp_path):
    path = tmp_path / "measurements.jsonl"
    ResultsFile(path).add("a", CURVE)
    with path.open("a") as file:
        file.write('{"key": "b", "resu')
    known = ResultsFile(path)
    assert (known.get("a"), known.get("b")) == (CURVE, None)
    known.add("b", SCORE)
    assert ResultsFile(path).get("b") == SCORE


@pytest.mark.parametrize("line", ["nonsense", '{"key": "a", "result": {"kind": "other"}}', '{"key": "a"}', "[]"])
def test_a_broken_line_is_an_error(tmp_path, line):
    path = tmp_path / "measurements.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(DataError):
        ResultsFile(path)


def test_a_key_changes_with_every_dependency():
    keys = {result_key(a=1, b=[2]), result_key(a=1, b=[3]), result_key(a=2, b=[2]), result_key(a=1)}
    assert len(keys) == 4
    assert result_key(a=1, b=[2]) == result_key(b=[2], a=1)
