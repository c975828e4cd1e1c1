"""The audit trail of a KME: which keys it delivered to whom, in tamper-evident files.

Each record is one line of JSON, and has the SHA-256 of the line before it. A process writes files
of its own; the first record of each has the last line's SHA-256 of every other file in the folder,
except those that an earlier file has in its first record and that have not grown since. So a record
that is changed, removed, inserted or moved breaks the chain, and a file that is removed or
truncated is missed by files that were begun later. What no later record covers, the end of the
newest files, can only be checked against a copy of a *head*, the SHA-256 of a last line, that was
kept elsewhere: the log says it from time to time.

A record is on the disk before the key leaves the process. If it cannot be written, the key does not
leave.
"""

import errno
import hashlib
import logging
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Final

from hybridkex.errors import ConfigError, KeySourceUnavailable
from hybridkex.files import check_own, create_file, open_private, open_regular
from hybridkex.json_text import load_json
from hybridkex.net.event_loop import checkpoint, in_thread
from hybridkex.net.log import BoundedLog
from hybridkex.net.threads import NoThread
from hybridkex.qkd.call_queue import Call, CallQueue
from hybridkex.text import get_logger, json_line, said

LOG: Final = get_logger(__name__)

SUFFIX: Final = ".audit"
GROUP: Final = 1024
"""The maximum number of records of one write."""
TAIL_BYTES: Final = 1 << 20
"""More than any record has."""
FILE_BYTES: Final = 1 << 28
"""The size after which another file is begun."""
REPORT_EVERY: Final = 60.0
"""Seconds between two lines of the log with the head."""


def check_folder(folder: Path) -> None:
    """Check that an audit trail can be begun in a folder, without creating anything.

    Raises ``ConfigError``.
    """
    try:
        check_own(folder)
        if folder.is_dir():
            _uncovered(_files([folder]))
        elif os.path.lexists(folder):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        place = folder if folder.is_dir() else folder.parent
        if not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, f"files cannot be created in {place}")
    except OSError as error:
        raise _unusable(folder, error) from error


def _unusable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"cannot write an audit trail into {folder}: {error.strerror}")


class AuditTrail:
    """Writes the records of one process.

    Args:
        folder: for the files of all processes of the KME; created if missing.
        kme: the ID of the KME.

    Raises ``ConfigError`` if a file cannot be written there.
    """

    def __init__(self, folder: Path, kme: str) -> None:
        self._folder = folder
        self._kme = kme
        self._calls = CallQueue(self._carry_out, GROUP)
        self._file: BinaryIO | None = None
        self._failing = False
        self._log = BoundedLog(LOG, rate=1 / 60)
        """On a full disk, short records may find room."""
        self._reported_at = 0.0
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            check_own(folder)
            self._begin()
        except OSError as error:
            raise _unusable(folder, error) from error

    async def check(self) -> None:
        """Raise ``KeySourceUnavailable`` if records cannot be written now."""
        if self._failing:
            await self.note({"event": "resumed"})
        else:
            await checkpoint()

    async def note(self, record: Mapping[str, object]) -> None:
        """Write a record. Raises ``KeySourceUnavailable`` if it may not be on the disk."""
        await self._calls.run(lambda: record, writes=True)

    def close(self) -> None:
        """Close the file, while no record is being written."""
        if self._file is not None:
            self._file.close()
            self._file = None

    async def _carry_out(self, group: list[Call[Any]]) -> None:
        try:
            await in_thread(self._write_group, group)
        except (OSError, NoThread) as error:
            if not self._failing:
                self._log.log(
                    logging.ERROR, "the audit trail in %s failed: %s", self._folder, error
                )
            self._failing = True
            for call in group:
                call.fail(KeySourceUnavailable(f"the audit trail failed: {said(error)}"))
        else:
            if self._failing:
                self._log.log(logging.WARNING, "the audit trail in %s works again", self._folder)
            self._failing = False
            self._tell()

    def _tell(self) -> None:
        if time.monotonic() > self._reported_at + REPORT_EVERY:
            self._reported_at = time.monotonic()
            LOG.info("%s: audit trail %s, record %d: head %s", self._kme, self._name, self._number,
                     self._head)  # fmt: skip

    def _write_group(self, group: list[Call[Any]]) -> None:
        if self._file is not None and not os.fstat(self._file.fileno()).st_nlink:
            LOG.error("the file %s of the audit trail was removed; another is begun", self._name)
            self.close()
        if self._file is None or self._size > FILE_BYTES:
            self.close()
            self._begin()
        self._append([call.operation() for call in group])
        for call in group:
            call.succeed(None)

    def _begin(self) -> None:
        """Begin a file. Raises ``OSError``."""
        others = _uncovered(_files([self._folder]))
        kme = re.sub(r"[^A-Za-z0-9.-]", "_", self._kme)
        now = datetime.now(UTC)
        self._name = f"{kme}-{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}{SUFFIX}"
        begun = {"event": "begun", "kme": self._kme, "others": others}
        first, self._head = _line(begun, 0, "")
        create_file(self._folder / self._name, first)
        self._file = open_private(self._folder / self._name, append=True)
        self._number, self._size = 0, len(first)

    def _append(self, records: Sequence[Mapping[str, object]]) -> None:
        """Write records to the disk. After an error the file is left, and another one is begun.

        Raises ``OSError``.
        """
        assert self._file is not None
        head, data = self._head, b""
        for number, record in enumerate(records, self._number + 1):
            line, head = _line(record, number, head)
            data += line
        try:
            left = memoryview(data)
            while left:
                left = left[self._file.write(left) :]
            os.fdatasync(self._file.fileno())
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._file.fileno(), self._size)
            self.close()
            raise
        self._number, self._head = self._number + len(records), head
        self._size += len(data)


