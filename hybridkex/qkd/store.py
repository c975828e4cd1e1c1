"""The key database of a KME: the code that all implementations share, and the encryption at rest.

A key is in one of three tables::

    material   keys of a link that are promised to nobody       reserve -> allot | accept
    grants     promised keys, one row for each slave SAE        collect
    spent      IDs that left ``material`` and must not return

Every row belongs to one link, the link is part of every primary key, and every statement names it:
one peer KME cannot read, spend or erase a row of another link, even if the two links use the same
key ID.

Delivery is safe because of one rule: *a key leaves the database, durably, before it leaves the
process.* A crash can lose a key that was on its way out. It cannot deliver a key twice.

Keys at rest are encrypted with AES-256-GCM under the key of a key file. The associated data
identify the row, so that one row cannot be substituted for another. With random 96-bit nonces, one
key file is good for 2^32 writes (NIST SP 800-38D section 8.3).
"""

import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Final, TypeAlias, TypeVar

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from hybridkex.errors import (
    ConfigError,
    KeyConsumed,
    KeyExpired,
    KeySourceError,
    KeySourceUnavailable,
    KeyUnauthorized,
    KeyUnknown,
)
from hybridkex.files import create_file, read_file
from hybridkex.machine import writing
from hybridkex.secret import Secret
from hybridkex.wire.codec import vector32

NONCE_BYTES: Final = 12
SEAL_BYTES: Final = NONCE_BYTES + 16
"""The length of the nonce and the tag, by which a sealed key is longer than the key."""
SEAL_KEY_BYTES: Final = 32

EVERY_LINK: Final = "*"
"""The scope of work on all links."""

Position: TypeAlias = tuple[int, int]
"""The position of an iteration over the material of a link."""
_Db: TypeAlias = Any
T = TypeVar("T")


