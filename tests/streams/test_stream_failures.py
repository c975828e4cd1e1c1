"""What happens when things go wrong: rejected, cut, stalled, cancelled."""

import math
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from hybridkex import (
    ClientConfig,
    DevCa,
    Policy,
    QkdLimits,
    QkdPskSource,
    Requirement,
    SecureStream,
    ServerConfig,
    TrustStore,
    open_secure_tcp_stream,
    serve_secure_tcp,
)
from hybridkex.constants import Alert
from hybridkex.errors import (
    AlertReceived,
    CertificateRejected,
    HandshakeTimeout,
    TruncationError,
)
from hybridkex.qkd.in_process import in_process_pair
from tests.streams.cancelling import CancelAt

MakePair = Callable[..., Any]


async def shake(one: Any, other: Any) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.do_handshake)
        nursery.start_soon(other.do_handshake)


async def test_session_needs_the_handshake(make_pair: MakePair) -> None:
    client, server = make_pair()
    with pytest.raises(trio.NeedHandshakeError):
        _ = client.session
    with pytest.raises(trio.NeedHandshakeError):
        client.export(b"label", b"", 32)
    await shake(client, server)
    assert client.session.parts == ("ML-KEM-768", "X25519")
    assert client.export(b"label", b"", 32) == server.export(b"label", b"", 32)


async def test_both_sides_hear_of_a_rejected_certificate(server_config: ServerConfig) -> None:
    stranger = ClientConfig(verifier=TrustStore((DevCa.create("other").certificate,)))
    one, other = trio.testing.memory_stream_pair()
    client = SecureStream(one, stranger, server_hostname="localhost")
    server = SecureStream(other, server_config)
    causes: dict[str, BaseException | None] = {}

    async def expect_failure(name: str, stream: Any) -> None:
        with pytest.raises(trio.BrokenResourceError) as caught:
            await stream.do_handshake()
        causes[name] = caught.value.__cause__

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(expect_failure, "client", client)
            nursery.start_soon(expect_failure, "server", server)
    assert isinstance(causes["client"], CertificateRejected)
    heard = causes["server"]
    assert isinstance(heard, AlertReceived)
    assert heard.alert == Alert.UNKNOWN_CA
    with pytest.raises(trio.BrokenResourceError):
        await client.send_all(b"x")


@pytest.mark.parametrize("https_compatible", [False, True])
async def test_truncation(make_pair: MakePair, https_compatible: bool) -> None:
    client, server = make_pair(https_compatible=https_compatible)
    await shake(client, server)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.send_all, b"half")
        assert await client.receive_some() == b"half"
    await server.transport_stream.aclose()
    if https_compatible:
        assert await client.receive_some() == b""
        return
    with pytest.raises(trio.BrokenResourceError) as caught:
        await client.receive_some()
    assert isinstance(caught.value.__cause__, TruncationError)


async def test_a_handshake_that_stalls_ends(
    client_config: ClientConfig, autojump_clock: trio.testing.MockClock
) -> None:
    one, other = trio.testing.memory_stream_pair()
    client = SecureStream(one, client_config, server_hostname="localhost")
    started = trio.current_time()
    with pytest.raises(trio.BrokenResourceError) as caught:
        await client.do_handshake()
    assert isinstance(caught.value.__cause__, HandshakeTimeout)
    assert trio.current_time() - started == pytest.approx(10)
    assert await other.receive_some() != b""


async def test_half_close_and_bulk_both_ways(make_pair: MakePair) -> None:
    client, server = make_pair()
    size = 3_000_000

    async def send(stream: Any, byte: bytes) -> None:
        await stream.send_all(byte * size)
        await stream.send_eof()

    async def receive(stream: Any, byte: bytes) -> None:
        got = b"".join([bytes(piece) async for piece in stream])
        assert got == byte * size

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, client, b"c")
            nursery.start_soon(send, server, b"s")
            nursery.start_soon(receive, client, b"s")
            nursery.start_soon(receive, server, b"c")
    with pytest.raises(trio.ClosedResourceError):
        await client.send_all(b"more")


async def test_unwrap_gives_the_transport_back(make_pair: MakePair) -> None:
    client, server = make_pair()
    await shake(client, server)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.unwrap)
        transport, trailing = await server.unwrap()
    assert transport is server.transport_stream
    assert trailing == b""
    with pytest.raises(trio.ClosedResourceError):
        await client.receive_some()


