"""Warnings about certificates that expire while a service runs: its own and those of its peers."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from cryptography import x509

from hybridkex.crypto.expiry import problem_of_expiry, seconds_to_next

CHECK_EVERY: Final = 3600.0
"""The maximum number of seconds between two readings of the clock, which may be set while the
machine sleeps or runs."""
REMEMBERED: Final = 8
"""The number of texts per holder that are remembered so as not to repeat them: a holder may use
several certificates at the same time."""


@dataclass(kw_only=True)
class _Watched:
    """The certificate that a holder used last."""

    name: str
    certificate: x509.Certificate
    remedy: str
    reported: deque[str] = field(default_factory=lambda: deque(maxlen=REMEMBERED))


class ExpiryWatch:
    """Reports when a certificate is about to expire and when it has expired, each once.

    Args:
        report: called with each text.
    """

    def __init__(self, report: Callable[[str], object]) -> None:
        self._report = report
        self._holders: dict[str, _Watched] = {}

    def watch_own(self, file: object, certificate: x509.Certificate) -> None:
        """Watch a certificate of our own; ``file`` is where it comes from."""
        self._watch(f"our own certificate {file}", certificate, "renew it")

    def watch_peer(self, who: str, certificate: x509.Certificate) -> None:
        """Watch the certificate that a peer presents, in place of its earlier one.

        ``who`` is one of a bounded number of peers, such as ``SAE alice``.
        """
        remedy = "its owner must renew it, since it is refused from then on"
        self._watch(f"the certificate of {who}", certificate, remedy)

    def _watch(self, name: str, certificate: x509.Certificate, remedy: str) -> None:
        watched = self._holders.get(name)
        if watched is None:
            watched = _Watched(name=name, certificate=certificate, remedy=remedy)
            self._holders[name] = watched
        watched.certificate = certificate
        self._check_one(watched)

    def check(self) -> float:
        """Report what is due. Returns the seconds until the next call."""
        next_checks = [CHECK_EVERY]
        for watched in self._holders.values():
            self._check_one(watched)
            left = seconds_to_next(watched.certificate)
            if left is not None:
                next_checks.append(left + 1)
        return min(next_checks)

    def _check_one(self, watched: _Watched) -> None:
        problem = problem_of_expiry(watched.name, watched.certificate, remedy=watched.remedy)
        if problem is not None and problem not in watched.reported:
            watched.reported.append(problem)
            self._report(problem)
