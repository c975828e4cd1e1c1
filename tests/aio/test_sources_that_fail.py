"""Whatever a PSK source or verifier raises ends its own connection, at once and with an alert."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import anyio
import anyio.abc
import pytest
import trio
from aio_glue import Run, closed, connect, serving

from hybridkex import (
    ClientConfig,
    FreshKeys,
    OneTimePad,
    Policy,
    QkdPskSource,
    Requirement,
    SecureStream,
    ServerConfig,
    serve_secure_tcp,
)
from hybridkex.aio import SecureConnectionError
from hybridkex.anyio import SecureByteStream, SecureConnectable, SecureListener
from hybridkex.net.event_loop import on_trio
from hybridkex.qkd.in_process import in_process_pair
from hybridkex.qkd.source import KeySource
from hybridkex.shell.answers import CODE_FAILED


class OfErrors(BaseExceptionGroup[Exception]):
    """A group that is no ``Exception``, although all in it are."""


async def foreign_cancellation() -> BaseException:
    """The cancellation of another task, as the tasks get it that wait for what it does."""
    caught: list[BaseException] = []
    if on_trio():
        with trio.CancelScope() as scope:
            scope.cancel()
            try:
                await trio.sleep_forever()
            except trio.Cancelled as error:
                caught.append(error)
                raise
        return caught[0]
    return asyncio.CancelledError()


async def group_with_a_cancellation() -> BaseException:
    return BaseExceptionGroup("", [KeyError("secret"), await foreign_cancellation()])


async def group_of_errors() -> BaseException:
    return OfErrors("", [KeyError("secret")])


async def generator_exit() -> BaseException:
    return GeneratorExit()


async def error() -> BaseException:
    return KeyError("secret")


ERRORS = (
    error,
    foreign_cancellation,
    group_with_a_cancellation,
    group_of_errors,
    generator_exit,
)
each_error = pytest.mark.parametrize("make", ERRORS, ids=lambda one: one.__name__)


class Failing(QkdPskSource):
    """A PSK source that fails in one of its functions, for the first connection."""

    def __init__(
        self, keys: KeySource, function: str, make: Callable[[], Awaitable[BaseException]]
    ) -> None:
        super().__init__(keys)

        async def fail(*_: object, **__: object) -> Any:
            raise await make()

        def fail_at_once(*_: object) -> Any:
            setattr(self, function, lambda session, missing: session)
            raise asyncio.CancelledError if make is foreign_cancellation else KeyError("secret")

        setattr(self, function, fail_at_once if function == "authorize" else fail)


def configs(
    client: ClientConfig, server: ServerConfig, function: str, make: Any
) -> tuple[ClientConfig, ServerConfig]:
    """Those of a client whose handshake needs an answer of the source, at either end."""
    policy, (alice, bob) = Policy(psk=Requirement.PREFER), in_process_pair("alice", "bob")
    if function == "offer":
        return replace(client, psk_source=Failing(alice, function, make), policy=policy), server
    return (
        replace(client, psk_source=QkdPskSource(alice)),
        replace(server, psk_source=Failing(bob, function, make), policy=policy),
    )


FUNCTIONS = ("offer", "look_up")


@each_error
@pytest.mark.parametrize("function", FUNCTIONS)
def test_on_asyncio(
    run: Run, client_config: ClientConfig, server_config: ServerConfig, function: str, make: Any
) -> None:
    client, server = configs(client_config, server_config, function, make)
    told: list[dict[str, Any]] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
        async with serving(server) as port:
            expected: Any = SecureConnectionError
            if function == "offer":
                expected = KeyError if make is error else RuntimeError
            with pytest.raises(expected) as caught:
                await connect(port, client)
            assert "internal_error" in str(caught.value) or function == "offer"
            _, writer = await connect(port, client_config)  # the server goes on
            await closed(writer)

    run(main())
    # At the client, the caller has got it.
    assert [one["message"] for one in told] == [CODE_FAILED] * (function == "look_up")


@pytest.mark.parametrize("make", [error, foreign_cancellation], ids=["error", "cancellation"])
@pytest.mark.parametrize("asks", ["a source", "nobody"])
def test_a_source_that_refuses_by_an_error_on_asyncio(
    run: Run, client_config: ClientConfig, server_config: ServerConfig, make: Any, asks: str
) -> None:
    """``authorize`` is called in the task that has asked for a key, or where the loop reads."""
    client, server = configs(client_config, server_config, "authorize", make)
    if asks == "nobody":
        client = client_config
    told: list[dict[str, Any]] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
        async with serving(server) as port:

            async def talk() -> None:
                reader, _ = await connect(port, client)
                await reader.read()

            with pytest.raises(SecureConnectionError, match="internal_error"):
                await talk()
            _, writer = await connect(port, client_config)
            await closed(writer)

    run(main())
    assert [one["message"] for one in told] == [CODE_FAILED]


class BadVerifier:
    """A verifier with a bug."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def verify_server(self, *_: object, **__: object) -> Any:
        raise self._error