@pytest.mark.parametrize("victim", ["client", "server"])
async def test_cancelled_anywhere_it_works_or_is_broken(make_pair: MakePair, victim: str) -> None:
    """For every n: cancel at the n-th step; then data is right, or an error says it is over."""
    payload = bytes(range(256)) * 4000
    outcomes = set()
    for steps in range(1, 400):
        client, server = make_pair(trio.testing.lockstep_stream_pair)
        subject, peer = (client, server) if victim == "client" else (server, client)
        received = bytearray()

        async def echo(stream: Any = peer) -> None:
            try:
                while data := await stream.receive_some():
                    await stream.send_all(data)
                await stream.send_eof()
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass

        async def use(stream: Any, sink: bytearray) -> None:
            async with trio.open_nursery() as inner:
                inner.start_soon(stream.send_all, payload)
                while len(sink) < len(payload):
                    sink += await stream.receive_some()

        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(echo)
                with trio.CancelScope() as scope:
                    instrument = CancelAt(scope, steps)
                    trio.lowlevel.add_instrument(instrument)
                    try:
                        await use(subject, received)
                    finally:
                        trio.lowlevel.remove_instrument(instrument)
                assert payload.startswith(received)
                if not scope.cancelled_caught:
                    assert received == payload
                    outcomes.add("finished")
                    nursery.cancel_scope.cancel()
                else:
                    try:
                        with trio.move_on_after(1):
                            await subject.send_all(b"after")
                            outcomes.add("usable")
                    except trio.BrokenResourceError:
                        outcomes.add("broken")
                    nursery.cancel_scope.cancel()
        if "finished" in outcomes:
            break
    assert outcomes >= {"finished", "broken"}


async def test_rubbish_and_stalls_do_not_take_the_server_down(
    client_config: ClientConfig, server_config: ServerConfig
) -> None:
    async def echo(stream: Any) -> None:
        async with stream:
            async for data in stream:
                await stream.send_all(data)

    async def rubbish(port: int, data: bytes) -> None:
        tcp = await trio.open_tcp_stream("127.0.0.1", port)
        async with tcp:
            try:
                await tcp.send_all(data)
                while await tcp.receive_some():
                    pass
            except trio.BrokenResourceError:
                pass

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:

            async def serve(task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
                await serve_secure_tcp(
                    echo,
                    0,
                    server_config,
                    host="127.0.0.1",
                    handshake_timeout=1,
                    task_status=task_status,
                )

            listeners = await nursery.start(serve)
            port = listeners[0].transport_listener.socket.getsockname()[1]
            async with trio.open_nursery() as attackers:
                for index in range(200):
                    data = [
                        b"GET / HTTP/1.1\r\n\r\n",
                        b"\x16\x03\x01\x00\x05\x01",
                        b"",
                        b"\x17" * 99,
                    ]
                    attackers.start_soon(rubbish, port, data[index % 4])
            stream = await open_secure_tcp_stream(
                "127.0.0.1", port, client_config, server_hostname="localhost"
            )
            async with stream:
                await stream.send_all(b"still here")
                assert await stream.receive_some() == b"still here"
            nursery.cancel_scope.cancel()


class SlowSend(trio.abc.Stream):
    """A transport that sends after a while."""

    def __init__(self, stream: Any, seconds: float) -> None:
        self._stream, self.seconds = stream, seconds
        self.sending = trio.Event()

    async def send_all(self, data: Any) -> None:
        self.sending.set()
        await trio.sleep(self.seconds)
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> Any:
        return await self._stream.receive_some(max_bytes)

    async def aclose(self) -> None:
        await self._stream.aclose()


async def with_fresh_keys(
    ca: DevCa, transport: type[SlowSend]
) -> tuple[SecureStream[Any], SecureStream[Any], SlowSend]:
    """A client, a server, and the server's transport."""
    fresh = Policy(fresh_keys=Requirement.REQUIRE)
    one, other = trio.testing.memory_stream_pair()
    slow = transport(other, 0)
    config = ClientConfig(verifier=TrustStore((ca.certificate,)), policy=fresh)
    client = SecureStream(one, config, server_hostname="localhost")
    server = SecureStream(slow, ServerConfig(identities=(ca.issue("localhost"),), policy=fresh))
    await shake(client, server)
    return client, server, slow


@pytest.mark.parametrize("sender", ["caller", "renewer"])
@pytest.mark.parametrize("end", ["peer's fault", "abort"])
async def test_an_alert_goes_behind_the_send_that_is_under_way(
    stream_ca: DevCa, autojump_clock: trio.testing.MockClock, sender: str, end: str
) -> None:
    """Whoever sends: a task of the caller, or the one that renews the keys."""
    client, server, slow = await with_fresh_keys(stream_ca, SlowSend)
    slow.seconds, slow.sending = 0.2, trio.Event()

    async def send() -> None:
        if sender == "renewer":
            await server.update_keys()
            return
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await server.send_all(b"x")

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await slow.sending.wait()
            if end == "abort":
                nursery.start_soon(server.abort)
            else:
                await client.transport_stream.send_all(b"\x17\x03\x03\x00\x20" + bytes(32))
                with pytest.raises(trio.BrokenResourceError):
                    await server.receive_some()
            if sender == "caller":
                assert await client.receive_some() == b"x"
            with pytest.raises(trio.BrokenResourceError) as caught:
                await client.receive_some()
            heard = caught.value.__cause__
            assert isinstance(heard, AlertReceived)
            expected = Alert.INTERNAL_ERROR if end == "abort" else Alert.BAD_RECORD_MAC
            assert heard.alert == expected


async def test_a_send_that_never_ends_does_not_hold_up_an_error(
    make_pair: MakePair, autojump_clock: trio.testing.MockClock
) -> None:
    client, server = make_pair()
    await shake(client, server)
    slow = SlowSend(server.transport_stream, math.inf)
    server.transport_stream = slow
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.send_all, b"x")
        await slow.sending.wait()
        await client.transport_stream.send_all(b"\x17\x03\x03\x00\x20" + bytes(32))
        began = trio.current_time()
        with pytest.raises(trio.BrokenResourceError):
            await server.receive_some()
        assert trio.current_time() - began <= 1.5
        nursery.cancel_scope.cancel()


