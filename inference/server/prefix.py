"""Which replica has the beginning of a prompt in its prefix cache: marks of a request, and who is known to have them.

A request is marked at 64, 128, 256, ... characters of what its prompt is made from, so that the longest beginning that
two requests share is found with a few look-ups, whatever their length.
"""

import json
from collections import OrderedDict
from collections.abc import Collection, Hashable, Sequence
from hashlib import blake2b
from typing import Any, Generic, TypeVar

FIRST = 64
"""Characters: about one block of the KV cache. A shorter beginning is not worth a detour."""
LEVELS = 12

R = TypeVar("R", bound=Hashable)


def marks(body: bytes) -> list[str]:
    """Hashes of the beginnings of a request's prompt, the shortest first; what is no such request has none.

    Requests of different `cache_salt` have no mark in common, as their prefixes have no block in common.

    Args:
        body: of a request to /v1/completions or /v1/chat/completions, not checked yet.
    """
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return []
    if not isinstance(asked, dict):
        return []
    prompt: Any = asked.get("messages") or asked.get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        prompt = prompt[0]  # the others are requests of their own, sent along with it
    whole = json.dumps([asked.get("cache_salt"), asked.get("tools"), prompt], ensure_ascii=False)
    text = whole[:-2].encode("utf-8", "surrogatepass")  # its end would not be there in a longer one
    ends = [FIRST << level for level in range(LEVELS) if FIRST << level <= len(text)]
    state, found = blake2b(digest_size=8), []
    for start, end in zip([0, *ends], ends, strict=False):
        state.update(text[start:end])
        found.append(state.hexdigest())
    return found


class PrefixTable(Generic[R]):
    """Who was given which marks last.

    Args:
        limit: marks that are kept; the one that was not asked for the longest goes first.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._holders: OrderedDict[str, set[R]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._holders)

    def holders(self, found: Sequence[str]) -> set[R]:
        """Those that have the longest beginning which anybody has."""
        for mark in reversed(found):
            if mark in self._holders:
                return self._holders[mark]
        return set()

    def remember(self, found: Sequence[str], replica: R) -> None:
        """`replica` has these beginnings from now on."""
        for mark in reversed(found):  # the shortest, which the most requests share, are the last to go
            self._holders.setdefault(mark, set()).add(replica)
            self._holders.move_to_end(mark)
        while len(self._holders) > self._limit:
            self._holders.popitem(last=False)

    def keep(self, replicas: Collection[R]) -> None:
        """Forget all but these: the others are gone, and their caches with them."""
        for mark, holders in list(self._holders.items()):
            holders.intersection_update(replicas)
            if not holders:
                del self._holders[mark]
