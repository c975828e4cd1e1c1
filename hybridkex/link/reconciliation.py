"""The interface of an error correction; :mod:`~hybridkex.link.cascade` implements it.

Bob makes Bob's key equal Alice's: Bob sends requests, and Alice answers each with bits about
Alice's key. The method defines the format of both. A method with one message from Alice has one
request.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.uint8]


class ReconciliationError(Exception):
    """The other party's messages contradict each other, or request parities that do not exist."""


@dataclass(frozen=True, kw_only=True)
class Correction:
    """Bob's result of error correction."""

    disclosed: int
    """Bits about Alice's key that Alice disclosed."""
    announced: int
    """Bits about Bob's key that the requests disclosed."""


class Responder(Protocol):
    """Alice's side for one key."""

    @property
    def disclosed(self) -> int:
        """Bits about Alice's key disclosed so far."""

    @property
    def announced(self) -> int:
        """Bits about Bob's key that the requests disclosed so far."""

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
