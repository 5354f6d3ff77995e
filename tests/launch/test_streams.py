"""Several streams at once stay readable, and their times are summed up honestly."""

import pytest

from turnout.launch.streams import LinePrinter, percentile


@pytest.fixture
def printed():
    return []


def test_pieces_of_several_streams_come_out_as_whole_lines(printed):
    printer = LinePrinter(printed.append, width=20)
    printer.add(0, "one ")
    printer.add(1, "uno ")
    printer.add(0, "two\nthree")
    printer.add(1, "dos\n")
    assert printed == ["[0] one two", "[1] uno dos"]
    printer.end(0)
    printer.end(1)
    assert printed == ["[0] one two", "[1] uno dos", "[0] three"]


def test_a_long_line_is_broken_at_a_space_and_a_longer_word_is_cut(printed):
    printer = LinePrinter(printed.append, width=10)
    printer.add(2, "aaaa bbbb cccc ")
    printer.add(2, "x" * 12)
    printer.end(2)
    assert printed == ["[2] aaaa bbbb", "[2] cccc", "[2] xxxxxxxxxx", "[2] xx"]


def test_no_character_is_lost_but_white_space(printed):
    text = "def f(x):\n    return [x, 1]\n\n" + "word " * 40
    printer = LinePrinter(printed.append, width=17)
    for i in range(0, len(text), 3):
        printer.add(0, text[i : i + 3])
    printer.end(0)
    assert "".join("".join(printed).replace("[0] ", "").split()) == "".join(text.split())


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [([3.0], 0.5, 3.0), ([4, 1, 3, 2], 0.5, 2), ([4, 1, 3, 2], 0.99, 4), (range(1, 101), 0.99, 99), ([1, 2], 0.0, 1)],
)
def test_a_percentile_is_the_nearest_rank(values, share, expected):
    assert percentile(list(values), share) == expected
