"""What holds for a secure stream on every event loop: written once, run on each."""

import asyncio
import os
import random
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from hybridkex import ClientConfig, DevCa, ServerConfig, TrustStore
from hybridkex.errors import (
    AlertReceived,
    CertificateRejected,
    LocalStateError,
    PolicyRefused,
    TruncationError,
)
from hybridkex.net.event_loop import on_trio, sleep, time_limit

CA = DevCa.create()
CLIENT = ClientConfig(verifier=TrustStore((CA.certificate,)), alpn=("b", "a"))
SERVER = ServerConfig(identities=(CA.issue("localhost"),), alpn=("a", "b"))

Talk = Callable[[Any, Any], Awaitable[None]]


async def together(*tasks: Awaitable[Any]) -> None:
    async def run(task: Awaitable[Any]) -> None:
        await task

    if on_trio():
        async with trio.open_nursery() as nursery:
            for task in tasks:
                nursery.start_soon(run, task)
    else:
        await asyncio.gather(*tasks)


@pytest.fixture
def talk(run: Any) -> Callable[[Talk], None]:
    """Runs a conversation between the two ends of a connection with certificates."""
    return partial(run, SimpleNamespace(client=CLIENT, server=SERVER))


def chain(error: BaseException | None) -> list[BaseException]:
    """An exception and its causes."""
    found: list[BaseException] = []
    while error is not None:
        found.append(error)
        error = error.__cause__
    return found


async def echo(end: Any) -> None:
    while data := await end.receive():
        await end.send(data)
    await end.send_eof()


def test_echo(talk: Any) -> None:
    async def conversation(client: Any, server: Any) -> None:
        async def speak() -> None:
            for size in (1, 100, 16_384, 16_385, 300_000):
                data = os.urandom(size)
                await together(client.send(data), check(data))
            await client.send_eof()
            assert await client.receive() == b""

        async def check(data: bytes) -> None:
            assert await client.receive_exactly(len(data)) == data

        await together(echo(server), speak())

    talk(conversation)


def test_the_session_is_the_same_at_both_ends(talk: Any) -> None:
    async def conversation(client: Any, server: Any) -> None:
        assert client.session.group == server.session.group == "X25519MLKEM768"
        assert client.session.alpn == server.session.alpn == "a"
        assert client.session.vouched_names

    talk(conversation)


def test_half_close_in_either_direction(talk: Any) -> None:
    async def conversation(client: Any, server: Any) -> None:
        for one, other in ((client, server), (server, client)):
            await one.send(b"the last of it")
            await one.send_eof()
            assert await other.receive_all() == b"the last of it"
            assert await other.receive() == b""

    talk(conversation)


def test_both_directions_at_once(talk: Any) -> None:
    size = 3 << 20

    async def conversation(client: Any, server: Any) -> None:
        said = {end: random.Random(17).randbytes(size) for end in (client, server)}

        async def speak(end: Any) -> None:
            for start in range(0, size, 100_000):
                await end.send(said[end][start : start + 100_000])
            await end.send_eof()

        async def hear(end: Any, other: Any) -> None:
            assert await end.receive_all() == said[other]

        await together(speak(client), speak(server), hear(client, server), hear(server, client))

    talk(conversation)


def test_keys_change_on_the_way(talk: Any) -> None:
    async def conversation(client: Any, server: Any) -> None:
        for end, other in ((client, server), (server, client)) * 3:
            await end.update_keys()
            await end.send(b"after the change")
            assert await other.receive_exactly(16) == b"after the change"

    talk(conversation)


def test_a_close_is_a_clean_end(talk: Any) -> None:
    async def conversation(client: Any, server: Any) -> None:
        await client.send(b"goodbye")
        await client.close()
        assert await server.receive_all() == b"goodbye"

    talk(conversation)


@pytest.mark.parametrize("unread", [0, 1, 100_000])
@pytest.mark.parametrize("half_closed", [False, True], ids=["close", "half-close, close"])
def test_what_was_sent_before_the_close_arrives(talk: Any, unread: int, half_closed: bool) -> None:
    """The peer is slow, and what it has said is not read: session tickets, for example."""
    data = os.urandom(2_000_000)

    async def conversation(client: Any, server: Any) -> None:
        if unread:
            await server.send(bytes(unread))
        await sleep(0.05)

        async def leave() -> None:
            await client.send(data)
            if half_closed:
                await client.send_eof()
            await client.close()

        async def hear() -> None:
            await sleep(0.1)
            found = bytearray()
            while piece := await server.receive():
                found += piece
                await sleep(0.001)
            assert found == data
            await server.close()

        await together(leave(), hear())

    talk(conversation)


