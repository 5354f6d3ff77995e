"""Stop strings: found across tokens, never shown in part.

While a choice runs, the last `longest - 1` characters are held back, because they may begin a stop string. The stop
string that completes earliest wins; of those that complete at the same character the longest. It is looked for in the
generated text only, and only in characters that have not been searched before.
"""

from collections.abc import Sequence


class StopText:
    """The growing text of one choice, cut at the first stop string.

    Args:
        stop: the stop strings, none of them empty.
        include: keep the stop string itself in the text.
    """

    def __init__(self, stop: Sequence[str] = (), include: bool = False) -> None:
        self._stop = tuple(stop)
        self._include = include
        self._reach = max((len(s) for s in self._stop), default=1) - 1
        self._text = ""

    def push(self, piece: str, search: bool = True) -> bool:
        """Append `piece`; True when a stop string completes in it, and the text is then cut for good.

        `search=False` (fewer than `min_tokens` so far) lets stop strings pass as ordinary text.
        """
        old = len(self._text)
        self._text += piece
        found = self._first(old) if search else None
        if found is not None:
            start, end = found
            self._text = self._text[: end if self._include else start]
        return found is not None

    @property
    def text(self) -> str:
        """All of it: what is shown once the choice has ended."""
        return self._text

    @property
    def shown(self) -> str:
        """What may be shown while the choice still runs."""
        return self._text if self._include else self._text[: max(0, len(self._text) - self._reach)]

    def _first(self, old: int) -> tuple[int, int] | None:
        """(start, end) of the stop string that ends earliest after character `old`."""
        found = []
        for stop in self._stop:
            start = self._text.find(stop, max(0, old - len(stop) + 1))
            if start >= 0:
                found.append((start, start + len(stop)))
        return min(found, key=lambda span: (span[1], span[0]), default=None)
