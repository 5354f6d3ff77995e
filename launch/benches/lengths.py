"""What a person can say about the requests of `turnout bench serve`."""

from dataclasses import dataclass

from ...configs.typed import check


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """How many requests, how long.

    Args:
        requests: how many; None = 64, or all of a trace.
        seed: of lengths, places and arrivals.
        prompt_tokens, output_tokens: one number = all alike; two = uniform between them; none = lognormal.
        prefix_tokens: so many more at the beginning of each prompt, which it shares with others.
        prefixes: different ones, each prompt has one of them.
        text: the file that prompts are cut from; None = the shipped text.
        trace: a file with a line a request.
        workload: a file with `requests` and `arrivals_unit`.

    Raises:
        ConfigError: a number out of range, or settings that exclude each other.
    """

    requests: int | None = None
    seed: int = 7
    prompt_tokens: tuple[int, ...] = ()
    output_tokens: tuple[int, ...] = ()
    prefix_tokens: int = 0
    prefixes: int = 1
    text: str | None = None
    trace: str | None = None
    workload: str | None = None

    def __post_init__(self) -> None:
        check(self.requests is None or self.requests >= 1, "requests", self.requests, "must be at least 1", "use 64")
        check(self.seed >= 0, "seed", self.seed, "must not be negative", "use 7")
        for name in ("prompt_tokens", "output_tokens"):
            given = getattr(self, name)
            fits = len(given) <= 2 and list(given) == sorted(given) and all(one >= 1 for one in given)
            check(fits, name, given, "must be one number, or the least and the most", f"use {name}=64 or {name}=16,512")
        check(self.prefix_tokens >= 0, "prefix_tokens", self.prefix_tokens, "must not be negative", "use 256")
        check(self.prefixes >= 1, "prefixes", self.prefixes, "must be at least 1", "use 8")
        given = bool(self.prefix_tokens)
        check(given or self.prefixes == 1, "prefixes", self.prefixes, "need a length", "set prefix_tokens too")
        for name in ("trace", "workload"):
            for other in ("prompt_tokens", "prefix_tokens", *(("trace", "requests", "text") * (name == "workload"))):
                alone = getattr(self, name) is None or not getattr(self, other)
                check(alone, other, getattr(self, other), f"is the {name}'s own", f"leave {name} or {other} out")
