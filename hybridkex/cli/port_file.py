"""``--port-file``: tells whoever started a server where it listens."""

import trio

from hybridkex.errors import ConfigError
from hybridkex.files import PUBLIC, write_file

__all__ = ["write_port"]


def write_port(path: str | None, listener: trio.SocketListener) -> None:
    """Write the listener's port to a file, if one was asked for. Raises ``ConfigError``."""
    if path is None:
        return
    port = listener.socket.getsockname()[1]
    # Whole when it appears: whoever waits for the file reads it at once.
    try:
        write_file(path, f"{port}\n".encode("ascii"), mode=PUBLIC)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None
