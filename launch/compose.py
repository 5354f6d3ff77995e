"""From a command line to a validated run: Hydra composes, the dataclasses validate. No torch is imported on the way.

    compose(["experiment=switch_pydocs", "moe.num_experts=16"]) -> Composed(config, nproc, run, name)

Hydra's own complaints are turned into ours, which name the field, the value, the rule and the fix.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from .. import ConfigError
from ..configs.schema import MISSING, known_keys, register
from ..configs.typed import build, check
from ..moe.config import ModelConfig, MoEConfig
from ..moe.data.config import DataConfig
from ..moe.train.config import LogConfig, OptimConfig, RunConfig, TrainConfig
from ..moe.upcycle_config import UpcycleConfig
from ..parallel.config import ParallelConfig
from .auto import Choice, Machines, choose, detect, gpus
from .follow import Said, follow, learn, said


@dataclass(frozen=True, kw_only=True)
class Recording:
    """What a run does with its routers' decisions: keys of the `moe` group that are the run's, not the layer's.

    Args:
        trace: `RunConfig.trace`.
        replay: `RunConfig.replay`.
    """

    trace: bool = False
    replay: str | None = None


@dataclass(frozen=True, kw_only=True)
class MoEGroup(Recording, MoEConfig):
    """Every key that may be written as `moe.key=value`; never built as a whole."""


GROUPS: Mapping[str, type] = {
    "model": ModelConfig,
    "moe": MoEGroup,
    "data": DataConfig,
    "optim": OptimConfig,
    "parallel": ParallelConfig,
    "train": TrainConfig,
    "upcycle": UpcycleConfig,
    "log": LogConfig,
}
ROOT_KEYS = ("seed", "engine", "kernels", "nproc", "run", "experiment")
CONFIGS = Path(__file__).parents[1] / "configs"


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What the launcher alone needs.

    Args:
        nproc: ranks on this machine; null = one per accelerator, one without any.
        run: the run's directory; null = a new one under `runs/`.
    """

    nproc: int | None = None
    run: str | None = None

    def __post_init__(self) -> None:
        check(self.nproc is None or self.nproc >= 1, "nproc", self.nproc, "must be at least 1", "use nproc=2")
        check(self.run != "", "run", repr(self.run), "must name a directory", "use run=runs/NAME")


@dataclass(frozen=True, kw_only=True)
class Composed:
    """A run ready to start: `config` fits `world` ranks.

    Attributes:
        name: the experiment's, for the run's directory.
        choice: what `parallel=auto` picked, and `config` has.
    """

    config: RunConfig
    world: int
    run: str | None
    name: str
    choice: Choice | None = None


def compose(
    overrides: Sequence[str],
    world: int | None = None,
    *,
    check_layout: bool = True,
    machines: Machines | None = None,
) -> Composed:
    """Compose and validate one run.

    Args:
        overrides: `key=value` in Hydra's override grammar, without sweeps.
        world: ranks, when something else (torchrun) has already decided; None = `nproc`.
        check_layout: whether the run must fit its ranks; False for words that are only a part of a run's.
        machines: what `parallel=auto` chooses for; None = this machine, and others like it.

    Raises:
        ConfigError: whatever can not work, before any process is started.
    """
    parsed = parse(overrides)
    swept = next((o for o in parsed if o.is_sweep_override()), None)
    if swept is not None:
        raise ConfigError(f"{swept.input_line!r} is a sweep: use -m, as in `turnout train -m ...`")
    plain, auto = _plain(overrides)
    train = build(TrainConfig, plain["train"], "train")
    if train.init is not None:
        plain = follow(plain, _said(overrides, parsed))
    if train.distill is not None:
        plain = learn(plain, _said(overrides, parsed))
    launch = build(Launch, {key: plain.pop(key) for key in ("nproc", "run")})
    config = _typed(plain)
    if world is None:
        world = launch.nproc or max(accelerators(), 1)
    choice = None
    if auto and check_layout:
        given = {override.key_or_group for override in parsed}
        choice = choose(config, world, machines or detect(world, gpus()), given)
        config = choice.config
    if check_layout:
        config.layout(world)
    name = next((str(o.value()) for o in reversed(parsed) if o.key_or_group == "experiment"), "train")
    return Composed(config=config, world=world, run=launch.run, name=name, choice=choice)


def parse(overrides: Sequence[str]) -> list[Override]:
    """The overrides by Hydra's grammar, each checked to be a known key or a known option of a group."""
    parser, known = OverridesParser.create(), known_keys(GROUPS, ROOT_KEYS)
    parsed = []
    for text in overrides:
        if text.startswith(("+", "~")):
            raise ConfigError(f"{text!r} adds or deletes a key: every key exists already, write key=value")
        if "=" not in text:
            raise ConfigError(f"{text!r} has no '=': settings of `turnout train` are key=value")
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            raise ConfigError(
                f"{text!r} does not read as key=value: quote special characters, as in key='a b'"
            ) from error
        _check_key(override, known)
        parsed.append(override)
    return parsed


