"""The form of the tables that list the steps of a handshake: ``STEPS`` of client and server."""

from hybridkex.constants import HandshakeType
from hybridkex.values import value


@value
class Step:
    """One state of a handshake."""

    receives: tuple[HandshakeType, ...]
    """The messages that end it; if empty, it waits for our caller and reads nothing."""
    sends: tuple[HandshakeType, ...]
    """The messages that may be sent when it ends, in order."""
    then: tuple[type, ...]
    """The states that may follow."""
