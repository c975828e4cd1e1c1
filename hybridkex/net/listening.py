"""Listening sockets of TCP."""

import errno
from typing import Final

import trio

__all__ = ["open_tcp_listeners"]

_ABSENT: Final = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


async def open_tcp_listeners(
    port: int, *, host: str | bytes | None = None, backlog: int | None = None
) -> list[trio.SocketListener]:
    """Listen on ``port`` (0 picks one) of ``host``, or of all interfaces.

    Unlike ``trio.open_tcp_listeners``, a name may have addresses that this machine lacks, as long
    as it has one of them: ``localhost`` is ``127.0.0.1`` and ``::1`` in most hosts files, and
    either may be switched off.

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
