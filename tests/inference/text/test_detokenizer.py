"""Streamed characters are exactly the decoded whole, and an incomplete character is never shown."""
# ruff: noqa: N802 (O4 is the name of a rule)

from hypothesis import example, given, settings
from hypothesis import strategies as st

from turnout.inference.text.detokenizer import Detokenizer
from turnout.inference.text.tokenizer import TextTokenizer

EMOJI = st.sampled_from(
    ["👩‍👩‍👧‍👦", "👍🏽", "🏳️‍🌈", "🇩🇪", "é", "e\u0301", "日本", "한", "𝔘", "\u200d", "<tool call>", " "]
)
TEXT = st.lists(st.one_of(EMOJI, st.text(max_size=4)), max_size=12).map("".join).filter(lambda t: "\ufffd" not in t)


def stream(tokenizer: TextTokenizer, ids: list[int], prompt: list[int] | None = None, **options: bool) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt or [], **options)
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


@settings(deadline=None, max_examples=150)
@given(text=TEXT)
@example(text="👩‍👩‍👧‍👦")
def test_O4_text_survives_and_no_piece_shows_an_incomplete_character(byte_level, text):
    pieces = stream(byte_level, byte_level.encode(text))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_O4_any_tokens_stream_to_what_the_tokenizer_decodes_at_once(byte_level, data):
    ids = data.draw(st.lists(st.integers(0, byte_level.vocab_size - 1), max_size=40))
    for skip in (True, False):
        pieces = stream(byte_level, ids, skip_special_tokens=skip)
        assert "".join(pieces) == byte_level.decode(ids, skip_special_tokens=skip)


@settings(deadline=None, max_examples=50)
@given(text=TEXT.filter(bool), data=st.data())
def test_O4_a_cut_character_is_held_back_and_flushed_once(byte_level, text, data):
    ids = byte_level.encode(text)
    ids = ids[: data.draw(st.integers(1, len(ids)))]
    *shown, last = stream(byte_level, ids)
    assert "\ufffd" not in "".join(shown)
    assert last in ("", "\ufffd")
    assert "".join(shown) + last == byte_level.decode(ids)


@settings(deadline=None, max_examples=50)
@given(text=TEXT.filter(lambda t: len(t) > 1), data=st.data())
def test_a_character_that_the_prompt_begins_is_completed_by_the_output(byte_level, text, data):
    ids = byte_level.encode(text)
    cut = data.draw(st.integers(1, len(ids) - 1)) if len(ids) > 1 else 1
    shown = "".join(stream(byte_level, ids[cut:], prompt=ids[:cut]))
    assert "\ufffd" not in shown
    assert text.endswith(shown)


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_a_character_that_the_prompt_begins_and_nobody_completes_leaves_no_trace(byte_level, data):
    any_ids = st.lists(st.integers(0, byte_level.vocab_size - 1), max_size=8)
    prompt, ids = [*data.draw(any_ids), *byte_level.encode("日")[:-1]], data.draw(any_ids)
    output = b"".join(byte_level.token_bytes(i) for i in ids if not byte_level.is_special(i))
    if not 0x80 <= (output or b"a")[0] < 0xC0:  # the first byte begins something new
        assert "".join(stream(byte_level, ids, prompt)) == byte_level.decode(ids)


def test_special_tokens_are_left_out_unless_asked_for(byte_level):
    ids = [*byte_level.encode("one"), 0, *byte_level.encode("two")]
    assert "".join(stream(byte_level, ids)) == "onetwo"
    assert "".join(stream(byte_level, ids, skip_special_tokens=False)) == "one<|endoftext|>two"


def test_O4_byte_fallback_tokens_join_to_characters_and_the_first_blank_stays(byte_fallback):
    prompt, ids = byte_fallback.encode("a"), byte_fallback.encode("b é👍")
    assert any(byte_fallback.token_bytes(i) == b"\xf0" for i in ids)
    assert "".join(stream(byte_fallback, ids, prompt)) == " b é👍"
    assert not any("\ufffd" in piece for piece in stream(byte_fallback, ids, prompt))


def test_an_unknown_id_is_no_text(byte_level):
    assert stream(byte_level, [10**6]) == ["", ""]


def test_a_text_that_begins_has_no_blank_of_its_tokenizers(byte_fallback, byte_level):
    ids = byte_fallback.encode("ab a", add_special_tokens=False)
    assert "".join(stream(byte_fallback, ids)) == " ab a", "it goes on with another text"
    assert "".join(stream(byte_fallback, ids, opens=True)) == "ab a" == byte_fallback.decode(ids)
    ids = [1, *byte_fallback.encode(" a", add_special_tokens=False)]
    assert "".join(stream(byte_fallback, ids, opens=True)) == " a", "one blank is the tokenizer's, not all"
    ids = byte_level.encode(" a")
    assert "".join(stream(byte_level, ids, opens=True)) == " a" == byte_level.decode(ids)
