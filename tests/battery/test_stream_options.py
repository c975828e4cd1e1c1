"""The options of streams and listeners are checked when these are made, not at a connection."""

import math
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest
import trio
import trio.testing

from hybridkex import (
    ClientConfig,
    DevCa,
    SecureListener,
    SecureStream,
    ServerConfig,
    TrustStore,
    open_secure_tcp_listeners,
    open_secure_tcp_stream,
    serve_secure_tcp,
)
from hybridkex.anyio import SecureByteStream, SecureConnectable
from hybridkex.anyio import SecureListener as AnyioListener
from hybridkex.errors import ConfigError
from hybridkex.machine import leaves

CA = DevCa.create()
CLIENT = ClientConfig(verifier=TrustStore((CA.certificate,)))
SERVER = ServerConfig(identities=(CA.issue("localhost"),))


async def nothing(*_: Any) -> None:
    """A handler."""


async def stream(**options: Any) -> None:
    SecureStream(trio.testing.memory_stream_pair()[0], CLIENT, **options)


async def listener(**options: Any) -> None:
    [one] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with one:
        SecureListener(one, SERVER, **options)


async def listeners(**options: Any) -> None:
    for one in await open_secure_tcp_listeners(0, SERVER, host="127.0.0.1", **options):
        await one.aclose()


async def connect(**options: Any) -> None:
    [one] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with one:
        port = one.socket.getsockname()[1]
        await (
            await open_secure_tcp_stream("127.0.0.1", port, CLIENT, **options)
        ).transport_stream.aclose()


async def serve(**options: Any) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(lambda task_status: serve_secure_tcp(
            nothing, 0, SERVER, host="127.0.0.1", task_status=task_status, **options
        ))  # fmt: skip
        nursery.cancel_scope.cancel()


async def anyio_listener(**options: Any) -> None:
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as one:
        AnyioListener(one, SERVER, **options)


async def anyio_connectable(**options: Any) -> None:
    SecureConnectable(
        anyio.as_connectable(("127.0.0.1", 1)), CLIENT, server_hostname="x", **options
    )


TRIO = (stream, listener, listeners, connect, serve)
ANYIO = (anyio_listener, anyio_connectable)
WRONG = (None, 0, 0.0, -1, -math.inf, math.nan, 10**400, True, "10", b"10", [10], object())


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("make", [*TRIO, *ANYIO])
def test_a_time_limit(make: Callable[..., Awaitable[None]], wrong: Any) -> None:
    async def main(limit: Any) -> None:
        await make(handshake_timeout=limit)

    for right in (0.1, 10, math.inf):
        trio.run(main, right)
    with pytest.raises((ConfigError, ExceptionGroup)) as caught:
        trio.run(main, wrong)
    found = [str(one) for one in leaves(caught.value)]
    assert any("handshake_timeout takes seconds above 0" in one for one in found)


@pytest.mark.parametrize("wrong", ["no", "false", 0, 1, None, object()])
@pytest.mark.parametrize("make", [*TRIO, *ANYIO])
def test_a_switch(make: Callable[..., Awaitable[None]], wrong: Any) -> None:
    """``"no"`` is true."""
    name = "https_compatible" if make in TRIO else "standard_compatible"

    async def main(value: Any) -> None:
        await make(**{name: value})

    for right in (True, False):
        trio.run(main, right)
    with pytest.raises((ConfigError, ExceptionGroup)) as caught:
        trio.run(main, wrong)
    assert any(f"{name} takes True or False" in str(one) for one in leaves(caught.value))


@pytest.mark.parametrize("wrong", WRONG)
async def test_a_byte_stream(wrong: Any) -> None:
    ours, _ = trio.testing.memory_stream_pair()
    with pytest.raises(ConfigError, match="handshake_timeout takes seconds above 0"):
        await SecureByteStream.wrap(ours, CLIENT, handshake_timeout=wrong)  # type: ignore[arg-type]
