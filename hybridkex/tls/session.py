"""The result of a handshake, and the tickets that a client stores to resume it."""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, Protocol, runtime_checkable

from hybridkex.auth import Presented
from hybridkex.auth.names import PIN
from hybridkex.constants import CertificateType
from hybridkex.crypto.suites import CipherSuite
from hybridkex.errors import ConfigError
from hybridkex.fields import check_fields, checked_clock
from hybridkex.secret import Secret
from hybridkex.text import printable
from hybridkex.tls.epochs import Epoch, KeyUpdates
from hybridkex.tls.policy import Policy, Requirement
from hybridkex.values import value
from hybridkex.wire.extensions import Extension

MAX_TICKET_LIFETIME: Final = 7 * 24 * 3600
"""Seconds (RFC 9846 section 4.7.1)."""


class AuthenticatedBy(Enum):
    """What authenticated the server, and also the client if there is a PSK."""

    CERTIFICATE = "certificate"
    PSK = "psk"
    BOTH = "certificate+psk"
    NOTHING = "nothing"
    """The caller turned certificate verification off."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """The properties of a connection: where its keys come from, and who the peer is."""

    cipher_suite: str
    """Its name, for example ``TLS_AES_256_GCM_SHA384``."""
    group: str
    """The name of the key exchange."""
    parts: tuple[str, ...]
    """The component key exchanges of the group, in the order of its key share."""
    post_quantum: bool
    """Whether a component is post-quantum."""
    authenticated_by: AuthenticatedBy
    """What authenticated the server."""
    signature_scheme: str | None
    """The scheme of the server's signature; ``None`` if it made none (PSK, resumption)."""
    psk_identity: bytes | None
    """The external PSK in the key schedule: of this handshake or of the one that it resumes."""
    resumed: bool
    """Whether a ticket resumed an earlier session."""
    began_at: float
    """The time of the full handshake, in seconds since the epoch; a resumed session has the time of
    the full handshake at the start of its chain of resumptions."""
    alpn: str | None
    """The application protocol; ``None`` if none was negotiated."""
    server_name: str | None
    """The name that the client asked for; ``None`` if it asked for none."""
    peer_credential: Presented | None
    """The peer's certificate or raw public key; a resumed session has that of the full
    handshake."""
    policy: Policy
    """The policy of our side."""
    psk_context: bytes | None = None
    """The context of the PSK's import (RFC 9258); ``None`` for a plain PSK."""
    psk_origin: object = field(default=None, repr=False, compare=False)
    """:attr:`ExternalPsk.origin` of the PSK, unchanged; ``None`` after a resumption."""
    qkd_key_ids: tuple[str, ...] = ()
    """The IDs of the QKD keys in the key schedule."""
    qkd_sources: tuple[str, ...] = ()
    """The two KMEs of each key; the first is that of the side that requested the key."""
    qkd_fallback: str | None = None
    """Why there is no QKD key although our policy prefers one."""
    verified_by: str | None = None
    """Why :attr:`peer_credential` was accepted: ``ca``, ``pin``, ``known``, ``first use``,
    ``openpgp`` or ``insecure``."""
    vouched_names: tuple[str, ...] = ()
    """The names of the peer that a trusted party vouches for, in canonical form; none if its key is
    pinned or nothing was verified. Base decisions on these or on :meth:`peer_is_one_of`, never on
    the names in :attr:`peer_credential`, which the peer may have chosen itself."""
    extensions: tuple[Extension, ...] = field(default=(), repr=False)
    """The peer's values of the extensions that the configuration adds: at a client the server's
    answers, at a server the client's offers that it answered."""
    version: str = "TLS 1.3"
    """The version of TLS."""
    key_updates: KeyUpdates = KeyUpdates.STANDARD
    """The negotiated kind of key updates during the session."""
    one_time_pad: bool = False
    """Whether application data is protected by a one-time pad of QKD keys, as both sides have
    agreed."""
    epochs: tuple[Epoch, ...] = ()
    """The epochs of the last 64 Extended Key Updates; a KeyUpdate begins no epoch."""

    @property
    def epoch(self) -> int:
        """The epoch of the keys in use; the handshake begins epoch 0."""
        return self.epochs[-1].number if self.epochs else 0

    @property
    def peer_subject(self) -> str | None:
        """The subject of the peer's certificate (RFC 4514)."""
        return self.peer_credential.subject if self.peer_credential is not None else None

    @property
    def peer_is_known(self) -> bool:
        """Whether the peer has proved its identity: by a PSK, or by a key that an authority, a pin
        or an earlier connection vouches for."""
        return self.psk_identity is not None or self.verified_by not in (
            None,
            "first use",
            "insecure",
        )

    def peer_is_one_of(self, names: Collection[str]) -> bool:
        """Whether a list of names contains the peer.

        Args:
            names: canonical (:func:`~hybridkex.auth.names.canonical_peer_name`): DNS names, IP
                addresses and URIs that a trusted party vouches for, or ``sha256:`` and the pin of
                a key.
        """
        shown = self.peer_credential
        return shown is not None and (
            PIN + shown.pin in names or any(name in names for name in self.vouched_names)
        )

    def as_json(self) -> dict[str, object]:
        """A dictionary of JSON values with stable keys, for a log or a command line."""
        identity = self.psk_identity
        return {
            "version": self.version,
            "cipher_suite": self.cipher_suite,
            "group": self.group,
            "parts": list(self.parts),
            "signature_scheme": self.signature_scheme,
            "alpn": self.alpn,
            "psk_identity": _shown(identity) if identity else None,
            "auth": self.authenticated_by.value,
            "resumed": self.resumed,
            "peer_subject": self.peer_subject,
            "verified_by": self.verified_by,
            "vouched_names": list(self.vouched_names),
            "qkd_key_ids": list(self.qkd_key_ids),
            "qkd_sources": list(self.qkd_sources),
            "qkd_fallback": self.qkd_fallback,
            "key_updates": self.key_updates.value,
            "one_time_pad": self.one_time_pad,
            "epoch": self.epoch,
            "epochs": [one.as_json() for one in self.epochs],
            "policy": self.policy.as_json(),
        }

    def __str__(self) -> str:
        legs = " + ".join(self.parts)
        if self.qkd_key_ids:
            legs += f" + QKD {', '.join(self.qkd_key_ids)} of {', '.join(self.qkd_sources)}"
        elif self.psk_identity is not None:
            legs += f" + PSK '{_shown(self.psk_identity)}'"
        lines = [
            f"{self.version}, {self.cipher_suite}, {self.group}",
            f"  keys from:     {legs}" + (" (resumed)" if self.resumed else ""),
            f"  authenticated: {self.authenticated_by.value}"
            + (f", {self.signature_scheme}" if self.signature_scheme else ""),
        ]
        if self.qkd_fallback is not None:
            lines.append(f"  NO QKD KEY:    {self.qkd_fallback}")
        lines += self._about_updates() + self._about_the_pad()
        if self.peer_subject is not None:
            lines.append(f"  peer:          {self.peer_subject} ({self.verified_by})")
        if self.alpn is not None:
            lines.append(f"  ALPN:          {self.alpn}")
        return "\n".join(lines)

    def _about_the_pad(self) -> list[str]:
        if self.one_time_pad:
            return ["  data:          under a one-time pad of QKD keys, with Poly1305 tags"]
        if self.policy.one_time_pad in (None, Requirement.OFF):
            return []
        return ["  NO ONE-TIME PAD: the peer does not support it"]

    def _about_updates(self) -> list[str]:
        if self.key_updates is KeyUpdates.STANDARD:
            if self.policy.fresh_keys in (None, Requirement.OFF):
                return []
            return ["  NO FRESH KEYS: the peer supports only KeyUpdate"]
        line = f"  fresh keys:    epoch {self.epoch}"
        if self.epochs:
            last = self.epochs[-1]
            line += f", {last.group}"
            if last.qkd_key_ids:
                line += f" + QKD {', '.join(last.qkd_key_ids)}"
            elif last.qkd_missing is not None:
                line += f", NO QKD KEY: {last.qkd_missing}"
        return [line]