def half_of(key_id: str) -> int:
    """The half of a link, 0 or 1, that a key ID belongs to: each of the two KMEs owns one."""
    return key_id.encode()[-1] & 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Material:
    """A key of a link that is not reserved."""

    key_id: str
    key: Secret
    created: float
    """Seconds since the epoch."""
    shared: bool
    """Whether the peer KME has the key from the link, too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Allotment:
    """A key for SAEs, made of blocks of material: their concatenation, cut to ``size`` bytes.

    Its ID is that of the first block. ``value`` is the key itself, if the other KME lacks the
    blocks.
    """

    blocks: tuple[str, ...]
    size: int
    value: Secret | None = None

    @property
    def key_id(self) -> str:
        return self.blocks[0]


class BlockState(Enum):
    """Why a KME refuses to allot a block."""

    UNKNOWN = "unknown"
    """It does not have the block, or does not have it yet."""
    RESERVED = "busy"
    """It is about to deliver the block to an SAE of its own."""
    SPENT = "spent"
    """The block was used before, or was erased."""


class OutcomeUnknown(KeySourceUnavailable):
    """The database was lost during a commit, which may have been carried out."""


class BlocksRefused(Exception):  # an answer between two KMEs, not a failure
    """Blocks that cannot be allotted, each with its state."""

    def __init__(self, states: dict[str, BlockState]) -> None:
        super().__init__(f"{len(states)} blocks cannot be reserved")
        self.states: Final = states


class KeyStore(ABC):
    """A key database. Each method is one transaction, durable on return.

    A call that fails raises :class:`~hybridkex.errors.KeySourceUnavailable`, changes nothing
    (unless it is :class:`OutcomeUnknown`), and leaves the store usable. A call whose caller is
    cancelled is either not begun or carried out to its end.

    This class makes the decisions; each database adds its transactions and statements. In their
    methods, ``db`` carries out the statements of the transaction in progress.
    """

    PAGE: ClassVar[int] = 1000
    """Rows that one call reads or erases where there may be a million."""

    _seal: "Seal"
    _ahead: float = 0.0
    """Seconds by which the database's clock is ahead of ours."""

    async def add(
        self, link: str, keys: Iterable[tuple[str, Secret]], *, shared: bool = True
    ) -> None:
        """Add material. IDs that the link has or had are ignored, so a call can be repeated."""
        keys = list(keys)

        def work(db: _Db) -> None:
            spent = self._among(db, "spent", link, [key_id for key_id, _ in keys])
            rows = [
                (key_id, half_of(key_id), self._seal.seal(key, place_of("material", link, key_id)))
                for key_id, key in keys
                if key_id not in spent
            ]
            self._add_material(db, link, rows, shared)

        await self._run(link, work, size=len(keys))

    @abstractmethod
    async def reserve(
        self, link: str, number: int, *, half: int = 0, skip: Iterable[str] = ()
    ) -> list[Material]:
        """Reserve up to ``number`` keys of a link, oldest first, those of ``half`` before the
        others.

        They are reserved for the caller until :meth:`release` or :meth:`allot`. Keys in ``skip``
        are passed over.
        """

    @abstractmethod
    async def release(self, link: str, key_ids: Iterable[str]) -> None:
        """End reservations; blocks that were not allotted are free again."""

    async def count(self, link: str) -> int:
        """The number of keys that a link has as material."""
        return (await self._run(link, partial(self._sizes, link=link), writes=False))[0]

    async def promised(self, link: str) -> int:
        """The number of blocks of the promised keys that no SAE has collected.

        Each slave of a key counts.
        """
        return (await self._run(link, partial(self._sizes, link=link), writes=False))[1]

    async def shared_ids(
        self, link: str, *, created_before: float, after: Position | None = None
    ) -> tuple[list[str], Position | None]:
        """Return some IDs of a link's shared material that is older than a time and not reserved.

        Args:
            link: the ID of its peer KME.
            created_before: seconds since the epoch.
            after: the position that the previous call returned; ``None``: begin.

        Returns:
            The IDs, possibly none, and the position to continue from; ``None`` at the end.
        """
        half, last = after or (0, 0)
        rows = await self._run(
            link,
            lambda db: self._material_after(db, link, half, last, created_before + self._ahead),
            writes=False,
        )
        ids = [key_id for _, key_id, fits in rows if fits]
        if len(rows) == self.PAGE:
            return ids, (half, rows[-1][0])
        return ids, ((1, 0) if half == 0 else None)

    async def unknown(self, link: str, key_ids: Sequence[str]) -> list[str]:
        """Return those of these IDs that are not material of the link."""
        return await self._not_among(("material",), link, key_ids)

    async def never_here(self, link: str, key_ids: Sequence[str]) -> list[str]:
        """Return those of these IDs that are neither material of the link nor spent."""
        return await self._not_among(("material", "spent"), link, key_ids)

    async def _not_among(
        self, tables: Sequence[str], link: str, key_ids: Sequence[str]
    ) -> list[str]:
        def work(db: _Db) -> set[str]:
            return set().union(*(self._among(db, table, link, key_ids) for table in tables))

        found = await self._run(link, work, writes=False)
        return [key_id for key_id in key_ids if key_id not in found]

    async def allot(
        self, link: str, allotments: Sequence[Allotment], *, master: str, slaves: Sequence[str] = ()
    ) -> None:
        """Spend reserved blocks: ``master`` gets the keys now, ``slaves`` of this KME may collect
        them later.

        Raises :class:`~hybridkex.errors.KeyConsumed` when a block is gone.
        """
        blocks = _blocks_of(allotments)

        def work(db: _Db) -> None:
            taken = self._take_reserved(db, link, blocks)
            keys = self._assembled(link, allotments, taken, self._spend(db, link, blocks))
            for one, key in zip(allotments, keys, strict=True):
                if key is None or not taken.keys() >= set(one.blocks):
                    raise KeyConsumed(f"a block of key {one.key_id} is gone")
            self._grant(db, link, allotments, keys, master, slaves)

        await self._run(link, work, size=len(blocks))
        self._end_reservations(link, blocks)

    async def accept(
        self,
        link: str,
        allotments: Sequence[Allotment],
        *,
        master: str,
        slaves: Sequence[str],
        peer_half: int = 0,
    ) -> None:
        """Promise to ``slaves`` the keys that the peer KME reserves, all of them or none.

        A block that we have reserved goes to the peer only if it belongs to the peer's half.

        Raises :class:`BlocksRefused`.
        """
        blocks = _blocks_of(allotments)

        def work(db: _Db) -> None:
            found = self._take(db, link, blocks)
            new = self._spend(db, link, blocks)
            if states := dict(_refused(allotments, found, new, peer_half)):
                raise BlocksRefused(states)
            taken = {block: sealed for block, (sealed, _) in found.items()}
            keys = self._assembled(link, allotments, taken, new)
            for one, key in zip(allotments, keys, strict=True):
                if key is None:
                    # Listed twice, or too short.
                    raise BlocksRefused(dict.fromkeys(one.blocks, BlockState.SPENT))
            self._grant(db, link, allotments, keys, master, slaves)

        await self._run(link, work, size=len(blocks))

    def _assembled(
        self,
        link: str,
        allotments: Iterable[Allotment],
        taken: Mapping[str, bytes],
        new: Iterable[str],
    ) -> list[Secret | None]:
        """Return the keys of allotments, with ``None`` for a key of which a block is gone, is
        missing and needed, or is too short.

        Args:
            link: whose material the blocks were.
            allotments: the requested keys; a block that is listed twice is gone the second time.
            taken: the sealed blocks that this transaction has removed from the material.
            new: the IDs that it has newly recorded as spent.

        Raises ``cryptography.exceptions.InvalidTag``.
        """
        left = set(new)
        keys: list[Secret | None] = []
        for one in allotments:
            fresh = left.issuperset(one.blocks) and len(set(one.blocks)) == len(one.blocks)
            left.difference_update(one.blocks)
            if fresh and one.value is not None:
                keys.append(one.value)
            elif fresh and all(block in taken for block in one.blocks):
                parts = [
                    self._seal.open(taken[block], place_of("material", link, block)).reveal()
                    for block in one.blocks
                ]
                key = b"".join(parts)[: one.size]
                keys.append(Secret(key) if len(key) == one.size else None)
            else:
                keys.append(None)
        return keys

    def _grant(
        self,
        db: _Db,
        link: str,
        allotments: Sequence[Allotment],
        keys: Sequence[Secret | None],
        master: str,
        slaves: Sequence[str],
    ) -> None:
        rows = [
            (one.key_id, slave, len(one.blocks),
             self._seal.seal(key, place_of("grant", link, one.key_id, master, slave)))
            for one, key in zip(allotments, keys, strict=True)
            if key is not None
            for slave in slaves
        ]  # fmt: skip
        if rows:
            self._add_grants(db, link, master, rows)

    async def collect(
        self, link: str, key_ids: Sequence[str], *, slave: str, master: str
    ) -> list[tuple[str, Secret]]:
        """Deliver to a slave, once, its copy of keys that ``master`` drew, all of them or none.

        Raises :class:`~hybridkex.errors.KeyUnknown`, ``KeyConsumed``, ``KeyExpired`` or
        ``KeyUnauthorized``.
        """

        def work(db: _Db) -> list[tuple[str, Secret]]:
            found = self._deliver(db, link, key_ids, slave, master)
            keys: list[tuple[str, Secret]] = []
            for key_id in key_ids:
                if key_id not in found:  # or no longer: the request names it twice
                    raise _refusal(key_id, self._ends(db, link, key_id, master), slave, master)
                place = place_of("grant", link, key_id, master, slave)
                keys.append((key_id, self._seal.open(found.pop(key_id), place)))
            return keys

        return await self._run(link, work, size=len(key_ids), sae=slave)

    async def delivered(
        self, link: str, promises: Iterable[tuple[str, str, str]]
    ) -> list[tuple[str, str, str]]:
        """Return those of these promises (key ID, slave, master) that have ended as delivered."""

        def work(db: _Db) -> list[tuple[str, str, str]]:
            return [
                (key_id, slave, master)
                for key_id, slave, master in promises
                if self._ends(db, link, key_id, master).get(slave) == "delivered"
            ]

        return await self._run(link, work, writes=False)

    async def discard(self, link: str, key_ids: Iterable[str]) -> list[str]:
        """Erase material that the peer KME lacks. Returns the erased IDs.

        Only unreserved material is erased: a key that has been promised to an SAE meanwhile is not
        touched.
        """
        ids = list(key_ids)

        def work(db: _Db) -> list[str]:
            return self._erase(db, link, self._unreserved(db, link, ids))

        return await self._run(link, work, size=len(ids))

    def _erase(self, db: _Db, link: str, key_ids: Sequence[str]) -> list[str]:
        """Erase material and record it as spent. Returns the erased IDs."""
        gone = list(self._take(db, link, key_ids))
        self._spend(db, link, gone)
        return gone

    async def void(self, link: str, key_ids: Iterable[str]) -> set[str]:
        """Erase keys that the peer KME has discarded. Returns the erased IDs.

        Erases material, and promises made at the peer's request that no SAE has collected. An
        unknown ID is recorded as spent, since its key may still be in transit.
        """
        ids = list(key_ids)

        def work(db: _Db) -> set[str]:
            erased = self._take(db, link, ids)
            self._spend(db, link, ids)
            return erased.keys() | self._void_grants(db, link, ids)

        return await self._run(link, work, size=len(ids))

    async def expire(self, *, keys_before: float, tombstones_before: float) -> int:
        """Erase keys older than the first time; forget IDs of keys gone before the second.

        Times are in seconds since the epoch. Returns the number of keys erased. Works in small
        transactions, between which other calls are carried out.
        """
        erased = await self._all(self._expire_material, keys_before)
        erased += await self._all(self._expire_grants, keys_before)
        await self._all(self._forget_grants, tombstones_before)
        await self._all(self._forget_spent, tombstones_before)
        return erased

    async def _all(self, part: Callable[[_Db, float], int], before: float) -> int:
        """Call a method that erases at most ``PAGE`` rows until it finds no more."""
        total, found = 0, self.PAGE
        while found == self.PAGE:
            found = await self._run(
                EVERY_LINK, lambda db: part(db, before + self._ahead), size=self.PAGE
            )
            total += found
        return total

    @abstractmethod
    async def claim(self, job: str, seconds: float) -> bool:
        """Claim a job. Returns whether it is due and this caller must do it.

        For ``seconds``, or until :meth:`settle`, no other caller that shares the store gets the
        job.
        """

    @abstractmethod
    async def settle(self, job: str, seconds: float) -> None:
        """End a claimed job, which is due again after ``seconds``."""

    @abstractmethod
    async def check(self) -> None:
        """Make a trial delivery without an effect. Fails where a delivery would fail."""

    @abstractmethod
    async def change_keys(self, seal_key: Secret, read_keys: Sequence[Secret] = ()) -> None:
        """Encrypt under another key from now on, and decrypt with the others, too.

        Raises :class:`~hybridkex.errors.ConfigError` if a key that is needed is not among them;
        then nothing changes.
        """

    @abstractmethod
    async def renew(self) -> bool:
        """Encrypt all keys under the current sealing key. Returns whether that is done.

        Works in small transactions: call it until it returns true.
        """

    async def _renew_rows(self) -> int:
        """Walk through all keys once. Returns the number of keys that were encrypted again."""
        renewed = 0
        for table in ("material", "grants"):
            last: tuple[Any, ...] | None = ()
            while last is not None:
                work = partial(self._renew_page, table=table, after=last)
                last, number = await self._run(EVERY_LINK, work, size=self.PAGE)
                renewed += number
        return renewed

    def _renew_page(
        self, db: _Db, table: str, after: tuple[Any, ...]
    ) -> tuple[tuple[Any, ...] | None, int]:
        """Encrypt again at most ``PAGE`` keys after a position. Returns the next position, and the
        number of keys that were encrypted again."""
        rows = self._sealed_after(db, table, after)
        new = [
            (*position, sealed, renewed)
            for position, place, sealed in rows
            if sealed is not None and (renewed := self._seal.renewed(sealed, place_of(*place)))
        ]
        if new:
            self._seal_again(db, table, new)
        return (rows[-1][0] if len(rows) == self.PAGE else None), len(new)

    @abstractmethod
    async def tidy(self) -> None:
        """Remove from the disk the traces of keys that had left the database before the previous
        call. Call it periodically."""

    @abstractmethod
    def close(self) -> None:
        """Close the database while no call is under way."""

    @abstractmethod
    async def aclose(self) -> None:
        """Close the database after the calls in progress."""

    # -- what a database supplies

    @abstractmethod
    async def _run(
        self,
        link: str,
        work: Callable[[_Db], T],
        *,
        size: int = 1,
        writes: bool = True,
        sae: str = "",
    ) -> T:
        """Run a transaction that sees and changes rows of one link, or of :data:`EVERY_LINK`.

        ``size``: the number of keys that it changes. ``sae``: the only SAE that it can deliver keys
        to.
        """

    @abstractmethod
    def _among(self, db: _Db, table: str, link: str, key_ids: Sequence[str]) -> set[str]:
        """Return those of these IDs that are in ``material`` or ``spent``."""

    @abstractmethod
    def _add_material(
        self, db: _Db, link: str, rows: Sequence[tuple[str, int, bytes]], shared: bool
    ) -> None:
        """Add keys, each an ID, its half and the sealed key, except those that exist."""

    @abstractmethod
    def _sizes(self, db: _Db, link: str) -> tuple[int, int]:
        """The keys of a link's material, and the blocks of its promised keys."""

    @abstractmethod
    def _material_after(
        self, db: _Db, link: str, half: int, last: int, before: float
    ) -> list[tuple[int, str, bool]]:
        """At most ``PAGE`` keys of a half: number, ID, and whether it is shared, free and older."""

    @abstractmethod
    def _unreserved(self, db: _Db, link: str, key_ids: Sequence[str]) -> list[str]:
        """Return those of these IDs that are not reserved."""

    @abstractmethod
    def _take(self, db: _Db, link: str, key_ids: Sequence[str]) -> dict[str, tuple[bytes, bool]]:
        """Remove material. Returns the removed keys, sealed, and whether each was reserved."""

    @abstractmethod
    def _take_reserved(self, db: _Db, link: str, key_ids: Sequence[str]) -> dict[str, bytes]:
        """Remove material that no other process has reserved. Returns the removed keys, sealed."""

    @abstractmethod
    def _end_reservations(self, link: str, key_ids: Iterable[str]) -> None:
        """End reservations after a transaction that has taken the reserved keys. A transaction that
        fails must not end any: the caller's release could then end the next caller's
        reservation."""

    @abstractmethod
    def _spend(self, db: _Db, link: str, key_ids: Iterable[str]) -> set[str]:
        """Record IDs as spent. Returns those that were not spent before, each ID once."""

    @abstractmethod
    def _add_grants(
        self, db: _Db, link: str, master: str, rows: Sequence[tuple[str, str, int, bytes]]
    ) -> None:
        """Add promises, each a key ID, its slave, its number of blocks and the sealed key."""

    @abstractmethod
    def _deliver(
        self, db: _Db, link: str, key_ids: Sequence[str], slave: str, master: str
    ) -> dict[str, bytes]:
        """Erase promises that have not ended, and record them as delivered. Returns the sealed
        keys."""

    @abstractmethod
    def _ends(self, db: _Db, link: str, key_id: str, master: str) -> dict[str, str | None]:
        """For each slave, how its promise of a key has ended; ``None`` if it has not."""

    @abstractmethod
    def _void_grants(self, db: _Db, link: str, key_ids: Sequence[str]) -> set[str]:
        """Erase promises that were not collected. Returns the IDs of these keys."""

    @abstractmethod
    def _expire_material(self, db: _Db, before: float) -> int:
        """Erase at most ``PAGE`` keys, and record them as spent; likewise the next three."""

    @abstractmethod
    def _expire_grants(self, db: _Db, before: float) -> int: ...

    @abstractmethod
    def _forget_grants(self, db: _Db, before: float) -> int: ...

    @abstractmethod
    def _forget_spent(self, db: _Db, before: float) -> int: ...

    @abstractmethod
    def _sealed_after(
        self, db: _Db, table: str, after: tuple[Any, ...]
    ) -> list[tuple[tuple[Any, ...], tuple[str, ...], bytes | None]]:
        """At most ``PAGE`` rows of ``material`` or ``grants`` after a position: the position and
        the place (:func:`place_of`) of each, and the sealed key, if it is still there."""

    @abstractmethod
    def _seal_again(self, db: _Db, table: str, new: Sequence[tuple[Any, ...]]) -> None:
        """Replace sealed keys: the row's position, what it has now, and the new one."""


