"""The key store in a PostgreSQL database, which the processes of one KME share.

:mod:`hybridkex.qkd.store` tells what a store does. Here the database's locks do it: a reservation
is a mark in the row, set with ``FOR UPDATE SKIP LOCKED``, so that two processes never reserve the
same key, and what leaves ``material`` enters ``spent``, whose primary key admits an ID once. Every
delivery is committed with ``synchronous_commit`` before its answer leaves.

Each call is one transaction in a worker thread, on a connection of a bounded pool, with time
limits. A transaction that fails before its commit is repeated once on another connection; a commit
whose outcome is unknown is not repeated, and counts as failed: its keys are not given.

Row-level security scopes each transaction to the link that it names: whatever a statement says, the
database shows and changes no row of another link. (Superusers are exempt; give the KME a role of
its own.) A trigger refuses a delivery to another SAE than the one that the transaction names.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, Final, LiteralString, TypeAlias, TypeVar

from cryptography.exceptions import InvalidTag

from hybridkex.errors import ConfigError, KeySourceUnavailable
from hybridkex.net.event_loop import checkpoint, in_thread
from hybridkex.net.log import BoundedLog
from hybridkex.net.threads import NoThread
from hybridkex.qkd.postgres_connection import (
    WAIT_SECONDS,
    BoundedConnection,
    ConnectionPool,
    PoolTimeout,
    check_session,
    configure,
    errors,
    prepared,
    psycopg,
    reason,
)
from hybridkex.qkd.postgres_schema import SCHEMA_VERSION, SINCE, TABLES
from hybridkex.qkd.store import (
    EVERY_LINK,
    KeyStore,
    Material,
    OutcomeUnknown,
    Seal,
    SealRecord,
    place_of,
)
from hybridkex.secret import Secret
from hybridkex.text import get_logger

LOG: Final = get_logger(__name__)

T = TypeVar("T")
_Cursor: TypeAlias = "psycopg.Cursor[Any]"

CONNECTIONS: Final = 8
"""The maximum number of connections of one process to the database."""
WALK_SECONDS: Final = 10.0
"""Seconds for which released keys may be skipped while there are others."""
HOLD_SECONDS: Final = 30.0
"""Seconds until a reservation expires if its process does not end it; longer than a request."""
MOVED: Final = {
    "spent": {"link": "text", "key_id": "text", "at": "float8"},
    "material": {
        "link": "text",
        "key_id": "text",
        "half": "smallint",
        "shared": "boolean",
        "created": "float8",
        "sealed": "bytea",
    },
    "grants": {
        "link": "text",
        "key_id": "text",
        "slave": "text",
        "master": "text",
        "created": "float8",
        "sealed": "bytea",
        "ended": "text",
        "blocks": "integer",
    },
}
"""The tables whose rows another store gives up, their columns and the columns' types."""
TRANSACTION_SECONDS: Final = 60.0
"""Longer than any transaction, each of whose few statements has its limit."""
_IN_TURN: Final = "SELECT pg_advisory_xact_lock(hashtext('hybridkex key store'))"
"""Processes that change the tables or the record of the sealing keys take turns."""
_SCOPE: Final = (
    "SELECT set_config('hybridkex.link', %s, true), generation,"
    " extract(epoch FROM clock_timestamp())::float8, set_config('hybridkex.sae', %s, true),"
)
_OPENING: Final = (
    f"{_SCOPE} CASE WHEN current_setting('synchronous_commit') IN ('off', 'local')"
    " THEN set_config('synchronous_commit', 'on', true) END FROM hybridkex_meta"
)
"""The first statement of a transaction. It confines the transaction to a link, and deliveries to an
SAE, and returns what the transaction must know. The commit is durable, whatever the server's
default is; a stronger setting stays."""
_OPENING_LAZY: Final = f"{_SCOPE} set_config('synchronous_commit', 'off', true) FROM hybridkex_meta"
"""The same with a commit that may be lost if the machine fails."""
_THESE: Final = "link || '' = %s AND key_id = ANY(%s)"
"""Rows of the material by their IDs. The concatenation prevents a scan of the link's stock through
the index that exists for reserving."""


_FREE: Final = (
    "(holder IS NULL OR held_until NOT BETWEEN clock_timestamp()"
    " AND clock_timestamp() + interval '1 hour')"
)
"""Material that is not reserved. A time further ahead than any reservation lasts was set while the
clock was wrong."""


