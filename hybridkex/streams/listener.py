"""SecureListener: makes every accepted stream a secure one, like ``trio.SSLListener``."""

from typing import Generic, TypeVar

from trio.abc import Listener, Stream

from hybridkex.shell.secure_duplex import DEFAULT_HANDSHAKE_TIMEOUT, check_options
from hybridkex.streams.stream import SecureStream
from hybridkex.tls.config import ServerConfig, check_config

T = TypeVar("T", bound=Stream)


class SecureListener(Listener[SecureStream[T]], Generic[T]):
    """Accepts streams and wraps them.

    The handshake does not run here: it runs at the first send or receive, in the task that handles
    the connection, so that a slow peer does not block others.

    Args:
        transport_listener: accepts the streams that carry the records.
        config: identities, verifier and policy.
        https_compatible: see :class:`SecureStream`.
        handshake_timeout: seconds for the handshake; ``math.inf`` for no limit.

    Raises:
        ConfigError: an argument has the wrong type or is out of range.
    """

    def __init__(
        self,
        transport_listener: Listener[T],
        config: ServerConfig,
        *,
        https_compatible: bool = False,
        handshake_timeout: float = DEFAULT_HANDSHAKE_TIMEOUT,
    ) -> None:
        check_config(config, ServerConfig)
        check_options(handshake_timeout, https_compatible=https_compatible)
        self.transport_listener = transport_listener
        self._config = config
        self._https_compatible = https_compatible
        self._handshake_timeout = handshake_timeout

    async def accept(self) -> SecureStream[T]:
        """Accept the next connection; its handshake has not run yet."""
        return SecureStream(
            await self.transport_listener.accept(),
            self._config,
            https_compatible=self._https_compatible,
            handshake_timeout=self._handshake_timeout,
        )

    async def aclose(self) -> None:
        """Stop accepting."""
        await self.transport_listener.aclose()
