"""M3 and M4: several ranks are one."""

from ..row import Mutant, Row

RANKS = "tests/inference/test_ranks.py"
REPLICAS = "tests/inference/core/test_replicas.py"
SERVING = "tests/parallel/test_serving.py"

ROWS = [
    Row(
        "M3",
        (
            "tests/parallel/test_apply.py::test_M3_serving_places_experts_unevenly_and_leaves_no_rank_without",
            "tests/parallel/test_dispatch.py::test_M3_experts_that_the_ranks_do_not_divide_give_what_one_rank_gives",
            f"{RANKS}::test_M3_ep_2_serves_what_one_rank_serves",
        ),
        Mutant("parallel/dispatch/parts.py", "+ (rank < num_experts % ranks) for", "for"),
    ),
    Row(
        "M4",
        (
            f"{REPLICAS}::test_M4_every_step_has_a_part_for_every_replica",
            f"{SERVING}::test_M4_every_rank_gets_its_part_of_an_order_also_an_empty_one",
            f"{SERVING}::test_M4_rows_come_to_rank_0_also_from_ranks_without_any",
            f"{RANKS}::test_M4_a_replica_without_requests_takes_part_in_every_step",
        ),
        Mutant(
            "inference/core/replicas.py",
            "            parts=tuple(parts),\n",
            "            parts=tuple(part for part in parts if part.num_tokens),\n",
        ),
    ),
]
