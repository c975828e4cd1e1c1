"""The server's memory: who is there, and the log of what happened, in SQLite.

What is in the log has been acknowledged and outlives the server, where the store is a file.
"""

import hashlib
import sqlite3
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .protocol import ChatError, Entry

__all__ = ["Change", "Seat", "Store"]

_KEPT = 20_000
_TABLES = """
    PRAGMA journal_mode = WAL;
    PRAGMA synchronous = FULL;
    CREATE TABLE IF NOT EXISTS seat (
        nickname TEXT PRIMARY KEY, token BLOB NOT NULL, peer TEXT NOT NULL,
        accepted INTEGER NOT NULL, room TEXT NOT NULL);
    CREATE TABLE IF NOT EXISTS entry (
        id INTEGER PRIMARY KEY AUTOINCREMENT, at INTEGER NOT NULL, kind TEXT NOT NULL,
        room TEXT NOT NULL, nickname TEXT NOT NULL, text TEXT NOT NULL);
    -- What a person may read of the log: each room, while he was in it.
    CREATE TABLE IF NOT EXISTS stay (
        nickname TEXT NOT NULL, room TEXT NOT NULL, first INTEGER NOT NULL, last INTEGER);
    CREATE INDEX IF NOT EXISTS stay_of ON stay (nickname);
"""


@dataclass
class Seat:
    """A nickname and who has it."""

    nickname: str
    token: bytes
    """Its SHA-256: the token itself lets its owner in."""
    peer: str
    """The subject of the certificate that the client came with first, if it had one."""
    accepted: int
    room: str


@dataclass(frozen=True)
class Change:
    """What one action does to the log."""

    verb: str
    """``enter``, ``say``, ``join`` or ``leave``."""
    seat: Seat
    number: int = 0
    text: str = ""


def digest(token: str) -> bytes:
    """What is kept of a token."""
    return hashlib.sha256(bytes.fromhex(token)).digest()


class Store:
    """The tables. Its methods block, and may be called from any thread.

    Args:
        path: a file, or ``None``: then it lasts as long as the server does.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._lock = threading.Lock()
        try:
            self._db = sqlite3.connect(
                path or ":memory:", check_same_thread=False, isolation_level=None
            )
            self._db.executescript(_TABLES)
        except sqlite3.Error as error:
            raise ChatError(f"cannot use {path} as the store: {error}") from None

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def seats(self) -> list[Seat]:
        """Everybody."""
        return [Seat(*row) for row in self._read("SELECT * FROM seat")]

    def head(self) -> int:
        """The identifier of the newest entry that there ever was."""
        [(head,)] = self._read("SELECT coalesce(max(seq), 0) FROM sqlite_sequence")
        return int(head)

    def forgotten(self) -> int:
        """The identifier up to which entries are no longer kept."""
        [(first,)] = self._read("SELECT min(id) FROM entry")
        return 0 if first is None else int(first) - 1

    def missed(self, nickname: str, after: int, up_to: int, limit: int) -> list[Entry]:
        """The next entries for somebody who has been away."""
        rows = self._read(
            "SELECT DISTINCT entry.* FROM entry JOIN stay ON stay.room = entry.room AND"
            " entry.id BETWEEN stay.first AND coalesce(stay.last, entry.id)"
            " WHERE stay.nickname = ? AND entry.id > ? AND entry.id <= ?"
            " ORDER BY entry.id LIMIT ?",
            (nickname, after, up_to, limit),
        )
        return [Entry(*row) for row in rows]

    def apply(self, changes: Iterable[Change]) -> list[list[Entry]]:
        """Write changes down, all or none; returns when they are on the disk.

        Raises ``ChatError`` where the disk does not take them.
        """
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                entries = [self._change(change) for change in changes]
                self._forget_old()
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise ChatError(f"cannot write the store: {error}") from None
        return entries

    def _change(self, change: Change) -> list[Entry]:
        seat, name = change.seat, (change.seat.nickname,)
        made = []
        if change.verb == "say":
            made.append(self._log("said", seat.room, seat.nickname, change.text))
        if change.verb in ("join", "leave"):
            made.append(self._log("left", seat.room, seat.nickname, ""))
            self._db.execute(
                "UPDATE stay SET last = ? WHERE nickname = ? AND last IS NULL", (made[0].id, *name)
            )
        if change.verb in ("enter", "join"):
            room = change.text if change.verb == "join" else seat.room
            made.append(self._log("joined", room, seat.nickname, ""))
            self._db.execute("INSERT INTO stay VALUES (?, ?, ?, NULL)", (*name, room, made[-1].id))
            self._db.execute(
                "INSERT OR REPLACE INTO seat VALUES (?, ?, ?, ?, ?)",
                (*name, seat.token, seat.peer, change.number, room),
            )
        elif change.verb == "leave":
            self._db.execute("DELETE FROM seat WHERE nickname = ?", name)
            self._db.execute("DELETE FROM stay WHERE nickname = ?", name)
        else:
            self._db.execute(
                "UPDATE seat SET accepted = ? WHERE nickname = ?", (change.number, *name)
            )
        return made

    def _log(self, kind: str, room: str, nickname: str, text: str) -> Entry:
        at = int(time.time())
        made = self._db.execute(
            "INSERT INTO entry (at, kind, room, nickname, text) VALUES (?, ?, ?, ?, ?)",
            (at, kind, room, nickname, text),
        )
        assert made.lastrowid is not None
        return Entry(made.lastrowid, at, kind, room, nickname, text)

    def _forget_old(self) -> None:
        self._db.execute("DELETE FROM entry WHERE id <= (SELECT max(id) FROM entry) - ?", (_KEPT,))
        self._db.execute("DELETE FROM stay WHERE last < (SELECT min(id) FROM entry)")

    def _read(self, query: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        with self._lock:
            try:
                return self._db.execute(query, values).fetchall()
            except sqlite3.Error as error:
                raise ChatError(f"cannot read the store: {error}") from None
