"""The transcript hash (RFC 9846 section 4.1)."""

from hybridkex.constants import MESSAGE_HASH
from hybridkex.crypto.suites import HashFunction

__all__ = ["Transcript"]


class Transcript:
    """A running hash over handshake messages, as bytes on the wire."""

    __slots__ = ("_digest", "_hash", "function")

    def __init__(self, function: HashFunction, *messages: bytes) -> None:
        self.function = function
        self._hash = function.new()
        self._digest: bytes | None = None
        for message in messages:
            self._hash.update(message)

    @classmethod
    def after_retry(cls, function: HashFunction, hello_digest: bytes, retry: bytes) -> "Transcript":
        """``message_hash(ClientHello1) || HelloRetryRequest``, from the digest of ClientHello1."""
        synthetic = bytes((MESSAGE_HASH, 0, 0, len(hello_digest))) + hello_digest
        return cls(function, synthetic, retry)

    def add(self, message: bytes) -> None:
        """Append one message."""
        self._digest = None
        self._hash.update(message)

    def digest(self) -> bytes:
        """The hash of everything so far."""
        if self._digest is None:
            self._digest = self._hash.digest()
        return self._digest

    def digest_with(self, more: bytes) -> bytes:
        """The hash as if ``more`` had been appended."""
        copy = self._hash.copy()
        copy.update(more)
        return copy.digest()
