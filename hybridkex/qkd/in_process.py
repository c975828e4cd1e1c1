"""Both ends of a key source in one process: no key crosses a network."""

import os
from collections import OrderedDict
from typing import Final
from uuid import uuid4

from hybridkex.errors import ConfigError, KeyConsumed, KeySourceExhausted, KeyUnknown
from hybridkex.fields import checked
from hybridkex.net.event_loop import checkpoint, checkpoint_if_cancelled
from hybridkex.qkd.source import KeyPart, KeyReference, QkdKey, SourceStatus, single
from hybridkex.secret import Secret

__all__ = ["InProcessSource", "in_process_pair"]

REMEMBERED: Final = 4096
"""Number of delivered IDs to remember, to distinguish consumed keys from unknown ones."""


class InProcessSource:
    """One end of a pair; see :func:`in_process_pair`.

    Args:
        sae: the SAE ID of this end.
        kme: its KME ID.
        peer_sae: the SAE ID of the other end.
        peer_kme: its KME ID.
        capacity: the maximum number of keys that wait for the other end.

    Raises:
        ConfigError: an argument has the wrong type.
    """

    @checked
    def __init__(self, *, sae: str, kme: str, peer_sae: str, peer_kme: str, capacity: int) -> None:
        if capacity < 1:
            raise ConfigError("capacity must be at least 1")
        self.local_sae: Final = sae
        self.peer_sae: Final = peer_sae
        self._kme = kme
        self._peer_kme = peer_kme
        self._capacity = capacity
        self._for_me: dict[str, Secret] = {}
        self._delivered: OrderedDict[str, None] = OrderedDict()
        self._other = self

    async def get_key(self) -> QkdKey:
        """Draw a new key. Raises ``KeySourceExhausted`` while ``capacity`` keys wait for the
        peer."""
        await checkpoint_if_cancelled()
        if len(self._other._for_me) >= self._capacity:
            raise KeySourceExhausted(f"{self._capacity} keys wait for {self.peer_sae}")
        key_id, key = str(uuid4()), Secret(os.urandom(32))
        self._other._for_me[key_id] = key
        return QkdKey(
            name=(KeyPart(self._kme, self._peer_kme, key_id),),
            master_sae=self.local_sae,
            slave_sae=self.peer_sae,
            key=key,
        )

    async def get_key_with_id(self, name: KeyReference) -> QkdKey:
        """Get the key that the peer drew; see :class:`~hybridkex.qkd.source.KeySource`."""
        await checkpoint_if_cancelled()
        key_id = single(name, master_kme=self._peer_kme, slave_kme=self._kme)
        key = self._for_me.pop(key_id, None)
        if key is None:
            if key_id in self._delivered:
                raise KeyConsumed(f"key {key_id} was delivered before")
            raise KeyUnknown(f"no key {key_id}")
        self._delivered[key_id] = None
        if len(self._delivered) > REMEMBERED:
            self._delivered.popitem(last=False)
        return QkdKey(name=name, master_sae=self.peer_sae, slave_sae=self.local_sae, key=key)

    def knows(self, name: KeyReference) -> bool:
        """Whether the KMEs named are those of this source. No I/O."""
        return [(part.master_kme, part.slave_kme) for part in name] == [(self._peer_kme, self._kme)]

    async def status(self) -> SourceStatus:
        """The stock, without giving a key away."""
        await checkpoint()
        free = self._capacity - len(self._other._for_me)
        return SourceStatus(stored=free, capacity=self._capacity, key_bits=256)


@checked
def in_process_pair(
    alice_sae: str,
    bob_sae: str,
    *,
    kmes: tuple[str, str] = ("in-process-a", "in-process-b"),
    capacity: int = 1024,
) -> tuple[InProcessSource, InProcessSource]:
    """Two sources that share 256-bit keys made by the operating system.

    ``capacity`` bounds, in each direction, the keys drawn and not yet fetched.

    Args:
        alice_sae: the SAE ID of the first end.
        bob_sae: the SAE ID of the second end.
        kmes: the KME IDs of the two ends.

    Raises:
        ConfigError: the two ends have the same ID, or ``capacity`` is below 1.
    """
    if alice_sae == bob_sae or kmes[0] == kmes[1]:
        raise ConfigError("the two ends of a pair need different SAE IDs and KME IDs")
    alice = InProcessSource(
        sae=alice_sae, kme=kmes[0], peer_sae=bob_sae, peer_kme=kmes[1], capacity=capacity
    )
    bob = InProcessSource(
        sae=bob_sae, kme=kmes[1], peer_sae=alice_sae, peer_kme=kmes[0], capacity=capacity
    )
    alice._other, bob._other = bob, alice
    return alice, bob