class PostgresKeyStore(KeyStore):
    """A key database in PostgreSQL 13 or later, for any number of processes of one KME.

    Args:
        url: ``postgresql://user@host/database``, as libpq takes it.
        seal_key: of the key file, which every process has and the database never gets.
        read_keys: keys that only decrypt.
        owner: the ID of the KME whose database it is.
        on_failure: called in a worker thread for each call that fails.
        connections: most connections to the database.
        source: the ID of another store, to open this one for a move of that store's keys into it
            (:mod:`hybridkex.qkd.store_move`) instead of for service.

    Raises:
        ConfigError: the database cannot be used now, belongs to another KME or another key file,
            or is of a later version; a move into it is incomplete, or, with ``source``, it has
            other keys.
    """

    def __init__(
        self,
        url: Secret,
        seal_key: Secret,
        *,
        owner: str,
        read_keys: Sequence[Secret] = (),
        on_failure: Callable[[], object] = lambda: None,
        connections: int = CONNECTIONS,
        source: str | None = None,
    ) -> None:
        self._keys = self._seal = Seal(seal_key, *read_keys)
        self._generation = -1
        """The generation of the record for which ``_seal`` was made from ``_keys``."""
        self._walked = -1
        """The generation at which the keys have been encrypted again."""
        self._owner = owner
        self._on_failure = on_failure
        self._failing = False
        self._log = BoundedLog(LOG, rate=1 / 60)
        """On a full disk some calls fail, and others need no room."""
        self._telling = threading.Lock()
        """Guards the state of failure logging: calls run in several threads."""
        self._held: dict[tuple[str, str], str] = {}
        """The mark of the reservation of each reserved block of a link."""
        self._marks = 0
        self._first: dict[tuple[str, int], int] = {}
        """The position in each half of a link from which to look for keys. The keys before it are
        deleted: the database scans them as long as a long transaction, such as a dump, keeps their
        rows."""
        self._from_the_start = 0.0
        """When to look for released keys before that position again, by the monotonic clock."""
        self._meta = place_of("meta", owner)
        conninfo, self.where = _prepared(url)
        self._pool: ConnectionPool[BoundedConnection] = ConnectionPool(
            conninfo,
            connection_class=BoundedConnection,
            min_size=1,
            max_size=connections,
            timeout=WAIT_SECONDS,
            reconnect_timeout=0,  # the next call tries again
            configure=configure,
            open=False,
        )
        try:
            with BoundedConnection.connect(conninfo) as connection:
                configure(connection)
                check_session(connection, self.where)
                self.id, self.moved = self._prepare(connection, source)
                [self._process] = _one(connection.execute("SELECT gen_random_uuid()::text"), 1)
        except psycopg.Error as error:
            raise ConfigError(f"cannot use the key store {self.where}: {_reason(error)}") from error
        self._pool.open()

    def _prepare(self, connection: BoundedConnection, source: str | None) -> tuple[str, bool]:
        """Create, convert or check the tables; processes that start at once take turns.

        Returns the ID of the store, and whether a move into it is complete.
        """
        with connection.transaction(), connection.cursor() as cursor:
            cursor.execute(_IN_TURN)
            [found] = _one(cursor.execute("SELECT to_regclass('hybridkex_meta') IS NOT NULL"), 1)
            if not found:
                for statement in TABLES:
                    cursor.execute(statement)
                record = SealRecord.new(self._keys, self._meta)
                cursor.execute(
                    "INSERT INTO hybridkex_meta (version, kme, seal) VALUES (1, %s, %s)",
                    (self._owner, record.current),
                )
            version, owner = _one(cursor.execute("SELECT version, kme FROM hybridkex_meta"), 2)
            _check_origin(self.where, version, owner, self._owner)
            if version < SCHEMA_VERSION:
                self._convert(connection, cursor, version)
            cursor.execute("UPDATE hybridkex_meta SET version = %s", (SCHEMA_VERSION,))
            self._seal, self._generation = self._settle(cursor, self._keys)
            if not found:
                cursor.execute("UPDATE hybridkex_meta SET source = %s", (source,))
            store_id, origin, moved = _one(
                cursor.execute("SELECT id::text, source, moved FROM hybridkex_meta"), 3
            )
            if source is not None and origin != source:
                raise ConfigError(
                    f"the key store {self.where} is in service or has keys of another store, and "
                    "keys can be moved into a new one only: name an empty database or schema"
                )
            if source is None and origin is not None and not moved:
                raise ConfigError(
                    f"the move of keys into {self.where} is not complete: run 'hybridkex kme "
                    "migrate' again, which continues it"
                )
            query = (
                "SELECT current_setting('fsync'), rolname, rolsuper OR rolbypassrls"
                " FROM pg_roles WHERE rolname = current_user"
            )
            fsync, role, is_exempt = _one(cursor.execute(query), 3)
            if is_exempt:
                LOG.warning(
                    "%s: the role %s is exempt from row-level security, which keeps each link to "
                    "its own rows; use a role that is not a superuser and lacks BYPASSRLS",
                    self.where,
                    role,
                )
            if fsync == "off":
                LOG.warning(
                    "%s has fsync = off: after a failure of its machine, keys may be delivered "
                    "twice",
                    self.where,
                )
        return store_id, moved

    @staticmethod
    def _convert(connection: BoundedConnection, cursor: _Cursor, version: int) -> None:
        """Convert the tables of an older version, in as much time as it takes: a minute for some
        million rows."""
        connection.is_patient = True
        cursor.execute("SET LOCAL statement_timeout = 0")
        for later in range(version + 1, SCHEMA_VERSION + 1):
            for statement in SINCE[later]:
                cursor.execute(statement)
        cursor.execute("RESET statement_timeout")
        connection.is_patient = False

    # -- the sealing key

    def _settle(self, cursor: _Cursor, keys: Seal) -> tuple[Seal, int]:
        """The keys in order of use, and the generation of the record. Raises ``ConfigError``."""
        found, generation = self.record(cursor)
        seal, record = found.settled(keys, self._meta, f"key store {self.where}")
        if record != found:
            generation += 1
            cursor.execute(
                "UPDATE hybridkex_meta SET seal = %s, former = %s, generation = %s,"
                " changed = clock_timestamp()",
                (record.current, list(record.former), generation),
            )
        return seal, generation

    def _follow(self, cursor: _Cursor) -> None:
        """Encrypt under the key that another process has made the current one. Raises
        ``ConfigError``."""
        found, generation = self.record(cursor)
        seal, record = found.settled(self._keys, self._meta, f"key store {self.where}")
        if record == found:
            self._seal, self._generation = seal, generation

    @staticmethod
    def record(cursor: _Cursor) -> tuple[SealRecord, int]:
        """The database's record of the sealing keys, and its generation."""
        current, former, retired, generation = _one(
            cursor.execute("SELECT seal, former, retired, generation FROM hybridkex_meta"), 4
        )
        record = SealRecord(current=current, former=tuple(former), retired=tuple(retired))
        return record, generation

    async def change_keys(self, seal_key: Secret, read_keys: Sequence[Secret] = ()) -> None:
        keys = Seal(seal_key, *read_keys)

        def work(cursor: _Cursor) -> tuple[Seal, int] | ConfigError:
            cursor.execute(_IN_TURN)
            try:
                return self._settle(cursor, keys)
            except ConfigError as error:  # of the configuration, not of the database
                return error

        # What other calls go by from the moment of the commit on.
        before, self._keys = self._keys, keys
        try:
            settled = await self._run(EVERY_LINK, work, follow=False)
        except BaseException:
            self._keys = before
            raise
        if isinstance(settled, ConfigError):
            self._keys = before
            raise settled
        self._seal, self._generation = settled

    async def renew(self) -> bool:
        """See :class:`~hybridkex.qkd.store.KeyStore`. It is done when a scan that began after the
        end of every transaction under an earlier key has found nothing."""

        def state(cursor: _Cursor) -> tuple[bool, bool]:
            former, settled = _one(
                cursor.execute(
                    "SELECT cardinality(former) > 0,"
                    " changed + make_interval(secs => %s) < clock_timestamp() FROM hybridkex_meta",
                    (TRANSACTION_SECONDS,),
                ),
                2,
            )
            return former, settled

        pending, settled = await self._run(EVERY_LINK, state)
        if not pending:
            return True
        generation = self._generation
        if not settled and generation == self._walked:
            return False
        self._walked = generation
        if await self._renew_rows() or not settled:
            return False

        def finish(cursor: _Cursor) -> bool:
            return (
                cursor.execute(
                    "UPDATE hybridkex_meta SET retired = retired || former, former = '{}'"
                    " WHERE generation = %s",
                    (generation,),
                ).rowcount
                == 1
            )

        return await self._run(EVERY_LINK, finish)

    def _sealed_after(
        self, db: _Cursor, table: str, after: tuple[Any, ...]
    ) -> list[tuple[tuple[Any, ...], tuple[str, ...], bytes | None]]:
        if table == "material":
            db.execute(
                "SELECT seq, link, key_id, sealed FROM material WHERE seq > %s"
                " ORDER BY seq LIMIT %s",
                (*(after or (0,)), self.PAGE),
            )
            return [((seq,), (table, link, key_id), sealed) for seq, link, key_id, sealed in db]
        db.execute(
            "SELECT key_id, link, slave, master, sealed FROM grants"
            " WHERE (key_id, link, slave) > (%s, %s, %s) ORDER BY key_id, link, slave LIMIT %s",
            (*(after or ("", "", "")), self.PAGE),
        )
        return [
            ((key_id, link, slave), ("grant", link, key_id, master, slave), sealed)
            for key_id, link, slave, master, sealed in db
        ]

    def _seal_again(self, db: _Cursor, table: str, new: Sequence[tuple[Any, ...]]) -> None:
        # One that is locked is about to leave; if it stays, the next walk finds it.
        db.execute(
            "UPDATE material SET sealed = new.renewed FROM"
            " (SELECT seq, given.renewed FROM material JOIN"
            " unnest(%s::bigint[], %s::bytea[], %s::bytea[]) AS given (seq, sealed, renewed)"
            " USING (seq) WHERE material.sealed = given.sealed"
            " FOR UPDATE OF material SKIP LOCKED) AS new WHERE material.seq = new.seq"
            if table == "material"
            else "UPDATE grants SET sealed = new.renewed FROM"
            " (SELECT key_id, link, slave, given.renewed FROM grants JOIN"
            " unnest(%s::text[], %s::text[], %s::text[], %s::bytea[], %s::bytea[])"
            " AS given (key_id, link, slave, sealed, renewed)"
            " USING (key_id, link, slave) WHERE grants.sealed = given.sealed"
            " FOR UPDATE OF grants SKIP LOCKED) AS new WHERE grants.key_id = new.key_id"
            " AND grants.link = new.link AND grants.slave = new.slave",
            list(map(list, zip(*new, strict=True))),
        )

    # -- a move of another store's keys into this one

    def add_rows(self, table: str, rows: Sequence[tuple[Any, ...]]) -> None:
        """Add rows with the columns of :data:`MOVED`, except those that are here. Blocks.

        Raises ``KeySourceUnavailable``.
        """
        columns = MOVED[table]
        arrays = ", ".join(f"%s::{kind}[]" for kind in columns.values())
        self._transact(
            EVERY_LINK,
            lambda cursor: cursor.execute(
                f"INSERT INTO {table} ({', '.join(columns)}) SELECT * FROM unnest({arrays})"
                " ON CONFLICT DO NOTHING",
                list(map(list, zip(*rows, strict=True))),
            ),
        )

    def end_move(self) -> None:
        """Put the store into service. Blocks. Raises ``KeySourceUnavailable``."""
        self._transact(
            EVERY_LINK, lambda cursor: cursor.execute("UPDATE hybridkex_meta SET moved = true")
        )
        self.moved = True

    # -- transactions

    async def _run(
        self,
        link: str,
        work: Callable[[_Cursor], T],
        *,
        size: int = 1,
        writes: bool = True,
        sae: str = "",
        follow: bool = True,
        durable: bool = True,
    ) -> T:
        """See :class:`~hybridkex.qkd.store.KeyStore`.

        ``follow``: with the current sealing key, whichever process has changed it. ``durable``: it
        is on the disk before this returns.
        """
        opening = _OPENING if durable else _OPENING_LAZY
        try:
            records = writes and durable
            return await in_thread(self._transact, link, work, follow, opening, sae, records)
        except NoThread as error:
            self._on_failure()
            raise KeySourceUnavailable(f"the key store failed: {error}") from error

    def _transact(
        self,
        link: str,
        work: Callable[[_Cursor], T],
        follow: bool = True,
        opening: LiteralString = _OPENING,
        sae: str = "",
        records: bool = True,
    ) -> T:
        scope = (link, sae)
        try:
            try:
                result = self._attempt(scope, work, follow, opening)
            except _NotCommitted:
                result = self._attempt(scope, work, follow, opening)
        except (psycopg.Error, PoolTimeout, _NotCommitted, _Unknown, ConfigError) as error:
            cause = error.__cause__ if isinstance(error, _NotCommitted | _Unknown) else error
            kind = OutcomeUnknown if isinstance(error, _Unknown) else KeySourceUnavailable
            self._on_failure()
            text = _reason(cause)
            with self._telling:
                if not self._failing:  # once, not for every call until the store works again
                    self._log.log(logging.ERROR, "the key store %s failed: %s", self.where, text)
                self._failing = not isinstance(cause, InvalidTag)
            raise kind(f"the key store failed: {text}") from cause
        with self._telling:
            if self._failing and records:  # reading may work on a full disk
                self._log.log(logging.WARNING, "the key store %s works again", self.where)
                self._failing = False
        return result

    def _attempt(
        self,
        scope: tuple[str, str],
        work: Callable[[_Cursor], T],
        follow: bool,
        opening: LiteralString,
    ) -> T:
        worked = False
        try:
            with (
                self._pool.connection() as connection,
                connection.transaction(),
                connection.cursor() as cursor,
            ):
                cursor.execute(opening, scope)
                _, generation, now = _one(cursor, 3)
                self._ahead = now - time.time()
                if follow and generation != self._generation:
                    self._follow(cursor)
                result = work(cursor)
                worked = True
        except InvalidTag as error:
            # Damaged, or encrypted by another process under a key that has become the current one
            # in this moment.
            raise _NotCommitted from error
        except (psycopg.OperationalError, psycopg.InterfaceError) as error:
            if worked:
                raise _Unknown from error
            if isinstance(error, PoolTimeout | errors.QueryCanceled):
                raise
            raise _NotCommitted from error
        return result

    # -- material

    def _add_material(
        self, db: _Cursor, link: str, rows: Sequence[tuple[str, int, bytes]], shared: bool
    ) -> None:
        columns = list(map(list, zip(*sorted(rows), strict=True))) or [[], [], []]
        db.execute(
            "INSERT INTO material (link, key_id, half, shared, sealed)"
            " SELECT %s, key_id, half, %s, sealed"
            " FROM unnest(%s::text[], %s::int[], %s::bytea[]) AS new (key_id, half, sealed)"
            " ON CONFLICT DO NOTHING",
            (link, shared, *columns),
        )

    def _among(self, db: _Cursor, table: str, link: str, key_ids: Sequence[str]) -> set[str]:
        statement = {
            "material": f"SELECT key_id FROM material WHERE {_THESE}",
            "spent": "SELECT key_id FROM spent WHERE link = %s AND key_id = ANY(%s)",
        }[table]
        return {key_id for (key_id,) in db.execute(statement, (link, list(key_ids)))}

    async def reserve(
        self, link: str, number: int, *, half: int = 0, skip: Iterable[str] = ()
    ) -> list[Material]:
        """See :class:`~hybridkex.qkd.store.KeyStore`. A reservation ends by itself after
        :data:`HOLD_SECONDS`."""
        passed = list(skip)
        self._marks += 1
        mark = f"{self._process} {self._marks}"

        def work(cursor: _Cursor) -> tuple[list[Material], list[str]]:
            found: list[Material] = []
            damaged: list[str] = []
            if time.monotonic() > self._from_the_start:
                self._first.clear()
                self._from_the_start = time.monotonic() + WALK_SECONDS
            for part in (half, 1 - half):
                while len(found) < number:
                    first = self._first.pop((link, part), 0)
                    rows = cursor.execute(
                        # An array, since a sub-query may be carried out once for each row.
                        "UPDATE material SET holder = %s,"
                        " held_until = clock_timestamp() + make_interval(secs => %s)"
                        " WHERE seq = ANY(ARRAY(SELECT seq FROM material"
                        " WHERE link = %s AND half = %s AND seq >= %s"
                        f" AND NOT key_id = ANY(%s) AND {_FREE}"
                        " ORDER BY seq LIMIT %s FOR UPDATE SKIP LOCKED))"
                        " RETURNING seq, key_id, shared, created, sealed",
                        (mark, HOLD_SECONDS, link, part, first, passed, number - len(found)),
                    ).fetchall()
                    if rows:
                        self._first[link, part] = min(rows)[0]
                    elif not first:
                        break
                    for _, key_id, shared, created, sealed in sorted(rows):
                        try:
                            key = self._seal.open(sealed, place_of("material", link, key_id))
                        except InvalidTag:
                            damaged.append(key_id)
                            continue
                        found.append(
                            Material(
                                key_id=key_id,
                                key=key,
                                created=created - self._ahead,
                                shared=shared,
                            )
                        )
            if damaged:
                if self.record(cursor)[1] != self._generation:
                    raise InvalidTag  # they may be encrypted under a key that is new
                self._erase(cursor, link, damaged)
            return found, damaged

        # A mark that is lost with the machine is of a process that is lost, too.
        found, damaged = await self._run(link, work, durable=False)
        if damaged:
            LOG.error("%s: %d damaged keys of %s are erased", self.where, len(damaged), link)
        self._held.update(((link, one.key_id), mark) for one in found)
        return found

    async def release(self, link: str, key_ids: Iterable[str]) -> None:
        held = [(key_id, self._held.pop((link, key_id), None)) for key_id in key_ids]
        marks = [(key_id, mark) for key_id, mark in held if mark is not None]
        if not marks:
            await checkpoint()
            return

        def work(cursor: _Cursor) -> None:
            cursor.execute(
                "UPDATE material SET holder = NULL, held_until = NULL"
                f" WHERE {_THESE} AND holder = ANY(%s)",
                (link, [key_id for key_id, _ in marks], list({mark for _, mark in marks})),
            )

        with suppress(KeySourceUnavailable):  # they end by themselves
            await self._run(link, work, durable=False)

    def _sizes(self, db: _Cursor, link: str) -> tuple[int, int]:
        free, promised = _one(
            db.execute(
                "SELECT coalesce(sum(free), 0), coalesce(sum(promised), 0)"
                " FROM stock WHERE link = %s",
                (link,),
            ),
            2,
        )
        return int(free), int(promised)

    def _material_after(
        self, db: _Cursor, link: str, half: int, last: int, before: float
    ) -> list[tuple[int, str, bool]]:
        return db.execute(
            f"SELECT seq, key_id, shared AND created < %s AND {_FREE} FROM material"
            " WHERE link = %s AND half = %s AND seq > %s ORDER BY seq LIMIT %s",
            (before, link, half, last, self.PAGE),
        ).fetchall()

    # -- from material to grants

    def _end_reservations(self, link: str, key_ids: Iterable[str]) -> None:
        for key_id in key_ids:  # the mark in the row ends with the row
            self._held.pop((link, key_id), None)

    def _unreserved(self, db: _Cursor, link: str, key_ids: Sequence[str]) -> list[str]:
        rows = db.execute(
            f"SELECT key_id FROM material WHERE {_THESE} AND {_FREE}"
            " ORDER BY key_id FOR UPDATE SKIP LOCKED",
            (link, list(key_ids)),
        )
        return [key_id for (key_id,) in rows]

    def _take(
        self, db: _Cursor, link: str, key_ids: Sequence[str]
    ) -> dict[str, tuple[bytes, bool]]:
        rows = db.execute(
            f"DELETE FROM material WHERE {_THESE} RETURNING key_id, sealed, NOT {_FREE}",
            (link, list(key_ids)),
        )
        return {key_id: (sealed, is_held) for key_id, sealed, is_held in rows}

    def _take_reserved(self, db: _Cursor, link: str, key_ids: Sequence[str]) -> dict[str, bytes]:
        marks = list({self._held.get((link, key_id), "") for key_id in key_ids})
        return dict(
            db.execute(
                f"DELETE FROM material WHERE {_THESE} AND ({_FREE} OR holder = ANY(%s))"
                " RETURNING key_id, sealed",
                (link, list(key_ids), marks),
            ).fetchall()
        )

    def _spend(self, db: _Cursor, link: str, key_ids: Iterable[str]) -> set[str]:
        rows = db.execute(
            "INSERT INTO spent (link, key_id) SELECT %s, unnest(%s::text[])"
            " ON CONFLICT DO NOTHING RETURNING key_id",
            (link, sorted(set(key_ids))),
        )
        return {key_id for (key_id,) in rows}

    def _add_grants(
        self, db: _Cursor, link: str, master: str, rows: Sequence[tuple[str, str, int, bytes]]
    ) -> None:
        db.execute(
            "INSERT INTO grants (link, key_id, slave, master, blocks, sealed)"
            " SELECT %s, key_id, slave, %s, blocks, sealed"
            " FROM unnest(%s::text[], %s::text[], %s::int[], %s::bytea[])"
            " AS new (key_id, slave, blocks, sealed)",
            (link, master, *map(list, zip(*rows, strict=True))),
        )

    # -- from grants to slaves

    def _deliver(
        self, db: _Cursor, link: str, key_ids: Sequence[str], slave: str, master: str
    ) -> dict[str, bytes]:
        rows = db.execute(
            "UPDATE grants SET sealed = NULL, ended = 'delivered' FROM"
            " (SELECT link, key_id, slave, sealed FROM grants"
            " WHERE link = %s AND key_id = ANY(%s) AND slave = %s AND master = %s"
            " AND ended IS NULL ORDER BY key_id FOR UPDATE) AS old"
            " WHERE grants.key_id = old.key_id AND grants.link = old.link"
            " AND grants.slave = old.slave RETURNING old.key_id, old.sealed",
            (link, list(key_ids), slave, master),
        )
        return dict(rows.fetchall())

    def _ends(self, db: _Cursor, link: str, key_id: str, master: str) -> dict[str, str | None]:
        rows = db.execute(
            "SELECT slave, ended FROM grants WHERE link = %s AND key_id = %s AND master = %s",
            (link, key_id, master),
        )
        return dict(rows.fetchall())

    # -- the end of keys

    def _void_grants(self, db: _Cursor, link: str, key_ids: Sequence[str]) -> set[str]:
        rows = db.execute(
            "UPDATE grants SET sealed = NULL, ended = 'void'"
            " WHERE link = %s AND key_id = ANY(%s) AND ended IS NULL RETURNING key_id",
            (link, list(key_ids)),
        )
        return {key_id for (key_id,) in rows}

    async def expire(self, *, keys_before: float, tombstones_before: float) -> int:
        erased = await super().expire(keys_before=keys_before, tombstones_before=tombstones_before)
        await self._run(EVERY_LINK, self._sum_up)
        return erased

    def _expire_material(self, db: _Cursor, before: float) -> int:
        return db.execute(
            "WITH old AS (DELETE FROM material WHERE seq = ANY(ARRAY("
            " SELECT seq FROM material WHERE created < %s ORDER BY created LIMIT %s"
            " FOR UPDATE SKIP LOCKED)) RETURNING link, key_id)"
            " INSERT INTO spent (link, key_id) SELECT link, key_id FROM old"
            " ON CONFLICT (link, key_id) DO UPDATE SET at = EXCLUDED.at",
            (before, self.PAGE),
        ).rowcount

    def _expire_grants(self, db: _Cursor, before: float) -> int:
        return db.execute(
            "WITH old AS MATERIALIZED (SELECT link, key_id, slave FROM grants"
            " WHERE created < %s AND ended IS NULL ORDER BY created LIMIT %s"
            " FOR UPDATE SKIP LOCKED)"
            " UPDATE grants SET sealed = NULL, ended = 'expired' FROM old"
            " WHERE grants.link = old.link AND grants.key_id = old.key_id"
            " AND grants.slave = old.slave AND grants.ended IS NULL",
            (before, self.PAGE),
        ).rowcount

    def _forget_grants(self, db: _Cursor, before: float) -> int:
        return db.execute(
            "WITH old AS MATERIALIZED (SELECT link, key_id, slave FROM grants"
            " WHERE created < %s AND ended IS NOT NULL ORDER BY created LIMIT %s"
            " FOR UPDATE SKIP LOCKED)"
            " DELETE FROM grants USING old WHERE grants.link = old.link"
            " AND grants.key_id = old.key_id AND grants.slave = old.slave",
            (before, self.PAGE),
        ).rowcount

    def _forget_spent(self, db: _Cursor, before: float) -> int:
        return db.execute(
            "WITH old AS MATERIALIZED (SELECT link, key_id FROM spent WHERE at < %s"
            " ORDER BY at LIMIT %s FOR UPDATE SKIP LOCKED)"
            " DELETE FROM spent USING old"
            " WHERE spent.link = old.link AND spent.key_id = old.key_id",
            (before, self.PAGE),
        ).rowcount

    @staticmethod
    def _sum_up(cursor: _Cursor) -> None:
        """Replace the changes of each link's sizes by their sums."""
        cursor.execute(
            "WITH old AS (DELETE FROM stock WHERE ctid = ANY(ARRAY("
            " SELECT ctid FROM stock FOR UPDATE SKIP LOCKED)) RETURNING link, free, promised)"
            " INSERT INTO stock (link, free, promised)"
            " SELECT link, sum(free), sum(promised) FROM old GROUP BY link"
        )

    async def claim(self, job: str, seconds: float) -> bool:
        def work(cursor: _Cursor) -> bool:
            return (
                cursor.execute(
                    "INSERT INTO hybridkex_jobs AS old (job, due)"
                    " VALUES (%s, clock_timestamp() + make_interval(secs => %s))"
                    " ON CONFLICT (job) DO UPDATE SET due = EXCLUDED.due"
                    " WHERE old.due NOT BETWEEN clock_timestamp()"
                    " AND clock_timestamp() + interval '1 hour'",
                    (job, seconds),
                ).rowcount
                == 1
            )

        return await self._run(EVERY_LINK, work)

    async def settle(self, job: str, seconds: float) -> None:
        def work(cursor: _Cursor) -> None:
            cursor.execute(
                "UPDATE hybridkex_jobs SET due = clock_timestamp() + make_interval(secs => %s)"
                " WHERE job = %s",
                (seconds, job),
            )

        await self._run(EVERY_LINK, work)

    async def check(self) -> None:
        def work(cursor: _Cursor) -> None:
            with cursor.connection.transaction(force_rollback=True):  # as much as a delivery
                # IDs side by side: after a checkpoint, each page that changes is logged as a whole.
                cursor.execute(
                    "INSERT INTO spent (link, key_id) SELECT '', place::text || number"
                    " FROM gen_random_uuid() AS place, generate_series(1, 100) AS number"
                )

        await self._run(EVERY_LINK, work)

    async def tidy(self) -> None:
        """PostgreSQL does so by itself (autovacuum), at a time of its own."""
        await checkpoint()

    def close(self) -> None:
        self._pool.close()

    async def aclose(self) -> None:
        await in_thread(self._pool.close)


