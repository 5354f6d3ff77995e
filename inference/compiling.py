"""Requests that are held until their grammar is compiled."""

import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass

from .. import RequestError
from .core.replicas import Replicas
from .core.request import Request
from .core.scheduler import Scheduler
from .core.structured import StructuredOutputs
from .text.grammar import Grammar, GrammarCompiler, GrammarError

LOOK_SECONDS = 0.01
"""The longest pause between two looks at whether anything else has come."""


@dataclass(frozen=True)
class _Held:
    """The choices of a request and what their text must look like."""

    wanted: StructuredOutputs
    requests: tuple[Request, ...]
    grammar: "Future[Grammar]"


class Compiling:
    """One thread uses it; compiling happens elsewhere."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._held: dict[str, _Held] = {}

    def __len__(self) -> int:
        return len(self._held)

    def add(self, request_id: str, wanted: StructuredOutputs, requests: Sequence[Request]) -> None:
        """Start compiling for a request that the scheduler holds, or find what has been compiled."""
        self._held[request_id] = _Held(wanted, tuple(requests), self._compiler.compile(wanted))

    def drop(self, request_id: str) -> None:
        """The request has ended; without effect when it does not wait. What nobody waits for is not compiled."""
        held = self._held.pop(request_id, None)
        if held is not None and all(held.grammar is not other.grammar for other in self._held.values()):
            held.grammar.cancel()

    def take(self, scheduler: Scheduler | Replicas) -> list[tuple[str, RequestError]]:
        """Release the requests whose grammar is there, with a matcher a choice; the others' errors, by request id."""
        refused = []
        for name, held in [(name, held) for name, held in self._held.items() if held.grammar.done()]:
            del self._held[name]
            try:
                grammar = held.grammar.result()
            except GrammarError as error:
                refused.append((name, held.wanted.error(str(error))))
                continue
            for request in held.requests:
                request.grammar = grammar.matcher()
                scheduler.release(request.id)
        return refused

    def close(self) -> None:
        """End the processes that compile."""
        self._compiler.close()

    def rest(self, seconds: float) -> None:
        """Sleep while nothing can be computed; where grammars are awaited until one is there, but not for long."""
        if self._held:
            wait([held.grammar for held in self._held.values()], seconds or LOOK_SECONDS, FIRST_COMPLETED)
        else:
            time.sleep(seconds)
