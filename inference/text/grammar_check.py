"""Compile grammars in a process of its own, which a hostile one may kill: `python grammar_check.py`, over pipes.

The library's limits bound most of what a grammar can cost, but not all of it (`multipleOf` of large primes runs for
ever), and a thread in a native loop can not be stopped. Here an alarm ends the process and the caller starts another.

Input: a line of JSON {"tokens": [hex, ...]}, then one {"kind", "text", "seconds"} a grammar. Output: for each a line
{"grammar": its form for the library} or {"error": why not}. Imports nothing of the package, so that it starts fast.
"""

import json
import re
import resource
import signal
import sys
from typing import Any

import llguidance

LIMITS = llguidance.LLParserLimits(max_lexer_states=50_000, verbose_errors=False)
MEMORY = 4 * 2**30  # bytes of address space
OPTIONS = '%llguidance {"no_forcing": true}\n'  # every token that fits is allowed, however the tokenizer would split it
SPACE = "[ \\t\\n\\r]{1,32}"  # so that a model can not write blanks for ever
LONGEST = 300  # characters of a message


class Vocabulary:
    """What the library reads of a tokenizer; the last token is the end, a stand-in for all of the model's own."""

    bos_token_id = None
    special_token_ids: tuple[int, ...] = ()

    def __init__(self, tokens: list[bytes]) -> None:
        self.tokens = [*tokens, b""]
        self.eos_token_id = len(tokens)

    def __call__(self, text: bytes | str) -> list[int]:
        raise ValueError("only forced tokens would ask for this")


def build_tokenizer(tokens: list[bytes]) -> llguidance.LLTokenizer:
    """The library's form of a vocabulary: bytes of every token, empty for those that no text may hold."""
    vocabulary = Vocabulary(tokens)
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(vocabulary), eos_token=vocabulary.eos_token_id)


def build_matcher(tokenizer: llguidance.LLTokenizer, grammar: str) -> llguidance.LLMatcher:
    """A matcher at the start of `grammar`; it may be in an error state."""
    return llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)


def translate(kind: str, text: str) -> str:
    """The constraint as a grammar of the library's."""
    if kind == "json":
        schema = json.loads(text) | {"x-guidance": {"whitespace_pattern": SPACE}}
        return f"{OPTIONS}start: %json {json.dumps(schema)}"
    if kind == "regex":
        return f"{OPTIONS}start: /{llguidance.regex_to_lark(text, '')}/"
    if kind == "choice":
        return OPTIONS + "start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in json.loads(text))
    return OPTIONS + llguidance.grammar_from("grammar", text)


def check(tokenizer: llguidance.LLTokenizer, kind: str, text: str) -> dict[str, str]:
    """Compile once and take the first mask."""
    try:
        grammar = translate(kind, text)
    except ValueError as error:
        return {"error": _short(str(error))}
    matcher = build_matcher(tokenizer, grammar)
    mask = b"" if matcher.is_error() else matcher.compute_bitmask()
    if matcher.is_error():
        message = _short(matcher.get_error())
        return {"error": "no text of this vocabulary matches it" if message == "NoExtensionBias" else message}
    end = tokenizer.vocab_size - 1
    if int.from_bytes(mask, "little") in (0, 1 << end):
        return {"error": "no text but the empty one matches it"}
    return {"grammar": grammar}


def _short(message: str) -> str:
    """The message without the library's state, backtrace and listing of the grammar, on one line."""
    head = re.split(r"<non-verbose/>|<backtrace>|<state>|\n *\d+ \| ", message)[0]
    return " ".join(head.split())[:LONGEST]


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    tokenizer = None
    for line in sys.stdin:
        job: dict[str, Any] = json.loads(line)
        if "tokens" in job:
            tokenizer = build_tokenizer([bytes.fromhex(token) for token in job["tokens"]])
            continue
        assert tokenizer is not None, "the vocabulary comes first"
        signal.setitimer(signal.ITIMER_REAL, job["seconds"])  # nobody handles SIGALRM: it ends the process
        answer = check(tokenizer, job["kind"], job["text"])
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