def check_store(url: Secret, keys: Seal, *, owner: str) -> None:
    """Check that a database can be used as the key store of ``owner``. Blocks. What a KME would
    change is tried, and undone.

    Raises:
        ConfigError: why it cannot.
    """
    conninfo, where = _prepared(url)
    try:
        with BoundedConnection.connect(conninfo) as connection, connection.cursor() as cursor:
            check_session(connection, where)
            [found] = _one(cursor.execute("SELECT to_regclass('hybridkex_meta') IS NOT NULL"), 1)
            with connection.transaction(force_rollback=True):  # as at the start of a KME
                cursor.execute(
                    "UPDATE hybridkex_meta SET version = version"
                    if found
                    else "CREATE TABLE hybridkex_meta ()"
                )
            if not found:
                return
            version, kme = _one(cursor.execute("SELECT version, kme FROM hybridkex_meta"), 2)
            _check_origin(where, version, kme, owner)
            if version == SCHEMA_VERSION:
                [half_done] = _one(
                    cursor.execute("SELECT source IS NOT NULL AND NOT moved FROM hybridkex_meta"), 1
                )
                if half_done:
                    raise ConfigError(
                        f"the move of keys into {where} is not complete: run 'hybridkex kme "
                        "migrate' again, which continues it"
                    )
                record, _ = PostgresKeyStore.record(cursor)
                record.settled(keys, place_of("meta", owner), f"key store {where}")
    except psycopg.Error as error:
        raise ConfigError(f"cannot use the key store {where}: {_reason(error)}") from error


