"""How much each layer suffers from zeros while all others stay dense, and shares of zeros that hurt all alike."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ... import ConfigError, NonFiniteError
from ...configs.typed import check
from .scores import magnitude
from .sparsity import Sparsity

Prune = Callable[[str, Tensor, float], Tensor]


@dataclass(frozen=True)
class Scan:
    """What zeros in one layer alone cost.

    Attributes:
        dense: the measure with no zeros.
        shares: of zeros, rising.
        increases: by layer, how much the measure grew at each share.
    """

    dense: float
    shares: tuple[float, ...]
    increases: dict[str, tuple[float, ...]]


@torch.no_grad()
def scan(
    layers: Mapping[str, Mapping[str, Tensor]],
    shares: Sequence[float],
    measure: Callable[[], float],
    prune: Prune = lambda _, w_FD, share: magnitude(w_FD, Sparsity(share=share)),
) -> Scan:
    """Prune a layer after the other and measure the model; each is put back to the bit, also if `measure` raises.

    Args:
        layers: by name the matrices [..., F, D] of each layer, by name; the model's own tensors, changed in place.
        shares: of zeros, rising, in (0, 1].
        measure: of the model that holds them, the lower the better: its perplexity.
        prune: makes of a matrix' name, itself and a share the pruned one.

    Raises:
        ConfigError: shares that are none, or do not rise. NonFiniteError: a measure is not finite.
    """
    rising = all(low < high for low, high in zip([0.0, *shares], shares, strict=False))
    check(bool(shares) and rising and shares[-1] <= 1, "shares", list(shares), "must rise in (0, 1]", "use 0.3,0.5,0.7")
    dense, increases = _finite(measure(), "the dense model"), {}
    for layer, matrices in layers.items():
        with _kept(matrices) as whole:
            found = []
            for share in shares:
                for name, w_FD in matrices.items():
                    w_FD.copy_(prune(name, whole[name], share))
                found.append(_finite(measure(), f"{layer} at {share}") - dense)
        increases[layer] = tuple(found)
    return Scan(dense, tuple(shares), increases)


def read_scan(path: str | Path, layers: int) -> Scan:
    """What `turnout compress method=scan` has written.

    Raises:
        ConfigError: no such file, or of a model with another number of layers.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        increases = {layer: tuple(one) for layer, one in data["increases"].items()}
        found = Scan(data["dense"], tuple(data["shares"]), increases)
        if any(len(one) != len(found.shares) for one in increases.values()):
            raise ValueError("not an increase a share")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"shares ({path}) does not read as a scan ({error!r}): run method=scan again") from error
    rule = f"must be of a model with {layers} layers, and has {len(found.increases)}"
    check(set(found.increases) == {str(layer) for layer in range(layers)}, "shares", path, rule, "scan this model")
    return found


def allocate(found: Scan, sizes: Mapping[str, int], share: float) -> dict[str, float]:
    """Shares of zeros by layer with which each increase is as large as every other's, together `share` of all weights.

    A layer's curve starts at no zeros and no increase, runs straight between the shares measured, and never falls: a
    dip is taken for noise. A layer that costs less even at the highest share measured has that one.

    Args:
        found: of all layers.
        sizes: weights of each.
        share: of all of them.

    Raises:
        ConfigError: a share that the scan does not reach.
    """
    most = found.shares[-1]
    check(0 <= share <= most, "share", share, f"must lie in 0 to the scan's highest ({most})", "lower it")
    curves = {layer: _rising(increases) for layer, increases in found.increases.items()}
    total = sum(sizes[layer] for layer in curves)
    low, high = -1.0, max(curve[-1] for curve in curves.values())

    def at(level: float) -> dict[str, float]:
        return {layer: _share_at(level, curve, found.shares) for layer, curve in curves.items()}

    for _ in range(100):
        level = (low + high) / 2
        enough = sum(sizes[layer] * one for layer, one in at(level).items()) >= share * total
        low, high = (low, level) if enough else (level, high)
    few, many = at(low), at(high)
    less, more = (sum(sizes[layer] * one for layer, one in each.items()) for each in (few, many))
    part = (share * total - less) / (more - less) if more > less else 0.0
    return {layer: few[layer] + part * (many[layer] - few[layer]) for layer in curves}


@contextmanager
def _kept(matrices: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Copies, which are put back at the end."""
    whole = {name: w.clone() for name, w in matrices.items()}
    try:
        yield whole
    finally:
        for name, w in matrices.items():
            w.copy_(whole[name])


def _finite(value: float, where: str) -> float:
    if not abs(value) < float("inf"):
        raise NonFiniteError(f"the measure of {where} is {value}: leave out the shares that break the model")
    return value


def _rising(increases: Sequence[float]) -> list[float]:
    """The curve from no zeros on, its running maximum."""
    curve = [0.0]
    for increase in increases:
        curve.append(max(curve[-1], increase))
    return curve


def _share_at(level: float, curve: Sequence[float], shares: Sequence[float]) -> float:
    """The highest share whose increase is at most `level`; below zero none."""
    if level < 0:
        return 0.0
    known = [0.0, *shares]
    last = max(i for i, increase in enumerate(curve) if increase <= level)
    if last == len(curve) - 1:
        return known[-1]
    part = (level - curve[last]) / (curve[last + 1] - curve[last])
    return known[last] + part * (known[last + 1] - known[last])
