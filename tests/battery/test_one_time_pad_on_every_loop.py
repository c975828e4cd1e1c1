"""Sessions under a one-time pad: the same on every event loop."""

import contextlib
import itertools
import logging
import random
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from functools import partial
from math import ceil
from typing import Any

import anyio
import pytest
from suspensions import cancelled_at
from test_every_shell import chain, engine_of, together
from test_fresh_keys_on_every_loop import IDENTITY, TRUST, Kme, echo

from hybridkex import (
    X25519,
    ClientConfig,
    FreshKeys,
    OneTimePad,
    PadBudget,
    Policy,
    QkdPskSource,
    Requirement,
    ServerConfig,
)
from hybridkex.errors import AlertReceived, InternalError, PadExhausted, UnknownPskIdentity
from hybridkex.net.event_loop import current_time, sleep, time_limit
from hybridkex.net.log import BoundedLog
from hybridkex.qkd.in_process import in_process_pair
from hybridkex.shell import pad_filler

REQUIRE, PREFER = Requirement.REQUIRE, Requirement.PREFER


@pytest.fixture(autouse=True)
def lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """All lines of a test are written, however many the tests before it have caused."""
    fresh = BoundedLog(logging.getLogger("hybridkex.one_time_pad"))
    monkeypatch.setattr(pad_filler, "_LINES", fresh)


@contextlib.contextmanager
def may_break() -> Iterator[None]:
    """For a connection that may end at any moment."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ != "Broken":
            raise


class Sites:
    """Two configurations with QKD keys, for the handshake and for the one-time pads."""

    def __init__(self, pad: OneTimePad, *, capacity: int = 1024, **more: Any) -> None:
        self.alice, self.bob = map(Kme, in_process_pair("alice", "bob", capacity=capacity))
        shared: dict[str, Any] = {
            "groups": (X25519,),
            "one_time_pad": pad,
            "policy": Policy(post_quantum=PREFER),
            **more,
        }
        self.client = ClientConfig(verifier=TRUST, psk_source=QkdPskSource(self.alice), **shared)
        self.server = ServerConfig(
            identities=(IDENTITY,), psk_source=QkdPskSource(self.bob), **shared
        )


Run = Callable[[Sites, Callable[[Any, Any], Awaitable[None]]], None]


def pad_of(end: Any) -> PadBudget:
    found: PadBudget = (end.writer.transport if hasattr(end, "writer") else end.stream).pad
    return found


@pytest.mark.parametrize("hold", [256, 2048])
def test_both_directions_at_once(run: Run, hold: int) -> None:
    """With key updates between, and messages that are longer than the pad that is held."""
    sites = Sites(OneTimePad(hold=hold), fresh_keys=FreshKeys(every=0.05))
    texts = {
        who: [bytes((i % 256,)) * (i * 37 % 900 + 1) for i in range(9)]
        for who in ("client", "server")
    }

    async def conversation(client: Any, server: Any) -> None:
        assert client.session.one_time_pad
        assert server.session.one_time_pad
        heard = {}

        async def speak(who: str, end: Any) -> None:
            for one in texts[who]:
                await end.send(one)
                await sleep(0)
            await end.send_eof()

        async def hear(who: str, end: Any) -> None:
            heard[who] = await end.receive_all()

        await together(
            speak("client", client),
            speak("server", server),
            hear("client", client),
            hear("server", server),
        )
        assert heard["client"] == b"".join(texts["server"])
        assert heard["server"] == b"".join(texts["client"])
        ours, theirs = pad_of(client), pad_of(server)
        assert ours.sent > len(heard["server"])
        assert ours.sent == theirs.received
        assert theirs.sent == ours.received
        assert ours.receiving == theirs.receiving == 0  # erased at the end
        await client.close()

    run(sites, conversation)


def test_the_keys_that_are_drawn_ahead_are_bounded(run: Run) -> None:
    sites = Sites(OneTimePad(hold=512))

    async def conversation(client: Any, server: Any) -> None:
        before = sites.alice.drawn
        await sleep(0.05)
        assert sites.alice.drawn == before  # nothing for an end that says nothing

        async def speak() -> None:
            await client.send(b"x")
            assert await client.receive() == b"x"
            while pad_of(client).message < 400 or pad_of(client).stock is None:
                await sleep(0.01)
            await sleep(0.02)
            assert 512 // 32 <= sites.alice.drawn - before <= 18
            assert pad_of(client).message > 400
            stock = pad_of(client).stock
            assert stock is not None
            assert stock > 1000 * 32
            whole = pad_of(client).message + 17 + stock  # a tag for each record of 16,384 bytes
            assert pad_of(client).message_with_stock == whole - 17 * ceil(whole / 16_384)
            await client.send_eof()

        await together(echo(server), speak())

    run(sites, conversation)


def test_both_wait_for_keys_before_either_reads(run: Run) -> None:
    """No end needs the other's answer to begin."""
    sites = Sites(OneTimePad())

    async def conversation(client: Any, server: Any) -> None:
        sites.alice.delay = sites.bob.delay = 0.01
        await together(client.send(b"a" * 300), server.send(b"b" * 300))
        assert await client.receive_exactly(300) == b"b" * 300
        assert await server.receive_exactly(300) == b"a" * 300

    run(sites, conversation)


