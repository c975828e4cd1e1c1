"""A token bucket: a burst at once, and a rate in the long run."""

import time
from collections.abc import Callable


class TokenBucket:
    """Allows at most ``burst`` at once and ``rate`` per second in the long run.

    Args:
        rate: tokens a second; ``math.inf`` for no limit.
        burst: tokens that a full bucket holds; it is full at first.
        clock: returns seconds. Only :meth:`take` calls it, so a bucket may be made outside a loop.
    """

    def __init__(
        self, rate: float, burst: int, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate = rate
        self._burst = float(burst)
        self._clock = clock
        self._tokens = self._burst
        self._last: float | None = None

    def take(self) -> bool:
        """Take a token. Returns false if the bucket is empty."""
        now = self._clock()
        if self._last is not None:
            self._tokens = min(self._burst, self._tokens + (now - self._last) * self._rate)
        self._last = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    def fill(self) -> None:
        self._tokens = self._burst