def test_a_cut_is_no_clean_end(talk: Any) -> None:
    async def conversation(client: Any, server: Any) -> None:
        await client.send(b"half of")
        assert await server.receive_exactly(7) == b"half of"
        await client.cut()
        with pytest.raises(Exception, match="cut") as caught:
            await server.receive()
        assert isinstance(caught.value.__cause__.__cause__, TruncationError)

    talk(conversation)


def engine_of(end: Any) -> Any:
    return end.stream._connection if hasattr(end, "stream") else end.writer.transport._life.engine


@pytest.mark.parametrize("found_by", ["data", "cut", "sending"])
def test_the_first_failure_is_raised_whoever_finds_out(talk: Any, found_by: str) -> None:
    """The engine has failed, and a task finds out before the one that knows why tells the stream:
    it raises the reason, and the peer gets the alert."""

    async def conversation(client: Any, server: Any) -> None:
        engine_of(server).abort(PolicyRefused("for the test"))
        sends = found_by == "sending" and server.send_waits
        if found_by == "cut":
            await client.cut()
        elif not sends:
            await client.send(b"late")
        with pytest.raises(Exception, match=r"for the test|cut") as caught:
            await (server.send(b"late") if sends else server.receive())
        assert isinstance(chain(caught.value)[-1], PolicyRefused)
        assert not any(isinstance(one, LocalStateError) for one in chain(caught.value))
        if found_by == "data":
            with pytest.raises(Exception, match=r"the peer sent|cut") as caught:
                await client.receive()
            assert any(isinstance(one, AlertReceived) for one in chain(caught.value))

    talk(conversation)


def test_a_receive_that_is_cancelled_loses_nothing(talk: Any) -> None:
    chance = random.Random(1)

    async def conversation(client: Any, server: Any) -> None:
        data = chance.randbytes(200_000)

        async def speak() -> None:
            for start in range(0, len(data), 5000):
                await client.send(data[start : start + 5000])
                await sleep(chance.random() / 1000)
            await client.send_eof()

        async def hear() -> None:
            found = bytearray()
            while True:
                try:
                    async with time_limit(chance.random() / 1000):
                        piece = await server.receive()
                except TimeoutError:
                    continue
                if not piece:
                    break
                found += piece
            assert found == data

        await together(speak(), hear())

    talk(conversation)


def test_a_reader_that_does_not_read_holds_up_the_writer(talk: Any) -> None:
    async def conversation(client: Any, server: Any) -> None:
        sent = 0

        async def speak() -> None:
            nonlocal sent
            while True:
                await client.send(bytes(1 << 16))
                sent += 1 << 16

        with pytest.raises(TimeoutError):
            async with time_limit(0.5):
                await speak()
        assert sent < 32 << 20  # the kernel's buffers and ours

    talk(conversation)


def test_a_handshake_that_fails(shell: Any) -> None:
    other = replace(CLIENT, verifier=TrustStore((DevCa.create().certificate,)))

    async def main() -> None:
        async with time_limit(20), shell.pair(other, SERVER):
            raise AssertionError("a server that is not trusted")

    with pytest.raises(Exception) as caught:  # a group, on some of them
        shell.run(main)
    kinds = set(map(type, behind(caught.value)))
    assert kinds & {AlertReceived, CertificateRejected}
    assert AssertionError not in kinds


def behind(error: BaseException) -> list[BaseException]:
    """An error and all those behind it."""
    found, left = [], [error]
    while left:
        one = left.pop()
        found.append(one)
        left += one.exceptions if isinstance(one, BaseExceptionGroup) else ()
        left += [more for more in (one.__cause__, one.__context__) if more is not None]
    return found


WRONG: tuple[Any, ...] = (None, 0, 5, 0.0, False, "", "text", [], [1], (), {}, object())


@pytest.mark.parametrize("wrong", WRONG, ids=lambda one: type(one).__name__ + str(bool(one)))
def test_what_is_no_bytes_is_refused(shell: Any, talk: Any, wrong: Any) -> None:
    """At once, and the connection goes on."""
    if shell.name == "piped":
        pytest.skip("the program writes to a socket")

    async def conversation(client: Any, server: Any) -> None:
        for end in (client, server):
            with pytest.raises(TypeError):
                await end.send(wrong)
        for empty in (b"", bytearray(), memoryview(b"")):
            await client.send(empty)
        for data in (b"bytes", bytearray(b"bytes"), memoryview(b"bytes")):
            await client.send(data)
            assert await server.receive_exactly(5) == b"bytes"

    talk(conversation)