async def test_a_transport_that_breaks_under_the_key_renewer(
    stream_ca: DevCa, autojump_clock: trio.testing.MockClock
) -> None:
    """The caller's next send says how the transport has ended."""

    class Cut(SlowSend):
        async def send_all(self, data: Any) -> None:
            if self.seconds:
                raise trio.BrokenResourceError("cut by a test")
            await super().send_all(data)

    _, server, cut = await with_fresh_keys(stream_ca, Cut)
    cut.seconds = 1
    await server.update_keys()
    await trio.sleep(1)
    with pytest.raises(trio.BrokenResourceError, match="cut by a test"):
        await server.send_all(b"x")


async def test_unwrap_of_a_stream_that_another_task_closes(make_pair: MakePair) -> None:
    client, server = make_pair()
    await shake(client, server)

    async def unwraps() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await client.unwrap()

    async with trio.open_nursery() as nursery, client._send_lock:  # the key renewer may be sending
        nursery.start_soon(unwraps)
        await trio.testing.wait_all_tasks_blocked()
        await client.aclose()


@pytest.mark.parametrize("end", ["aclose", "abort", "aclose by the source"])
@pytest.mark.parametrize("task", ["do_handshake", "receive_some", "send_all", "two tasks"])
@pytest.mark.parametrize("function", ["offer", "look_up", "get_key", "get_key_with_id"])
async def test_a_stream_that_is_closed_while_the_handshake_waits_for_a_key(
    function: str, task: str, end: str, autojump_clock: MockClock
) -> None:
    """The handshake ends at once, and no key is drawn later."""
    alice, bob = in_process_pair("alice", "bob")
    sources: Any = [
        QkdPskSource(alice, limits=QkdLimits(timeout=3600)),
        QkdPskSource(bob, limits=QkdLimits(timeout=3600)),
    ]
    asked, ended, box = trio.Event(), trio.Event(), list[SecureStream[Any]]()

    async def wait(*_: object) -> Any:
        asked.set()
        try:
            if end == "aclose by the source":
                await box[0].aclose()
            await trio.sleep_forever()
        finally:
            ended.set()

    by_client = function in ("offer", "get_key")
    slow = sources[not by_client] if function in ("offer", "look_up") else (bob, alice)[by_client]
    setattr(slow, function, wait)
    near, far = trio.testing.memory_stream_pair()
    ca = DevCa.create()
    client = SecureStream(
        near,
        ClientConfig(verifier=TrustStore((ca.certificate,)), psk_source=sources[0]),
        server_hostname="localhost",
        handshake_timeout=3600,
    )
    config = ServerConfig(identities=(ca.issue("localhost"),), psk_source=sources[1])
    server = SecureStream(far, config, handshake_timeout=3600)
    ours, theirs = (client, server) if by_client else (server, client)
    box.append(ours)
    calls: dict[str, tuple[Callable[[], Awaitable[Any]], ...]] = {
        "do_handshake": (ours.do_handshake,),
        "receive_some": (ours.receive_some,),
        "send_all": (lambda: ours.send_all(b"x"),),
        "two tasks": (ours.do_handshake, ours.do_handshake),
    }

    async def fails(call: Callable[[], Awaitable[Any]], error: type[Exception]) -> None:
        with pytest.raises(error):
            await call()

    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fails, theirs.do_handshake, trio.BrokenResourceError)
        for call in calls[task]:
            nursery.start_soon(fails, call, trio.ClosedResourceError)
        await asked.wait()
        if end in ("aclose", "abort"):
            await trio.testing.wait_all_tasks_blocked()
            await getattr(ours, end)()
    assert ended.is_set()
    assert trio.current_time() == began