@pytest.mark.parametrize("make", [error, foreign_cancellation], ids=["error", "cancellation"])
def test_a_verifier_that_fails_on_asyncio(
    run: Run, client_config: ClientConfig, server_config: ServerConfig, make: Any
) -> None:
    told: list[dict[str, Any]] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
        bad = replace(client_config, verifier=BadVerifier(await make()))
        async with serving(server_config) as port:
            with pytest.raises(KeyError if make is error else RuntimeError):
                await connect(port, bad)

    run(main())
    assert told == []  # the caller has got it


@each_error
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_on_anyio(
    backend: str,
    client_config: ClientConfig,
    server_config: ServerConfig,
    function: str,
    make: Any,
) -> None:
    client, server = configs(client_config, server_config, function, make)

    async def echo(stream: SecureByteStream) -> None:
        async with stream:
            await stream.send(await stream.receive())

    async def main() -> None:
        plain = await anyio.create_tcp_listener(local_host="127.0.0.1")
        async with SecureListener(plain, server) as listener, anyio.create_task_group() as group:
            group.start_soon(listener.serve, echo)
            tcp = anyio.TCPConnectable(
                "127.0.0.1", plain.extra(anyio.abc.SocketAttribute.local_port)
            )
            expected: Any = anyio.BrokenResourceError
            if function == "offer":
                expected = KeyError if make is error else RuntimeError
            with pytest.raises(expected) as caught:
                await SecureConnectable(tcp, client, server_hostname="localhost").connect()
            assert function == "offer" or "internal_error" in str(caught.value)
            good = SecureConnectable(tcp, client_config, server_hostname="localhost")
            async with await good.connect() as stream:
                await stream.send(b"x")
                assert await stream.receive() == b"x"
            group.cancel_scope.cancel()

    anyio.run(main, backend=backend)


@each_error
def test_on_trio(client_config: ClientConfig, server_config: ServerConfig, make: Any) -> None:
    """A server goes on."""
    client, server = configs(client_config, server_config, "look_up", make)

    async def echo(stream: SecureStream[Any]) -> None:
        await stream.send_all(await stream.receive_some())

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            [listener] = await nursery.start(
                partial(serve_secure_tcp, echo, 0, server, host="127.0.0.1")
            )
            port = listener.transport_listener.socket.getsockname()[1]
            for config in (client, client_config):
                tcp = await trio.open_tcp_stream("127.0.0.1", port)
                async with SecureStream(tcp, config, server_hostname="localhost") as stream:
                    if config is client:
                        with pytest.raises(trio.BrokenResourceError, match="internal_error"):
                            await stream.do_handshake()
                    else:
                        await stream.send_all(b"x")
                        assert await stream.receive_some() == b"x"
            nursery.cancel_scope.cancel()

    trio.run(main)


# --- questions between the handshake and the end --------------------------------------------------

LATER = ("draw_for_update", "look_up_for_update", "draw_for_pad", "look_up_for_pad")


@each_error
@pytest.mark.parametrize("function", LATER)
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_later_questions(
    backend: str,
    client_config: ClientConfig,
    server_config: ServerConfig,
    function: str,
    make: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The session ends, long before any deadline."""
    sources = [QkdPskSource(one) for one in in_process_pair("alice", "bob")]
    options: dict[str, Any] = {"policy": Policy(psk=Requirement.REQUIRE)}
    if "pad" in function:
        options["one_time_pad"] = OneTimePad(deadline=3600)
    else:
        options["fresh_keys"] = FreshKeys(every=1800, deadline=3600)
        options["policy"] = Policy(psk=Requirement.REQUIRE, fresh_keys=Requirement.REQUIRE)
    client = replace(client_config, psk_source=sources[0], **options)
    server = replace(server_config, psk_source=sources[1], tickets=None, **options)

    async def fail(*_: object, **__: object) -> Any:
        raise await make()

    # The client begins.
    monkeypatch.setattr(sources[0 if "draw" in function else 1], function, fail)

    async def listen(stream: SecureByteStream) -> None:
        async with stream:
            while True:
                await stream.receive()

    async def main() -> None:
        plain = await anyio.create_tcp_listener(local_host="127.0.0.1")
        async with SecureListener(plain, server) as listener, anyio.create_task_group() as group:
            group.start_soon(listener.serve, listen)
            tcp = anyio.TCPConnectable(
                "127.0.0.1", plain.extra(anyio.abc.SocketAttribute.local_port)
            )
            connectable = SecureConnectable(tcp, client, server_hostname="localhost")

            async def send(stream: SecureByteStream) -> None:
                with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
                    if "update" in function:
                        await stream.update_keys()
                    else:
                        await stream.send(bytes(1 << 16))

            with anyio.fail_after(30):
                async with await connectable.connect() as stream:
                    group.start_soon(send, stream)
                    with pytest.raises(anyio.BrokenResourceError):
                        await stream.receive()
            group.cancel_scope.cancel()

    anyio.run(main, backend=backend)
