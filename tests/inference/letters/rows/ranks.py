"""M3, M4 and G3 where several ranks serve one model."""

from ..row import Mutant, Row

RANKS = "tests/inference/test_ranks.py"
ROUNDED = "tests/inference/test_rounded_ranks.py"
LINK = "tests/parallel/test_serving.py"
SERVE = "tests/launch/test_serve_ranks.py"

ROWS = [
    Row(
        "M3",
        (
            f"{RANKS}::test_M3_ep_2_serves_what_one_rank_serves",
            f"{RANKS}::test_M3_every_layout_serves_what_one_rank_serves",
            f"{RANKS}::test_M3_whatever_the_scheduler_does_the_ranks_follow",
            f"{RANKS}::test_M3_drops_are_those_of_one_rank",
            f"{RANKS}::test_M3_ep_2_gives_one_ranks_bits_in_deterministic_mode",
        ),
        Mutant("parallel/apply.py", "ShardSpec(shape, (first,) +", "ShardSpec(shape, (0,) +"),
    ),
    Row(
        "M3",
        (
            "tests/parallel/test_apply.py::test_M3_serving_places_experts_unevenly_and_leaves_no_rank_without",
            "tests/parallel/test_dispatch.py::test_M3_experts_that_the_ranks_do_not_divide_give_what_one_rank_gives",
            f"{RANKS}::test_M3_eight_experts_and_all_tokens_to_one_of_them",
        ),
        Mutant("parallel/apply.py", "if uneven and experts < ranks:", "if uneven and experts > ranks:"),
    ),
    Row(
        "M3",
        (
            f"{ROUNDED}::test_M3_two_ranks_give_the_bits_of_one",
            f"{ROUNDED}::test_M3_every_layout_gives_the_bits_of_one_rank_in_few_bits",
            f"{ROUNDED}::test_M3_so_does_every_form_of_model",
        ),
        Mutant("parallel/gather.py", "x_PAf.transpose(0, 1)", "x_PAf.flip(0).transpose(0, 1)"),
    ),
    Row(
        "M4",
        (
            f"{LINK}::test_M4_every_rank_gets_its_part_of_an_order_also_an_empty_one",
            f"{RANKS}::test_M4_a_replica_without_requests_takes_part_in_every_step",
            "tests/inference/core/test_replicas.py::test_M4_every_step_has_a_part_for_every_replica",
            f"{LINK}::test_M4_rows_come_to_rank_0_also_from_ranks_without_any",
        ),
        Mutant("parallel/serving.py", ".view(shape)", ".view(shape if size else [0])"),
    ),
    Row(
        "G3",
        (
            f"{LINK}::test_G3_a_lost_rank_is_missed_without_waiting_for_a_collective",
            f"{LINK}::test_G3_ranks_that_end_together_do_not_miss_each_other",
            f"{SERVE}::test_G3_a_killed_rank_fails_what_runs_within_2_s_and_the_server_says_which",
            f"{SERVE}::test_G3_sigterm_lets_all_ranks_finish_what_runs_and_leaves_nothing",
            f"{SERVE}::test_G3_a_hanging_rank_fails_what_runs_within_seconds",
            f"{SERVE}::test_G3_a_rank_that_is_lost_while_nothing_runs_is_missed_too",
            f"{SERVE}::test_G3_without_rank_0_no_rank_is_left",
            f"{SERVE}::test_G3_ranks_end_with_the_process_that_started_them",
            f"{SERVE}::test_G3_a_second_signal_ends_all_ranks_at_once",
            f"{SERVE}::test_G3_under_torchrun_a_lost_rank_ends_all",
        ),
        Mutant("parallel/roll.py", "        gone = self.seen and not lives", "        gone = False"),
    ),
]
