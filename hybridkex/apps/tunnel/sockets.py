"""Listening and connecting, whatever kind the address is of."""

import errno
import os
import socket
import stat
from typing import Final

import trio

from hybridkex.apps.tcp import os_reason
from hybridkex.errors import ConfigError
from hybridkex.net.address import Address, UnixAddress

__all__ = ["connect", "listen", "set_mode", "unlink"]

_BACKLOG: Final = 4096
"""Of a Unix socket; the kernel lowers it to its own limit (listen(2))."""


async def connect(address: Address, *, bind: str | None = None) -> trio.SocketStream:
    """Raises ``OSError``."""
    if isinstance(address, UnixAddress):
        return await trio.open_unix_socket(address.path)
    return await trio.open_tcp_stream(address.host, address.port, local_address=bind)


async def listen(address: Address, *, mode: int) -> list[trio.SocketListener]:
    """Listen; a Unix socket that a dead process left behind is replaced.

    Raises:
        ConfigError: it cannot be.
    """
    try:
        if isinstance(address, UnixAddress):
            return [_listen_unix(address.path, mode)]
        return await trio.open_tcp_listeners(address.port, host=address.host)
    except OSError as error:
        raise ConfigError(f"cannot listen on {address}: {os_reason(error)}") from None


def _listen_unix(path: str, mode: int) -> trio.SocketListener:
    _remove_stale(path)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # The mode is there from the first moment: bind takes it from the umask (unix(7)).
        before = os.umask(0o777 & ~mode)
        try:
            server.bind(path)
        finally:
            os.umask(before)
        server.listen(_BACKLOG)
        server.setblocking(False)
        return trio.SocketListener(trio.socket.from_stdlib_socket(server))
    except BaseException:
        server.close()
        raise


def _remove_stale(path: str) -> None:
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise ConfigError(f"cannot listen on unix:{path}: there is something that is no socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        found = probe.connect_ex(path)
    if found != errno.ECONNREFUSED:
        raise ConfigError(f"cannot listen on unix:{path}: another process does")
    os.unlink(path)


def set_mode(address: Address, mode: int) -> None:
    """Give the listening Unix socket new permissions."""
    if isinstance(address, UnixAddress):
        os.chmod(address.path, mode)


def unlink(address: Address) -> None:
    """Take the name of a closed listening Unix socket away."""
    if isinstance(address, UnixAddress):
        try:
            os.unlink(address.path)
        except FileNotFoundError:
            return
