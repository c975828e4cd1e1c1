"""The base of all handshake messages (RFC 9846 section 4)."""

from typing import ClassVar

from hybridkex.constants import HandshakeType
from hybridkex.wire.layout import Laid


class Message(Laid):
    """The base class of handshake messages."""

    type: ClassVar[HandshakeType]
