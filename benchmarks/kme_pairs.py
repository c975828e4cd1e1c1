"""Keys drawn at one KME and looked up at the other: pairs a second, and what they cost.

Both KMEs run in one process, with TLS of the standard library and with SQLite stores that flush
every change. Each client is a thread with a connection to each KME: it draws a key as the master
and looks it up as the slave, again and again.
"""

import json
import os
import re
import shutil
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.processes import COMMAND, cpu
from benchmarks.results import OURS, Curve, Options, Row

__all__ = ["CLIENTS", "Load", "exchange", "pair", "run", "wait_until_idle"]

CLIENTS = 8
THIS = Path(__file__).resolve().parent.parent
OTHER = "the other copy"
WORDS = {
    "rate": f"pairs of {CLIENTS} clients",
    "cpu": "CPU of a pair",
    "median": "a pair, median",
    "p99": "a pair, 99th percentile",
    "start": "start",
}
FILL = """
import os, sys, uuid
from pathlib import Path
import trio
try:
    from hybridkex.qkd.sqlite_store import SqliteKeyStore as Store
except ImportError:
    from hybridkex.qkd.store import KeyStore as Store
from hybridkex.qkd.store import read_key_file
from hybridkex.secret import Secret

async def main(number, *files):
    stores = [
        (Store(Path(store), read_key_file(Path(key))), other)
        for store, key, other in zip(files[::3], files[1::3], files[2::3])
    ]
    while number > 0:
        keys = [(str(uuid.uuid4()), Secret(os.urandom(32))) for _ in range(min(number, 1000))]
        number -= len(keys)
        for store, other in stores:
            await store.add(other, keys)
    for store, _ in stores:
        await store.aclose()

trio.run(main, int(sys.argv[1]), *sys.argv[2:])
"""


@dataclass
class Run:
    """What one run measured."""

    rate: float
    """Pairs a second."""
    cpu: float
    """Milliseconds of processor time of the KMEs for each pair."""
    median: float
    """Milliseconds."""
    p99: float
    start: float
    """Seconds from the start of the process until it listens."""


@dataclass
class Load:
    """The clients and what they saw."""

    folder: Path
    where: dict[str, str]
    seconds: float
    go: threading.Event = field(default_factory=threading.Event)
    times: list[float] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)
    ends: float = 0.0
    query: str = ""
    """Of the draws."""

    def run(self, clients: int) -> float:
        """Returns the time that it took."""
        ready = threading.Barrier(clients + 1)
        threads = [threading.Thread(target=self.client, args=(ready,)) for _ in range(clients)]
        for thread in threads:
            thread.start()
        ready.wait()
        began = time.perf_counter()
        self.ends = began + self.seconds
        self.go.set()
        for thread in threads:
            thread.join()
        if self.errors:
            raise self.errors[0]
        return time.perf_counter() - began

    def client(self, ready: threading.Barrier) -> None:
        try:
            with self.connect("alice", "kme-a") as a, self.connect("bob", "kme-b") as b:
                ready.wait()
                self.go.wait()
                while time.perf_counter() < self.ends:
                    self.times.append(pair(a, b, self.query))
        except BaseException as error:
            self.errors.append(error)
            ready.abort()

    def connect(self, sae: str, kme: str) -> ssl.SSLSocket:
        files = self.folder / sae
        context = ssl.create_default_context(cafile=files / "ca.pem")
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        context.load_cert_chain(files / "cert.pem", files / "key.pem")
        host, port = self.where[kme].removeprefix("https://").rsplit(":", 1)
        raw = socket.create_connection((host, int(port)))
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return context.wrap_socket(raw, server_hostname=host)


def pair(a: ssl.SSLSocket, b: ssl.SSLSocket, query: str = "") -> float:
    """Draw a key and look it up; the seconds that it took."""
    began = time.perf_counter()
    while (drawn := exchange(a, f"/api/v1/keys/bob/enc_keys{query}")) is None:
        time.sleep(0.005)  # the stock is used up for a moment
        began = time.perf_counter()
    found = exchange(b, f"/api/v1/keys/alice/dec_keys?key_ID={drawn['key_ID']}")
    if found != drawn:
        raise ValueError("the two sides of a key differ")
    return time.perf_counter() - began