def test_a_slow_kme_at_the_receiver(run: Run) -> None:
    """Data that needs no further key flows while one is looked up."""
    sites = Sites(OneTimePad(hold=256))

    async def conversation(client: Any, server: Any) -> None:
        async def speak() -> None:
            await client.send(b"ping")
            assert await client.receive_exactly(4) == b"ping"
            await sleep(0.05)
            sites.bob.look_up_delay = 0.8
            began = current_time()
            longest = 0.0
            for number in range(12):
                before = current_time()
                await client.send(b"ping")
                assert await client.receive_exactly(4) == b"ping"
                if number < 4:
                    longest = max(longest, current_time() - before)
            assert longest < 0.6
            assert current_time() - began >= 0.8
            sites.bob.look_up_delay = 0.0
            await client.send_eof()

        await together(echo(server), speak())

    run(sites, conversation)


@pytest.mark.parametrize("why", ["down", "empty"])
def test_the_stock_is_gone(run: Run, why: str) -> None:
    """The sender is told which, its peer gets an alert, and nothing goes without the pad."""
    # Longer than a machine at work takes for one answer: it is that answer which is told.
    sites = Sites(OneTimePad(hold=256, deadline=1.0))

    async def conversation(client: Any, server: Any) -> None:
        reasons: dict[str, BaseException] = {}
        heard = bytearray()

        async def speak() -> None:
            sent = 0
            try:
                while True:
                    await client.send(b"x" * 50)
                    sent += 50
                    if len(heard) >= 150:
                        sites.alice.down, sites.alice.empty = why == "down", why == "empty"
                    await sleep(0.02)
                    assert sent < 100_000
            except Exception as error:
                reasons["client"] = error
            if not client.send_waits:
                try:
                    await client.receive()
                except Exception as error:
                    reasons["client"] = error

        async def listen() -> None:
            try:
                while data := await server.receive():
                    heard.extend(data)
            except Exception as error:
                reasons["server"] = error

        await together(speak(), listen())
        ours = [one for one in chain(reasons["client"]) if isinstance(one, PadExhausted)]
        assert ours
        assert ("does not answer" if why == "down" else "no key is left") in str(ours[0])
        theirs = [one for one in chain(reasons["server"]) if isinstance(one, AlertReceived)]
        assert "further QKD keys" in str(theirs[0])
        assert heard == b"x" * len(heard)
        assert len(heard) >= 150

    run(sites, conversation)


@pytest.mark.parametrize("why", ["down", "forgotten", "used before"])
def test_a_key_that_the_receiver_cannot_get(run: Run, why: str) -> None:
    """Asked for again while the KME does not answer; not at all once it says that there is none."""
    expected = "was restored from a copy" if why == "used before" else "is missing"
    sites = Sites(OneTimePad(deadline=0.3 if why == "down" else 60))

    async def conversation(client: Any, server: Any) -> None:
        reasons: dict[str, BaseException] = {}
        if why == "down":
            sites.bob.down = True
        elif why == "forgotten":
            sites.bob.forgets = True
        else:  # somebody had the key, as when the sender's store is put back
            get, inner = sites.bob.get_key_with_id, sites.bob._source

            async def after_another(name: Any) -> Any:
                await inner.get_key_with_id(name)
                return await get(name)

            sites.bob.get_key_with_id = after_another  # type: ignore[method-assign]
        began = current_time()

        async def speak() -> None:
            try:
                await client.send(b"lost")
                await client.receive()
            except Exception as error:
                reasons["client"] = error

        async def listen() -> None:
            try:
                assert not await server.receive()
            except Exception as error:
                reasons["server"] = error

        await together(speak(), listen())
        found = [one for one in chain(reasons["server"]) if isinstance(one, UnknownPskIdentity)]
        assert expected in str(found[0])
        alerts = [one for one in chain(reasons["client"]) if isinstance(one, AlertReceived)]
        assert alerts[0].name == "unknown_psk_identity"
        if why == "down":
            assert current_time() - began > 0.25

    run(sites, conversation)


