"""Listening sockets of TCP."""

import errno
import socket
from collections.abc import Iterable
from contextlib import AsyncExitStack
from typing import Final

import trio

from hybridkex.net.address import TcpAddress

_ABSENT: Final = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


async def open_tcp_listeners(
    port: int, *, host: str | bytes | None = None, backlog: int | None = None
) -> list[trio.SocketListener]:
    """Listen on ``port`` (0 picks one) of ``host``, or of all interfaces.

    Unlike ``trio.open_tcp_listeners``, a name may have addresses that this machine lacks, as long
    as it has one of them: ``localhost`` is ``127.0.0.1`` and ``::1`` in most hosts files, and
    IPv4 or IPv6 may be disabled.

    Raises:
        OSError: cannot listen there.
    """
    try:
        return await trio.open_tcp_listeners(port, host=host, backlog=backlog)
    except OSError as error:
        if host is None or error.errno not in _ABSENT:
            raise
        absent = error
    found = await trio.socket.getaddrinfo(host, port, type=trio.socket.SOCK_STREAM)
    listeners: list[trio.SocketListener] = []
    try:
        for address in dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found):
            try:
                listeners += await trio.open_tcp_listeners(port, host=address, backlog=backlog)
            except OSError as error:
                if error.errno not in _ABSENT:
                    raise
    except BaseException:
        for listener in listeners:
            await trio.aclose_forcefully(listener)
        raise
    if not listeners:
        raise absent
    return listeners


async def open_shared_listeners(port: int, *, host: str) -> list[trio.SocketListener]:
    """Listen on a port on which other processes of this user may listen, too.

    The kernel gives each connection to one of them (``SO_REUSEPORT``, socket(7)).

    Raises:
        OSError: cannot listen there.
    """
    found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    listeners: list[trio.SocketListener] = []
    absent: OSError | None = None
    try:
        for family, kind, protocol, _, address in found:
            listener = trio.socket.socket(family, kind, protocol)
            try:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                if family == socket.AF_INET6:
                    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                await listener.bind(address)
                listener.listen(socket.SOMAXCONN)
            except OSError as error:
                listener.close()
                if error.errno not in _ABSENT:
                    raise
                absent = error
            else:
                listeners.append(trio.SocketListener(listener))
    except BaseException:
        for one in listeners:
            await trio.aclose_forcefully(one)
        raise
    if not listeners and absent is not None:
        raise absent
    return listeners


async def check_listening(addresses: Iterable[TcpAddress]) -> None:
    """Check that one process can listen at all of these addresses, by doing so for a moment.

    If another process listens there, it may be the service that is being checked; it is not
    disturbed.

    Raises:
        OSError: cannot listen; its ``filename`` is the address.
    """
    ours = set()
    async with AsyncExitStack() as stack:
        for address in addresses:
            try:
                listeners = await open_tcp_listeners(address.port, host=address.host)
            except OSError as error:
                if error.errno != errno.EADDRINUSE or address.port in ours:
                    error.filename = str(address)
                    raise
            else:
                ours.add(address.port)
                for listener in listeners:
                    stack.push_async_callback(listener.aclose)
