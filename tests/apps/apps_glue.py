"""Processes of the command, one authority, and a wire that can be cut."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

COMMAND = [sys.executable, "-m", "hybridkex"]


class Run:
    """Starts commands, and ends what is left of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: list[subprocess.Popen[str]] = []

    def start(self, *words: object, **options: Any) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [*COMMAND, *map(str, words)],
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            **{"stderr": subprocess.PIPE, **options},
        )
        self._started.append(process)
        return process

    def server(self, *words: object, **options: Any) -> tuple["subprocess.Popen[str]", int]:
        """A command with ``--port-file``, once it listens."""
        port_file = self._folder / f"port-{time.monotonic_ns()}"
        process = self.start(*words, "--port-file", port_file, **options)
        wait_until(port_file.exists, process)
        return process, int(port_file.read_text())

    def end(self) -> None:
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.communicate()


def wait_until(
    condition: Callable[[], bool], process: "subprocess.Popen[str] | None" = None
) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        if process is not None and process.poll() is not None:
            assert process.stderr is not None
            raise AssertionError(process.stderr.read())
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    runner = Run(tmp_path)
    yield runner
    runner.end()


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys") / "one"
    made = subprocess.run(
        [*COMMAND, "dev-ca", str(folder)], capture_output=True, timeout=30, check=False
    )
    assert made.returncode == 0, made.stderr
    return folder


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
def kmes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kmes]:
    folder = tmp_path_factory.mktemp("sites") / "sites"
    process = subprocess.Popen(
        [*COMMAND, "kme", "dev-up", str(folder), "--ports", "0,0"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        options: dict[str, list[str]] = {}
        for line in process.stdout:
            # The two commands that it suggests.
            if found := re.match(r" +hybridkex (listen|connect) .*?127.0.0.1( 4433)? (--.*)", line):
                options["alice" if found[1] == "connect" else "bob"] = found[3].split()
            if len(options) == 2:
                break
        yield Kmes(**options)
    finally:
        process.kill()
        process.communicate()


def descriptors(process: "subprocess.Popen[str]") -> int:
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
