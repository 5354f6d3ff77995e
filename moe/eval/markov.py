"""Byte-level Markov models with Witten-Bell interpolation: the plain numbers that a language model must beat.

    P_k(b | c) = (n(c, b) + T(c) P_{k-1}(b | c')) / (n(c) + T(c)),   P_{-1} = 1 / 256

with n the counts in the training text, T(c) the number of different bytes seen behind the k bytes c, and c' = c without
its oldest byte (Witten & Bell 1991; as in Chen & Goodman 1998, eq. 15). A context never seen falls through to the next
shorter one. Contexts do not cross documents. Counting is sorting: a context and its byte are packed into one uint64.

N bytes of a text, U different (context, byte) pairs.
"""

from collections.abc import Sequence

import numpy as np

from ... import DataError
from ...configs.typed import check

MAX_ORDER = 7  # eight bytes to a uint64


def markov_bits_per_byte(train: Sequence[str], held_out: Sequence[str], order: int) -> list[float]:
    """Bits per UTF-8 byte of `held_out` under the models of orders 0 to `order` trained on `train`.

    Raises:
        ConfigError: `order` is not 0 to 7.
        DataError: one of the texts is empty.
    """
    check(0 <= order <= MAX_ORDER, "order", order, f"must lie in 0 to {MAX_ORDER}", "use 5")
    (seen_N, age_N), (asked_N, asked_age_N) = _bytes(train, "training"), _bytes(held_out, "held-out")
    probability_N = np.full(len(asked_N), 1 / 256)
    gram_N, asked_gram_N = np.zeros_like(seen_N), np.zeros_like(asked_N)
    bits = []
    for k in range(order + 1):
        _extend(gram_N, seen_N, k)
        _extend(asked_gram_N, asked_N, k)
        pair_U, count_U = np.unique(gram_N[age_N >= k], return_counts=True)
        reach = np.flatnonzero(asked_age_N >= k)
        probability_N[reach] = _interpolate(pair_U, count_U, asked_gram_N[reach], probability_N[reach])
        bits.append(float(-np.log2(probability_N).mean()))
    return bits


def _bytes(texts: Sequence[str], which: str) -> tuple[np.ndarray, np.ndarray]:
    """All bytes as uint64, and how many bytes of its own document precede each."""
    data = [text.encode() for text in texts]
    bytes_N = np.frombuffer(b"".join(data), np.uint8).astype(np.uint64)
    if not len(bytes_N):
        raise DataError(f"the {which} text is empty: give documents with text")
    return bytes_N, np.concatenate([np.arange(len(d)) for d in data])


def _extend(gram_N: np.ndarray, bytes_N: np.ndarray, k: int) -> None:
    """Put the byte k places back in front of each gram, in place (the first k grams are never looked at)."""
    gram_N[k:] |= bytes_N[: max(len(bytes_N) - k, 0)] << np.uint64(8 * k)


def _interpolate(pair_U: np.ndarray, count_U: np.ndarray, asked: np.ndarray, shorter: np.ndarray) -> np.ndarray:
    """P_k of the `asked` pairs, given `shorter` = P_{k-1} of them; `pair_U` is sorted, so contexts are runs."""
    if not len(pair_U):
        return shorter
    context_U = pair_U >> np.uint64(8)
    first = np.flatnonzero(np.append(True, context_U[1:] != context_U[:-1]))
    contexts, kinds = context_U[first], np.diff(np.append(first, len(pair_U)))
    distinct, where = np.unique(asked, return_inverse=True)  # looked up in order: the search stays in the cache
    count = _look_up(pair_U, count_U, distinct)[where]
    total = _look_up(contexts, np.add.reduceat(count_U, first), distinct >> np.uint64(8))[where]
    kind = _look_up(contexts, kinds, distinct >> np.uint64(8))[where]
    return np.where(total > 0, (count + kind * shorter) / np.maximum(total + kind, 1), shorter)


def _look_up(keys: np.ndarray, values: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """values[key] of each asked key, 0 where there is none; `keys` are sorted."""
    place = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return np.where(keys[place] == asked, values[place], 0)
