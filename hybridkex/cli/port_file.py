"""``--port-file``: tells whoever started a server where it listens."""

from pathlib import Path

import trio

from hybridkex.errors import ConfigError

__all__ = ["write_port"]


def write_port(path: str | None, listener: trio.SocketListener) -> None:
    """Write the listener's port to a file, if one was asked for. Raises ``ConfigError``."""
    if path is None:
        return
    port = listener.socket.getsockname()[1]
    # Under its final name only when it is whole: whoever waits for the file reads it at once.
    temporary = Path(f"{path}.new")
    try:
        temporary.write_text(f"{port}\n")
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None
