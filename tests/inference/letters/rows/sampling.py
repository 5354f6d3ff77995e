"""What is sampled and scored, and how it is answered: O1, O5 to O8, O11, and P3, P8 where they touch it."""

from ..row import Mutant, Row

ENGINE = "tests/inference/test_sampling.py"
SCORES = "tests/inference/test_prompt_logprobs.py"
LOGITS = "tests/inference/run/test_logits.py"
PARAMS = "tests/inference/core/test_sampling.py"
SERVER = "tests/inference/server/test_sampling.py"

ROWS = [
    Row(
        "O1",
        (f"{SERVER}::test_O1_O5_O7_a_stream_joined_is_the_answer_in_one_piece",),
        Mutant("inference/server/answers.py", "_tokens = len(output.text)", "_tokens = len(part.text)"),
    ),
    Row(
        "O5",
        (
            f"{SCORES}::test_O5_logits_that_are_not_finite_are_no_score",
            f"{SERVER}::test_O5_minus_infinity_is_a_number_and_nan_is_500",
            f"{SERVER}::test_O1_O5_O7_a_stream_joined_is_the_answer_in_one_piece",
        ),
        Mutant("inference/engine.py", "and None in found.tokens:", "and not found.tokens:"),
    ),
    Row(
        "O6",
        (
            f"{LOGITS}::test_O6_M2_a_row_is_the_same_bits_in_any_company",
            f"{ENGINE}::test_O6_P3_wishes_hold_in_a_full_batch_with_preemption_as_alone",
            f"{ENGINE}::test_O6_choices_are_distinct_and_repeat",
            f"{ENGINE}::test_O6_greedy_ignores_the_seed_and_neutral_values_change_nothing",
            f"{ENGINE}::test_O6_a_step_planned_ahead_changes_nothing",
        ),
        Mutant("inference/run/sampler.py", "[item.end for item in items]", "[row for row, _ in enumerate(items)]"),
    ),
    Row(
        "O6",
        (f"{PARAMS}::test_O6_no_step_is_planned_ahead_of_a_token_whose_value_matters",),
        Mutant("inference/core/sampling.py", "any(len(ids) > 1 for ids", "any(len(ids) > 2 for ids"),
    ),
    Row(
        "O7",
        (f"{SERVER}::test_O1_O5_O7_a_stream_joined_is_the_answer_in_one_piece",),
        Mutant("inference/server/generation.py", "len(choice.token_ids) for", "len(choice.text) for"),
    ),
    Row(
        "O8",
        (f"{ENGINE}::test_O8_every_end_of_sequence_token_ends_and_min_tokens_and_ignore_eos_hold_them_off",),
        Mutant("inference/ledger.py", "frozenset(model.eos_token_ids)", "frozenset(model.eos_token_ids[:1])"),
    ),
    Row(
        "O11",
        (
            f"{SCORES}::test_O11_a_cached_prefix_changes_nothing",
            f"{SERVER}::test_O11_echo_is_right_on_a_prefix_cache_hit",
        ),
        Mutant("inference/core/sampling.py", "return self.prompt_logprobs is None", "return True"),
    ),
    Row(
        "P3",
        (f"{SCORES}::test_P3_preemption_repeats_and_loses_none",),
        Mutant("inference/choice.py", "found.tokens[known - found.first :]", "found.tokens"),
    ),
    Row(
        "P8",
        (
            f"{SERVER}::test_P8_no_tokens_are_generated_only_with_echo",
            f"{SCORES}::test_P8_scoring_generates_nothing_and_ends_by_length",
            f"{PARAMS}::test_P8_no_tokens_are_generated_only_to_score_the_prompt",
            f"{ENGINE}::test_P8_lengths_at_their_edges",
        ),
        Mutant("inference/server/protocol.py", "if self.max_tokens == 0 and not self.echo:", "if False:"),
    ),
]
