"""The key database: the keys of each link, the SAEs that may collect them, and the used IDs.

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

import math
import os
import sqlite3
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final, ParamSpec, TypeAlias, TypeVar
from uuid import UUID

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
from hybridkex.files import create_file, read_file
from hybridkex.machine import write_error
from hybridkex.net.event_loop import Lock, checkpoint, in_thread, shielded
from hybridkex.net.threads import NoThread
from hybridkex.secret import Secret
from hybridkex.text import get_logger

__all__ = [
    "Allotment",
    "BlockState",
    "BlocksRefused",
    "KeyStore",
    "Material",
    "half_of",
    "open_locked",
    "read_key_file",
    "write_key_file",
]

LOG: Final = get_logger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

_Inode: TypeAlias = tuple[int, int] | None
"""Device and inode of a file; ``None`` if there is no file."""

NONCE_BYTES: Final = 12
SEAL_BYTES: Final = NONCE_BYTES + 16
"""By which a sealed key is longer than the key: nonce and tag."""
SEAL_KEY_BYTES: Final = 32

SCHEMA_VERSION: Final = 2
"""``PRAGMA user_version`` of the tables below; 0 with tables is version 1, which did not set it."""

ANY_LINK: Final = ""
"""The link of a spent ID from version 1, which did not record it: spent on every link."""

TABLES: Final = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE material (
    seq INTEGER PRIMARY KEY,
    link TEXT NOT NULL,
    key_id TEXT NOT NULL,
    half INTEGER NOT NULL,
    shared INTEGER NOT NULL,
    created REAL NOT NULL,
    sealed BLOB NOT NULL,
    UNIQUE (link, key_id)
);
CREATE INDEX material_order ON material (link, half, seq);
CREATE TABLE grants (
    link TEXT NOT NULL,
    key_id TEXT NOT NULL,
    slave TEXT NOT NULL,
    master TEXT NOT NULL,
    created REAL NOT NULL,
    sealed BLOB,
    ended TEXT,
    PRIMARY KEY (link, key_id, slave)
) WITHOUT ROWID;
CREATE INDEX grants_age ON grants (created);
CREATE TABLE spent (
    link TEXT NOT NULL,
    key_id TEXT NOT NULL,
    at REAL NOT NULL,
    PRIMARY KEY (link, key_id)
) WITHOUT ROWID;
CREATE INDEX spent_age ON spent (at);
"""


def half_of(key_id: str) -> int:
    """The half of a link, 0 or 1, that a key ID belongs to: each of the two KMEs owns one."""
    return key_id.encode()[-1] & 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Material:
    """A key of a link that is promised to nobody."""

    key_id: str
    key: Secret
    created: float
    """Seconds since the epoch."""
    shared: bool
    """Whether the KME at the other end has the key from the link, too."""


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


class BlocksRefused(Exception):  # an answer between two KMEs, not a failure
    """Blocks that cannot be allotted, each with its state."""

    def __init__(self, states: dict[str, BlockState]) -> None:
        super().__init__(f"{len(states)} blocks cannot be allotted")
        self.states: Final = states


def write_key_file(path: Path) -> None:
    """Create a key file that only its owner can read. Raises ``ConfigError`` if the file exists."""
    try:
        create_file(path, os.urandom(SEAL_KEY_BYTES).hex().encode("ascii") + b"\n")
    except OSError as error:
        raise write_error(f"the key file {path}", error) from error


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
    text = read_file(path, what="the key file")
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