def exchange(connection: ssl.SSLSocket, path: str) -> dict[str, str] | None:
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: kme\r\n\r\n".encode())
    data = b""
    while b"\r\n\r\n" not in data:
        data += _received(connection)
    head, _, body = data.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
    assert length is not None
    while len(body) < int(length[1]):
        body += _received(connection)
    if head.split()[1] == b"503":
        return None
    key: dict[str, str] = json.loads(body)["keys"][0]
    return key


def _received(connection: ssl.SSLSocket) -> bytes:
    data = connection.recv(1 << 16)
    if not data:
        raise EOFError("a KME closed the connection")
    return data


def prepare(code: Path, folder: Path, stock: int) -> None:
    """Two KMEs of a copy of the project, with a stock."""
    command = [*COMMAND, "kme", "dev-up", str(folder)]
    subprocess.run(
        [*command, "--ports", "0,0", "--no-serve"],
        check=True, stdout=subprocess.DEVNULL, cwd=code,
    )  # fmt: skip
    config = folder / "kme.toml"
    limits = f"limits = {{ rate = 1e9, burst = 1000000000, max_key_count = {max(stock, 1000)} }}\n"
    config.write_text(config.read_text().replace("tls =", limits + "tls ="))
    files = []
    for kme in tomllib.loads(config.read_text())["kme"]:
        files += [folder / kme["store"], folder / kme["key_file"], kme["peer"][0]["id"]]
    subprocess.run([sys.executable, "-c", FILL, str(stock), *map(str, files)], check=True, cwd=code)


def measure(code: Path, prepared: Path, clients: int, seconds: float) -> Run:
    """One run on a copy of prepared stores."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "site"
        shutil.copytree(prepared, folder)
        os.sync()
        serve = [*COMMAND, "kme", "serve", str(folder / "kme.toml")]
        began = time.perf_counter()
        with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True, cwd=code) as server:
            try:
                assert server.stdout is not None
                lines = [server.stdout.readline().split() for _ in range(2)]
                start = time.perf_counter() - began
                wait_until_idle([server.pid], seconds)  # the two ends compare their stocks
                load = Load(folder, {line[0]: line[-1] for line in lines}, seconds)
                before = cpu(server.pid)
                took = load.run(clients)
                used = cpu(server.pid) - before
            finally:
                server.terminate()
    times = sorted(load.times)
    return Run(
        rate=len(times) / took,
        cpu=used / len(times) * 1000,
        median=statistics.median(times) * 1000,
        p99=times[len(times) * 99 // 100] * 1000,
        start=start,
    )


def wait_until_idle(pids: list[int], seconds: float) -> None:
    """Until processes hardly use processor time. ``seconds``: those of a run."""
    pause = min(0.5, seconds / 2)
    used = sum(map(cpu, pids))
    time.sleep(pause)
    while (now := sum(map(cpu, pids))) - used > 0.1 * pause:
        used = now
        time.sleep(pause)


def run(options: Options) -> Iterator[Row | Curve]:
    """Measure."""
    stocks = (100,) if options.quick else (1_000, 10_000, 100_000, 1_000_000)
    seconds = 0.2 if options.quick else 3.0
    copies = {OURS: THIS} | ({OTHER: options.against.resolve()} if options.against else {})
    units = {"rate": "1/s", "cpu": "ms", "median": "ms", "p99": "ms", "start": "s"}
    curves = {
        "rate": Curve("Pairs of keys", "keys in stock", "1/s", {copy: {} for copy in copies}),
        "cpu": Curve("CPU of a pair of keys", "keys in stock", "ms", {copy: {} for copy in copies}),
    }
    for stock in stocks:
        runs: dict[str, list[Run]] = {copy: [] for copy in copies}
        with tempfile.TemporaryDirectory() as name:
            for copy, code in copies.items():
                prepare(code, Path(name) / copy, stock)
            for _ in range(options.few()):
                for copy, code in copies.items():
                    runs[copy].append(measure(code, Path(name) / copy, CLIENTS, seconds))
        for what, unit in units.items():
            figures = {copy: [getattr(run, what) for run in found] for copy, found in runs.items()}
            if what in curves:
                for copy, line in curves[what].lines.items():
                    line[str(stock)] = figures[copy]
            bound = {"rate": 600.0, "start": 3.0}.get(what)
            yield Row(f"{stock:,} keys in stock: {WORDS[what]}", unit, figures, bound=bound)
    yield from curves.values()
