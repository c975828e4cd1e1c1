"""Measures the cost of a tunnel: ``python benchmarks/tunnel.py [--json] [--seconds S] [NAME ...]``.

The same work directly, through ``hybridkex tunnel`` and, where Debian's package is installed,
through ``stunnel4``; both tunnels have two processes and certificates on both sides, and ours is
measured once more with two workers at each end. The rounds take turns, so that other load affects
all of them alike; the medians are printed, with their ratios to the direct connection.

- bulk: one connection through a socket that is read as fast as it can be, MB/s.
- connections: connect, send and receive one byte, close; per second, one after the other.
- round-trips: 100 bytes to an echo server and back, with 1, 8 and 64 clients at a time, per second,
  and the processor time of both processes of a tunnel for one round trip, which other load on the
  machine hardly changes.
- beside-bulk: the same with one client while another connection carries bulk data: the median and
  the 99th percentile of the time of a round trip, ms.
- pgbench: transactions per second of 8 clients (``-S`` reads, and the TPC-B-like default), with
  PostgreSQL's files in memory, where ``postgresql`` is installed.

stunnel's handshake has the groups that its OpenSSL offers: not the hybrid one, below OpenSSL 3.5.
"""

import argparse
import json
import os
import pwd
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from select import EPOLLIN, epoll
from typing import Any

COMMAND = [sys.executable, "-m", "hybridkex"]
CHUNK = 1 << 18
ROUNDS = 5
MESSAGE = 100
WORK = ("bulk", "connections", "round-trips", "beside-bulk", "pgbench")
TICKS = os.sysconf("SC_CLK_TCK")


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


class Way:
    """How programs reach the target: a port, and the processes between."""

    def __init__(self, port: int, *between: "subprocess.Popen[bytes]") -> None:
        self.port = port
        self._between = between

    def processor_time(self) -> float:
        """Seconds that the processes between, and their workers, have used."""
        ticks = 0
        for process in self._between:
            for pid in (process.pid, *children(process.pid)):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])
        return ticks / TICKS


def children(pid: int) -> list[int]:
    found: list[int] = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):  # it has ended
            found += map(int, (thread / "children").read_text().split())
    return found


@contextmanager
def through_hybridkex(
    target: int, keys: Path, *more: str, checkout: Path | None = None
) -> Iterator[Way]:
    middle, outer = free_port(), free_port()
    trust = [f"--{name}={keys / name}.pem" for name in ("ca", "cert", "key")]
    quiet = ["--log-level=warning", "--max-connections=1000", "--grace=0", *more]
    listen = ["--local", f"127.0.0.1:{middle}", "--target", f"127.0.0.1:{target}"]
    connect = ["--local", f"127.0.0.1:{outer}", "--remote", f"localhost:{middle}"]
    with (
        running(
            *(*COMMAND, "tunnel", "listen", *listen, "--require-client-cert", *trust, *quiet),
            cwd=checkout,
        ) as server,
        running(*COMMAND, "tunnel", "connect", *connect, *trust, *quiet, cwd=checkout) as client,
    ):
        wait_for(middle)
        wait_for(outer)
        yield Way(outer, server, client)


@contextmanager
def through_stunnel(target: int, keys: Path, folder: Path) -> Iterator[Way]:
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
        running(program, folder / "server.conf") as server,
        running(program, folder / "client.conf") as client,
    ):
        wait_for(middle)
        wait_for(outer)
        yield Way(outer, server, client)


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


