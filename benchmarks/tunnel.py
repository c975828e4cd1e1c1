"""A tunnel beside stunnel, HAProxy and the direct connection.

Tunnels have two processes and certificates on both sides. Round trips are those of 100 bytes to an
echo server and back; their processor time is that of both processes of a tunnel, which other load
on the machine hardly changes. A new connection sends and receives one byte. pgbench has 8 clients
and PostgreSQL's files in memory.

stunnel's and HAProxy's handshakes have the groups that their OpenSSL offers: not the hybrid one,
below OpenSSL 3.5.
"""

import os
import pwd
import resource
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from select import EPOLLIN, epoll

from benchmarks.processes import COMMAND, certificates, cpu, program, running, wait_for
from benchmarks.results import OURS, Curve, Options, Row
from interop.ports import free_port

__all__ = ["run"]

CHUNK = 1 << 18
MESSAGE = 100
LOOPBACK = "127.0.0.1"


class Way:
    """How programs reach the target: a port, and the processes between."""

    def __init__(self, port: int, *between: "subprocess.Popen[bytes]") -> None:
        self.port = port
        self._between = between

    def processor_time(self) -> float:
        """Seconds that the processes between, and their workers, have used."""
        pids = [pid for one in self._between for pid in (one.pid, *children(one.pid))]
        return sum(map(cpu, pids))


def children(pid: int) -> list[int]:
    found: list[int] = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):  # it has ended
            found += map(int, (thread / "children").read_text().split())
    return found


@contextmanager
def tunnel(
    listen: list[object], connect: list[object], middle: int, outer: int, copy: Path | None = None
) -> Iterator[Way]:
    """A program at each end."""
    with running(*listen, cwd=copy) as server, running(*connect, cwd=copy) as client:
        wait_for(middle, server)
        wait_for(outer, client)
        yield Way(outer, server, client)


@contextmanager
def ours(target: int, folder: Path, *words: str, copy: Path | None = None) -> Iterator[Way]:
    """Our tunnel, or that of another copy of the project."""
    middle, outer, keys = free_port(), free_port(), folder / "keys"
    trust = [f"--{name}={keys / name}.pem" for name in ("ca", "cert", "key")]
    more = [*trust, "--log-level=warning", "--max-connections=2000", "--grace=0", *words]
    listen = ["--local", f"{LOOPBACK}:{middle}", "--target", f"{LOOPBACK}:{target}", *more]
    connect = ["--local", f"{LOOPBACK}:{outer}", "--remote", f"localhost:{middle}", *more]
    start = [*COMMAND, "tunnel"]
    with tunnel(
        [*start, "listen", "--require-client-cert", *listen],
        [*start, "connect", *connect],
        middle,
        outer,
        copy,
    ) as way:
        yield way


@contextmanager
def stunnel(path: str, target: int, folder: Path) -> Iterator[Way]:
    middle, outer, keys = free_port(), free_port(), folder / "keys"
    common = (
        "foreground = yes\npid =\nsyslog = no\ndebug = 3\nsslVersion = TLSv1.3\n"
        f"cert = {keys}/cert.pem\nkey = {keys}/key.pem\nCAfile = {keys}/ca.pem\n"
    )
    server, client = (folder / f"stunnel-{end}-{outer}.conf" for end in ("server", "client"))
    server.write_text(
        f"{common}verifyChain = yes\n[in]\naccept = {LOOPBACK}:{middle}\n"
        f"connect = {LOOPBACK}:{target}\n"
    )
    client.write_text(
        f"{common}verifyChain = yes\ncheckHost = localhost\n[out]\nclient = yes\n"
        f"accept = {LOOPBACK}:{outer}\nconnect = {LOOPBACK}:{middle}\nsessionResume = no\n"
    )
    with tunnel([path, server], [path, client], middle, outer) as way:
        yield way


