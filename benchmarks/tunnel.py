"""Measures the cost of a tunnel: ``python benchmarks/tunnel.py [--json] [--seconds S]``.

The same work directly, through ``hybridkex tunnel`` and, where Debian's package is installed,
through ``stunnel4``; both tunnels have two processes and certificates on both sides. The rounds
take turns, so that other load affects all of them alike; the medians are printed, with their ratios
to the direct connection.

- bulk: one connection through a socket that is read as fast as it can be, MB/s.
- connections: connect, send and receive one byte, close; per second, one after the other.
- pgbench: transactions per second of 8 clients (``-S`` reads, and the TPC-B-like default), with
  PostgreSQL's files in memory, where ``postgresql`` is installed.

stunnel's handshake has the groups that its OpenSSL offers: not the hybrid one, below OpenSSL 3.5.
"""

import argparse
import json
import os
import pwd
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, "-m", "hybridkex"]
CHUNK = 1 << 18
ROUNDS = 5


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def wait_for(port: int) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return


@contextmanager
def running(*words: object, **options: Any) -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen(
        list(map(str, words)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


# -- the ways


@contextmanager
def through_hybridkex(target: int, keys: Path) -> Iterator[int]:
    middle, outer = free_port(), free_port()
    trust = [f"--{name}={keys / name}.pem" for name in ("ca", "cert", "key")]
    quiet = ["--log-level=warning", "--max-connections=1000", "--grace=0"]
    listen = ["--local", f"127.0.0.1:{middle}", "--target", f"127.0.0.1:{target}"]
    connect = ["--local", f"127.0.0.1:{outer}", "--remote", f"localhost:{middle}"]
    with (
        running(*COMMAND, "tunnel", "listen", *listen, "--require-client-cert", *trust, *quiet),
        running(*COMMAND, "tunnel", "connect", *connect, *trust, *quiet),
    ):
        wait_for(middle)
        wait_for(outer)
        yield outer


@contextmanager
def through_stunnel(target: int, keys: Path, folder: Path) -> Iterator[int]:
    program = shutil.which("stunnel4")
    assert program is not None
    middle, outer = free_port(), free_port()
    common = (
        f"foreground = yes\npid =\nsyslog = no\ndebug = 3\nsslVersion = TLSv1.3\n"
        f"cert = {keys}/cert.pem\nkey = {keys}/key.pem\nCAfile = {keys}/ca.pem\n"
    )
    (folder / "server.conf").write_text(
        f"{common}verifyChain = yes\n[in]\naccept = 127.0.0.1:{middle}\n"
        f"connect = 127.0.0.1:{target}\n"
    )
    (folder / "client.conf").write_text(
        f"{common}verifyChain = yes\ncheckHost = localhost\n[out]\nclient = yes\n"
        f"accept = 127.0.0.1:{outer}\nconnect = 127.0.0.1:{middle}\nsessionResume = no\n"
    )
    with (
        running(program, folder / "server.conf"),
        running(program, folder / "client.conf"),
    ):
        wait_for(middle)
        wait_for(outer)
        yield outer


# -- the work


class Sink:
    """Reads and counts bytes; answers the first byte of a connection."""

    def __init__(self) -> None:
        self._server = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port: int = self._server.getsockname()[1]
        self.read = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            connection, _ = self._server.accept()
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        buffer = bytearray(CHUNK)
        with connection:
            try:
                number = connection.recv_into(buffer)
                if number:
                    connection.sendall(b"x")
                while number:
                    self.read += number
                    number = connection.recv_into(buffer)
            except OSError:
                return


def bulk(sink: Sink, port: int, seconds: float) -> float:
    data = os.urandom(CHUNK)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"x")
        connection.recv(1)
        before, began = sink.read, time.perf_counter()
        while time.perf_counter() - began < seconds:
            connection.sendall(data)
        # Bytes that the far end has read, not those in buffers on the way.
        return (sink.read - before) / (time.perf_counter() - began) / 1e6


def connections(port: int, seconds: float) -> float:
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"x")
            assert connection.recv(1) == b"x"
        done += 1
    return done / (time.perf_counter() - began)


