"""Traces: every decision of the routers on disk, to be looked into (`read_trace`) and to be taken again (`Replay`).

    runs/x/routing/index.json                            layers, experts, k, router
    runs/x/routing/step-00000012/rank-00000.safetensors  what one rank decided in the step that began at 12 steps done
        index int64 [T], tokens int32 [T]                global token index, token id, of the tokens it held
        layers.3.ids [T, K] in the smallest integers, .wanted bool, .kept bool, .weights float32; under moe.reroute
        also .asked, the experts before it; of the layers it held

Decisions are found by global token index, so the layout and micro-batches may be others in the replay.

T tokens, K choices.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ... import DataError
from ...parallel import process
from ..config import ModelConfig
from ..routing.record import Decision, RouteContext, Routing

FOLDER, INDEX = "routing", "index.json"
IDS = ("ids", "asked")


class Trace:
    """Writes one rank's decisions.

    Args:
        directory: `routing/` of the run.
        cfg: the model.
        rank: this rank among all `size`.
    """

    def __init__(self, directory: Path, cfg: ModelConfig, rank: int, size: int) -> None:
        self.directory, self.rank, self.size, self._micro = directory, rank, size, list[dict[str, Tensor]]()
        self._ids = _smallest(cfg.moe.num_experts) if cfg.moe else torch.uint8
        if rank == 0:
            directory.mkdir(exist_ok=True)
            aside = directory / f"tmp-{INDEX}"
            aside.write_text(json.dumps(_describe(cfg), indent=1) + "\n", encoding="utf-8")
            aside.replace(directory / INDEX)

    def add(self, context: RouteContext, routings: Mapping[int, Routing]) -> None:
        """Keep one micro-batch's decisions, on the CPU."""
        assert context.index_T is not None
        assert context.token_ids_T is not None
        kept = {"index": context.index_T, "tokens": context.token_ids_T.int()}
        for layer, routing in routings.items():
            parts = {"ids": routing.ids_TK.to(self._ids), "wanted": routing.wanted_TK, "kept": routing.kept_TK}
            parts["weights"] = routing.weights_TK.float()
            if routing.asked_TK is not None:
                parts["asked"] = routing.asked_TK.to(self._ids)
            kept |= {f"layers.{layer}.{name}": part for name, part in parts.items()}
        self._micro.append({name: tensor.detach().cpu() for name, tensor in kept.items()})

    def discard(self) -> None:
        """Let go of what was added since the last step: it was not taken."""
        self._micro.clear()

    def write(self, step: int) -> None:
        """Write what was added since, as this rank's part of `step`; whole or not at all."""
        place = self.directory / f"step-{step:08d}"
        place.mkdir(parents=True, exist_ok=True)
        joined = {name: torch.cat([part[name] for part in self._micro]) for name in self._micro[0]}
        self._micro.clear()
        file = place / f"rank-{self.rank:05d}.safetensors"
        aside = file.with_name(f"tmp-{file.name}")
        save_file(joined, aside, metadata={"ranks": str(self.size)})
        aside.replace(file)


def forget(directory: Path, step: int) -> None:
    """Delete the steps from `step` on: a resumed run decides them again."""
    for place in directory.glob("step-*"):
        if int(place.name.removeprefix("step-")) >= step:
            shutil.rmtree(place)


def read_trace(directory: str | Path, step: int) -> dict[str, Any]:
    """One step's decisions over all ranks, sorted by global token index.

    Args:
        directory: a run that was trained with `moe.trace=true`, or its `routing/`.
        step: optimizer steps done when it began: 0 is the first.

    Returns:
        index: int64 [T], global token index.
        tokens: int64 [T], token ids.
        layers: layer id → {"ids": int64 [T, K], experts, best first; "wanted": bool [T, K], False for padding and for
            second choices not drawn; "kept": bool [T, K], wanted and within capacity; "weights": float32 [T, K];
            under moe.reroute also "asked": int64 [T, K], the experts before it}.

    Raises:
        DataError: there is no trace, or not this step, or not of all ranks, tokens and layers, or a file does not read.
    """
    place = _routing(directory) / f"step-{step:08d}"
    files = sorted(place.glob("rank-*.safetensors"))
    parts, ranks = [], 0
    try:
        for file in files:
            with safe_open(file, framework="pt") as reader:
                parts.append({name: reader.get_tensor(name) for name in reader.keys()})  # noqa: SIM118 (not a dict)
                ranks = int(reader.metadata()["ranks"])
    except (OSError, SafetensorError) as error:
        raise DataError(f"{file} does not read as a trace ({error}): trace the run again") from error
    if not parts:
        raise DataError(f"{place.parent} has no step {step}: trace that many steps, or look at fewer")
    if len(parts) != ranks:
        raise DataError(f"{place} holds {len(parts)} of {ranks} ranks' files: trace step {step} again")
    joined = _join(parts, place)
    layers: dict[int, dict[str, Tensor]] = {}
    for name, tensor in joined.items():
        if name.startswith("layers."):
            _, layer, part = name.split(".")
            layers.setdefault(int(layer), {})[part] = tensor.long() if part in IDS else tensor
    return {"index": joined["index"], "tokens": joined["tokens"].long(), "layers": dict(sorted(layers.items()))}


