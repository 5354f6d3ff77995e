"""What a run tells: rows of `metrics.jsonl` (the truth), a line on the terminal, and what else is asked for (`sinks`).

Only rank 0 writes; every rank takes part in the one sum behind a row.

T tokens, A losses of the routers, P cross entropy and what a teacher adds.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from ...configs.hardware import ACCELERATORS
from ...parallel.dispatch.traffic import Traffic
from ..config import MoEConfig
from ..routing.record import Routing
from ..routing.stats import RoutingStats
from .alarm import Event
from .config import LogConfig
from .distill_config import WRITTEN
from .sinks import Sinks

Reduce = Callable[[Tensor], Tensor]


class Window:
    """Sums since the last row on this rank: cross entropy, what the routers did, each of their losses, and traffic.

    Args:
        layers: ids of the MoE layers.
        moe: their configuration; None for a dense model.
        traffic: where the exchange of rows is counted, if this rank has any.
        taught: names of what a teacher adds to the cross entropy.
    """

    def __init__(
        self,
        layers: tuple[int, ...],
        moe: MoEConfig | None,
        device: torch.device,
        traffic: Traffic | None = None,
        taught: Sequence[str] = (),
    ) -> None:
        self.traffic = traffic or Traffic()
        self.exchanges = traffic is not None
        self.coefficients = moe.losses if moe else {}
        self.routing = RoutingStats(layers, moe.num_experts if moe else 0, device)
        self.taught = tuple(taught)
        self.losses = torch.zeros(1 + len(taught) + len(self.coefficients), dtype=torch.float64, device=device)
        self.clear()

    def clear(self) -> None:
        """Begin a new window."""
        self.losses.zero_()
        self.routing.clear()
        self.traffic.clear()
        self.tokens = self.text_tokens = self.taught_tokens = self.written_tokens = self.steps = 0
        self.since = time.perf_counter()

    def add_loss(self, losses_P: Tensor) -> None:
        """Add this rank's summed cross entropy in nats, and behind it what a teacher adds, in the order of `taught`."""
        self.losses[: losses_P.numel()] += losses_P

    @torch.no_grad()
    def add(self, routings: Mapping[int, Routing], valid_T: Tensor | None = None) -> None:
        """Add the routings of one micro-batch; without `valid_T` all its tokens are valid."""
        self.routing.add(routings, valid_T)
        for routing in routings.values():
            if self.coefficients:
                aux_A = torch.stack([routing.aux[name].double() for name in self.coefficients])
                self.losses[-len(aux_A) :] += aux_A

    def end_step(self, tokens: int, taught: bool = False, written: int = 0) -> None:
        """An optimizer step over `tokens` targets of the whole global batch, `written` by the student, is complete."""
        self.tokens += tokens
        self.text_tokens += tokens - written
        self.taught_tokens += tokens - written if taught else 0
        self.written_tokens += written
        self.steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count against tokens per second, nor what is exchanged (evaluation, saving)."""
        start = time.perf_counter()
        with self.traffic.ignored():
            yield
        self.since += time.perf_counter() - start

    def report(self, reduce: Reduce, flops_per_token: float, peak: float | None) -> dict[str, Any]:
        """The window over all ranks, as the fields of a row; every rank calls it."""
        counted, seconds = self.routing.tensor, time.perf_counter() - self.since
        exchanged = torch.tensor([self.exchanges, self.traffic.bytes, *self.traffic.seconds()]).to(self.losses)
        total = reduce(torch.cat([self.losses, exchanged, counted.flatten()])).cpu()
        first, last = len(self.losses), len(self.losses) + len(exchanged)
        nats, *sums = total[:first].tolist()
        lessons, sums_A = sums[: len(self.taught)], sums[len(self.taught) :]
        aux = {name: value / max(self.steps, 1) for name, value in zip(self.coefficients, sums_A, strict=True)}
        speed = self.tokens / seconds
        return {
            "loss": nats / max(self.text_tokens, 1),
            **{name: self._taught(name, value) for name, value in zip(self.taught, lessons, strict=True)},
            "aux_loss": sum((self.coefficients[name] * value for name, value in aux.items()), 0.0),
            **{f"aux/{name}": value for name, value in aux.items()},
            "z_loss": aux.get("z", 0.0),
            "tokens_per_second": speed,
            "mfu": speed * flops_per_token / peak if peak else None,
            **self._exchanged(total[first:last].tolist(), seconds),
            **self.routing.fields(total[last:].view(counted.shape)),
        }

    def _taught(self, name: str, value: float) -> float | None:
        """The mean of a sum that a teacher adds, over the tokens that it is about; None without any."""
        tokens = self.written_tokens if name == WRITTEN else self.taught_tokens
        return value / tokens if tokens else None

    def _exchanged(self, sums: Sequence[float], seconds: float) -> dict[str, float]:
        """A rank's mean traffic of one optimizer step; nothing when no rank has any."""
        ranks, *totals = sums
        if not ranks:
            return {}
        sent, waited, under_way = (total / ranks / max(self.steps, 1) for total in totals)
        return {
            "all_to_all_bytes": sent,
            "all_to_all_seconds": waited,
            "all_to_all_under_way": under_way,
            "all_to_all_share": waited * self.steps / seconds,
        }


