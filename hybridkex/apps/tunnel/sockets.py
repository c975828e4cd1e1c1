"""Listening and connecting, for TCP and Unix addresses."""

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Iterable
from typing import Final

import trio

from hybridkex.apps.port_file import check_new_file, write_port
from hybridkex.apps.tcp import no_connection
from hybridkex.apps.tunnel.config import TunnelConfig, TunnelSettings
from hybridkex.errors import ConfigError, HybridkexError
from hybridkex.files import change_mode
from hybridkex.net.address import Address, TcpAddress, UnixAddress
from hybridkex.net.listening import check_listening, open_tcp_listeners
from hybridkex.text import get_logger

LOG: Final = get_logger("hybridkex.tunnel")

_BACKLOG: Final = 4096
"""The backlog of a Unix socket; the kernel caps it at its own limit (listen(2))."""


async def connect(address: Address, *, bind: str | None = None) -> trio.SocketStream:
    """Connect to an address. Raises ``OSError``."""
    if isinstance(address, UnixAddress):
        return await trio.open_unix_socket(address.path)
    return await trio.open_tcp_stream(address.host, address.port, local_address=bind)


class Listening:
    """The listening sockets of one address.

    A Unix socket has a name in the file system, which others can remove or replace: we change or
    remove the name only while it refers to our socket.

    Args:
        address: what they listen on.
        listeners: the sockets.
        owned: whether the name is ours; otherwise another process looks after it.
    """

    def __init__(
        self, address: Address, listeners: list[trio.SocketListener], *, owned: bool = True
    ) -> None:
        self.address: Final = address
        self.listeners: Final = listeners
        self._inode = _inode(address.path) if owned and isinstance(address, UnixAddress) else None

    @property
    def bound(self) -> Address:
        """The address, with the actual port."""
        if isinstance(self.address, UnixAddress):
            return self.address
        return TcpAddress(self.address.host, self.listeners[0].socket.getsockname()[1])

    @property
    def reachable(self) -> bool:
        """Whether the name of a Unix socket still refers to it; true for TCP."""
        return self._inode is None or (
            isinstance(self.address, UnixAddress) and _inode(self.address.path) == self._inode
        )

    def set_mode(self, mode: int) -> int | None:
        """Change the permissions of a Unix socket; returns the previous ones.

        Raises:
            ConfigError: the file system refuses.
        """
        if self._inode is None or not isinstance(self.address, UnixAddress):
            return None
        try:
            before = stat.S_IMODE(os.lstat(self.address.path).st_mode)
            if before != mode:
                change_mode(self.address.path, mode, inode=self._inode)
        except OSError as error:
            raise ConfigError(
                f"cannot change the permissions of {self.address}: {error.strerror}"
            ) from None
        return before

    def unlink(self) -> None:
        if self._inode and isinstance(self.address, UnixAddress) and self.reachable:
            with contextlib.suppress(OSError):
                os.unlink(self.address.path)

    async def aclose(self) -> None:
        """Close the sockets and remove the name."""
        for listener in self.listeners:
            await listener.aclose()
        self.unlink()


def _inode(path: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


class LostNames:
    """Reports that Unix sockets have lost their names; the same failure only once."""

    def __init__(self) -> None:
        self._failures: dict[str, str] = {}

    def found(self, config: TunnelConfig) -> None:
        self._failures.pop(config.name, None)

    def failed(self, config: TunnelConfig, error: HybridkexError) -> None:
        if self._failures.get(config.name) != str(error):
            LOG.error(
                "%s: its socket was removed or replaced and cannot be opened again: %s; it "
                "accepts no connections; retrying",
                *(config.name, error),
            )
        self._failures[config.name] = str(error)

    def opened(self, config: TunnelConfig) -> None:
        self.found(config)
        LOG.warning(
            "%s: the socket %s was removed or replaced; it has been created again",
            *(config.name, config.local),
        )


async def listen_for(config: TunnelConfig) -> Listening:
    """Listen where a tunnel does. Raises as :func:`listen`."""
    return await listen(config.local, mode=config.socket_mode)


async def listen(address: Address, *, mode: int) -> Listening:
    """Listen on an address; replaces a Unix socket that a dead process left behind.

    Raises:
        ConfigError: we cannot listen there.
    """
    try:
        if isinstance(address, UnixAddress):
            return Listening(address, [_listen_unix(address.path, mode)])
        return Listening(address, list(await open_tcp_listeners(address.port, host=address.host)))
    except OSError as error:
        raise ConfigError(f"cannot listen on {address}: {no_connection(error)}") from None
    except ConfigError:
        raise
    except ValueError as error:  # a NUL in a path, an impossible host name
        raise ConfigError(f"cannot listen on {str(address)!r}: {error}") from None


def _listen_unix(path: str, mode: int) -> trio.SocketListener:
    _remove_stale(path)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # The mode applies from the start: bind takes it from the umask (unix(7)).
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


async def check_local(settings: TunnelSettings) -> None:
    """Check that tunnels can listen and write their port files, without serving.

    Raises:
        ConfigError: what they cannot do.
    """
    addresses: list[Address | None] = [settings.metrics, *(one.local for one in settings.tunnels)]
    try:
        await check_listening(one for one in addresses if isinstance(one, TcpAddress))
        for tunnel in settings.tunnels:
            if isinstance(tunnel.local, UnixAddress):
                _is_socket(tunnel.local.path)
                check_new_file(tunnel.local.path)
            elif tunnel.port_file is not None:
                check_new_file(tunnel.port_file)
    except OSError as error:
        raise ConfigError(f"cannot listen on {error.filename}: {no_connection(error)}") from None


def _is_socket(path: str) -> bool:
    """Whether there is a socket. Raises ``ConfigError`` for something else."""
    if os.path.lexists(path) and not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise ConfigError(
            f"cannot listen on unix:{path}: something that is not a socket is there; "
            "choose another path"
        )
    return os.path.lexists(path)


def _remove_stale(path: str) -> None:
    if not _is_socket(path):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        found = probe.connect_ex(path)
    if found != errno.ECONNREFUSED:
        raise ConfigError(f"cannot listen on unix:{path}: another process listens there")
    os.unlink(path)


def write_ports(opened: Iterable[tuple[TunnelConfig, Listening]]) -> None:
    """Write the actual ports of tunnels to their ``port_file``, once all of these can be written.

    Raises:
        ConfigError: one of them cannot.
    """
    ports = [
        (config.port_file, listening.bound.port)
        for config, listening in opened
        if config.port_file is not None and isinstance(listening.bound, TcpAddress)
    ]
    for path, _ in ports:
        check_new_file(path)
    for path, port in ports:
        write_port(path, port)