@contextmanager
def postgres(folder: str) -> Iterator[tuple[int, str]]:
    places = os.pathsep.join(map(str, Path("/usr/lib/postgresql").glob("*/bin")))
    initdb, server, pgbench = (
        shutil.which(name, path=places) for name in ("initdb", "postgres", "pgbench")
    )
    assert initdb is not None
    assert server is not None
    assert pgbench is not None
    as_somebody: list[str] = []
    if os.geteuid() == 0:  # which PostgreSQL refuses to be
        nobody = pwd.getpwnam("nobody")
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        ids = [f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups"]
        as_somebody = ["setpriv", *ids]
    make = [initdb, "-D", f"{folder}/data", "-U", "tester", "-A", "trust", "--no-sync"]
    subprocess.run([*as_somebody, *make], check=True, capture_output=True)
    port = free_port()
    serve = [server, "-D", f"{folder}/data", "-k", folder, "-p", str(port), "-F"]
    with running(*as_somebody, *serve, "-c", "listen_addresses=127.0.0.1"):
        wait_for(port)
        reach = ["-h", "127.0.0.1", "-p", str(port), "-U", "tester"]
        deadline = time.monotonic() + 30
        while subprocess.run(
            [pgbench, *reach, "-i", "-q", "-s", "5", "postgres"], check=False, capture_output=True
        ).returncode:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield port, pgbench


def pgbench_tps(program: str, port: int, seconds: float, *more: str) -> float:
    done = subprocess.run(
        [
            *(program, "-h", "127.0.0.1", "-p", str(port), "-U", "tester", "-n", "-c", "8"),
            *("-j", "1", "-T", str(max(1, round(seconds))), *more, "postgres"),
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("tps"))
    return float(line.split()[2])


def rounds(work: Callable[[int], float], ways: dict[str, int]) -> dict[str, float]:
    """Run the rounds in turns; returns the medians."""
    found: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(ROUNDS):
        for way, port in ways.items():
            found[way].append(work(port))
    return {way: statistics.median(values) for way, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="What a tunnel costs.")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each round")
    args = parser.parse_args()
    results: dict[str, dict[str, float]] = {}
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        keys = Path(folder) / "keys"
        subprocess.run([*COMMAND, "dev-ca", keys], check=True, capture_output=True)

        def all_ways(target: int) -> dict[str, int]:
            found = {"direct": target}
            found["hybridkex"] = stack.enter_context(through_hybridkex(target, keys))
            if shutil.which("stunnel4"):
                place = Path(tempfile.mkdtemp(dir=folder))
                found["stunnel4"] = stack.enter_context(through_stunnel(target, keys, place))
            return found

        sink = Sink()
        ways = all_ways(sink.port)
        results["bulk, MB/s"] = rounds(lambda port: bulk(sink, port, args.seconds), ways)
        results["connections/s"] = rounds(lambda port: connections(port, args.seconds), ways)
        if any(Path("/usr/lib/postgresql").glob("*/bin/pgbench")):
            place = stack.enter_context(
                tempfile.TemporaryDirectory(dir="/dev/shm", ignore_cleanup_errors=True)
            )
            port, program = stack.enter_context(postgres(place))
            ways = all_ways(port)
            for name, more in (("pgbench -S, tps", ["-S"]), ("pgbench, tps", [])):
                results[name] = rounds(
                    lambda port, more=more: pgbench_tps(program, port, args.seconds, *more), ways
                )
    if args.json:
        print(json.dumps(results))
        return
    if not shutil.which("stunnel4"):
        print("stunnel4 is not installed: apt-get install stunnel4")
    for what, found in results.items():
        print(what)
        for way, value in found.items():
            print(f"  {way:<10} {value:>10,.0f}   {value / found['direct']:.3f} of direct")


if __name__ == "__main__":
    main()
