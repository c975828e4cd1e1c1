"""What the engine tells its caller."""

from dataclasses import dataclass
from typing import TypeAlias

from hybridkex.tls.session import Session, SessionTicket

__all__ = [
    "ApplicationData",
    "CloseReceived",
    "Event",
    "HandshakeCompleted",
    "KeyUpdated",
    "PskWanted",
    "TicketReceived",
]


@dataclass(frozen=True)
class HandshakeCompleted:
    """Both sides are sure of each other; application data may flow."""

    session: Session


@dataclass(frozen=True)
class PskWanted:
    """The handshake waits for an external PSK, until ``provide_psk`` is called.

    At a client: one to offer. At a server: one of those that the client offers and that are not in
    the configuration.
    """

    identities: tuple[bytes, ...]
    """As on the wire, in the client's order; imported ones decode with ``ImportedIdentity.decode``.
    Empty at a client."""


@dataclass(frozen=True)
class ApplicationData:
    """Data from the peer, in order; never empty."""

    data: bytearray


@dataclass(frozen=True)
class TicketReceived:
    """The server gave a ticket; it is in the session store already."""

    ticket: SessionTicket


@dataclass(frozen=True)
class KeyUpdated:
    """The peer changed to its next key."""

    generation: int


@dataclass(frozen=True)
class CloseReceived:
    """The peer has sent close_notify: no more data comes, and none is missing."""


Event: TypeAlias = (
    HandshakeCompleted | PskWanted | ApplicationData | TicketReceived | KeyUpdated | CloseReceived
)
