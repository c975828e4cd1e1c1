"""SecureStream beside what ``trio.SSLStream`` promises."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import trio
import trio.testing

from hybridkex import (
    ClientConfig,
    DevCa,
    MemoryTicketStore,
    SecureListener,
    SecureStream,
    ServerConfig,
    TrustStore,
)
from hybridkex.errors import (
    AlertReceived,
    BadRecordMac,
    CertificateRejected,
    HandshakeTimeout,
    LocalStateError,
    TruncationError,
)

MakePair = Callable[..., Any]


async def together(*calls: Callable[[], Any]) -> None:
    async with trio.open_nursery() as nursery:
        for call in calls:
            nursery.start_soon(call)


async def shaken(make_pair: MakePair, *args: Any, **options: Any) -> Any:
    pair = make_pair(*args, **options)
    await together(pair[0].do_handshake, pair[1].do_handshake)
    return pair


@pytest.mark.parametrize("first", ["receive", "send", "both", "handshake twice"])
async def test_the_handshake_runs_when_it_is_needed(make_pair: MakePair, first: str) -> None:
    """Whatever comes first runs it, and two tasks that need it run it once."""
    client, server = make_pair()

    async def send(stream: Any) -> None:
        await stream.send_all(b"from me")

    async def receive(stream: Any) -> None:
        assert await stream.receive_some() == b"from me"

    one, other = (receive, send) if first == "receive" else (send, receive)
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one, client)
            nursery.start_soon(other, server)
            if first == "both":
                nursery.start_soon(receive, client)
                nursery.start_soon(send, server)
            elif first == "handshake twice":
                nursery.start_soon(client.do_handshake)
                nursery.start_soon(server.do_handshake)
    assert client.session.group == server.session.group == "X25519MLKEM768"
    with trio.testing.assert_checkpoints():
        await client.do_handshake()


@pytest.mark.parametrize("task_of_the_handshake", ["receiver", "sender"])
async def test_the_alert_reaches_the_peer_whichever_task_fails(
    server_config: ServerConfig, task_of_the_handshake: str
) -> None:
    """One task sends, one receives, and both need the handshake that fails."""
    stranger = ClientConfig(verifier=TrustStore((DevCa.create("other").certificate,)))
    one, other = trio.testing.memory_stream_pair()
    client = SecureStream(one, stranger, server_hostname="localhost", handshake_timeout=math.inf)
    server = SecureStream(other, server_config, handshake_timeout=math.inf)
    calls = [client.receive_some, lambda: client.send_all(b"secret")]
    if task_of_the_handshake == "sender":
        calls.reverse()
    causes: list[BaseException | None] = []

    async def fail(call: Callable[[], Any]) -> None:
        with pytest.raises(trio.BrokenResourceError) as caught:
            await call()
        causes.append(caught.value.__cause__)

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            for call in calls:
                nursery.start_soon(fail, call)
                await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(fail, server.receive_some)
    assert sorted(type(cause).__name__ for cause in causes) == [
        AlertReceived.__name__,
        CertificateRejected.__name__,
        CertificateRejected.__name__,
    ]


async def test_what_is_received_is_bytes(make_pair: MakePair) -> None:
    """As with ``trio.SSLStream``: a program may use it as a key of a dictionary, or keep it."""
    client, server = await shaken(make_pair)
    for size in (1, 100, 16_384, 20_000, 100_000):
        for limit in (None, 1, size):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.send_all, b"x" * size)
                pieces = []
                while sum(map(len, pieces)) < size:
                    pieces.append(await server.receive_some(limit if len(pieces) < 5 else None))
            assert {type(piece) for piece in pieces} == {bytes}
            assert b"".join(pieces) == b"x" * size


@pytest.mark.parametrize(
    "names", [("receive_some", "receive_some"), ("receive_some", "unwrap"), ("send", "send")]
)
async def test_two_tasks_in_one_direction(make_pair: MakePair, names: tuple[str, str]) -> None:
    client, _ = await shaken(make_pair, trio.testing.lockstep_stream_pair)
    calls = [
        getattr(client, name) if name != "send" else lambda: client.send_all(b"x") for name in names
    ]
    with pytest.raises(ExceptionGroup) as caught:
        await together(*calls)
    assert caught.group_contains(trio.BusyResourceError)


async def test_closed_means_closed(make_pair: MakePair) -> None:
    client, server = await shaken(make_pair)
    await client.aclose()
    with trio.testing.assert_checkpoints():
        await client.aclose()
    for call in (
        client.do_handshake,
        client.receive_some,
        client.send_eof,
        client.unwrap,
        client.update_keys,
        client.wait_send_all_might_not_block,
        lambda: client.send_all(b"x"),
    ):
        with pytest.raises(trio.ClosedResourceError):
            await call()
    assert await server.receive_some() == b""  # close_notify came: no truncation


async def test_aclose_of_a_stream_that_was_never_used(make_pair: MakePair) -> None:
    client, server = make_pair(https_compatible=True)
    await client.aclose()
    assert await server.receive_some() == b""


async def test_a_peer_that_reads_nothing_holds_aclose_up_for_a_while_only(
    make_pair: MakePair, autojump_clock: trio.testing.MockClock
) -> None:
    client, _ = await shaken(make_pair, trio.testing.lockstep_stream_pair)
    began = trio.current_time()
    await client.aclose()
    assert trio.current_time() - began == pytest.approx(10)


async def test_max_bytes(make_pair: MakePair) -> None:
    client, server = await shaken(make_pair)
    data = bytes(range(256)) * 200
    got = bytearray()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.send_all, data)
        for size in (1, 7, 255, 20_000):
            with trio.testing.assert_checkpoints():
                piece = await client.receive_some(size)
            assert 1 <= len(piece) <= size
            got += piece
        while len(got) < len(data):
            got += await client.receive_some()
    assert got == data


async def test_half_close(make_pair: MakePair) -> None:
    client, server = await shaken(make_pair)
    await client.send_eof()
    await client.send_eof()
    assert await server.receive_some() == b""
    assert await server.receive_some() == b""
    await server.send_all(b"still here")
    assert await client.receive_some() == b"still here"
    with pytest.raises(trio.ClosedResourceError):
        await client.send_all(b"x")
    with pytest.raises(trio.ClosedResourceError):
        await client.update_keys()


async def test_unwrap_hands_over_what_came_behind(make_pair: MakePair) -> None:
    client, server = await shaken(make_pair)

    async def one() -> None:
        transport, behind = await client.unwrap()
        assert behind == b""
        await transport.send_all(b"in the clear")

    async def other() -> None:
        await trio.testing.wait_all_tasks_blocked()
        transport, behind = await server.unwrap()
        behind += b"" if behind else await transport.receive_some()
        assert behind == b"in the clear"

    await together(one, other)
    await client.aclose()  # The transport is not ours any more.
    await client.transport_stream.send_all(b"x")


async def test_unwrap_does_not_lose_data_in_silence(make_pair: MakePair) -> None:
    client, server = await shaken(make_pair)
    await server.send_all(b"unread")
    with pytest.raises(trio.BrokenResourceError) as caught:
        await client.unwrap()
    assert isinstance(caught.value.__cause__, LocalStateError)


async def test_a_forged_record_breaks_both_ends(make_pair: MakePair) -> None:
    client, server = await shaken(make_pair)
    await client.send_all(b"good")
    await client.transport_stream.send_all(b"\x17\x03\x03\x00\x20" + bytes(32))
    assert await server.receive_some() == b"good"
    with pytest.raises(trio.BrokenResourceError) as caught:
        await server.receive_some()
    assert isinstance(caught.value.__cause__, BadRecordMac)
    with pytest.raises(trio.BrokenResourceError) as caught:
        await server.send_all(b"x")
    assert isinstance(caught.value.__cause__, BadRecordMac)
    with pytest.raises(trio.BrokenResourceError) as caught:
        await client.receive_some()
    assert isinstance(caught.value.__cause__, AlertReceived)


async def test_a_transport_that_breaks(make_pair: MakePair) -> None:
    client, server = await shaken(make_pair)
    await trio.aclose_forcefully(server.transport_stream)
    with pytest.raises(trio.BrokenResourceError):
        await client.send_all(b"x")
    with pytest.raises(trio.BrokenResourceError) as caught:
        await client.receive_some()
    assert isinstance(caught.value.__cause__, TruncationError)
    await client.aclose()


class Narrow(trio.abc.Stream):
    """Takes 64 bytes at a time, and the next ones once they are read."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        for start in range(0, len(data), 64):
            await self._stream.send_all(bytes(data[start : start + 64]))

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self._stream.receive_some(max_bytes)

    async def aclose(self) -> None:
        await self._stream.aclose()


