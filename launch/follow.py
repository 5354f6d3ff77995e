"""`train.init`: the architecture and the tokenizer of a run come from the checkpoint that it starts from; and
`train.distill.teacher`: the vocabulary and the tokenizer from the one that it learns from.

What a person has said must agree with it; what nobody has said follows it. Said is what a word of the command line
sets, by itself or by the group that it chooses, and what an experiment sets to another value than a run without words
has; a value that follows another key is not. Settings of training alone (losses, capacity, noise) are free.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from .. import CheckpointError, ConfigError
from ..configs.typed import build, check, to_dict
from ..moe.config import ModelConfig
from ..moe.upcycle_config import UpcycleConfig

Said = frozenset[tuple[str, str]]
Tree = dict[str, Any]

TOKENIZER = "tokenizer.json"
# Keys of `moe` that change how a layer is trained and how much it drops, not what its weights compute.
OF_TRAINING = frozenset(
    {
        "capacity_factor", "eval_capacity_factor", "capacity_tokens", "min_capacity", "group", "drop_order", "reroute",
        "renormalize_kept", "second_policy", "second_threshold", "bias_rate", "balance_loss", "balance_over",
        "sequence_loss", "global_batch_loss", "device_loss", "device_groups", "importance_loss", "load_loss", "z_loss",
        "jitter", "expert_dropout", "noncausal", "init_scale",
    }
)  # fmt: skip


def said(raw: Mapping[str, Any], quiet: Mapping[str, Any], words: Collection[str]) -> Said:
    """The (group, key) that somebody has set.

    Args:
        raw: the composed groups, interpolations unresolved.
        quiet: the same of a run without words.
        words: keys of the command line, and those in the files of the groups that it chooses.
    """
    found = set()
    for group, values in raw.items():
        for key, value in values.items() if isinstance(values, dict) else ():
            follows = isinstance(value, str) and value.startswith("${")
            if not follows and (value != quiet[group].get(key) or f"{group}.{key}" in words):
                found.add((group, key))
    return frozenset(found)


def follow(plain: Tree, told: Said) -> Tree:
    """The composed groups with the checkpoint's architecture and tokenizer in them.

    Raises:
        ConfigError: there is no checkpoint, or something that was said contradicts it; both are named.
    """
    init = plain["train"]["init"]
    check(bool(init), "train.init", repr(init), "must name a directory", "use train.init=runs/NAME, or null")
    cfg = _config("train.init", init)
    how = build(UpcycleConfig, plain["upcycle"], "upcycle")
    theirs = to_dict(cfg if how.num_experts is None else how.sparse(cfg))
    sparse = theirs.pop("moe")
    source = f"train.init ({init})"
    model = _agree("model", plain["model"], theirs, told - {("model", "eos_token_id")}, source)
    data = _words(plain, "train.init", init, model["vocab_size"], told)
    moe = plain["moe"] if sparse is None else {**plain["moe"], **_experts(plain["moe"], sparse, told, source)}
    if sparse is None:
        _refuse_experts(plain["moe"], told, init)
    elif ("model", "moe") in told and plain["model"]["moe"] is None:
        rule = f"and train.init ({init}) has experts"
        raise ConfigError(f"model.moe (null) {rule}: leave model.moe out, or start from a dense checkpoint")
    return {**plain, "model": {**model, "moe": None if sparse is None else moe}, "moe": moe, "data": data}


def learn(plain: Tree, told: Said) -> Tree:
    """The composed groups with the vocabulary and the tokenizer of the teacher, which its student shares.

    Raises:
        ConfigError: there is no such model, or something that was said contradicts it; both are named.
    """
    name, teacher = "train.distill.teacher", plain["train"]["distill"]["teacher"]
    vocabulary = _config(name, teacher).vocab_size
    started = {("data", "vocab_size")} if plain["train"]["init"] is not None else set()
    data = _words(plain, name, teacher, vocabulary, told | started)
    model = {"vocab_size": plain["model"]["vocab_size"]}
    same = _agree("model", model, {"vocab_size": vocabulary}, told, f"{name} ({teacher})")
    return {**plain, "data": data, "model": {**plain["model"], **same}}


def _config(name: str, path: str) -> ModelConfig:
    """Of the model that a setting names."""
    from ..moe.models.store import load_config, model_directory  # loads torch, which few runs need here

    try:
        return load_config(model_directory(path))
    except CheckpointError as error:
        raise ConfigError(f"{name} ({path}) must be a model: {error}") from error


def _words(plain: Tree, name: str, path: str, vocabulary: int, told: Said) -> Tree:
    """The group `data` with the vocabulary and the tokenizer of the model that a setting names."""
    data = plain["data"]
    _agree("data", {"vocab_size": data["vocab_size"]}, {"vocab_size": vocabulary}, told, f"{name} ({path})")
    return {**data, "vocab_size": vocabulary, "tokenizer": _tokenizer(plain, name, path)}


def _agree(group: str, ours: Tree, theirs: Tree, told: Said, source: str) -> Tree:
    """`theirs`, after what was said of it has been found to agree."""
    for key, value in theirs.items():
        mine = ours[key]
        same = {**value, **mine} == value if isinstance(value, dict) and isinstance(mine, dict) else mine == value
        rule = f"contradicts {source}, which has {value}"
        fix = "leave it out, or start from another checkpoint"
        check(same or (group, key) not in told, f"{group}.{key}", mine, rule, fix)
    return dict(theirs)


def _experts(ours: Tree, theirs: Tree, told: Said, source: str) -> Tree:
    """The checkpoint's experts with this run's settings of training."""
    free = {key for key in OF_TRAINING if ("moe", key) in told and ours[key] != theirs[key]}
    free = {key for key in free if ours[key] is not None or key.endswith("capacity_factor")} | {"capacity_tokens"}
    fixed = {key: value for key, value in theirs.items() if key not in OF_TRAINING}
    silent = {key for key in told if key[0] == "moe" and ours.get(key[1]) is None}
    _agree("moe", ours, fixed, told - silent, source)
    return {**theirs, **{key: ours[key] for key in free}}


def _refuse_experts(ours: Tree, told: Said, init: str) -> None:
    """A dense checkpoint has no experts to set anything of."""
    keys = sorted(key for group, key in told if group == "moe" and key not in ("trace", "replay"))
    if keys:
        rule = f"is said of experts, and train.init ({init}) is dense"
        check(False, f"moe.{keys[0]}", ours[keys[0]], rule, "use upcycle.num_experts=8, or leave moe out")


def _tokenizer(plain: Tree, name: str, path: str) -> str:
    """Where the tokenizer is: that of the model which a setting names; one that was given must equal it."""
    from ..moe.models.store import model_directory, tokenizer_directory

    given = plain["data"]["tokenizer"]
    with tokenizer_directory(path) as directory:
        theirs = directory / TOKENIZER
        if not theirs.is_file():
            rule = f"must be given, for {name} ({path}) has no {TOKENIZER}"
            check(given is not None, "data.tokenizer", None, rule, "use data.tokenizer=DIR")
            return str(given)
        ours = Path(given or directory) / TOKENIZER
        rule = f"is not the tokenizer of {name} ({path})"
        same = given == path or (ours.is_file() and ours.read_bytes() == theirs.read_bytes())
        check(same, "data.tokenizer", given, rule, "leave it out")
        return str(given or (path if model_directory(path).is_file() else directory))
