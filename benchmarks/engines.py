"""A client, a server and the bytes between them, without a network."""

from collections.abc import Callable

from hybridkex import ClientConfig, ClientConnection, ServerConfig, ServerConnection
from hybridkex.tls.connection import Connection
from hybridkex.tls.events import Event, SessionProposed

__all__ = ["Pair"]


class Pair:
    """Two engines.

    Args:
        client: its configuration.
        server: its configuration.
        name: the name that the server's certificate must have.
        answer: called with an engine and each event that needs more than acceptance.
    """

    def __init__(
        self,
        client: ClientConfig,
        server: ServerConfig,
        name: str | None = "localhost",
        answer: Callable[[Connection, Event], object] | None = None,
    ) -> None:
        self.client, self.server = ClientConnection(client, name), ServerConnection(server)
        self._answer = answer

    def handshake(self) -> "Pair":
        """The whole of it."""
        self.client.start()
        self.carry()
        assert self.client.handshake_complete
        assert self.server.handshake_complete
        return self

    def carry(self) -> None:
        """Carry bytes until neither engine has more to send."""
        client, server, moved = self.client, self.server, True
        while moved:
            moved = False
            for source, target in ((client, server), (server, client)):
                if source.has_data_to_send:
                    moved = True
                    target.receive_data(source.data_to_send())
                while (event := target.next_event()) is not None:
                    if isinstance(event, SessionProposed):
                        target.accept()
                    elif self._answer is not None:
                        self._answer(target, event)
                        moved = True
