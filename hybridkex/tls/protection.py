"""Record protection (RFC 9846 section 5.2 to 5.5): plaintext to records and back.

Both directions process many records per call and write into one buffer per call, since an AEAD call
costs microseconds and so would each copy of 16 KiB.
"""

from struct import Struct
from typing import Final, Protocol

from cryptography.exceptions import InvalidTag

from hybridkex.constants import LEGACY_VERSION, MAX_PLAINTEXT, ContentType
from hybridkex.crypto.schedule import TrafficSecret
from hybridkex.crypto.suites import IV_LENGTH, TAG_LENGTH
from hybridkex.errors import BadRecordMac, RecordOverflow
from hybridkex.wire.records import HEADER, HEADER_LENGTH, Record, RecordBuffer, header

_OVERHEAD: Final = 1 + TAG_LENGTH
FULL_RECORD: Final = HEADER_LENGTH + MAX_PLAINTEXT + _OVERHEAD
"""The length in bytes of a full record without padding. In a bulk transfer, a read of a multiple of
this ends at a record boundary, so that no record is assembled from two reads."""
_HEADER: Final = Struct(">BHH")
_TYPES: Final = tuple(bytes((value,)) for value in range(256))
SMALL: Final = 2048
"""The maximum content length, in bytes, for the fast path of short records."""
_OUTER_TYPE: Final = int(ContentType.APPLICATION_DATA)
_APPLICATION_DATA: Final = bytes((_OUTER_TYPE,))
_MAJOR_VERSION: Final = LEGACY_VERSION >> 8
_READ_HEADER: Final = HEADER.unpack
_SMALL_INNER: Final = SMALL + 1
_KEEP_FREE: Final = 16
"""The number of records under a key that are reserved for alerts and for KeyUpdate itself."""

_DAMAGED: Final = "a record does not decrypt: it was modified in transit"
_DAMAGED_OR_OTHER_KEY: Final = (
    "the first record under a new key does not decrypt: it was modified in transit, or the two "
    "ends have different keys; if they use QKD keys, check that both KMEs belong to the same link"
)


class Padding(Protocol):
    """Chooses the number of padding zeros of a record (section 5.4)."""

    def __call__(self, length: int, limit: int, /) -> int:
        """The number of zeros to append to ``length`` bytes of content; both together are at most
        ``limit``."""


