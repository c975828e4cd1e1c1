"""The configuration of one tunnel, and the settings of a process that runs tunnels."""

import math
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Final, TypeAlias

from hybridkex import ClientConfig, ClientConnection, ServerConfig, canonical_peer_name
from hybridkex.errors import ConfigError
from hybridkex.net.address import Address, TcpAddress, UnixAddress

ConfigFactory: TypeAlias = Callable[[], AbstractAsyncContextManager[ClientConfig | ServerConfig]]
"""Reads the certificates and opens the key sources of a channel, for the duration of the context.

With a ``ServerConfig``, accepted connections are secure and connections to the target are plain;
with a ``ClientConfig``, it is the other way round.
"""


@dataclass(frozen=True, kw_only=True)
class TunnelConfig:
    """One tunnel: where it listens, where it forwards connections, and the channel of its secure
    side.

    Args:
        name: identifies it in logs and metrics.
        local: the address to listen on.
        forward: the address to forward connections to.
        channel: see :data:`ConfigFactory`.
        server_name: the name in the server's certificate, if not the host of ``forward``.
        bind: the local address of connections to ``forward``, ``None`` for any.
        allowed: the peer must have one of these verified names (DNS names, IP addresses and URIs in
            the subjectAltName, never the common name) or keys (``sha256:`` and a pin); empty: every
            peer that the channel's configuration accepts.
        max_connections: the maximum number of simultaneous connections; more are refused.
        handshake_timeout: seconds for a handshake.
        connect_timeout: seconds for connecting to ``forward``.
        idle_timeout: seconds without data in either direction after which a connection is cut;
            ``None`` for no limit.
        socket_mode: the permissions of ``local`` if it is a Unix socket.
        port_file: a file to write the TCP port of ``local`` to; ``None`` for none.
        json: log sessions as JSON.
        sole: the part of ``channel`` that only one process can use, for a message; ``None`` for
            none.

    Raises:
        ConfigError: a value is invalid.
    """

    name: str
    local: Address
    forward: Address
    channel: ConfigFactory
    server_name: str | None = None
    bind: str | None = None
    allowed: frozenset[str] = frozenset()
    max_connections: int = 256
    handshake_timeout: float = 10.0
    connect_timeout: float = 10.0
    idle_timeout: float | None = None
    socket_mode: int = 0o600
    json: bool = False
    port_file: Path | None = None
    sole: str | None = None

    def __post_init__(self) -> None:
        allowed = frozenset(map(canonical_peer_name, self.allowed))
        object.__setattr__(self, "allowed", allowed)
        if not self.name:
            raise ConfigError("a tunnel needs a name")
        if self.max_connections < 1:
            raise ConfigError(f"{self.name}: max_connections must be at least 1")
        limits = (self.handshake_timeout, self.connect_timeout, self.idle_timeout)
        if not all(limit is None or 0 < limit < math.inf for limit in limits):
            raise ConfigError(f"{self.name}: time limits must be positive numbers of seconds")
        if self.bind is not None:
            try:
                ip_address(self.bind)
            except ValueError:
                raise ConfigError(f"{self.name}: bind is not an IP address") from None
        if not 0 <= self.socket_mode <= 0o777:
            raise ConfigError(f"{self.name}: the mode of a socket must be 000 to 777")

    @property
    def expected_name(self) -> str | None:
        """The name that the server at ``forward`` must have, for a client.

        Raises:
            ConfigError: ``forward`` is a Unix socket, and ``server_name`` is missing.
        """
        if self.server_name is not None:
            return self.server_name
        if isinstance(self.forward, UnixAddress):
            raise ConfigError(f"{self.name}: the server at {self.forward} needs a server_name")
        return self.forward.host

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[ClientConfig | ServerConfig]:
        """Open the channel for the duration of the context.

        It uses no session tickets: every connection of a tunnel has a full handshake and, with QKD,
        its own key.

        Raises:
            ConfigError: one of its files cannot be used.
        """
        async with self.channel() as channel:
            if isinstance(channel, ClientConfig):
                ClientConnection(channel, self.expected_name)  # now, not at the first connection
                yield replace(channel, ticket_store=None)
            else:
                yield replace(channel, tickets=None)

    @property
    def endpoint(self) -> tuple[Address, str]:
        """The identity of a listening socket across changes of the configuration."""
        any_port = isinstance(self.local, TcpAddress) and self.local.port == 0
        return self.local, self.name if any_port else ""


def check_together(tunnels: Collection[TunnelConfig]) -> None:
    """Raise ``ConfigError`` if there are no tunnels, or two of them conflict."""
    if not tunnels:
        raise ConfigError("no tunnel is configured")
    names: set[str] = set()
    endpoints: dict[tuple[Address, str], str] = {}
    for tunnel in tunnels:
        if tunnel.name in names:
            raise ConfigError(f"two tunnels have the name {tunnel.name}")
        if tunnel.endpoint in endpoints:
            raise ConfigError(
                f"{endpoints[tunnel.endpoint]} and {tunnel.name} both listen on {tunnel.local}"
            )
        names.add(tunnel.name)
        endpoints[tunnel.endpoint] = tunnel.name


MOST_WORKERS: Final = 256


@dataclass(frozen=True, kw_only=True)
class TunnelSettings:
    """The settings of a process.

    Args:
        tunnels: at least one.
        metrics: the address to serve Prometheus metrics on; ``None`` for none.
        grace: seconds for open connections after SIGTERM.
        log_level: ``debug``, ``info``, ``warning`` or ``error``.
        workers: processes that serve the tunnels; with 1, the process itself does.
        recipe: makes the same settings in another process, for more than one worker; it can be
            pickled.

    Raises:
        ConfigError: a value is invalid, or two tunnels conflict.
    """

    tunnels: tuple[TunnelConfig, ...]
    metrics: TcpAddress | None = None
    grace: float = 30.0
    log_level: str = "info"
    workers: int = 1
    recipe: "Callable[[], TunnelSettings] | None" = None

    def __post_init__(self) -> None:
        check_together(self.tunnels)
        if not 0 <= self.grace < math.inf:
            raise ConfigError("grace must be a number of seconds, 0 or more")
        if not 1 <= self.workers <= MOST_WORKERS:
            raise ConfigError(f"workers must be 1 to {MOST_WORKERS}")
        for tunnel in self.tunnels:
            if tunnel.max_connections < self.workers:
                raise ConfigError(
                    f"{tunnel.name}: max_connections is shared by {self.workers} workers, and must "
                    "be at least as many"
                )
            if self.workers > 1 and tunnel.sole:
                raise ConfigError(
                    f"{tunnel.name}: {tunnel.sole} is used by one process only: set workers to 1"
                )