def echo_server(listening: socket.socket) -> None:
    """Send back what comes, on any number of connections; a process of its own reads and drops what
    comes on one that begins with the byte x."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    poll, open_ones = epoll(), {}
    poll.register(listening, EPOLLIN)
    while True:
        for descriptor, _ in poll.poll():
            if descriptor == listening.fileno():
                connection, _ = listening.accept()
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                open_ones[connection.fileno()] = connection
                poll.register(connection, EPOLLIN)
                continue
            data = b""
            with suppress(OSError):
                data = open_ones[descriptor].recv(CHUNK)
                open_ones[descriptor].sendall(data)
            if data == b"x" and not os.fork():
                drop(open_ones[descriptor])
            if data in (b"", b"x"):
                poll.unregister(descriptor)
                open_ones.pop(descriptor).close()


def drop(connection: socket.socket) -> None:
    buffer = bytearray(CHUNK)
    with suppress(OSError):
        while connection.recv_into(buffer):
            pass
    os._exit(0)


@contextmanager
def echoing() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listening:
        process = get_context("fork").Process(target=echo_server, args=(listening,), daemon=True)
        process.start()
        try:
            yield listening.getsockname()[1]
        finally:
            process.kill()
            process.join()


def exchange(port: int, clients: int, seconds: float) -> list[float]:
    """The times of round trips, by clients that each wait for their answer."""
    message = os.urandom(MESSAGE)
    with ExitStack() as stack:
        poll = stack.enter_context(epoll())
        sent: dict[int, tuple[socket.socket, float]] = {}
        for _ in range(clients):
            one = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            one.sendall(message)  # the tunnel's handshake is not counted
            assert one.recv(MESSAGE, socket.MSG_WAITALL) == message
            poll.register(one, EPOLLIN)
            sent[one.fileno()] = one, 0.0
        times: list[float] = []
        until = time.perf_counter() + seconds
        for descriptor, (one, _) in sent.items():
            one.sendall(message)
            sent[descriptor] = one, time.perf_counter()
        while (now := time.perf_counter()) < until:
            for descriptor, _ in poll.poll():
                one, began = sent[descriptor]
                assert one.recv(MESSAGE, socket.MSG_WAITALL) == message
                now = time.perf_counter()
                times.append(now - began)
                sent[descriptor] = one, now
                one.sendall(message)
        return times


def flood(port: int) -> None:
    data = os.urandom(CHUNK)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"x")
        connection.recv(1)
        while True:
            connection.sendall(data)


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


def pgbench(
    name: str, program: str, way: Way, *, seconds: float, more: list[str]
) -> dict[str, float]:
    done = subprocess.run(
        [
            *(program, "-h", "127.0.0.1", "-p", str(way.port), "-U", "tester", "-n", "-c", "8"),
            *("-j", "1", "-T", str(max(1, round(seconds))), *more, "postgres"),
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("tps"))
    return {name: float(line.split()[2])}


def rounds(
    work: Callable[[Way], dict[str, float]], ways: dict[str, Way]
) -> dict[str, dict[str, float]]:
    """Run the rounds in turns; returns the medians, by figure and way."""
    found: dict[str, dict[str, list[float]]] = {}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            for what, value in work(way).items():
                found.setdefault(what, {}).setdefault(name, []).append(value)
    return {
        what: {name: statistics.median(values) for name, values in by_way.items()}
        for what, by_way in found.items()
    }


def round_trips(way: Way, seconds: float) -> dict[str, float]:
    found = {}
    for clients in (1, 8, 64):
        before = way.processor_time()
        number = len(exchange(way.port, clients, seconds))
        found[f"round trips/s, {clients} at a time"] = number / seconds
        found[f"  processor time, us, {clients} at a time"] = (
            (way.processor_time() - before) / number * 1e6
        )
    return found


def beside_bulk(way: Way, seconds: float) -> dict[str, float]:
    other = get_context("fork").Process(target=flood, args=(way.port,), daemon=True)
    other.start()
    try:
        time.sleep(0.2)
        times = sorted(exchange(way.port, 1, seconds))
    finally:
        other.kill()
        other.join()
    return {
        "round trip beside bulk, ms, median": times[len(times) // 2] * 1e3,
        "round trip beside bulk, ms, 99th percentile": times[len(times) * 99 // 100] * 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="What a tunnel costs.")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each round")
    parser.add_argument("--beside", type=Path, metavar="DIR", help="another checkout to measure")
    parser.add_argument(
        "work", nargs="*", metavar="NAME", help=f"of {', '.join(WORK)}; all of them"
    )
    args = parser.parse_args()
    wanted = args.work or WORK
    results: dict[str, dict[str, float]] = {}
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        keys = Path(folder) / "keys"
        subprocess.run([*COMMAND, "dev-ca", keys], check=True, capture_output=True)

        def all_ways(target: int) -> dict[str, Way]:
            found = {"direct": Way(target)}
            found["hybridkex"] = stack.enter_context(through_hybridkex(target, keys))
            found["2 workers"] = stack.enter_context(through_hybridkex(target, keys, "--workers=2"))
            if args.beside is not None:
                found["beside"] = stack.enter_context(
                    through_hybridkex(target, keys, checkout=args.beside)
                )
            if shutil.which("stunnel4"):
                place = Path(tempfile.mkdtemp(dir=folder))
                found["stunnel4"] = stack.enter_context(through_stunnel(target, keys, place))
            return found

        if "round-trips" in wanted or "beside-bulk" in wanted:
            ways = all_ways(stack.enter_context(echoing()))
        if "round-trips" in wanted:
            results |= rounds(lambda way: round_trips(way, args.seconds), ways)
        if "beside-bulk" in wanted:
            results |= rounds(lambda way: beside_bulk(way, args.seconds), ways)
        sink = Sink()
        ways = all_ways(sink.port)
        if "bulk" in wanted:
            results |= rounds(lambda way: {"bulk, MB/s": bulk(sink, way.port, args.seconds)}, ways)
        if "connections" in wanted:
            results |= rounds(
                lambda way: {"connections/s": connections(way.port, args.seconds)}, ways
            )
        if "pgbench" in wanted and any(Path("/usr/lib/postgresql").glob("*/bin/pgbench")):
            place = stack.enter_context(
                tempfile.TemporaryDirectory(dir="/dev/shm", ignore_cleanup_errors=True)
            )
            port, program = stack.enter_context(postgres(place))
            ways = all_ways(port)
            for name, more in (("pgbench -S, tps", ["-S"]), ("pgbench, tps", [])):
                results |= rounds(
                    partial(pgbench, name, program, seconds=args.seconds, more=more), ways
                )
    if args.json:
        print(json.dumps(results))
        return
    if not shutil.which("stunnel4"):
        print("stunnel4 is not installed: apt-get install stunnel4")
    for what, found in results.items():
        print(what)
        for way, value in found.items():
            ratio = f"   {value / found['direct']:.3f} of direct" if found["direct"] else ""
            print(f"  {way:<10} {value:>12,.2f}{ratio}")


if __name__ == "__main__":
    main()
