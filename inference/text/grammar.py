"""Grammars that a text is held to, compiled off the engine's thread with `llguidance`.

A thread first asks a process (`grammar_check.py`) whether a grammar can be compiled in time, then compiles it here,
where its masks are made. What runs for ever, eats memory or breaks the library costs that process and nothing else.
"""

import contextlib
import json
import queue
import signal
import subprocess
import sys
import threading
import weakref
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property

import llguidance

from ... import TurnoutError
from ..core.structured import StructuredOutputs
from . import grammar_check
from .grammar_check import build_matcher, build_tokenizer
from .tokenizer import TextTokenizer

WORKERS = 2
"""Threads with a process each, so that one hostile grammar does not hold up the next."""
CACHED = 256
"""Grammars that are kept, least recently used first to go."""


class GrammarError(TurnoutError, ValueError):
    """The grammar can not be compiled; the message goes on after the grammar's name."""


class GrammarTimeoutError(GrammarError, TimeoutError):
    """It took too long, which a calmer machine may change."""


class GrammarMatcher:
    """One choice's place in a grammar: the core's `Matcher`.

    Attributes:
        accepts, mask: as they stand after the last accepted token.
    """

    def __init__(self, state: llguidance.LLMatcher, end: int) -> None:
        self._state, self._end = state, end
        self._look()

    @property
    def error(self) -> str:
        """Why the library gave up on the text; empty where it did not."""
        return self._state.get_error().partition("\n")[0]

    def accept(self, token: int) -> bool:
        self._state.consume_token(token)
        self._look()
        return self.accepts and not any(self.mask)

    def _look(self) -> None:
        mask = bytearray(self._state.compute_bitmask())
        mask[self._end >> 3] &= ~(1 << (self._end & 7))  # the library's end of text, no token of the model's
        self.mask = bytes(mask)
        self.accepts = self._state.is_accepting() and not self._state.is_error()


@dataclass(frozen=True)
class Grammar:
    """A compiled grammar.

    Args:
        start: stands before the first token and is only copied.
        end: the token that stands for the end of the text.
    """

    start: llguidance.LLMatcher
    end: int

    def matcher(self) -> GrammarMatcher:
        """A place of its own for one choice."""
        return GrammarMatcher(self.start.deep_copy(), self.end)


class GrammarCompiler:
    """Compiles grammars for one vocabulary and keeps them. Any thread may ask; nothing starts before the first does.

    Args:
        tokenizer: the model's.
        vocab_size: tokens that the model has logits for.
        seconds: how long one grammar may take.
    """

    def __init__(self, tokenizer: TextTokenizer, vocab_size: int, seconds: float) -> None:
        self._vocabulary = _Vocabulary(tokenizer, vocab_size)
        self._processes = [_Process(self._vocabulary, seconds) for _ in range(WORKERS)]
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._known: OrderedDict[tuple[str, str], Future[Grammar]] = OrderedDict()
        self._door = threading.Lock()
        self._started = False
        self._end = weakref.finalize(self, _end, self._jobs, self._processes)

    def compile(self, wanted: StructuredOutputs) -> "Future[Grammar]":
        """The grammar once it is there, or the `GrammarError` that says why not; equal ones are compiled once.

        Whoever does not want it any more may cancel it, if nobody else waits for it.
        """
        key = wanted.kind, wanted.text
        with self._door:
            future = self._known.get(key)
            if future is None or future.cancelled() or _gave_up(future):
                future = self._known[key] = Future()
                self._jobs.put(_Job(*key, future))
                self._start()
            self._known.move_to_end(key)
            while len(self._known) > CACHED:
                self._known.popitem(last=False)
        return future

    def close(self) -> None:
        """End the processes; what is still compiled ends with an error."""
        self._end()

    def _start(self) -> None:
        if not self._started:
            self._started = True
            for process in self._processes:
                arguments = (self._jobs, process, self._vocabulary)
                threading.Thread(target=_work, args=arguments, name="turnout-grammar", daemon=True).start()


@dataclass(frozen=True)
class _Job:
    kind: str
    text: str
    future: "Future[Grammar]"


