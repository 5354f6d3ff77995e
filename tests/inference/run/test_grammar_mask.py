"""Logits under grammars, row by row, with a grammar of the test's own."""
# ruff: noqa: N802 (O10 is the name of a rule)

from dataclasses import dataclass

import torch

from turnout.inference.core.request import Request
from turnout.inference.core.sampling import SamplingParams
from turnout.inference.core.step import Scheduled
from turnout.inference.run.grammar_mask import hold_to_grammars
from turnout.inference.run.sampler import sample

VOCABULARY = 21


@dataclass
class Fixed:
    """Always allows the same tokens."""

    allowed: set[int]
    accepts: bool = False
    error: str = ""

    @property
    def mask(self) -> bytes:
        return sum(1 << token for token in self.allowed).to_bytes(4, "little")

    def accept(self, token: int) -> bool:
        return False


def request(grammar: Fixed | None, **params) -> Request:
    made = Request("x", [1, 2], SamplingParams(temperature=0, **params), eos_token_ids=frozenset({20, 500}))
    made.grammar = grammar
    return made


def item(of: Request) -> Scheduled:
    return Scheduled(of, start=0, count=2, token_ids=(1, 2), block_table=(1,), samples=True)


def test_O10_rows_keep_what_their_grammar_allows_and_the_end_where_it_accepts():
    rows = [
        request(Fixed({0, 8, 19})),
        request(None),
        request(Fixed({7, 20})),
        request(Fixed({7}, accepts=True)),
        request(Fixed({3, 5}), stop_token_ids=[5]),
        request(Fixed({3}, accepts=True), stop_token_ids=[5]),
        request(Fixed({3}, accepts=True), ignore_eos=True),
    ]
    logits_RV = torch.randn(len(rows), VOCABULARY)
    before_RV = logits_RV.clone()
    found_RV = hold_to_grammars(logits_RV, [item(row) for row in rows])
    everything = set(range(VOCABULARY))
    expected = [{0, 8, 19}, everything, {7}, {7, 20}, {3}, {3, 5, 20}, {3}]
    for row, allowed in enumerate(expected):
        assert set(found_RV[row].isfinite().nonzero().flatten().tolist()) == allowed
        assert torch.equal(found_RV[row, sorted(allowed)], before_RV[row, sorted(allowed)])
    assert torch.equal(logits_RV, before_RV)


def test_without_a_grammar_the_logits_are_not_copied():
    logits_RV = torch.randn(2, VOCABULARY)
    assert hold_to_grammars(logits_RV, [item(request(None))] * 2) is logits_RV


def test_O10_a_row_with_nothing_allowed_is_a_excluded_and_no_other():
    rows = [request(Fixed({4})), request(Fixed(set())), request(Fixed({20}), min_tokens=5), request(None)]
    logits_RV = torch.randn(len(rows), VOCABULARY)
    found = sample(logits_RV, [item(row) for row in rows])
    assert [(result.token, result.excluded) for result in found] == [
        (4, False), (None, True), (None, True), (int(logits_RV[3].argmax()), False),
    ]  # fmt: skip
    assert [result.excluded for result in sample(logits_RV * torch.nan, [item(row) for row in rows])] == [False] * 4
