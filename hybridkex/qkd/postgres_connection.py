"""psycopg, and connections to PostgreSQL whose waits end.

Importing this raises ``ConfigError`` where psycopg is not installed.
"""

import os
import time
from contextlib import suppress
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Final, TypeVar

from hybridkex.errors import ConfigError
from hybridkex.files import read_file

try:
    import psycopg
    from psycopg import errors
    from psycopg.conninfo import conninfo_to_dict, make_conninfo
    from psycopg_pool import ConnectionPool, PoolTimeout
except ImportError as error:
    raise ConfigError(
        "a store in PostgreSQL needs psycopg: pip install 'hybridkex[postgres]'"
    ) from error

if TYPE_CHECKING:
    from psycopg.abc import PQGen

__all__ = [
    "WAIT_SECONDS",
    "BoundedConnection",
    "ConnectionPool",
    "PoolTimeout",
    "configure",
    "errors",
    "prepared",
    "psycopg",
    "reason",
]

T = TypeVar("T")

OLDEST: Final = 13
"""The oldest version of PostgreSQL that has what a store needs."""
WAIT_SECONDS: Final = 3.0
"""Time limit for getting a connection of the pool, and for a new connection."""
STATEMENT_SECONDS: Final = 5.0
"""Time limit of one statement, waiting for locks included."""
SILENT_SECONDS: Final = STATEMENT_SECONDS + 1
"""Time limit for the answer to a statement, for a server that does not notice its own limit."""
CANCEL_SECONDS: Final = 1.0
"""Time limit for telling such a server that we no longer wait."""


_NO_POOLER: Final = (
    "connect to PostgreSQL itself, not through a pooler such as PgBouncer; each process has a pool "
    "of its own"
)

_OWNER: Final = "make the role the owner of the database, or of a schema in its search_path"

_NO_PASSWORD: Final = "no password supplied"

_NEXT_STEPS: Final = {
    "unsupported startup parameter": f"; {_NO_POOLER}",
    _NO_PASSWORD: "; store the password in a file (mode 600) with the line "
    "HOST:PORT:DATABASE:USER:PASSWORD, whose first four values are those of the URL of the store, "
    "and add ?passfile=FILE to the URL",
    "password authentication failed": "; compare the password with the role's in the database",
    "in a read-only transaction": "; the URL of the store must name a server that can be written, "
    "not a standby",
    "permission denied for schema": f"; {_OWNER}",
    "no schema has been selected": f"; {_OWNER}",
    "Peer authentication failed": "; run as the system user of that name, or name a host and a "
    "password file in the URL of the store",
}
"""The next step, by the message with which PostgreSQL refuses a connection."""

_SETTINGS: Final = {
    "statement_timeout": str(int(STATEMENT_SECONDS * 1000)),
    # A store shows each transaction its own rows.
    "row_security": "on",
    # psycopg doubles the backslashes of arrays of keys otherwise, and the server does not.
    "standard_conforming_strings": "on",
    # Times are numbers of ten digits and a fraction.
    "extra_float_digits": "1",
    # A session with this setting has all of these: only a KME makes it.
    "hybridkex.ours": "yes",
    # What no statement of a store needs: each has an index for its few rows. The planner would
    # choose these while its statistics are behind, as after a table has grown fast.
    "enable_bitmapscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "enable_seqscan": "off",
    "jit": "off",
}
"""The settings of each session, whatever those of the server, the database and the role are."""


class BoundedConnection(psycopg.Connection[Any]):
    """A connection that does not wait forever for a server that neither answers nor fails."""

    is_patient = False
    """Whether it may wait forever: true while tables are converted."""

    def wait(self, gen: "PQGen[T]", *arguments: Any, **named: Any) -> T:
        if self.is_patient:
            return super().wait(gen, *arguments, **named)
        try:
            return super().wait(_bounded(gen), *arguments, **named)
        except _Silent:
            # A server that waits for its synchronous standby would continue to wait in each session
            # while we open new sessions.
            if psycopg.capabilities.has_cancel_safe():
                with suppress(psycopg.Error):
                    self.cancel_safe(timeout=CANCEL_SECONDS)
            self.pgconn.finish()  # a late answer may arrive at any time
            raise


class _Silent(errors.QueryCanceled):
    """The server gave no answer in time."""


def _bounded(gen: "PQGen[T]") -> "PQGen[T]":
    """Limit the time of psycopg's steps of an exchange with the server, which psycopg resumes at
    least ten times a second.
    """
    deadline = time.monotonic() + SILENT_SECONDS
    try:
        wanted = next(gen)
        while True:
            ready = yield wanted
            if not ready and time.monotonic() > deadline:
                raise _Silent(f"no answer within {SILENT_SECONDS:g} s")
            wanted = gen.send(ready)
    except StopIteration as end:
        result: T = end.value
        return result


