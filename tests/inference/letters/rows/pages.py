"""What pages hold, and what they take: precision (I4), windows (I7), the plan of the memory (M9, G4)."""

from ..row import Mutant, Row

WINDOWS = "tests/inference/core/test_windows.py"
MEMORY = "tests/inference/run/test_memory.py"

ROWS = [
    Row(
        "I4",
        ("tests/inference/run/test_int8_cache.py::test_I4_blocks_of_one_precision_are_not_found_under_another",),
        Mutant("inference/machine.py", " {self.memory.kv.dtype}", ""),
    ),
    Row(
        "I7",
        (
            f"{WINDOWS}::test_I7_a_block_goes_when_no_later_token_sees_it",
            f"{WINDOWS}::test_I7_a_launched_step_still_has_what_it_reads",
        ),
        Mutant("inference/core/blocks.py", "computed - self._window + 1", "computed - self._window + 3"),
    ),
    Row(
        "M9",
        (
            f"{MEMORY}::test_M9_every_token_of_all_ranks_may_go_to_the_experts_of_one",
            f"{MEMORY}::test_M9_the_worst_step_takes_no_more_than_planned",
        ),
        Mutant(
            "inference/run/activations.py",
            "// self.tp) * self.ranks * min",
            "// self.tp) * min",
        ),
    ),
    Row(
        "G4",
        (f"{MEMORY}::test_G4_what_would_run_out_after_ready_is_refused_with_numbers_and_fixes",),
        Mutant(
            "inference/run/memory.py", "return self.activations + self.cache <= limit", "return self.cache <= limit"
        ),
    ),
]
