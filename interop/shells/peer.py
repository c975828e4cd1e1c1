"""The peer of a program: a socket, and OpenSSL's TLS in memory, driven step by step."""

import contextlib
import socket
import ssl
import struct
import zlib
from typing import Final

__all__ = ["Peer"]

_READ: Final = 1 << 16


class Peer:
    """The other end of a connection.

    Args:
        connection: its socket.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket: Final = connection
        self._tls: ssl.SSLObject | None = None
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._segments: list[bytes] = []
        self._shaken = True
        self._ends = False
        self._ended = False
        self.reading = True
        self.received = 0
        self.checksum = 0
        self.end = ""
        """How the other side ended: ``clean``, ``cut``, or empty while it has not."""

    def start_tls(self, context: ssl.SSLContext, *, server_side: bool) -> None:
        """Begin a handshake."""
        self._tls = context.wrap_bio(
            self._incoming,
            self._outgoing,
            server_side=server_side,
            server_hostname=None if server_side else "localhost",
        )
        self._shaken = False

    @property
    def ready(self) -> bool:
        """Whether the handshake is complete."""
        return self._shaken

    def send(self, data: bytes, segments: int = 1) -> None:
        """Send data, in so many segments."""
        if self._ends:
            return
        if self._tls is not None:
            with contextlib.suppress(ssl.SSLError):
                self._tls.write(data)
            data = self._outgoing.read()
        size = max(1, -(-len(data) // segments))
        self._segments += [data[at : at + size] for at in range(0, len(data), size)]

    def finish(self) -> None:
        """End our direction, with close_notify over TLS."""
        if not self._ends and self._tls is not None:
            with contextlib.suppress(ssl.SSLError):
                self._tls.unwrap()
            self._segments.append(self._outgoing.read())
        self._ends = True

    def cut(self) -> None:
        """End our direction of TCP, without close_notify."""
        self._ends = True

    def reset(self) -> None:
        """Reset the connection."""
        if self._socket.fileno() < 0:
            return
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def move(self) -> bool:
        """Send one segment and receive what has come, without waiting; whether anything moved."""
        if self._socket.fileno() < 0:
            return False
        moved = self._receive() if self.reading else False
        try:
            if self._segments:
                sent = self._socket.send(self._segments[0])
                self._segments[0] = self._segments[0][sent:]
                if not self._segments[0]:
                    del self._segments[0]
                return True
            if self._ends and not self._ended:
                self._ended = True
                self._socket.shutdown(socket.SHUT_WR)
                return True
        except BlockingIOError:
            return moved
        except OSError:
            self._segments.clear()
        return moved

    def _receive(self) -> bool:
        if self.end == "cut" or (self.end and self._tls is None):
            return False
        try:
            data = self._socket.recv(_READ)
        except BlockingIOError:
            return False
        except OSError:
            self.end = self.end or "cut"
            return True
        if self._tls is None:
            if data:
                self._take(data)
            else:
                self.end = "clean"
            return True
        if not data:
            closed, self.end = not self.end, self.end or "cut"
            return closed
        self._incoming.write(data)
        self._decrypt(self._tls)
        return True

    def _decrypt(self, tls: ssl.SSLObject) -> None:
        try:
            if not self._shaken:
                tls.do_handshake()
                self._shaken = True
            while data := tls.read(_READ):
                self._take(data)
            self.end = self.end or "clean"
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self.end = self.end or "clean"
        except ssl.SSLError as error:
            self.end = self.end or f"cut by {error.reason}"
        if self._outgoing.pending:
            self._segments.append(self._outgoing.read())

    def begin(self) -> None:
        """Send the first flight of a client."""
        assert self._tls is not None
        self._decrypt(self._tls)

    def _take(self, data: bytes) -> None:
        self.received += len(data)
        self.checksum = zlib.crc32(data, self.checksum)
