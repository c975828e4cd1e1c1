"""A pool of keys placed in a file beforehand, consumed crash-safely.

The file is a key database (:mod:`hybridkex.qkd.store`) with a name for each end of it: its material
is what we may draw, its grants are what the peer may draw and we look up. A pool file and its
counterpart at the peer are filled by ``hybridkex kme export-pool``.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from hybridkex.errors import ConfigError, KeySourceExhausted
from hybridkex.fields import check_fields, checked
from hybridkex.qkd.source import KeyPart, KeyReference, QkdKey, SourceStatus, single
from hybridkex.qkd.sqlite_store import SqliteKeyStore, readable
from hybridkex.qkd.store import Allotment, read_key_file

__all__ = ["FilePool", "PoolNames"]


@dataclass(frozen=True, kw_only=True)
class PoolNames:
    """The SAEs and KMEs whose keys a pool holds.

    Args:
        sae: our SAE ID.
        kme: the ID of our KME.
        peer_sae: the peer's SAE ID.
        peer_kme: the ID of the peer's KME.

    Raises:
        ConfigError: an ID is empty, or both SAEs are the same.
    """

    sae: str
    kme: str
    peer_sae: str
    peer_kme: str

    def __post_init__(self) -> None:
        check_fields(self)
        if not all((self.sae, self.kme, self.peer_sae, self.peer_kme)):
            raise ConfigError("a pool needs the IDs of both SAEs and both KMEs")
        if self.sae == self.peer_sae:
            raise ConfigError("a pool is for two different SAEs")


def _settle_names(store: SqliteKeyStore, path: Path, names: PoolNames | None) -> PoolNames:
    """Read the names from the file, or write them to a new file."""
    found = [store.meta(name) for name in ("sae", "kme", "peer-sae", "peer-kme")]
    if None in found:
        if names is None:
            raise ConfigError(f"{path} is not a key pool")
        store.set_meta(
            {
                "sae": names.sae,
                "kme": names.kme,
                "peer-sae": names.peer_sae,
                "peer-kme": names.peer_kme,
            }
        )
        return names
    sae, kme, peer_sae, peer_kme = map(str, found)
    stored = PoolNames(sae=sae, kme=kme, peer_sae=peer_sae, peer_kme=peer_kme)
    if names is not None and names != stored:
        raise ConfigError(f"the pool {path} belongs to other SAEs or KMEs: {stored}")
    return stored


class FilePool:
    """A :class:`~hybridkex.qkd.source.KeySource` on a file.

    A key is durably marked as used before it is returned: after a crash it is not returned again.
    One process at a time may use a file.

    Args:
        store: the open file.
        names: the SAEs and KMEs of its keys.
    """

    def __init__(self, store: SqliteKeyStore, names: PoolNames) -> None:
        self._store = store
        self._names = names

    @classmethod
    @checked
    def open(cls, path: Path, *, key_file: Path, names: PoolNames | None = None) -> "FilePool":
        """Open the pool at ``path``, or create one for ``names`` if there is no file. Blocks
        briefly.

        Raises ``ConfigError`` for a missing, foreign or damaged file and for a wrong key file.
        """
        if names is None and not (os.path.exists(path) and os.path.getsize(path)):
            raise ConfigError(f"there is no key pool {path}, or it is empty")
        path = Path(path)
        store = SqliteKeyStore(path, read_key_file(key_file))
        try:
            with readable(f"cannot use the key pool {path}"):
                return cls(store, _settle_names(store, path, names))
        except BaseException:
            store.close()
            raise

    @property
    def names(self) -> PoolNames:
        """The SAEs and KMEs whose keys the pool holds."""
        return self._names

    @property
    def local_sae(self) -> str:
        """Our own SAE ID."""
        return self._names.sae

    @property
    def peer_sae(self) -> str:
        """The SAE ID of the peer."""
        return self._names.peer_sae

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the file."""
        await self._store.aclose()

    async def add(self, keys: Sequence[QkdKey]) -> None:
        """Put keys of a key source into the pool: those we drew and those we looked up.

        Raises:
            ConfigError: a key is of other SAEs, or combined.
        """
        mine = [k for k in keys if k.master_sae == self.local_sae and k.slave_sae == self.peer_sae]
        theirs = [
            k for k in keys if k.master_sae == self.peer_sae and k.slave_sae == self.local_sae
        ]
        if len(mine) + len(theirs) != len(keys) or any(len(k.name) != 1 for k in keys):
            raise ConfigError("a pool accepts only single-part keys of its own two SAEs")
        link = self._names.peer_kme
        await self._store.add(link, [(k.key_ids[0], k.key) for k in mine])
        await self._store.accept(
            link,
            [Allotment(blocks=k.key_ids, size=len(k.key), value=k.key) for k in theirs],
            master=self.peer_sae,
            slaves=[self.local_sae],
        )

    async def never_here(self, key_ids: Sequence[str]) -> list[str]:
        """Return those of ``key_ids`` whose keys were never put into the pool."""
        return await self._store.never_here(self._names.peer_kme, list(dict.fromkeys(key_ids)))

    async def get_key(self) -> QkdKey:
        """Get a fresh key; see :class:`~hybridkex.qkd.source.KeySource`."""
        link = self._names.peer_kme
        found = await self._store.reserve(link, 1)
        if not found:
            raise KeySourceExhausted("the key pool is empty")
        [material] = found
        block = Allotment(blocks=(material.key_id,), size=len(material.key))
        await self._store.allot(link, [block], master=self.local_sae)
        await self._store.scrub()
        return QkdKey(
            name=(KeyPart(self._names.kme, self._names.peer_kme, material.key_id),),
            master_sae=self.local_sae,
            slave_sae=self.peer_sae,
            key=material.key,
        )

    async def get_key_with_id(self, name: KeyReference) -> QkdKey:
        """Get the key that the peer drew; see :class:`~hybridkex.qkd.source.KeySource`."""
        key_id = single(name, master_kme=self._names.peer_kme, slave_kme=self._names.kme)
        [(_, key)] = await self._store.collect(
            self._names.peer_kme, [key_id], slave=self.local_sae, master=self.peer_sae
        )
        await self._store.scrub()
        return QkdKey(name=name, master_sae=self.peer_sae, slave_sae=self.local_sae, key=key)

    def knows(self, name: KeyReference) -> bool:
        """Whether the KMEs named are those of this source. No I/O."""
        ours = [(self._names.peer_kme, self._names.kme)]
        return [(part.master_kme, part.slave_kme) for part in name] == ours

    async def status(self) -> SourceStatus:
        """The stock; draws no key. ``key_bits`` is that of the shortest key, 256 without one."""
        stored = await self._store.count(self._names.peer_kme)
        shortest = await self._store.shortest(self._names.peer_kme)
        return SourceStatus(stored=stored, capacity=stored, key_bits=8 * (shortest or 32))
