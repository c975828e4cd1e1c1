"""Renewed keys in virtual time: what they delay, what an outage does, and cancellation."""

import random
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from itertools import pairwise
from typing import Any

import pytest
import trio
import trio.testing
from test_cancel import CancelAt

from hybridkex import (
    X25519,
    ClientConfig,
    DevCa,
    FreshKeys,
    Policy,
    QkdPskSource,
    Requirement,
    SecureStream,
    ServerConfig,
    TrustStore,
)
from hybridkex.errors import AlertReceived, KeySourceUnavailable, PolicyRefused
from hybridkex.qkd.in_process import InProcessSource, in_process_pair
from hybridkex.qkd.source import KeyReference, QkdKey, SourceStatus
from hybridkex.shell import update_timer
from hybridkex.tls.events import KeyUpdated

CA = DevCa.create(algorithm="ed25519")
TRUST, IDENTITY = TrustStore((CA.certificate,)), CA.issue("localhost", algorithm="ed25519")
REQUIRE, PREFER = Requirement.REQUIRE, Requirement.PREFER


class Kme:
    """A key source with outages, and with a stock that a test sets."""

    def __init__(self, source: InProcessSource) -> None:
        self._source = source
        self.local_sae, self.peer_sae, self.knows = source.local_sae, source.peer_sae, source.knows
        self.down: tuple[float, float] = (-1.0, -1.0)
        self.stock = 1000

    async def get_key(self) -> QkdKey:
        await self._check()
        return await self._source.get_key()

    async def get_key_with_id(self, name: KeyReference) -> QkdKey:
        await self._check()
        return await self._source.get_key_with_id(name)

    async def status(self) -> SourceStatus:
        await self._check()
        return SourceStatus(stored=self.stock, capacity=1000, key_bits=256)

    async def _check(self) -> None:
        await trio.lowlevel.checkpoint()
        if self.down[0] <= trio.current_time() < self.down[1]:
            raise KeySourceUnavailable("the KME does not answer")


class Wire(trio.abc.HalfCloseableStream):
    """One end of a connection in which every byte takes as long."""

    def __init__(self, delay: float) -> None:
        self._delay = delay
        self._coming = deque[tuple[float, bytes]]()
        self._news = trio.Event()
        self._closed = False
        self.other = self

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        self.other._coming.append((trio.current_time() + self._delay, bytes(data)))
        self.other._news.set()

    async def send_eof(self) -> None:
        await self.send_all(b"")

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        while not self._coming and not self._closed:
            self._news = trio.Event()
            await self._news.wait()
        if self._closed:
            raise trio.ClosedResourceError
        await trio.sleep_until(self._coming[0][0])
        return self._coming.popleft()[1]

    async def aclose(self) -> None:
        self._closed = True
        self._news.set()
        self.other._coming.append((trio.current_time() + self._delay, b""))
        self.other._news.set()
        await trio.lowlevel.checkpoint()


def wire(delay: float) -> tuple[Wire, Wire]:
    one, other = Wire(delay), Wire(delay)
    one.other, other.other = other, one
    return one, other


@asynccontextmanager
async def session(
    schedule: FreshKeys, *, delay: float = 0.05, psk: Requirement = REQUIRE
) -> AsyncIterator[tuple[Any, Any, Kme, Kme]]:
    alice, bob = map(Kme, in_process_pair("alice", "bob"))
    policy = Policy(post_quantum=PREFER, psk=psk, fresh_keys=REQUIRE)
    here, there = wire(delay)
    client = SecureStream(
        here,
        ClientConfig(
            verifier=TRUST,
            groups=(X25519,),
            psk_source=QkdPskSource(alice),
            fresh_keys=schedule,
            policy=policy,
        ),
        server_hostname="localhost",
    )
    server = SecureStream(
        there,
        ServerConfig(
            identities=(IDENTITY,),
            groups=(X25519,),
            psk_source=QkdPskSource(bob),
            policy=policy,
        ),
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.do_handshake)
        nursery.start_soon(server.do_handshake)
    try:
        yield client, server, alice, bob
    finally:
        await trio.aclose_forcefully(client)
        await trio.aclose_forcefully(server)


async def until(condition: Callable[[], bool], *, every: float = 0.05) -> None:
    for _ in range(10_000):
        if condition():
            return
        await trio.sleep(every)


async def test_an_update_delays_no_data(autojump_clock: trio.testing.MockClock) -> None:
    """Each message takes as long as the wire does, before, in and behind every update."""
    delay, said, took = 0.05, list[float](), list[float]()
    async with session(FreshKeys(every=0.5, jitter=0.0), delay=delay) as (client, server, _, _):

        async def listen(end: Any) -> None:
            unread = b""
            while data := await end.receive_some():
                unread += data
                while len(unread) >= 8:
                    took.append(trio.current_time() - said[int.from_bytes(unread[:8], "big")])
                    unread = unread[8:]

        async def talk(end: Any, times: int) -> None:
            for _ in range(times):
                said.append(trio.current_time())
                await end.send_all((len(said) - 1).to_bytes(8, "big"))
                await trio.sleep(0.01)
            await end.send_eof()

        async with trio.open_nursery() as nursery:
            for end in (client, server):
                nursery.start_soon(listen, end)
                nursery.start_soon(talk, end, 1000)
        assert client.session.epoch >= 15
        assert len(took) == 2000
        assert max(took) < 2 * delay  # less than a round trip; in fact:
        assert max(took) == pytest.approx(delay, abs=0.001)


