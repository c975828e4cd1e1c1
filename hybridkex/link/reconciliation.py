"""The interface of an error correction; :mod:`~hybridkex.link.cascade` implements it.

Bob makes Bob's key equal Alice's: Bob sends requests, and Alice answers each with bits about
Alice's key. The method defines the format of both. A method with one message from Alice has one
request.

Both count what the messages disclosed. The secret length depends on these counts, so a block whose
two ends count differently is aborted.
"""

import numbers
from collections.abc import Generator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hybridkex.errors import ConfigError
from hybridkex.fields import described

Bits = NDArray[np.uint8]


class ReconciliationError(Exception):
    """The other party's messages contradict each other, or request parities that do not exist."""


def checked(must: str, value: Any, fits: bool) -> Any:
    """What a method gave, if it fits. Raises ``ConfigError``; ``must``: what is right."""
    if not fits:
        raise ConfigError(f"{must}, not {described(value)}")
    return value


@dataclass(frozen=True, kw_only=True)
class Correction:
    """Bob's result of error correction. Raises ``ConfigError``."""

    disclosed: int
    """Bits about Alice's key that Alice disclosed."""
    announced: int
    """Bits about Bob's key that the requests disclosed."""

    def __post_init__(self) -> None:
        for name, count in asdict(self).items():
            whole = isinstance(count, numbers.Integral) and not isinstance(count, bool)
            checked(f"{name} must be an int", count, whole)
            if not 0 <= count < 1 << 63:
                raise ConfigError(f"{name} must be at least 0 and below 2^63")
            object.__setattr__(self, name, int(count))  # not numpy's


class Responder(Protocol):
    """Alice's side for one key."""

    @property
    def disclosed(self) -> int:
        """Bits about Alice's key disclosed so far; in the end the number that Bob returns."""

    @property
    def announced(self) -> int:
        """Bits about Bob's key that the requests disclosed so far, likewise."""

    def answer(self, request: bytes) -> bytes:
        """The answer. Raises :class:`ReconciliationError` for a request that Bob would not send."""


class Reconciler(Protocol):
    """A method of error correction."""

    @property
    def name(self) -> str:
        """The name in reports and in the digest of the settings."""

    def respond(self, key: Bits, error_rate: float) -> Responder:
        """Alice's side for this key, and an estimate of the share of wrong bits that both have."""

    def correct(self, key: Bits, error_rate: float) -> Generator[bytes, bytes, Correction]:
        """Bob's side: yields requests, is sent the answers, corrects ``key`` in place.

        Raises :class:`ReconciliationError` when the answers contradict each other.
        """