def _refused(
    allotments: Iterable[Allotment],
    found: Mapping[str, tuple[bytes, bool]],
    new: Container[str],
    peer_half: int,
) -> Iterator[tuple[str, BlockState]]:
    """The blocks that are spent, missing, or reserved by us and not of the peer's half."""
    for one in allotments:
        for block in one.blocks:
            if block not in new:
                yield block, BlockState.SPENT
            elif block not in found:
                if one.value is None:
                    yield block, BlockState.UNKNOWN
            elif found[block][1] and half_of(block) != peer_half:
                yield block, BlockState.RESERVED


def _refusal(
    key_id: str, ends: Mapping[str, str | None], slave: str, master: str
) -> KeySourceError:
    """Why a slave does not get a key."""
    if not ends:
        return KeyUnknown(f"there is no key {key_id} of {master}")
    if slave not in ends:
        return KeyUnauthorized(f"key {key_id} is not for {slave}")
    if ends[slave] == "expired":
        return KeyExpired(f"key {key_id} has expired")
    how = "is void" if ends[slave] == "void" else "was delivered before"
    return KeyConsumed(f"key {key_id} {how}")


def _blocks_of(allotments: Iterable[Allotment]) -> list[str]:
    return [block for one in allotments for block in one.blocks]


# -- encryption at rest


