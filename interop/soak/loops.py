"""Measures how much work a crowd causes an asyncio or uvloop server before another client's answer.

The server is stopped while the crowd connects, so that the whole crowd is in the queue when an
honest client connects from another address. The measurement is the server's processor time until
that client has its answer, which does not depend on other load of the machine.
"""

import asyncio
import importlib
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from hybridkex import ClientConfig, DevCa, ServerConfig, TrustStore
from hybridkex.aio import open_connection, start_server
from interop.soak import crowd
from interop.soak.load import raise_file_limit

__all__ = ["LOOPS", "measure"]

LOOPS = ("asyncio", "uvloop")


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    writer.close()


def _serve(loop: str, authority: DevCa, told: Any) -> None:
    raise_file_limit()
    config = ServerConfig(identities=(authority.issue("localhost"),))

    async def main() -> None:
        server = await start_server(_echo, "127.0.0.1", 0, config, backlog=4096)
        told.send(server.sockets[0].getsockname()[1])
        await asyncio.Future()

    with asyncio.Runner(loop_factory=importlib.import_module(loop).new_event_loop) as runner:
        runner.run(main())


async def _ask(port: int, config: ClientConfig) -> None:
    async with asyncio.timeout(60):
        reader, writer = await open_connection(
            "127.0.0.1", port, config, server_hostname="localhost", ssl_handshake_timeout=60
        )
        writer.write(b"x")
        await reader.readexactly(1)
        writer.close()
        await writer.wait_closed()


def _used(process: int) -> float:
    """Seconds of processor time of a process (proc(5))."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(loop: str, kind: str, count: int) -> dict[str, Any]:
    """Send a crowd of one address to a server and measure what the next client waits for.

    Args:
        loop: one of :data:`LOOPS`.
        kind: one of :data:`interop.soak.crowd.CROWDS`.
        count: connections.
    """
    authority = DevCa.create()
    config = ClientConfig(verifier=TrustStore((authority.certificate,)))
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    server = context.Process(target=_serve, args=(loop, authority, theirs))
    server.start()
    assert server.pid is not None
    port = ours.recv()
    asyncio.run(_ask(port, config))
    attacker = context.Process(
        target=crowd._attack, args=(port, kind, count, ["127.0.0.2"], theirs)
    )
    os.kill(server.pid, signal.SIGSTOP)
    attacker.start()
    time.sleep(crowd.AHEAD)
    before, began = _used(server.pid), time.monotonic()
    threading.Timer(crowd.GOES_ON, os.kill, [server.pid, signal.SIGCONT]).start()
    try:
        asyncio.run(_ask(port, config))
        work, waited = _used(server.pid) - before, time.monotonic() - began
    finally:
        for process in (attacker, server):
            process.kill()
            process.join()
            process.close()
        ours.close()
        theirs.close()
    return {
        "loop": loop,
        "kind": kind,
        "connections": count,
        "seconds of the server's processor": round(work, 2),
        "seconds": round(waited, 2),
    }
