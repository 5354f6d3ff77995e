"""The note about a step whose loss or gradients are not finite: which batch, which losses, what was broken before."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from ...parallel import process
from ...parallel.fsdp import own
from ..data.rows import Cursor

NOTE = "nonfinite.json"


def leave_note(run: Path, model: nn.Module, step: int, cursor: Cursor, loss: float, grad_norm: float) -> str:
    """Rank 0 writes the note. Collective.

    Args:
        step: optimizer steps done.
        cursor: where the batch begins.
        loss: this rank's.

    Returns:
        the same in words.
    """
    losses = process.gather_json(repr(loss))
    broken = [name for name, tensor in model.state_dict().items() if not own(tensor).isfinite().all()]
    before = sorted({name for names in process.gather_json(broken) for name in names})
    if process.rank() == 0:
        content: dict[str, Any] = {"step": step, "cursor": vars(cursor), "losses": losses}
        content |= {"not finite before the step": before, "grad_norm": repr(grad_norm)}
        (run / NOTE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return (
        f"the gradient norm ({grad_norm}) of step {step} is not finite (losses: {', '.join(losses)}"
        f"{'; not finite before it: ' if before else ''}{', '.join(before)}) and no parameter moved"
    )