def _shown(identity: bytes) -> str:
    return printable(identity.decode("ascii", "backslashreplace"))


@value(kw_only=True)
class SessionTicket:
    """The data that a client stores to resume a session (RFC 9846 section 4.7.1)."""

    ticket: bytes
    psk: Secret
    suite: CipherSuite
    age_add: int
    lifetime: int
    """Seconds from ``received_at``."""
    received_at: float
    """Seconds since the epoch."""
    server_name: str | None
    chain: tuple[bytes, ...]
    """The server's certificates, to be verified again when the ticket is used."""
    authenticated_by: AuthenticatedBy
    psk_identity: bytes | None
    psk_context: bytes | None
    began_at: float
    """The time of the full handshake, in seconds since the epoch."""
    binding: bytes
    """The binding of the session: a hash of the policy, the PSKs and the identity of its
    configuration."""
    certificate_type: int = CertificateType.X509
    """The type of :attr:`chain`: certificates, or one raw public key."""

    def usable(self, now: float) -> bool:
        """Whether the ticket has not expired and the clock has not been set back."""
        return 0 <= now - self.received_at < min(self.lifetime, MAX_TICKET_LIFETIME)

    def obfuscated_age(self, now: float) -> int:
        """The age in milliseconds, masked (section 4.3.11.1)."""
        return (int((now - self.received_at) * 1000) + self.age_add) % (1 << 32)