def _join(parts: list[dict[str, Tensor]], place: Path) -> dict[str, Tensor]:
    """All ranks' tensors, each by global token index. Ranks hold other tokens or, of the same tokens, other layers."""
    index_T = torch.cat([part["index"] for part in parts]).unique()
    joined = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        held = [part for part in parts if name in part]
        place_T = torch.searchsorted(index_T, torch.cat([part["index"] for part in held]))
        if len(place_T.unique()) < len(index_T):
            raise DataError(f"{place} has {name} of some tokens only: trace the step again")
        values_T = torch.cat([part[name] for part in held])
        joined[name] = values_T.new_empty(len(index_T), *values_T.shape[1:]).index_copy_(0, place_T, values_T)
    return joined


class Replay:
    """Another run's decisions, to be taken instead of choosing.

    Args:
        directory: a run that was trained with `moe.trace=true`, or its `routing/`.
        cfg: the model that replays.

    Raises:
        DataError: there is no trace, or its layers, experts, k or router are others.
    """

    def __init__(self, directory: str | Path, cfg: ModelConfig) -> None:
        self.directory = directory
        held, wanted = json.loads((_routing(directory) / INDEX).read_text(encoding="utf-8")), _describe(cfg)
        for key, value in wanted.items():
            if held.get(key) != value:
                raise self._error(f"has {key} {held.get(key)} and this run {value}", "replay with the traced settings")
        self._step, self._held = -1, dict[str, Any]()  # a step's micro-batches share what was read

    def decisions(self, step: int, index_T: Tensor, token_ids_T: Tensor) -> dict[int, Decision]:
        """What the traced run decided for these tokens: layer id → decision, on the tensors' device. Collective.

        Raises:
            DataError: on every rank, naming the first step, token or text of any rank that the trace does not have.
        """
        found: dict[int, Decision] = {}
        problem = ""
        try:
            found = self._look_up(step, index_T, token_ids_T)
        except DataError as error:
            problem = str(error)
        problems = [text for text in process.gather_json(problem) if text]
        if problems:
            raise DataError(problems[0])
        return found

    def _look_up(self, step: int, index_T: Tensor, token_ids_T: Tensor) -> dict[int, Decision]:
        if step != self._step:
            self._held, self._step = read_trace(self.directory, step), step
        held_T, wanted_T, tokens_T = self._held["index"], index_T.cpu(), token_ids_T.cpu()
        place_T = torch.searchsorted(held_T, wanted_T).clamp(max=len(held_T) - 1)
        theirs_T = self._held["tokens"][place_T]
        same_text = "replay with the same data, seed, train.seq_len and train.global_batch"
        if (missing_T := held_T[place_T] != wanted_T).any():
            index = int(wanted_T[missing_T][0])
            raise self._error(f"does not have token {index} of the text at step {step}", same_text)
        if (other_T := theirs_T != tokens_T).any():
            index, theirs, mine = (int(values_T[other_T][0]) for values_T in (wanted_T, theirs_T, tokens_T))
            raise self._error(f"has id {theirs} as token {index} of the text, and this run {mine}", same_text)
        device = index_T.device
        return {
            layer: Decision(
                ids_TK=parts["ids"][place_T].to(device),
                wanted_TK=parts["wanted"][place_T].to(device),
                kept_TK=parts["kept"][place_T].to(device),
                asked_TK=parts["asked"][place_T].to(device) if "asked" in parts else None,
            )
            for layer, parts in self._held["layers"].items()
        }

    def _error(self, rule: str, fix: str) -> DataError:
        return DataError(f"moe.replay ({self.directory}) {rule}: {fix}")


def _routing(directory: str | Path) -> Path:
    """The `routing/` that `directory` means."""
    for place in (Path(directory), Path(directory) / FOLDER):
        if (place / INDEX).is_file():
            return place
    raise DataError(f"{directory} holds no trace: name a run that was trained with moe.trace=true")


def _describe(cfg: ModelConfig) -> dict[str, Any]:
    assert cfg.moe is not None
    moe = cfg.moe
    return {"layers": list(cfg.moe_layers), "experts": moe.num_experts, "top_k": moe.top_k, "router": moe.router}


def _smallest(num_experts: int) -> torch.dtype:
    """The smallest integers that hold every expert's id."""
    return next(d for d in (torch.uint8, torch.int16, torch.int32) if num_experts - 1 <= torch.iinfo(d).max)
