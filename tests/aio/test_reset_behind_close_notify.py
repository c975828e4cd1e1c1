"""A reset of TCP and the peer's close_notify (RFC 9846 section 6.1): what was received whole is
delivered, and data of ours that could not be sent is an error of the writer."""

import asyncio
import socket
import struct
from typing import Any

import pytest
from aio_glue import Run, Streams, connect, serving
from waiting import asyncio_until

from hybridkex import ClientConfig, ServerConfig
from hybridkex.aio import SecureTransport


def life_of(writer: asyncio.StreamWriter) -> Any:
    assert isinstance(writer.transport, SecureTransport)
    return writer.transport._life


def reset(writer: asyncio.StreamWriter) -> None:
    linger = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


@pytest.mark.parametrize("answer", [b"", b"answer"])
@pytest.mark.parametrize("close_notify", [True, False])
@pytest.mark.parametrize("unsent", [True, False])
@pytest.mark.parametrize("reads", ["before", "after"])
@pytest.mark.parametrize("side", ["client", "server"])
def test_of_streams(
    run: Run,
    client_config: ClientConfig,
    server_config: ServerConfig,
    answer: bytes,
    close_notify: bool,
    unsent: bool,
    reads: str,
    side: str,
) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        accepted: asyncio.Future[Streams] = loop.create_future()
        done = asyncio.Event()

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            accepted.set_result((reader, writer))
            await done.wait()

        async with serving(server_config, handler) as port:
            ends = [await connect(port, client_config), await accepted]
            (reader, writer), (_, peer) = ends if side == "client" else reversed(ends)
            peer.transport.pause_reading()  # type: ignore[attr-defined]
            life = life_of(writer)
            if unsent:
                writer.write(bytes(16 << 20))  # more than the socket buffers take
                await asyncio_until(lambda: life.writing._below_full)
            peer.write(answer)
            if close_notify:
                peer.write_eof()
            reading = asyncio.create_task(reader.read()) if reads == "before" else None
            if answer and reading is None:
                await asyncio_until(lambda: bool(reader._buffer))  # type: ignore[attr-defined]
            if close_notify:
                await asyncio_until(lambda: life.engine.close_received)
            reset(peer)
            await asyncio_until(lambda: life.state.name == "CLOSED")
            if close_notify:
                assert await (reading or reader.read()) == answer
            else:
                with pytest.raises(ConnectionResetError):
                    await (reading or reader.read())
            with pytest.raises(ConnectionError):
                await writer.drain()
            writer.close()
            if close_notify and not unsent:
                await writer.wait_closed()
            else:
                with pytest.raises(ConnectionResetError):
                    await writer.wait_closed()
            done.set()

    run(main())


def test_data_that_waits_for_a_paused_reader_is_no_clean_end(
    run: Run, client_config: ClientConfig, server_config: ServerConfig
) -> None:
    """``connection_lost(None)`` would tell the protocol that it has got everything."""

    async def main() -> None:
        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(1)
            writer.write(b"answer")
            writer.close()

        async with serving(server_config, handler) as port:
            reader, writer = await connect(port, client_config)
            life = life_of(writer)
            life.reading.paused = True  # the transport below reads on, as in a read under way
            writer.write(b"x")
            await asyncio_until(lambda: life.engine.close_received)
            raw, receiver = life.raw, life.reading
            raw.set_protocol(asyncio.Protocol())
            raw.abort()
            receiver.connection_lost(ConnectionResetError("reset"))
            with pytest.raises(ConnectionResetError):
                await reader.read()

    run(main())


@pytest.mark.parametrize("closes", [True, False])
def test_a_little_that_was_not_sent(
    run: Run, client_config: ClientConfig, server_config: ServerConfig, closes: bool
) -> None:
    """Less than the marks waits below, for a peer that reads no more."""

    async def main() -> None:
        accepted: asyncio.Future[Streams] = asyncio.get_running_loop().create_future()
        done = asyncio.Event()

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            accepted.set_result((reader, writer))
            await done.wait()

        async with serving(server_config, handler) as port:
            reader, writer = await connect(port, client_config)
            _, peer = await accepted
            peer.transport.pause_reading()  # type: ignore[attr-defined]
            for one, option in ((writer, socket.SO_SNDBUF), (peer, socket.SO_RCVBUF)):
                one.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, option, 4096)
            life = life_of(writer)

            stays = 0

            def full() -> bool:
                """Until the sockets' buffers take no more, so that some of it stays."""
                nonlocal stays
                stays += 1
                if life.raw.get_write_buffer_size() < 20_000:
                    writer.write(bytes(20_000))
                    stays = 0
                return stays == 20

            await asyncio_until(full)
            peer.write(b"answer")
            peer.write_eof()
            await asyncio_until(lambda: life.engine.close_received)
            assert 0 < life.raw.get_write_buffer_size() < 1 << 16
            if closes:
                writer.close()
            reset(peer)
            await asyncio_until(lambda: life.state.name == "CLOSED")
            assert await reader.read() == b"answer"
            writer.close()
            with pytest.raises(ConnectionResetError):
                await writer.wait_closed()
            done.set()

    run(main())