@pytest.mark.parametrize("first", ["renewer", "receiver"])
def test_the_alert_of_a_missing_key_arrives_whoever_finds_out_first(run: Run, first: str) -> None:
    """The key renewer closes the transport, and not while the receiving task sends the alert."""
    sites = Sites(OneTimePad())

    async def conversation(client: Any, server: Any) -> None:
        sites.bob.forgets = True
        stream = getattr(server, "stream", None)
        if stream is not None:  # asyncio's own shell writes without waiting
            write, fail = stream._write, stream._fail_for_renewer

            async def slow(data: bytes) -> None:
                await sleep(0.05)
                await write(data)

            async def late(error: Any) -> None:
                await sleep(0.02)
                await fail(error)

            stream._write = slow
            if first == "receiver":
                stream._renewer._fail = late
        await client.send(b"lost")

        async def failure(end: Any) -> list[BaseException]:
            try:
                await end.receive()
            except Exception as error:
                return chain(error)
            return []

        ours: list[BaseException] = []
        theirs: list[BaseException] = []

        async def listen() -> None:
            theirs.extend(await failure(server))

        async def hear() -> None:
            ours.extend(await failure(client))

        await together(listen(), hear())
        assert any(isinstance(one, UnknownPskIdentity) for one in theirs)
        alerts = [one.name for one in ours if isinstance(one, AlertReceived)]
        assert alerts == ["unknown_psk_identity"]

    run(sites, conversation)


@pytest.mark.parametrize("whose", ["alice", "bob"])
def test_an_outage_that_ends_in_time(run: Run, whose: str) -> None:
    sites = Sites(OneTimePad(hold=256, deadline=10))

    async def conversation(client: Any, server: Any) -> None:
        async def mend() -> None:
            await sleep(0.1)
            getattr(sites, whose).down = False

        async def speak() -> None:
            getattr(sites, whose).down = True
            await client.send(b"late, but whole")
            assert await client.receive_exactly(15) == b"late, but whole"
            await client.send_eof()

        await together(echo(server), speak(), mend())

    run(sites, conversation)


# --- cancellation ---------------------------------------------------------------------------------


async def cancelled(step: int, work: Coroutine[Any, Any, Any]) -> tuple[Any, bool]:
    """What ``work`` returns, or ``None`` where it was cancelled; whether it has so many steps."""
    reached: list[bool] = []
    found = None
    with anyio.CancelScope() as scope:
        found = await cancelled_at(step, work, scope.cancel, reached)
    return found, bool(reached)


@pytest.mark.parametrize("slow", ["alice", "bob"])
def test_sending_is_cancelled_at_each_step(run: Run, slow: str) -> None:
    """Whether it waits for a key, for its turn or for the transport: the ends stay in step."""

    async def conversation(client: Any, server: Any, step: int, more: list[bool]) -> None:
        getattr(sites, slow).delay = 0.01
        heard = bytearray()

        async def listen() -> None:
            try:
                while not heard.endswith(b"two") and (data := await server.receive()):
                    heard.extend(data)
            except Exception:
                assert not sent

        async def speak() -> None:
            nonlocal sent
            _, reached = await cancelled(step, client.send(b"one" * 50))
            more.append(reached)
            try:
                await client.send(b"two")
                sent = True
            except Exception:
                await client.cut()

        sent = False
        await together(speak(), listen())
        one = b"one" * 50
        assert bytes(heard) in ((one + b"two", b"two") if sent else (one, b""))
        if sent:
            await client.send_eof()
            assert await server.receive() == b""

    for step in range(50):
        sites = Sites(OneTimePad(hold=256))
        more: list[bool] = []
        run(sites, partial(conversation, step=step, more=more))
        if more == [False]:
            break
    assert not more[-1]


