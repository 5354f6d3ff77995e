"""M1, M2, M6, M7 and M10 where capacity is the trained one and experts are reported."""

from ..row import Mutant, Row

ROUTED = "tests/inference/test_routed_experts.py"
PAGES = "tests/inference/run/test_experts.py"
TAKEN = "tests/moe/routing/test_taken.py"
ROUTER = "moe/routing/router.py"

ROWS = [
    Row(
        "M1",
        (f"{TAKEN}::test_M1_padding_takes_no_slot_and_counts_nowhere",),
        Mutant(ROUTER, "wanted_TK = wanted_TK & valid_T[:, None]", "wanted_TK = wanted_TK & True"),
    ),
    Row(
        "M2",
        (f"{ROUTED}::test_M2_a_result_is_its_own_beside_mates_that_fill_every_expert_and_are_aborted",),
        Mutant(
            ROUTER,
            'groups = RouteContext() if cfg.group == "rank" and self.training else context',
            "groups = RouteContext()",
        ),
    ),
    Row(
        "M2",
        (f"{PAGES}::test_M2_chunked_and_batched_requests_drop_what_evaluation_drops",),
        Mutant(
            "inference/run/experts.py",
            "return before_BLE + self._count(self.ids[slots_N], owner_N, len(items))",
            "return before_BLE",
        ),
    ),
    Row(
        "M6",
        (
            f"{ROUTED}::test_M6_rows_are_right_through_chunks_hits_and_preemption",
            f"{ROUTED}::test_M6_a_reported_row_is_not_reported_again_nor_changed",
            f"{ROUTED}::test_M6_choices_of_one_prompt_have_rows_of_their_own",
            f"{ROUTED}::test_M6_an_encoder_decoder_reports_its_decoder",
        ),
        Mutant("inference/run/experts.py", "range(item.request.num_reported_tokens, ", "range(item.start, "),
    ),
    Row(
        "M6",
        (f"{ROUTED}::test_M6_choices_of_one_prompt_have_rows_of_their_own",),
        Mutant("inference/run/runner.py", "        self.pages.copy(plan.copies)\n", ""),
    ),
    Row(
        "M7",
        (f"{ROUTED}::test_M7_trained_capacity_generates_what_the_trainer_s_evaluation_predicts",),
        Mutant("moe/routing/capacity.py", "else slots_GE - taken_GE", "else slots_GE"),
    ),
    Row(
        "M10",
        (f"{ROUTED}::test_M10_counters_are_the_reported_rows_exactly",),
        Mutant(
            "inference/run/runner.py",
            "self.routing.add(context.routings, context.route.valid_T)",
            "[self.routing.add(context.routings, context.route.valid_T) for _ in range(2)]",
        ),
    ),
]
