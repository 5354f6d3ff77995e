"""The training loop: the recipe, read from top to bottom.

    vote (stop? time?) → rate → forward and backward over micro-batches → vote, clip, step → row → evaluate → save

One rank's part; all ranks call it together. Losses are sums over tokens divided by the GLOBAL batch's token count and
gradients are summed, so any layout computes the same step.

T tokens, P cross entropy and what a teacher adds.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import NonFiniteError
from ...configs.typed import to_dict
from ...kernels import using
from ...parallel import process
from ...parallel.checkpoint import open_checkpoint
from ...parallel.checkpoint.agree import on_first
from ...parallel.dispatch.all_to_all import traffic_of
from ...parallel.mesh import Mesh
from ..data.rows import Cursor
from ..data.stream import held_out_documents
from ..eval.denoising import denoise
from ..eval.perplexity import evaluate, limit_bytes
from ..flops import flops_per_token
from ..models.store import save_model
from ..routing.bias import update_biases
from . import nonfinite, spikes, state
from .alarm import CollapseAlarm
from .config import RunConfig
from .heap import Heap
from .metrics import Metrics, Window, peak_flops
from .on_policy import Author, Generate
from .optim import set_rate
from .part import Part, part_of
from .profile import Profile
from .saver import Saver
from .schedule import progress, rate
from .setup import CHECKPOINTS, prepare_run, resume
from .trace import FOLDER, Replay, Trace, forget

PATIENCE = 3  # rows in a row that a collapse takes


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended: `preempted` when it was asked to stop and saved before its end."""

    step: int
    preempted: bool


