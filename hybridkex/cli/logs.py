"""The library's log when a command runs: to standard error, in the reader's format.

systemd's journal stamps each line with time and program itself and reads a priority from its start
(sd-daemon(3)); a person or a file wants the time in the line.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Final, TextIO

from hybridkex.cli.arguments import option
from hybridkex.text import PRINTABLE, json_line

_PRIORITIES: Final = (
    (logging.CRITICAL, 2),
    (logging.ERROR, 3),
    (logging.WARNING, 4),
    (logging.INFO, 6),
    (logging.DEBUG, 7),
)


def log_level(default: str = "info") -> Any:
    return option(
        f"the least severe messages to log on standard error (default: {default})",
        choices=("debug", "info", "warning", "error"),
        default=default,
    )


def log_format() -> Any:
    return option(
        "text, or one JSON object for each message (default: text)",
        choices=("text", "json"),
        default="text",
    )


def set_up_logging(level: str, form: str = "text") -> None:
    """Send the log of the library to standard error, from this level on, and what other libraries
    warn of in the same form."""
    handler = _StandardError()
    handler.addFilter(PRINTABLE)
    if form == "json":
        handler.setFormatter(_JsonFormatter())
    elif _is_journal():
        handler.setFormatter(_JournalFormatter("%(message)s"))
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger().addHandler(handler)
    logging.getLogger("psycopg").setLevel(logging.CRITICAL)  # the store says what has failed, once
    logger = logging.getLogger("hybridkex")
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    logger.propagate = False


@contextmanager
def silenced(name: str) -> Iterator[None]:
    """Without the log of a library that also raises what it logs."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def warnings_shown(*names: str) -> Iterator[None]:
    """Show the warnings of these loggers on standard error in this context, for a command without a
    log."""
    handler = _StandardError()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("hybridkex: WARNING: %(message)s"))
    loggers = [logging.getLogger(name) for name in names]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def _is_journal() -> bool:
    """Whether standard error is the journal's socket (systemd.exec(5), ``$JOURNAL_STREAM``)."""
    try:
        status = os.fstat(2)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


class _JsonFormatter(logging.Formatter):
    """Writes one JSON object a line; a record's ``fields``, if it has any, are among its
    members."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_text:
            line["traceback"] = record.exc_text
        return json_line(line)


class _JournalFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        priority = next((p for level, p in _PRIORITIES if record.levelno >= level), 7)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines())


class _StandardError(logging.StreamHandler[TextIO]):
    """The current ``sys.stderr``, looked up for each line: progress bars replace it at times."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)
