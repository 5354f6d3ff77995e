"""What the answers of a run say: times in seconds, per cent as nearest ranks.

A figure of a time counts from when a request was due. Requests that failed or were refused are counted, by what came;
they have no part in the times, and they miss the objective.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...configs.typed import check
from ..streams import percentile
from .online import Answer

TIMES = ("ttft", "tpot", "itl", "e2e")
SHARES: Mapping[str, float] = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
STATISTICS = ("mean", *SHARES)


@dataclass(frozen=True, kw_only=True)
class Slo:
    """The objective: seconds that a request may take to its first token, and for each after it; None = any."""

    ttft: float | None = None
    tpot: float | None = None

    def __post_init__(self) -> None:
        for name in ("ttft", "tpot"):
            value = getattr(self, name)
            check(value is None or value > 0, f"slo.{name}", value, "must be positive", "use seconds, such as 0.5")

    def __bool__(self) -> bool:
        return self.ttft is not None or self.tpot is not None

    def met(self, answer: Answer) -> bool:
        """Whether a request was answered in time. One token has no time between tokens, which is in time."""
        if not answer.ok or answer.ttft is None:
            return False
        slow = self.tpot is not None and answer.tpot is not None and answer.tpot > self.tpot
        return not slow and (self.ttft is None or answer.ttft <= self.ttft)


def summary(answers: Sequence[Answer], slo: Slo) -> dict[str, Any]:
    """The figures of one run of a load."""
    good = [answer for answer in answers if answer.ok]
    seconds = max(answer.end for answer in answers) - min(answer.due for answer in answers)
    tokens, timed = sum(answer.tokens for answer in good), sum(len(a.times) for a in good)
    found: dict[str, Any] = {
        "requests": len(answers),
        "ok": len(good),
        "failed": dict(Counter(answer.outcome for answer in answers if not answer.ok)),
        "short": sum(answer.tokens < answer.wanted for answer in good),
        "seconds": seconds,
        "requests_per_second": len(good) / seconds,
        "tokens_per_second": tokens / seconds,
        "prompt_tokens": sum(answer.prompt_tokens or 0 for answer in good),
        "tokens": tokens,
        "counted": "pieces" if any(answer.counted == "pieces" for answer in good) else "usage",
    }
    if timed:
        found["tokens_per_piece"] = tokens / timed
    for name, values in times(good).items():
        found |= _statistics(name, values)
    found |= _statistics("late", [a.sent - a.due for a in answers if a.sent is not None])
    if slo:
        met = sum(slo.met(answer) for answer in answers)
        found |= {"goodput": met / seconds, "good_share": met / len(answers)}
    return found


def times(answers: Iterable[Answer]) -> dict[str, list[float]]:
    """Of each kind, what the answers have of it."""
    told = list(answers)
    return {
        "ttft": [answer.ttft for answer in told if answer.ttft is not None],
        "tpot": [answer.tpot for answer in told if answer.tpot is not None],
        "itl": [gap for answer in told for gap in answer.gaps],
        "e2e": [answer.e2e for answer in told],
    }


def median(turns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of every number its median over the rounds, where all have it; failures and counts are added up."""
    found: dict[str, Any] = {}
    for name, first in turns[0].items():
        values = [turn[name] for turn in turns if name in turn]
        if isinstance(first, dict):
            found[name] = dict(sum((Counter(value) for value in values), Counter()))
        elif isinstance(first, int):
            found[name] = sum(values)
        elif isinstance(first, str):
            found[name] = max(values, key=lambda value: value == "pieces")
        elif len(values) == len(turns):
            found[name] = statistics.median(values)
    return found


def ratios(one: Sequence[Sequence[Answer]], other: Sequence[Sequence[Answer]]) -> list[dict[str, Any]]:
    """What the other server took over what the first took, request by request: median and 10 to 90 %.

    Args:
        one, other: the answers of each round, to the same requests in the same order.
    """
    pairs = [
        (first, second)
        for mine, theirs in zip(one, other, strict=True)
        for first, second in zip(mine, theirs, strict=True)
        if first.ok and second.ok
    ]
    kinds: dict[str, Callable[[Answer], float | None]] = {
        "ttft": lambda answer: answer.ttft,
        "tpot": lambda answer: answer.tpot,
        "e2e": lambda answer: answer.e2e,
    }
    rows = [_spread(name, [(take(a), take(b)) for a, b in pairs]) for name, take in kinds.items()]
    speeds = [[summary(answers, Slo())["tokens_per_second"] for answers in rounds] for rounds in (one, other)]
    return [row for row in (*rows, _spread("tokens_per_second", list(zip(*speeds, strict=True)))) if row["pairs"]]


def _spread(name: str, pairs: Sequence[tuple[float | None, float | None]]) -> dict[str, Any]:
    values = [second / first for first, second in pairs if first and second is not None]
    if not values:
        return {"figure": name, "pairs": 0}
    shares = {"p10": 0.1, "ratio": 0.5, "p90": 0.9}
    return {"figure": name, "pairs": len(values), **{n: percentile(values, share) for n, share in shares.items()}}


def _statistics(name: str, values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    ranks = {f"{name}_{rank}": percentile(values, share) for rank, share in SHARES.items()}
    return {f"{name}_mean": statistics.fmean(values), **ranks}
