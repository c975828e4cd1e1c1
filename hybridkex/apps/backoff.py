"""How long to wait before the next try."""

import random

from hybridkex.errors import ConfigError

__all__ = ["Backoff"]


class Backoff:
    """Exponential back-off with full jitter: many that were cut off at once do not come back at
    once.

    Args:
        first: the longest first wait, in seconds; it doubles each time.
        most: the longest wait of all.
    """

    def __init__(self, *, first: float = 0.5, most: float = 30.0) -> None:
        if not 0 < first <= most:
            raise ConfigError("the waits of a back-off are positive, the first the shortest")
        self._first = first
        self._most = most
        self.tries = 0

    def next(self) -> float:
        """Seconds to wait now."""
        longest = min(self._most, self._first * 2.0 ** min(self.tries, 60))
        self.tries += 1
        # Not less than a quarter: a zero would be no wait at all.
        return longest * random.uniform(0.25, 1.0)

    def reset(self) -> None:
        """It went well: begin anew."""
        self.tries = 0
