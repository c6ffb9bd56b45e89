"""Tables, JSON and logs."""

from __future__ import annotations

import dataclasses
import json

import pytest

from ghn_service.errors import DataError
from ghn_service.training.evaluation.fine_tune import Comparison, Curve, FineTuneSettings
from ghn_service.training.evaluation.measurements import EvaluationSettings
from ghn_service.training.evaluation.report import fine_tune_summary, json_report, markdown_report, shape_table
from ghn_service.training.evaluation.results import ZeroShot
from ghn_service.training.evaluation.run import Evaluation
from ghn_service.training.run_log import RunLog, read_log


def example() -> Evaluation:
    zero_shot = (
        ZeroShot("test", "0", 0.5, 0.4, 0.1),
        ZeroShot("test", "1", 0.3, 0.2, 0.1),
        ZeroShot("reference", "resnet20", 0.6, 0.5, 0.1, novelty=0.2, covered=0.9, copied=0.3),
    )
    fine_tuned = (
        Comparison("0", 0, 0, Curve(0.1, (0, 100), (0.3, 0.5)), Curve(0.1, (0, 100, 200), (0.1, 0.4, 0.6))),
        Comparison("1", 0, 0, Curve(0.1, (0, 100), (0.3, 0.3)), Curve(0.1, (0, 100, 200), (0.1, 0.4, 0.6))),
    )
    settings = EvaluationSettings(splits={})
    return Evaluation(settings, zero_shot, fine_tuned, 1, 2.0)


def test_the_summary_counts_wins_and_gaps():
    rows = fine_tune_summary(example().fine_tuned, (100,))
    assert [row["step"] for row in rows] == [0, 100]
    assert rows[1]["wins"] == 0.5
    assert rows[1]["gap"][0] == pytest.approx(0.0)
    assert rows[0]["wins"] == 1.0


def test_seeds_of_one_network_are_averaged_first():
    curves = example().fine_tuned
    same_network = tuple(dataclasses.replace(item, name="0", seed=seed) for seed, item in enumerate(curves))
    row = fine_tune_summary((*same_network, dataclasses.replace(curves[0], name="1")), (100,))[1]
    assert (row["networks"], row["runs"]) == (2, 3)
    assert row["gap"][0] == pytest.approx((0.0 + 0.1) / 2)
    assert row["wins"] == 0.5


def test_a_partial_report_says_so():
    evaluation = dataclasses.replace(example(), fine_tuned=(), jobs=9, finished=3)
    assert "3 of 9" in markdown_report(evaluation)


def test_captions_say_how_many_images_there_were():
    settings = EvaluationSettings(splits={}, fine_tune=FineTuneSettings(budgets=(100,)))
    curves = tuple(dataclasses.replace(item, images=1000) for item in example().fine_tuned)
    counts = {"training": 903, "validation": 341, "test": 372}
    evaluation = dataclasses.replace(example(), settings=settings, fine_tuned=curves, num_images=counts)
    text = markdown_report(evaluation)
    for words in ("372 test images, ±", "903 training images", "341 validation images", "372 test images (", "| 903 |"):
        assert words in text, words
    enough = dataclasses.replace(evaluation, num_images=dict.fromkeys(counts, 50_000))
    for words in ("2,000 test", "1,280 training", "1,000 validation", "1,000 test", "| 1000 |"):
        assert words in markdown_report(enough), words


def test_accuracy_is_told_by_depth_and_width():
    scores = (
        ZeroShot("test", "0", 0.5, 0.4, 0.1, layers=8, width=16),
        ZeroShot("test", "1", 0.3, 0.2, 0.1, layers=54, width=16, likeness=0.96),
        ZeroShot("test", "2", 0.3, 0.2, 0.1),  # of an older results file
    )
    table = shape_table(scores).splitlines()[2:]
    assert table[0].startswith("| 1 to 10 layers | 1 | 50.0")
    assert table[1].startswith("| 41 to 80 layers | 1 | 30.0")
    assert table[1].endswith("| 0.96 |")
    assert table[2].startswith("| 1 to 16 channels in the first | 2 | 40.0")
    assert shape_table(scores[2:]) == ""


def test_the_report_says_how_many_training_networks_were_passed_over():
    evaluation = dataclasses.replace(
        example(), fine_tuned=(), pool_size=2500, pool_known=2400, in_training_pool={"test": 6}
    )
    text = markdown_report(evaluation)
    assert "2,500" in text
    assert "6 of test" in text
    assert "2,400" in text  # as many could be compared


def test_markdown_shows_each_split_and_network():
    evaluation = example()
    text = markdown_report(
        Evaluation(EvaluationSettings(splits={}), evaluation.zero_shot, (), evaluation.skipped, evaluation.seconds)
    )
    assert "| test | 2 | 40.0 ± 10.0 | 50.0 | 30.0 | 30.0 ± 10.0 | 10.0 ± 0.0 |" in text
    assert "resnet20" in text


def test_json_has_null_for_what_was_not_measured():
    body = json.loads(json_report(example()))
    assert body["zero_shot"][0]["novelty"] is None
    assert body["zero_shot"][2]["novelty"] == 0.2


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    log = RunLog(tmp_path)
    log.write("train", 1, loss=1.0)
    log.write("train", 2, loss=float("nan"))
    log.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"kind": "tra')
    assert [record["loss"] for record in read_log(tmp_path)] == [1.0, None]


def test_a_folder_without_a_log_is_an_error(tmp_path):
    with pytest.raises(DataError):
        read_log(tmp_path)