@runtime_checkable
class TicketStore(Protocol):
    """A store of a client's tickets. Each ticket is used once (RFC 9846 appendix C.4).

    The engine calls :meth:`put` and :meth:`take`, so they must not do I/O. A store with a file
    implements :class:`FlushableTicketStore` too.
    """

    def put(self, server: str, ticket: SessionTicket) -> None:
        """Store a ticket for this server."""

    def take(self, server: str, binding: bytes | None = None) -> SessionTicket | None:
        """Remove and return the newest usable ticket for this server.

        Args:
            binding: only tickets with this binding; others stay. ``None`` takes any.
        """


@runtime_checkable
class FlushableTicketStore(Protocol):
    """A ticket store with a file. The shell writes it, since the engine does no I/O."""

    def flush(self) -> None:
        """Write what has changed. Called in a worker thread: before a ClientHello is sent, after
        the handshake, and after a ticket was received.

        Raises:
            ConfigError: the file cannot be written, and may still contain a ticket that was taken.
                The handshake fails, since that ticket could be used twice.
        """


@dataclass
class MemoryTicketStore:
    """Tickets in memory: the newest few per server, for the servers used most recently.

    Args:
        max_servers: the number of servers, 1 or more; those used longest ago are forgotten.
        tickets_per_server: the number of tickets for each server, 1 or more.
        clock: seconds since the epoch.

    Raises:
        ConfigError: a field has the wrong type, or a number is below 1.
    """

    max_servers: int = 1000
    tickets_per_server: int = 4
    clock: Callable[[], float] = time.time
    _tickets: dict[str, list[SessionTicket]] = field(default_factory=dict, init=False, repr=False)
    """A method removes the tickets of a server before it changes them: several threads may share
    the store."""

    def __post_init__(self) -> None:
        check_fields(self, {"clock": "MemoryTicketStore(clock=time.time)"})
        self.clock = checked_clock(self.clock)
        if self.max_servers < 1 or self.tickets_per_server < 1:
            raise ConfigError("max_servers and tickets_per_server must be 1 or more")

    def put(self, server: str, ticket: SessionTicket) -> None:
        """Store a ticket for ``server``; the oldest ones are discarded if there are too many."""
        kept = [*self._tickets.pop(server, []), ticket]
        self._tickets[server] = kept[-self.tickets_per_server :]
        if len(self._tickets) > self.max_servers:
            for oldest in list(self._tickets)[: -self.max_servers]:
                self._tickets.pop(oldest, None)

    def take(self, server: str, binding: bytes | None = None) -> SessionTicket | None:
        """Remove and return the newest usable ticket of ``server`` with this binding."""
        now = self.clock()
        kept = [ticket for ticket in self._tickets.pop(server, []) if ticket.usable(now)]
        fitting = [
            place for place, one in enumerate(kept) if binding is None or binding == one.binding
        ]
        taken = kept.pop(fitting[-1]) if fitting else None
        if kept:
            self._tickets[server] = kept
        return taken
