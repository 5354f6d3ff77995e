"""I1 to I10: where blocks are, who holds them, what they are called."""

from ..row import Mutant, Row

TESTS = "tests/inference/core/test_blocks.py"
BLOCKS = "inference/core/blocks.py"
PREFIX = "inference/core/prefix.py"
SCHEDULER = "inference/core/scheduler.py"

ROWS = [
    Row(
        "I1",
        (f"{TESTS}::test_I1_every_block_is_in_one_set_and_counts_are_tables",),
        Mutant(
            BLOCKS,
            "            del self.prefix.idle[block]\n        self.counts[block] += 1",
            "            del self.prefix.idle[block]\n            self.counts[block] += 1",
        ),
    ),
    Row(
        "I2",
        (f"{TESTS}::test_I2_nothing_is_left_after_drain",),
        Mutant(SCHEDULER, "        del self.requests[request.id]\n", ""),
    ),
    Row(
        "I3",
        (
            f"{TESTS}::test_I3_a_prefix_is_published_after_it_is_computed",
            f"{TESTS}::test_I3_an_aborted_step_publishes_nothing",
        ),
        Mutant(
            BLOCKS,
            "        full = request.num_computed_tokens // self.block_size\n",
            "        full = request.num_tokens // self.block_size\n",
        ),
    ),
    Row(
        "I4",
        (
            f"{TESTS}::test_I4_a_name_covers_the_whole_prefix_the_salt_and_the_model",
            f"{TESTS}::test_I4_tokens_of_several_bytes_are_not_confused",
            f"{TESTS}::test_I4_another_salt_hits_nothing",
        ),
        Mutant(PREFIX, "hashlib.sha256(parent + tokens.tobytes())", "hashlib.sha256(tokens.tobytes())"),
    ),
    Row(
        "I5",
        (f"{TESTS}::test_I5_a_full_hit_still_computes_a_token",),
        Mutant(BLOCKS, "(request.num_tokens - 1) // self.block_size", "request.num_tokens // self.block_size"),
    ),
    Row(
        "I6",
        (
            f"{TESTS}::test_I6_the_least_recently_used_goes_first_and_tails_before_heads",
            f"{TESTS}::test_I6_a_hit_makes_a_prefix_recent",
            f"{TESTS}::test_I6_a_prefix_computed_twice_is_kept_once",
        ),
        Mutant(BLOCKS, "in reversed((*request.replaced_blocks, *request.block_table)):", "in request.block_table:"),
    ),
    Row(
        "I7",
        (f"{TESTS}::test_I7_blocks_of_an_aborted_request_stay_until_its_step_is_over",),
        Mutant(
            SCHEDULER,
            "        if not request.in_flight:\n            self.blocks.release",
            "        self.blocks.release",
        ),
    ),
    Row(
        "I8",
        (f"{TESTS}::test_I8_a_block_that_is_written_to_has_one_owner",),
        Mutant(BLOCKS, "self.free.pop() if self.free", "self.free[-1] if self.free"),
    ),
    Row(
        "I9",
        (f"{TESTS}::test_I9_the_null_block_is_never_handed_out",),
        Mutant(BLOCKS, "list(range(num_blocks - 1, 0, -1))", "list(range(num_blocks - 2, -1, -1))"),
    ),
    Row(
        "I10",
        (f"{TESTS}::test_I10_usage_is_referenced_over_usable",),
        Mutant(BLOCKS, "return len(self.free) + len(self.prefix.idle)", "return len(self.free)"),
    ),
]
