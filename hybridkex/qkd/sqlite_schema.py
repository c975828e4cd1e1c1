"""The tables of the SQLite key store, and how older ones are converted."""

import sqlite3
from pathlib import Path
from typing import Final
from uuid import UUID

from hybridkex.errors import ConfigError
from hybridkex.qkd.store import EVERY_LINK, Seal, half_of, place_of

SCHEMA_VERSION: Final = 4
"""``PRAGMA user_version`` of the tables below; 0 with tables is version 1, which did not set it.
The connection has the functions ``hybridkex_link()`` and ``hybridkex_sae()``."""

ANY_LINK: Final = ""
"""The link of a spent ID from version 1, which did not record it: spent on every link."""

_TABLES: Final = (
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID",
    """CREATE TABLE material (
        seq INTEGER PRIMARY KEY,
        link TEXT NOT NULL,
        key_id TEXT NOT NULL,
        half INTEGER NOT NULL,
        shared INTEGER NOT NULL,
        created REAL NOT NULL,
        sealed BLOB NOT NULL,
        UNIQUE (link, key_id)
    )""",
    """CREATE TABLE grants (
        link TEXT NOT NULL,
        key_id TEXT NOT NULL,
        slave TEXT NOT NULL,
        master TEXT NOT NULL,
        created REAL NOT NULL,
        sealed BLOB,
        ended TEXT,
        blocks INTEGER NOT NULL DEFAULT 1,
        PRIMARY KEY (link, key_id, slave)
    ) WITHOUT ROWID""",
    """CREATE TABLE spent (
        link TEXT NOT NULL,
        key_id TEXT NOT NULL,
        at REAL NOT NULL,
        PRIMARY KEY (link, key_id)
    ) WITHOUT ROWID""",
    "CREATE INDEX material_order ON material (link, half, seq)",
    "CREATE INDEX spent_age ON spent (at)",
)

_NEW_LINK: Final = (
    "INSERT INTO stock (link)"
    " SELECT NEW.link WHERE NOT EXISTS (SELECT 1 FROM stock WHERE link = NEW.link);"
)

_SINCE_3: Final = (
    # Expiry: keys that wait apart from those that have ended, which are many more.
    "CREATE INDEX material_age ON material (created)",
    "CREATE INDEX grants_waiting ON grants (created) WHERE ended IS NULL",
    "CREATE INDEX grants_ended ON grants (created) WHERE ended IS NOT NULL",
    # The sizes of each link. Triggers keep them, so no statement can forget to, and they are
    # committed or undone together with what they count.
    """CREATE TABLE stock (
        link TEXT PRIMARY KEY,
        free INTEGER NOT NULL DEFAULT 0,
        promised INTEGER NOT NULL DEFAULT 0
    ) WITHOUT ROWID""",
    "INSERT INTO stock (link) SELECT link FROM material UNION SELECT link FROM grants",
    """UPDATE stock SET
        free = (SELECT count(*) FROM material WHERE material.link = stock.link),
        promised = (
            SELECT coalesce(sum(blocks), 0) FROM grants
            WHERE grants.link = stock.link AND ended IS NULL
        )""",
    f"""CREATE TRIGGER material_added AFTER INSERT ON material BEGIN
        {_NEW_LINK}
        UPDATE stock SET free = free + 1 WHERE link = NEW.link;
    END""",
    """CREATE TRIGGER material_gone AFTER DELETE ON material BEGIN
        UPDATE stock SET free = free - 1 WHERE link = OLD.link;
    END""",
    f"""CREATE TRIGGER grants_added AFTER INSERT ON grants WHEN NEW.ended IS NULL BEGIN
        {_NEW_LINK}
        UPDATE stock SET promised = promised + NEW.blocks WHERE link = NEW.link;
    END""",
    """CREATE TRIGGER grants_over AFTER UPDATE OF ended ON grants
    WHEN OLD.ended IS NULL AND NEW.ended IS NOT NULL BEGIN
        UPDATE stock SET promised = promised - OLD.blocks WHERE link = OLD.link;
    END""",
    """CREATE TRIGGER grants_gone AFTER DELETE ON grants WHEN OLD.ended IS NULL BEGIN
        UPDATE stock SET promised = promised - OLD.blocks WHERE link = OLD.link;
    END""",
)


def _refuse(name: str, when: str, condition: str, reason: str) -> str:
    """A trigger that refuses a change of a row."""
    return (
        f"CREATE TRIGGER {name} BEFORE {when} WHEN {condition}"
        f" BEGIN SELECT RAISE(ABORT, '{reason}'); END"
    )


def _foreign(row: str) -> str:
    return f"(hybridkex_link() IS NOT '{EVERY_LINK}' AND {row}.link IS NOT hybridkex_link())"


_OTHER_LINK: Final = "a row of another link"
_ENDS: Final = (
    "(NEW.sealed IS NULL) IS NOT (NEW.ended IS NOT NULL) OR NEW.blocks < 1"
    " OR NEW.ended NOT IN ('delivered', 'void', 'expired')"
)

