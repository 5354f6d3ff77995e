"""`turnout bench serve`: servers, ours or any other, under load, in turns.

Every server gets the same requests in each round, in an order that alternates; those that we have started and whose
turn it is not sleep. No prompt is sent twice, so that caches of prefixes gain only what the workload shares.
"""

import contextlib
import itertools
import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ... import PeerError
from . import figures
from .arrivals import Load
from .clients import drive
from .figures import Slo
from .online import Answer, Ask, Target, known, models, run
from .servers import Command, Running, ending, free_port, llama, ours, started, vllm

ALONE = 512  # tokens of the prompt of a request that has the server for itself
REPEATS = 3  # of such requests
AFTER = 33  # tokens that one of them generates


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A server that takes part. `running`: it is a child process of ours, and sleeps between its turns."""

    name: str
    target: Target
    running: Running | None = None

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Awake for the length of the block."""
        if self.running is not None:
            self.running.wake()
        try:
            yield
        finally:
            if self.running is not None:
                self.running.sleep()


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What a server answered to one load in one round; `alone`: to requests that had it for themselves."""

    server: str
    load: Load
    round: int
    answers: list[Answer]
    client_share: float
    alone: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How the loads are applied.

    Args:
        loads: one after another.
        rounds: how often each server has its turn.
        warmup: requests before each turn that are not counted.
        clients: processes that send.
    """

    loads: Sequence[Load]
    rounds: int = 1
    warmup: int = 1
    clients: int = 1


def listening(urls: Sequence[str], like: Target) -> list[Contender]:
    """Servers that somebody else has started; a model without a name is the first that the server lists."""
    targets = [replace(like, url=url, model=like.model or models(url, like.key)[0]) for url in urls]
    return [Contender(name=target.url, target=target) for target in targets]


@contextlib.contextmanager
def begun(
    path: str, settings: Sequence[str], peers: Path | None, seats: int, like: Target, *, own: bool = True
) -> Iterator[tuple[list[Contender], list[str]]]:
    """Our server on a model and the peers that are installed, asleep; and the names of those that are not.

    Args:
        path: the model.
        settings: of our server, as its command line has them.
        peers: the folder of other engines; None = only ours.
        seats: requests that a peer must be able to run at once.
        like: how they are asked.
        own: whether ours takes part.
    """
    commands: dict[str, Command | None] = {}
    ports = {name: free_port() for name in ("turnout", "vllm", "llama.cpp")}
    if own:
        commands["turnout"] = ours(path, ports["turnout"], settings)
    if peers is not None:
        commands["vllm"] = vllm(peers, path, ports["vllm"], seats)
        commands["llama.cpp"] = llama(peers, path, ports["llama.cpp"])
    with contextlib.ExitStack() as stack:
        stack.enter_context(ending())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        found = []
        for name, command in commands.items():
            if command is not None:
                server = stack.enter_context(started(command, ports[name], folder / f"{name}.log"))
                target = replace(like, url=server.url, model=models(server.url)[0], key=None)
                server.sleep()
                found.append(Contender(name=name, target=target, running=server))
        yield found, [name for name, command in commands.items() if command is None]


def turns(contenders: Sequence[Contender], plan: Plan) -> list[Turn]:
    """All rounds of all servers.

    Raises:
        PeerError: not one request was answered.
    """
    found: list[Turn] = []
    fitting: dict[str, Target] = {}
    for number in range(plan.rounds):
        for one in contenders if number % 2 == 0 else contenders[::-1]:
            with one.turn():
                if one.name not in fitting:
                    fitting[one.name] = known(one.target, replace(fresh(plan.loads[0].asks[0], -1), tokens=1))
                found += _turn(replace(one, target=fitting[one.name]), plan, number)
    if not any(answer.ok for turn in found for answer in turn.answers):
        first = found[0].answers[0]
        raise PeerError(f"{found[0].server} {first.failure}: no request of {len(found[0].answers)} was answered")
    return found


def rows(
    contenders: Sequence[Contender], done: Sequence[Turn], loads: Sequence[Load], slo: Slo
) -> list[dict[str, Any]]:
    """A row for each server and load: medians over the rounds."""
    found = []
    for one, load in itertools.product(contenders, loads):
        mine = [turn for turn in done if turn.server == one.name and turn.load is load]
        row = figures.median(
            [{**figures.summary(t.answers, slo), **t.alone, "client_share": t.client_share} for t in mine]
        )
        own = (
            {} if one.running is None else {"ready_seconds": one.running.ready_seconds, "peak_mb": one.running.peak_mb}
        )
        found.append({"server": one.name, **load.label, **row, **own})
    return found


def pairs(contenders: Sequence[Contender], done: Sequence[Turn], loads: Sequence[Load]) -> list[dict[str, Any]]:
    """What each other server took over what the first took."""
    found = []
    for other, load in itertools.product(contenders[1:], loads):
        both = [
            [turn.answers for turn in sorted(done, key=lambda t: t.round) if turn.server == name and turn.load is load]
            for name in (contenders[0].name, other.name)
        ]
        about = {"pair": f"{other.name} / {contenders[0].name}", **load.label}
        found += [{**about, **row} for row in figures.ratios(*both)]
    return found


def write_requests(path: str, done: Sequence[Turn]) -> None:
    """A line for each request."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("w", encoding="utf-8") as file:
        for turn in done:
            for number, answer in enumerate(turn.answers):
                about = {"server": turn.server, **turn.load.label, "round": turn.round, "request": number}
                first = answer.times[0] if answer.times else None
                file.write(json.dumps({**about, "first": first, **asdict(answer)}) + "\n")


def fresh(ask: Ask, use: int) -> Ask:
    """The request with another beginning each time; what prompts share they share again."""
    if isinstance(ask.prompt, str):
        return replace(ask, prompt=f"{use} {ask.prompt}")
    of = min(ask.shared, len(ask.prompt)) or len(ask.prompt)
    return replace(ask, prompt=(ask.prompt[(1 + use) % of], *ask.prompt[1:]))


def _turn(one: Contender, plan: Plan, number: int) -> list[Turn]:
    """Warm-up, some requests alone, then each load."""
    uses = itertools.count(number * (1 + REPEATS + len(plan.loads)))
    first = plan.loads[0].asks
    if plan.warmup:
        use = next(uses)
        run(one.target, [fresh(replace(first[i % len(first)], due=0.0), use + i) for i in range(plan.warmup)])
    alone = _alone(one.target, first, [next(uses) for _ in range(REPEATS)])
    found = []
    for load in plan.loads:
        shift = next(uses)
        answers, share = drive(one.target, [fresh(ask, shift) for ask in load.asks], load.seats, plan.clients)
        found.append(Turn(server=one.name, load=load, round=number, answers=answers, client_share=share, alone=alone))
    return found


def _alone(target: Target, asks: Sequence[Ask], uses: Sequence[int]) -> dict[str, float]:
    """Medians of requests that have the server for themselves, as long as the workload's texts make one."""
    kind = type(asks[0].prompt)
    long: Any = itertools.chain.from_iterable(ask.prompt for ask in asks if isinstance(ask.prompt, kind))
    if kind is str:
        prompt: Any = "".join(itertools.islice(long, 4 * ALONE))
    else:
        prompt = tuple(itertools.islice(long, ALONE))
    answers = [run(target, [fresh(Ask(prompt=prompt, tokens=AFTER), use)])[0] for use in uses]
    told = figures.times(answer for answer in answers if answer.ok)
    return {f"{name}_alone": statistics.median(told[name]) for name in ("ttft", "tpot") if told[name]}
