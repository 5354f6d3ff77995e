"""`turnout bench train`: a training step, beside a dense twin of as many FLOPs, a loop over the experts, and libraries.

Each contestant is a process of its own, so that its memory is its own, and makes one step whenever it is told to. Ours
stays; the others come one after another and take turns with it, so that each is held against ours in pairs.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from ... import PeerError
from ...moe.config import ModelConfig
from ...moe.flops import flops_per_token
from ...moe.train.config import RunConfig
from ..compose import compose
from ..rundir import freeze, frozen

WORDS = (  # the small mixture that is measured where no run is named
    "model.width=512", "model.layers=8", "model.heads=8", "model.kv_heads=8", "model.head_dim=64",
    "model.ffn_width=1024", "model.max_seq_len=256", "model.tie_embeddings=false", "data.vocab_size=8192",
    "moe=mixtral", "moe.num_experts=8", "optim=adamw", "optim.lr=0.0001", "train.seq_len=256", "train.global_batch=8",
)  # fmt: skip
WARM = 2  # steps that do not count
HOSTS = ("loop", "dense")
PEERS: Mapping[str, str] = {  # kind of host.py → the package that it needs
    "transformers": "transformers",
    "torchtitan": "torchtitan",
    "st-moe-pytorch": "st_moe_pytorch",
    "mixture-of-experts": "mixture_of_experts",
}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a host of other libraries' layers is built from."""

    width: int
    layers: int
    heads: int
    experts: int
    top_k: int
    hidden: int
    vocabulary: int
    rows: int
    length: int


def config_of(path: str) -> RunConfig:
    """The run's configuration, or that of the small mixture; it neither evaluates nor saves nor ends."""
    config = frozen(Path(path)) if path else compose(WORDS, world=1).config
    quiet = replace(
        config.train, steps=1_000_000, seconds=None, eval_every=None, save_every=None, init=None, resume=False
    )
    return replace(config, train=quiet, log=replace(config.log, every=1_000_000))


def twin(model: ModelConfig) -> ModelConfig:
    """The dense model whose tokens meet as many weights: the hidden units of `top_k` experts and the shared ones."""
    moe = model.moe
    assert moe is not None
    hidden = moe.top_k * moe.expert_width + (moe.shared_width or moe.shared_experts * moe.expert_width)
    return replace(model, moe=None, ffn_width=hidden)


def sizes(config: RunConfig) -> Sizes:
    """Of a run whose model is a decoder with experts in every block."""
    model, train = config.model, config.train
    assert model.moe is not None
    return Sizes(
        width=model.width, layers=model.layers, heads=model.heads, experts=model.moe.num_experts,
        top_k=model.moe.top_k, hidden=model.moe.expert_width, vocabulary=model.vocab_size, rows=train.global_batch,
        length=train.seq_len,
    )  # fmt: skip


