"""A1 to A12, the abort matrix: a request goes from wherever it stands, and takes nothing with it.

A1 waiting, A2 mid-chunk, A3 in the launched step, A4 in decode, A5 preempted, A6 waiting for a grammar, A7 last token
already sampled, A8 n > 1 with one choice finished, A9 unknown id, A10 id twice, A11 all, A12 the client is gone: before
the first byte, mid-stream, on a call in one piece.
"""

from ..row import Mutant, Row

TESTS = "tests/inference/test_aborts.py"
HTTP = "tests/inference/server/test_abort.py"
ENGINE = "inference/engine.py"
SCHEDULER = "inference/core/scheduler.py"
BLOCKS = "inference/core/blocks.py"

ROWS = [
    Row(
        "A1",
        (f"{TESTS}::test_A1_waiting",),
        Mutant(
            SCHEDULER,
            "            del self.waiting[bisect_left(self.waiting, request.rank, key=_rank)]\n",
            "            pass\n",
        ),
    ),
    Row(
        "A2",
        (f"{TESTS}::test_A2_mid_chunk",),
        Mutant(
            SCHEDULER,
            "        if not request.in_flight:\n            self.blocks.release(request)",
            "        if request.num_output_tokens:\n            self.blocks.release(request)",
        ),
    ),
    Row(
        "A3",
        (f"{TESTS}::test_A3_in_the_launched_step",),
        Mutant(
            SCHEDULER,
            "            if request.status is Status.FINISHED:\n                if not request.in_flight:\n",
            "            if request.status is Status.FINISHED:\n                if request.num_output_tokens > 99:\n",
        ),
    ),
    Row(
        "A4",
        (f"{TESTS}::test_A4_in_decode",),
        Mutant(ENGINE, "            self.scheduler.abort(choice.request.id)\n", ""),
    ),
    Row(
        "A5",
        (f"{TESTS}::test_A5_preempted",),
        Mutant(
            SCHEDULER,
            "            del self.held[request.id]\n        else:\n",
            "            del self.held[request.id]\n        elif request.status is Status.WAITING:\n",
        ),
    ),
    Row(
        "A7",
        (f"{TESTS}::test_A7_last_token_already_sampled",),
        Mutant(
            ENGINE,
            "return self._end(request_id) if request_id in self._ledger else None",
            "return self._end(request_id) if request_id in self._ledger else RequestOutput('', '', [], [], True)",
        ),
    ),
    Row(
        "A8",
        (f"{TESTS}::test_A8_one_choice_of_several_finished",),
        Mutant(
            "inference/choice.py",
            "        if self.finish_reason is None:\n            self._text.push(self._detokenizer.flush()",
            "        if self.finish_reason != reason:\n            self._text.push(self._detokenizer.flush()",
        ),
    ),
    Row(
        "A9",
        (f"{TESTS}::test_A9_unknown_id",),
        Mutant(
            ENGINE,
            "return self._end(request_id) if request_id in self._ledger else None",
            "return self._end(request_id.partition('#')[0]) if request_id.partition('#')[0] in self._ledger else None",
        ),
    ),
    Row(
        "A10",
        (f"{TESTS}::test_A10_id_twice",),
        Mutant(
            "inference/ledger.py",
            "        if finished:\n            del self._entries[name]\n",
            "        if finished and error is None and any(c.finish_reason != 'abort' for c in entry.choices):\n"
            "            del self._entries[name]\n",
        ),
    ),
    Row(
        "A11",
        (f"{TESTS}::test_A11_all",),
        Mutant(ENGINE, "for request_id in list(self._ledger)]", "for request_id in list(self._ledger)[:2]]"),
    ),
    Row(
        "A12",
        (
            f"{HTTP}::test_A12_a_client_that_leaves_frees_its_blocks_within_two_steps",
            f"{HTTP}::test_A12_a_client_that_leaves_while_it_waits_is_never_run",
            f"{HTTP}::test_A12_the_others_are_not_changed_by_it",
            f"{HTTP}::test_A12_a_client_that_leaves_before_its_body_is_whole_costs_nothing",
        ),
        Mutant(
            "inference/async_engine.py",
            "            self._send(partial(self._abort, request_id, stream))\n",
            "            pass\n",
        ),
    ),
]
