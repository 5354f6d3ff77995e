"""Markov models: equal to a plain dictionary's count, and to the figures known for the shipped text."""

import math
from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnout import ConfigError, DataError
from turnout.moe.data.corpus import read_documents
from turnout.moe.eval.markov import markov_bits_per_byte


def by_dictionary(train, held_out, order):
    """Bits per byte of the top order, by the formula, byte by byte."""
    followers = defaultdict(Counter)
    for text in train:
        data = text.encode()
        for i, byte in enumerate(data):
            for k in range(min(i, order) + 1):
                followers[data[i - k : i]][byte] += 1

    def probability(context, byte):
        shorter = probability(context[1:], byte) if context else 1 / 256
        seen = followers.get(context)
        return shorter if seen is None else (seen[byte] + len(seen) * shorter) / (seen.total() + len(seen))

    bits = [
        -math.log2(probability(data[max(0, i - order) : i], byte))
        for data in (text.encode() for text in held_out)
        for i, byte in enumerate(data)
    ]
    return sum(bits) / len(bits)


def test_it_equals_a_dictionary_on_any_text():
    texts = st.lists(st.text(alphabet="abé\0\U0010ffff", max_size=12), min_size=1, max_size=5)

    @settings(max_examples=150, deadline=None)
    @given(texts.filter(any), texts.filter(any), st.integers(0, 7))
    def check(train, held_out, order):
        found = markov_bits_per_byte(train, held_out, order)
        assert found == pytest.approx([by_dictionary(train, held_out, k) for k in range(order + 1)], abs=1e-9)

    check()


def test_it_equals_a_dictionary_on_real_text():
    train, held_out = (
        [t[:9000] for t in read_documents("pydocs", "train")[:6]],
        read_documents("pydocs", "validation")[:1],
    )
    assert markov_bits_per_byte(train, held_out, 4)[4] == pytest.approx(by_dictionary(train, held_out, 4), abs=1e-9)


def test_order_zero_by_hand():
    # "aab" then "ab": n(a) = 2, n(b) = 1, T = 2, so P(a) = (2 + 2/256) / 5 and P(b) = (1 + 2/256) / 5.
    expected = -(math.log2((2 + 2 / 256) / 5) + math.log2((1 + 2 / 256) / 5)) / 2
    assert markov_bits_per_byte(["aab"], ["ab"], 0) == pytest.approx([expected])


def test_contexts_do_not_cross_documents():
    assert markov_bits_per_byte(["ab", "cd"], ["bc"], 2) == markov_bits_per_byte(["cd", "ab"], ["bc"], 2)
    assert markov_bits_per_byte(["ab", "cd"], ["bc"], 2) != markov_bits_per_byte(["abcd"], ["bc"], 2)


@pytest.mark.full
def test_the_known_figures_of_the_shipped_text():
    found = markov_bits_per_byte(read_documents("pydocs", "train"), read_documents("pydocs", "validation"), 5)
    assert [round(bits, 2) for bits in found[2:]] == [2.71, 2.09, 1.85, 1.77]


def test_bad_arguments_are_refused():
    for order in (-1, 8):
        with pytest.raises(ConfigError, match="order"):
            markov_bits_per_byte(["a"], ["a"], order)
    with pytest.raises(DataError, match="training text is empty"):
        markov_bits_per_byte([""], ["a"], 1)
    with pytest.raises(DataError, match="held-out text is empty"):
        markov_bits_per_byte(["a"], [], 1)