async def test_both_ways_at_once_through_a_needle_s_eye(make_pair: MakePair) -> None:
    """With no room in the transport, with key updates asked for on both sides, in the middle."""

    def transports() -> Any:
        one, other = trio.testing.lockstep_stream_pair()
        return Narrow(one), Narrow(other)

    client, server = make_pair(transports)
    size = 100_000

    async def send(stream: Any, byte: bytes) -> None:
        for part in range(10):
            await stream.send_all(byte * (size // 10))
            await stream.update_keys(request_peer=part % 2 == 0)
        await stream.send_eof()

    async def receive(stream: Any, byte: bytes) -> None:
        assert b"".join([bytes(piece) async for piece in stream]) == byte * size

    with trio.fail_after(30):
        await together(
            lambda: send(client, b"c"),
            lambda: send(server, b"s"),
            lambda: receive(client, b"s"),
            lambda: receive(server, b"c"),
        )


async def test_resumption(client_config: ClientConfig, server_config: ServerConfig) -> None:
    store = MemoryTicketStore()
    config = replace(client_config, ticket_store=store)
    resumed = []
    for _ in range(3):
        one, other = trio.testing.memory_stream_pair()
        client = SecureStream(one, config, server_hostname="localhost")
        server = SecureStream(other, server_config)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.send_all, b"hello")
            assert await client.receive_some() == b"hello"
        assert client.session.resumed == server.session.resumed
        assert client.session.group == "X25519MLKEM768"  # a fresh key exchange all the same
        resumed.append(client.session.resumed)
        await together(client.aclose, server.aclose)
    assert resumed == [False, True, True]


async def test_an_empty_send_and_a_bad_size(make_pair: MakePair) -> None:
    client, _ = await shaken(make_pair)
    with trio.testing.assert_checkpoints():
        await client.send_all(b"")
    with pytest.raises(ValueError, match="max_bytes"):
        await client.receive_some(0)


async def test_a_server_names_no_host(server_config: ServerConfig) -> None:
    one, _ = trio.testing.memory_stream_pair()
    with pytest.raises(ValueError, match="server_hostname"):
        SecureStream(one, server_config, server_hostname="localhost")


@pytest.mark.parametrize("side", ["client", "server"])
async def test_the_deadline_of_a_handshake(
    make_pair: MakePair, side: str, autojump_clock: trio.testing.MockClock
) -> None:
    pair = make_pair(handshake_timeout=3)
    stream, silent = pair if side == "client" else pair[::-1]
    began = trio.current_time()
    for call in (stream.receive_some, lambda: stream.send_all(b"x")):
        with pytest.raises(trio.BrokenResourceError) as caught:
            await call()
        assert isinstance(caught.value.__cause__, HandshakeTimeout)
    assert trio.current_time() - began == pytest.approx(3)
    await stream.aclose()
    assert await silent.transport_stream.receive_some() != b""  # a flight, or the alert


async def test_a_peer_that_takes_nothing_cannot_stretch_the_deadline(
    make_pair: MakePair, autojump_clock: trio.testing.MockClock
) -> None:
    client, _ = make_pair(trio.testing.lockstep_stream_pair, handshake_timeout=3)
    began = trio.current_time()
    with pytest.raises(trio.BrokenResourceError) as caught:
        await client.do_handshake()
    assert isinstance(caught.value.__cause__, HandshakeTimeout)
    assert trio.current_time() - began == pytest.approx(3)


async def test_a_listener_waits_for_nobody_s_handshake(
    client_config: ClientConfig, server_config: ServerConfig
) -> None:
    tcp = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    listener = SecureListener(tcp, server_config, handshake_timeout=5)
    port = tcp.socket.getsockname()[1]
    with trio.fail_after(10):
        async with (
            listener,
            await trio.open_tcp_stream("127.0.0.1", port),
            await listener.accept() as stalled,
        ):
            client = SecureStream(
                await trio.open_tcp_stream("127.0.0.1", port),
                client_config,
                server_hostname="localhost",
            )
            server = await listener.accept()
            await together(client.do_handshake, server.do_handshake)
            await together(client.aclose, server.aclose)
            with pytest.raises(trio.NeedHandshakeError):
                _ = stalled.session


async def leave_with(stream: Any, error: Exception) -> None:
    async with stream:
        raise error


async def test_an_exception_is_not_a_clean_end(make_pair: MakePair) -> None:
    """Whoever reads must see that something is missing, however the other end's block is left."""
    for error in (ValueError("a bug"), OSError(28, "No space left on device"), KeyError(1)):
        client, server = await shaken(make_pair)
        await client.send_all(b"the first half")
        with pytest.raises(type(error)):
            await leave_with(client, error)
        assert await server.receive_some() == b"the first half"
        with pytest.raises(trio.BrokenResourceError) as raised:
            await server.receive_some()
        assert isinstance(raised.value.__cause__, AlertReceived)
        assert raised.value.__cause__.name == "internal_error"
        await trio.aclose_forcefully(server)
