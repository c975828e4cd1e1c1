"""KMEs with a deliberate fault, which the check of a history must find.

Each mutant changes the KME of its process, on either store.
"""

import sqlite3
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from hybridkex.qkd import sqlite_store

__all__ = ["MUTANTS"]

_DELIVERY: Final = "UPDATE grants SET sealed = NULL, ended = 'delivered'"


def answer_early() -> None:
    """Answers leave before what they say is durable: a crash undoes it."""
    with suppress(ImportError):  # an extra
        from hybridkex.qkd import postgres_store  # noqa: PLC0415

        postgres_store._OPENING = postgres_store._OPENING_LAZY  # type: ignore[misc]
    _wrap_sqlite(_LateCommits)


def forget_deliveries() -> None:
    """A delivery to a slave is not recorded."""
    with suppress(ImportError):
        from hybridkex.qkd import postgres_store  # noqa: PLC0415

        psycopg, configure = postgres_store.psycopg, postgres_store.configure

        class Forgetful(psycopg.Cursor[Any]):
            def execute(self, query: Any, *arguments: Any, **options: Any) -> Any:
                if str(query).startswith(_DELIVERY):
                    query = (
                        "SELECT key_id, sealed FROM grants WHERE link = %s AND key_id = ANY(%s)"
                        " AND slave = %s AND master = %s AND ended IS NULL"
                    )
                return super().execute(query, *arguments, **options)

        def prepare(connection: Any) -> None:
            configure(connection)
            connection.cursor_factory = Forgetful

        postgres_store.configure = prepare
    _wrap_sqlite(_Forgetful)


MUTANTS: Final[dict[str, Callable[[], None]]] = {
    "answer-early": answer_early,
    "forget-deliveries": forget_deliveries,
}


class _Disk:
    """A connection to a SQLite database that does something else."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __getattr__(self, name: str) -> Any:
        return getattr(self._db, name)


class _Forgetful(_Disk):
    def execute(self, statement: str, *arguments: Any) -> Any:
        if statement.startswith(_DELIVERY):
            return self._db.execute("SELECT 1")
        return self._db.execute(statement, *arguments)


class _LateCommits(_Disk):
    """A transaction is committed up to a second after its end, except the first."""

    def __init__(self, db: sqlite3.Connection) -> None:
        super().__init__(db)
        self._ended = False
        self._begun = 0.0
        self._fresh = True

    @property
    def in_transaction(self) -> bool:
        return self._db.in_transaction and not self._ended

    def execute(self, statement: str, *arguments: Any) -> Any:
        if statement.startswith("BEGIN") and self._ended:
            self._ended = False
            if time.monotonic() < self._begun + 1:
                return self._db.execute("SELECT 1")
            self._db.execute("COMMIT")
        if statement.startswith("BEGIN"):
            self._begun = time.monotonic()
        elif statement == "COMMIT" and not self._fresh:
            self._ended = True
            return self._db.execute("SELECT 1")
        elif statement.startswith("PRAGMA wal_checkpoint") and self._ended:
            return self._db.execute("SELECT 1, 0, 0")  # busy
        self._fresh = self._fresh and statement != "COMMIT"
        return self._db.execute(statement, *arguments)


def _wrap_sqlite(disk: type[_Disk]) -> None:
    opened = sqlite_store.open_locked

    def open_wrapped(path: Path, **options: Any) -> Any:
        return disk(opened(path, **options))

    sqlite_store.open_locked = open_wrapped
