"""P1 to P10: everybody moves on, in order."""

from ..row import Mutant, Row

TESTS = "tests/inference/core/test_scheduler.py"
SCHEDULER = "inference/core/scheduler.py"
STEP = "inference/core/step.py"

ROWS = [
    Row(
        "P1",
        (
            f"{TESTS}::test_P1_a_prompt_longer_than_the_budget_starts_at_once",
            f"{TESTS}::test_P1_an_idle_scheduler_plans_and_commits_nothing",
        ),
        Mutant(STEP, "count = min(missing, self.budget - encoded)", "count = min(missing, self.budget - encoded - 1)"),
    ),
    Row(
        "P2",
        (
            f"{TESTS}::test_P2_a_request_that_can_never_fit_the_pool_is_refused",
            f"{TESTS}::test_P2_a_lone_request_that_just_fits_finishes_without_preemption",
        ),
        Mutant(SCHEDULER, "if prompt + least > limit:", "if prompt > limit:"),
    ),
    Row(
        "P3",
        (f"{TESTS}::test_P3_a_preempted_request_resumes_with_its_tokens",),
        Mutant(
            SCHEDULER,
            "        victim.num_preemptions += 1\n",
            "        victim.num_preemptions += 1\n        victim.token_ids = list(victim.prompt_token_ids)\n",
        ),
    ),
    Row(
        "P4",
        (
            f"{TESTS}::test_P4_the_victim_has_the_lowest_priority_then_the_latest_arrival",
            f"{TESTS}::test_P4_a_preempted_request_comes_before_later_ones_of_its_class",
            f"{TESTS}::test_P4_an_urgent_request_takes_the_seat_of_a_lower_one",
            f"{TESTS}::test_P4_an_equal_never_takes_a_seat",
        ),
        Mutant(SCHEDULER, "victim = max(self.running, key=_rank)\n", "victim = min(self.running, key=_rank)\n"),
    ),
    Row(
        "P5",
        (
            f"{TESTS}::test_P5_a_late_output_is_dropped_exactly_once",
            f"{TESTS}::test_P5_a_new_request_may_take_the_id_of_one_aborted_in_flight",
            f"{TESTS}::test_P5_a_request_that_failed_needs_no_token",
        ),
        Mutant(
            SCHEDULER,
            "if request.status is Status.FINISHED:\n                if",
            "if not item.count:\n                if",
        ),
    ),
    Row(
        "P6",
        (f"{TESTS}::test_P6_only_the_last_chunk_samples",),
        Mutant(STEP, "samples=count == missing", "samples=True"),
    ),
    Row(
        "P7",
        (f"{TESTS}::test_P7_decodes_go_on_in_every_step_of_a_long_prefill",),
        Mutant(SCHEDULER, "for request in tuple(self.running):", "for request in reversed(self.running):"),
    ),
    Row(
        "P8",
        (
            f"{TESTS}::test_P8_one_token_and_the_full_context_are_served_and_one_more_is_refused",
            f"{TESTS}::test_P8_without_max_tokens_a_request_goes_to_the_end_of_the_context",
            f"{TESTS}::test_P8_min_tokens_that_the_context_can_not_hold_are_refused",
            f"{TESTS}::test_P8_an_empty_prompt_and_a_live_id_are_refused",
        ),
        Mutant(SCHEDULER, "if prompt + least > limit:", "if prompt + least > limit + 1:"),
    ),
    Row(
        "P9",
        (f"{TESTS}::test_P9_the_smallest_limits_work",),
        Mutant(
            SCHEDULER,
            "len(self.running) < self.config.max_num_seqs\n",
            "len(self.running) < max(self.config.max_num_seqs - 1, 0)\n",
        ),
    ),
    Row(
        "P10",
        (
            f"{TESTS}::test_P10_first_come_first_served_within_a_priority",
            f"{TESTS}::test_P10_nobody_overtakes_a_head_that_does_not_fit",
            f"{TESTS}::test_P10_a_full_queue_refuses_a_group_as_a_whole",
            f"{TESTS}::test_P10_a_request_past_its_time_in_the_queue_expires",
        ),
        Mutant(
            SCHEDULER,
            "                insort(self.waiting, request, key=_rank)\n",
            "                self.waiting.insert(0, request)\n",
        ),
    ),
]
