"""Free ports of 127.0.0.1, for servers whose port must be known before they listen."""

import secrets
import socket
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Final

__all__ = ["free_port"]

_CLAIMS: Final[list[socket.socket]] = []
"""An abstract Unix socket for each port that this process was given (unix(7)): its name can be
bound once, and the system releases it when the process ends, however it ends."""


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on, and that nobody else is given from here until
    this process ends.

    A port that the system chose and that was closed again may be taken at any moment, for a
    connection of another program. This one lies outside the range of such ports, so that a server
    may also be stopped and started again on it.
    """
    for port in _candidates():
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0hybridkex-port-{port}")
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            claim.close()
        else:
            _CLAIMS.append(claim)
            return port
    raise OSError("no TCP port of 127.0.0.1 is free")


def _candidates() -> Iterator[int]:
    """The ports outside the range for outgoing connections (ip(7), ip_local_port_range), from one
    on that is chosen at random."""
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    ports = [*chain(range(10_000, low), range(high + 1, 1 << 16))]
    first = secrets.randbelow(len(ports))
    return chain(ports[first:], ports[:first])