class KeyStore:
    """A key database in one SQLite file. Each method is one transaction, durable on return.

    Only one process may have a store open, because reservations are in memory: the file is locked
    (``locking_mode=EXCLUSIVE``), whatever name it is opened by, until the store is closed or its
    process ends. It is a file-system lock, so it also works on a network file system with locks.

    The lock applies to the file, not to its name, and a removed write-ahead log would be lost with
    the process. So every call checks, before and after, that the names still refer to the open
    files. While the database is moved or replaced, calls fail as on a broken disk, and work again
    once it is back. A removed write-ahead log is written into the database, and a new one is begun.

    The write-ahead log is flushed once in each transaction (``synchronous=FULL``). Deleted rows are
    overwritten in the tables (``secure_delete``), and remain in the log until :meth:`scrub` empties
    it; that costs another flush, so the caller chooses when.

    Calls run one after the other in a worker thread. A call that has begun is not cancelled, so its
    outcome is known while the process lives. A call that fails (the disk is full or unreadable)
    raises :class:`~hybridkex.errors.KeySourceUnavailable`, changes nothing, and leaves the store
    usable: once the disk works again, so does the store.
    """

    def __init__(
        self, path: Path, seal_key: Secret, *, on_failure: Callable[[], object] = lambda: None
    ) -> None:
        """Open a database, or create it if there is no file. Blocks briefly.

        ``on_failure`` is called, in a worker thread, for each call that fails.

        Raises:
            ConfigError: the store is in use, the key file belongs to another store, the file is not
                a key store or is of a later version, or it cannot be read and written.
        """
        self._path = path
        self._seal = AESGCM(seal_key.reveal())
        self._on_failure = on_failure
        self._failing = False
        self._lock = Lock()
        self._reserved: set[tuple[str, str]] = set()
        self._unscrubbed = True
        self._real = path.resolve()
        self._db = open_locked(path)
        try:
            self._prepare()
            self._files = self._found_files()
        except (sqlite3.Error, InvalidTag) as error:
            self._db.close()
            raise ConfigError(f"cannot use the key store {path}: {_reason(error)}") from error
        except BaseException:
            self._db.close()
            raise

    def _found_files(self) -> tuple[_Inode, _Inode]:
        """The files that the names of the database and its write-ahead log refer to."""
        return _inode(self._real), _inode(Path(f"{self._real}-wal"))

    def _check_files(self) -> None:
        """Preserve locking and durability even if other programs move or remove the files.

        Raises ``sqlite3.OperationalError``: the database is no longer under its name.
        """
        found = self._found_files()
        if found == self._files:
            return
        if found[0] != self._files[0] or found[0] is None:
            raise sqlite3.OperationalError(
                "the file was moved, removed or replaced while it was in use; put it back, or "
                "restart this process with the current file"
            )
        if self._files[1] is None:  # created by the first write
            self._files = found
            return
        # Closing writes the removed log, which is still open, into the database.
        self._db.close()
        self._db = open_locked(self._path)
        self._unscrubbed = True
        self._prepare()
        self._files = self._found_files()
        LOG.error(
            "the write-ahead log of the key store %s was removed while it was in use; its content "
            "is in the database, and a new one is begun",
            self._path,
        )

    def _prepare(self) -> None:
        """Check that the file is ours and create or migrate its tables, all in one transaction."""
        [version] = self._db.execute("PRAGMA user_version").fetchone()
        tables = {row[0] for row in self._db.execute("SELECT name FROM sqlite_master")}
        if version > SCHEMA_VERSION:
            raise ConfigError(
                f"the key store {self._path} was written by a later version of hybridkex"
            )
        if tables and not {"meta", "material", "grants", "spent"} <= tables:
            raise ConfigError(f"{self._path} is a database, and not a key store")
        if tables:
            self._check_seal()
        # The file is ours: now it may change.
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute("PRAGMA secure_delete=ON")
        if version == SCHEMA_VERSION:
            return
        with self._transaction() as db:
            if tables:
                self._migrate_from_1(db)
            else:
                _execute_all(db, TABLES)
                seal = self._sealed(Secret(b"seal"), b"meta")
                db.execute("INSERT INTO meta VALUES ('seal', ?)", (seal,))
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _check_seal(self) -> None:
        row = self._db.execute("SELECT value FROM meta WHERE name = 'seal'").fetchone()
        try:
            self._opened(row[0] if row else b"", b"meta")
        except (InvalidTag, ValueError):
            raise ConfigError(
                f"the key file is not the one under which the key store {self._path} was encrypted"
            ) from None

    def _migrate_from_1(self, db: sqlite3.Connection) -> None:
        """Version 1 had no link in its primary keys, and stored key IDs as the 16 bytes of a
        UUID."""
        for table in ("meta", "material", "grants", "spent"):
            db.execute(f"ALTER TABLE {table} RENAME TO old_{table}")
        for index in ("material_order", "grants_age"):
            db.execute(f"DROP INDEX IF EXISTS {index}")
        _execute_all(db, TABLES)
        db.execute("INSERT INTO meta SELECT * FROM old_meta")
        rows = db.execute("SELECT key_id, link, shared, created, sealed FROM old_material")
        for old_id, link, shared, created, sealed in rows.fetchall():
            key_id = str(UUID(bytes=old_id))
            key = self._opened(sealed, b"material\0" + old_id + link.encode())
            db.execute(
                "INSERT INTO material (link, key_id, half, shared, created, sealed)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (link, key_id, half_of(key_id), shared, created,
                 self._sealed(key, _place("material", link, key_id))),
            )  # fmt: skip
        rows = db.execute(
            "SELECT key_id, slave, master, link, created, sealed, ended FROM old_grants"
        )
        for old_id, slave, master, link, created, sealed, ended in rows.fetchall():
            key_id = str(UUID(bytes=old_id))
            if sealed is not None:
                key = self._opened(sealed, b"grant\0" + old_id + slave.encode())
                sealed = self._sealed(key, _place("grant", link, key_id, master, slave))  # noqa: PLW2901
            db.execute(
                "INSERT INTO grants VALUES (?, ?, ?, ?, ?, ?, ?)",
                (link, key_id, slave, master, created, sealed, ended),
            )
        db.executemany(
            "INSERT INTO spent VALUES (?, ?, ?)",
            [
                (ANY_LINK, str(UUID(bytes=old_id)), at)
                for old_id, at in db.execute("SELECT key_id, at FROM old_spent").fetchall()
            ],
        )
        for table in ("meta", "material", "grants", "spent"):
            db.execute(f"DROP TABLE old_{table}")

    # -- encryption at rest

    def _sealed(self, key: Secret, place: bytes) -> bytes:
        nonce = os.urandom(NONCE_BYTES)
        return nonce + self._seal.encrypt(nonce, key.reveal(), place)

    def _opened(self, sealed: bytes, place: bytes) -> Secret:
        return Secret(self._seal.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], place))

    # -- running a call

    async def _run(
        self, operation: Callable[P, T], /, *arguments: P.args, **options: P.kwargs
    ) -> T:
        def call() -> T:
            try:
                self._check_files()
                result = operation(*arguments, **options)
                self._check_files()
            except (sqlite3.Error, InvalidTag, ConfigError, MemoryError) as error:
                self._on_failure()
                text = _reason(error)
                if not self._failing:  # once, not for every call until the store works again
                    LOG.error("the key store %s failed: %s", self._path, text)  # noqa: TRY400
                self._failing = True
                raise KeySourceUnavailable(f"the key store failed: {text}") from error
            return result

        async with self._lock:
            try:
                return await in_thread(call)
            except NoThread as error:
                self._on_failure()
                raise KeySourceUnavailable(f"the key store failed: {error}") from error

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """One durable change or none, even if the commit itself fails, as on a full disk."""
        self._unscrubbed = True
        self._undo()  # a failed roll-back may have left a transaction
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield self._db
            self._db.execute("COMMIT")
        except BaseException:
            self._undo()
            raise
        if self._failing:
            LOG.warning("the key store %s works again", self._path)
        self._failing = False

    def _undo(self) -> None:
        if self._db.in_transaction:  # SQLite ends a transaction by itself on some errors
            with suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")

    async def scrub(self) -> None:
        """Make sure that keys which left the tables have left the files too.

        Does nothing if nothing has changed since the last time.
        """
        await self._run(self._scrub)

    def _scrub(self) -> None:
        if self._unscrubbed:
            busy, *_ = self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            self._unscrubbed = bool(busy)

    # -- meta

    def set_meta(self, values: dict[str, str]) -> None:
        """Store facts about the database by name. Blocks; call it when opening a store."""
        with self._transaction() as db:
            db.executemany(
                "INSERT OR REPLACE INTO meta VALUES (?, ?)",
                [(f"x-{name}", value) for name, value in values.items()],
            )

    def meta(self, name: str) -> str | None:
        """A fact stored with :meth:`set_meta`."""
        row = self._db.execute("SELECT value FROM meta WHERE name = ?", (f"x-{name}",)).fetchone()
        return None if row is None else str(row[0])

    # -- material

    async def add(
        self, link: str, keys: Iterable[tuple[str, Secret]], *, shared: bool = True
    ) -> None:
        """Add material. IDs that the link has or had are ignored, so a call can be repeated."""
        await self._run(self._add, link, list(keys), shared)

    def _add(self, link: str, keys: list[tuple[str, Secret]], shared: bool) -> None:
        now = time.time()
        with self._transaction() as db:
            for key_id, key in keys:
                if not self._is_spent(link, key_id):
                    sealed = self._sealed(key, _place("material", link, key_id))
                    db.execute(
                        "INSERT OR IGNORE INTO material (link, key_id, half, shared, created,"
                        " sealed) VALUES (?, ?, ?, ?, ?, ?)",
                        (link, key_id, half_of(key_id), shared, now, sealed),
                    )

    def _is_spent(self, link: str, key_id: str) -> bool:
        row = self._db.execute(
            "SELECT 1 FROM spent WHERE link IN (?, ?) AND key_id = ?", (link, ANY_LINK, key_id)
        ).fetchone()
        return row is not None

    def _has_material(self, link: str, key_id: str) -> bool:
        row = self._db.execute(
            "SELECT 1 FROM material WHERE link = ? AND key_id = ?", (link, key_id)
        ).fetchone()
        return row is not None

    async def reserve(
        self, link: str, number: int, *, half: int = 0, skip: Iterable[str] = ()
    ) -> list[Material]:
        """Up to ``number`` keys of a link, oldest first, those of ``half`` before the others.

        They are reserved for the caller until :meth:`release` or :meth:`allot`. A reservation is in
        memory and ends with the process. Keys in ``skip`` are passed over.
        """
        return await self._run(self._reserve, link, number, half, frozenset(skip))

    def _reserve(self, link: str, number: int, half: int, skip: frozenset[str]) -> list[Material]:
        found: list[Material] = []
        damaged: list[str] = []
        for part in (half, 1 - half):
            rows = self._db.execute(
                "SELECT key_id, shared, created, sealed FROM material"
                " WHERE link = ? AND half = ? ORDER BY seq",
                (link, part),
            )
            for key_id, shared, created, sealed in rows:
                if len(found) == number:
                    break
                if (link, key_id) in self._reserved or key_id in skip:
                    continue
                try:
                    key = self._opened(sealed, _place("material", link, key_id))
                except InvalidTag:
                    damaged.append(key_id)
                    continue
                found.append(Material(key_id=key_id, key=key, created=created, shared=bool(shared)))
            rows.close()
        if damaged:
            # One damaged row must not block the others.
            LOG.error("%s: %d damaged keys of %s are erased", self._path, len(damaged), link)
            with self._transaction():
                self._take_out(link, damaged)
        self._reserved.update((link, material.key_id) for material in found)
        return found

    async def release(self, link: str, key_ids: Iterable[str]) -> None:
        """End reservations; blocks that were not allotted are free again."""
        # No I/O and no lock: the set belongs to this process, and a difference is atomic.
        self._reserved.difference_update([(link, key_id) for key_id in key_ids])
        await checkpoint()

    async def count(self, link: str) -> int:
        """The number of keys that a link has as material."""
        return await self._run(self._count, link)

    def _count(self, link: str) -> int:
        row = self._db.execute("SELECT count(*) FROM material WHERE link = ?", (link,)).fetchone()
        return int(row[0])

    async def shared_ids(self, link: str, *, created_before: float) -> list[str]:
        """The IDs of a link's shared material that is older than a time and not reserved."""
        return await self._run(self._shared_ids, link, created_before)

    def _shared_ids(self, link: str, created_before: float) -> list[str]:
        rows = self._db.execute(
            "SELECT key_id FROM material WHERE link = ? AND shared AND created < ?",
            (link, created_before),
        )
        return [key_id for (key_id,) in rows if (link, key_id) not in self._reserved]

    async def unknown(self, link: str, key_ids: Sequence[str]) -> list[str]:
        """Those of these IDs that are not material of the link."""
        return await self._run(self._unknown, link, key_ids)

    def _unknown(self, link: str, key_ids: Sequence[str]) -> list[str]:
        return [key_id for key_id in key_ids if not self._has_material(link, key_id)]

    async def never_here(self, link: str, key_ids: Sequence[str]) -> list[str]:
        """Which of these blocks are neither material nor spent."""
        return await self._run(self._never_here, link, list(key_ids))

    def _never_here(self, link: str, key_ids: Sequence[str]) -> list[str]:
        return [one for one in self._unknown(link, key_ids) if not self._is_spent(link, one)]

    async def promised(self, link: str, *, most: int, block_bytes: int) -> int:
        """How many blocks the promised keys have that no SAE has collected.

        The count ends when it reaches ``most``. Each slave of a key counts.
        """
        return await self._run(self._promised, link, most, block_bytes)

    def _promised(self, link: str, most: int, block_bytes: int) -> int:
        found = self._db.execute(
            "SELECT length(sealed) FROM grants WHERE link = ? AND ended IS NULL", (link,)
        )
        blocks = 0
        for (length,) in found:
            blocks += math.ceil((length - SEAL_BYTES) / block_bytes)
            if blocks >= most:
                break
        return blocks

    # -- from material to grants

    async def allot(
        self, link: str, allotments: Sequence[Allotment], *, master: str, slaves: Sequence[str] = ()
    ) -> None:
        """Spend reserved blocks: ``master`` gets the keys now, ``slaves`` of this KME may later.

        Raises :class:`~hybridkex.errors.KeyConsumed` when a block is gone.
        """
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
        self._reserved.difference_update(
            [(link, block) for one in allotments for block in one.blocks]
        )

    async def accept(
        self,
        link: str,
        allotments: Sequence[Allotment],
        *,
        master: str,
        slaves: Sequence[str],
        peer_half: int = 0,
    ) -> None:
        """Promise to ``slaves`` the keys that the KME at the other end allots. All or nothing.

        A block that we have reserved goes to the peer only if it belongs to the peer's half.

        Raises :class:`BlocksRefused`.
        """
        await self._run(self._accept, link, allotments, master, slaves, peer_half)

    def _accept(
        self,
        link: str,
        allotments: Sequence[Allotment],
        master: str,
        slaves: Sequence[str],
        peer_half: int,
    ) -> None:
        with self._transaction():
            states = {
                block: state
                for allotment in allotments
                for block in allotment.blocks
                if (state := self._objection(link, block, allotment.value, peer_half)) is not None
            }
            if states:
                raise BlocksRefused(states)
            for allotment in allotments:
                key = self._assemble(link, allotment)
                if key is None:
                    # The request lists the block twice; its first use took it.
                    raise BlocksRefused(dict.fromkeys(allotment.blocks, BlockState.SPENT))
                self._grant(link, allotment.key_id, key, master, slaves)

    def _objection(
        self, link: str, block: str, value: Secret | None, peer_half: int
    ) -> BlockState | None:
        """The reason to refuse a block to the peer; ``None`` if there is none."""
        if self._is_spent(link, block):
            return BlockState.SPENT
        if not self._has_material(link, block):
            return BlockState.UNKNOWN if value is None else None
        if (link, block) in self._reserved and half_of(block) != peer_half:
            return BlockState.RESERVED
        return None

    def _assemble(self, link: str, allotment: Allotment) -> Secret | None:
        """Remove the blocks from the material; ``None`` if one is gone, or missing and needed."""
        parts: list[bytes] = []
        for block in allotment.blocks:
            row = self._db.execute(
                "DELETE FROM material WHERE link = ? AND key_id = ? RETURNING sealed", (link, block)
            ).fetchone()
            if row is not None:
                parts.append(self._opened(row[0], _place("material", link, block)).reveal())
            elif allotment.value is None:
                return None
        if not self._spend(link, allotment.blocks):
            return None
        if allotment.value is not None:
            return allotment.value
        return Secret(b"".join(parts)[: allotment.size])

    def _spend(self, link: str, key_ids: Sequence[str]) -> bool:
        """Record IDs as spent. False: one of them already was."""
        now = time.time()
        new = 0
        for key_id in key_ids:
            new += self._db.execute(
                "INSERT OR IGNORE INTO spent VALUES (?, ?, ?)", (link, key_id, now)
            ).rowcount
        return new == len(key_ids)

    def _grant(
        self, link: str, key_id: str, key: Secret, master: str, slaves: Iterable[str]
    ) -> None:
        now = time.time()
        for slave in slaves:
            sealed = self._sealed(key, _place("grant", link, key_id, master, slave))
            self._db.execute(
                "INSERT INTO grants (link, key_id, slave, master, created, sealed)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (link, key_id, slave, master, now, sealed),
            )

    # -- from grants to slaves

    async def collect(
        self, link: str, key_ids: Sequence[str], *, slave: str, master: str
    ) -> list[tuple[str, Secret]]:
        """Deliver to a slave, once, its copy of keys that ``master`` drew. All or nothing.

        Raises :class:`~hybridkex.errors.KeyUnknown`, ``KeyConsumed``, ``KeyExpired`` or
        ``KeyUnauthorized``.
        """
        return await self._run(self._collect, link, key_ids, slave, master)

    def _collect(
        self, link: str, key_ids: Sequence[str], slave: str, master: str
    ) -> list[tuple[str, Secret]]:
        with self._transaction():
            return [(key_id, self._collect_one(link, key_id, slave, master)) for key_id in key_ids]

    def _collect_one(self, link: str, key_id: str, slave: str, master: str) -> Secret:
        row = self._db.execute(
            "SELECT sealed, ended FROM grants"
            " WHERE link = ? AND key_id = ? AND slave = ? AND master = ?",
            (link, key_id, slave, master),
        ).fetchone()
        if row is None:
            others = self._db.execute(
                "SELECT 1 FROM grants WHERE link = ? AND key_id = ? AND master = ?",
                (link, key_id, master),
            ).fetchone()
            if others is not None:
                raise KeyUnauthorized(f"key {key_id} is not for {slave}")
            raise KeyUnknown(f"there is no key {key_id} of {master}")
        sealed, ended = row
        if ended == "expired":
            raise KeyExpired(f"key {key_id} has expired")
        if ended is not None:
            raise KeyConsumed(f"key {key_id} is {ended}")
        self._db.execute(
            "UPDATE grants SET sealed = NULL, ended = 'delivered'"
            " WHERE link = ? AND key_id = ? AND slave = ? AND master = ?",
            (link, key_id, slave, master),
        )
        return self._opened(sealed, _place("grant", link, key_id, master, slave))

    # -- the end of keys

    async def discard(self, link: str, key_ids: Iterable[str]) -> list[str]:
        """Erase material that the other end lacks. Returns the erased IDs.

        Only unreserved material is erased: a key that has been promised to an SAE meanwhile is not
        touched.
        """
        return await self._run(self._discard, link, list(key_ids))

    def _discard(self, link: str, key_ids: list[str]) -> list[str]:
        with self._transaction():
            return self._take_out(
                link, [key_id for key_id in key_ids if (link, key_id) not in self._reserved]
            )

    def _take_out(self, link: str, key_ids: Iterable[str]) -> list[str]:
        gone = [
            key_id
            for key_id in key_ids
            if self._db.execute(
                "DELETE FROM material WHERE link = ? AND key_id = ?", (link, key_id)
            ).rowcount
        ]
        self._spend(link, gone)
        return gone

    async def void(self, link: str, key_ids: Iterable[str]) -> int:
        """Erase keys that the KME at the other end has discarded. Returns the number erased.

        Erases material, and promises made at the peer's request that no SAE has collected. An
        unknown ID is recorded as spent, since its key may still be in transit.
        """
        return await self._run(self._void, link, list(key_ids))

    def _void(self, link: str, key_ids: list[str]) -> int:
        with self._transaction() as db:
            erased = len(self._take_out(link, key_ids))
            self._spend(link, key_ids)
            for key_id in key_ids:
                erased += db.execute(
                    "UPDATE grants SET sealed = NULL, ended = 'void'"
                    " WHERE link = ? AND key_id = ? AND ended IS NULL",
                    (link, key_id),
                ).rowcount
            return erased

    async def expire(self, *, keys_before: float, tombstones_before: float) -> int:
        """Erase keys older than the first time; forget IDs of keys gone before the second.

        Times are in seconds since the epoch. Returns the number of keys erased.
        """
        return await self._run(self._expire, keys_before, tombstones_before)

    def _expire(self, keys_before: float, tombstones_before: float) -> int:
        with self._transaction() as db:
            old = db.execute(
                "DELETE FROM material WHERE created < ? RETURNING link, key_id", (keys_before,)
            ).fetchall()
            for link, key_id in old:
                self._spend(link, [key_id])
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
        """Close the database after the call in progress."""
        await shielded(self._close)

    async def _close(self) -> None:
        async with self._lock:
            self._db.close()


