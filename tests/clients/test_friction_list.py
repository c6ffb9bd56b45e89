"""The frictions that newcomers met, what happens now, and the tests that hold it, named as in the list of faults."""

from __future__ import annotations

import ast
from dataclasses import dataclass

import pytest

from tests.server.test_fault_list import functions_of


@dataclass(frozen=True)
class Row:
    """One friction.

    Attributes:
        friction: What a newcomer did.
        now: What happens.
        tests: Tests that hold it: ``FOLDER/FILE::FUNCTION`` below ``tests``.
    """

    friction: str
    now: str
    tests: tuple[str, ...]


NETWORKS = "clients/test_networks.py::test_"
TUNING = "finetune/test_tuning_commands.py::test_"
CLI = "clients/test_cli.py::test_"
TRAIN = "training/test_command_line.py::test_"
EVALUATION = "training/evaluation/test_run.py::test_"
DOCS = "test_documentation.py::test_"

ROWS = (
    Row(
        "a script imports its neighbours",
        "its folder is importable",
        (f"{NETWORKS}a_script_finds_what_lies_beside_it",),
    ),
    Row(
        "a factory with arguments, a file without :FACTORY, a mistyped name, a script that fails",
        "one sentence that names the form or the near names",
        (f"{NETWORKS}wrong_names_say_what_is_wrong", f"{NETWORKS}a_script_that_fails_is_no_traceback"),
    ),
    Row(
        "more classes than outputs, no images, unknown strategy or option",
        "said before anything is predicted",
        (f"{TUNING}what_cannot_be_tuned_is_refused_before_anything_is_predicted",),
    ),
    Row(
        "a file of torch.onnx.export, which has no BatchNorm left",
        "the flag that inserts norm layers is named, and --model-out works with them",
        (f"{TUNING}a_file_without_norms_gets_them_and_keeps_its_function",),
    ),
    Row(
        "Ctrl-C while tuning",
        "the best finished epoch is kept, and how to go on is said",
        (f"{TUNING}an_interruption_keeps_the_best_finished_epoch",),
    ),
    Row(
        "no example inputs for a vision model of transformers; a decoder with its cache",
        "its configuration says them; use_cache=False is advised",
        (
            f"{NETWORKS}vision_models_of_transformers_need_no_example",
            f"{NETWORKS}decoders_are_told_to_leave_their_cache",
        ),
    ),
    Row(
        "arrays, shapes and torch.bfloat16 as arguments",
        "understood",
        (
            f"{NETWORKS}an_array_is_an_example",
            f"{NETWORKS}a_shape_is_an_example",
            "clients/test_client_predictions.py::test_a_dtype_may_be_that_of_torch",
        ),
    ),
    Row("http:// or no port in an address", "understood", (f"{NETWORKS}addresses_are_understood",)),
    Row("use after close()", "one sentence", (f"{NETWORKS}a_closed_client_of_an_embedded_server_says_so",)),
    Row("a mistyped --set", "the setting that was meant", (f"{TRAIN}impossible_settings_are_named",)),
    Row(
        "--json and a failure",
        "JSON",
        (
            f"{NETWORKS}failures_of_commands_are_json",
            f"{NETWORKS}command_lines_without_sense_are_json_too",
            f"{CLI}a_failure_is_json_where_json_was_asked_for",
        ),
    ),
    Row("-h, --version", "on all three commands", (f"{DOCS}commands_tell_about_themselves",)),
    Row(
        "--model here, --hypernetwork there",
        "one name for one thing",
        (f"{CLI}every_command_that_asks_a_server_has_the_same_options_for_it", f"{DOCS}commands_and_flags_exist"),
    ),
    Row(
        "a library is missing",
        "advice that can be followed",
        (
            f"{TRAIN}a_missing_library_is_one_sentence_that_says_how_to_get_it",
            f"{NETWORKS}without_timm_the_library_is_named",
        ),
    ),
    Row(
        "tables of hundreds of lines",
        "a screen, the rest with --all",
        (f"{CLI}a_large_network_takes_a_screen_unless_all_is_asked_for",),
    ),
    Row(
        "seconds that counted the start of the server",
        "those of the prediction",
        (f"{CLI}the_start_of_a_server_is_not_counted_as_prediction",),
    ),
    Row(
        "make predict left a file", "it writes where git does not look", (f"{DOCS}make_predict_leaves_nothing_for_git",)
    ),
    Row(
        "evaluate --minutes on a slow machine",
        "ends in time, with a report of what is missing",
        (
            f"{EVALUATION}a_running_measurement_is_cut_at_the_time_limit",
            f"{EVALUATION}the_time_limit_holds_for_the_set_up_too",
            f"{EVALUATION}half_of_the_time_is_left_for_measurements",
        ),
    ),
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.friction)
def test_each_friction_is_held(row: Row) -> None:
    for test in row.tests:
        file, _, name = test.partition("::")
        assert name in functions_of(file), f"{test} does not exist"
        marks = {ast.unparse(mark) for mark in functions_of(file)[name].decorator_list}
        assert not any("skip" in mark or "xfail" in mark for mark in marks)
