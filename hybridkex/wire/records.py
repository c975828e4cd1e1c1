"""Records on the wire (RFC 9846 section 5.1): cutting a byte stream into them.

A record begins with a five-byte header. :class:`RecordBuffer` returns views of the received bytes;
only a record that straddles two reads is copied, and at most one record is kept.
"""

from struct import Struct
from typing import Final

from hybridkex.constants import (
    LEGACY_VERSION,
    MAX_CIPHERTEXT_EXPANSION,
    MAX_PLAINTEXT,
    ContentType,
)
from hybridkex.errors import DecodeError, RecordOverflow, UnexpectedMessage
from hybridkex.reasons import Reason

HEADER_LENGTH: Final = 5
HEADER: Final = Struct(">BBxH")
"""Type, first byte of the version, and length."""
_WRITTEN_HEADER: Final = Struct(">BHH")
_LIMITS: Final = {int(type_): MAX_PLAINTEXT for type_ in ContentType} | {
    int(ContentType.APPLICATION_DATA): MAX_PLAINTEXT + MAX_CIPHERTEXT_EXPANSION
}


class Record:
    """One record: its type, its header (the AEAD's associated data) and its fragment."""

    __slots__ = ("fragment", "header", "type")

    def __init__(self, type_: int, header: memoryview, fragment: memoryview) -> None:
        self.type = type_
        self.header = header
        self.fragment = fragment


class RecordBuffer:
    """Received bytes that have not been taken yet."""

    __slots__ = ("_chunk", "_partial", "_position")

    def __init__(self) -> None:
        self._chunk = memoryview(b"")
        self._position = 0
        # The beginning of an incomplete record; usually empty.
        self._partial = bytearray()

    def keep(self) -> None:
        """Copy the bytes that have not been taken, so that the caller may change its buffer."""
        self._chunk = memoryview(bytes(self._chunk[self._position :]))
        self._position = 0

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Append received bytes. ``data`` must not change until it has been taken."""
        if self._position < len(self._chunk):
            left = self._chunk[self._position :]
            self._chunk = memoryview(b"".join((left, data)))
        else:
            self._chunk = memoryview(data)
        self._position = 0

    @property
    def pending(self) -> int:
        return len(self._partial) + len(self._chunk) - self._position

    def in_place(self) -> tuple[memoryview, int]:
        """The received bytes and the position of the next record, after :meth:`take` has returned a
        record; for a reader that parses the next records itself and then calls :meth:`skip`."""
        assert not self._partial  # a record that began in it has just been taken whole
        return self._chunk, self._position

    def skip(self, end: int) -> None:
        """The bytes of :meth:`in_place` have been taken up to ``end``."""
        self._position = end

    def drain(self) -> bytes:
        """Take all remaining bytes, unparsed."""
        left = bytes(self._partial) + bytes(self._chunk[self._position :])
        self._partial = bytearray()
        self._chunk = memoryview(b"")
        self._position = 0
        return left

    def take(self) -> Record | None:
        """The next whole record, or ``None`` until more has been fed.

        Raises:
            UnexpectedMessage: an unknown content type (section 5.1).
            DecodeError: the bytes are no TLS record at all.
            RecordOverflow: the record is too long (section 5.2).
        """
        if self._partial:
            return self._take_straddling()
        chunk, start = self._chunk, self._position
        size, body = len(chunk), start + HEADER_LENGTH
        if body > size:
            if start < size:
                self._set_aside()
            return None
        type_, length = _check_header(chunk, start)
        end = body + length
        if end > size:
            self._set_aside()
            return None
        self._position = end
        return Record(type_, chunk[start:body], chunk[body:end])

    def _set_aside(self) -> None:
        """Copy the beginning of a record and release the buffer that it arrived in."""
        self._partial += self._chunk[self._position :]
        self._chunk = memoryview(b"")
        self._position = 0

    def _take_straddling(self) -> Record | None:
        if not self._fill(HEADER_LENGTH):
            return None
        _, length = _check_header(self._partial, 0)
        if not self._fill(HEADER_LENGTH + length):
            return None
        whole = memoryview(self._partial)
        self._partial = bytearray()
        return Record(whole[0], whole[:HEADER_LENGTH], whole[HEADER_LENGTH:])

    def _fill(self, length: int) -> bool:
        missing = length - len(self._partial)
        if missing > 0:
            piece = self._chunk[self._position : self._position + missing]
            self._partial += piece
            self._position += len(piece)
        return len(self._partial) >= length


_OTHERS: Final = (
    (b"HTTP", "a plain HTTP response; is this the port without TLS?"),
    *(
        (start, "a PROXY protocol header; disable it at the load balancer (send-proxy)")
        for start in (b"PROXY", b"\r\n\r\n\0")
    ),
    (b"SSH-", "an SSH greeting"),
    (
        b"220",
        "the greeting of a mail or FTP server; it expects STARTTLS, or has another port for TLS",
    ),
    (b"+OK", "the greeting of a POP3 server; it expects STLS, or has another port for TLS"),
    (b"* OK", "the greeting of an IMAP server; it expects STARTTLS, or has another port for TLS"),
    *((method + b" ", "a plain HTTP request") for method in (b"GET", b"PUT", b"HEAD", b"POST")),
    *((method[:5], "a plain HTTP request") for method in (b"OPTIONS", b"CONNECT", b"DELETE")),
)


def _resemblance(start: bytes) -> str:
    """A description of a peer's first bytes that are not TLS, to complete a sentence."""
    for beginning, words in _OTHERS:
        if start.startswith(beginning):
            return f" but {words}"
    return ""


def _check_header(data: memoryview | bytearray, start: int) -> tuple[int, int]:
    """The type and the length that a record's header gives."""
    major: int
    type_, major, length = HEADER.unpack_from(data, start)
    # legacy_record_version is ignored (section 5.1) except its first byte, which reveals a peer
    # that does not speak TLS before we wait for the rest of its "record".
    if major != LEGACY_VERSION >> 8:
        raise DecodeError(f"these bytes are not TLS{_resemblance(bytes(data[start : start + 5]))}")
    if type_ not in _LIMITS:
        raise UnexpectedMessage(f"a record of unknown type {type_}", Reason.RECORD_TYPE)
    limit = _LIMITS[type_]
    if length > limit:
        raise RecordOverflow(f"a record of {length} bytes, where {limit} are allowed")
    return type_, length


def header(type_: int, length: int, version: int = LEGACY_VERSION) -> bytes:
    """The header of a record with ``length`` bytes to follow."""
    return _WRITTEN_HEADER.pack(type_, version, length)