def _malformed(options: str = "") -> ConfigError:
    """Without a part of the URL, which may be of a password."""
    known = [one.keyword.decode() for one in psycopg.pq.Conninfo.get_defaults()]
    for option in options.split("&") if options else ():
        if (name := option.partition("=")[0]) not in known:
            meant = get_close_matches(name, known, n=1)
            return ConfigError(
                "an option after the ? in the URL of the store is not one of PostgreSQL"
                + "".join(f"; did you mean {one}?" for one in meant)
            )
    return ConfigError(
        "the URL of the store is not one of PostgreSQL; in a password, write @ as %40, / as %2F, "
        "a blank as %20 and % as %25"
    )


def prepared(url: str) -> tuple[str, str]:
    """The connection string with our settings, and the name of the database for messages.

    Raises:
        ConfigError: the URL is malformed. The error has no part of it, which may be of a password.
    """
    try:
        given = conninfo_to_dict(url)
    except psycopg.Error:
        raise _malformed(url.partition("?")[2]) from None
    host, port, name = (str(given.get(one) or "") for one in ("host", "port", "dbname"))
    # Where a password has an "@" or a "/", its rest is in these. "@name" is an abstract socket.
    if "@" in host[1:] or "@" in name or not set(port) <= set("0123456789,"):
        raise _malformed()
    ours = " ".join(f"-c {name}={value}" for name, value in _SETTINGS.items())
    options = f"{given.get('options') or ''} {ours}".strip()
    settings: dict[str, Any] = {
        "connect_timeout": int(WAIT_SECONDS),
        "tcp_user_timeout": int(STATEMENT_SECONDS * 2000),
        "keepalives_idle": 30,  # detects a lost machine, also while tables are converted
        "application_name": "hybridkex kme",
    }
    conninfo = make_conninfo(**settings | given | {"options": options, "client_encoding": "UTF8"})
    where = f"{given.get('dbname') or 'the database'} at {given.get('host') or 'the local server'}"
    return conninfo, where


def configure(connection: "psycopg.Connection[Any]") -> None:
    """Durable commits also before the first transaction of a call; stronger settings stay."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT set_config('synchronous_commit', 'on', false)"
            " WHERE current_setting('synchronous_commit') IN ('off', 'local')"
        )
        cursor.execute("SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL READ COMMITTED")
    connection.commit()


def check_session(connection: "psycopg.Connection[Any]", where: str) -> None:
    """Check that the server has our settings, and is of a version that has what a store needs.

    Raises:
        ConfigError: it is not, or a pooler in between has dropped them; it would also mix the
            sessions.
    """
    version = connection.info.server_version // 10000
    if version < OLDEST:
        raise ConfigError(
            f"{where} is on PostgreSQL {version}: a key store needs {OLDEST} or later"
        )
    if connection.execute("SELECT current_setting('hybridkex.ours', true)").fetchone() != ("yes",):
        raise ConfigError(f"the settings of a session do not reach {where}: {_NO_POOLER}")


def reason(error: BaseException | None) -> str:
    """Return an error in one line, without the text about the statement that libpq appends."""
    if isinstance(error, PoolTimeout):
        return f"no connection within {WAIT_SECONDS:g} s"
    text = " ".join(str(error).split("\n")[0].split()) or type(error).__name__
    if _NO_PASSWORD in text and (path := _password_file(error)) is not None:
        return f"{text}; {_about_password_file(path)}"
    return text + next((step for refusal, step in _NEXT_STEPS.items() if refusal in text), "")


def _password_file(error: BaseException | None) -> str | None:
    """The password file of a failed connection; ``None`` if there is no file by the default name,
    or if the name may be a part of a password that has a "@"."""
    info = error.pgconn.info if isinstance(error, psycopg.Error) and error.pgconn else ()
    path = next(
        (os.fsdecode(one.val) for one in info if one.keyword == b"passfile" and one.val), ""
    )
    is_default = path == os.path.expanduser("~/.pgpass")
    return None if not path or "@" in path or (is_default and not os.path.exists(path)) else path


def _about_password_file(path: str) -> str:
    """Why libpq found no password in a file."""
    try:
        read_file(path, what="the password file", pipe=False)
    except ConfigError as error:
        return str(error)
    if os.stat(path).st_mode & 0o077:
        return (
            f"the password file {path} can be read by others, so PostgreSQL ignores it; make it "
            f"private: chmod 600 {path}"
        )
    return f"the password file {path} has no line for the host, port, database and user of the URL"
