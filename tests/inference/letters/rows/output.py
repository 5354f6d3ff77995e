"""O1 to O12: what a caller gets to see."""

from ..row import Mutant, Row

ENGINE = "tests/inference/test_engine.py"
STOP = "tests/inference/text/test_stop.py"
CHARACTERS = "tests/inference/text/test_detokenizer.py"
BAD = "tests/inference/server/test_bad_input.py"
MEMORY = "tests/inference/core/test_encoder.py"


ROWS = [
    Row(
        "O2",
        (f"{ENGINE}::test_O2_P3_streamed_outputs_only_grow_and_end_once",),
        Mutant("inference/ledger.py", "            finished,\n", "            True,\n"),
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