def _check_origin(where: str, version: int, kme: str, owner: str) -> None:
    """Check that the store was made for ``owner``, by a version that we can read."""
    if version > SCHEMA_VERSION:
        raise ConfigError(
            f"the key store {where} was written by a later version of hybridkex: update this one"
        )
    if kme != owner:
        raise ConfigError(
            f"the key store {where} belongs to {kme}, not to {owner}; every KME needs a database "
            "or a schema of its own"
        )


def _prepared(url: Secret) -> tuple[str, str]:
    try:
        return prepared(url.reveal().decode())
    except UnicodeDecodeError:
        raise ConfigError("the URL of the store is not Unicode text") from None


class _NotCommitted(Exception):
    """A transaction failed before its commit, so that it may be repeated."""


class _Unknown(Exception):
    """A transaction failed in its commit, which the server may have carried out."""


def _one(cursor: _Cursor, columns: int) -> tuple[Any, ...]:
    row = cursor.fetchone()
    if row is None:
        raise psycopg.DataError(
            "the table hybridkex_meta is empty, as in a copy of the tables without their rows; "
            "begin with an empty database"
        )
    return tuple(row[:columns])


def _reason(error: BaseException | None) -> str:
    if isinstance(error, InvalidTag):
        return "a key in it is damaged or altered"
    return reason(error)
