"""A separate PostgreSQL server, on a free port, in its own folder, without a password."""

import atexit
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from interop.ports import free_port

__all__ = ["NoPostgres", "PostgresServer", "own_databases"]


class NoPostgres(Exception):
    """PostgreSQL is not installed, or cannot be run by this user."""


def _programs() -> tuple[str, str]:
    places = [os.environ["PATH"], *map(str, Path("/usr/lib/postgresql").glob("*/bin"))]
    found = [shutil.which(name, path=os.pathsep.join(places)) for name in ("initdb", "postgres")]
    if found[0] is None or found[1] is None:
        raise NoPostgres("PostgreSQL is not installed")
    return found[0], found[1]


class PostgresServer:
    """A server that can be stopped, killed and started again.

    Args:
        folder: empty.
        like: a server that never ran, whose files are copied: ``initdb`` takes four times as long.
        settings: of the server.

    Raises ``NoPostgres``.
    """

    def __init__(self, folder: Path, like: "PostgresServer | None" = None, **settings: str) -> None:
        initdb, self._program = _programs()
        self.folder = folder
        self._user: dict[str, Any] = {}
        if os.geteuid() == 0:  # which PostgreSQL refuses
            self._user = {"user": "postgres", "group": "postgres"}
            try:
                shutil.chown(folder, **self._user)
            except LookupError:
                raise NoPostgres(
                    "root cannot run PostgreSQL, and there is no user postgres"
                ) from None
        if like is None:
            command = [initdb, "-D", "data", "-A", "trust", "-U", "postgres", "--no-sync"]
            self._run([*command, "--locale=C"])
        else:
            self._run(["cp", "-a", str(like.folder / "data"), "data"])
        self.port: int = free_port()
        self._settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "",
            "fsync": "off",  # the server is killed, not its machine
            **settings,
        }
        self.process: subprocess.Popen[bytes] | None = None

    def _run(self, command: list[str], said: bytes = b"") -> None:
        where = {"cwd": self.folder, **self._user}
        subprocess.run(command, check=True, capture_output=True, input=said, **where)

    def drop_templates(self) -> None:
        """Leave one database, before the server runs: the templates are two thirds of the files,
        and ``CREATE DATABASE`` alone needs them."""
        statements = ["UPDATE pg_database SET datistemplate = false"]
        statements += [f"DROP DATABASE template{number}" for number in (0, 1)]
        command = [self._program, "--single", "-F", "-D", "data", "postgres"]
        self._run(command, said="\n".join(statements).encode())

    def start(self) -> None:
        """Start the server and wait until it takes connections."""
        options = [word for pair in self._settings.items() for word in ("-c", "=".join(pair))]
        with (self.folder / "log").open("ab") as log:
            begin = log.tell()
            self.process = subprocess.Popen(
                [self._program, "-D", "data", *options],
                cwd=self.folder,
                stdout=subprocess.DEVNULL,
                stderr=log,
                **self._user,
            )
        while b"ready to accept connections" not in (said := self._log_since(begin)):
            assert self.process.poll() is None, said.decode()
            time.sleep(0.02)

    def _log_since(self, begin: int) -> bytes:
        with (self.folder / "log").open("rb") as log:
            log.seek(begin)
            return log.read()

    def stop(self) -> None:
        """At once, as a crash of the server: SIGQUIT ends its processes without a checkpoint."""
        if self.process is not None:
            self.signal_all(signal.SIGCONT)
            self.process.send_signal(signal.SIGQUIT)
            self.process.wait(timeout=20)
            self.process = None

    def kill(self) -> None:
        """kill -9 of the server and all of its processes."""
        if self.process is not None:
            self.process.send_signal(signal.SIGSTOP)  # it starts no more processes
            pids = self.pids()
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait(timeout=20)
            self.process = None
            while any(map(_runs, pids)):
                time.sleep(0.01)

    def is_alive(self) -> bool:
        """Whether the server opens sessions, or will by itself; one that has ended is gone.

        Blocks while it recovers or shuts down, when its port takes connections all the same.
        """
        import psycopg  # noqa: PLC0415  # an extra

        assert self.process is not None
        while self.process.poll() is None:
            with suppress(psycopg.OperationalError):
                psycopg.connect(self.url("public", "postgres")).close()
                return True
            time.sleep(0.05)
        self.process = None
        return False

    def signal_all(self, number: int) -> None:
        """Send a signal to the server and to all of its processes: SIGSTOP makes it silent."""
        for one in self.pids():
            with suppress(ProcessLookupError):
                os.kill(one, number)

    def pids(self) -> list[int]:
        """The server and all of its processes."""
        assert self.process is not None
        pid = self.process.pid
        with suppress(FileNotFoundError):
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            return [pid, *map(int, children)]
        return []

    @contextmanager
    def full_disk(self) -> Iterator[None]:
        """No file of the server and its processes can grow (RLIMIT_FSIZE)."""
        try:
            self._limit_files("0")
            yield
        finally:
            self._limit_files("unlimited")

    def _limit_files(self, size: str) -> None:
        pids = [str(pid) for pid in self.pids()]
        # Its own user may, while root needs a capability that it lacks in many containers.
        loop = "size=$1; shift; for pid; do prlimit --fsize=$size:unlimited --pid=$pid; done"
        subprocess.run(
            ["sh", "-c", loop, "sh", size, *pids], check=False, capture_output=True, **self._user
        )

    def column(self, query: str) -> set[str]:
        """The values of one column, as the superuser sees them."""
        import psycopg  # noqa: PLC0415

        with psycopg.connect(self.url("public", "postgres")) as connection:
            return {str(value) for (value,) in connection.execute(query.encode())}

    def make_role(self, role: str = "kme") -> None:
        """Create a role that is not a superuser and may create schemas."""
        import psycopg  # noqa: PLC0415  # an extra

        with psycopg.connect(self.url("public", "postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE ROLE {role} LOGIN")
            connection.execute(f"GRANT CREATE ON DATABASE postgres TO {role}")

    def make_schema(self, schema: str, role: str = "kme") -> str:
        """Create a schema; returns the URL of a store in it."""
        import psycopg  # noqa: PLC0415

        with psycopg.connect(self.url("public", role)) as connection:
            connection.execute(f"CREATE SCHEMA {schema}")
        return self.url(schema, role)

    def url(self, schema: str, user: str = "kme") -> str:
        """The URL of a schema."""
        options = f"options=-csearch_path%3D{schema}"
        return f"postgresql://{user}@127.0.0.1:{self.port}/postgres?{options}"


def _runs(pid: int) -> bool:
    """Whether a process runs, as opposed to one that has ended, whoever its parent is now."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@cache
def _pattern() -> PostgresServer:
    """The server whose files others copy; they are there until this process ends."""
    folder = Path(tempfile.mkdtemp(prefix="hybridkex-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    folder.chmod(0o755)  # for the user postgres
    server = PostgresServer(folder)
    server.drop_templates()
    return server


def own_databases(
    folder: Path, stack: ExitStack, number: int = 2, **settings: str
) -> list[PostgresServer]:
    """Running servers with the role ``kme``, which end with ``stack``. Raises ``NoPostgres``."""
    folder.chmod(0o755)  # for the user postgres
    found = []
    for index in range(number):
        place = folder / f"postgres-{index}"
        place.mkdir()
        server = PostgresServer(place, _pattern(), **settings)
        stack.callback(server.stop)
        server.start()
        server.make_role()
        found.append(server)
    return found