def _inode(path: Path) -> _Inode:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def open_locked(path: Path, *, what: str = "key store") -> sqlite3.Connection:
    """Open the only connection to an SQLite database; a new file is private. A file in use is not
    touched, and this one is in use until the connection is closed or the process ends.

    Args:
        path: of the file.
        what: its kind, for messages.

    Raises:
        ConfigError: it cannot be opened, or another process uses it.
    """
    try:
        # SQLite names its log after the path: through a symbolic link it would use another log.
        real = path.resolve()
        try:
            create_file(real, b"")
        except FileExistsError:
            found = real.stat()
            if not stat.S_ISREG(found.st_mode):
                raise ConfigError(f"the {what} {path} is not a regular file") from None
            if found.st_nlink > 1:
                raise ConfigError(
                    f"the {what} {path} has several names (hard links), and its log would not "
                    "be found under another one; remove the other names"
                ) from None
        db = sqlite3.connect(real, isolation_level=None, check_same_thread=False, timeout=0)
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(f"cannot open the {what} {path}: {_reason(error)}") from error
    try:
        # The lock is taken here and kept; with it, SQLite needs no shared memory.
        db.execute("PRAGMA locking_mode=EXCLUSIVE")
        db.execute("BEGIN EXCLUSIVE")
        db.execute("COMMIT")
    except sqlite3.Error as error:
        db.close()
        if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise ConfigError(
                f"the {what} {path} is in use by another process, and only one may use it: end "
                "that process, or give this one a store of its own"
            ) from None
        raise ConfigError(f"cannot use the {what} {path}: {_reason(error)}") from error
    return db


def _execute_all(db: sqlite3.Connection, script: str) -> None:
    """``executescript`` would commit the transaction under way."""
    for statement in script.split(";\n"):
        if statement.strip():
            db.execute(statement)


def _place(table: str, *columns: str) -> bytes:
    """The associated data of a sealed key: the table and the columns that identify the row."""
    place = table.encode()
    for column in columns:
        data = column.encode()
        place += len(data).to_bytes(4) + data
    return place


def _reason(error: Exception) -> str:
    if isinstance(error, InvalidTag):
        return "a key in it is damaged or altered"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return "out of memory" if isinstance(error, MemoryError) else str(error)
