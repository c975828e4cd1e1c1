"""Programs that a benchmark starts: our command, servers of peers, and their processor time."""

import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

__all__ = [
    "COMMAND",
    "ENVIRONMENT",
    "PEERS",
    "Server",
    "certificates",
    "cpu",
    "cpu_of_children",
    "has",
    "program",
    "running",
    "until",
    "wait_for",
]

COMMAND = [sys.executable, "-m", "hybridkex"]
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
"""Compiled modules are kept, as in an installed package."""
PEERS = {
    "rsync": "apt install rsync",
    "scp": "apt install openssh-client openssh-server",
    "sshd": "apt install openssh-client openssh-server",
    "stunnel4": "apt install stunnel4",
    "haproxy": "apt install haproxy",
    "openssl": "apt install openssl",
    "perf": "apt install linux-perf",
    **dict.fromkeys(("pgbench", "initdb", "postgres"), "apt install postgresql"),
    "OpenSSL": "pip install pyOpenSSL",
    "uvloop": "pip install uvloop",
    "oqs": "pip install 'hybridkex[oqs]', and liboqs as a shared library",
}
"""How to get a peer, by program or module."""
PLACES = os.pathsep.join(
    (
        os.environ.get("PATH", os.defpath),
        "/usr/sbin",
        *map(str, Path("/usr/lib/postgresql").glob("*/bin")),
    )
)
_told: set[str] = set()


def program(name: str) -> str | None:
    """Where a peer's program is; if it is missing, say once how to get it."""
    path = shutil.which(name, path=PLACES)
    if path is None:
        _tell_missing(name)
    return path


def has(module: str) -> bool:
    """Whether a peer's module is installed; if it is missing, say once how to get it."""
    found = find_spec(module) is not None
    if not found:
        _tell_missing(module)
    return found


def _tell_missing(name: str) -> None:
    if name not in _told:
        _told.add(name)
        print(f"{name} is missing, and its rows are left out: {PEERS[name]}", file=sys.stderr)


class Server(subprocess.Popen[bytes]):
    """A program that serves."""

    complaints: IO[bytes]
    """What it has written to stderr."""

    def check(self) -> None:
        """Raise ``RuntimeError`` if it has ended."""
        if self.poll() is not None:
            self.complaints.seek(0)
            said = self.complaints.read().decode(errors="replace").strip()
            raise RuntimeError(f"{self.args!r} ended with status {self.returncode}: {said}")


@contextmanager
def running(*words: object, **options: Any) -> Iterator[Server]:
    """A server, until the block ends."""
    settings: dict[str, Any] = {"stdout": subprocess.DEVNULL, "env": ENVIRONMENT}
    with tempfile.TemporaryFile() as complaints:
        process = Server(list(map(str, words)), **(settings | {"stderr": complaints} | options))
        process.complaints = complaints
        try:
            yield process
        finally:
            process.terminate()
            process.wait(30)


def cpu(pid: int, *, children: bool = False) -> float:
    """Seconds of processor time of a process, with those of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11 : 15 if children else 13])) / os.sysconf("SC_CLK_TCK")


def cpu_of_children() -> float:
    """Seconds of processor time of all our children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def until(ready: Callable[[], bool], server: Server | None = None, *, seconds: float = 30) -> None:
    """Wait.

    Raises:
        RuntimeError: the server has ended.
        TimeoutError: it takes longer.
    """
    deadline = time.monotonic() + seconds
    while not ready():
        if server is not None:
            server.check()
        if time.monotonic() > deadline:
            raise TimeoutError("a program of the benchmark does not get ready")
        time.sleep(0.02)


def wait_for(port: int, server: Server) -> None:
    """Wait until a server listens on a port of the loopback."""

    def listens() -> bool:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            return False
        return True

    until(listens, server)


def certificates(folder: Path) -> list[str]:
    """Make certificates for localhost, and return the options of our commands that name them."""
    subprocess.run([*COMMAND, "dev-ca", str(folder)], check=True, capture_output=True)
    return [f"--{name}={folder / name}.pem" for name in ("ca", "cert", "key")]
