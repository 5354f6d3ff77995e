"""What a run tells: rows of `metrics.jsonl` (the truth), a line on the terminal, and, if asked, Weights & Biases.

Only rank 0 writes; every rank takes part in the one sum behind a row. Nothing here can stop or slow down a run: a
failing wandb is a warning.

T tokens, K choices, E experts.
"""

import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from ..config import ModelConfig, MoEConfig
from ..routing.record import Routing
from .config import LogConfig

Reduce = Callable[[Tensor], Tensor]

# Peak dense bfloat16 FLOP/s by device name, for model FLOP utilisation (makers' data sheets).
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}


class Window:
    """Sums since the last row on this rank: per MoE layer the assignments of each expert, drops, entropy and losses.

    Args:
        layers: ids of the MoE layers.
        moe: their configuration; None for a dense model.
    """

    def __init__(self, layers: tuple[int, ...], moe: MoEConfig | None, device: torch.device) -> None:
        self.layers, self.moe, self.device = layers, moe, device
        self.experts = moe.num_experts if moe else 0
        self.clear()

    def clear(self) -> None:
        """Begin a new window."""
        self.loss = torch.zeros(1, dtype=torch.float64, device=self.device)
        self.routed = torch.zeros(len(self.layers), self.experts + 5, dtype=torch.float64, device=self.device)
        self.tokens = self.steps = 0
        self.since = time.perf_counter()

    @torch.no_grad()
    def add(self, loss: Tensor, routings: Mapping[int, Routing], valid_T: Tensor) -> None:
        """Add one micro-batch: `loss` is this rank's summed cross entropy in nats."""
        self.loss += loss
        for row, layer in zip(self.routed, self.layers, strict=True):
            routing = routings[layer]
            row[: self.experts] += routing.counts_E
            p_TE = routing.probs_TE
            entropy = -(torch.xlogy(p_TE, p_TE).sum(1) * valid_T).sum()
            numbers = (routing.kept_TK.sum(), entropy, valid_T.sum(), routing.aux["balance"], routing.aux["z"])
            row[self.experts :] += torch.stack([number.double() for number in numbers])

    def end_step(self, tokens: int) -> None:
        """An optimizer step over `tokens` target tokens of the whole global batch is complete."""
        self.tokens += tokens
        self.steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count against tokens per second (evaluation, saving)."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    def report(self, reduce: Reduce, flops_per_token: float, peak: float | None) -> dict[str, Any]:
        """The window over all ranks, as the fields of a row; every rank calls it."""
        total = reduce(torch.cat([self.loss, self.routed.flatten()])).cpu()
        routed = total[1:].view(self.routed.shape)
        counts_LE, numbers = routed[:, : self.experts], routed[:, self.experts :]
        assigned_L = counts_LE.sum(1).clamp(min=1)
        balance, z = (numbers[:, 3:].sum(0) / max(self.steps, 1)).tolist()
        speed = self.tokens / (time.perf_counter() - self.since)
        return {
            "loss": float(total[0]) / max(self.tokens, 1),
            "aux_loss": self.moe.balance_loss * balance + self.moe.z_loss * z if self.moe else 0.0,
            "aux/balance": balance,
            "z_loss": z,
            "tokens_per_second": speed,
            "mfu": speed * flops_per_token / peak if peak else None,
            "drop_fraction": float((1 - numbers[:, 0] / assigned_L).mean()) if self.layers else 0.0,
            "moe_layers": list(self.layers),
            "expert_load": (counts_LE / assigned_L[:, None]).tolist(),
            "router_entropy": (numbers[:, 1] / numbers[:, 2].clamp(min=1)).tolist(),
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
        self.wandb: Any = None
        if writes:
            path = run / "metrics.jsonl"
            _truncate(path, step)
            self.file = path.open("a", encoding="utf-8")
            self.wandb = _open_wandb(run, log, settings, wandb_id) if log.wandb else None

    @property
    def wandb_id(self) -> str | None:
        """wandb's id of this run, kept in checkpoints."""
        return self.wandb.id if self.wandb is not None else None

    def write(self, row: Mapping[str, Any], remaining: float | None = None) -> None:
        """Append a row; a training row also prints its line, with `remaining` seconds to go."""
        if self.file is None:
            return
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        self.stream.write((progress_line(row, remaining) if row["kind"] == "train" else _eval_line(row)) + "\n")
        self.stream.flush()
        if self.wandb is not None:
            flat = {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
            for layer, load in zip(row.get("moe_layers", ()), row.get("expert_load", ()), strict=True):
                flat |= {f"expert_load/layer{layer}/expert{e}": share for e, share in enumerate(load)}
            try:
                self.wandb.log(flat, step=row["step"])
            except Exception as error:  # noqa: BLE001  (a foreign service; whatever it raises, training goes on)
                self._drop_wandb(error)

    def close(self) -> None:
        """Flush and let go of everything."""
        if self.file is not None:
            self.file.close()
        if self.wandb is not None:
            try:
                self.wandb.finish()
            except Exception as error:  # noqa: BLE001
                self._drop_wandb(error)

    def _drop_wandb(self, error: Exception) -> None:
        self.wandb = None
        warnings.warn(f"wandb failed and is left out from now on: {error}", RuntimeWarning, stacklevel=3)


def flops_per_token(cfg: ModelConfig, seq_len: int) -> float:
    """Forward and backward: 6 per active matrix weight, 6 per head, head size and position that causal attention sees.

    (Kaplan et al. 2001.08361 §2.1; PaLM 2204.02311 appendix B, halved for the causal mask.)
    """
    attention = cfg.width * cfg.head_dim * (2 * cfg.heads + 2 * cfg.kv_heads)
    sparse, matrices = len(cfg.moe_layers), 3
    dense = matrices * cfg.width * cfg.ffn_width * (cfg.layers - sparse)
    if cfg.moe is not None:
        matrices = 3 if cfg.moe.activation == "swiglu" else 2
        experts = matrices * cfg.width * cfg.moe.expert_width * (cfg.moe.top_k + cfg.moe.shared_experts)
        dense += sparse * (experts + cfg.width * cfg.moe.num_experts)
    weights = cfg.layers * attention + dense + cfg.vocab_size * cfg.width
    return 6.0 * (weights + cfg.layers * cfg.heads * cfg.head_dim * seq_len)


def peak_flops(device: torch.device, world: int) -> float | None:
    """Peak FLOP/s of all ranks' devices; None where it is not known (CPUs)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * world for model, peak in PEAKS.items() if model in name), None)


def progress_line(row: Mapping[str, Any], remaining: float | None) -> str:
    """`step 120  loss 3.214  5,200 tok/s  drop 2.1%  load max/mean 1.31  eta 1:02`."""
    parts = [f"step {row['step']:>6}", f"loss {row['loss']:.4f}", f"{row['tokens_per_second']:,.0f} tok/s"]
    if row["expert_load"]:
        peak = max(max(load) * len(load) for load in row["expert_load"])
        parts += [f"drop {row['drop_fraction']:.1%}", f"load max/mean {peak:.2f}"]
    if remaining is not None:
        minutes, seconds = divmod(round(remaining), 60)
        parts.append(f"eta {minutes}:{seconds:02d}")
    return "  ".join(parts)


def _eval_line(row: Mapping[str, Any]) -> str:
    return f"step {row['step']:>6}  held out: loss {row['val_loss']:.4f}  {row['bits_per_byte']:.4f} bits per byte"


def _truncate(path: Path, step: int) -> None:
    """Keep the rows up to `step`; a torn last line goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if row["step"] <= step:
            kept.append(line + "\n")
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(kept), encoding="utf-8")
    aside.replace(path)


def _open_wandb(run: Path, log: LogConfig, settings: Mapping[str, Any], wandb_id: str | None) -> Any:
    """A wandb run, offline without a key; None, with a warning, when wandb does not work."""
    try:
        import wandb

        online = wandb.api.api_key is not None
        quiet = wandb.Settings(silent=True, init_timeout=20, finish_timeout=30)
        return wandb.init(
            project=log.project, name=run.name, dir=str(run), id=wandb_id, resume="allow", config=dict(settings),
            mode=None if online else "offline", settings=quiet,
        )  # fmt: skip
    except Exception as error:  # noqa: BLE001  (not installed, no disk, no service: never a reason to stop)
        warnings.warn(f"wandb does not work and is left out: {error}", RuntimeWarning, stacklevel=3)
        return None
