"""The presentation language of RFC 9846 section 3: bounds-checked reading and writing.

A :class:`Reader` never reads past its end and never trusts a length: for any input it returns what
was asked for or raises :class:`~hybridkex.errors.DecodeError`. The functions that write raise
:class:`~hybridkex.errors.EncodeError` for a value that the field cannot hold, and nothing else.
Every encoder of this package writes through them.
"""

from functools import partial
from struct import Struct, pack, unpack
from struct import error as StructError

from hybridkex.errors import DecodeError, EncodeError

_ENTRY = Struct(">HH")
"""Type and length of an entry."""


class Reader:
    """A cursor over bytes, from ``start`` to ``end``.

    Numbers are read in place, and the reader of a vector shares the same bytes, because slicing
    would cost more than parsing the rest of a message. Each method moves the cursor itself, because
    a function call would cost as much as the reading.
    """

    __slots__ = ("_data", "_end", "_position")

    def __init__(self, data: bytes, start: int = 0, end: int | None = None) -> None:
        self._data = data
        self._position = start
        self._end = len(data) if end is None else end

    @property
    def remaining(self) -> int:
        return self._end - self._position

    def _too_short(self, length: int) -> DecodeError:
        return DecodeError(f"{length} bytes are expected and {self.remaining} are left")

    def take(self, length: int) -> bytes:
        """Exactly ``length`` bytes."""
        start = self._position
        end = start + length
        if end > self._end:
            raise self._too_short(length)
        self._position = end
        return self._data[start:end]

    def rest(self) -> bytes:
        return self.take(self._end - self._position)

    def u8(self) -> int:
        start = self._position
        if start >= self._end:
            raise self._too_short(1)
        self._position = start + 1
        return self._data[start]

    def u16(self) -> int:
        start, data = self._position, self._data
        end = start + 2
        if end > self._end:
            raise self._too_short(2)
        self._position = end
        return data[start] << 8 | data[start + 1]

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "big")

    def u64(self) -> int:
        return int.from_bytes(self.take(8), "big")

    def _content(self, width: int, least: int, most: int | None) -> int:
        """Skip a vector; returns the position of its content."""
        head, data = self._position, self._data
        start = head + width
        if start > self._end:
            raise self._too_short(width)
        if width == 2:
            length = data[head] << 8 | data[head + 1]
        else:
            length = int.from_bytes(data[head:start], "big")
        if length < least or (most is not None and length > most):
            raise DecodeError(
                f"a vector of {length} bytes, where {least} to {most or '...'} are allowed"
            )
        end = start + length
        if end > self._end:
            self._position = start
            raise self._too_short(length)
        self._position = end
        return start

    def vector(self, width: int, least: int = 0, most: int | None = None) -> "Reader":
        """A reader over a vector: a length of ``width`` bytes, then ``least..most`` of content."""
        start = self._content(width, least, most)
        return Reader(self._data, start, self._position)

    def opaque(self, width: int, least: int = 0, most: int | None = None) -> bytes:
        """The bytes of such a vector."""
        start = self._content(width, least, most)
        return self._data[start : self._position]

    def u16_list(self, width: int, least: int = 2) -> tuple[int, ...]:
        """A vector of 16-bit integers with a length of ``width`` bytes."""
        content = self.opaque(width, least)
        if len(content) % 2:
            raise DecodeError("a list of 16-bit values with an odd number of bytes")
        return unpack(f">{len(content) // 2}H", content)

    def entries(self) -> list[tuple[int, bytes]]:
        """All remaining bytes as entries: a 16-bit type and a vector of up to 65,535 bytes."""
        data, position, end = self._data, self._position, self._end
        found = []
        while position < end:
            start = position + 4
            if start > end:
                self._position = position
                raise self._too_short(4)
            type_, length = _ENTRY.unpack_from(data, position)
            position = start + length
            if position > end:
                self._position = start
                raise self._too_short(length)
            found.append((type_, data[start:position]))
        self._position = end
        return found

    def finish(self) -> None:
        """Refuse bytes that are left over."""
        if self._position != self._end:
            raise DecodeError(f"{self.remaining} bytes too many")


def _unsigned(width: int, value: int) -> bytes:
    try:
        return value.to_bytes(width, "big")
    except OverflowError:
        raise EncodeError(f"the value {value} does not fit into {8 * width} bits") from None


u8, u16, u32, u64 = (partial(_unsigned, width) for width in (1, 2, 4, 8))
"""Unsigned integers of 8 to 64 bits."""


def _vector(width: int, content: bytes, most: int) -> bytes:
    length = len(content)
    if length > most:
        raise EncodeError(f"{length} bytes in a vector of at most {most}")
    return length.to_bytes(width, "big") + content


vector8, vector16, vector24, vector32 = (
    partial(_vector, width, most=(1 << 8 * width) - 1) for width in (1, 2, 3, 4)
)
"""A vector with a length field of 8 to 32 bits and at most ``most`` bytes, by default as many as
the field can express."""


def u8_list(values: tuple[int, ...]) -> bytes:
    """Consecutive 8-bit integers without a length."""
    try:
        return bytes(values)
    except ValueError:
        raise EncodeError(f"a value in {values} does not fit into 8 bits") from None


def entry(type_: int, content: bytes) -> bytes:
    """A 16-bit type and a vector of up to 65,535 bytes."""
    try:
        return _ENTRY.pack(type_, len(content)) + content
    except StructError:
        raise EncodeError(
            f"an entry of type {type_} with {len(content)} bytes; type and length must each fit 16 "
            "bits"
        ) from None


def u16_list(values: tuple[int, ...]) -> bytes:
    """Consecutive 16-bit integers without a length."""
    try:
        return pack(f">{len(values)}H", *values)
    except StructError:
        raise EncodeError(f"a value in {values} does not fit into 16 bits") from None


def ascii_text(text: str) -> bytes:
    """Text that must be ASCII, without a length."""
    try:
        return text.encode("ascii")
    except UnicodeEncodeError:
        raise EncodeError("text that is not ASCII") from None


def fixed(content: bytes, length: int) -> bytes:
    """An opaque field of fixed ``length``, without a length on the wire."""
    if len(content) != length:
        raise EncodeError(f"{len(content)} bytes in a field of {length}")
    return content
