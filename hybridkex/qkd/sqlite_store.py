"""The key store in one SQLite file, for one process; :mod:`hybridkex.qkd.store` tells what it does.

Calls are carried out in groups, each of them one transaction and one flush of the disk: the calls
that arrive during a flush form the next group. No answer leaves before the flush of its group. A
call that is refused is undone alone; a statement or a flush that fails fails the whole group.

A group is carried out in a worker thread: one hand-over for all of its calls, and no disk ever
blocks the event loop.
"""

import json
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeVar

from cryptography.exceptions import InvalidTag

from hybridkex.errors import ConfigError, KeySourceUnavailable
from hybridkex.json_text import load_json
from hybridkex.machine import reason
from hybridkex.net.event_loop import checkpoint, in_thread, shielded
from hybridkex.net.log import BoundedLog
from hybridkex.net.threads import NoThread
from hybridkex.qkd.call_queue import Call, CallQueue
from hybridkex.qkd.sqlite_file import FileInUse, open_locked, open_unlocked, use_log
from hybridkex.qkd.sqlite_schema import (
    ANY_LINK,
    SCHEMA_VERSION,
    check_tables,
    create,
    migrate,
)
from hybridkex.qkd.store import (
    EVERY_LINK,
    SEAL_BYTES,
    KeyStore,
    Material,
    Seal,
    SealRecord,
    place_of,
)
from hybridkex.secret import Secret
from hybridkex.text import get_logger

LOG: Final = get_logger(__name__)

T = TypeVar("T")

_Db: TypeAlias = sqlite3.Connection
_Inode: TypeAlias = tuple[int, int] | None
"""Device and inode of a file; ``None`` if there is no file."""

_FAILURES: Final = (sqlite3.Error, ConfigError, MemoryError, NoThread)
"""The exceptions that make a group of calls fail."""
_DAMAGE: Final = (ArithmeticError, AttributeError, InvalidTag, LookupError, TypeError, ValueError)
"""What a damaged file raises besides ``sqlite3.Error``: SQLite columns hold values of any type, and
Python's module decodes even its messages, which may quote the file."""

GROUP_KEYS: Final = 1024
"""The maximum number of keys in a group of several calls, which bounds how long other calls
wait."""
ROWS: Final = 64
"""Rows that one statement inserts."""

CACHE_KIB: Final = 16_384
"""Memory for pages of the database, most of them of the indexes."""

UNLOCKED_WAITS: Final = (0.1, 0.4, 1.0)
"""Seconds before each further look into a file that another process uses."""

_META: Final = b"meta"
"""The place of the values of a :class:`~hybridkex.qkd.store.SealRecord`."""
_LISTS: Final = ("x-former", "x-retired")
"""Their names, besides ``seal``."""

WAL_HEADER_BYTES: Final = 32
WAL_FRAME_HEADER_BYTES: Final = 24
"""The file format of the write-ahead log, https://www.sqlite.org/fileformat2.html section 4.1."""
WAL_PAGES: Final = 8000
"""Pages at which a commit writes the log into the database by itself; :meth:`SqliteKeyStore.tidy`
does so earlier."""


