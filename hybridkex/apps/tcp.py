"""Socket options and helpers of the applications."""

import contextlib
import errno
import socket
import struct
from typing import Final

import trio
from trio.abc import HalfCloseableStream

from hybridkex.machine import leaves, reason


def set_reset(stream: trio.SocketStream, on_close: bool) -> None:
    """Set whether closing the socket resets the connection, also when the kernel closes it because
    this process is killed. A Unix socket has no reset."""
    with contextlib.suppress(OSError):
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", on_close, 0))


def reset(stream: trio.SocketStream) -> None:
    """Close with a reset, so that the other end cannot mistake a cut for an orderly end."""
    set_reset(stream, on_close=True)
    stream.socket.close()


_ADVICE: Final = {
    errno.ECONNREFUSED: "no program listens there: start the server, or check the port",
    errno.EHOSTUNREACH: "check the address, the route and the firewalls",
    errno.ENETUNREACH: "check the address, the route and the firewalls",
    errno.ETIMEDOUT: "check the address, the route and the firewalls",
    errno.EADDRINUSE: "another program listens there: choose another port, 0 picks one",
    errno.EADDRNOTAVAIL: "this machine has no such address, see 'ip address'",
    errno.ENOENT: (
        "the folder of the socket does not exist, or the program that creates the socket does not "
        "run"
    ),
    errno.EACCES: "ports below 1024 need root or CAP_NET_BIND_SERVICE, Unix sockets permission to "
    "write to their folder",
}


def no_connection(error: Exception) -> str:
    """Describe why a TCP connection or port cannot be opened, with the next step."""
    if not isinstance(error, OSError):
        return "this is not a valid host name"
    last: BaseException = error  # and then that of the last address that was tried
    if error.__cause__ is not None:
        *_, last = leaves(error.__cause__)
    advice = _ADVICE.get(getattr(last, "errno", None) or 0)
    if isinstance(last, socket.gaierror):
        advice = "check the host's name"
    return f"{reason(last)}; {advice}" if advice else reason(last)


class CountingStream(HalfCloseableStream):
    """A stream that counts its bytes; underneath a secure stream, those on the wire."""

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
