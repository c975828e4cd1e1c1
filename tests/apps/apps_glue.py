"""Processes of the command, one authority, and a wire that can be cut."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

import pytest
import trio
import trio.testing
from forked import Forkserver, Running
from waiting import until

from hybridkex import ClientConfig, DevCa, SecureStream, ServerConfig, TrustStore
from hybridkex.apps.transfer import PROTOCOL, Folder
from hybridkex.apps.transfer.arrivals import Arrivals
from hybridkex.apps.transfer.folder import Present
from hybridkex.apps.transfer.messages import Offer, Whole
from hybridkex.apps.transfer.part import PartFile, Prefix

COMMAND = [sys.executable, "-m", "hybridkex"]


class Process:
    """What :class:`subprocess.Popen` has in text mode, of a process that was forked."""

    def __init__(self, forked: Running) -> None:
        self._forked = forked
        self.pid = forked.pid
        self.poll = forked.poll
        self.kill = forked.kill
        self.send_signal = forked.send_signal

    @property
    def returncode(self) -> int | None:
        return self._forked.returncode

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def wait(self, timeout: float = 60) -> int:
        return self._forked.wait(timeout)

    def communicate(self, timeout: float = 60) -> tuple[str, str]:
        said, told = self._forked.communicate(timeout=timeout)
        return said.decode(), told.decode()


AnyProcess: TypeAlias = Process | subprocess.Popen[str]


class Run:
    """Starts commands, and ends what is left of them."""

    def __init__(self, folder: Path, forkserver: Forkserver) -> None:
        self._folder = folder
        self._forkserver = forkserver
        self._started: list[AnyProcess] = []

    def start(
        self,
        *words: object,
        stderr: IO[bytes] | None = None,
        constants: Mapping[str, float] | None = None,
        **environment: str,
    ) -> AnyProcess:
        """Forked from one that has imported everything: the test does not wait for that."""
        with Path(os.devnull).open("rb") as nothing:
            process = Process(
                self._forkserver.start(
                    *words,
                    stdin=nothing,
                    stderr=stderr,
                    constants=constants,
                    environment=environment,
                )
            )
        self._started.append(process)
        return process

    def fresh(self, *words: object, preexec_fn: Callable[[], object] | None = None) -> AnyProcess:
        """An interpreter of its own, whose memory and rights are its own."""
        process = subprocess.Popen(
            [*COMMAND, *map(str, words)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=preexec_fn,  # noqa: PLW1509  # no other thread runs here
        )
        self._started.append(process)
        return process

    def server(
        self, *words: object, start: Callable[..., AnyProcess] | None = None, **options: Any
    ) -> tuple[AnyProcess, int]:
        """A command with ``--port-file``, once it listens."""
        port_file = self._folder / f"port-{time.monotonic_ns()}"
        process = (start or self.start)(*words, "--port-file", port_file, **options)
        until(port_file.exists, process)
        return process, int(port_file.read_text())

    def end(self) -> None:
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.communicate()


@pytest.fixture
def run(tmp_path: Path, forkserver: Forkserver) -> Iterator[Run]:
    runner = Run(tmp_path, forkserver)
    yield runner
    runner.end()


@pytest.fixture(scope="session")
def configs() -> tuple[ClientConfig, ServerConfig]:
    """Of a sender and a receiver in one process."""
    authority = DevCa.create()
    return (
        ClientConfig(verifier=TrustStore((authority.certificate,)), alpn=(PROTOCOL,)),
        ServerConfig(identities=(authority.issue("localhost"),), alpn=(PROTOCOL,)),
    )


@pytest.fixture(scope="session")
def mutual(keys: Path) -> list[str]:
    """Options with which both sides prove who they are."""
    return [
        word for name in ("ca", "cert", "key") for word in (f"--{name}", str(keys / f"{name}.pem"))
    ]


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A tmpfs; the test is told where this machine does not let us mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@dataclass(frozen=True)
class Kmes:
    """Two key management entities with a link between them, and the options of their two SAEs."""

    alice: list[str]
    bob: list[str]


@pytest.fixture(scope="session")
def kmes(tmp_path_factory: pytest.TempPathFactory, forkserver: Forkserver) -> Iterator[Kmes]:
    folder = tmp_path_factory.mktemp("sites") / "sites"
    with forkserver.telling("kme", "dev-up", folder, "--ports", "0,0") as (said, _):
        options: dict[str, list[str]] = {}
        for line in said:
            # The two commands that it suggests.
            if found := re.match(r" +hybridkex (listen|connect) .*?127.0.0.1( 4433)? (--.*)", line):
                options["alice" if found[1] == "connect" else "bob"] = found[3].split()
            if len(options) == 2:
                break
        yield Kmes(**options)


def descriptors(process: AnyProcess) -> int:
    """How many are open in a process."""
    return len(os.listdir(f"/proc/{process.pid}/fd"))


class Wire:
    """A proxy on the loopback that can cut what it carries."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = 0
        self.carried = 0
        self.connections = 0
        self.cut_after: int | None = None
        """Bytes from client to server after which the connection is reset, once."""
        self._scopes: set[trio.CancelScope] = set()

    def cut(self) -> None:
        """Reset whatever is open now."""
        for scope in self._scopes:
            scope.cancel()

    async def serve(self, client: trio.SocketStream) -> None:
        self.connections += 1
        try:
            server = await trio.open_tcp_stream("127.0.0.1", self.target)
        except OSError:
            return
        with trio.CancelScope() as scope:
            self._scopes.add(scope)
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._copy, client, server, scope, True)
                    nursery.start_soon(self._copy, server, client, scope, False)
            finally:
                self._scopes.discard(scope)
                for stream in (client, server):
                    stream.setsockopt(1, 13, b"\1\0\0\0\0\0\0\0")  # SO_LINGER of zero: a reset
                    stream.socket.close()

    async def _copy(
        self,
        source: trio.SocketStream,
        sink: trio.SocketStream,
        scope: trio.CancelScope,
        counted: bool,
    ) -> None:
        try:
            while data := await source.receive_some(65536):
                if counted:
                    self.carried += len(data)
                    if self.cut_after is not None and self.carried > self.cut_after:
                        self.cut_after = None
                        scope.cancel()
                await sink.send_all(data)
            await sink.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            scope.cancel()


