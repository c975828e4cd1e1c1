"""Warnings before and after a certificate expires."""

from datetime import UTC, datetime, timedelta
from typing import Final

from cryptography import x509

SOON: Final = timedelta(days=14)
"""The time before expiry at which the owner of a certificate valid for months is warned."""
LAST_PART: Final = 3
"""A certificate that is valid for days is usually renewed when a third of its validity is left: the
owner is warned in the last third."""


def problem_of_expiry(
    name: str,
    certificate: x509.Certificate,
    now: datetime | None = None,
    *,
    remedy: str = "renew it",
) -> str | None:
    """A problem with the expiry date of a certificate, if there is one.

    Args:
        name: its name in the text, such as ``our own certificate cert.pem``.
        certificate: the certificate to check.
        now: the time; ``None`` reads the clock.
        remedy: the next step, for the end of the text.
    """
    now = now or datetime.now(UTC)
    warned_from, ends = _moments(certificate)
    if ends < now:
        return f"{name} expired on {ends:%Y-%m-%d}: {remedy}"
    if warned_from < now:
        return f"{name} expires on {ends:%Y-%m-%d}: {remedy}"
    return None


def seconds_to_next(certificate: x509.Certificate, now: datetime | None = None) -> float | None:
    """Seconds until the result of :func:`problem_of_expiry` changes; ``None`` if it never does."""
    now = now or datetime.now(UTC)
    return next(
        ((one - now).total_seconds() for one in _moments(certificate) if one >= now),
        None,
    )


def _moments(certificate: x509.Certificate) -> tuple[datetime, datetime]:
    """The time of the first warning and the end of validity."""
    ends = certificate.not_valid_after_utc
    life = ends - certificate.not_valid_before_utc
    return ends - min(SOON, life / LAST_PART), ends