class SqliteKeyStore(KeyStore):
    """A key database in one SQLite file.

    Only one process may have a store open, because reservations are in memory: the file is locked
    (``locking_mode=EXCLUSIVE``), whatever name it is opened by, until the store is closed or its
    process ends. It is a file-system lock, so it also works on a network file system with locks.

    The lock applies to the file, not to its name, and a removed write-ahead log would be lost with
    the process. So every group of calls checks, before and after, that the names still refer to the
    open files. While the database is moved or replaced, calls fail as on a broken disk, and work
    again once it is back. A removed write-ahead log is written into the database, and a new one is
    begun.

    The write-ahead log is flushed once in each transaction (``synchronous=FULL``). Deleted rows are
    overwritten in the tables (``secure_delete``), and remain in the log until :meth:`scrub` empties
    it or :meth:`tidy` lets it be overwritten.

    A call that has begun is not cancelled, so its outcome is known while the process lives.
    """

    def __init__(
        self,
        path: Path,
        seal_key: Secret,
        *,
        read_keys: Sequence[Secret] = (),
        on_failure: Callable[[], object] = lambda: None,
        moving: bool = False,
    ) -> None:
        """Open a database, or create it if there is no file. Blocks briefly; converting a database
        of an older version takes some seconds for a million keys.

        Keys are encrypted under ``seal_key`` and decrypted with ``read_keys``, too.
        ``on_failure`` is called for each call that fails, in any thread. ``moving`` opens it for a
        move of its keys (:mod:`hybridkex.qkd.store_move`) instead of for service.

        Raises:
            ConfigError: the store is in use, the key file belongs to another store, the file is not
                a key store or is of a later version, it cannot be read and written, or its keys are
                in another store.
        """
        self._path = path
        self._seal = Seal(seal_key, *read_keys)
        self._on_failure = on_failure
        self._failing = False
        self._log = BoundedLog(LOG, rate=1 / 60)
        """On a full disk some calls fail, and others need no room."""
        self._calls = CallQueue(self._carry_out, GROUP_KEYS)
        self._reserved: set[tuple[str, str]] = set()
        self._scope: tuple[str | None, str | None] = (None, None)
        """The link, and the SAE, whose rows the call under way may change."""
        self._due: dict[str, float] = {}
        """When each job is due, by the monotonic clock."""
        self._unscrubbed = True
        self._stale = True
        """Whether the log's file has content that is in the database, too."""
        self._real = path.resolve()
        self._wal = f"{self._real}-wal"
        self._moving = moving
        self._is_open = True
        """Whether the connection is open and prepared; it may fail to be opened again."""
        self._db = open_locked(path)
        try:
            with readable(f"cannot use the key store {path}"):
                self._enter()
        except BaseException:
            self._db.close()
            raise

    def _enter(self) -> None:
        try:
            self._prepare()
        except _FAILURES:
            raise
        except _DAMAGE as error:
            raise ConfigError(f"cannot use the key store {self._path}: {_reason(error)}") from error
        if not self._moving:
            _check_not_moved(self._db, self._path)
        self._files = self._found_files()

    def _found_files(self) -> tuple[_Inode, _Inode]:
        """The files that the names of the database and its write-ahead log refer to."""
        return _inode(self._real), _inode(self._wal)

    def _check_files(self) -> None:
        """Preserve locking and durability even if other programs move or remove the files.

        Raises ``sqlite3.Error`` or ``ConfigError``: the database is no longer under its name, or
        cannot be used now. The next call tries again.
        """
        found = self._found_files()
        if found[0] != self._files[0] or found[0] is None:
            raise sqlite3.OperationalError(
                "the file was moved, removed or replaced while it was in use; put it back, or "
                "restart this process with the current file"
            )
        if self._is_open:
            if found[1] == self._files[1]:
                return
            if self._files[1] is None:  # created by the first write
                self._files = found
                return
            # The removed log is still open, and all that holds what is not in the database yet.
            _write_log(self._db)
            self._is_open = False
            LOG.error(
                "the write-ahead log of the key store %s was removed while it was in use; its "
                "content is in the database, and a new one is begun",
                self._path,
            )
        self._open_again()

    def _open_again(self) -> None:
        self._db.close()
        self._db = open_locked(self._path, create=False)
        self._unscrubbed = True
        self._enter()
        self._is_open = True

    def _prepare(self) -> None:
        """Check that the file is ours and create or migrate its tables, all in one transaction."""
        for name, number in (("hybridkex_link", 0), ("hybridkex_sae", 1)):
            self._db.create_function(name, 0, lambda number=number: self._scope[number])
        self._db.execute("PRAGMA trusted_schema=ON")  # its triggers call these functions
        version = check_tables(self._db, self._path)
        if version:
            self._seal, record = self._settled(self._seal)
        # The file is ours: now it may change.
        use_log(self._db, self._path)
        self._db.execute("PRAGMA secure_delete=ON")
        self._db.execute(f"PRAGMA wal_autocheckpoint={WAL_PAGES}")
        self._db.execute(f"PRAGMA cache_size=-{CACHE_KIB}")
        if version == SCHEMA_VERSION and record == self._record():
            return
        with self._transaction() as db:
            if not version:
                create(db)
                record = SealRecord.new(self._seal, _META)
            elif version != SCHEMA_VERSION:
                migrate(db, version, self._seal)
            self._write_record(record)
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    # -- the sealing key

    def _settled(self, seal: Seal) -> tuple[Seal, SealRecord]:
        """Raises ``ConfigError``."""
        return self._record().settled(seal, _META, f"key store {self._path}")

    def _record(self) -> SealRecord:
        return _read_record(self._db)

    def _write_record(self, record: SealRecord) -> None:
        lists = (
            json.dumps([one.hex() for one in part]) for part in (record.former, record.retired)
        )
        self._db.executemany(
            "INSERT OR REPLACE INTO meta VALUES (?, ?)",
            [("seal", record.current), *zip(_LISTS, lists, strict=True)],
        )

    async def change_keys(self, seal_key: Secret, read_keys: Sequence[Secret] = ()) -> None:
        def work(_: _Db) -> Seal | ConfigError:
            try:
                seal, record = self._settled(Seal(seal_key, *read_keys))
            except ConfigError as error:  # of the configuration, not of the database
                return error
            self._write_record(record)
            return seal

        settled = await self._run(EVERY_LINK, work)
        if isinstance(settled, ConfigError):
            raise settled
        self._seal = settled

    async def renew(self) -> bool:
        record = await self._run(EVERY_LINK, _read_record, writes=False)
        if not record.former:
            return True
        await self._renew_rows()

        def retire(_: _Db) -> bool:
            if self._record() != record:  # another new key, for which this walk does not count
                return False
            self._write_record(record.renewed())
            return True

        return await self._run(EVERY_LINK, retire)

    def _sealed_after(
        self, db: _Db, table: str, after: tuple[Any, ...]
    ) -> list[tuple[tuple[Any, ...], tuple[str, ...], bytes | None]]:
        if table == "material":
            rows = db.execute(
                "SELECT seq, link, key_id, sealed FROM material WHERE seq > ? ORDER BY seq LIMIT ?",
                (after[0] if after else 0, self.PAGE),
            )
            return [
                ((seq, link), (table, link, key_id), sealed) for seq, link, key_id, sealed in rows
            ]
        rows = db.execute(
            "SELECT link, key_id, slave, master, sealed FROM grants"
            " WHERE (link, key_id, slave) > (?, ?, ?) ORDER BY link, key_id, slave LIMIT ?",
            (*(after or ("", "", "")), self.PAGE),
        )
        return [
            ((link, key_id, slave), ("grant", link, key_id, master, slave), sealed)
            for link, key_id, slave, master, sealed in rows
        ]

    def _seal_again(self, db: _Db, table: str, new: Sequence[tuple[Any, ...]]) -> None:
        db.executemany(
            "UPDATE material SET sealed = ? WHERE seq = ? AND link = ?"
            if table == "material"
            else "UPDATE grants SET sealed = ? WHERE link = ? AND key_id = ? AND slave = ?",
            [(renewed, *position) for *position, _, renewed in new],
        )

    # -- carrying out calls

    async def _run(
        self,
        link: str,
        work: Callable[[_Db], T],
        *,
        size: int = 1,
        writes: bool = True,
        sae: str = "",
    ) -> T:
        return await self._calls.run(
            partial(self._within, (link, sae), work), size=size, writes=writes
        )

    def _within(self, scope: tuple[str, str], work: Callable[[_Db], T]) -> T:
        self._scope = scope
        try:
            return work(self._db)
        finally:
            self._scope = (None, None)

    async def _carry_out(self, group: list[Call[Any]]) -> None:
        try:
            await in_thread(self._work, group)
        except _FAILURES as error:
            self._note_failure(error)
            self._fail(group, partial(_failed, error))
        except Exception as error:  # a defect
            self._fail(group, partial(_same, error))

    def _work(self, group: list[Call[Any]]) -> None:
        """Run the statements of a group, and commit its changes."""
        self._check_files()
        self._undo()  # a failed roll-back may have left a transaction
        changes = self._db.total_changes
        if any(call.writes for call in group):
            self._db.execute("BEGIN IMMEDIATE")
        for call in group:
            self._do(call)
        if self._db.total_changes != changes:
            self._unscrubbed = True
            self._commit()
            return
        if self._db.in_transaction:
            self._db.execute("COMMIT")
        self._check_files()

    def _do(self, call: Call[Any]) -> None:
        if call.writes:
            self._db.execute("SAVEPOINT call")
        try:
            call.succeed(call.operation())
        except _FAILURES:
            raise
        except Exception as error:  # a refusal, or a damaged key
            if call.writes:
                self._db.execute("ROLLBACK TO call")
            if isinstance(error, _DAMAGE):
                self._note_failure(error)
                call.fail(_failed(error))
            else:
                call.fail(error)
        if call.writes:
            self._db.execute("RELEASE call")

    def _commit(self) -> None:
        self._db.execute("COMMIT")
        self._check_files()
        if self._failing:
            self._log.log(logging.WARNING, "the key store %s works again", self._path)
        self._failing = False

    def _fail(self, group: list[Call[Any]], make: Callable[[], Exception]) -> None:
        self._undo()
        for call in group:
            if call.error is None:
                call.fail(make())

    def _note_failure(self, error: Exception) -> None:
        self._on_failure()
        if isinstance(error, NoThread):
            return
        if not self._failing:  # once, not for every call until the store works again
            self._log.log(logging.ERROR, "the key store %s failed: %s", self._path, _reason(error))
        self._failing = True

    def _undo(self) -> None:
        with suppress(sqlite3.Error):
            if self._db.in_transaction:  # SQLite ends a transaction by itself on some errors
                self._db.execute("ROLLBACK")

    @contextmanager
    def _transaction(self) -> Iterator[_Db]:
        """A transaction before any call, over all links: its changes are made completely and
        durably, or not at all."""
        self._unscrubbed = True
        self._scope = (EVERY_LINK, None)
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield self._db
            self._db.execute("COMMIT")
        except BaseException:
            self._undo()
            raise
        finally:
            self._scope = (None, None)

    # -- the files

    async def scrub(self) -> None:
        """Make sure that keys which left the tables have left the files too.

        Does nothing if nothing has changed since the last time.
        """
        await self._calls.run(self._scrub, size=GROUP_KEYS)

    def _scrub(self) -> None:
        if self._unscrubbed or self._stale:
            busy, *_ = self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            self._unscrubbed = self._stale = bool(busy)

    async def tidy(self) -> None:
        """Write the log into the database, so that it starts over and is overwritten; when nothing
        new is written, empty it.

        A log that keeps its blocks on the disk is flushed several times as fast as one that grows.
        What is in its file is overwritten by the next log, or cut off with the next call: after two
        calls, keys which left the tables before the first have left the files too.
        """
        await self._calls.run(self._tidy, size=GROUP_KEYS)

    def _tidy(self) -> None:
        if not self._unscrubbed:
            self._scrub()
            return
        busy, pages, _ = self._db.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()
        if not busy:
            [page] = self._db.execute("PRAGMA page_size").fetchone()
            size = WAL_HEADER_BYTES + pages * (WAL_FRAME_HEADER_BYTES + page)
            with suppress(OSError):  # the check of the files tells
                if os.stat(self._wal).st_size > size:
                    os.truncate(self._wal, size)  # the rest of an earlier, longer log
            self._unscrubbed, self._stale = False, True

    def close(self) -> None:
        self._db.close()

    async def aclose(self) -> None:
        await shielded(self._close)

    async def _close(self) -> None:
        await self._calls.idle()
        self._db.close()

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
        return _read_meta(self._db, name)

    # -- a move of its keys into another store

    def is_renewing(self) -> bool:
        """Whether some rows are encrypted under an earlier sealing key."""
        return bool(self._record().former)

    def rows(self, table: str, columns: Iterable[str]) -> Iterator[list[tuple[Any, ...]]]:
        """All rows of a table in pages, oldest first; nothing else may use the store."""
        order = "seq" if table == "material" else "link, key_id"
        found = self._db.execute(f"SELECT {', '.join(columns)} FROM {table} ORDER BY {order}")
        while page := found.fetchmany(self.PAGE):
            yield page

    def end_move(self, where: str) -> None:
        """Erase the keys, which are in the store ``where`` now. Blocks."""
        with self._transaction() as db:
            db.execute("DELETE FROM material")
            db.execute("DELETE FROM grants")
            db.execute("INSERT OR REPLACE INTO meta VALUES ('x-moved', ?)", (where,))
        self._scrub()

    # -- material

    def _add_material(
        self,
        db: _Db,
        link: str,
        rows: Sequence[tuple[str, int, bytes]],
        shared: bool,
    ) -> None:
        now = time.time()
        for start in range(0, len(rows), ROWS):
            part = rows[start : start + ROWS]
            db.execute(
                "INSERT OR IGNORE INTO material (link, shared, created, key_id, half, sealed)"
                " VALUES " + ", ".join(["(?, ?, ?, ?, ?, ?)"] * len(part)),
                [value for row in part for value in (link, shared, now, *row)],
            )

    def _among(self, db: _Db, table: str, link: str, key_ids: Sequence[str]) -> set[str]:
        statement = {
            "material": "SELECT key_id FROM material WHERE link = ?",
            "spent": f"SELECT key_id FROM spent WHERE link IN (?, '{ANY_LINK}')",
        }[table]
        rows = db.execute(
            f"{statement} AND key_id IN (SELECT value FROM json_each(?))",
            (link, json.dumps(key_ids)),
        )
        return {key_id for (key_id,) in rows}

    async def reserve(
        self, link: str, number: int, *, half: int = 0, skip: Iterable[str] = ()
    ) -> list[Material]:
        """See :class:`~hybridkex.qkd.store.KeyStore`. A reservation is in memory and ends with the
        process."""
        passed = frozenset(skip)
        found, damaged = await self._calls.run(
            partial(self._reserve, link, number, half, passed),
            size=number,
            undo=lambda value: self._end_reservations(link, [one.key_id for one in value[0]]),
        )
        if damaged:
            # One damaged row must not block the others.
            LOG.error("%s: %d damaged keys of %s are erased", self._path, len(damaged), link)
            try:
                await self._run(link, lambda db: self._erase(db, link, damaged), size=len(damaged))
            except BaseException:
                self._end_reservations(link, [one.key_id for one in found])
                raise
        return found

    def _reserve(
        self, link: str, number: int, half: int, skip: frozenset[str]
    ) -> tuple[list[Material], list[str]]:
        found: list[Material] = []
        damaged: list[str] = []
        for part in (half, 1 - half):
            if len(found) == number:
                break
            rows = self._db.execute(
                "SELECT key_id, shared, created, sealed FROM material"
                " WHERE link = ? AND half = ? ORDER BY seq",
                (link, part),
            )
            for key_id, shared, created, sealed in rows:
                if (link, key_id) in self._reserved or key_id in skip:
                    continue
                try:
                    key = self._seal.open(sealed, place_of("material", link, key_id))
                except InvalidTag:
                    damaged.append(key_id)
                    continue
                found.append(Material(key_id=key_id, key=key, created=created, shared=bool(shared)))
                if len(found) == number:
                    break
            rows.close()
        self._reserved.update((link, material.key_id) for material in found)
        return found, damaged

    def _end_reservations(self, link: str, key_ids: Iterable[str]) -> None:
        self._reserved.difference_update([(link, key_id) for key_id in key_ids])

    async def release(self, link: str, key_ids: Iterable[str]) -> None:
        # No I/O: the set belongs to this process.
        self._end_reservations(link, key_ids)
        await checkpoint()

    def _sizes(self, db: _Db, link: str) -> tuple[int, int]:
        row = db.execute("SELECT free, promised FROM stock WHERE link = ?", (link,)).fetchone()
        return (0, 0) if row is None else (int(row[0]), int(row[1]))

    async def shortest(self, link: str) -> int:
        """Bytes of the shortest key that a link has as material; 0 without one."""

        def work(db: _Db) -> int:
            [size] = db.execute(
                "SELECT min(length(sealed)) FROM material WHERE link = ?", (link,)
            ).fetchone()
            return 0 if size is None else int(size) - SEAL_BYTES

        return await self._run(link, work, writes=False)

    def _material_after(
        self, db: _Db, link: str, half: int, last: int, before: float
    ) -> list[tuple[int, str, bool]]:
        rows = db.execute(
            "SELECT seq, key_id, shared AND created < ? FROM material"
            " WHERE link = ? AND half = ? AND seq > ? ORDER BY seq LIMIT ?",
            (before, link, half, last, self.PAGE),
        )
        return [
            (seq, key_id, fits and (link, key_id) not in self._reserved)
            for seq, key_id, fits in rows
        ]

    # -- from material to grants

    def _unreserved(self, db: _Db, link: str, key_ids: Sequence[str]) -> list[str]:
        return [key_id for key_id in key_ids if (link, key_id) not in self._reserved]

    def _take(self, db: _Db, link: str, key_ids: Sequence[str]) -> dict[str, tuple[bytes, bool]]:
        found = self._take_reserved(db, link, key_ids)
        return {key_id: (found[key_id], (link, key_id) in self._reserved) for key_id in found}

    def _take_reserved(self, db: _Db, link: str, key_ids: Sequence[str]) -> dict[str, bytes]:
        rows = db.execute(
            "DELETE FROM material WHERE link = ?"
            " AND key_id IN (SELECT value FROM json_each(?)) RETURNING key_id, sealed",
            (link, json.dumps(key_ids)),
        )
        return dict(rows.fetchall())

    def _spend(self, db: _Db, link: str, key_ids: Iterable[str]) -> set[str]:
        rows = db.execute(
            "INSERT OR IGNORE INTO spent (link, key_id, at)"
            " SELECT ?, value, ? FROM json_each(?) WHERE NOT EXISTS"
            f" (SELECT 1 FROM spent WHERE link = '{ANY_LINK}' AND key_id = value)"
            " RETURNING key_id",
            (link, time.time(), json.dumps(list(key_ids))),
        )
        return {key_id for (key_id,) in rows.fetchall()}

    def _add_grants(
        self,
        db: _Db,
        link: str,
        master: str,
        rows: Sequence[tuple[str, str, int, bytes]],
    ) -> None:
        now = time.time()
        db.executemany(
            "INSERT INTO grants (link, master, created, key_id, slave, blocks, sealed)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            [(link, master, now, *row) for row in rows],
        )

    # -- from grants to slaves

    def _deliver(
        self, db: _Db, link: str, key_ids: Sequence[str], slave: str, master: str
    ) -> dict[str, bytes]:
        values = (link, json.dumps(key_ids), slave, master)
        found = db.execute(
            "SELECT key_id, sealed FROM grants WHERE link = ? AND key_id IN"
            " (SELECT value FROM json_each(?)) AND slave = ? AND master = ? AND ended IS NULL",
            values,
        ).fetchall()
        db.execute(
            "UPDATE grants SET sealed = NULL, ended = 'delivered' WHERE link = ? AND key_id IN"
            " (SELECT value FROM json_each(?)) AND slave = ? AND master = ? AND ended IS NULL",
            values,
        )
        return dict(found)

    def _ends(self, db: _Db, link: str, key_id: str, master: str) -> dict[str, str | None]:
        rows = db.execute(
            "SELECT slave, ended FROM grants WHERE link = ? AND key_id = ? AND master = ?",
            (link, key_id, master),
        )
        return dict(rows.fetchall())

    # -- the end of keys

    def _void_grants(self, db: _Db, link: str, key_ids: Sequence[str]) -> set[str]:
        rows = db.execute(
            "UPDATE grants SET sealed = NULL, ended = 'void' WHERE link = ?"
            " AND key_id IN (SELECT value FROM json_each(?)) AND ended IS NULL RETURNING key_id",
            (link, json.dumps(key_ids)),
        )
        return {key_id for (key_id,) in rows.fetchall()}

    def _expire_material(self, db: _Db, before: float) -> int:
        rows = db.execute(
            "DELETE FROM material WHERE created < ? AND seq IN"
            " (SELECT seq FROM material WHERE created < ? ORDER BY created LIMIT ?)"
            " RETURNING link, key_id",
            (before, before, self.PAGE),
        ).fetchall()
        for link in {link for link, _ in rows}:
            self._spend(db, link, [key_id for other, key_id in rows if other == link])
        return len(rows)

    def _expire_grants(self, db: _Db, before: float) -> int:
        return db.execute(
            "UPDATE grants SET sealed = NULL, ended = 'expired'"
            " WHERE ended IS NULL AND (link, key_id, slave) IN"
            " (SELECT link, key_id, slave FROM grants"
            "  WHERE created < ? AND ended IS NULL ORDER BY created LIMIT ?)",
            (before, self.PAGE),
        ).rowcount

    def _forget_grants(self, db: _Db, before: float) -> int:
        return db.execute(
            "DELETE FROM grants WHERE (link, key_id, slave) IN"
            " (SELECT link, key_id, slave FROM grants"
            "  WHERE created < ? AND ended IS NOT NULL ORDER BY created LIMIT ?)",
            (before, self.PAGE),
        ).rowcount

    def _forget_spent(self, db: _Db, before: float) -> int:
        return db.execute(
            "DELETE FROM spent WHERE (link, key_id) IN"
            " (SELECT link, key_id FROM spent WHERE at < ? ORDER BY at LIMIT ?)",
            (before, self.PAGE),
        ).rowcount

    # -- jobs

    async def check(self) -> None:
        # As many pages as a delivery of some keys.
        statement = "INSERT OR REPLACE INTO meta VALUES ('x-check', randomblob(65536))"
        await self._run(EVERY_LINK, lambda db: db.execute(statement))

    async def claim(self, job: str, seconds: float) -> bool:
        """See :class:`~hybridkex.qkd.store.KeyStore`; it is in memory and ends with the process."""
        await checkpoint()
        now = time.monotonic()
        if now < self._due.get(job, now):
            return False
        self._due[job] = now + seconds
        return True

    async def settle(self, job: str, seconds: float) -> None:
        await checkpoint()
        self._due[job] = time.monotonic() + seconds


