"""The task of one end of a connection, and its report.

Peers in another language (``agents/``) get both as JSON over a pipe, so they hold plain values.
Every end runs the same conversation: ``size`` bytes of a known text each way, then close_notify
from both, then the end of the transport.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

__all__ = ["Material", "Psk", "Report", "Role", "Task", "digest", "text"]

Role = Literal["client", "server"]


@dataclass(frozen=True, kw_only=True)
class Material:
    """A certificate chain and its key, as PEM files."""

    name: str
    chain: str
    key: str
    fingerprint: str
    """SHA-256 of the leaf (DER), in hexadecimal."""


@dataclass(frozen=True, kw_only=True)
class Psk:
    """An external pre-shared key for SHA-256."""

    identity: str
    key: str
    """The key in hexadecimal."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One end's part in a case.

    Args:
        id: ties answers to tasks.
        role: which end this is.
        port: for a client, where its server listens on 127.0.0.1; a server takes any.
        connections: one after the other; the second resumes the session of the first.
        groups: names of the IANA registry, the one with a share first; empty for the peer's own.
        shares: how many of the groups are offered with a share.
        suites: names; empty for the peer's own.
        own: the certificate to show.
        expected: the certificate that the other end shows.
        other: the certificate of a server for the name that is ``other.name``.
        ca: the authority of the other end's certificate: a client verifies the server's, a server
            that has one asks for a certificate.
        server_name: what the client asks for and verifies.
        alpn: in order of preference.
        psk: instead of certificates.
        context: to import the PSK with (RFC 9258), in hexadecimal.
        size: bytes each way.
        first: who speaks before the other does; ``None`` lets both speak at once.
        half_close: who speaks first closes its direction at once, and the other speaks after that.
        update: send KeyUpdate in the middle, asking for the other's.
        exporter: the label of an exporter of 32 bytes, with an empty context.
        fresh_keys: hybridkex offers Extended Key Update, or would take it.
    """

    id: int
    role: Role
    port: int = 0
    connections: int = 1
    groups: tuple[str, ...] = ()
    shares: int = 1
    suites: tuple[str, ...] = ()
    own: Material | None = None
    expected: Material | None = None
    other: Material | None = None
    ca: str | None = None
    server_name: str | None = None
    alpn: tuple[str, ...] = ()
    psk: Psk | None = None
    context: str | None = None
    size: int = 0
    first: Role | None = None
    half_close: bool = False
    update: bool = False
    exporter: str = ""
    fresh_keys: bool = False


@dataclass(frozen=True, kw_only=True)
class Report:
    """The report of one end about one connection; ``None`` where its library does not tell."""

    group: str | None = None
    suite: str | None = None
    alpn: str | None = None
    """The ALPN protocol; empty if none was negotiated."""
    resumed: bool | None = None
    server_name: str | None = None
    peer: str | None = None
    """SHA-256 of the certificate that the other end presented."""
    exporter: str | None = None
    key_log: tuple[str, ...] | None = None
    received: str | None = None
    """SHA-256 of the text that the other end sent."""
    retried: bool | None = None
    """Whether there was a HelloRetryRequest."""
    updates: int | None = None
    """Number of KeyUpdates that the other end sent."""


@lru_cache(maxsize=8)
def text(role: Role, size: int) -> bytes:
    """Return the text that an end of this role sends: numbered lines, cut at ``size`` bytes."""
    lines = -(-size // len(f"{role} {0:08d}\n"))
    return "".join(f"{role} {number:08d}\n" for number in range(lines)).encode()[:size]


def digest(data: bytes) -> str:
    """Return the digest of a text, in the form of the reports."""
    return hashlib.sha256(data).hexdigest()