async def test_the_schedule_follows_the_stock(autojump_clock: trio.testing.MockClock) -> None:
    schedule = FreshKeys(every=10.0, jitter=0.0, low_stock=16, stretch=4.0)
    async with session(schedule) as (client, server, alice, _):
        gaps = []

        async def reading(end: Any) -> None:
            while await end.receive_some():
                pass

        async with trio.open_nursery() as nursery:
            nursery.start_soon(reading, client)
            nursery.start_soon(reading, server)
            for stock, number in ((1000, 1), (8, 2), (1, 3), (0, 4), (16, 5)):
                alice.stock = stock
                began = trio.current_time()
                while client.session.epoch < 2 * number:
                    await trio.sleep(0.1)
                    if client.session.epoch == 2 * number - 1 and len(gaps) < 2 * number - 1:
                        gaps.append(trio.current_time() - began)
                        began = trio.current_time()
                gaps.append(trio.current_time() - began)
            nursery.cancel_scope.cancel()
    # The second of each pair was planned under the stock that is named.
    assert [round(gap / 10, 1) for gap in gaps[1::2]] == [1.0, 2.0, 4.0, 4.0, 1.0]


async def test_jitter_makes_it_earlier_and_never_later(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(16)
    monkeypatch.setattr(update_timer.random, "random", chance.random)
    async with session(FreshKeys(every=10.0, jitter=0.5)) as (client, server, _, _):
        times = []

        async def reading(end: Any) -> None:
            while await end.receive_some():
                pass

        async with trio.open_nursery() as nursery:
            nursery.start_soon(reading, client)
            nursery.start_soon(reading, server)
            for number in range(1, 30):
                await until(lambda number=number: client.session.epoch >= number)
                times.append(trio.current_time())
            nursery.cancel_scope.cancel()
    gaps = [after - before for before, after in pairwise(times)]
    assert all(4.9 < gap < 10.3 for gap in gaps)
    assert max(gaps) - min(gaps) > 3


async def outage(seed: int) -> None:
    """A session of three updates, with one outage of one KME, against what the policy says."""
    chance = random.Random(seed)
    every, deadline = 10.0, 5.0
    psk = chance.choice((REQUIRE, PREFER))
    begin = chance.uniform(0, 3 * every)
    length = chance.choice((chance.uniform(0, 2), chance.uniform(0, 2 * deadline)))
    schedule = FreshKeys(every=every, jitter=0.0, deadline=deadline)
    errors: list[BaseException] = []
    async with session(schedule, psk=psk, delay=0.01) as (client, server, alice, bob):
        start = trio.current_time()
        broken = chance.choice((alice, bob))
        broken.down = start + begin, start + begin + length

        async def reading(end: Any) -> None:
            try:
                while await end.receive_some():
                    pass
            except trio.BrokenResourceError as error:
                errors.append(error.__cause__ or error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(reading, client)
            nursery.start_soon(reading, server)
            with trio.move_on_after(4 * every + deadline):
                await until(lambda: client.session.epoch >= 3 or bool(errors), every=1.0)
            await trio.sleep(0.2)
            nursery.cancel_scope.cancel()
        epochs = client.session.epochs
        for one, other in zip(epochs, server.session.epochs, strict=False):
            assert one.qkd_key_ids == other.qkd_key_ids
        if psk is PREFER:
            assert not errors
            assert len(epochs) == 3
            for one in epochs:
                assert (one.qkd_missing is None) is bool(one.qkd_key_ids)
            return
        assert all(one.qkd_key_ids for one in epochs)
        # When the update was due that the outage met; each takes a moment of its own.
        due = (len(epochs) + 1) * every
        covered = begin <= due + 0.3 and begin + length - due
        if errors:
            kinds = {type(one) for one in errors}
            assert kinds == {PolicyRefused, AlertReceived}
            assert covered > deadline - 1.3, (begin, length, len(epochs))
        else:
            assert len(epochs) == 3


@pytest.mark.parametrize("seed", range(25))
async def test_an_outage(seed: int, autojump_clock: trio.testing.MockClock) -> None:
    await outage(seed)


@pytest.mark.slow
def test_many_outages(thorough: bool) -> None:
    """A thousand of them with ``--thorough``."""
    for seed in range(25, 1000 if thorough else 125):
        trio.run(outage, seed, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.parametrize("seed", range(5))
async def test_receiving_is_cancelled_at_random(
    seed: int, autojump_clock: trio.testing.MockClock
) -> None:
    """At any step of any call, while the keys are renewed: no byte is lost or out of order."""
    chance = random.Random(seed)
    async with session(FreshKeys(every=0.05, jitter=0.5), delay=0.01) as (client, server, _, _):
        said = {client: bytearray(), server: bytearray()}
        heard = {client: bytearray(), server: bytearray()}
        cancelled = 0

        async def talk(end: Any) -> None:
            while end.session.epoch < 20:
                piece = chance.randbytes(chance.choice((1, 100, 5000)))
                said[end] += piece
                await end.send_all(piece)
                await trio.sleep(0.01)
            await end.send_eof()

        async def listen(end: Any) -> None:
            nonlocal cancelled
            while True:
                data = None
                with trio.CancelScope() as scope:
                    instrument = CancelAt(scope, chance.randrange(1, 6))
                    trio.lowlevel.add_instrument(instrument)
                    try:
                        data = await end.receive_some()
                    finally:
                        trio.lowlevel.remove_instrument(instrument)
                if data == b"":
                    return
                cancelled += data is None
                heard[end] += data or b""

        async with trio.open_nursery() as nursery:
            for end in (client, server):
                nursery.start_soon(talk, end)
                nursery.start_soon(listen, end)
        assert heard[server] == said[client]
        assert heard[client] == said[server]
        assert cancelled > 20


@pytest.mark.parametrize("step", range(8))
async def test_sending_is_cancelled_during_an_update(
    step: int, autojump_clock: trio.testing.MockClock
) -> None:
    """Usable or broken, never wrong."""
    async with session(FreshKeys(every=3600.0), delay=0.01) as (client, server, _, _):
        heard = bytearray()

        async def listen(end: Any, into: bytearray) -> None:
            try:
                while data := await end.receive_some():
                    into += data
            except trio.BrokenResourceError:
                pass

        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen, server, heard)
            nursery.start_soon(listen, client, bytearray())
            await client.update_keys()
            with trio.CancelScope() as scope:
                instrument = CancelAt(scope, step)
                trio.lowlevel.add_instrument(instrument)
                try:
                    await client.send_all(b"one")
                finally:
                    trio.lowlevel.remove_instrument(instrument)
            await trio.sleep(1)
            sent = True
            try:
                await client.send_all(b"two")
            except trio.BrokenResourceError:
                sent = False
            await trio.sleep(1)
            assert bytes(heard) in ((b"onetwo", b"two") if sent else (b"one", b""))
            if sent:
                assert client.session.epoch == server.session.epoch == 1
            nursery.cancel_scope.cancel()


async def test_a_session_that_ends_says_what_was_in_the_way(
    autojump_clock: trio.testing.MockClock,
) -> None:
    def break_draw(alice: Kme, bob: Kme) -> None:
        alice.down = (0.0, 1e9)

    def break_look_up(alice: Kme, bob: Kme) -> None:
        bob.down = (0.0, 1e9)

    def hang(alice: Kme, bob: Kme) -> None:
        setattr(alice, "get_key", trio.sleep_forever)  # noqa: B010

    cases = [
        (break_draw, "there was no QKD key for it: the KME does not answer"),
        (break_look_up, "the peer declined it: it did not get the QKD key from its KME"),
        (hang, "our key source did not answer within 5 s|our key source has not answered"),
    ]
    for spoil, why in cases:
        schedule = FreshKeys(every=5.0, deadline=8.0)
        async with session(schedule) as (client, server, alice, bob):
            spoil(alice, bob)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_ignore_the_end, server)
                with pytest.raises(trio.BrokenResourceError, match=why):
                    await client.receive_some()


async def _ignore_the_end(stream: Any) -> None:
    with suppress(trio.BrokenResourceError):
        while await stream.receive_some():
            pass


async def test_a_peer_limits_key_updates_in_a_row(autojump_clock: trio.testing.MockClock) -> None:
    """BoringSSL takes 32 without data between them, in however many hours."""
    here, there = wire(0.01)
    policy = Policy(post_quantum=PREFER, fresh_keys=PREFER)
    client = SecureStream(
        here,
        ClientConfig(
            verifier=TRUST, groups=(X25519,), fresh_keys=FreshKeys(every=2.0), policy=policy
        ),
        server_hostname="localhost",
    )
    server = SecureStream(
        there,
        ServerConfig(identities=(IDENTITY,), groups=(X25519,), policy=Policy(post_quantum=PREFER)),
    )
    updates = 0
    counts = list[int]()

    async def serve() -> None:
        nonlocal updates
        inner = server._connection.next_event

        def next_event() -> Any:
            nonlocal updates
            event = inner()
            updates += isinstance(event, KeyUpdated)
            return event

        server._connection.next_event = next_event  # type: ignore[method-assign]
        with suppress(trio.BrokenResourceError):
            while await server.receive_some():
                pass

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        nursery.start_soon(_ignore_the_end, client)
        for _ in range(2):
            for _ in range(100):  # a server that sends, and a client that only receives
                await server.send_all(b"news")
                await trio.sleep(1.0)
            counts.append(updates)
            await client.send_all(b"and mine")
        nursery.cancel_scope.cancel()
    for stream in (client, server):
        await trio.aclose_forcefully(stream)
    assert counts == [16, 32]
