"""The base of all handshake messages (RFC 9846 section 4)."""

from typing import ClassVar

from hybridkex.constants import HandshakeType
from hybridkex.wire.codec import Reader

__all__ = ["Message"]


class Message:
    """What every handshake message has."""

    type: ClassVar[HandshakeType]

    @classmethod
    def read(cls, reader: Reader) -> "Message":
        """Parse the body; the caller checks that nothing is left over."""
        raise NotImplementedError

    def body(self) -> bytes:
        """The body, without the header."""
        raise NotImplementedError
