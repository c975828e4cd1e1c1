"""The events that the engine emits."""

from typing import TypeAlias

from hybridkex.auth import VerifiedPeer
from hybridkex.tls.epochs import Epoch
from hybridkex.tls.session import Session, SessionTicket
from hybridkex.values import value

__all__ = [
    "ApplicationData",
    "CloseReceived",
    "EpochBegan",
    "Event",
    "HandshakeCompleted",
    "KeyUpdated",
    "PadKeyWanted",
    "PskWanted",
    "SessionProposed",
    "TicketReceived",
    "UpdateDeclined",
    "UpdateKeyWanted",
    "UpdateWanted",
]


@value
class SessionProposed:
    """The peer's Finished has been verified, and the handshake waits for a decision.

    Call :meth:`~hybridkex.tls.connection.Connection.accept` or
    :meth:`~hybridkex.tls.connection.Connection.abort`. Until then the engine sends nothing (a
    client not even its Finished) and reads nothing: no application data, no ticket.
    """

    session: Session
    """The session that the connection would have. It satisfies the policy of the configuration."""
    peer: VerifiedPeer | None
    """Who the peer is, if it showed a certificate or a raw public key. If ``peer.remember`` is
    set, call it before accepting; it may write a file."""


@value
class HandshakeCompleted:
    """The session has been accepted; application data may flow."""

    session: Session


@value
class PskWanted:
    """The handshake waits for an external PSK, until ``provide_psk`` is called.

    At a client: one to offer. At a server: one of those that the client offers and that are not in
    the configuration.
    """

    identities: tuple[bytes, ...]
    """As on the wire, in the client's order; imported ones decode with ``ImportedIdentity.decode``.
    Empty at a client."""


@value
class ApplicationData:
    """Data from the peer, in order; never empty."""

    data: bytes


@value
class TicketReceived:
    """The server gave a ticket; it is in the ticket store already, which the shell may have to
    bring to disk."""

    ticket: SessionTicket


@value
class KeyUpdated:
    """The peer changed to its next key."""

    generation: int


@value
class UpdateKeyWanted:
    """The peer's key update names a QKD key: call ``provide_update_key``. Data flows meanwhile."""

    identity: bytes
    """An encoded ``ImportedIdentity``."""
    epoch: int
    """The epoch that the update makes."""


@value
class PadKeyWanted:
    """The peer has appended a QKD key to the one-time pad of its direction: call
    ``provide_pad_key``, in the order of these events. What does not need the key flows meanwhile.
    """

    identity: bytes
    """Its ``QkdIdentity``."""


@value
class UpdateDeclined:
    """The peer has declined our key update; another one may be started."""

    reason: str
    """``key_not_found`` or ``key_required``."""


@value
class UpdateWanted:
    """Our key has protected half of the records that it may: start a key update."""


@value
class EpochBegan:
    """A key update is complete; :attr:`~hybridkex.Session.epochs` has it too."""

    epoch: Epoch


@value
class CloseReceived:
    """The peer has sent close_notify: no more data comes, and none is missing."""


Event: TypeAlias = (
    SessionProposed
    | HandshakeCompleted
    | PskWanted
    | ApplicationData
    | TicketReceived
    | KeyUpdated
    | UpdateKeyWanted
    | PadKeyWanted
    | UpdateDeclined
    | UpdateWanted
    | EpochBegan
    | CloseReceived
)
