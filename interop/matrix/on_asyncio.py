"""The asyncio shell behind the interface of a trio stream, so that every case is written once.

An event loop of asyncio runs in a thread. A connection there is upgraded to TLS over one end of a
socket pair; the holder of the other end carries the bytes.
"""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Coroutine
from functools import cache
from types import SimpleNamespace
from typing import Any

import trio

from hybridkex import ClientConfig, Secret, ServerConfig, Session
from hybridkex.aio import upgrade

__all__ = ["AsyncioStream"]


@cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


async def _there(work: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine in the asyncio loop."""
    future = asyncio.run_coroutine_threadsafe(work, _loop())
    try:
        return await trio.to_thread.run_sync(future.result, abandon_on_cancel=True)
    except trio.Cancelled:
        future.cancel()
        raise


class AsyncioStream:
    """A connection of the asyncio shell, for a trio task that owns ``transport_stream``."""

    def __init__(
        self,
        transport_stream: Any,
        config: ClientConfig | ServerConfig,
        *,
        server_hostname: str | None = None,
        handshake_timeout: float,
    ) -> None:
        self.transport_stream = transport_stream
        self._config = config
        self._name = server_hostname
        self._timeout = handshake_timeout
        self._ours, self._theirs = socket.socketpair()

    async def carry(self) -> None:
        """Carry bytes between the transport and asyncio, until cancelled."""
        near = trio.SocketStream(trio.socket.from_stdlib_socket(self._ours))

        async def pump(source: Any, sink: Any) -> None:
            try:
                while data := await source.receive_some(1 << 16):
                    await sink.send_all(data)
                await sink.send_eof()
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                await near.aclose()

        async with near, trio.open_nursery() as nursery:
            nursery.start_soon(pump, near, self.transport_stream)
            nursery.start_soon(pump, self.transport_stream, near)

    async def do_handshake(self) -> None:
        async def handshake() -> Any:
            reader, writer = await asyncio.open_connection(sock=self._theirs)
            return await upgrade(
                reader,
                writer,
                self._config,
                server_hostname=self._name,
                ssl_handshake_timeout=self._timeout,
            )

        self._reader, self._writer = await _there(handshake())

    @property
    def session(self) -> Session:
        found: Session = self._writer.get_extra_info("hybridkex_session")
        return found

    @property
    def _connection(self) -> SimpleNamespace:
        return SimpleNamespace(_state=self._writer.transport._life.engine._state)

    def export(self, label: bytes, context: bytes, length: int) -> Secret:
        secret: Secret = self._writer.transport.export(label, context, length)
        return secret

    async def send_all(self, data: bytes) -> None:
        async def send() -> None:
            self._writer.write(data)
            await self._writer.drain()

        await _there(send())

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        data: bytes = await _there(self._reader.read(max_bytes or 1 << 16))
        return data

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while data := await self.receive_some():
            yield data

    async def update_keys(self, *, request_peer: bool = False) -> None:
        async def update() -> None:
            self._writer.transport.update_keys(request_peer=request_peer)

        await _there(update())

    async def send_eof(self) -> None:
        async def end() -> None:
            self._writer.write_eof()
            await self._writer.drain()

        await _there(end())

    async def aclose(self) -> None:
        async def abort() -> None:
            if hasattr(self, "_writer"):
                self._writer.transport.abort()

        with trio.CancelScope(shield=True):
            await _there(abort())
        await self.transport_stream.aclose()
