"""The wire tap: a TCP proxy that writes all traffic into a capture file.

It sees what a tap on a cable sees: bytes and times. It writes data before it forwards them.
"""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import trio

from hybridkex.demos.rndl.capture.pcapng import PcapngWriter
from hybridkex.demos.rndl.capture.tcpip import Address, ConnectionWriter
from hybridkex.files import open_private

_READ_SIZE = 64 * 1024


@asynccontextmanager
async def wire_tap(capture: Path, target: Address) -> AsyncIterator[Address]:
    """Listen on loopback, forward every connection to ``target``, and record it in ``capture``.

    Yields the address to connect to. At the end of the block open connections are cut and the file
    is complete.
    """
    with open_private(capture) as file:
        writer = PcapngWriter(file)

        async def handle(client: trio.SocketStream) -> None:
            async with client:
                await _pass_on(client, target, writer)

        async with trio.open_nursery() as nursery:
            listeners: list[trio.SocketListener] = await nursery.start(
                partial(trio.serve_tcp, handle, 0, host="127.0.0.1")
            )
            host, port = listeners[0].socket.getsockname()
            try:
                yield host, port
            finally:
                nursery.cancel_scope.cancel()


async def _pass_on(client: trio.SocketStream, target: Address, writer: PcapngWriter) -> None:
    """Forward one connection until both directions are closed."""
    connection = ConnectionWriter(
        writer, client.socket.getpeername(), client.socket.getsockname(), time.time_ns()
    )

    async def relay(
        source: trio.SocketStream, sink: trio.SocketStream, *, from_client: bool
    ) -> None:
        try:
            while data := await source.receive_some(_READ_SIZE):
                connection.data(time.time_ns(), bytes(data), from_client=from_client)
                await sink.send_all(data)
            connection.end(time.time_ns(), from_client=from_client)
            await sink.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # One end has disconnected; what it sent is recorded.

    try:
        server = await trio.open_tcp_stream(*target)
    except OSError:
        return  # Close our end too, as the client would see without the tap.
    async with server, trio.open_nursery() as nursery:
        nursery.start_soon(partial(relay, client, server, from_client=True))
        nursery.start_soon(partial(relay, server, client, from_client=False))