@contextmanager
def haproxy(path: str, target: int, folder: Path) -> Iterator[Way]:
    middle, outer, keys = free_port(), free_port(), folder / "keys"
    both = folder / "both.pem"
    both.write_bytes((keys / "cert.pem").read_bytes() + (keys / "key.pem").read_bytes())
    common = (
        "global\n  maxconn 4000\ndefaults\n  mode tcp\n  timeout connect 10s\n"
        "  timeout client 1h\n  timeout server 1h\n"
    )
    checked = f"ssl crt {both} ca-file {keys}/ca.pem verify required ssl-min-ver TLSv1.3"
    server, client = (folder / f"haproxy-{end}-{outer}.conf" for end in ("server", "client"))
    server.write_text(
        f"{common}listen in\n  bind {LOOPBACK}:{middle} {checked}\n"
        f"  server target {LOOPBACK}:{target}\n"
    )
    client.write_text(
        f"{common}listen out\n  bind {LOOPBACK}:{outer}\n  server far {LOOPBACK}:{middle} "
        f"{checked} verifyhost localhost sni str(localhost) no-ssl-reuse\n"
    )
    with tunnel([path, "-db", "-f", server], [path, "-db", "-f", client], middle, outer) as way:
        yield way


# -- the work

Figures = dict[tuple[str, str], float]
"""Of a round, by the name of the work and the unit."""
GOALS = {
    **{f"round trips, {many}": 0.5 for many in ("1 client", "8 clients", "64 clients")},
    "new connections": 1.0,
}
"""How many times as fast as stunnel."""
BOUNDS = {"round trip beside bulk data, median": 0.5}
"""The figures to reach, in the row's unit."""


class Sink:
    """Reads and counts bytes; answers the first byte of a connection."""

    def __init__(self) -> None:
        self._server = socket.create_server((LOOPBACK, 0), backlog=1024)
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


def bulk(sink: Sink, way: Way, seconds: float) -> Figures:
    data = os.urandom(CHUNK)
    with socket.create_connection((LOOPBACK, way.port)) as connection:
        connection.sendall(b"x")
        connection.recv(1)
        before, began = sink.read, time.perf_counter()
        while time.perf_counter() - began < seconds:
            connection.sendall(data)
        # Bytes that the far end has read, not those in buffers on the way.
        rate = (sink.read - before) / (time.perf_counter() - began)
    return {("bulk", "MB/s"): rate / 1e6}


def connections(way: Way, seconds: float) -> Figures:
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        with socket.create_connection((LOOPBACK, way.port)) as connection:
            connection.sendall(b"x")
            assert connection.recv(1) == b"x"
        done += 1
    return {("new connections", "1/s"): done / (time.perf_counter() - began)}


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
    with socket.create_server((LOOPBACK, 0), backlog=1024) as listening:
        process = get_context("fork").Process(target=echo_server, args=(listening,), daemon=True)
        process.start()
        try:
            yield listening.getsockname()[1]
        finally:
            process.kill()
            process.join()


def exchange(way: Way, clients: int, seconds: float) -> tuple[list[float], float]:
    """The times of round trips, by clients that each wait for their answer, and the processor time
    that the way has used for all of them."""
    message = os.urandom(MESSAGE)
    with ExitStack() as stack:
        poll = stack.enter_context(epoll())
        sent: dict[int, tuple[socket.socket, float]] = {}
        for _ in range(clients):
            one = stack.enter_context(socket.create_connection((LOOPBACK, way.port)))
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            one.sendall(message)  # the tunnel's handshake is not counted
            assert one.recv(MESSAGE, socket.MSG_WAITALL) == message
            poll.register(one, EPOLLIN)
            sent[one.fileno()] = one, 0.0
        times: list[float] = []
        before = way.processor_time()
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
        return times, way.processor_time() - before


def flood(port: int) -> None:
    data = os.urandom(CHUNK)
    with socket.create_connection((LOOPBACK, port)) as connection:
        connection.sendall(b"x")
        connection.recv(1)
        while True:
            connection.sendall(data)


@contextmanager
def postgres(folder: str) -> Iterator[tuple[int, str]]:
    initdb, server, pgbench = map(program, ("initdb", "postgres", "pgbench"))
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
    with running(*as_somebody, *serve, "-c", "listen_addresses=127.0.0.1") as database:
        wait_for(port, database)
        reach = ["-h", LOOPBACK, "-p", str(port), "-U", "tester"]
        deadline = time.monotonic() + 30
        while subprocess.run(
            [pgbench, *reach, "-i", "-q", "-s", "5", "postgres"], check=False, capture_output=True
        ).returncode:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield port, pgbench