def accelerators() -> int:
    """NVIDIA GPUs of this machine, without asking torch."""
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def _check_key(override: Override, known: Sequence[str]) -> None:
    key = override.key_or_group
    if key.startswith("hydra."):
        return
    if key not in known:
        close = difflib.get_close_matches(key, known, n=1) or difflib.get_close_matches(
            key.rpartition(".")[2], [k.rpartition(".")[2] for k in known], n=1
        )
        full = next((k for k in known if close and (k == close[0] or k.endswith(f".{close[0]}"))), None)
        fix = f"did you mean {full}?" if full else "keys are " + ", ".join([*ROOT_KEYS, *(f"{g}.*" for g in GROUPS)])
        text = str(override.input_line).partition("=")[2]
        raise ConfigError(f"{key} ({text}) is not a setting: {fix}")
    if (key in GROUPS or key == "experiment") and not override.is_sweep_override():
        options = sorted(p.stem for p in (CONFIGS / key).glob("*.yaml"))
        value = override.value()
        if value not in options and not (key == "experiment" and value is None):
            close = difflib.get_close_matches(str(value), options, n=1)
            fix = f"did you mean {key}={close[0]}?" if close else f"use one of {', '.join(options)}"
            raise ConfigError(f"{key} ({value}) is not one of its options: {fix}")


def _plain(overrides: Sequence[str]) -> tuple[dict[str, Any], bool]:
    """What Hydra composes, as plain values with every interpolation resolved; and whether it is `parallel=auto`."""
    plain, auto = _composed(overrides, resolve=True)
    for group, values in plain.items():
        for key, value in values.items() if isinstance(values, dict) else ():
            if value == MISSING:
                raise ConfigError(f"{group}.{key} is missing: give it a value, as in {group}.{key}=VALUE")
    return plain, auto


def _said(overrides: Sequence[str], parsed: Sequence[Override]) -> Said:
    """What somebody has set: see `follow`."""
    files = [CONFIGS / o.key_or_group / f"{o.value()}.yaml" for o in parsed if o.key_or_group in GROUPS]
    chosen = {file.parent.name: yaml.safe_load(file.read_text(encoding="utf-8")) for file in files}
    words = {".".join(o.key_or_group.split(".")[:2]) for o in parsed}
    words.update(f"{group}.{key}" for group in chosen for key in chosen[group])
    return said(_composed(overrides, resolve=False)[0], _composed([], resolve=False)[0], words)


def _composed(overrides: Sequence[str], resolve: bool) -> tuple[dict[str, Any], bool]:
    register(GROUPS)
    try:
        with initialize_config_module(f"{__package__.rpartition('.')[0]}.configs", version_base="1.3"):
            composed = hydra_compose("train", overrides=[*map(_nested, overrides)], return_hydra_config=True)
        auto = composed.hydra.runtime.choices["parallel"] == "auto"
        with open_dict(composed):
            del composed["hydra"]
        plain: Any = OmegaConf.to_container(composed, resolve=resolve)
    except (HydraException, OmegaConfBaseException) as error:
        line = " ".join(str(error).split())
        raise ConfigError(f"{line}: see the groups of `turnout train --help`") from error
    return plain, auto


def _nested(override: str) -> str:
    """`++` before `model.attention.window=128`: what it lies in may be null until then."""
    key = override.partition("=")[0]
    return f"++{override}" if key.count(".") > 1 and not key.startswith("hydra.") else override


def _typed(plain: dict[str, Any]) -> RunConfig:
    """The groups, each built under its own name, a group before those that follow its values, so that a message names
    the key that was written; `moe` goes into the model, its `Recording` into the run."""
    built: dict[str, Any] = {
        group: build(GROUPS[group], plain[group], group)
        for group in ("data", "train", "optim", "parallel", "upcycle", "log")
    }
    sparse = plain["model"]["moe"]
    fix = "use model.moe=null for a dense model, and moe.* for the experts"
    check(sparse in (None, plain["moe"]), "model.moe", sparse, "must be null or left alone", fix)
    model = build(ModelConfig, {**plain["model"], "moe": None}, "model")
    moe = dict(plain["moe"])
    recording = build(Recording, {field.name: moe.pop(field.name) for field in fields(Recording)}, "moe")
    if sparse is not None:
        model = replace(model, moe=build(MoEConfig, moe, "moe"))
    rest = {key: value for key, value in plain.items() if key not in GROUPS}
    return build(RunConfig, {**rest, **vars(recording), **built, "model": model})
