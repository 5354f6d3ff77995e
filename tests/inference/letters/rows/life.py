"""G1 to G6: start, requests over HTTP, metrics, the end."""

from ..row import Mutant, Row

LIFE = "tests/inference/server/test_lifecycle.py"
PROCESS = "tests/launch/test_serve.py"
BROKEN = "tests/inference/server/test_process.py"
STREAM = "tests/inference/server/test_stream.py"
METRICS = "tests/inference/server/test_metrics.py"
TOTALS = "tests/inference/server/test_totals.py"
SOURCE = "inference/server/lifecycle.py"


ROWS = [
    Row(
        "G3",
        (
            f"{LIFE}::test_G3_stopping_finishes_what_runs_and_refuses_what_comes",
            f"{LIFE}::test_G3_what_outlasts_the_drain_ends_as_abort",
            f"{LIFE}::test_G3_a_crash_fails_what_runs_and_ends_the_server_with_its_cause",
            f"{PROCESS}::test_G3_sigterm_lets_a_stream_finish_and_the_exit_code_is_0",
            f"{PROCESS}::test_G3_a_second_signal_ends_it_at_once",
            f"{PROCESS}::test_G3_a_signal_while_it_loads_ends_it_cleanly",
        ),
        Mutant(SOURCE, "self._idle(self._config.drain_seconds)", "self._idle(0.0)"),
    ),
    Row(
        "G3",
        (f"{LIFE}::test_G3_what_outlasts_the_drain_ends_as_abort",),
        Mutant(SOURCE, "            call.abort()\n", "            pass\n"),
    ),
    Row(
        "G3",
        (f"{BROKEN}::test_G3_a_broken_engine_ends_its_calls_its_health_and_its_process",),
        Mutant(SOURCE, '            self.service.phase = "broken"\n', ""),
    ),
    Row(
        "G4",
        (
            f"{LIFE}::test_G4_while_it_loads_the_port_answers_503",
            f"{LIFE}::test_G4_a_taken_port_is_a_clear_error_and_two_free_ones_differ",
            f"{LIFE}::test_G4_two_servers_on_one_host_are_two",
            f"{PROCESS}::test_G4_a_taken_port_and_a_public_address_are_refused_before_anything_is_loaded",
        ),
        Mutant(
            "inference/server/status.py", 'in ("ready", "shutting down")', 'in ("ready", "shutting down", "loading")'
        ),
    ),
    Row(
        "G5",
        (
            f"{STREAM}::test_G5_every_chunk_is_a_frame_and_done_comes_once_at_the_end",
            f"{STREAM}::test_G5_silence_is_filled_with_comments",
            f"{STREAM}::test_G5_an_error_is_a_last_frame_and_never_done",
            f"{LIFE}::test_G5_comments_keep_a_silent_stream_alive",
        ),
        Mutant("inference/server/stream.py", 'data + b"\\n\\n"', 'data + b"\\n"'),
    ),
    Row(
        "G5",
        (f"{STREAM}::test_G5_every_chunk_is_a_frame_and_done_comes_once_at_the_end",),
        Mutant(
            "inference/server/stream.py",
            "        yield DONE\n",
            "        yield DONE\n        yield DONE\n",
        ),
    ),
    Row(
        "G6",
        (
            f"{METRICS}::test_G6_totals_are_those_of_the_answers",
            f"{METRICS}::test_G6_preempted_work_is_counted_once",
            f"{METRICS}::test_G6_gauges_follow_the_load_and_return_to_zero",
            f"{METRICS}::test_G6_a_request_that_fails_is_an_error_and_not_an_abort",
            f"{METRICS}::test_G6_strangers_can_not_make_new_labels",
            f"{TOTALS}::test_G6_every_total_is_what_200_clients_have_counted",
        ),
        Mutant("inference/server/metrics.py", ".inc(tokens - before)", ".inc(tokens)"),
    ),
    Row(
        "G6",
        (f"{METRICS}::test_G6_strangers_can_not_make_new_labels",),
        Mutant(
            "inference/server/shell.py", 'scope["path"] if scope["path"] in self._routes else "other"', 'scope["path"]'
        ),
    ),
]