def transactions(pgbench: str, way: Way, *, seconds: float, more: list[str]) -> Figures:
    done = subprocess.run(
        [
            *(pgbench, "-h", LOOPBACK, "-p", str(way.port), "-U", "tester", "-n", "-c", "8"),
            *("-j", "1", "-T", str(max(1, round(seconds))), *more, "postgres"),
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("tps"))
    return {(f"pgbench {' '.join(more)}".rstrip(), "1/s"): float(line.split()[2])}


def round_trips(way: Way, clients: int, seconds: float) -> Figures:
    times, used = exchange(way, clients, seconds)
    many = "1 client" if clients == 1 else f"{clients:,} clients"
    found = {(f"round trips, {many}", "1/s"): len(times) / seconds}
    if used:
        found[f"CPU of a round trip, {many}", "us"] = used / len(times) * 1e6
    return found


def beside_bulk(way: Way, seconds: float) -> Figures:
    other = get_context("fork").Process(target=flood, args=(way.port,), daemon=True)
    other.start()
    try:
        time.sleep(min(0.2, seconds))
        times = sorted(exchange(way, 1, seconds)[0])
    finally:
        other.kill()
        other.join()
    return {
        ("round trip beside bulk data, median", "ms"): times[len(times) // 2] * 1e3,
        ("the same, 99th percentile", "ms"): times[len(times) * 99 // 100] * 1e3,
    }


# -- the comparison


def compared(work: Callable[[Way], Figures], ways: dict[str, Way], rounds: int) -> Iterator[Row]:
    """The rows of a work that has several figures; the ways take turns."""
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for _ in range(rounds):
        for tool, way in ways.items():
            for what, value in work(way).items():
                found.setdefault(what, {}).setdefault(tool, []).append(value)
    for (name, unit), figures in found.items():
        yield Row(name, unit, figures, GOALS.get(name), BOUNDS.get(name))


@contextmanager
def all_ways(
    target: int, folder: Path, options: Options, *, workers: bool = True
) -> Iterator[dict[str, Way]]:
    """Ours first."""
    with ExitStack() as stack:
        found = {OURS: stack.enter_context(ours(target, folder))}
        peers = {"stunnel": ("stunnel4", stunnel), "HAProxy": ("haproxy", haproxy)}
        for tool, (name, start) in peers.items():
            path = program(name)
            if path is not None:
                found[tool] = stack.enter_context(start(path, target, folder))
        if options.against is not None:
            copy = ours(target, folder, copy=options.against.resolve())
            found["the other copy"] = stack.enter_context(copy)
        if workers:
            many = ours(target, folder, "--workers=2")
            found[f"{OURS}, 2 workers"] = stack.enter_context(many)
        yield found | {"direct": Way(target)}


def run(options: Options) -> Iterator[Row | Curve]:
    """Measure."""
    seconds, rounds = 0.05 if options.quick else 1.5, options.few()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # the programs get it too
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        certificates(folder / "keys")
        with echoing() as port, all_ways(port, folder, options) as ways:
            for clients in (1,) if options.quick else (1, 8, 64):
                work = partial(round_trips, clients=clients, seconds=seconds)
                yield from compared(work, ways, rounds)
            yield from compared(partial(beside_bulk, seconds=seconds), ways, rounds)
            yield from growth(ways, (10,) if options.quick else (1, 10, 100, 1000), seconds)
        sink = Sink()
        # One start of workers is enough to see that they run: it takes 2 s of processor time.
        with all_ways(sink.port, folder, options, workers=not options.quick) as ways:
            yield from compared(partial(connections, seconds=seconds), ways, rounds)
            yield from compared(partial(bulk, sink, seconds=seconds), ways, rounds)
        if options.quick or program("pgbench") is None:
            return
        place = stack.enter_context(
            tempfile.TemporaryDirectory(dir="/dev/shm", ignore_cleanup_errors=True)
        )
        port, pgbench = stack.enter_context(postgres(place))
        with all_ways(port, folder, options) as ways:
            for more in (["-S"], []):
                work = partial(transactions, pgbench, seconds=seconds, more=more)
                yield from compared(work, ways, rounds)


def growth(ways: dict[str, Way], places: tuple[int, ...], seconds: float) -> Iterator[Curve]:
    """Round trips by the number of clients, in one run."""
    curves: dict[str, Curve] = {}
    for clients in places:
        for tool, way in ways.items():
            for (name, unit), value in round_trips(way, clients, seconds).items():
                title = name.partition(",")[0]
                curve = curves.setdefault(title, Curve(title, "clients", unit, {}))
                curve.lines.setdefault(tool, {})[str(clients)] = [value]
    yield from curves.values()
