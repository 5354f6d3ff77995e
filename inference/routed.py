"""Where the tokens of one choice went, growing as steps report it: `CompletionOutput.routed_experts`.

R rows (one a computed token), L MoE layers of the decoder, K choices.
"""

import numpy as np

from .run.experts import RoutedRows


class RoutedExperts:
    """Rows that are only ever added to, so that what was handed out stays as it was.

    Args:
        none_RLK: no rows, of the right shape and type.

    Attributes:
        count: R, how many rows there are.
    """

    def __init__(self, none_RLK: np.ndarray) -> None:
        self.count = 0
        self._room_RLK = none_RLK

    def take(self, report: RoutedRows) -> None:
        """Add what is new in a report; a request that is computed again reports nothing twice."""
        assert report.first <= self.count, "a report leaves no token out"
        fresh_RLK = report.ids_RLK[self.count - report.first :]
        count = self.count + len(fresh_RLK)
        if count > len(self._room_RLK):
            larger_RLK = np.empty((2 * count, *self._room_RLK.shape[1:]), self._room_RLK.dtype)
            larger_RLK[: self.count] = self._room_RLK[: self.count]
            self._room_RLK = larger_RLK  # twice as large: a row is copied once or twice, however many come
        self._room_RLK[self.count : count] = fresh_RLK
        self.count = count

    @property
    def rows(self) -> np.ndarray:
        """All rows, a read-only view."""
        rows_RLK = self._room_RLK[: self.count]
        rows_RLK.flags.writeable = False
        return rows_RLK
