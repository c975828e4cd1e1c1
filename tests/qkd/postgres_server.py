"""A PostgreSQL server of its own for tests."""

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def _programs() -> tuple[str, str]:
    places = [os.environ["PATH"], *map(str, Path("/usr/lib/postgresql").glob("*/bin"))]
    found = [shutil.which(name, path=os.pathsep.join(places)) for name in ("initdb", "postgres")]
    if found[0] is None or found[1] is None:
        pytest.skip("PostgreSQL is not installed")
    return found[0], found[1]


class PostgresServer:
    """A server that can be stopped, killed and started again."""

    def __init__(self, folder: Path) -> None:
        initdb, self._program = _programs()
        self.folder = folder
        self._user: dict[str, Any] = {}
        if os.geteuid() == 0:  # which PostgreSQL refuses
            self._user = {"user": "postgres", "group": "postgres"}
            try:
                shutil.chown(folder, **self._user)
            except LookupError:
                pytest.skip("root cannot run PostgreSQL, and there is no user postgres")
        command = [initdb, "-D", "data", "-A", "trust", "-U", "postgres", "--no-sync"]
        self._run([*command, "--locale=C"])
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self.process: subprocess.Popen[str] | None = None

    def _run(self, command: list[str]) -> None:
        subprocess.run(command, check=True, capture_output=True, cwd=self.folder, **self._user)

    def start(self) -> None:
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": "",
            "fsync": "off",  # the server is killed, not its machine
        }
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        self.process = subprocess.Popen(
            [self._program, "-D", "data", *options],
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            **self._user,
        )
        assert self.process.stderr is not None
        assert any("ready to accept connections" in line for line in self.process.stderr)

    def stop(self) -> None:
        """At once, as a crash of the server: SIGQUIT ends its processes without a checkpoint."""
        if self.process is not None:
            self.process.send_signal(3)
            self.process.communicate(timeout=20)
            self.process = None

    def signal_all(self, number: int) -> None:
        """Send a signal to the server and to all of its processes: SIGSTOP makes it silent."""
        assert self.process is not None
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for one in (pid, *map(int, children)):
            os.kill(one, number)

    def url(self, schema: str, user: str = "kme") -> str:
        options = f"options=-csearch_path%3D{schema}"
        return f"postgresql://{user}@127.0.0.1:{self.port}/postgres?{options}"


def postgres_server() -> Iterator[PostgresServer]:
    """A running server with the role ``kme``, which is no superuser."""
    psycopg = pytest.importorskip("psycopg")
    with tempfile.TemporaryDirectory(prefix="hybridkex-") as name:
        server = PostgresServer(Path(name))
        server.start()
        try:
            with psycopg.connect(server.url("public", "postgres"), autocommit=True) as connection:
                connection.execute("CREATE ROLE kme LOGIN")
                connection.execute("GRANT CREATE ON DATABASE postgres TO kme")
            yield server
        finally:
            server.stop()
