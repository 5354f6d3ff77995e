"""Weights & Biases and TensorBoard, under the names of `metrics.jsonl`.

They are foreign: whatever they raise is a warning, and the run goes on without them.
"""

import socket
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from .alarm import Event
from .config import LogConfig


class Sinks:
    """Those that the configuration wants and that work.

    Args:
        run: the run's directory.
        log: what is wanted.
        settings: the run's plain configuration, for them to show.
        step: the step the run resumes from.
        wandb_id: the earlier part's wandb run, to be continued.
    """

    def __init__(
        self, run: Path, log: LogConfig, settings: Mapping[str, Any], step: int = 0, wandb_id: str | None = None
    ) -> None:
        self.working: dict[str, Any] = {}
        if log.wandb:
            self._open("wandb", Wandb, run, log.project, settings, wandb_id)
        if log.tensorboard:
            self._open("tensorboard", TensorBoard, run, step)

    @property
    def wandb_id(self) -> str | None:
        """wandb's id of this run; None without it."""
        return self.working["wandb"].id if "wandb" in self.working else None

    def log(self, row: Mapping[str, Any]) -> None:
        """Log a row's numbers."""
        self._each("log", flat(row), row["step"])

    def alarm(self, event: Event) -> None:
        """Tell a person, as each of them can."""
        self._each("alarm", event)

    def close(self) -> None:
        """Flush and let go."""
        self._each("close")

    def _open(self, name: str, kind: type, *args: Any) -> None:
        try:
            self.working[name] = kind(*args)
        except Exception as error:  # noqa: BLE001  (not installed, no disk, no service: never a reason to stop)
            warnings.warn(f"{name} does not work and is left out: {error}", RuntimeWarning, stacklevel=4)

    def _each(self, method: str, *args: Any) -> None:
        for name, sink in list(self.working.items()):
            try:
                getattr(sink, method)(*args)
            except Exception as error:  # noqa: BLE001  (whatever a foreign service raises, training goes on)
                del self.working[name]
                text = f"{name} failed and is left out from now on: {error}"
                warnings.warn(text, RuntimeWarning, stacklevel=4)


class Wandb:
    """A wandb run: online with a key and a server that answers, else offline (`wandb sync` sends it later)."""

    def __init__(self, run: Path, project: str, settings: Mapping[str, Any], wandb_id: str | None) -> None:
        import wandb

        quiet = wandb.Settings(silent=True, init_timeout=20, finish_timeout=30)
        online = wandb.api.api_key is not None and answers(quiet.base_url)
        self.run = wandb.init(
            project=project, name=run.name, dir=str(run), id=wandb_id, resume="allow", config=dict(settings),
            mode=None if online else "offline", settings=quiet,
        )  # fmt: skip
        self.id = self.run.id

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self.run.log(dict(numbers), step=step)

    def alarm(self, event: Event) -> None:
        self.run.alert(title=f"layer {event.layer} has collapsed", text=event.text, level="WARN")

    def close(self) -> None:
        self.run.finish()


class TensorBoard:
    """Event files in `tensorboard/` of the run; those beyond the step that a run resumes from are hidden."""

    def __init__(self, run: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def alarm(self, event: Event) -> None:
        self.writer.add_text(f"alarm/layer{event.layer}", event.text, event.step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


def answers(url: str, seconds: float = 2.0) -> bool:
    """Whether somebody listens where requests to `url` go: there, or at the proxy that the environment names."""
    there = urlsplit(url)
    proxy = getproxies().get(there.scheme)
    if proxy and not proxy_bypass(there.hostname or ""):
        there = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    port = there.port or (443 if there.scheme == "https" else 80)
    try:
        socket.create_connection((there.hostname, port), seconds).close()
    except OSError:
        return False
    return True


def flat(row: Mapping[str, Any]) -> dict[str, float]:
    """A row's numbers: a list by layer becomes `name/layer3`, one by layer and expert `name/layer3/expert0`."""
    found: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, int | float) and name != "step":
            found[name] = value
        elif isinstance(value, list) and name != "moe_layers":
            for layer, entry in zip(row["moe_layers"], value, strict=True):
                experts = isinstance(entry, list)
                numbers = {f"/expert{e}": share for e, share in enumerate(entry)} if experts else {"": entry}
                found |= {f"{name}/layer{layer}{suffix}": number for suffix, number in numbers.items()}
    return found
