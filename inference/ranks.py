"""This process among the ranks that serve one model together.

    ranks = Ranks.join(ParallelConfig(ep=2), config)       # on every rank
    engine = Engine.from_path(path, config, ranks=ranks)
    ranks.follow()                                         # on all but rank 0: until rank 0 ends
    ranks.end()                                            # on rank 0: lets the others go

Rank 0 alone has requests, text and sampler; it schedules for every replica. World = dp * tp, of which ep divides the
experts, as in training.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .. import ConfigError, PeerError, RequestError
from ..configs.typed import check, digest
from ..moe.families.reading import load_part
from ..moe.models.decoder import Decoder
from ..parallel import process
from ..parallel.config import ParallelConfig
from ..parallel.mesh import Mesh, build_mesh
from ..parallel.roll import Silent
from ..parallel.serving import Link
from .config import EngineConfig
from .core.sampling import SamplingParams
from .core.step import StepPlan
from .layout import check_layout
from .run.executor import StepResult
from .run.memory import MemoryPlan
from .run.ranks import LeadRunner, PartRunner, WatchedExecutor

LOST = 5  # exit code of a rank that has lost another


class Ranks:
    """What this rank knows of the others. Once it has a runner it misses a lost one: rank 0 learns it by `loss`, the
    others end.

    Args:
        mesh: all of them.
        config: the engine's, which must be the same everywhere.

    Raises:
        ConfigError: on every rank, when it is not.
    """

    def __init__(self, mesh: Mesh, config: EngineConfig) -> None:
        self.mesh = mesh
        self.loss: PeerError | None = None
        self._tell: Callable[[], None] | None = None
        check(not config.graph_buckets, "graph_buckets", config.graph_buckets, "is for one rank", "leave it empty")
        held = process.gather_json(digest(asdict(config)))
        for rank, other in enumerate(held):
            check(other == held[0], "the engine's settings", f"rank {rank}'s", "must be rank 0's", "start all alike")
        self._link = Link(mesh)

    @classmethod
    def join(cls, parallel: ParallelConfig, config: EngineConfig) -> "Ranks | None":
        """Join those that torchrun's environment describes; None in a world of one.

        Raises:
            ConfigError: the sizes do not fit their number. PeerError: they did not come.
        """
        world = int(os.environ.get("WORLD_SIZE", "1"))
        check_layout(parallel, world)
        if world == 1:
            return None
        process.start(parallel.timeout)
        return cls(build_mesh(parallel), config)

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.mesh.rank == 0

    def load(self, path: str | Path, dtype: str) -> Decoder:
        """This rank's part of the model."""
        return load_part(path, self.mesh, dtype)

    @property
    def neighbours(self) -> int:
        """Ranks that share the memory of this one's device."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self.mesh.device.type == "cpu" else 1

    def agree(self, plan: MemoryPlan) -> MemoryPlan:
        """The plan with as many blocks as the rank has that has the least memory; collective."""
        return replace(plan, kv=replace(plan.kv, num_blocks=self._link.least(plan.kv.num_blocks)))

    def admit(self, params: SamplingParams) -> None:
        """Check that all ranks together can give what is asked for.

        Raises:
            RequestError: naming the parameter.
        """
        if params.prompt_logprobs is not None and self.mesh.layout.tp > 1:
            rule = "needs all tokens of a prompt on one rank, and parallel.tp divides them: leave it out"
            raise RequestError(f"prompt_logprobs ({params.prompt_logprobs}) {rule}", "prompt_logprobs")

    def runner(self, model: Decoder, *settings: Any) -> PartRunner:
        """What computes this rank's part, once; the arguments are those of `ModelRunner`.

        Raises:
            ConfigError: the model has an encoder.
        """
        if model.encoder is not None:
            raise ConfigError(f"nproc ({self.mesh.world}) must be 1 for an encoder-decoder: serve it on one rank")
        self._runner = (LeadRunner if self.leads else PartRunner)(self._link, model, *settings)
        process.watch(self._miss)  # not while a model is read: that may silence a heart for longer than a rank may hang
        return self._runner

    def executor(self, compute: Callable[[StepPlan], StepResult], *, overlap: bool) -> WatchedExecutor:
        """What launches steps on all ranks."""
        return WatchedExecutor(compute, lambda: self.loss, overlap=overlap)

    def check(self) -> None:
        """Raise the PeerError of a rank that is lost."""
        if self.loss is not None:
            raise self.loss

    def follow(self) -> None:
        """Compute what rank 0 orders, until it ends."""
        self._runner.follow()
        self._leave()

    def end(self) -> None:
        """Let the others go (rank 0); the engine is of no use afterwards."""
        if self.loss is None and isinstance(self._runner, LeadRunner):
            self._runner.end()
            self._leave()

    def when_lost(self, tell: Callable[[], None]) -> None:
        """Have `tell` called, in another thread, once `loss` is there."""
        self._tell = tell
        if self.loss is not None:
            tell()

    def _leave(self) -> None:
        """End together: nobody misses anybody any more."""
        process.unwatch()
        process.barrier()
        process.stop()

    def _miss(self, lost: Sequence[Silent]) -> None:
        words = "; ".join(f"{each} {_fate(each)}" for each in lost) or "the ranks' meeting point is gone"
        error = PeerError(words, silent=tuple(each.pid for each in lost if each.pid is not None))
        if self.leads:
            self.loss = error
            if self._tell is not None:
                self._tell()
            return
        if not lost or any(each.rank == 0 for each in lost):  # else rank 0 says it
            sys.stderr.write(f"turnout: rank {self.mesh.rank}: {error}\n")
            sys.stderr.flush()
        os._exit(LOST)  # this rank may stand in an exchange that never ends


def _fate(lost: Silent) -> str:
    return f"has ended: {lost.words}" if lost.words else "is gone or hangs: see its log"