class Metrics:
    """The sinks of rank 0; on other ranks an object that writes nowhere.

    Args:
        run: the run's directory.
        log: what is wanted.
        writes: whether this rank writes.
        step: the step the run resumes from: rows beyond it belong to a lost future and are cut off.
        wandb_id: the earlier part's wandb run, to be continued.
        stream: where progress lines go.
    """

    def __init__(
        self,
        run: Path,
        log: LogConfig,
        settings: Mapping[str, Any],
        *,
        writes: bool = True,
        step: int = 0,
        wandb_id: str | None = None,
        stream: TextIO | None = None,
    ) -> None:
        self.stream = stream or sys.stdout
        self.file: TextIO | None = None
        self.sinks: Sinks | None = None
        if writes:
            self.file = _reopen(run / "metrics.jsonl", step)
            self.sinks = Sinks(run, log, settings, step, wandb_id)

    @property
    def wandb_id(self) -> str | None:
        """wandb's id of this run, kept in checkpoints."""
        return self.sinks.wandb_id if self.sinks is not None else None

    def write(self, row: Mapping[str, Any], remaining: float | None = None) -> None:
        """Append a row; a training row also prints its line, with `remaining` seconds to go."""
        self._tell(row, progress_line(row, remaining) if row["kind"] == "train" else _eval_line(row))
        if self.sinks is not None:
            self.sinks.log(row)

    def alarm(self, event: Event) -> None:
        """Say that a layer has collapsed, wherever a person may look."""
        row = {"kind": "alarm", "step": event.step, "layer": event.layer, "evenness": event.evenness}
        self._tell({**row, "expert_load": event.expert_load}, f"step {event.step:>6}  ALARM: {event.text}")
        if self.sinks is not None:
            self.sinks.alarm(event)

    def event(self, row: Mapping[str, Any], text: str) -> None:
        """A row about something that happened, and a line that says it in words."""
        self._tell(row, f"step {row['step']:>6}  {text}")

    def cut(self, step: int) -> None:
        """Drop the rows beyond `step`: the run goes back there."""
        if self.file is not None:
            self.file.close()
            self.file = _reopen(Path(self.file.name), step)

    def close(self) -> None:
        """Flush and let go of everything."""
        if self.file is not None:
            self.file.close()
        if self.sinks is not None:
            self.sinks.close()

    def _tell(self, row: Mapping[str, Any], line: str) -> None:
        if self.file is not None:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
            self.stream.write(line + "\n")
            self.stream.flush()


def peak_flops(device: torch.device, world: int) -> float | None:
    """Peak FLOP/s of all ranks' devices; None where it is not known (CPUs)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((chip.bfloat16 * world for model, chip in ACCELERATORS.items() if model in name), None)


def progress_line(row: Mapping[str, Any], remaining: float | None) -> str:
    """`step 120  loss 3.214  5,200 tok/s  drop 2.1%  load max/mean 1.31  dead 3  eta 1:02`; dead only when any is."""
    parts = [f"step {row['step']:>6}", f"loss {row['loss']:.4f}", f"{row['tokens_per_second']:,.0f} tok/s"]
    if row["moe_layers"]:
        parts += [f"drop {row['drop_fraction']:.1%}", f"load max/mean {max(row['load_max_mean']):.2f}"]
        parts += [f"dead {dead}"] if (dead := sum(row["dead_experts"])) else []
    if remaining is not None:
        minutes, seconds = divmod(round(remaining), 60)
        parts.append(f"eta {minutes}:{seconds:02d}")
    return "  ".join(parts)


def _eval_line(row: Mapping[str, Any]) -> str:
    text = f"step {row['step']:>6}  {row.get('split', 'held out')}: loss {row['val_loss']:.4f}"
    return f"{text}  {row['bits_per_byte']:.4f} bits per byte" if "bits_per_byte" in row else text


def _reopen(path: Path, step: int) -> TextIO:
    """The rows, cut to `step`, to be appended to."""
    _truncate(path, step)
    return path.open("a", encoding="utf-8")


def _truncate(path: Path, step: int) -> None:
    """Keep the rows up to `step` (a rewind is part of the steps after it); a torn last line goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if row.get("to_step", row["step"]) <= step:
            kept.append(line + "\n")
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(kept), encoding="utf-8")
    aside.replace(path)
