"""The forty faults that a server must survive, and the tests that hold each of them.

The list is that of the project's study of serving; ``tests`` of a row are pytest identifiers that must exist, be more
than a name, and belong to the runs of ``make test`` unless the row says which other run they belong to.
"""

from __future__ import annotations

import ast
import functools
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Row:
    """One fault.

    Attributes:
        number: Its number in the list.
        fault: What happens.
        outcome: What the client sees.
        tests: Tests that hold it: ``FOLDER/FILE::FUNCTION`` below ``tests``.
        note: Where the outcome differs from the list, or why nothing is to be held.
    """

    number: int
    fault: str
    outcome: str
    tests: tuple[str, ...] = ()
    note: str = ""


CODES = "server/test_fault_codes.py::test_"
LIMITS = "graph/test_onnx_limits.py::test_"
HOSTILE = "server/test_hostile_clients.py::test_"
OVERLOAD = "server/test_overload.py::test_"
LIFE = "server/test_lifecycle.py::test_"
ACCESS = "server/test_access.py::test_"
PROCESS = "end_to_end/test_server_process.py::test_"
BROKEN = "clients/test_broken_streams.py::test_"
FUZZ = "fuzzing/test_hostile_models.py::test_"

ROWS = (
    Row(
        1,
        "empty, random or truncated bytes",
        "INVALID_ARGUMENT, field named",
        (f"{CODES}bytes_that_are_no_model", f"{FUZZ}several_damages"),
    ),
    Row(
        2,
        "no ir_version, operator set or node",
        "INVALID_ARGUMENT",
        (f"{CODES}a_model_without_operator_sets", f"{LIMITS}invalid"),
    ),
    Row(3, "nesting beyond protobuf's limit or ours", "INVALID_ARGUMENT", (f"{LIMITS}invalid", f"{FUZZ}one_damage")),
    Row(
        4,
        "message over the receive limit",
        "RESOURCE_EXHAUSTED, server lives",
        (f"{CODES}a_message_over_the_receive_limit_leaves_the_server_alive",),
    ),
    Row(
        5,
        "nodes, edges, parameters or sizes over a limit",
        "RESOURCE_EXHAUSTED, QuotaFailure",
        (f"{CODES}a_model_over_a_limit", f"{LIMITS}over_a_limit"),
    ),
    Row(
        6,
        "function bomb, recursive function",
        "RESOURCE_EXHAUSTED, INVALID_ARGUMENT; at once",
        (f"{LIMITS}over_a_limit", f"{LIMITS}invalid", f"{FUZZ}what_fuzzing_once_found"),
    ),
    Row(
        7,
        "cycle, unsorted nodes, dangling input, duplicate output",
        "INVALID_ARGUMENT, node named",
        (f"{LIMITS}invalid",),
    ),
    Row(8, "negative, zero and overflowing sizes", "INVALID_ARGUMENT", (f"{LIMITS}invalid", f"{FUZZ}one_damage")),
    Row(
        9,
        "external data by path, link, working folder, file://",
        "accepted, file not opened",
        (f"{LIMITS}external_data_is_never_opened", f"{HOSTILE}no_file_is_opened_for_external_data"),
        "values are never read, wherever they are, so there is nothing to refuse",
    ),
    Row(
        10,
        "unknown operator or domain",
        "accepted and named",
        (f"{HOSTILE}operators_that_nobody_knows_are_passed_over_and_named",),
        "data passes an unknown operator; AnalyzeArchitecture and the reply's warnings name it",
    ),
    Row(11, "operator set newer than supported", "UNIMPLEMENTED", (f"{CODES}a_newer_operator_set",)),
    Row(12, "weights inside control flow", "UNIMPLEMENTED", (f"{LIMITS}unsupported",)),
    Row(13, "quantised weights", "UNIMPLEMENTED", (f"{LIMITS}unsupported",)),
    Row(14, "no trainable parameter", "INVALID_ARGUMENT", (f"{LIMITS}invalid",)),
    Row(15, "weight of unknown shape", "INVALID_ARGUMENT", (f"{LIMITS}invalid",)),
    Row(
        16,
        "impossible options",
        "INVALID_ARGUMENT, field named",
        (f"{CODES}an_impossible_option", f"{FUZZ}steps_of_any_kind", f"{FUZZ}requests_of_any_bytes"),
        "factors and dense weights are one choice in the protocol; a rank over a layer's own leaves it dense",
    ),
    Row(
        17,
        "unknown hypernetwork; one that is not loaded yet",
        "NOT_FOUND; UNAVAILABLE, RetryInfo",
        (
            f"{CODES}an_unknown_hypernetwork",
            f"{LIFE}alive_before_ready",
            "server/test_calls.py::test_only_what_may_succeed_later_says_so",
        ),
    ),
    Row(
        18,
        "checkpoint corrupt or of another digest",
        "not ready, FAILED_PRECONDITION; no pickle is run",
        (
            f"{CODES}a_checkpoint_that_cannot_be_loaded",
            f"{LIFE}not_ready_without_a_hypernetwork",
            f"{LIFE}only_the_checkpoint_of_the_given_digest_is_served",
            "hypernetwork/test_import_checkpoint.py::test_no_pickled_code_is_run",
        ),
    ),
    Row(
        19,
        "predicted values that are not finite",
        "INTERNAL, nothing streamed",
        (f"{HOSTILE}values_that_are_not_finite_are_never_streamed",),
    ),
    Row(
        20,
        "out of memory on the device or the CPU",
        "RESOURCE_EXHAUSTED, RetryInfo; next request served",
        (
            f"{CODES}a_failing_prediction_harms_only_itself",
            f"{CODES}running_out_of_memory_asks_to_try_again",
            "server/test_on_a_gpu.py::test_too_little_memory_of_the_device_harms_one_request",
        ),
    ),
    Row(
        21,
        "device in a state that it never leaves",
        "INTERNAL, not ready, process ends",
        (f"{LIFE}a_lost_device_ends_readiness", "server/test_on_a_gpu.py::test_a_lost_device_ends_readiness"),
    ),
    Row(
        22,
        "worker ends or hangs",
        "INTERNAL or DEADLINE_EXCEEDED; not ready",
        (
            f"{CODES}a_failing_prediction_harms_only_itself",
            "server/test_admission.py::test_a_hung_worker_turns_readiness_off_until_it_comes_back",
        ),
    ),
    Row(
        23,
        "queue full",
        "RESOURCE_EXHAUSTED, pushback",
        (f"{OVERLOAD}a_full_queue_refuses_at_once_and_says_when_to_come_back",),
    ),
    Row(
        24,
        "deadline in the queue, the computation, the stream",
        "DEADLINE_EXCEEDED, place free",
        (
            f"{OVERLOAD}a_deadline_in_the_queue",
            f"{OVERLOAD}the_servers_own_limit_of_time",
            f"{HOSTILE}a_deadline_in_the_stream",
            f"{HOSTILE}deadlines_that_nobody_can_meet",
        ),
    ),
    Row(
        25,
        "client cancels or is killed",
        "CANCELLED; thread and memory free",
        (
            f"{OVERLOAD}cancelling_a_computation_frees_the_device",
            f"{OVERLOAD}cancelling_a_stream_frees_its_place",
            f"{HOSTILE}a_client_that_is_killed_in_the_middle_of_a_stream",
            f"{HOSTILE}a_storm_of_cancellations",
        ),
    ),
    Row(
        26,
        "client never reads, or drips",
        "CANCELLED, others unaffected",
        (
            f"{OVERLOAD}a_client_that_never_reads_is_cut_off",
            "server/test_admission.py::test_a_drip_reader_is_cut_off",
        ),
    ),
    Row(
        27,
        "SIGTERM with streams on their way",
        "finished within the grace, else UNAVAILABLE; exit 0",
        (
            f"{PROCESS}a_signal_lets_the_stream_finish",
            f"{LIFE}stopping_ends_what_does_not_finish_in_its_grace",
            f"{LIFE}stopping_finishes_what_runs_and_refuses_the_rest",
        ),
    ),
    Row(
        28,
        "server killed in the middle of a stream",
        "asked again, else UNAVAILABLE; no file",
        (
            f"{PROCESS}a_killed_server_is_unavailable",
            f"{BROKEN}a_server_that_goes_away_during_the_stream_is_asked_again",
            f"{BROKEN}nothing_is_written_if_the_stream_breaks",
        ),
    ),
    Row(
        29,
        "bytes flipped, chunks lost, repeated, reordered",
        "error of the client",
        (f"{BROKEN}a_damaged_chunk_is_never_taken_for_weights", f"{BROKEN}a_stream_that_lies_is_refused"),
    ),
    Row(
        30,
        "missing or wrong token, no client certificate",
        "UNAUTHENTICATED, UNAVAILABLE; health open",
        (
            f"{ACCESS}with_tokens_every_rpc_but_health_needs_one",
            f"{ACCESS}clients_need_a_certificate_of_the_authority",
        ),
        "tokens have no scopes and no end of their own: a line is removed, and its token is refused",
    ),
    Row(
        31,
        "plain text to TLS and back, wrong authority",
        "UNAVAILABLE, client says what to do",
        (f"{ACCESS}calls_go_over_tls_and_not_in_plain_text", f"{ACCESS}clients_need_a_certificate_of_the_authority"),
    ),
    Row(
        32,
        "unknown method, unknown field",
        "UNIMPLEMENTED; passed over",
        (f"{CODES}an_unknown_method", f"{CODES}an_unknown_field_is_passed_over"),
    ),
    Row(
        33,
        "resume with an unknown token or offset",
        "not applicable",
        note="the protocol has no resume: equal requests give equal bytes, so a broken call is repeated as a whole",
    ),
    Row(
        34,
        "HTTP/1.1, garbage, floods, idle connections, huge metadata",
        "refused; health answers",
        (
            f"{HOSTILE}noise_on_a_connection",
            f"{HOSTILE}a_thousand_idle_connections",
            f"{HOSTILE}connections_that_are_torn_off",
            f"{HOSTILE}metadata_of_any_size",
            f"{HOSTILE}held_side_calls_are_no_obstacle",
        ),
    ),
    Row(
        35,
        "port taken, bad settings, unreadable certificate",
        "exit status 1, one line",
        (
            f"{PROCESS}a_taken_port_ends_the_command_with_one_line",
            "server/test_command.py::test_a_refusal_is_one_line_and_status_1",
            f"{ACCESS}unusable_files_are_refused_at_the_start",
        ),
    ),
    Row(
        36,
        "cache folder full, read-only, corrupt",
        "not applicable",
        note="the server writes no file: its cache is memory within its budget",
    ),
    Row(
        37,
        "equal requests at once",
        "one prediction, equal bytes",
        (
            "server/test_sharing.py::test_64_equal_requests_at_once_cost_one_prediction",
            "server/test_predictions.py::test_the_same_request_gives_the_same_bytes",
        ),
    ),
    Row(
        38,
        "tensor names: unicode, empty, long, duplicate, reserved, not UTF-8",
        "exact, or INVALID_ARGUMENT",
        (f"{LIMITS}unicode_names_survive", f"{LIMITS}invalid", f"{FUZZ}text_that_is_not_utf8"),
    ),
    Row(
        39,
        "layer over 2 GiB",
        "streamed",
        (f"{HOSTILE}a_layer_of_more_than_two_gibibytes",),
        "run by make test-slow",
    ),
    Row(
        40,
        "clock jump; ten thousand requests",
        "no growth",
        (
            f"{HOSTILE}a_clock_that_jumps_ends_nothing",
            "end_to_end/test_soak.py::test_ten_thousand_requests_leave_no_trace",
        ),
        "the second by make test-soak",
    ),
)


@functools.cache
def functions_of(file: str) -> dict[str, ast.FunctionDef]:
    """The functions of a test module by name."""
    tree = ast.parse((ROOT / "tests" / file).read_text())
    return {item.name: item for item in tree.body if isinstance(item, ast.FunctionDef)}


def test_the_list_is_whole() -> None:
    assert [row.number for row in ROWS] == list(range(1, 41))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.number}-{row.fault}")
def test_each_fault_is_held(row: Row) -> None:
    assert row.tests or row.note, "a row without a test says why"
    for test in row.tests:
        file, _, name = test.partition("::")
        assert name in functions_of(file), f"{test} does not exist"
        marks = {ast.unparse(mark) for mark in functions_of(file)[name].decorator_list}
        assert not any("skip" in mark or "xfail" in mark for mark in marks)
