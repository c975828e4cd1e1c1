"""The key database: which keys are still to be had, by whom, and which are gone for good.

A key lives in one of three tables::

    material   keys of a link that nobody was promised           reserve -> allot | accept
    grants     a promised key, one row for each slave SAE        collect
    spent      IDs that left ``material``, so that none returns

One rule holds everything together: *a key leaves the database, durably, before it leaves the
process.* After a crash at any instant a key may be lost that was on its way out; none is given
out twice.

Keys at rest are sealed with AES-256-GCM under the key of a key file; the associated data is the
place in the database, so that a row cannot pose as another. With random 96-bit nonces one key file
serves for 2^32 writes (NIST SP 800-38D section 8.3).
"""

import os
import sqlite3
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, ParamSpec, Protocol, TypeVar
from uuid import UUID

import trio
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from hybridkex.errors import (
    ConfigError,
    KeyConsumed,
    KeyExpired,
    KeySourceUnavailable,
    KeyUnauthorized,
    KeyUnknown,
)
from hybridkex.secret import Secret

__all__ = [
    "Allotment",
    "KeyStore",
    "Material",
    "Refused",
    "SqliteKeyStore",
    "read_key_file",
    "write_key_file",
]

P = ParamSpec("P")
T = TypeVar("T")

NONCE_BYTES: Final = 12
SEAL_KEY_BYTES: Final = 32

SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS material (
    seq INTEGER PRIMARY KEY,
    key_id BLOB NOT NULL UNIQUE,
    link TEXT NOT NULL,
    half INTEGER NOT NULL,
    shared INTEGER NOT NULL,
    created REAL NOT NULL,
    sealed BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS material_order ON material (link, half, seq);
CREATE TABLE IF NOT EXISTS grants (
    key_id BLOB NOT NULL,
    slave TEXT NOT NULL,
    master TEXT NOT NULL,
    link TEXT NOT NULL,
    created REAL NOT NULL,
    sealed BLOB,
    ended TEXT,
    PRIMARY KEY (key_id, slave)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS grants_age ON grants (created);
CREATE TABLE IF NOT EXISTS spent (key_id BLOB PRIMARY KEY, at REAL NOT NULL) WITHOUT ROWID;
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Material:
    """A key of a link that nobody was promised."""

    key_id: UUID
    key: Secret
    created: float
    shared: bool
    """The KME at the other end has it too, from the link."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Allotment:
    """A key made for SAEs out of blocks of material: their concatenation, cut to ``size`` bytes.

    Its ID is the first block's. ``value`` is present where the other side cannot know the blocks.
    """

    blocks: tuple[UUID, ...]
    size: int
    value: Secret | None = None

    @property
    def key_id(self) -> UUID:
        return self.blocks[0]


class Refused(Exception):  # an answer between the two KMEs, not a failure
    """Blocks that cannot be allotted, with the reason: ``unknown``, ``busy`` or ``spent``."""

    def __init__(self, reasons: dict[UUID, str]) -> None:
        super().__init__(f"{len(reasons)} blocks refused")
        self.reasons = reasons


class KeyStore(Protocol):
    """What a KME needs of a database. Each method is one transaction, durable when it returns."""

    async def add(
        self, link: str, keys: Iterable[tuple[UUID, Secret]], *, shared: bool = True
    ) -> None:
        """Take in new material; IDs that were here before are dropped silently."""
        ...

    async def reserve(
        self, link: str, number: int, *, half: int = 0, skip: Iterable[UUID] = ()
    ) -> list[Material]:
        """Up to ``number`` keys, oldest first, those of our ``half`` before the others.

        Nobody else gets them until :meth:`release` or :meth:`allot`. A reservation need not
        survive a crash.
        """
        ...

    async def release(self, key_ids: Iterable[UUID]) -> None:
        """End reservations; what was not allotted is free again."""
        ...

    async def allot(
        self, link: str, allotments: Sequence[Allotment], *, master: str, slaves: Sequence[str] = ()
    ) -> None:
        """Spend reserved blocks: the master gets the keys now, ``slaves`` of this KME may later.

        Raises :class:`~hybridkex.errors.KeyConsumed` when a block is gone.
        """
        ...

    async def accept(
        self,
        link: str,
        allotments: Sequence[Allotment],
        *,
        master: str,
        slaves: Sequence[str],
        peer_half: int = 0,
    ) -> None:
        """Promise to ``slaves`` what the KME at the other end has allotted. All or nothing.

        Raises :class:`Refused`. A block that we have reserved goes to the peer only if it is of the
        peer's half.
        """
        ...

    async def collect(
        self, key_ids: Sequence[UUID], *, slave: str, master: str
    ) -> list[tuple[UUID, Secret]]:
        """Give a slave its copy of keys, once. All or nothing.

        Raises :class:`~hybridkex.errors.KeyUnknown`, ``KeyConsumed``, ``KeyExpired`` or
        ``KeyUnauthorized``.
        """
        ...

    async def void(self, link: str, key_ids: Iterable[UUID]) -> None:
        """Erase keys that the other end will not use: material, and grants not yet collected."""
        ...

    async def expire(self, *, keys_before: float, tombstones_before: float) -> int:
        """Erase keys older than the first time, forget gone ones older than the second.

        Times are seconds since the epoch. Returns how many keys were erased.
        """
        ...

    async def scrub(self) -> None:
        """Make sure that keys which left the tables have left the files too, sealed or not.

        Free if nothing changed since the last time.
        """
        ...

    async def count(self, link: str) -> int:
        """Keys of material of a link."""
        ...

    async def shared_ids(self, link: str, *, created_before: float) -> list[UUID]:
        """The IDs of shared material older than a time."""
        ...

    async def unknown(self, link: str, key_ids: Sequence[UUID]) -> list[UUID]:
        """Those of these IDs that are not material of the link."""
        ...

    async def aclose(self) -> None: ...


def write_key_file(path: Path) -> None:
    """Make a new key file, readable by the owner alone. Raises ``ConfigError`` if it exists."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise ConfigError(f"cannot make the key file {path}: {error.strerror}") from error
    with os.fdopen(handle, "w", encoding="ascii") as file:
        file.write(os.urandom(SEAL_KEY_BYTES).hex() + "\n")


def read_key_file(path: Path) -> Secret:
    """The key of a key file: 32 bytes in hexadecimal, in a file that only its owner can read."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the key file {path}: {error.strerror}") from error
    if mode & 0o077:
        raise ConfigError(f"the key file {path} must be readable by its owner alone (mode 600)")
    try:
        key = bytes.fromhex(text.decode("ascii"))
    except ValueError:
        # The decoder's own message would quote the content.
        raise ConfigError(f"the key file {path} is not hexadecimal") from None
    if len(key) != SEAL_KEY_BYTES:
        raise ConfigError(f"the key file {path} must hold {SEAL_KEY_BYTES} bytes")
    return Secret(key)


class SqliteKeyStore:
    """The embedded key store: one SQLite file, for one process.

    Write-ahead log with ``synchronous=FULL``: one flush to the disk for each transaction. Deleted
    rows are overwritten in the tables (``secure_delete``), but the log keeps them until
    :meth:`scrub` empties it; that is one flush more, so the caller chooses when. Calls run one
    after the other in a worker thread, and a call that began is not cancelled, so its outcome is
    never in doubt while the process lives.
    """

    def __init__(self, path: Path, seal_key: Secret) -> None:
        """Open or make the database. Raises ``ConfigError`` for a wrong key file or a bad file."""
        self._seal = AESGCM(seal_key.reveal())
        self._lock = trio.Lock()
        self._reserved: set[UUID] = set()
        self._unscrubbed = True
        try:
            path.touch(mode=0o600, exist_ok=True)
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"cannot open the key store {path}: {error}") from error
        try:
            self._db.executescript(
                "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA secure_delete=ON;"
                "PRAGMA busy_timeout=5000;" + SCHEMA
            )
            self._check_seal(path)
        except sqlite3.Error as error:
            self._db.close()
            raise ConfigError(f"cannot use the key store {path}: {error}") from error
        except ConfigError:
            self._db.close()
            raise

    def _check_seal(self, path: Path) -> None:
        row = self._db.execute("SELECT value FROM meta WHERE name = 'seal'").fetchone()
        if row is None:
            value = self._sealed(Secret(b"seal"), b"meta")
            self._db.execute("INSERT INTO meta VALUES ('seal', ?)", (value,))
            return
        try:
            self._opened(row[0], b"meta")
        except InvalidTag:
            raise ConfigError(f"the key store {path} is sealed under another key file") from None

    # -- what is written at rest

    def _sealed(self, key: Secret, place: bytes) -> bytes:
        nonce = os.urandom(NONCE_BYTES)
        return nonce + self._seal.encrypt(nonce, key.reveal(), place)

    def _opened(self, sealed: bytes, place: bytes) -> Secret:
        return Secret(self._seal.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], place))

    @staticmethod
    def _material_place(link: str, key_id: bytes) -> bytes:
        return b"material\0" + key_id + link.encode()

    @staticmethod
    def _grant_place(slave: str, key_id: bytes) -> bytes:
        return b"grant\0" + key_id + slave.encode()

    # -- how a call runs

    async def _run(
        self, operation: Callable[P, T], /, *arguments: P.args, **options: P.kwargs
    ) -> T:
        def call() -> T:
            try:
                return operation(*arguments, **options)
            except (sqlite3.Error, InvalidTag) as error:
                raise KeySourceUnavailable(f"the key store failed: {error!r}") from error

        async with self._lock:
            return await trio.to_thread.run_sync(call)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        self._unscrubbed = True
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield self._db
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    async def scrub(self) -> None:
        await self._run(self._scrub)

    def _scrub(self) -> None:
        if self._unscrubbed:
            busy, *_ = self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            self._unscrubbed = bool(busy)

    # -- meta

    def set_meta(self, name: str, value: str) -> None:
        """Note a fact about the database under a name, when it is made."""
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (f"x-{name}", value))

    def meta(self, name: str) -> str | None:
        """A fact noted with :meth:`set_meta`."""
        row = self._db.execute("SELECT value FROM meta WHERE name = ?", (f"x-{name}",)).fetchone()
        return None if row is None else str(row[0])

    # -- material

    async def add(
        self, link: str, keys: Iterable[tuple[UUID, Secret]], *, shared: bool = True
    ) -> None:
        await self._run(self._add, link, list(keys), shared)

    def _add(self, link: str, keys: list[tuple[UUID, Secret]], shared: bool) -> None:
        now = time.time()
        rows = [
            (
                key_id.bytes,
                link,
                key_id.bytes[-1] & 1,
                shared,
                now,
                self._sealed(key, self._material_place(link, key_id.bytes)),
                key_id.bytes,
            )
            for key_id, key in keys
        ]
        with self._transaction() as db:
            db.executemany(
                "INSERT OR IGNORE INTO material (key_id, link, half, shared, created, sealed)"
                " SELECT ?, ?, ?, ?, ?, ? WHERE NOT EXISTS (SELECT 1 FROM spent WHERE key_id = ?)",
                rows,
            )

    async def reserve(
        self, link: str, number: int, *, half: int = 0, skip: Iterable[UUID] = ()
    ) -> list[Material]:
        return await self._run(self._reserve, link, number, half, frozenset(skip))

    def _reserve(self, link: str, number: int, half: int, skip: frozenset[UUID]) -> list[Material]:
        found: list[Material] = []
        for part in (half, 1 - half):
            rows = self._db.execute(
                "SELECT key_id, shared, created, sealed FROM material"
                " WHERE link = ? AND half = ? ORDER BY seq",
                (link, part),
            )
            for key_id, shared, created, sealed in rows:
                if len(found) == number:
                    break
                name = UUID(bytes=key_id)
                if name not in self._reserved and name not in skip:
                    key = self._opened(sealed, self._material_place(link, key_id))
                    found.append(
                        Material(key_id=name, key=key, created=created, shared=bool(shared))
                    )
            rows.close()
        self._reserved.update(material.key_id for material in found)
        return found

    async def release(self, key_ids: Iterable[UUID]) -> None:
        # No I/O and no lock: the set belongs to this process and a difference is one step.
        self._reserved.difference_update(key_ids)
        await trio.lowlevel.checkpoint()

    async def count(self, link: str) -> int:
        return await self._run(self._count, link)

    def _count(self, link: str) -> int:
        row = self._db.execute("SELECT count(*) FROM material WHERE link = ?", (link,)).fetchone()
        return int(row[0])

    async def shared_ids(self, link: str, *, created_before: float) -> list[UUID]:
        return await self._run(self._shared_ids, link, created_before)

    def _shared_ids(self, link: str, created_before: float) -> list[UUID]:
        rows = self._db.execute(
            "SELECT key_id FROM material WHERE link = ? AND shared AND created < ?",
            (link, created_before),
        )
        return [UUID(bytes=row[0]) for row in rows if UUID(bytes=row[0]) not in self._reserved]

    async def unknown(self, link: str, key_ids: Sequence[UUID]) -> list[UUID]:
        return await self._run(self._unknown, link, key_ids)

    def _unknown(self, link: str, key_ids: Sequence[UUID]) -> list[UUID]:
        query = "SELECT 1 FROM material WHERE key_id = ? AND link = ?"
        return [
            key_id
            for key_id in key_ids
            if self._db.execute(query, (key_id.bytes, link)).fetchone() is None
        ]

    # -- from material to grants

    async def allot(
        self, link: str, allotments: Sequence[Allotment], *, master: str, slaves: Sequence[str] = ()
    ) -> None:
        await self._run(self._allot, link, allotments, master, slaves)

    def _allot(
        self, link: str, allotments: Sequence[Allotment], master: str, slaves: Sequence[str]
    ) -> None:
        with self._transaction():
            for allotment in allotments:
                key = self._assemble(link, allotment)
                if key is None:
                    raise KeyConsumed(f"a block of key {allotment.key_id} is gone")
                self._grant(link, allotment.key_id, key, master, slaves)
        self._reserved.difference_update(b for one in allotments for b in one.blocks)

    async def accept(
        self,
        link: str,
        allotments: Sequence[Allotment],
        *,
        master: str,
        slaves: Sequence[str],
        peer_half: int = 0,
    ) -> None:
        await self._run(self._accept, link, allotments, master, slaves, peer_half)

    def _accept(
        self,
        link: str,
        allotments: Sequence[Allotment],
        master: str,
        slaves: Sequence[str],
        peer_half: int,
    ) -> None:
        with self._transaction() as db:
            reasons: dict[UUID, str] = {}
            for allotment in allotments:
                for block in allotment.blocks:
                    reason = self._objection(db, link, block, allotment.value, peer_half)
                    if reason is not None:
                        reasons[block] = reason
            if reasons:
                raise Refused(reasons)
            for allotment in allotments:
                key = allotment.value
                if key is None:
                    key = self._assemble(link, allotment)
                if key is None:
                    # One block twice in one request: the first use took it.
                    raise Refused(dict.fromkeys(allotment.blocks, "spent"))
                if allotment.value is not None:
                    self._spend(db, allotment.blocks)
                self._grant(link, allotment.key_id, key, master, slaves)

    def _objection(
        self,
        db: sqlite3.Connection,
        link: str,
        block: UUID,
        value: Secret | None,
        peer_half: int,
    ) -> str | None:
        """Why a block cannot go to the peer; ``None`` if it can."""
        if db.execute("SELECT 1 FROM spent WHERE key_id = ?", (block.bytes,)).fetchone():
            return "spent"
        if value is not None:
            return None
        here = db.execute(
            "SELECT 1 FROM material WHERE key_id = ? AND link = ?", (block.bytes, link)
        ).fetchone()
        if here is None:
            return "unknown"
        if block in self._reserved and block.bytes[-1] & 1 != peer_half:
            return "busy"
        return None

    def _assemble(self, link: str, allotment: Allotment) -> Secret | None:
        """Take the blocks out of the material; ``None`` if one is not there."""
        parts: list[bytes] = []
        for block in allotment.blocks:
            row = self._db.execute(
                "DELETE FROM material WHERE key_id = ? AND link = ? RETURNING sealed",
                (block.bytes, link),
            ).fetchone()
            if row is None:
                return None
            parts.append(self._opened(row[0], self._material_place(link, block.bytes)).reveal())
        self._spend(self._db, allotment.blocks)
        return Secret(b"".join(parts)[: allotment.size])

    @staticmethod
    def _spend(db: sqlite3.Connection, key_ids: Iterable[UUID]) -> None:
        now = time.time()
        db.executemany(
            "INSERT OR IGNORE INTO spent VALUES (?, ?)", [(key_id.bytes, now) for key_id in key_ids]
        )

    def _grant(
        self, link: str, key_id: UUID, key: Secret, master: str, slaves: Iterable[str]
    ) -> None:
        now = time.time()
        for slave in slaves:
            sealed = self._sealed(key, self._grant_place(slave, key_id.bytes))
            self._db.execute(
                "INSERT INTO grants (key_id, slave, master, link, created, sealed)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (key_id.bytes, slave, master, link, now, sealed),
            )

    # -- from grants to slaves

    async def collect(
        self, key_ids: Sequence[UUID], *, slave: str, master: str
    ) -> list[tuple[UUID, Secret]]:
        return await self._run(self._collect, key_ids, slave, master)

    def _collect(
        self, key_ids: Sequence[UUID], slave: str, master: str
    ) -> list[tuple[UUID, Secret]]:
        with self._transaction() as db:
            return [(key_id, self._collect_one(db, key_id, slave, master)) for key_id in key_ids]

    def _collect_one(self, db: sqlite3.Connection, key_id: UUID, slave: str, master: str) -> Secret:
        row = db.execute(
            "SELECT master, sealed, ended FROM grants WHERE key_id = ? AND slave = ?",
            (key_id.bytes, slave),
        ).fetchone()
        if row is None:
            other = db.execute(
                "SELECT 1 FROM grants WHERE key_id = ? AND master = ?", (key_id.bytes, master)
            ).fetchone()
            if other is not None:
                raise KeyUnauthorized(f"key {key_id} is not for {slave}")
            raise KeyUnknown(f"no key {key_id}")
        if row[0] != master:
            raise KeyUnknown(f"no key {key_id} of {master}")
        if row[2] == "expired":
            raise KeyExpired(f"key {key_id} has expired")
        if row[2] is not None:
            raise KeyConsumed(f"key {key_id} is {row[2]}")
        db.execute(
            "UPDATE grants SET sealed = NULL, ended = 'delivered' WHERE key_id = ? AND slave = ?",
            (key_id.bytes, slave),
        )
        return self._opened(row[1], self._grant_place(slave, key_id.bytes))

    # -- the end of keys

    async def void(self, link: str, key_ids: Iterable[UUID]) -> None:
        await self._run(self._void, link, list(key_ids))

    def _void(self, link: str, key_ids: list[UUID]) -> None:
        with self._transaction() as db:
            # An ID that never was here is noted too: it may still be on its way to us.
            self._spend(db, key_ids)
            for key_id in key_ids:
                place = (key_id.bytes, link)
                db.execute("DELETE FROM material WHERE key_id = ? AND link = ?", place)
                db.execute(
                    "UPDATE grants SET sealed = NULL, ended = 'void'"
                    " WHERE key_id = ? AND link = ? AND ended IS NULL",
                    place,
                )

    async def expire(self, *, keys_before: float, tombstones_before: float) -> int:
        return await self._run(self._expire, keys_before, tombstones_before)

    def _expire(self, keys_before: float, tombstones_before: float) -> int:
        with self._transaction() as db:
            old = [
                UUID(bytes=row[0])
                for row in db.execute(
                    "DELETE FROM material WHERE created < ? RETURNING key_id", (keys_before,)
                )
            ]
            self._spend(db, old)
            grants = db.execute(
                "UPDATE grants SET sealed = NULL, ended = 'expired'"
                " WHERE created < ? AND ended IS NULL",
                (keys_before,),
            ).rowcount
            db.execute(
                "DELETE FROM grants WHERE created < ? AND ended IS NOT NULL", (tombstones_before,)
            )
            db.execute("DELETE FROM spent WHERE at < ?", (tombstones_before,))
        return len(old) + grants

    def close(self) -> None:
        """Close the database while no call is under way."""
        self._db.close()

    async def aclose(self) -> None:
        """Close the database after the call under way."""
        with trio.CancelScope(shield=True):
            await self._run(self._db.close)
