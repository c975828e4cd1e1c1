"""The key store in one SQLite file, for one process; :mod:`hybridkex.qkd.store` tells what it does.

Calls are carried out in groups, each of them one transaction and one flush of the disk: the calls
that arrive during a flush form the next group. No answer leaves before the flush of its group. A
call that is refused is undone alone; a statement or a flush that fails fails the whole group.

A group is carried out in a worker thread: one hand-over for all of its calls, and no disk ever
blocks the event loop.
"""

import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeAlias, TypeVar

from cryptography.exceptions import InvalidTag

from hybridkex.errors import (
    ConfigError,
    KeySourceUnavailable,
    KeyUnauthorized,
    KeyUnknown,
)
from hybridkex.json_text import load_json
from hybridkex.net.event_loop import checkpoint, in_thread, shielded
from hybridkex.net.threads import NoThread
from hybridkex.qkd.call_queue import Call, CallQueue
from hybridkex.qkd.sqlite_file import FileInUse, open_locked, open_unlocked
from hybridkex.qkd.sqlite_schema import (
    ANY_LINK,
    EVERY_LINK,
    SCHEMA_VERSION,
    check_tables,
    create,
    migrate,
)
from hybridkex.qkd.store import (
    PAGE,
    SEAL_BYTES,
    Allotment,
    BlocksRefused,
    BlockState,
    Material,
    Position,
    Seal,
    SealRecord,
    assembled,
    blocks_of,
    check_states,
    check_whole,
    half_of,
    place_of,
    position_after,
    uncollected,
)
from hybridkex.secret import Secret
from hybridkex.text import get_logger

LOG: Final = get_logger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

_Inode: TypeAlias = tuple[int, int] | None
"""Device and inode of a file; ``None`` if there is no file."""

_FAILURES: Final = (sqlite3.Error, ConfigError, MemoryError, NoThread)
"""The exceptions that make a group of calls fail."""
_DAMAGE: Final = (ArithmeticError, AttributeError, InvalidTag, LookupError, TypeError, ValueError)
"""What a damaged file raises besides ``sqlite3.Error``: SQLite columns hold values of any type, and
Python's module decodes even its messages, which may quote the file."""

GROUP_KEYS: Final = 1024
"""Most keys of a group of several calls: how much work others may have to wait for."""
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


