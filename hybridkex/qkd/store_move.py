"""Moves the keys of a store in SQLite into a new one in PostgreSQL.

Because of the order of the steps, no key is delivered by both stores or by none, wherever the move
is interrupted:

1. the database gets its tables and records whose keys it will have: it takes no others, and cannot
   be put into service yet;
2. the file records the database: its keys go to no other, and it cannot be put into service;
3. the rows are copied; a row that is there is left alone, so the step can be repeated;
4. the database records that the move is complete, and may be put into service;
5. in one transaction, the keys in the file are erased and the file records where they went.

The rows are copied as they are, encrypted: both stores use the same associated data for a row.
"""

import uuid
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridkex.errors import ConfigError
from hybridkex.qkd.postgres_store import MOVED, PostgresKeyStore
from hybridkex.qkd.sqlite_schema import ANY_LINK
from hybridkex.qkd.sqlite_store import SqliteKeyStore, readable
from hybridkex.secret import Secret


@dataclass(frozen=True, kw_only=True)
class Moved:
    """The rows that this call of :func:`move` copied; those of an earlier call count again."""

    where: str
    """The database, as messages name it."""
    rows: dict[str, int]
    """For each table, the number of rows of the file; none if only step 5 was left."""


def move(
    path: Path,
    url: Secret,
    seal_key: Secret,
    *,
    read_keys: Sequence[Secret] = (),
    owner: str,
    links: Iterable[str],
) -> Moved | None:
    """Move all keys of a file, or continue a move that was interrupted. Blocks.

    Args:
        path: the file, which no KME may have open.
        url: the database: a new one, or the one to which an earlier call began to move the keys.
        seal_key: of the key file, the same for both.
        read_keys: of earlier key files; a file that still needs one is refused.
        owner: the ID of the KME.
        links: all links of the KME.

    Returns:
        What was moved; ``None`` if an earlier call had completed the move.

    Raises:
        ConfigError: one of the stores cannot be used for it; the message says why.
        KeySourceUnavailable: the database failed. The move can be continued.
    """
    if not path.exists():
        raise ConfigError(f"there is no key store {path}")
    source = SqliteKeyStore(path, seal_key, read_keys=read_keys, moving=True)
    with closing(source), readable(f"cannot move the keys of {path}"):
        if source.meta("moved"):
            return None
        if source.is_renewing():
            raise ConfigError(
                f"keys in {path} are still encrypted under an earlier key file: serve it until the "
                "log says that read_key_files can be removed, and move it then"
            )
        name = source.meta("id") or str(uuid.uuid4())
        source.set_meta({"id": name})
        target = PostgresKeyStore(url, seal_key, owner=owner, connections=1, source=name)
        with closing(target):
            return _move(path, source, target, sorted(links))


def _move(path: Path, source: SqliteKeyStore, target: PostgresKeyStore, links: list[str]) -> Moved:
    if (begun := source.meta("moving")) not in (None, target.id):
        raise ConfigError(
            f"the keys of {path} are being moved into another database than {target.where}: "
            f"continue with that one (its hybridkex_meta.id is {begun})"
        )
    source.set_meta({"moving": target.id})
    rows = dict.fromkeys(MOVED, 0)
    if not target.moved:
        for table, columns in MOVED.items():
            for page in source.rows(table, columns):
                target.add_rows(table, _converted(table, page, links))
                rows[table] += len(page)
        target.end_move()
    source.end_move(target.where)
    return Moved(where=target.where, rows=rows)


def _converted(table: str, page: list[tuple[Any, ...]], links: list[str]) -> list[tuple[Any, ...]]:
    """Rows of SQLite as rows of PostgreSQL."""
    match table:
        case "material":
            return [
                (link, key_id, half, bool(shared), created, sealed)
                for link, key_id, half, shared, created, sealed in page
            ]
        case "spent":  # an ID that is spent on every link becomes one row for each
            return [
                (one, *rest)
                for link, *rest in page
                for one in (links if link == ANY_LINK else [link])
            ]
        case _:
            return page
