"""Stop strings: the earliest completing one wins, across any cut into tokens, and no part of one is ever shown."""
# ruff: noqa: N802 (O3 is the name of a rule)

from hypothesis import given, settings
from hypothesis import strategies as st

from turnout.inference.text.stop import StopText

LETTERS = st.text(alphabet="ab\n", max_size=30)
STOPS = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=5), min_size=1, max_size=4)


def cut_by_hand(text: str, stops: list[str], include: bool) -> str:
    """The specification, by brute force: the shortest prefix that ends in a stop string; the longest such string."""
    for end in range(1, len(text) + 1):
        fitting = [stop for stop in stops if text[:end].endswith(stop)]
        if fitting:
            return text[:end] if include else text[: end - max(map(len, fitting))]
    return text


@settings(deadline=None, max_examples=300)
@given(text=LETTERS, stops=STOPS, include=st.booleans(), data=st.data())
def test_O3_any_cut_into_pieces_gives_the_text_of_the_whole(text, stops, include, data):
    buffer, shown, rest = StopText(stops, include), [""], text
    expected = cut_by_hand(text, stops, include)
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        stopped = buffer.push(rest[:size])
        rest = rest[size:]
        if stopped:
            break
        shown.append(buffer.shown)
    assert buffer.text == expected
    for before, after in zip(shown, [*shown[1:], expected], strict=True):
        assert after.startswith(before)


def test_O3_the_stop_string_that_completes_first_wins_not_the_first_listed():
    buffer = StopText(["cdef", "bc"])
    assert buffer.push("abcdef")
    assert buffer.text == "a"


def test_O3_a_stop_string_across_three_pieces_is_never_shown_in_part():
    buffer = StopText(["<END>"])
    shown = []
    for piece in ("hello <E", "N", "D> more"):
        stopped = buffer.push(piece)
        shown.append(buffer.shown)
    assert stopped
    assert buffer.text == "hello "
    assert all("<" not in text for text in shown[:2])


def test_O3_include_keeps_the_stop_string_and_nothing_after_it():
    buffer = StopText(["\n"], include=True)
    assert buffer.push("line\nnext")
    assert buffer.text == "line\n"


def test_without_search_a_stop_string_is_ordinary_text_and_stays_so():
    buffer = StopText(["ab"])
    assert not buffer.push("ab", search=False)
    assert not buffer.push("c")
    assert buffer.push("ab")
    assert buffer.text == "abc"


def test_without_stop_strings_everything_is_shown_at_once():
    buffer = StopText()
    assert not buffer.push("text")
    assert buffer.shown == buffer.text == "text"
