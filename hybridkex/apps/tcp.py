"""Socket options and helpers of the applications."""

import contextlib
import errno
import os
import socket
import struct
from typing import Final

import trio
from trio.abc import HalfCloseableStream


def set_reset(stream: trio.SocketStream, on_close: bool) -> None:
    """Set whether closing the socket resets the connection, also when the kernel closes it because
    this process is killed. A Unix socket has no reset."""
    with contextlib.suppress(OSError):
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", on_close, 0))


def reset(stream: trio.SocketStream) -> None:
    """Close with a reset, so that the other end cannot mistake a cut for an orderly end."""
    set_reset(stream, on_close=True)
    stream.socket.close()


def last_attempt(error: OSError) -> BaseException:
    """Return the error of the last address that was tried, or the error itself."""
    cause = error.__cause__
    while isinstance(cause, BaseExceptionGroup) and cause.exceptions:
        cause = cause.exceptions[-1]
    return cause or error


def os_reason(error: OSError) -> str:
    """Return the reason why the last attempt to connect failed."""
    reason = last_attempt(error)
    if not isinstance(reason, OSError) or reason.strerror is None:
        return str(reason)
    if reason.strerror.startswith("Error connecting to") and reason.errno:  # trio's; names it again
        return os.strerror(reason.errno)
    return reason.strerror


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
    last = last_attempt(error)
    if isinstance(last, socket.gaierror):
        return f"{os_reason(error)}; check the host's name"
    advice = _ADVICE.get(last.errno) if isinstance(last, OSError) and last.errno else None
    return f"{os_reason(error)}; {advice}" if advice else os_reason(error)


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