class _Vocabulary:
    """The tokens' bytes, empty for those that no text may hold, and the library's form of them."""

    def __init__(self, tokenizer: TextTokenizer, size: int) -> None:
        self._tokenizer, self.size = tokenizer, size

    @cached_property
    def tokens(self) -> list[bytes]:
        text = self._tokenizer
        return [b"" if text.is_special(token) else text.token_bytes(token) for token in range(self.size)]

    @cached_property
    def native(self) -> llguidance.LLTokenizer:
        return build_tokenizer(self.tokens)


class _Process:
    """A process that compiles, started when it is first needed and again after a grammar has ended it."""

    def __init__(self, vocabulary: _Vocabulary, seconds: float) -> None:
        self._vocabulary, self._seconds = vocabulary, seconds
        self._child: subprocess.Popen[str] | None = None

    def translate(self, kind: str, text: str) -> str:
        """The grammar in the library's form, which has been compiled in time.

        Raises:
            GrammarError: it can not be.
        """
        if self._child is not None and self._child.poll() is not None:
            self._bury()
        if self._child is None:
            self._open()
        line = self._ask({"kind": kind, "text": text, "seconds": self._seconds})
        if not line:
            code = self._bury()
            if code == -signal.SIGALRM:
                rule = f"takes longer than grammar_timeout ({self._seconds} s) to compile: simplify it"
                raise GrammarTimeoutError(rule)
            raise GrammarError(f"breaks the grammar compiler (exit code {code}): simplify it")
        answer: dict[str, str] = json.loads(line)
        if "error" in answer:
            raise GrammarError(f"can not be compiled: {answer['error']}")
        return answer["grammar"]

    def kill(self) -> None:
        """End the process; any thread may, also while another one waits for it."""
        child = self._child
        if child is not None:
            child.kill()

    def close(self) -> None:
        """End the process and close its pipes; nobody may be waiting for it."""
        self.kill()
        if self._child is not None:
            self._bury()

    def _open(self) -> None:
        self._child = subprocess.Popen(  # noqa: S603 - our own file
            [sys.executable, "-P", grammar_check.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # what the library says when it panics
            text=True,
            encoding="utf-8",
            start_new_session=True,  # a Ctrl-C is for us
        )
        self._send({"tokens": [token.hex() for token in self._vocabulary.tokens]})

    def _bury(self) -> int:
        """Take leave of a process that ended, or is about to; its exit code."""
        child, self._child = self._child, None
        assert child is not None, "there was one"
        with contextlib.suppress(BrokenPipeError), child:
            pass  # closes its pipes and waits
        return child.wait()

    def _ask(self, job: dict[str, object]) -> str:
        assert self._child is not None, "the process has been started"
        assert self._child.stdout is not None, "its output is a pipe"
        self._send(job)
        return self._child.stdout.readline()

    def _send(self, message: dict[str, object]) -> None:
        assert self._child is not None, "the process has been started"
        assert self._child.stdin is not None, "its input is a pipe"
        with contextlib.suppress(BrokenPipeError):  # it is gone, which the end of its output tells
            self._child.stdin.write(json.dumps(message) + "\n")
            self._child.stdin.flush()


def _work(jobs: "queue.SimpleQueue[_Job | None]", process: _Process, vocabulary: _Vocabulary) -> None:
    while (job := jobs.get()) is not None:
        if not job.future.set_running_or_notify_cancel():
            continue
        try:
            start = build_matcher(vocabulary.native, process.translate(job.kind, job.text))
            if start.is_error():
                raise GrammarError(f"can not be compiled: {start.get_error()}")
        except BaseException as error:  # noqa: BLE001 - whoever waits must learn it
            job.future.set_exception(error)
        else:
            job.future.set_result(Grammar(start, vocabulary.size))
    process.close()


def _gave_up(future: "Future[Grammar]") -> bool:
    return future.done() and isinstance(future.exception(), GrammarTimeoutError)


def _end(jobs: "queue.SimpleQueue[_Job | None]", processes: list[_Process]) -> None:
    for process in processes:
        jobs.put(None)
        process.kill()