_SINCE_4: Final = (
    # SQLite has no row-level security. Its triggers ask the connection for which link, and for
    # which SAE, the call under way is: it can change no other row, whatever its statements say.
    *(
        statement
        for table in ("material", "grants", "spent")
        for statement in (
            _refuse(f"{table}_insert", f"INSERT ON {table}", _foreign("NEW"), _OTHER_LINK),
            _refuse(
                f"{table}_update",
                f"UPDATE ON {table}",
                f"{_foreign('OLD')} OR {_foreign('NEW')}",
                _OTHER_LINK,
            ),
            _refuse(f"{table}_delete", f"DELETE ON {table}", _foreign("OLD"), _OTHER_LINK),
        )
    ),
    _refuse(
        "grants_foreign",
        "UPDATE OF ended ON grants",
        "NEW.ended = 'delivered' AND OLD.slave IS NOT hybridkex_sae()",
        "a key of another SAE",
    ),
    # A row keeps its identity. A promise ends once, and its key with it.
    _refuse("material_half", "INSERT ON material", "NEW.half NOT IN (0, 1)", "a half is 0 or 1"),
    _refuse(
        "material_fixed",
        "UPDATE OF link, key_id, half, shared, created ON material",
        "true",
        "a key cannot change",
    ),
    _refuse("spent_fixed", "UPDATE OF link, key_id ON spent", "true", "a spent ID cannot change"),
    _refuse(
        "grants_fixed",
        "UPDATE OF link, key_id, slave, master, created, blocks ON grants",
        "true",
        "a promise cannot change",
    ),
    _refuse("grants_final", "UPDATE ON grants", "OLD.ended IS NOT NULL", "it has ended before"),
    _refuse("grants_begin", "INSERT ON grants", _ENDS, "a promise has a key until it ends"),
    _refuse("grants_end", "UPDATE ON grants", _ENDS, "a promise has a key until it ends"),
)


def check_tables(db: sqlite3.Connection, path: Path) -> int:
    """The version of the tables; 0: the database is empty.

    Raises ``ConfigError``: it is of a later version, or not a key store.
    """
    [version] = db.execute("PRAGMA user_version").fetchone()
    tables = {row[0] for row in db.execute("SELECT name FROM sqlite_master")}
    if version > SCHEMA_VERSION:
        raise ConfigError(
            f"the key store {path} was written by a later version of hybridkex: update this one"
        )
    if not tables:
        return 0
    if not {"meta", "material", "grants", "spent"} <= tables:
        raise ConfigError(f"{path} is a database, and not a key store")
    return int(version) or 1


def create(db: sqlite3.Connection) -> None:
    """Create the tables, in the transaction under way."""
    _execute_all(db, (*_TABLES, *_SINCE_3, *_SINCE_4))


def migrate(db: sqlite3.Connection, version: int, seal: Seal) -> None:
    """Convert the tables of an older version, in the transaction under way.

    Raises ``cryptography.exceptions.InvalidTag``: a key is damaged.
    """
    if version < 2:
        _from_1(db, seal)
    elif version < 3:
        db.execute("DROP INDEX IF EXISTS grants_age")
        db.execute("ALTER TABLE grants ADD COLUMN blocks INTEGER NOT NULL DEFAULT 1")
        # Blocks of 256 bits; a sealed key is 28 bytes longer than the key.
        db.execute("UPDATE grants SET blocks = (length(sealed) + 3) / 32 WHERE ended IS NULL")
    if version < 3:
        _execute_all(db, _SINCE_3)
    _execute_all(db, _SINCE_4)


def _from_1(db: sqlite3.Connection, seal: Seal) -> None:
    """Version 1 had no link in its primary keys, and stored key IDs as the 16 bytes of a UUID."""
    for table in ("meta", "material", "grants", "spent"):
        db.execute(f"ALTER TABLE {table} RENAME TO old_{table}")
    for index in ("material_order", "grants_age"):
        db.execute(f"DROP INDEX IF EXISTS {index}")
    _execute_all(db, _TABLES)
    db.execute("INSERT INTO meta SELECT * FROM old_meta")
    rows = db.execute("SELECT key_id, link, shared, created, sealed FROM old_material")
    for old_id, link, shared, created, sealed in rows.fetchall():
        key_id = str(UUID(bytes=old_id))
        key = seal.open(sealed, b"material\0" + old_id + link.encode())
        db.execute(
            "INSERT INTO material (link, key_id, half, shared, created, sealed)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            (link, key_id, half_of(key_id), shared, created,
             seal.seal(key, place_of("material", link, key_id))),
        )  # fmt: skip
    rows = db.execute("SELECT key_id, slave, master, link, created, sealed, ended FROM old_grants")
    for old_id, slave, master, link, created, sealed, ended in rows.fetchall():
        key_id = str(UUID(bytes=old_id))
        if sealed is not None:
            key = seal.open(sealed, b"grant\0" + old_id + slave.encode())
            sealed = seal.seal(key, place_of("grant", link, key_id, master, slave))  # noqa: PLW2901
        db.execute(
            "INSERT INTO grants (link, key_id, slave, master, created, sealed, ended)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
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


def _execute_all(db: sqlite3.Connection, statements: tuple[str, ...]) -> None:
    """``executescript`` would commit the transaction under way."""
    for statement in statements:
        db.execute(statement)
