"""The transcript hash (RFC 9846 section 4.1)."""

from typing import Self

from hybridkex.constants import MESSAGE_HASH
from hybridkex.crypto.suites import HashFunction


class Transcript:
    """The hash of the handshake messages so far, as bytes on the wire.

    It is immutable: :meth:`add` returns a new object, so that a state of the handshake can keep its
    transcript while later states extend theirs.
    """

    __slots__ = ("_digest", "_hash", "function")

    def __init__(self, function: HashFunction, *messages: bytes) -> None:
        self.function = function
        self._hash = function.new(b"".join(messages))
        self._digest: bytes | None = None

    @classmethod
    def after_retry(cls, function: HashFunction, hello_digest: bytes, retry: bytes) -> "Transcript":
        """``message_hash(ClientHello1) || HelloRetryRequest``, from the digest of ClientHello1."""
        synthetic = bytes((MESSAGE_HASH, 0, 0, len(hello_digest))) + hello_digest
        return cls(function, synthetic, retry)

    def add(self, *messages: bytes) -> Self:
        longer = object.__new__(type(self))
        longer.function, longer._digest = self.function, None
        longer._hash = self._hash.copy()
        for message in messages:
            longer._hash.update(message)
        return longer

    def digest(self) -> bytes:
        if self._digest is None:
            self._digest = self._hash.digest()
        return self._digest