def check_store(path: Path, keys: Seal) -> None:
    """Check that a file, if there is one, can be used as a key store; changes nothing. Blocks.

    It is locked for a moment, unless a KME uses it: then what is in the file is read all the same.

    Raises:
        ConfigError: why it cannot.
    """
    if not path.exists():
        return
    with readable(f"cannot use the key store {path}"):
        try:
            with closing(open_locked(path, create=False)) as db:
                _check_content(db, path, keys)
        except FileInUse:
            _check_unlocked(path, keys)


@contextmanager
def readable(otherwise: str) -> Iterator[None]:
    """Within the block a database is read. Whatever SQLite or the content of a damaged file raises
    becomes a ``ConfigError`` that begins with ``otherwise``."""
    try:
        yield
    except ConfigError:
        raise
    except (sqlite3.Error, *_DAMAGE) as error:
        raise ConfigError(f"{otherwise}: {_reason(error)}") from error


def _check_unlocked(path: Path, keys: Seal) -> None:
    """Raises what reading raises, if it does so again: a page may be in transit, and the newest
    record of the sealing keys in the write-ahead log."""
    for wait in UNLOCKED_WAITS:
        with suppress(sqlite3.Error, *_DAMAGE), closing(open_unlocked(path)) as db:
            _check_content(db, path, keys)
            return
        time.sleep(wait)
    with closing(open_unlocked(path)) as db:
        _check_content(db, path, keys)


