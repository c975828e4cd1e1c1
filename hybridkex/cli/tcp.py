"""TCP for the commands: errors come with the next step."""

import errno
import socket
from typing import Final

from hybridkex.apps.tcp import last_attempt, os_reason
from hybridkex.cli.pipe import ChannelFailed
from hybridkex.errors import ConfigError

__all__ = ["NO_TCP", "cannot_connect", "cannot_listen", "checked_port"]

NO_TCP: Final = (OSError, UnicodeError)
"""What trio raises; ``UnicodeError`` for an impossible host name."""

_ADVICE: Final = {
    errno.ECONNREFUSED: "no program listens there: start the server, or check the port",
    errno.EHOSTUNREACH: "check the address, the route and the firewalls",
    errno.ENETUNREACH: "check the address, the route and the firewalls",
    errno.ETIMEDOUT: "check the address, the route and the firewalls",
    errno.EADDRINUSE: "another program listens there: choose another port, 0 picks one",
    errno.EADDRNOTAVAIL: "this machine has no such address, see 'ip address'",
    errno.EACCES: "ports below 1024 need root or CAP_NET_BIND_SERVICE",
}


def checked_port(port: int) -> int:
    """A valid port number (the C library takes 65536 for 0). Raises ``ConfigError``."""
    if not 0 <= port < 1 << 16:
        raise ConfigError(f"a port must be a number from 0 to 65535, not {port}")
    return port


def cannot_connect(where: object, error: Exception) -> ChannelFailed:
    """The error to raise when there is no connection."""
    return ChannelFailed(f"cannot connect to {where}: {_told(error)}")


def cannot_listen(where: object, error: Exception) -> ChannelFailed:
    """The error to raise when a port cannot be opened."""
    return ChannelFailed(f"cannot listen on {where}: {_told(error)}")


def _told(error: Exception) -> str:
    if not isinstance(error, OSError):
        return "this is not a valid host name"
    last = last_attempt(error)
    if isinstance(last, socket.gaierror):
        return f"{os_reason(error)}; check the host's name"
    advice = _ADVICE.get(last.errno) if isinstance(last, OSError) and last.errno else None
    return f"{os_reason(error)}; {advice}" if advice else os_reason(error)