class WriteProtection:
    """The key of our direction and the number of records that it has protected."""

    __slots__ = (
        "_aead",
        "_iv",
        "_last",
        "_scratch",
        "_sequence",
        "_update_at",
        "padding",
        "traffic",
    )

    def __init__(self, traffic: TrafficSecret, padding: Padding | None = None) -> None:
        key, iv = traffic.key_and_iv()
        self.traffic = traffic
        self.padding = padding
        self._aead = traffic.suite.aead(key)
        self._iv = int.from_bytes(iv, "big")
        self._sequence = 0
        self._update_at = self._last = traffic.suite.record_limit - _KEEP_FREE
        # The AEAD takes content and content type as one buffer, which needs the only copy here.
        self._scratch = memoryview(b"")

    @property
    def remaining(self) -> int:
        """Records of application data that this key may still protect (section 5.5)."""
        return self._last - self._sequence

    @property
    def update_due(self) -> bool:
        """Whether the key must be updated before the next record of application data."""
        return self._sequence >= self._update_at

    def update_early(self) -> None:
        """Make the update due at half of the limit: it takes a round trip."""
        self._update_at = self._last // 2

    def updated(self) -> "WriteProtection":
        return WriteProtection(self.traffic.updated(), self.padding)

    def seal(self, type_: int, content: memoryview, limit: int) -> bytes | bytearray:
        """Protect ``content`` in as many records as it needs; empty content makes one record.

        Args:
            type_: the content type.
            content: of any length; the caller checks :attr:`remaining`.
            limit: bytes of content in one record.
        """
        if len(content) <= SMALL and len(content) <= limit and self.padding is None:
            return self._seal_inner(b"".join((content, _TYPES[type_])))
        pieces = max(1, -(-len(content) // limit))
        if self.padding is not None:
            return bytearray().join(
                self._seal_padded(type_, content[start : start + limit], limit, self.padding)
                for start in range(0, pieces * limit, limit)
            )
        out = bytearray(len(content) + pieces * (HEADER_LENGTH + _OVERHEAD))
        view, encrypt = memoryview(out), self._aead.encrypt_into
        inner, size = self._scratch, len(self._scratch) - 1
        head, position = b"", 0
        for start in range(0, pieces * limit, limit):
            piece = content[start : start + limit]
            if len(piece) != size or not head:
                size = len(piece)
                if len(inner) != size + 1:
                    inner = self._scratch = memoryview(bytearray(size + 1))
                inner[size] = type_
                head = header(_OUTER_TYPE, size + _OVERHEAD)
            inner[:size] = piece  # A bytearray would copy twice here.
            body = position + HEADER_LENGTH
            view[position:body] = head
            position = body + size + _OVERHEAD
            nonce = self._iv ^ self._sequence
            encrypt(nonce.to_bytes(IV_LENGTH, "big"), inner, head, view[body:position])
            self._sequence += 1
        return out

    def seal_one(self, data: bytes) -> bytes | None:
        """Protect application data in one record: :meth:`seal` for a short message.

        The caller ensures that there is no :attr:`padding` and that the peer takes records of
        :data:`SMALL` bytes.

        Returns:
            The record; ``None`` if ``data`` is empty or longer than :data:`SMALL`, or if the key
            has to be updated first.
        """
        if not 0 < len(data) <= SMALL or self._sequence >= self._update_at:
            return None
        return self._seal_inner(data + _APPLICATION_DATA)

    def _seal_inner(self, inner: bytes) -> bytes:
        """One record. Copying so few bytes costs less than the buffers of :meth:`seal`."""
        head = _HEADER.pack(_OUTER_TYPE, LEGACY_VERSION, len(inner) + TAG_LENGTH)
        nonce = (self._iv ^ self._sequence).to_bytes(IV_LENGTH, "big")
        self._sequence += 1
        return head + self._aead.encrypt(nonce, inner, head)

    def _seal_padded(
        self, type_: int, content: memoryview, limit: int, padding: Padding
    ) -> bytearray:
        zeros = max(0, min(padding(len(content), limit), limit - len(content)))
        inner = b"%b%c%b" % (bytes(content), type_, bytes(zeros))
        head = header(_OUTER_TYPE, len(inner) + TAG_LENGTH)
        out = bytearray(HEADER_LENGTH + len(inner) + TAG_LENGTH)
        out[:HEADER_LENGTH] = head
        nonce = (self._iv ^ self._sequence).to_bytes(IV_LENGTH, "big")
        self._aead.encrypt_into(nonce, inner, head, memoryview(out)[HEADER_LENGTH:])
        self._sequence += 1
        return out


class ReadProtection:
    """The key of the peer's direction and the number of records that it has opened."""

    __slots__ = ("_aead", "_iv", "_sequence", "limit", "traffic")

    def __init__(self, traffic: TrafficSecret, limit: int = MAX_PLAINTEXT + 1) -> None:
        """``limit``: the maximum of content, type and padding in one record, in bytes (RFC 8449
        section 4)."""
        key, iv = traffic.key_and_iv()
        self.traffic = traffic
        self._aead = traffic.suite.aead(key)
        self._iv = int.from_bytes(iv, "big")
        self.limit = limit
        self._sequence = 0

    @property
    def opened(self) -> int:
        """The number of records opened under this key."""
        return self._sequence

    def updated(self) -> "ReadProtection":
        return ReadProtection(self.traffic.updated(), self.limit)

    def open(self, record: Record, out: memoryview) -> int:
        """Decrypt into the start of ``out``; returns the bytes of the inner plaintext.

        ``out`` must hold at least ``len(record.fragment) - 16`` bytes.

        Raises:
            BadRecordMac: forged, damaged, or out of order.
            RecordOverflow: the inner plaintext is longer than we allow.
        """
        fragment = record.fragment
        size = len(fragment) - TAG_LENGTH
        if size < 0:
            raise BadRecordMac("a protected record is shorter than its tag and content type")
        nonce = (self._iv ^ self._sequence).to_bytes(IV_LENGTH, "big")
        try:
            self._aead.decrypt_into(nonce, fragment, record.header, out[:size])
        except InvalidTag:
            raise BadRecordMac(_DAMAGED if self._sequence else _DAMAGED_OR_OTHER_KEY) from None
        if size > self.limit:
            raise RecordOverflow(
                f"a record with {size} bytes of inner plaintext, where {self.limit} are allowed"
            )
        self._sequence += 1
        return size

    def open_one(self, head: memoryview, fragment: memoryview) -> bytes | None:
        """The content of one record of application data: :meth:`open` for a short message.

        Args:
            head: the five bytes of the header.
            fragment: all received bytes after the header.

        Returns:
            The content, or ``None`` if ``fragment`` is not one whole, short, valid record of
            application data without padding. In that case nothing has changed, and the bytes are
            for :meth:`open`.
        """
        type_, major, length = _READ_HEADER(head)
        size = length - TAG_LENGTH
        if (
            length != len(fragment)
            or type_ != _OUTER_TYPE
            or major != _MAJOR_VERSION
            or not 1 < size <= _SMALL_INNER
            or size > self.limit
        ):
            return None
        nonce = (self._iv ^ self._sequence).to_bytes(IV_LENGTH, "big")
        try:
            inner = self._aead.decrypt(nonce, fragment, head)
        except InvalidTag:
            return None
        if inner[-1] != _OUTER_TYPE:
            return None
        self._sequence += 1
        return inner[:-1]

    def open_data(self, incoming: RecordBuffer, out: memoryview) -> int:
        """Decrypt consecutive records of application data; returns the number of data bytes.

        This is :meth:`open` for many records, without creating an object for each. It stops,
        without changing anything, before the first record that is not complete, valid, unpadded
        application data; that record is for :meth:`open`.

        Args:
            incoming: the received bytes.
            out: at least as long as ``incoming``.
        """
        chunk, start = incoming.in_place()
        last_header = len(chunk) - HEADER_LENGTH
        decrypt, iv, sequence = self._aead.decrypt_into, self._iv, self._sequence
        filled = 0
        while start <= last_header:
            type_, major, length = HEADER.unpack_from(chunk, start)
            body = start + HEADER_LENGTH
            end, size = body + length, length - TAG_LENGTH
            whole = end <= len(chunk) and 1 < size <= self.limit
            if type_ != _OUTER_TYPE or major != _MAJOR_VERSION or not whole:
                break
            nonce = (iv ^ sequence).to_bytes(IV_LENGTH, "big")
            inner = out[filled : filled + size]
            try:
                decrypt(nonce, chunk[body:end], chunk[start:body], inner)
            except InvalidTag:
                break
            content = content_length(inner)
            if content < 1 or inner[content] != _OUTER_TYPE:
                break
            filled += content
            sequence += 1
            start = end
        self._sequence = sequence
        incoming.skip(start)
        return filled


def content_length(inner: memoryview) -> int:
    """The position of the type after the content of an inner plaintext (section 5.4); -1 where
    there is nothing but zeros."""
    if inner and inner[-1]:
        return len(inner) - 1
    return len(bytes(inner).rstrip(b"\0")) - 1


def plaintext_records(type_: int, content: bytes, version: int = LEGACY_VERSION) -> bytes:
    """Unprotected records (section 5.1), cut at 2^14 bytes."""
    starts = range(0, len(content), MAX_PLAINTEXT)
    pieces = [content[start : start + MAX_PLAINTEXT] for start in starts]
    return b"".join([header(type_, len(piece), version) + piece for piece in pieces])
