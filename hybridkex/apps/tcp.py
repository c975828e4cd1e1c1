"""What the applications need of their sockets beside reading and writing."""

import contextlib
import os
import socket
import struct
from typing import Final

import trio
from trio.abc import HalfCloseableStream

__all__ = ["CountingStream", "keep_alive", "last_attempt", "os_reason", "reset", "watch_peer"]

SILENCE: Final = 45
"""Seconds after which a peer that does not even acknowledge is taken for gone."""


def keep_alive(stream: trio.SocketStream) -> None:
    """Let the kernel end a connection that is at rest and whose peer has vanished.

    Better than a time limit on data: a peer that is busy, or that waits for a person to type, still
    acknowledges (tcp(7)).
    """
    with contextlib.suppress(OSError):  # not TCP
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, SILENCE // 3)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, SILENCE // 9)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 6)


def watch_peer(stream: trio.SocketStream) -> None:
    """As :func:`keep_alive`, and also while data is on its way (RFC 5482).

    Linux counts a peer that acknowledges and reads nothing as silent, too: this is for ends whose
    peers always read.
    """
    keep_alive(stream)
    with contextlib.suppress(OSError):
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE * 1000)


def reset(stream: trio.SocketStream) -> None:
    """Close with a reset, so that the other end cannot take a cut for an end."""
    with contextlib.suppress(OSError):
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.socket.close()


def last_attempt(error: OSError) -> BaseException:
    """Of the last address, where several were tried; the error itself otherwise."""
    cause = error.__cause__
    while isinstance(cause, BaseExceptionGroup) and cause.exceptions:
        cause = cause.exceptions[-1]
    return cause or error


def os_reason(error: OSError) -> str:
    """Why there is no connection: of the last attempt."""
    reason = last_attempt(error)
    if not isinstance(reason, OSError) or reason.strerror is None:
        return str(reason)
    if reason.strerror.startswith("Error connecting to") and reason.errno:  # trio's; names it again
        return os.strerror(reason.errno)
    return reason.strerror


class CountingStream(HalfCloseableStream):
    """Counts what goes over a stream: put under a secure stream, the bytes on the wire."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream: Final = stream
        self.sent = 0
        self.received = 0

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self.stream.send_all(data)
        self.sent += len(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self.stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        data = await self.stream.receive_some(max_bytes)
        self.received += len(data)
        return data

    async def send_eof(self) -> None:
        await self.stream.send_eof()

    async def aclose(self) -> None:
        await self.stream.aclose()