@pytest.mark.parametrize("slow", ["alice", "bob"])
def test_receiving_is_cancelled_at_each_step(run: Run, slow: str) -> None:
    """No byte is lost, and none comes twice."""
    sites = Sites(OneTimePad(hold=256))
    texts = [bytes((65 + number % 26,)) * (number * 31 % 150 + 1) for number in range(24)]

    async def conversation(client: Any, server: Any) -> None:
        getattr(sites, slow).delay = 0.005
        heard = bytearray()
        times = 0

        async def speak() -> None:
            for one in texts:
                await client.send(one)
                await sleep(0.002)
            await client.send_eof()

        async def listen() -> None:
            nonlocal times
            for step in itertools.cycle(range(5)):
                data, _ = await cancelled(step, server.receive())
                if data == b"":
                    return
                times += data is None
                heard.extend(data or b"")

        await together(speak(), listen())
        assert bytes(heard) == b"".join(texts)
        assert times >= 2  # a reader of asyncio waits in one place, the others in several

    run(sites, conversation)


def test_a_send_that_is_given_up_is_not_waited_for(run: Run) -> None:
    """Its deadline goes with it, and the session lasts."""
    sites = Sites(OneTimePad(hold=256, deadline=0.6))

    async def conversation(client: Any, server: Any) -> None:
        async def speak() -> None:
            if not client.send_waits:  # what was written once is sent
                return
            sites.alice.empty = True
            with anyio.move_on_after(0.1) as scope:
                await client.send(b"never said")
            assert scope.cancelled_caught
            await sleep(0.7)
            sites.alice.empty = False
            await client.send(b"said later")
            assert await client.receive_exactly(10) == b"said later"

        async def all_of_it() -> None:
            await speak()
            await client.send_eof()

        await together(echo(server), all_of_it())

    run(sites, conversation)


@pytest.mark.parametrize("seed", range(2))
def test_the_connection_is_cut_at_random(shell: Any, seed: int) -> None:
    """Sessions between the same two sites, one after the other, each cut in the middle: all that a
    receiver has is a prefix of what was sent, and no key is asked for twice."""
    rng = random.Random(seed)
    sites = Sites(OneTimePad(hold=512))

    async def conversation(client: Any, server: Any) -> None:
        said, heard = bytearray(), bytearray()

        async def speak() -> None:
            with may_break():
                for number in range(rng.randrange(3, 30)):
                    text = bytes((number,)) * rng.randrange(1, 120)
                    said.extend(text)
                    await client.send(text)
                    await sleep(0)
            await rng.choice((client, server)).cut()

        async def listen() -> None:
            with may_break():
                while data := await server.receive():
                    heard.extend(data)

        await together(speak(), listen())
        assert said.startswith(heard)

    async def main() -> None:
        for _ in range(6):
            async with time_limit(20), shell.pair(sites.client, sites.server) as ends:
                await conversation(*ends)

    shell.run(main)
    assert not sites.client.psk_source.counters.repeated  # type: ignore[union-attr]
    assert not sites.server.psk_source.counters.repeated  # type: ignore[union-attr]


@pytest.mark.parametrize("who", ["sender", "receiver"])
def test_a_stream_is_closed_while_a_task_waits_for_a_key(run: Run, who: str) -> None:
    """The task learns of it at once, whatever the deadline."""
    sites = Sites(OneTimePad(deadline=60))

    async def conversation(client: Any, server: Any) -> None:
        if not client.send_waits:  # there, nobody waits in a call
            return
        waits, end = (sites.alice, client) if who == "sender" else (sites.bob, server)
        waits.empty = waits.down = True
        errors: list[BaseException] = []

        async def work() -> None:
            try:
                await client.send(b"text")
                await server.receive()
            except Exception as error:
                errors.append(error)

        async def close() -> None:
            await sleep(0.1)
            await end.close()

        async with time_limit(5):
            await together(work(), close())
        assert "ClosedResource" in type(errors[0]).__name__

    run(sites, conversation)


@pytest.mark.parametrize("how", ["cut", "alert"])
def test_the_connection_ends_while_a_send_waits_for_a_key(run: Run, how: str) -> None:
    sites = Sites(OneTimePad(deadline=60))

    async def conversation(client: Any, server: Any) -> None:
        sites.alice.empty = True
        errors: list[BaseException] = []

        async def send() -> None:
            try:
                await client.send(b"text")
                await sleep(0.3)
                await client.send(b"text")
            except Exception as error:
                errors.append(error)

        async def hear() -> None:
            with may_break():
                await client.receive()

        async def end() -> None:
            await sleep(0.1)
            if how == "cut":
                await server.cut()
            else:
                engine_of(server).abort(InternalError("for the test"))
                await server.update_keys()

        async with time_limit(5):
            await together(send(), hear(), end())
        assert errors

    run(sites, conversation)
