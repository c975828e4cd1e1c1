"""The server's store in SQLite: the participants, and the log of events.

Entries in the log have been acknowledged and, if the store is a file, outlive the server. In a
file, messages are encrypted (AES-256-GCM) with a separate key. Rooms, nicknames and times are not,
because the server searches by them. Only the owner can read the file and the key file.
"""

import hashlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from hybridkex import Secret
from hybridkex.errors import ConfigError
from hybridkex.qkd.sqlite_file import open_locked, use_log
from hybridkex.qkd.store import read_key_file, write_key_file

from .protocol import ChatError, Entry

__all__ = ["Change", "Slot", "Store"]

_KEPT = 20_000
_FORMAT = 2
"""The ``user_version`` of the file; format 1 had none, and its texts were not encrypted."""
_TABLES = """
    CREATE TABLE IF NOT EXISTS seat (
        nickname TEXT PRIMARY KEY, token BLOB NOT NULL, peer TEXT NOT NULL,
        accepted INTEGER NOT NULL, room TEXT NOT NULL);
    CREATE TABLE IF NOT EXISTS entry (
        id INTEGER PRIMARY KEY AUTOINCREMENT, at INTEGER NOT NULL, kind TEXT NOT NULL,
        room TEXT NOT NULL, nickname TEXT NOT NULL, text BLOB NOT NULL);
    -- The part of the log that a participant may read: each room, while they were in it.
    CREATE TABLE IF NOT EXISTS stay (
        nickname TEXT NOT NULL, room TEXT NOT NULL, first INTEGER NOT NULL, last INTEGER);
    CREATE INDEX IF NOT EXISTS stay_of ON stay (nickname);
    CREATE TABLE IF NOT EXISTS seal (value BLOB NOT NULL);
"""


@dataclass
class Slot:
    """A nickname and its holder."""

    nickname: str
    token: bytes
    """The SHA-256 of the token; the token itself would give access to the slot."""
    peer: str
    """The client's verified names or its key at the first connection; empty if unknown."""
    accepted: int
    room: str


@dataclass(frozen=True)
class Change:
    """The change that one action makes to the log."""

    verb: str
    """``enter``, ``say``, ``join`` or ``leave``."""
    slot: Slot
    number: int = 0
    text: str = ""


def _key(path: Path | None, key_file: Path | None) -> Secret:
    """Read the key of a store, or make one for a new store or a store in memory."""
    if path is None:
        return Secret(os.urandom(32))
    key_file = key_file or Path(f"{path}.key")
    if not path.exists() and not key_file.exists():
        write_key_file(key_file)
    return read_key_file(key_file)


def _open(path: Path) -> sqlite3.Connection:
    """Open a store exclusively: two servers would overwrite each other's slots."""
    try:
        return open_locked(path, what="store")
    except ConfigError as error:
        raise ChatError(str(error)) from None


def digest(token: str) -> bytes:
    """Return the SHA-256 of a token, which is stored instead of it."""
    return hashlib.sha256(bytes.fromhex(token)).digest()


class _Sealed:
    """Encrypts texts, each with a random nonce and bound to its row (``place``)."""

    def __init__(self, key: Secret) -> None:
        self._aead = AESGCM(key.reveal())

    def seal(self, text: str, *place: object) -> bytes:
        nonce = os.urandom(12)
        return nonce + self._aead.encrypt(nonce, text.encode("utf-8"), json.dumps(place).encode())

    def open(self, sealed: bytes, *place: object) -> str:
        try:
            plain = self._aead.decrypt(sealed[:12], sealed[12:], json.dumps(place).encode())
        except (InvalidTag, ValueError):
            raise ChatError("the store was written with another key, or was changed") from None
        return plain.decode("utf-8")


class Store:
    """The store. Its methods block, and may be called from any thread.

    Args:
        path: a file, or ``None`` for a store in memory.
        key_file: the file with the store's key, ``PATH.key`` by default. It is created with the
            store.
    """

    def __init__(self, path: Path | None = None, key_file: Path | None = None) -> None:
        self._lock = threading.Lock()
        self._sealed = _Sealed(_key(path, key_file))
        try:
            self._db = (
                sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
                if path is None
                else _open(path)
            )
        except (sqlite3.Error, OSError) as error:
            raise ChatError(f"cannot use {path} as the store: {error}") from None
        try:
            self._prepare(path)
        except BaseException as error:
            self._db.close()
            if isinstance(error, sqlite3.Error | ChatError):
                raise ChatError(f"cannot use {path} as the store: {error}") from None
            raise

    def _prepare(self, path: Path | None) -> None:
        [(version,)] = self._db.execute("PRAGMA user_version")
        [(tables,)] = self._db.execute("SELECT count(*) FROM sqlite_master")
        if tables and version != _FORMAT:
            raise ChatError("an earlier version of this program wrote it, without encryption")
        if path is not None:
            use_log(self._db, path)
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.executescript(_TABLES)
        for (value,) in self._db.execute("SELECT value FROM seal"):
            self._sealed.open(value, "seal")
            return
        self._db.execute("INSERT INTO seal VALUES (?)", (self._sealed.seal("chat", "seal"),))
        self._db.execute(f"PRAGMA user_version = {_FORMAT}")

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def slots(self) -> list[Slot]:
        """Return the slots of all participants."""
        return [Slot(*row) for row in self._read("SELECT * FROM seat")]

    def head(self) -> int:
        """Return the identifier of the newest entry ever written."""
        [(head,)] = self._read("SELECT coalesce(max(seq), 0) FROM sqlite_sequence")
        return int(head)

    def forgotten(self) -> int:
        """Return the identifier up to which entries have been deleted."""
        [(first,)] = self._read("SELECT min(id) FROM entry")
        return 0 if first is None else int(first) - 1

    def missed(self, nickname: str, after: int, up_to: int, limit: int) -> list[Entry]:
        """Return the next entries for a participant who has been away, at most ``limit``."""
        rows = self._read(
            "SELECT DISTINCT entry.* FROM entry JOIN stay ON stay.room = entry.room AND"
            " entry.id BETWEEN stay.first AND coalesce(stay.last, entry.id)"
            " WHERE stay.nickname = ? AND entry.id > ? AND entry.id <= ?"
            " ORDER BY entry.id LIMIT ?",
            (nickname, after, up_to, limit),
        )
        return [
            Entry(*row[:-1], self._sealed.open(row[-1], *row[1:-1]))  # all but the id
            for row in rows
        ]

    def apply(self, changes: Iterable[Change]) -> list[list[Entry]]:
        """Write all changes or none. Returns when they are on the disk.

        Raises ``ChatError`` if they cannot be written.
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
        slot, name = change.slot, (change.slot.nickname,)
        made = []
        if change.verb == "say":
            made.append(self._log("said", slot.room, slot.nickname, change.text))
        if change.verb in ("join", "leave"):
            made.append(self._log("left", slot.room, slot.nickname, ""))
            self._db.execute(
                "UPDATE stay SET last = ? WHERE nickname = ? AND last IS NULL", (made[0].id, *name)
            )
        if change.verb in ("enter", "join"):
            room = change.text if change.verb == "join" else slot.room
            made.append(self._log("joined", room, slot.nickname, ""))
            self._db.execute("INSERT INTO stay VALUES (?, ?, ?, NULL)", (*name, room, made[-1].id))
            self._db.execute(
                "INSERT OR REPLACE INTO seat VALUES (?, ?, ?, ?, ?)",
                (*name, slot.token, slot.peer, change.number, room),
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
            (at, kind, room, nickname, self._sealed.seal(text, at, kind, room, nickname)),
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