def new_key_file() -> bytes:
    """The content of a key file with a new key."""
    return os.urandom(SEAL_KEY_BYTES).hex().encode("ascii") + b"\n"


def write_key_file(path: Path) -> None:
    """Create a key file that only its owner can read. Raises ``ConfigError`` if the file exists."""
    with writing(f"the key file {path}"):
        create_file(path, new_key_file())


def read_key_file(path: Path) -> Secret:
    """Read a key file: 32 bytes in hexadecimal, in a file that only its owner can read.

    Raises ``ConfigError``.
    """
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise ConfigError(f"cannot read the key file {path}: {error.strerror}") from None
    except ValueError:
        mode = 0  # an impossible path, which reading reports
    text = read_file(path, what="the key file", own=True)
    if mode & 0o077:
        raise ConfigError(
            f"the key file {path} can be read by others; make it private: chmod 600 {path}"
        )
    try:
        key = bytes.fromhex(text.decode("ascii"))
    except ValueError:
        # The decoder's own message would quote the content.
        raise ConfigError(f"the key file {path} is not hexadecimal") from None
    if len(key) != SEAL_KEY_BYTES:
        raise ConfigError(f"the key file {path} must hold {SEAL_KEY_BYTES} bytes")
    return Secret(key)


class Seal:
    """Encryption at rest: nonce, ciphertext and tag, under the key of a key file.

    Args:
        key: encrypts and decrypts.
        others: keys that only decrypt.
    """

    def __init__(self, key: Secret, *others: Secret) -> None:
        self._ciphers = tuple(AESGCM(one.reveal()) for one in (key, *others))

    def seal(self, key: Secret, place: bytes) -> bytes:
        """Encrypt a key for the row that ``place`` identifies."""
        nonce = os.urandom(NONCE_BYTES)
        return nonce + self._ciphers[0].encrypt(nonce, key.reveal(), place)

    def open(self, sealed: bytes, place: bytes) -> Secret:
        """Decrypt a key of a row. Raises ``cryptography.exceptions.InvalidTag``."""
        return self._opened(sealed, place)[1]

    def renewed(self, sealed: bytes, place: bytes) -> bytes | None:
        """Encrypt the same key under the first of our keys. Returns ``None`` if it is already, or
        if it cannot be decrypted: a damaged key is erased when it is used."""
        try:
            number, key = self._opened(sealed, place)
        except InvalidTag:
            return None
        return None if number == 0 else self.seal(key, place)

    def number(self, sealed: bytes, place: bytes) -> int | None:
        """Return the index of our key that decrypts this; ``None`` if none does."""
        try:
            return self._opened(sealed, place)[0]
        except (InvalidTag, ValueError):
            return None

    def preferring(self, number: int) -> "Seal":
        """Return the same keys, with this one for encrypting."""
        other = copy(self)
        other._ciphers = (self._ciphers[number], *self._ciphers)
        return other

    def _opened(self, sealed: bytes, place: bytes) -> tuple[int, Secret]:
        if not isinstance(sealed, bytes) or len(sealed) < NONCE_BYTES:
            raise InvalidTag
        nonce, rest = sealed[:NONCE_BYTES], sealed[NONCE_BYTES:]
        for number, cipher in enumerate(self._ciphers):
            with suppress(InvalidTag):
                return number, Secret(cipher.decrypt(nonce, rest, place))
        raise InvalidTag


