"""A tunnel resumes nothing: each of its connections has a full handshake."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from hybridkex import ClientConfig, MemoryTicketStore, Pins, RawIdentity, ServerConfig
from hybridkex.apps.tunnel.config import TunnelConfig
from hybridkex.net.address import TcpAddress

IDENTITY = RawIdentity.generate()
HERE = TcpAddress("127.0.0.1", 0)


async def test_neither_end_has_tickets() -> None:
    pins = Pins(frozenset((IDENTITY.pin,)))
    for channel in (
        ClientConfig(verifier=pins, ticket_store=MemoryTicketStore()),
        ServerConfig(identities=(IDENTITY,)),
    ):

        @asynccontextmanager
        async def factory(
            channel: ClientConfig | ServerConfig = channel,
        ) -> AsyncIterator[ClientConfig | ServerConfig]:
            yield channel

        tunnel = TunnelConfig(name="t", local=HERE, forward=HERE, channel=factory)
        async with tunnel.opened() as used:
            if isinstance(used, ClientConfig):
                assert used.ticket_store is None
            else:
                assert used.tickets is None
