"""The tunnel with all three legs over two sites of two KME processes each, on PostgreSQL.

Each of the four processes and both databases are killed in turn. No open connection is lost, and
new connections succeed again without intervention.
"""

import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from interop.kme.sites import KMES, Sites
from interop.ports import free_port
from interop.postgres import NoPostgres, own_databases

pytestmark = pytest.mark.slow

PATIENCE = 60.0


@contextmanager
def echo() -> Iterator[int]:
    """A server that says again what it gets; gives its port."""

    def serve(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            while data := connection.recv(1000):
                connection.sendall(data)

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=serve, args=listener.accept()[:1], daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]


def asked(connection: socket.socket, text: bytes) -> bytes:
    connection.sendall(text)
    data = b""
    while len(data) < len(text):
        part = connection.recv(1000)
        assert part, "the connection is lost"
        data += part
    return data


def made(port: int) -> socket.socket:
    """A new connection through the tunnel, which does the job."""
    ends = time.monotonic() + PATIENCE
    while True:
        with suppress(OSError, AssertionError), ExitStack() as stack:
            connection = socket.create_connection(("127.0.0.1", port), timeout=20)
            stack.enter_context(connection)
            assert asked(connection, b"new") == b"new"
            stack.pop_all()
            return connection
        assert time.monotonic() < ends, "no new connection"
        time.sleep(0.2)


def tunnel(sites: Sites, sae: str, kme: str, peer: str, *words: object) -> list[str]:
    files = sites.folder / sae
    return [
        *(sys.executable, "-m", "hybridkex", "tunnel", *map(str, words)),
        *("--ca", f"{files}/ca.pem", "--cert", f"{files}/cert.pem", "--key", f"{files}/key.pem"),
        *("--kme", f"https://127.0.0.1:{sites.sites[kme].port}", "--kme-ca", f"{files}/ca.pem"),
        *("--kme-cert", f"{files}/cert.pem", "--kme-key", f"{files}/key.pem"),
        *("--sae", sae, "--peer-sae", peer, "--qkd", "require", "--log-level", "warning"),
    ]


def test_processes_and_databases_are_killed_in_turn() -> None:
    pytest.importorskip("psycopg")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hybridkex-")))
        try:
            databases = own_databases(folder, stack)
        except NoPostgres as reason:
            pytest.skip(str(reason))
        saes = {"kme-a": ["alice"], "kme-b": ["bob"]}
        sites = Sites(folder, saes, 2, databases, cables=False)
        stack.callback(sites.close)
        sites.start()
        far, near, target = free_port(), free_port(), stack.enter_context(echo())
        listen = ("listen", "--local", f"127.0.0.1:{far}", "--target", f"127.0.0.1:{target}")
        connect = ("connect", "--local", f"127.0.0.1:{near}", "--remote", f"127.0.0.1:{far}")
        for words in (
            tunnel(sites, "bob", "kme-b", "alice", *listen, "--require-client-cert"),
            tunnel(sites, "alice", "kme-a", "bob", *connect),
        ):
            with (folder / "tunnel.log").open("ab") as log:
                process = subprocess.Popen(words, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.kill)
        lasting = stack.enter_context(made(near))
        victims: list[tuple[Callable[[], object], Callable[[], object]]] = []
        for kme in KMES:
            site = sites.sites[kme]
            for index in range(2):
                victims.append((partial(site.kill, index), partial(site.start, index)))
        victims += [(database.stop, database.start) for database in databases]
        assert len(victims) == 6
        for kill, start in victims:
            kill()
            assert asked(lasting, b"still here") == b"still here"
            start()
            stack.enter_context(made(near))
            assert asked(lasting, b"and now") == b"and now"