class Trainer:
    """One rank of a run.

    Args:
        config: the run, the same on every rank.
        run: its directory, seen by every rank.
        mesh: where this rank stands.
        stop: whether this rank has been asked to stop.
        generate: lets the model write, where `train.distill.on_policy` wants it to.

    Raises:
        PeerError: another rank is gone. DataError, CheckpointError, ConfigError: as they say.
    """

    def __init__(
        self, config: RunConfig, run: Path, mesh: Mesh, stop: Callable[[], bool], generate: Generate | None = None
    ) -> None:
        torch.manual_seed(config.seed)
        self.heap = Heap()
        self.config, self.run_dir, self.mesh, self.stop = config, run, mesh, stop
        self.setup = prepare_run(config, run, mesh)
        self.now, saved = resume(config, run, self.setup)
        if saved is not None:
            self.now = spikes.read_on(run, saved, self.now)
        if mesh.rank == 0:
            forget(run / FOLDER, self.now.step)
        self.trace = Trace(run / FOLDER, config.model, mesh.rank, mesh.world) if config.trace else None
        self.replay = Replay(config.replay, config.model) if config.replay else None
        moe = config.model.moe
        self.alarm = CollapseAlarm(config.log.alarm, PATIENCE, moe.top_k if moe else 1)
        self.profile = Profile(config.train.profile, run, mesh.rank)
        self.compiling = config.train.compile  # until the first step is done
        self.skipped = 0  # steps in a row that were not finite, behind `now.cursor`
        self.biased = moe is not None and moe.bias_rate > 0
        self.tally: dict[tuple[int, str], Tensor] = {}  # sums of this step's earlier micro-batches, for losses
        self.counts: dict[int, Tensor] = {}  # layer → this step's load of each expert, for biases
        self.parts: dict[int, Part] = {}  # this step's micro-batches whose forward pass is not done
        self.targets = 0  # valid targets of this step's global batch
        self.written = 0  # those of them that the student has written
        self.taught = False  # whether the teacher has a say in this step
        how = config.train.distill
        on_policy, names = how is not None and how.on_policy > 0, how.losses if how else ()
        self.author = Author(config, self.setup.rows, self.setup.model, generate) if on_policy else None
        # of this step: this rank's part of the global batch's means
        self.losses_P = torch.zeros(1 + len(names), dtype=torch.float64, device=mesh.device)
        self.window = Window(config.model.moe_layers, moe, mesh.device, traffic_of(self.setup.model), names)
        self.metrics = Metrics(
            run, config.log, to_dict(config), writes=mesh.rank == 0, step=self.now.step, wandb_id=self.now.wandb_id
        )
        self.now = replace(self.now, wandb_id=self.metrics.wandb_id)
        if self.setup.zeros is not None and saved is None:
            self._tell_zeros(*self.setup.zeros)
        self.saver = Saver(run / CHECKPOINTS, config.train, mesh, self.metrics, saved)

    def run(self) -> Outcome:
        """Train until the end, or until some rank has been asked to stop; save, evaluate, export.

        Raises:
            NonFiniteError: loss or gradients stopped being finite, and no parameter moved in that step; or the loss
                spiked once more than `train.rewinds`.
        """
        with using(None if self.config.kernels == "auto" else self.config.kernels):
            return self._run()

    def _run(self) -> Outcome:
        train, before, start = self.config.train, self.now.seconds, time.perf_counter()
        try:
            while True:
                stopped, seconds = self._vote(before + time.perf_counter() - start)
                self.now = replace(self.now, seconds=seconds)
                done = progress(train, self.now.step, seconds)
                if stopped or done >= 1:
                    break
                taken = self._step(done)
                with self.window.paused():
                    self.profile.end_step()
                if taken is None:
                    continue
                self.heap.keep()
                grad_norm, lr = taken
                if self.compiling:
                    self._tell_compiled()
                if self.now.step % self.config.log.every == 0:
                    self._report(grad_norm, lr, seconds - before)
                if train.eval_every and self.now.step % train.eval_every == 0:
                    self._evaluate(train.eval_bytes)
                    self.heap.release()
                if train.save_every and self.now.step % train.save_every == 0:
                    self._save()
                    self.heap.release()
            self.profile.close()
            self.saver.settle()
            if not self.saver.holds(self.now.step):
                self._save(last=True)
            if done >= 1:
                if self.window.steps:
                    self._report(grad_norm, lr, seconds - before)
                self._evaluate(None)
                self._export()
        except NonFiniteError:
            self.saver.settle()  # every rank is here, and what is on its way was finite
            raise
        finally:
            self.profile.close()
            self.metrics.close()
        return Outcome(step=self.now.step, preempted=done < 1)

    def _vote(self, seconds: float) -> tuple[bool, float]:
        """Whether any rank is to stop, and rank 0's clock: the same answer on every rank, at a step boundary."""
        mine = [float(self.stop()), seconds if self.mesh.rank == 0 else 0.0, float(self.saver.writing)]
        votes = process.all_sum(torch.tensor(mine, dtype=torch.float64), "vote at the step boundary")
        stops, clock, writing = votes.tolist()
        with self.window.paused():
            self.saver.poll(writing > 0)
        return stops > 0, clock

    def _step(self, done: float) -> tuple[float, float] | None:
        """One optimizer step at progress `done`; its gradient norm and learning rate, None when it does not count."""
        config, engine = self.config, self.setup.engine
        factor = rate(config.optim, done, self.now.step)
        set_rate(engine.optimizers, factor)
        self.setup.model.train()
        self.tally, self.counts, self.parts = {}, {}, {}
        self.taught = config.train.distill is not None and done < config.train.distill.stop
        self.losses_P = torch.zeros_like(self.losses_P)
        engine.accumulate(config.micro_batches(self.mesh.dp_size), self._inputs, self._loss, self._record)
        self.window.add_loss(self.losses_P * self.targets)
        result = engine.step()
        if result.rescaled:
            self._drop()
            return None
        if not result.finite:
            self._skip(result.grad_norm)
            return None
        loss = self.losses_P[0] * self.targets / (self.targets - self.written)
        if config.train.spike is not None and self._rewound(loss, config.train.spike):
            return None
        if self.trace is not None:
            self.trace.write(self.now.step)
        self._move_biases()
        self.window.end_step(self.targets, self.taught, self.written)
        self.now = replace(
            self.now,
            step=self.now.step + 1,
            tokens=self.now.tokens + self.targets,
            cursor=self._cursor(self.skipped + 1),
        )
        self.skipped = 0
        return result.grad_norm, config.optim.lr * factor

    def _cursor(self, batches: int) -> Cursor:
        """So many global batches behind the last step that was taken."""
        return self.setup.rows.advance(self.now.cursor, batches * self.config.train.global_batch)

    def _inputs(self, micro: int) -> tuple[Any, ...]:
        """The model's arguments for one micro-batch."""
        train, mesh, step, cursor = self.config.train, self.mesh, self.now.step, self._cursor(self.skipped)
        batch = self.setup.rows.batch(cursor, train.global_batch, mesh.dp_rank, mesh.dp_size, micro, train.micro_batch)
        if self.author is not None and self.taught:
            batch = self.author.rewrite(batch, cursor, step)
        replay = None if self.replay is None else partial(self.replay.decisions, step)
        part = part_of(
            batch, mesh, replay,
            step=step, seed=self.config.seed, tally=self.tally, loss_scale=self.setup.engine.loss_scale,
        )  # fmt: skip
        targets_T = part.targets_T  # not the part, whose context would then be held by itself
        part.ctx.loss = lambda x_TD, outlet: outlet.losses(x_TD, targets_T)
        if self.setup.teacher is not None and self.taught:
            self.setup.teacher.teach(part, batch)
        self.parts[micro], self.targets, self.written = part, batch.total_tokens, batch.written_tokens
        return part.inputs

    def _loss(self, micro: int, losses: Tensor) -> Tensor:
        """This rank's part of the global batch's mean loss, of losses_T or losses_TP, times the loss scale."""
        losses, teacher = losses.sum(0) / self.parts[micro].total_tokens, self.setup.teacher
        self.losses_P[: losses.numel()] += losses.detach()
        loss = teacher.mix(losses) if teacher is not None and self.taught else losses
        return loss * self.setup.engine.loss_scale

    def _record(self, micro: int) -> None:
        """Keep what a step needs of a micro-batch's routings, and let go of the rest."""
        part = self.parts.pop(micro)
        ctx = part.ctx
        self.window.add(ctx.routings, part.valid_T)
        if part.source is not None:
            self.window.add(part.source[2].routings)
        if self.trace is not None:
            self.trace.add(ctx.route, ctx.routings)
        if self.biased:
            for layer, routing in part.routings.items():
                self.counts[layer] = self.counts.get(layer, 0) + routing.counts_E

    def _move_biases(self) -> None:
        """Loss-free balancing, after a step that was taken: by the experts' loads in the whole global batch."""
        if self.counts:
            total_LE = self.mesh.sum(torch.stack(list(self.counts.values())), "stage")
            update_biases(self.setup.model, dict(zip(self.counts, total_LE, strict=True)))

    @cached_property
    def _held_out(self) -> list[str]:
        return held_out_documents(self.config.data, self.config.train.eval_split)

    @cached_property
    def _flops(self) -> float:
        """Of a target token."""
        return flops_per_token(self.config.model, *self.config.row)

    def _report(self, grad_norm: float, lr: float, seconds: float) -> None:
        """One row of the window that ends here. Collective."""
        config = self.config
        peak = peak_flops(self.mesh.device, self.mesh.world)
        window = self.window.report(process.all_sum, self._flops, peak)
        self.window.clear()
        where = {"kind": "train", "step": self.now.step, "tokens": self.now.tokens, "seconds": round(seconds, 3)}
        done = progress(config.train, self.now.step, self.now.seconds)
        remaining = self.now.seconds * max(1 / done - 1, 0)
        scale = self.setup.engine.scale
        row = {**where, **window, "grad_norm": grad_norm, "lr": lr, **({"loss_scale": scale.factor} if scale else {})}
        self.metrics.write(row, remaining)
        for event in self.alarm.check(row):
            self.metrics.alarm(event)

    def _tell_compiled(self) -> None:
        """A row about the time that compiling took, once."""
        from .compiled import compile_seconds

        self.compiling, seconds = False, round(compile_seconds(), 3)
        row = {"kind": "compile", "step": self.now.step, "compile_seconds": seconds}
        self.metrics.event(row, f"compiled the blocks in {seconds:.1f} s")

    def _tell_zeros(self, zeros: int, numbers: int) -> None:
        """A row about the weights that stay zero, once."""
        row = {"kind": "zeros", "step": self.now.step, "zeros": zeros, "numbers": numbers}
        self.metrics.event(row, f"keeps {zeros:,} zeros, {zeros / numbers:.1%} of the blocks' matrices")

    def _evaluate(self, limit: int | None) -> None:
        """A row about held-out text, of which `limit` bytes (None: all) are read. Collective."""
        texts = limit_bytes(self._held_out, limit)
        with self.window.paused(), self.setup.engine.autocast():
            spans = self.config.data.spans
            measure = evaluate if spans is None else partial(denoise, spans=spans)
            result = measure(
                self.setup.model, self.setup.tokenizer, texts, seq_len=self.config.train.seq_len, mesh=self.mesh,
                forward=self.setup.engine.infer,
            )  # fmt: skip
        split = self.config.train.eval_split
        row = {"kind": "eval", "step": self.now.step, **({} if split == "validation" else {"split": split})}
        bits = {} if result.bits_per_byte is None else {"bits_per_byte": result.bits_per_byte}
        self.metrics.write({**row, "val_loss": result.val_loss, **bits})

    def _save(self, last: bool = False) -> None:
        """Begin a checkpoint. Collective."""
        setup = self.setup
        if (scale := setup.engine.scale) is not None:
            self.now = replace(self.now, loss_scale=scale.factor, good_steps=scale.good)
        with self.window.paused(), setup.engine.whole():
            setup.engine.gather_state()
            named = state.tensors(setup.model, setup.engine.optimizers, setup.shards)
            meta = state.to_meta(self.now, setup.identity, setup.tokenizer.digest)
            self.saver.begin(self.now.step, named, meta, last=last)

    def _export(self) -> None:
        """Have rank 0 write the servable `model/`, whole, from the slices of the last checkpoint. Collective."""
        saved = self.saver.saved

        def write() -> None:
            if saved is None:
                return
            tokenizer = self.run_dir / "tokenizer"
            self.setup.tokenizer.save(tokenizer)
            checkpoint = open_checkpoint(saved, verify="size")
            cfg = self.setup.model.cfg
            save_model(self.run_dir / "model", cfg, state.whole_model(checkpoint, cfg), tokenizer)

        on_first(write)

    def _skip(self, grad_norm: float) -> None:
        """Leave a note of the batch that broke the step and pass over it, or stop on every rank. Collective."""
        allowed, cursor = self.config.train.skip_nonfinite, self._cursor(self.skipped)
        step, (loss, *lessons) = self.now.step, self.losses_P.tolist()
        with self.setup.engine.whole():
            text = nonfinite.leave_note(self.run_dir, self.setup.model, step, cursor, loss, grad_norm)
        if math.isfinite(loss) and not all(map(math.isfinite, lessons)):
            text += f"; the teacher's losses alone are not: can it compute in train.dtype ({self.config.train.dtype})?"
        if self.skipped == allowed:
            again = f" ({allowed} in a row were skipped before it, as train.skip_nonfinite says)" if allowed else ""
            raise NonFiniteError(f"{text}{again}: lower optim.lr or look at the batch named in {nonfinite.NOTE}")
        self.skipped += 1
        row = {"kind": "skip", "step": step + 1, **vars(cursor), "in_a_row": self.skipped}
        self.metrics.event(row, f"SKIPPED ({self.skipped} of {allowed} in a row): {text}")
        self._drop()

    def _rewound(self, mine: Tensor, factor: float) -> bool:
        """Whether this step is a spike and the run went back to its newest checkpoint because of it. Collective.

        Args:
            mine: this rank's part of the global batch's mean loss.
        """
        now, allowed = self.now, self.config.train.rewinds
        loss = float(process.all_sum(mine, "mean loss of the step"))
        spike = spikes.find(now, loss, factor)
        if spike is not None:
            self.saver.settle()
        saved = self.saver.saved
        if spike is None or saved is None:
            if spike is not None:
                text = f"SPIKE: {spike.text}; there is no checkpoint to go back to"
                self.metrics.event(spike.row("spike"), text)
            self.now = replace(now, losses=spikes.remember(now.losses, loss))
            return False
        if now.rewinds >= allowed:
            fix = "lower optim.lr, raise train.spike or train.rewinds, or look at the data"
            raise NonFiniteError(f"{spike.text}, and train.rewinds ({allowed}) are used up: {fix}")
        self.now = spikes.rewind(self.run_dir, self.setup, saved, now, self._cursor(self.skipped + 1))
        there = self.now.step
        self.metrics.cut(there)
        row = {**spike.row("rewind"), "to_step": there}
        self.metrics.event(row, f"REWIND {self.now.rewinds} of {allowed} to step {there}: {spike.text}")
        if self.mesh.rank == 0:
            forget(self.run_dir / FOLDER, there)
        self.skipped = 0
        self.alarm.below.clear()
        self._drop()
        return True

    def _drop(self) -> None:
        """What was measured since the last row or trace is of a step that does not count."""
        self.window.clear()
        if self.trace is not None:
            self.trace.discard()


def train(
    config: RunConfig, run: Path, mesh: Mesh, stop: Callable[[], bool], generate: Generate | None = None
) -> Outcome:
    """Set up one rank and run it; see `Trainer`."""
    return Trainer(config, run, mesh, stop, generate).run()