def _check_content(db: _Db, path: Path, keys: Seal) -> None:
    if check_tables(db, path):
        _read_record(db).settled(keys, _META, f"key store {path}")
        _check_not_moved(db, path)


def _read_record(db: _Db) -> SealRecord:
    rows = dict(db.execute("SELECT name, value FROM meta WHERE name IN ('seal', ?, ?)", _LISTS))
    former, retired = (
        tuple(bytes.fromhex(one) for one in load_json(rows.get(name, "[]"))) for name in _LISTS
    )
    return SealRecord(current=rows.get("seal", b""), former=former, retired=retired)


def _read_meta(db: _Db, name: str) -> str | None:
    row = db.execute("SELECT value FROM meta WHERE name = ?", (f"x-{name}",)).fetchone()
    return None if row is None else str(row[0])


def _check_not_moved(db: _Db, path: Path) -> None:
    if where := _read_meta(db, "moved"):
        raise ConfigError(
            f"the keys of the key store {path} have been moved to {where}: set the store of the "
            "configuration to that"
        )
    if _read_meta(db, "moving"):
        raise ConfigError(
            f"the keys of the key store {path} are being moved into another store: run 'hybridkex "
            "kme migrate' again, which continues it"
        )


def _inode(path: str | Path) -> _Inode:
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise sqlite3.OperationalError(f"{path}: {error.strerror}") from error
    return status.st_dev, status.st_ino


def _write_log(db: _Db) -> None:
    """Write the write-ahead log into the database. Closing does so too, but does not say whether it
    has worked. Raises ``sqlite3.Error``."""
    busy, *_ = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    if busy:
        raise sqlite3.OperationalError("the write-ahead log cannot be written into the database")


def _same(error: Exception) -> Exception:
    return error


def _failed(error: Exception) -> KeySourceUnavailable:
    failure = KeySourceUnavailable(f"the key store failed: {_reason(error)}")
    failure.__cause__ = error
    return failure


def _reason(error: Exception) -> str:
    if isinstance(error, InvalidTag):
        return "a key in it is damaged or altered"
    if isinstance(error, _DAMAGE) and not isinstance(error, ConfigError):
        return "its content is damaged"
    return reason(error)
