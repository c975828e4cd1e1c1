"""Key producers of a KME: an end of a QKD link, or random numbers in its place.

A link has two ends. Each end is a :class:`KeyProducer` and feeds the KME of its site; both give
the same keys under the same IDs, not necessarily at the same time.
"""

import os
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final, Protocol
from uuid import uuid4

from hybridkex.errors import ConfigError
from hybridkex.fields import check_fields, checked
from hybridkex.net.event_loop import Event, checkpoint
from hybridkex.secret import Secret

__all__ = ["KeyProducer", "ProducedKey", "RandomEnd", "RandomProducer", "random_link"]

BATCH: Final = 64
"""Keys per batch of a random producer: one durable write of the key store."""

MAX_LEAD: Final = 1
"""The maximum number of batches by which one end of a random link may be ahead of the other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProducedKey:
    """One key of a link, at one of its ends."""

    key_id: str
    """A UUID in the form of RFC 9562 section 4, in lower case."""
    key: Secret
    """The same bytes at both ends."""


class KeyProducer(Protocol):
    """``async for batch in producer`` gives lists of keys, all of one length.

    The KME takes the next batch when it has room; a producer that cannot wait must drop the same
    keys at both ends. A producer that stops iterating has ended for good.
    """

    def __aiter__(self) -> AsyncIterator[list[ProducedKey]]: ...


def _check_bits(key_bits: int) -> None:
    if key_bits < 8 or key_bits % 8:
        raise ConfigError("key_bits must be a positive multiple of 8")


def _random_batch(key_bits: int) -> list[ProducedKey]:
    return [
        ProducedKey(key_id=str(uuid4()), key=Secret(os.urandom(key_bits // 8)))
        for _ in range(BATCH)
    ]


@dataclass(frozen=True, kw_only=True)
class RandomProducer:
    """Keys from the operating system, for a KME whose peer does not produce the same keys.

    Such keys reach the peer KME by value when they are allotted (see ``docs/kme.md``): a trusted
    relay, not QKD.

    Args:
        key_bits: bits of each key, a multiple of 8.

    Raises:
        ConfigError: ``key_bits`` is no such number.
    """

    key_bits: int = 256

    def __post_init__(self) -> None:
        check_fields(self)
        _check_bits(self.key_bits)

    def __aiter__(self) -> "RandomProducer":
        return self

    async def __anext__(self) -> list[ProducedKey]:
        await checkpoint()
        return _random_batch(self.key_bits)


class RandomEnd:
    """One end of a random link within one process; see :func:`random_link`.

    Args:
        key_bits: bits of each key, a multiple of 8.

    Raises:
        ConfigError: ``key_bits`` is no such number.
    """

    @checked
    def __init__(self, key_bits: int) -> None:
        _check_bits(key_bits)
        self._key_bits = key_bits
        self._waiting: deque[list[ProducedKey]] = deque()
        self._taken = Event()
        self._other = self

    def _join(self, other: "RandomEnd") -> None:
        self._other = other

    def __aiter__(self) -> "RandomEnd":
        return self

    async def __anext__(self) -> list[ProducedKey]:
        await checkpoint()
        if self._waiting:
            self._taken.set()
            return self._waiting.popleft()
        while len(self._other._waiting) >= MAX_LEAD:
            self._other._taken = Event()
            await self._other._taken.wait()
        batch = _random_batch(self._key_bits)
        self._other._waiting.append(batch)
        return batch


def random_link(key_bits: int = 256) -> tuple[RandomEnd, RandomEnd]:
    """The two ends of a link between two KMEs of one process, fed by the operating system.

    Args:
        key_bits: bits of each key, a multiple of 8.

    Raises:
        ConfigError: ``key_bits`` is no such number.
    """
    alice, bob = RandomEnd(key_bits), RandomEnd(key_bits)
    alice._join(bob)
    bob._join(alice)
    return alice, bob