class Contestant:
    """A process that makes a training step a line."""

    def __init__(self, name: str, process: subprocess.Popen[str], log: Path) -> None:
        self.name, self._process, self._log = name, process, log

    def step(self) -> float:
        """Seconds of one step."""
        return float(self._ask("step")["seconds"])

    def peak_mb(self) -> float:
        """The most memory that it has held, MB."""
        return float(self._ask("peak")["bytes"]) / 1e6

    def _ask(self, word: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(f"{word}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._lost() from None
        for line in self._process.stdout:  # libraries may print
            if line.startswith('{"'):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise self._lost()

    def _lost(self) -> PeerError:
        tail = "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-10:])
        return PeerError(f"{self.name} ended with code {self._process.wait()}: see {self._log}\n{tail}")


def measure(config: RunConfig, rounds: int, peers: Path | None, nproc: int | None = None) -> list[dict[str, Any]]:
    """A row a contestant: tokens/s, seconds, FLOPs of a step, peak memory, and ours / theirs in pairs.

    Args:
        config: as `config_of` has it.
        rounds: steps that count.
        peers: the folder of other engines, whose `venvs/train` has training libraries; None = ours only.
        nproc: beside one process, so many that share the experts, with as many threads in all.
    """
    tokens = config.train.global_batch * config.train.seq_len
    dense = twin(config.model) if config.model.moe else None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with _started("turnout", _worker(config, folder / "turnout"), folder) as own:
            paired: dict[str, tuple[list[float], list[float], float]] = {}
            notes: list[dict[str, Any]] = []
            for other, words in _others(config, dense, folder, peers, nproc).items():
                if isinstance(words, str):
                    notes.append({"contestant": other, "note": words})
                    continue
                try:
                    with _started(other, words, folder) as theirs:
                        pairs = _pairs(own, theirs, rounds)
                        paired[other] = (*pairs, theirs.peak_mb())
                except PeerError as error:
                    notes.append({"contestant": other, "note": str(error).splitlines()[-1][:100]})
            mine = [seconds for ours, _, _ in paired.values() for seconds in ours] or _alone(own, rounds)
            found = {"turnout": (mine, mine, own.peak_mb()), **paired}
    rows = []
    for contestant, (own_times, their_times, peak) in found.items():
        model = dense if dense is not None and "dense" in contestant else config.model
        seconds = statistics.median(their_times)
        ratios = [their / own_time for own_time, their in zip(own_times, their_times, strict=True)]
        row = {"contestant": contestant, "tokens_per_second": tokens / seconds, "step_s": seconds}
        flops = flops_per_token(model, *config.row) * tokens
        rows.append({**row, "flops": flops, "peak_mb": peak, "ours / theirs": statistics.median(ratios)})
    return rows + notes


def _others(
    config: RunConfig, dense: ModelConfig | None, folder: Path, peers: Path | None, nproc: int | None = None
) -> dict[str, list[str] | str]:
    """Contestant → the command that starts it, or why there is none."""
    if dense is None:
        return {}
    found: dict[str, list[str] | str] = {}
    if nproc is not None:
        spread = replace(config, parallel=replace(config.parallel, ep=nproc))
        found[f"turnout, experts on {nproc} ranks"] = [*_worker(spread, folder / "ranks"), str(nproc)]
    found["turnout, dense twin"] = _worker(replace(config, model=dense), folder / "dense twin")
    host = ["-P", str(Path(__file__).with_name("host.py")), json.dumps(vars(sizes(config)))]
    found |= {f"plain PyTorch, {kind}": [sys.executable, *host, kind] for kind in HOSTS}
    if peers is not None:
        python = peers / "venvs" / "train" / "bin" / "python"
        for kind, package in PEERS.items():
            there = python.exists() and list(peers.glob(f"venvs/train/lib/python*/site-packages/{package}"))
            found[kind] = [str(python), *host, kind] if there else "not installed"
    return found


def _pairs(own: Contestant, theirs: Contestant, rounds: int) -> tuple[list[float], list[float]]:
    for _ in range(WARM):
        own.step()
        theirs.step()
    turns = [(own.step(), theirs.step()) for _ in range(rounds)]
    return [a for a, _ in turns], [b for _, b in turns]


def _alone(own: Contestant, rounds: int) -> list[float]:
    return [own.step() for _ in range(WARM + rounds)][WARM:]


def _worker(config: RunConfig, run: Path) -> list[str]:
    """Our trainer on a configuration that is frozen into a folder of its own."""
    run.mkdir(parents=True, exist_ok=True)
    freeze(run, config, [])
    return [sys.executable, "-m", f"{__package__}.step", str(run)]


@contextmanager
def _started(name: str, words: Sequence[str], folder: Path) -> Iterator[Contestant]:
    log = folder / f"{name}.log"
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(  # noqa: S603 (our own program, or a library that the user has installed)
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        try:
            yield Contestant(name, process, log)
        finally:
            process.kill()
            _close(process.stdin, process.stdout)
            process.wait()


def _close(*streams: IO[str] | None) -> None:
    for stream in streams:
        if stream is not None:
            stream.close()
