"""Structures whose fields follow one another on the wire.

A class of :class:`Laid` declares the layout of its fields and needs no code of its own; one whose
form is less regular overrides :meth:`Laid.read` and :meth:`Laid.body`.
"""

from collections.abc import Callable
from functools import partial
from itertools import repeat
from operator import call
from typing import Any, ClassVar, Final, NamedTuple, Self

from hybridkex.constants import HandshakeType
from hybridkex.wire.codec import (
    Reader,
    u8,
    u8_list,
    u16,
    u16_list,
    u32,
    vector8,
    vector16,
    vector24,
)

_VECTORS: Final = {1: vector8, 2: vector16, 3: vector24}


class Layout(NamedTuple):
    """A codec that reads and writes a value."""

    read: Callable[[Reader], Any]
    write: Callable[[Any], bytes]


U8: Final = Layout(Reader.u8, u8)
U16: Final = Layout(Reader.u16, u16)
U32: Final = Layout(Reader.u32, u32)
REST: Final = Layout(Reader.rest, bytes)
"""Bytes up to the end."""
BYTE_LIST: Final = Layout(
    lambda reader: tuple(reader.opaque(1, least=1)), lambda values: vector8(u8_list(values))
)
"""A vector of one or more 8-bit integers."""


def opaque(width: int, least: int = 0) -> Layout:
    """A vector of ``least`` bytes or more, with a length of ``width`` bytes."""
    return Layout(partial(Reader.opaque, width=width, least=least), _VECTORS[width])


def codes(width: int) -> Layout:
    """A vector of one or more 16-bit integers, with a length of ``width`` bytes."""
    vector = _VECTORS[width]
    read = partial(Reader.u16_list, width=width)
    return Layout(read, lambda values: vector(u16_list(values)))


def listed(entry: Layout, least: int = 0) -> Layout:
    """A vector of entries with a 2-byte length and at least ``least`` bytes of content."""

    def read(reader: Reader) -> tuple[Any, ...]:
        entries = reader.vector(2, least)
        found = []
        while entries.remaining:
            found.append(entry.read(entries))
        return tuple(found)

    return Layout(read, lambda values: vector16(b"".join(map(entry.write, values))))


def pair(first: Layout, second: Layout) -> Layout:
    """Two values, one after the other."""
    return Layout(
        lambda reader: (first.read(reader), second.read(reader)),
        lambda values: first.write(values[0]) + second.write(values[1]),
    )


class Laid:
    """A structure of fields, for a dataclass."""

    layout: ClassVar[tuple[Layout, ...]] = ()
    """The layout of each field, in their order."""
    _readers: ClassVar[tuple[Callable[[Reader], Any], ...]] = ()
    _writers: ClassVar[tuple[Callable[[Any], bytes], ...]] = ()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls._readers = tuple(one.read for one in cls.layout)
        cls._writers = tuple(one.write for one in cls.layout)

    @classmethod
    def read(cls, reader: Reader) -> Self:
        """Parse the fields; the caller checks that no bytes are left."""
        return cls(*map(call, cls._readers, repeat(reader)))

    def body(self) -> bytes:
        return b"".join(map(call, self._writers, vars(self).values()))


class Message(Laid):
    """The base class of handshake messages (RFC 9846 section 4)."""

    type: ClassVar[HandshakeType]
