"""One authority, and what makes pairs of streams from it."""

from collections.abc import Callable

import pytest
import trio
import trio.testing

from hybridkex import ClientConfig, DevCa, SecureStream, ServerConfig, TrustStore

StreamPair = tuple[SecureStream[trio.abc.Stream], SecureStream[trio.abc.Stream]]


@pytest.fixture(scope="session")
def stream_ca() -> DevCa:
    return DevCa.create()


@pytest.fixture(scope="session")
def client_config(stream_ca: DevCa) -> ClientConfig:
    return ClientConfig(verifier=TrustStore((stream_ca.certificate,)))


@pytest.fixture(scope="session")
def server_config(stream_ca: DevCa) -> ServerConfig:
    return ServerConfig(identities=(stream_ca.issue("localhost"),))


@pytest.fixture
def make_pair(
    client_config: ClientConfig, server_config: ServerConfig
) -> Callable[..., StreamPair]:
    def make(
        transports: Callable[[], StreamPair] = trio.testing.memory_stream_pair, **options: object
    ) -> StreamPair:
        one, other = transports()
        return (
            SecureStream(one, client_config, server_hostname="localhost", **options),
            SecureStream(other, server_config, **options),
        )

    return make
