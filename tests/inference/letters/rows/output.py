"""O1 to O12: what a caller gets to see."""

from ..row import Mutant, Row

ENGINE = "tests/inference/test_engine.py"
STOP = "tests/inference/text/test_stop.py"
CHARACTERS = "tests/inference/text/test_detokenizer.py"
BAD = "tests/inference/server/test_bad_input.py"
MEMORY = "tests/inference/core/test_encoder.py"

HTTP = "tests/inference/server/test_completions.py"
SAMPLING = "tests/inference/test_sampling.py"
PROMPT = "tests/inference/test_prompt_logprobs.py"
SHAPES = "tests/inference/test_structured.py"
MASK = "tests/inference/run/test_grammar_mask.py"

ROWS = [
    Row(
        "O1",
        (f"{HTTP}::test_O1_a_stream_joined_is_the_answer_in_one_piece",),
        Mutant(
            "inference/server/answers.py",
            "self._chars, self._tokens = len(output.text), ",
            "self._chars, self._tokens = len(output.text.rstrip()), ",
        ),
    ),
    Row(
        "O5",
        (f"{HTTP}::test_O5_logprobs_hold_every_sampled_token_and_where_it_begins",),
        Mutant("inference/server/answers.py", "return self._offset - len(name) if piece", "return start if piece"),
    ),
    Row(
        "O5",
        (f"{PROMPT}::test_O5_logits_that_are_not_finite_are_no_score",),
        Mutant("inference/run/prompt.py", "[logprobs if good else None for", "[logprobs for"),
    ),
    Row(
        "O6",
        (
            f"{SAMPLING}::test_O6_choices_are_distinct_and_repeat",
            f"{SAMPLING}::test_O6_P3_wishes_hold_in_a_full_batch_with_preemption_as_alone",
            f"{SAMPLING}::test_O6_greedy_ignores_the_seed_and_neutral_values_change_nothing",
        ),
        Mutant("inference/run/sampler.py", "[item.request.choice for item in items]", "[0 for item in items]"),
    ),
    Row(
        "O7",
        (
            f"{HTTP}::test_O7_a_completion_is_the_engines_with_exact_usage",
            f"{HTTP}::test_O7_a_repeated_prompt_reports_its_cached_tokens",
        ),
        Mutant(
            "inference/server/generation.py", "len(output.prompt_token_ids) for", "len(output.prompt_token_ids) + 1 for"
        ),
    ),
    Row(
        "O8",
        (f"{SAMPLING}::test_O8_every_end_of_sequence_token_ends_and_min_tokens_and_ignore_eos_hold_them_off",),
        Mutant("inference/core/request.py", "stops if self.params.ignore_eos else stops |", "stops |"),
    ),
    Row(
        "O10",
        (
            f"{MASK}::test_O10_rows_keep_what_their_grammar_allows_and_the_end_where_it_accepts",
            f"{SHAPES}::test_O10_the_end_comes_only_where_the_text_is_whole",
            f"{SHAPES}::test_O10_a_dead_end_ends_only_its_request",
            f"{SHAPES}::test_O10_survives_preemption_chunks_neighbours_and_n",
        ),
        Mutant(
            "inference/run/grammar_mask.py",
            "allowed_PV[at, tokens] = accepts.bool()",
            "allowed_PV[at, tokens] = True",
        ),
    ),
    Row(
        "O11",
        (f"{PROMPT}::test_O11_a_cached_prefix_changes_nothing",),
        Mutant(
            "inference/core/blocks.py",
            "if not self._caching or not request.params.reads_prefix:",
            "if not self._caching:",
        ),
    ),
    Row(
        "O2",
        (f"{ENGINE}::test_O2_P3_streamed_outputs_only_grow_and_end_once",),
        Mutant("inference/engine.py", "            finished,\n", "            True,\n"),
    ),
    Row(
        "O3",
        (
            f"{STOP}::test_O3_a_stop_string_across_three_pieces_is_never_shown_in_part",
            f"{STOP}::test_O3_any_cut_into_pieces_gives_the_text_of_the_whole",
            f"{STOP}::test_O3_the_stop_string_that_completes_first_wins_not_the_first_listed",
            f"{STOP}::test_O3_include_keeps_the_stop_string_and_nothing_after_it",
            f"{ENGINE}::test_O3_stop_strings_cut_the_text_where_they_complete",
            f"{ENGINE}::test_O3_min_tokens_lets_stop_strings_pass",
        ),
        Mutant("inference/text/stop.py", "default=1) - 1\n", "default=1) - 3\n"),
    ),
    Row(
        "O3",
        (f"{STOP}::test_O3_the_stop_string_that_completes_first_wins_not_the_first_listed",),
        Mutant(
            "inference/text/stop.py",
            "return min(found, key=lambda span: (span[1], span[0]), default=None)",
            "return next(iter(found), None)",
        ),
    ),
    Row(
        "O4",
        (
            f"{CHARACTERS}::test_O4_text_survives_and_no_piece_shows_an_incomplete_character",
            f"{CHARACTERS}::test_O4_any_tokens_stream_to_what_the_tokenizer_decodes_at_once",
            f"{CHARACTERS}::test_O4_a_cut_character_is_held_back_and_flushed_once",
            f"{CHARACTERS}::test_O4_byte_fallback_tokens_join_to_characters_and_the_first_blank_stays",
        ),
        Mutant(
            "inference/text/detokenizer.py",
            "        return self._decoder.decode(data)\n",
            "        return data.decode(errors='replace')\n",
        ),
    ),
    Row(
        "O9",
        (
            f"{BAD}::test_O9_a_body_that_is_not_strict_json_is_refused",
            f"{BAD}::test_O9_a_wrong_value_is_refused_naming_the_parameter",
            f"{BAD}::test_O9_what_does_not_fit_the_context_is_refused_with_both_numbers",
            f"{BAD}::test_O9_unknown_models_paths_and_methods",
            f"{BAD}::test_O9_anything_but_plain_json_is_refused",
            f"{BAD}::test_O9_after_all_of_it_the_server_still_serves",
        ),
        Mutant("inference/server/parse.py", "object_pairs_hook=_unique, ", ""),
    ),
    Row(
        "O12",
        (
            f"{MEMORY}::test_O12_choices_of_one_request_share_a_memory",
            f"{MEMORY}::test_O12_others_have_memories_of_their_own",
            f"{MEMORY}::test_O12_an_abort_frees_the_memory_once",
            f"{MEMORY}::test_O12_a_resumed_request_reads_its_input_again_beside_a_chunk_of_its_own_tokens",
            "tests/inference/test_encoder_decoder.py::test_O12_requests_of_all_lengths_give_the_tokens_of_a_plain_loop",
        ),
        Mutant(
            "inference/core/blocks.py",
            "                self.memories[self.prefix.root(request)] = request.memory_table\n",
            "                pass\n",
        ),
    ),
]
