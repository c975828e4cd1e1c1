"""Tunnels as processes, and what stands at their two ends."""

import http.client
import json
import os
import re
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import trio
from apps_glue import AnyProcess, Run, descriptors
from waiting import PATIENCE, trio_until

from interop.ports import free_port

INTERVALS = {
    "hybridkex.apps.tunnel.server._CHECK_EVERY": 0.05,
    "hybridkex.apps.tunnel.workers.CHECK_EVERY": 0.05,
    "hybridkex.apps.tunnel.workers.AGAIN_SECONDS": 0.1,
    "hybridkex.apps.systemd.NOTIFY_SECONDS": 0.1,
}
"""What a service does from time to time, it does more often here."""

Table = Mapping[str, object]


def write_toml(path: Path, top: Table, *, listen: list[Table], connect: list[Table]) -> Path:
    """JSON's strings, numbers, booleans and arrays are TOML's, too."""
    lines = [f"{name.replace('-', '_')} = {json.dumps(value)}" for name, value in top.items()]
    for kind, tables in (("listen", listen), ("connect", connect)):
        for table in tables:
            lines.append(f"[[{kind}]]")
            lines += [
                f"{name.replace('-', '_')} = {json.dumps(value)}" for name, value in table.items()
            ]
    path.write_text("\n".join(lines) + "\n")
    return path


class Tunnel:
    """Both ends of one tunnel in one process, from a file; what is between them is a Unix socket.

    Programs connect to ``port``; the connections go to ``target``.
    """

    def __init__(self, run: Run, folder: Path, keys: Path) -> None:
        self._run = run
        self.folder = folder
        self.file = folder / "tunnels.toml"
        self.log = folder / "tunnel.log"
        self.middle = folder / "middle.sock"
        self._keys = keys
        self.metrics_port = free_port()
        self.process: AnyProcess
        self.port = 0

    def options(self) -> dict[str, object]:
        return {name: str(self._keys / f"{name}.pem") for name in ("ca", "cert", "key")}

    def write(
        self,
        target: object,
        *,
        listen: Table | None = None,
        connect: Table | None = None,
        top: Table | None = None,
    ) -> None:
        server = {
            "name": "in",
            "local": "unix:middle.sock",
            "target": target if isinstance(target, str) else f"127.0.0.1:{target}",
            "require-client-cert": True,
            **self.options(),
            **(listen or {}),
        }
        client = {
            "name": "out",
            "local": "127.0.0.1:0",
            "remote": "unix:middle.sock",
            "server-name": "localhost",
            "port-file": "port",
            **self.options(),
            **(connect or {}),
        }
        above = {"metrics": f"127.0.0.1:{self.metrics_port}", "grace": 10, **(top or {})}
        write_toml(self.file, above, listen=[server], connect=[client])

    async def start(self, **environment: str) -> None:
        with self.log.open("wb") as log:
            self.process = self._run.start(
                "tunnel", "run", self.file, stderr=log, constants=INTERVALS, **environment
            )
        await trio_until(lambda: (self.folder / "port").exists() or self.process.poll() is not None)
        assert self.process.poll() is None, self.log.read_text()
        self.port = int((self.folder / "port").read_text())

    def says(self, text: str) -> bool:
        return re.search(text, self.log.read_text()) is not None

    async def reload(self, outcome: str) -> None:
        """SIGHUP, until the log says what became of it."""
        known = len(self.log.read_text())
        self.process.send_signal(signal.SIGHUP)
        await trio_until(lambda: outcome in self.log.read_text()[known:])

    async def connect(self) -> trio.SocketStream:
        return await trio.open_tcp_stream("127.0.0.1", self.port)

    def metrics(self) -> dict[str, float]:
        return read_metrics(self.metrics_port)

    def descriptors(self) -> int:
        return descriptors(self.process)

    def memory(self) -> int:
        """Resident bytes."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    async def ended(self) -> int:
        await trio_until(lambda: self.process.poll() is not None)
        assert "Traceback" not in self.log.read_text(), self.log.read_text()
        return int(self.process.returncode or 0)


def read_metrics(port: int) -> dict[str, float]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


@asynccontextmanager
async def serving(handler: Callable[[Any], Awaitable[object]]) -> AsyncIterator[int]:
    """A server of the test on a TCP port; a connection that breaks ends only itself."""

    async def handle(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await handler(stream)

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, handle, listeners)
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def echo(stream: trio.SocketStream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)
    await stream.send_eof()


async def receive_all(stream: trio.SocketStream) -> bytes:
    found = bytearray()
    with trio.fail_after(PATIENCE):
        while data := await stream.receive_some():
            found += data
    return bytes(found)


async def exchange(stream: trio.SocketStream, data: bytes) -> bytes:
    """Send all, end, and receive all, at the same time."""
    async with trio.open_nursery() as nursery:

        async def send() -> None:
            await stream.send_all(data)
            await stream.send_eof()

        nursery.start_soon(send)
        return await receive_all(stream)
    raise AssertionError("a nursery swallowed a break")
