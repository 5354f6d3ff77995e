"""O10 and A6, O9 of hostile grammars; G1, M1 and I9 of decode steps in fixed shapes."""

from ..row import Mutant, Row

ENGINE = "tests/inference/test_structured.py"
MASK = "tests/inference/run/test_grammar_mask.py"
TEXT = "tests/inference/text/test_grammar.py"
HTTP = "tests/inference/server/test_structured.py"
GRAPHS = "tests/inference/run/test_graphs.py"

ROWS = [
    Row(
        "O10",
        (
            f"{ENGINE}::test_O10_everything_a_random_model_writes_has_the_wanted_shape",
            f"{TEXT}::test_O10_masks_are_the_tokens_that_some_text_of_the_grammar_goes_on_with",
            f"{HTTP}::test_O10_a_chat_answers_in_the_schema_of_its_response_format",
        ),
        Mutant(
            "inference/core/request.py",
            "if self.grammar is not None and self.grammar.accept(token):",
            "if False:",
        ),
    ),
    Row(
        "O10",
        (
            f"{MASK}::test_O10_rows_keep_what_their_grammar_allows_and_the_end_where_it_accepts",
            f"{ENGINE}::test_O10_the_end_comes_only_where_the_text_is_whole",
        ),
        Mutant("inference/run/grammar_mask.py", "= accepts.bool()", "= True"),
    ),
    Row(
        "O10",
        (f"{ENGINE}::test_O10_survives_preemption_chunks_neighbours_and_n",),
        Mutant(
            "inference/compiling.py",
            "request.grammar = grammar.matcher()",
            "request.grammar = held.requests[0].grammar or grammar.matcher()",
        ),
    ),
    Row(
        "O10",
        (f"{ENGINE}::test_O10_a_dead_end_ends_only_its_request",),
        Mutant(
            "inference/engine.py",
            "failed[stuck.request_id] = no_token(stuck.request, result.excluded)",
            "failed |= dict.fromkeys(self._ledger, no_token(stuck.request, result.excluded))",
        ),
    ),
    Row(
        "A6",
        (
            f"{ENGINE}::test_A6_abort_while_waiting_for_a_grammar_leaves_nothing",
            f"{HTTP}::test_A6_a_client_that_leaves_while_its_grammar_compiles_leaves_nothing",
        ),
        Mutant("inference/engine.py", "self._compiling.drop(request_id)", "pass"),
    ),
    Row(
        "O9",
        (
            f"{TEXT}::test_O9_an_endless_grammar_holds_up_no_other_and_leaves_no_process",
            f"{TEXT}::test_O9_hostile_grammars_end_in_time_and_the_next_one_compiles",
            f"{HTTP}::test_O9_hostile_shapes_are_refused_in_time_while_another_request_streams",
        ),
        Mutant("inference/text/grammar.py", "WORKERS = 2", "WORKERS = 1"),
    ),
    Row(
        "G1",
        (f"{GRAPHS}::test_G1_below_at_above_a_bucket_and_above_all_of_them_are_eager_steps_results",),
        Mutant("inference/run/graphs.py", "if size >= count", "if size > count"),
    ),
    Row(
        "M1",
        (f"{GRAPHS}::test_M1_rows_that_fill_up_a_bucket_route_nowhere_and_count_in_no_statistic",),
        Mutant("inference/run/context.py", "valid_T=batch.valid_T", "valid_T=None"),
    ),
    Row(
        "I9",
        (f"{GRAPHS}::test_I9_no_two_tokens_write_one_slot_and_what_fills_up_writes_the_null_block",),
        Mutant(
            "inference/run/graphs.py",
            "_fill(self.slots_N, batch.slots_T)",
            "_fill(self.slots_N, batch.slots_T, rest=20)",
        ),
    ),
]