class SqliteKeyStore:
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
        self._log = f"{self._real}-wal"
        self._moving = moving
        self._is_open = True
        """Whether the connection is open and prepared; it may fail to be opened again."""
        self._db = open_locked(path)
        try:
            self._enter()
        except sqlite3.Error as error:
            self._db.close()
            raise ConfigError(f"cannot use the key store {path}: {_reason(error)}") from error
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
        return _inode(self._real), _inode(self._log)

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
            self._db.create_function(name, 0, partial(self._scope_part, number))
        self._db.execute("PRAGMA trusted_schema=ON")  # its triggers call these functions
        version = check_tables(self._db, self._path)
        if version:
            self._seal, record = self._settled(self._seal)
        # The file is ours: now it may change.
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
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

    def _scope_part(self, number: int) -> str | None:
        """What the triggers ask for."""
        return self._scope[number]

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
        settled = await self._write_all(1, self._change_keys, Seal(seal_key, *read_keys))
        if isinstance(settled, ConfigError):
            raise settled
        self._seal = settled

    def _change_keys(self, new: Seal) -> Seal | ConfigError:
        try:
            seal, record = self._settled(new)
        except ConfigError as error:  # of the configuration, not of the database
            return error
        self._write_record(record)
        return seal

    async def renew(self) -> bool:
        if not (await self._read(self._record)).former:
            return True
        for part in (self._renew_material, self._renew_grants):
            last: tuple[Any, ...] | None = ()
            while last is not None:
                last = await self._write_all(PAGE, part, last)
        await self._write_all(1, lambda: self._write_record(self._record().renewed()))
        return True

    def _renew_material(self, after: tuple[Any, ...]) -> tuple[Any, ...] | None:
        rows = self._db.execute(
            "SELECT seq, link, key_id, sealed FROM material WHERE seq > ? ORDER BY seq LIMIT ?",
            (*(after or (0,)), PAGE),
        ).fetchall()
        new = [
            (self._seal.renewed(sealed, place_of("material", link, key_id)), link, seq)
            for seq, link, key_id, sealed in rows
        ]
        self._db.executemany(
            "UPDATE material SET sealed = ? WHERE link = ? AND seq = ?",
            [one for one in new if one[0]],
        )
        return rows[-1][:1] if len(rows) == PAGE else None

    def _renew_grants(self, after: tuple[Any, ...]) -> tuple[Any, ...] | None:
        rows = self._db.execute(
            "SELECT link, key_id, slave, master, sealed FROM grants"
            " WHERE (link, key_id, slave) > (?, ?, ?)"
            " ORDER BY link, key_id, slave LIMIT ?",
            (*(after or ("", "", "")), PAGE),
        ).fetchall()
        new = [
            (self._seal.renewed(sealed, place_of("grant", link, key_id, master, slave)), link,
             key_id, slave)
            for link, key_id, slave, master, sealed in rows
            if sealed is not None
        ]  # fmt: skip
        self._db.executemany(
            "UPDATE grants SET sealed = ? WHERE link = ? AND key_id = ? AND slave = ?",
            [one for one in new if one[0]],
        )
        return rows[-1][:3] if len(rows) == PAGE else None

    # -- carrying out calls

    async def _read(self, operation: Callable[P, T], /, *arguments: P.args, **_: P.kwargs) -> T:
        return await self._calls.run(partial(operation, *arguments))

    async def _write(
        self,
        link: str,
        size: int,
        operation: Callable[..., T],
        *arguments: Any,
        sae: str | None = None,
    ) -> T:
        """Change rows of one link; ``operation`` gets the link and ``arguments``.

        ``size`` is the number of keys that it changes. Only ``sae`` can be delivered a key.
        """
        work = partial(self._within, (link, sae), operation, link, *arguments)
        return await self._calls.run(work, size=size, writes=True)

    async def _write_all(
        self, size: int, operation: Callable[P, T], *arguments: P.args, **_: P.kwargs
    ) -> T:
        """Change rows of all links alike."""
        work = partial(self._within, (EVERY_LINK, None), operation, *arguments)
        return await self._calls.run(work, size=size, writes=True)

    def _within(
        self, scope: tuple[str, str | None], operation: Callable[..., T], *arguments: Any
    ) -> T:
        self._scope = scope
        try:
            return operation(*arguments)
        finally:
            self._scope = (None, None)

    async def _carry_out(self, group: list[Call[Any]]) -> None:
        try:
            await in_thread(self._work_and_commit, group)
        except _FAILURES as error:
            self._note_failure(error)
            self._fail(group, partial(_failed, error))
        except Exception as error:  # a defect
            self._fail(group, partial(_same, error))

    def _work_and_commit(self, group: list[Call[Any]]) -> None:
        if self._work(group):
            self._commit()

    def _work(self, group: list[Call[Any]]) -> bool:
        """Run the statements of a group. True: there are changes, still to be committed."""
        self._check_files()
        self._undo()  # a failed roll-back may have left a transaction
        changes = self._db.total_changes
        if any(call.writes for call in group):
            self._db.execute("BEGIN IMMEDIATE")
        for call in group:
            self._do(call)
        if self._db.total_changes != changes:
            self._unscrubbed = True
            return True
        if self._db.in_transaction:
            self._db.execute("COMMIT")
        self._check_files()
        return False

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
            LOG.warning("the key store %s works again", self._path)
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
            LOG.error("the key store %s failed: %s", self._path, _reason(error))
        self._failing = True

    def _undo(self) -> None:
        with suppress(sqlite3.Error):
            if self._db.in_transaction:  # SQLite ends a transaction by itself on some errors
                self._db.execute("ROLLBACK")

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """One durable change or none, before any call; of any link."""
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
        """Write the log into the database, so that it is begun anew and overwritten; once nothing
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
                if os.stat(self._log).st_size > size:
                    os.truncate(self._log, size)  # the rest of an earlier, longer log
            self._unscrubbed, self._stale = False, True

    def close(self) -> None:
        """Close the database while no call is under way."""
        self._db.close()

    async def aclose(self) -> None:
        """Close the database after the calls in progress."""
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
        while page := found.fetchmany(PAGE):
            yield page

    def end_move(self, where: str) -> None:
        """Erase the keys, which are in the store ``where`` now. Blocks."""
        with self._transaction() as db:
            db.execute("DELETE FROM material")
            db.execute("DELETE FROM grants")
            db.execute("INSERT OR REPLACE INTO meta VALUES ('x-moved', ?)", (where,))
        self._scrub()

    # -- material

    async def add(
        self, link: str, keys: Iterable[tuple[str, Secret]], *, shared: bool = True
    ) -> None:
        keys = list(keys)
        await self._write(link, len(keys), self._add, keys, shared)

    def _add(self, link: str, keys: list[tuple[str, Secret]], shared: bool) -> None:
        now = time.time()
        spent = self._spent_among(link, [key_id for key_id, _ in keys])
        rows = [
            (link, key_id, half_of(key_id), shared, now,
             self._seal.seal(key, place_of("material", link, key_id)))
            for key_id, key in keys
            if key_id not in spent
        ]  # fmt: skip
        for start in range(0, len(rows), ROWS):
            part = rows[start : start + ROWS]
            self._db.execute(
                "INSERT OR IGNORE INTO material (link, key_id, half, shared, created, sealed)"
                " VALUES " + ", ".join(["(?, ?, ?, ?, ?, ?)"] * len(part)),
                [value for row in part for value in row],
            )

    def _spent_among(self, link: str, key_ids: Sequence[str]) -> set[str]:
        rows = self._db.execute(
            "SELECT key_id FROM spent WHERE link IN (?, ?)"
            " AND key_id IN (SELECT value FROM json_each(?))",
            (link, ANY_LINK, json.dumps(key_ids)),
        )
        return {key_id for (key_id,) in rows}

    def _material_among(self, link: str, key_ids: Sequence[str]) -> set[str]:
        rows = self._db.execute(
            "SELECT key_id FROM material WHERE link = ?"
            " AND key_id IN (SELECT value FROM json_each(?))",
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
            undo=lambda value: self._let_go(link, [one.key_id for one in value[0]]),
        )
        if damaged:
            # One damaged row must not block the others.
            LOG.error("%s: %d damaged keys of %s are erased", self._path, len(damaged), link)
            try:
                await self._write(link, len(damaged), self._take_out, damaged)
            except BaseException:
                self._let_go(link, [one.key_id for one in found])
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

    def _let_go(self, link: str, key_ids: Iterable[str]) -> None:
        self._reserved.difference_update([(link, key_id) for key_id in key_ids])

    async def release(self, link: str, key_ids: Iterable[str]) -> None:
        # No I/O: the set belongs to this process.
        self._let_go(link, key_ids)
        await checkpoint()

    async def count(self, link: str) -> int:
        return await self._read(self._count, link)

    def _count(self, link: str) -> int:
        row = self._db.execute("SELECT free FROM stock WHERE link = ?", (link,)).fetchone()
        return 0 if row is None else int(row[0])

    async def shortest(self, link: str) -> int:
        """Bytes of the shortest key that a link has as material; 0 without one."""
        return await self._read(self._shortest, link)

    def _shortest(self, link: str) -> int:
        row = self._db.execute(
            "SELECT min(length(sealed)) FROM material WHERE link = ?", (link,)
        ).fetchone()
        return 0 if row[0] is None else int(row[0]) - SEAL_BYTES

    async def shared_ids(
        self, link: str, *, created_before: float, after: Position | None = None
    ) -> tuple[list[str], Position | None]:
        return await self._read(self._shared_ids, link, created_before, after or (0, 0))

    def _shared_ids(
        self, link: str, created_before: float, after: Position
    ) -> tuple[list[str], Position | None]:
        half, last = after
        rows = self._db.execute(
            "SELECT seq, key_id, shared AND created < ? FROM material"
            " WHERE link = ? AND half = ? AND seq > ? ORDER BY seq LIMIT ?",
            (created_before, link, half, last, PAGE),
        ).fetchall()
        ids = [key_id for _, key_id, fits in rows if fits and (link, key_id) not in self._reserved]
        return ids, position_after(half, [row[0] for row in rows], PAGE)

    async def unknown(self, link: str, key_ids: Sequence[str]) -> list[str]:
        found = await self._read(self._material_among, link, key_ids)
        return [key_id for key_id in key_ids if key_id not in found]

    async def never_here(self, link: str, key_ids: Sequence[str]) -> list[str]:
        found = await self._read(self._known_among, link, key_ids)
        return [key_id for key_id in key_ids if key_id not in found]

    def _known_among(self, link: str, key_ids: Sequence[str]) -> set[str]:
        return self._material_among(link, key_ids) | self._spent_among(link, key_ids)

    async def promised(self, link: str) -> int:
        return await self._read(self._promised, link)

    def _promised(self, link: str) -> int:
        row = self._db.execute("SELECT promised FROM stock WHERE link = ?", (link,)).fetchone()
        return 0 if row is None else int(row[0])

    # -- from material to grants

    async def allot(
        self, link: str, allotments: Sequence[Allotment], *, master: str, slaves: Sequence[str] = ()
    ) -> None:
        await self._write(link, len(blocks_of(allotments)), self._allot, allotments, master, slaves)

    def _allot(
        self, link: str, allotments: Sequence[Allotment], master: str, slaves: Sequence[str]
    ) -> None:
        keys = self._assemble(link, allotments)
        check_whole(allotments, keys)
        self._grant(link, allotments, keys, master, slaves)
        self._let_go(link, blocks_of(allotments))

    async def accept(
        self,
        link: str,
        allotments: Sequence[Allotment],
        *,
        master: str,
        slaves: Sequence[str],
        peer_half: int = 0,
    ) -> None:
        await self._write(
            link, len(blocks_of(allotments)), self._accept, allotments, master, slaves, peer_half
        )

    def _accept(
        self,
        link: str,
        allotments: Sequence[Allotment],
        master: str,
        slaves: Sequence[str],
        peer_half: int,
    ) -> None:
        blocks = blocks_of(allotments)
        check_states(
            allotments,
            spent=self._spent_among(link, blocks),
            here=self._material_among(link, blocks),
            reserved={block for block in blocks if (link, block) in self._reserved},
            peer_half=peer_half,
        )
        keys = self._assemble(link, allotments)
        for allotment, key in zip(allotments, keys, strict=True):
            if key is None:
                # The request lists the block twice; its first use took it.
                raise BlocksRefused(dict.fromkeys(allotment.blocks, BlockState.SPENT))
        self._grant(link, allotments, keys, master, slaves)

    def _assemble(self, link: str, allotments: Sequence[Allotment]) -> list[Secret | None]:
        """Remove the blocks from the material, and record them as spent.

        A key is ``None`` if one of its blocks is gone, or missing and needed.
        """
        blocks = blocks_of(allotments)
        rows = self._db.execute(
            "DELETE FROM material WHERE link = ?"
            " AND key_id IN (SELECT value FROM json_each(?)) RETURNING key_id, sealed",
            (link, json.dumps(blocks)),
        ).fetchall()
        new = self._spend(link, blocks)
        return assembled(allotments, seal=self._seal, link=link, taken=dict(rows), new=new)

    def _spend(self, link: str, key_ids: Sequence[str]) -> set[str]:
        """Record IDs as spent. Returns those that were not."""
        rows = self._db.execute(
            "INSERT OR IGNORE INTO spent (link, key_id, at)"
            " SELECT ?, value, ? FROM json_each(?) RETURNING key_id",
            (link, time.time(), json.dumps(key_ids)),
        )
        return {key_id for (key_id,) in rows.fetchall()}

    def _grant(
        self,
        link: str,
        allotments: Sequence[Allotment],
        keys: Sequence[Secret | None],
        master: str,
        slaves: Sequence[str],
    ) -> None:
        if not slaves:
            return
        now = time.time()
        self._db.executemany(
            "INSERT INTO grants (link, key_id, slave, master, created, sealed, blocks)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            [
                (link, one.key_id, slave, master, now,
                 self._seal.seal(key, place_of("grant", link, one.key_id, master, slave)),
                 len(one.blocks))
                for one, key in zip(allotments, keys, strict=True)
                if key is not None
                for slave in slaves
            ],
        )  # fmt: skip

    # -- from grants to slaves

    async def collect(
        self, link: str, key_ids: Sequence[str], *, slave: str, master: str
    ) -> list[tuple[str, Secret]]:
        return await self._write(
            link, len(key_ids), self._collect, key_ids, slave, master, sae=slave
        )

    def _collect(
        self, link: str, key_ids: Sequence[str], slave: str, master: str
    ) -> list[tuple[str, Secret]]:
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
        uncollected(key_id, ended)
        key = self._seal.open(sealed, place_of("grant", link, key_id, master, slave))
        self._db.execute(
            "UPDATE grants SET sealed = NULL, ended = 'delivered'"
            " WHERE link = ? AND key_id = ? AND slave = ? AND master = ?",
            (link, key_id, slave, master),
        )
        return key

    # -- the end of keys

    async def discard(self, link: str, key_ids: Iterable[str]) -> list[str]:
        ids = list(key_ids)
        return await self._write(link, len(ids), self._discard, ids)

    def _discard(self, link: str, key_ids: list[str]) -> list[str]:
        return self._take_out(
            link, [key_id for key_id in key_ids if (link, key_id) not in self._reserved]
        )

    def _take_out(self, link: str, key_ids: Sequence[str]) -> list[str]:
        """Erase material and record it as spent. Returns the erased IDs."""
        rows = self._db.execute(
            "DELETE FROM material WHERE link = ?"
            " AND key_id IN (SELECT value FROM json_each(?)) RETURNING key_id",
            (link, json.dumps(key_ids)),
        )
        gone = [key_id for (key_id,) in rows.fetchall()]
        self._spend(link, gone)
        return gone

    async def void(self, link: str, key_ids: Iterable[str]) -> int:
        ids = list(key_ids)
        return await self._write(link, len(ids), self._void, ids)

    def _void(self, link: str, key_ids: list[str]) -> int:
        erased = len(self._take_out(link, key_ids))
        self._spend(link, key_ids)
        grants = self._db.execute(
            "UPDATE grants SET sealed = NULL, ended = 'void' WHERE link = ?"
            " AND key_id IN (SELECT value FROM json_each(?)) AND ended IS NULL",
            (link, json.dumps(key_ids)),
        )
        return erased + grants.rowcount

    async def expire(self, *, keys_before: float, tombstones_before: float) -> int:
        erased = await self._all(self._expire_material, keys_before)
        erased += await self._all(self._expire_grants, keys_before)
        await self._all(self._forget_grants, tombstones_before)
        await self._all(self._forget_spent, tombstones_before)
        return erased

    async def _all(self, part: Callable[[float], int], before: float) -> int:
        """Call a method that erases at most ``PAGE`` rows until no rows are left for it."""
        total = found = await self._write_all(PAGE, part, before)
        while found == PAGE:
            found = await self._write_all(PAGE, part, before)
            total += found
        return total

    def _expire_material(self, before: float) -> int:
        rows = self._db.execute(
            "DELETE FROM material WHERE created < ? AND seq IN"
            " (SELECT seq FROM material WHERE created < ? ORDER BY created LIMIT ?)"
            " RETURNING link, key_id",
            (before, before, PAGE),
        ).fetchall()
        for link in {link for link, _ in rows}:
            self._spend(link, [key_id for other, key_id in rows if other == link])
        return len(rows)

    def _expire_grants(self, before: float) -> int:
        return self._db.execute(
            "UPDATE grants SET sealed = NULL, ended = 'expired'"
            " WHERE ended IS NULL AND (link, key_id, slave) IN"
            " (SELECT link, key_id, slave FROM grants"
            "  WHERE created < ? AND ended IS NULL ORDER BY created LIMIT ?)",
            (before, PAGE),
        ).rowcount

    def _forget_grants(self, before: float) -> int:
        return self._db.execute(
            "DELETE FROM grants WHERE (link, key_id, slave) IN"
            " (SELECT link, key_id, slave FROM grants"
            "  WHERE created < ? AND ended IS NOT NULL ORDER BY created LIMIT ?)",
            (before, PAGE),
        ).rowcount

    def _forget_spent(self, before: float) -> int:
        return self._db.execute(
            "DELETE FROM spent WHERE (link, key_id) IN"
            " (SELECT link, key_id FROM spent WHERE at < ? ORDER BY at LIMIT ?)",
            (before, PAGE),
        ).rowcount

    # -- jobs

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
    try:
        try:
            with closing(open_locked(path, create=False)) as db:
                _check_content(db, path, keys)
        except FileInUse:
            _check_unlocked(path, keys)
    except sqlite3.Error as error:
        raise ConfigError(f"cannot use the key store {path}: {_reason(error)}") from error


def _check_unlocked(path: Path, keys: Seal) -> None:
    """Raises ``ConfigError`` or ``sqlite3.Error``, if it does so again: a page may be in transit,
    and the newest record of the sealing keys in the write-ahead log."""
    for wait in UNLOCKED_WAITS:
        with suppress(sqlite3.Error, ConfigError), closing(open_unlocked(path)) as db:
            _check_content(db, path, keys)
            return
        time.sleep(wait)
    with closing(open_unlocked(path)) as db:
        _check_content(db, path, keys)


def _check_content(db: sqlite3.Connection, path: Path, keys: Seal) -> None:
    if check_tables(db, path):
        _read_record(db).settled(keys, _META, f"key store {path}")
        _check_not_moved(db, path)


def _read_record(db: sqlite3.Connection) -> SealRecord:
    rows = dict(db.execute("SELECT name, value FROM meta WHERE name IN ('seal', ?, ?)", _LISTS))
    former, retired = (
        tuple(bytes.fromhex(one) for one in load_json(rows.get(name, "[]"))) for name in _LISTS
    )
    return SealRecord(current=rows.get("seal", b""), former=former, retired=retired)


def _read_meta(db: sqlite3.Connection, name: str) -> str | None:
    row = db.execute("SELECT value FROM meta WHERE name = ?", (f"x-{name}",)).fetchone()
    return None if row is None else str(row[0])


def _check_not_moved(db: sqlite3.Connection, path: Path) -> None:
    if where := _read_meta(db, "moved"):
        raise ConfigError(
            f"the keys of the key store {path} were moved into {where}: name that store in the "
            "configuration"
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


def _write_log(db: sqlite3.Connection) -> None:
    """Write the write-ahead log into the database. Closing does so too, but does not say whether it
    has worked. Raises ``sqlite3.Error``."""
    busy, *_ = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    if busy:
        raise sqlite3.OperationalError("the write-ahead log cannot be written into the database")


def _same(error: Exception) -> Exception:
    return error


def _failed(error: Exception) -> KeySourceUnavailable:
    """The exception that a caller gets for an error."""
    failure = KeySourceUnavailable(f"the key store failed: {_reason(error)}")
    failure.__cause__ = error
    return failure


def _reason(error: Exception) -> str:
    if isinstance(error, InvalidTag):
        return "a key in it is damaged or altered"
    if isinstance(error, _DAMAGE) and not isinstance(error, ConfigError):
        return "its content is damaged"
    return "out of memory" if isinstance(error, MemoryError) else str(error)
