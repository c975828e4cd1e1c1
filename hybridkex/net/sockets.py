"""The system's data about an accepted connection: the peer, and the bytes in flight."""

import contextlib
import fcntl
import select
import socket
import struct
import sys
import termios
from typing import Any, Final, Protocol

SILENCE: Final = 45
"""Seconds without acknowledgements after which a peer is considered gone."""


class Carrier(Protocol):
    """An object with a socket, such as a :class:`trio.SocketStream`."""

    @property
    def socket(self) -> Any:
        """A socket, or an object with its methods ``fileno``, ``getpeername`` and
        ``getsockopt``."""


def has_unread(transport: Carrier | None) -> bool:
    """Return whether bytes of the peer, or the end of its data, wait for us to read them."""
    return transport is not None and is_readable(transport.socket)


def is_readable(one: socket.socket) -> bool:
    """Return whether an open socket has unread bytes, or the end of the peer's data."""
    if one.fileno() < 0:
        return False
    poll = select.poll()
    poll.register(one.fileno(), select.POLLIN)
    return bool(poll.poll(0))


def has_unsent(transport: Carrier | None) -> bool:
    """Return whether bytes that we sent wait for the peer (tcp(7) and unix(7), SIOCOUTQ)."""
    if transport is None or transport.socket.fileno() < 0:
        return False
    count = bytearray(4)
    try:
        fcntl.ioctl(transport.socket.fileno(), termios.TIOCOUTQ, count)
    except OSError:
        return False
    return any(count)


def silence_of(transport: Carrier | None) -> float:
    """Return the seconds since a TCP connection last carried data in either direction (Linux,
    tcp(7), TCP_INFO); negative if unknown."""
    if transport is None or not sys.platform.startswith("linux"):
        return -1.0
    try:
        info = transport.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _LAST_DATA.size)
        sent, received = _LAST_DATA.unpack(info)
    except (OSError, struct.error):  # a Unix socket, or closed
        return -1.0
    return float(min(sent, received)) / 1000


_LAST_DATA: Final = struct.Struct("=44xI4xI")
"""tcpi_last_data_sent and tcpi_last_data_recv of struct tcp_info, in milliseconds."""


def peer_name(transport: Carrier | None) -> str:
    """The address of the other end for a log line."""
    try:
        where = transport.socket.getpeername() if transport is not None else ""
    except OSError:
        return "a peer that is gone"
    if not isinstance(where, tuple):
        return "a local program"
    host, port = where[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def network_of(transport: Carrier | None) -> str:
    """The peer's network: an IPv4 address, the /64 prefix of an IPv6 address, the user ID of a
    local program, or empty."""
    try:
        where = transport.socket.getpeername() if transport is not None else ""
    except OSError:
        return ""
    if not isinstance(where, tuple):
        return _local_user(transport)
    host = str(where[0])
    if ":" not in host:
        return host
    packed = socket.inet_pton(socket.AF_INET6, host.partition("%")[0])
    return packed[:8].hex() if packed[:12] != _MAPPED else packed[12:].hex()


def _local_user(transport: Carrier | None) -> str:
    """Return the user ID of the peer of a Unix socket (unix(7), SO_PEERCRED)."""
    if transport is None or not hasattr(socket, "SO_PEERCRED"):
        return ""
    try:
        found = transport.socket.getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size
        )
    except OSError:
        return ""
    return f"uid {_CREDENTIALS.unpack(found)[1]}"


_CREDENTIALS: Final = struct.Struct("=3i")
"""struct ucred: process, user and group."""

_MAPPED: Final = bytes(10) + b"\xff\xff"
"""The prefix of an IPv4 address in an IPv6 socket (RFC 4291 section 2.5.5.2)."""


def keep_alive(stream: Carrier) -> None:
    """Let the kernel end an idle connection whose peer has vanished.

    This is better than a time limit on data: a peer that is busy, or waits for user input, still
    acknowledges (tcp(7)).
    """
    with contextlib.suppress(OSError):  # not TCP
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        stream.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, SILENCE // 3)
        stream.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, SILENCE // 9)
        stream.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 6)


def watch_peer(stream: Carrier) -> None:
    """Like :func:`keep_alive`, but also while data is in flight (RFC 5482).

    Linux also counts a peer that acknowledges but does not read as silent: use this only if the
    peer always reads.
    """
    keep_alive(stream)
    with contextlib.suppress(OSError):
        stream.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE * 1000)
