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
    client does not send its Finished) and reads nothing: no application data, no ticket.
    """

    session: Session
    """The session that the connection will have if it is accepted. It satisfies the policy of the
    configuration."""
    peer: VerifiedPeer | None
    """The peer, if it presented a certificate or a raw public key. If ``peer.remember`` is set,
    call it before accepting; it may write a file."""


@value
class HandshakeCompleted:
    """The session has been accepted; application data may be sent and received."""

    session: Session
    """What was negotiated, and who the peer is."""


@value
class PskWanted:
    """The handshake waits for an external PSK, until ``provide_psk`` is called.

    A client needs one to offer; a server needs one that the client offers and that is not in the
    configuration.
    """

    identities: tuple[bytes, ...]
    """The identities as on the wire, in the client's order; ``ImportedIdentity.decode`` parses
    imported ones. Empty at a client."""


@value
class ApplicationData:
    """Data from the peer, in order; never empty."""

    data: bytes
    """The bytes."""


@value
class TicketReceived:
    """The server sent a ticket; it is in the ticket store, which the shell may have to write to
    disk."""

    ticket: SessionTicket
    """For the ticket store of the next connection."""


@value
class KeyUpdated:
    """The peer changed to its next key."""

    generation: int
    """The number of key updates in the peer's direction so far."""


@value
class UpdateKeyWanted:
    """The peer's key update names a QKD key: call ``provide_update_key``. Data can be sent and
    received meanwhile."""

    identity: bytes
    """An encoded ``ImportedIdentity``."""
    epoch: int
    """The number of the epoch that the update begins."""


@value
class PadKeyWanted:
    """The peer has appended a QKD key to the one-time pad of its direction: call
    ``provide_pad_key``, in the order of these events. Data that does not need the key can be sent
    and received meanwhile.
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
    """What the update has changed."""


@value
class CloseReceived:
    """The peer has sent close_notify: all its data has been received."""


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