@pytest.fixture
def wire() -> Callable[[int], AbstractAsyncContextManager[Wire]]:
    @asynccontextmanager
    async def make(target: int) -> Any:
        made = Wire(target)
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        made.port = listeners[0].socket.getsockname()[1]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, made.serve, listeners)
            yield made
            nursery.cancel_scope.cancel()

    return make


# --- a receiving folder without a connection ------------------------------------------------------


def look(folder: Folder, offer: Offer) -> Present:
    """What the folder has of a file."""
    with folder.open() as handles:
        return folder.look(offer, handles)


def begin(folder: Folder, offer: Offer, prefix: Prefix | None = None) -> PartFile:
    """The incomplete file, open."""
    with folder.open() as handles:
        return folder.begin(offer, prefix, handles)


def complete(folder: Folder, part: PartFile, digest: str) -> None:
    """Store a file of which everything has been written."""
    arrivals = Arrivals(folder)
    try:
        arrivals.add(part.complete(digest, folder.umask))
        [settled] = arrivals.settle()
    finally:
        arrivals.close()
        part.close()
    if settled.error is not None:
        raise settled.error


def store(folder: Folder, offer: Offer, content: bytes) -> None:
    """Store a small file."""
    arrivals = Arrivals(folder)
    with folder.open() as handles:
        arrivals.write(offer, Whole(offer.n, hashlib.sha256(content).digest(), content), handles)
    [settled] = arrivals.settle()
    if settled.error is not None:
        raise settled.error


def proved(folder: Folder, offer: Offer, content: bytes) -> Prefix | None:
    """What the folder finds to be the same as the beginning of the sender's file."""
    with folder.open() as handles:
        present = folder.look(offer, handles)
        digest = folder.hash(offer, present, handles)
    return folder.compare(offer, present, digest, hashlib.sha256(content).hexdigest())


def memory(pid: int) -> int:
    """The most that a process has held so far."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


# --- what happens to a file while it is sent


def replace(path: Path) -> None:
    """Another file with the same name, size and date."""
    before = path.stat()
    new = path.with_name("new")
    new.write_bytes(bytes(before.st_size))
    os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
    new.rename(path)


def become_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


async def connected(
    configs: tuple[ClientConfig, ServerConfig],
) -> tuple[SecureStream[Any], SecureStream[Any]]:
    """Client and server in this process, after their handshake."""
    one, other = trio.testing.memory_stream_pair()
    client = SecureStream(one, configs[0], server_hostname="localhost")
    server = SecureStream(other, configs[1])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.do_handshake)
        nursery.start_soon(server.do_handshake)
    return client, server
