"""TCP for the commands: errors come with the next step."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from hybridkex.apps.tcp import no_connection
from hybridkex.cli.pipe import ChannelFailed
from hybridkex.errors import ConfigError

NO_TCP: Final = (OSError, UnicodeError)
"""The exceptions that trio raises; ``UnicodeError`` for an impossible host name."""


def checked_port(port: int) -> int:
    """A valid port number (the C library takes 65536 for 0). Raises ``ConfigError``."""
    if not 0 <= port < 1 << 16:
        raise ConfigError(f"a port must be a number from 0 to 65535, not {port}")
    return port


def cannot_connect(where: object, error: Exception) -> ChannelFailed:
    return ChannelFailed(f"cannot connect to {where}: {no_connection(error)}")


@contextmanager
def opening(where: object) -> Iterator[None]:
    """A context that opens a port. Raises ``ChannelFailed`` with the reason if it cannot."""
    try:
        yield
    except NO_TCP as error:
        raise ChannelFailed(f"cannot listen on {where}: {no_connection(error)}") from None