@dataclass(frozen=True, kw_only=True)
class SealRecord:
    """A store's record of the keys under which its rows are encrypted: a value under each."""

    current: bytes
    former: tuple[bytes, ...] = ()
    """Values of keys under which some rows are still encrypted."""
    retired: tuple[bytes, ...] = ()
    """Values of keys under which no row is encrypted any more."""

    @classmethod
    def new(cls, seal: Seal, place: bytes) -> "SealRecord":
        """The record of an empty store."""
        return cls(current=seal.seal(_CHECK, place))

    def settled(self, seal: Seal, place: bytes, store: str) -> "tuple[Seal, SealRecord]":
        """Return the keys in the order in which a process uses them, and the new record.

        A key file that is new to the store replaces the current one. A key file that was replaced
        before does not come back: the configuration of that process is out of date.

        Args:
            seal: the keys of the process.
            place: of the recorded values.
            store: its name, for messages.

        Raises:
            ConfigError: a key that rows may be encrypted under is not among these.
        """
        number = seal.number(self.current, place)
        if number is None:
            raise ConfigError(
                f"the key file is not the one under which the {store} was encrypted: name that "
                "file in key_file or, to replace it by this one, in read_key_files"
            )
        if any(seal.number(one, place) is None for one in self.former):
            raise ConfigError(
                f"keys in the {store} are still encrypted under an earlier key file: list it in "
                "read_key_files until the log says that it can be removed"
            )
        if number == 0:
            return seal, self
        if any(seal.number(one, place) == 0 for one in (*self.former, *self.retired)):
            return seal.preferring(number), self
        return seal, SealRecord(
            current=seal.seal(_CHECK, place),
            former=(*self.former, self.current),
            retired=self.retired,
        )

    def renewed(self) -> "SealRecord":
        """The record after every row has been encrypted under the current key."""
        return SealRecord(current=self.current, retired=(*self.retired, *self.former))


_CHECK: Final = Secret(b"seal")


def place_of(table: str, *columns: str) -> bytes:
    """The associated data of a sealed key: the table and the columns that identify the row."""
    return table.encode() + b"".join(vector32(column.encode()) for column in columns)