def _line(record: Mapping[str, object], number: int, previous: str) -> tuple[bytes, str]:
    """The line of a record, and its SHA-256."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    line = json_line({"n": number, "time": now, **record, "previous": previous}).encode()
    return line + b"\n", hashlib.sha256(line).hexdigest()


def _files(folders: Iterable[Path]) -> list[Path]:
    return sorted(
        (path for folder in folders for path in folder.glob(f"*{SUFFIX}")),
        key=lambda path: path.name,
    )


def _uncovered(paths: Iterable[Path]) -> dict[str, str]:
    """The heads of the files, by name, less those that one of them has in its first record."""
    heads: dict[str, str] = {}
    covered: set[tuple[str, str]] = set()
    for path in paths:
        others, heads[path.name] = _ends(path)
        covered.update(others.items())
    return {name: head for name, head in heads.items() if (name, head) not in covered}


def _ends(path: Path) -> tuple[dict[str, str], str]:
    """The heads of others that the first record of a file has, and the SHA-256 of its last whole
    line; empty if there is none."""
    with open_regular(path) as file:
        first = file.readline(TAIL_BYTES)
        file.seek(max(file.seek(0, os.SEEK_END) - TAIL_BYTES, 0))
        lines = file.read().split(b"\n")[:-1]
    try:
        others = _others(load_json(first))
    except (ValueError, KeyError, TypeError):  # the verification tells
        others = {}
    return others, hashlib.sha256(lines[-1]).hexdigest() if lines else ""


# -- verification


@dataclass
class Findings:
    records: int = 0
    heads: dict[str, str] = field(default_factory=dict)
    """The head of each file, by its name."""
    problems: list[str] = field(default_factory=list)


def verify(folders: Sequence[Path], heads: Iterable[str] = ()) -> Findings:
    """Verify the files of an audit trail. Blocks.

    Args:
        folders: of the trail; files that were moved to an archive may be in another one.
        heads: values that were kept elsewhere; each of them must be in the trail.

    Raises:
        ConfigError: a file cannot be read, or there is none.
    """
    found = Findings()
    hashes: dict[str, set[str]] = {}
    expected: list[tuple[str, str, str]] = []
    try:
        for path in _files(folders):
            known = hashes.setdefault(path.name, {""})  # of an older copy in an archive, too
            found.heads[path.name] = ""
            for digest, record in _records(path, found):
                known.add(digest)
                found.heads[path.name] = digest
                found.records += 1
                if record.get("event") == "begun":
                    expected += [(path.name, *other) for other in _others(record).items()]
    except OSError as error:
        raise ConfigError(f"cannot read {error.filename}: {error.strerror}") from error
    if not hashes:
        raise ConfigError(f"there is no audit trail in {', '.join(map(str, folders))}")
    for name, other, head in expected:
        if other not in hashes:
            found.problems.append(f"{other} is missing, which {name} names")
        elif head not in hashes[other]:
            found.problems.append(f"{other} lacks a record that it had when {name} was begun")
    for head in heads:
        if not any(head in part for part in hashes.values()):
            found.problems.append(f"there is no record with the SHA-256 {head}")
    return found


def _others(record: Any) -> dict[str, str]:
    """The heads of other files in a record. Raises ``TypeError`` if it is not a record of an audit
    trail."""
    others = record.get("others", {}) if isinstance(record, dict) else None
    if not isinstance(others, dict) or not all(isinstance(head, str) for head in others.values()):
        raise TypeError("not a record of an audit trail")
    return others


def _records(path: Path, found: Findings) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of a file whose chain is whole, with their hashes; the rest is a problem."""
    previous = ""
    with open_regular(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(TAIL_BYTES), b"")):
            try:
                record = load_json(line)
                whole = line.endswith(b"\n")
                right = (record["n"], record["previous"]) == (number, previous)
                _others(record)
            except (ValueError, KeyError, TypeError):
                whole, right = line.endswith(b"\n"), False
            if not whole and not right:
                # A crash leaves such a line; the hash of a line that existed before is missed.
                return
            if not right:
                found.problems.append(
                    f"{path.name}: record {number} does not follow the one before"
                )
                return
            previous = hashlib.sha256(line.rstrip(b"\n")).hexdigest()
            yield previous, record
