"""The port of a link: strangers neither end Alice nor keep her from Bob."""

import contextlib
import dataclasses
import errno
import functools
import logging
import resource
import secrets
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from waiting import trio_until

from hybridkex.auth.dev_ca import DevCa, write_identity
from hybridkex.errors import (
    BlockAborted,
    ConfigError,
    LedgerDry,
    LedgerLost,
    LinkAuthenticationError,
    LinkError,
)
from hybridkex.kme import link_feed
from hybridkex.kme.config import LinkConfig, PeerConfig
from hybridkex.kme.link_feed import PartyFeed
from hybridkex.kme.metrics import KmeMetrics
from hybridkex.link import party, remote
from hybridkex.link.authentication import Signatures
from hybridkex.link.greeting import ACCEPTED, NUMBER, greet, greeted
from hybridkex.link.ledger import Direction, Position
from hybridkex.link.optimise import tuned
from hybridkex.link.presets import PRESETS
from hybridkex.link.settings import LinkSettings
from hybridkex.link.wire import HEADER, LIMITS, Hello, SessionEnded, Type
from hybridkex.net.address import TcpAddress
from hybridkex.net.reading import EndOfStream, read_exactly
from hybridkex.net.threads import NoThread
from hybridkex.net.token_bucket import TokenBucket
from interop.ports import free_port

BOB = Direction.BOB_TO_ALICE


@pytest.fixture
def signatures(tmp_path: Path) -> dict[str, Signatures]:
    """Of Alice, of Bob, and of a stranger whose key is known to nobody."""
    ca = DevCa.create()
    for name in ("alice", "bob", "eve"):
        write_identity(tmp_path / name, ca, ca.issue(name))

    def of(own: str, peer: str) -> Signatures:
        return Signatures.from_files(tmp_path / own / "key.pem", tmp_path / peer / "cert.pem")

    return {"alice": of("alice", "bob"), "bob": of("bob", "alice"), "eve": of("eve", "alice")}


def feed(
    party: str, port: int, signatures: dict[str, Signatures], name: str = link_feed.NAME
) -> PartyFeed:
    settings = LinkSettings(preset=tuned(PRESETS["rusca2018"].at(0), 30_000), block_bits=30_000)
    return PartyFeed(
        settings,
        party=party,
        address=TcpAddress("127.0.0.1", port),
        signatures=signatures[party],
        note=lambda block: None,
        name=name,
    )


def resets(port: int) -> None:
    client = socket.create_connection(("127.0.0.1", port))
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


async def test_strangers_do_not_keep_bob_out(signatures: dict[str, Signatures]) -> None:
    port = free_port()
    alice, bob = feed("alice", port, signatures), feed("bob", port, signatures)
    said = (b"", b"C", b"Q", b"X", b"C" + bytes(16), b"Q" + bytes(16), bytes(70_000))
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(alice.run)
            await trio.sleep(0.1)
            held = []
            for data in said * 6:  # they stay, and say no more
                resets(port)
                held.append(await trio.open_tcp_stream("127.0.0.1", port))
                await held[-1].send_all(data)
            nursery.start_soon(bob.run)
            theirs = await anext(bob.ends[0])
            ours = await anext(alice.ends[0])
            assert ours[0].key_id == theirs[0].key_id
            nursery.cancel_scope.cancel()
        for stream in held:
            await stream.aclose()


async def test_a_link_of_few_descriptors(
    signatures: dict[str, Signatures], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session has two connections, whatever the process may open."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 64))
    port = free_port()
    alice, bob = feed("alice", port, signatures), feed("bob", port, signatures)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(alice.run)
            nursery.start_soon(bob.run)
            theirs, ours = await anext(bob.ends[0]), await anext(alice.ends[0])
            assert ours[0].key_id == theirs[0].key_id
            nursery.cancel_scope.cancel()


async def test_alice_waits_for_her_port(
    signatures: dict[str, Signatures],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A process that ends may still have it."""
    monkeypatch.setattr(link_feed, "PAUSE", 0.05)
    [taken] = await trio.open_tcp_listeners(free_port(), host="127.0.0.1")
    port = taken.socket.getsockname()[1]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(feed("alice", port, signatures).run)
        said = f"cannot listen on 127.0.0.1:{port}: Address already in use"
        with trio.fail_after(60):
            await trio_until(lambda: said in caplog.text)
            await trio.sleep(0.2)
            assert caplog.text.count(said) == 1
            await taken.aclose()
            while True:
                with contextlib.suppress(OSError):
                    await (await trio.open_tcp_stream("127.0.0.1", port)).aclose()
                    break
                await trio.sleep(0.02)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("kind", ["nobody", "closes", "says nothing"])
async def test_bob_says_once_why_there_is_no_session(
    signatures: dict[str, Signatures],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: str,
) -> None:
    for name in ("PAUSE", "GREETING_SECONDS"):
        monkeypatch.setattr(link_feed, name, 0.05)
    port = free_port()

    async def serve(stream: trio.SocketStream) -> None:
        if kind == "says nothing":
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        if kind != "nobody":
            await nursery.start(partial(trio.serve_tcp, serve, port, host="127.0.0.1"))
        nursery.start_soon(feed("bob", port, signatures).run)
        await trio.sleep(0.5)
        nursery.cancel_scope.cancel()
    [line] = [one.getMessage() for one in caplog.records if "no session" in one.getMessage()]
    assert f"127.0.0.1:{port}: " in line
    words = {
        "nobody": "Connection refused",
        "closes": "closed the connection",
        "says nothing": "no answer within",
    }
    assert words[kind] in line or (kind == "closes" and "cut the connection" in line)


async def test_the_system_ends_a_session_whose_other_end_has_vanished(
    signatures: dict[str, Signatures], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of ours limits how long Bob waits for light."""
    port = free_port()
    kept: list[int] = []
    make = PartyFeed._make

    def seen(feed: PartyFeed, *streams: Any) -> Any:
        for stream in streams[:2]:
            kept.append(stream.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
        return make(feed, *streams)

    monkeypatch.setattr(PartyFeed, "_make", seen)
    alice, bob = feed("alice", port, signatures), feed("bob", port, signatures)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(alice.run)
            nursery.start_soon(bob.run)
            await anext(bob.ends[0])
            nursery.cancel_scope.cancel()
    assert kept[:4] == [1] * 4


async def exchange(client: Signatures, server: Signatures, kind: bytes = b"C") -> bytes:
    """Both are told how it ends."""
    one, other = trio.testing.memory_stream_pair()
    number, failures = secrets.token_bytes(16), list[Exception]()

    async def run(greeting: Any) -> None:
        try:
            assert await greeting in (None, (kind, number))
        except (LinkError, EndOfStream) as error:
            failures.append(error)
            await trio.testing.wait_all_tasks_blocked()
            await other.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, greet(one, client, kind, number, sends=BOB))
        nursery.start_soon(run, greeted(other, server, receives=BOB))
    if failures:
        raise ExceptionGroup("", failures)
    return kind


async def test_only_bob_is_greeted(signatures: dict[str, Signatures]) -> None:
    assert await exchange(signatures["bob"], signatures["alice"]) == b"C"
    for wrong in ("eve", "alice"):  # a stranger, and Alice's own words sent back
        with pytest.RaisesGroup(LinkAuthenticationError, SessionEnded):
            await exchange(signatures[wrong], signatures["alice"])
    with pytest.RaisesGroup(LinkError, EndOfStream):
        await exchange(signatures["bob"], signatures["alice"], kind=b"Z")


async def test_a_greeting_is_not_good_twice(signatures: dict[str, Signatures]) -> None:
    """What Bob has said is worth nothing with another challenge."""
    one, other = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(greet, sends=BOB), one, signatures["bob"], b"C", bytes(16))
        said = bytes(await other.receive_some())
        await other.send_all(bytes(32))
        said += bytes(await other.receive_some())
        await other.send_all(ACCEPTED)
    one, other = trio.testing.memory_stream_pair()
    await one.send_all(said)
    with pytest.raises(LinkAuthenticationError):
        await greeted(other, signatures["alice"], receives=BOB)
    one, other = trio.testing.memory_stream_pair()
    await one.send_all(said[:-1])
    await one.send_eof()
    with pytest.raises(EndOfStream):
        await greeted(other, signatures["alice"], receives=BOB)


@pytest.mark.parametrize(
    "error", [NoThread(), MemoryError()], ids=lambda error: type(error).__name__
)
async def test_a_session_without_room_is_followed_by_another(
    error: Exception, signatures: dict[str, Signatures], monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    alice, bob = feed("alice", port, signatures), feed("bob", port, signatures)
    failures = [error]

    async def in_thread(function: Any, *arguments: Any, **options: Any) -> Any:
        if failures:
            raise failures.pop()
        return await real(function, *arguments, **options)

    real = party.in_thread
    monkeypatch.setattr(party, "in_thread", in_thread)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(alice.run)
            nursery.start_soon(bob.run)
            theirs, ours = await anext(bob.ends[0]), await anext(alice.ends[0])
            assert ours[0].key_id == theirs[0].key_id
            nursery.cancel_scope.cancel()
    assert not failures


def hello(positions: dict[Direction, Position] | None, *, role: int = 1, **changes: bytes) -> bytes:
    """A HELLO whose settings nobody else has, unless they are given."""
    made = Hello(
        role=role,
        nonce=bytes(32),
        settings=changes.get("settings", bytes(32)),
        positions=positions,
    ).encode()
    return HEADER.pack(Type.HELLO, len(made)) + changes.get("version", made[:1]) + made[1:]


def frames(digest: bytes) -> dict[str, bytes]:
    """What a party that has Bob's key, but is not Bob, may say."""
    ahead = dict.fromkeys(Direction, Position(1 << 60, 1 << 61))
    good = hello(dict.fromkeys(Direction, Position(0, 1 << 40)), settings=digest)
    report = bytes(LIMITS[Type.REPORT])
    return {
        "nothing": b"",
        "a byte": b"\x01",
        "no key in stock": hello(None, settings=digest),
        "an old copy of the key": hello(ahead, settings=digest),
        "other settings": hello(None),
        "another version": hello(None, version=b"\x07"),
        "our own party": hello(None, role=0, settings=digest),
        "HELLO twice": good * 2,
        "a tag that does not verify": good + HEADER.pack(Type.TAG, 16) + bytes(16),
        "an unknown type": good + HEADER.pack(99, 4) + bytes(4),
        "a message too long": good + HEADER.pack(Type.REPORT, len(report) + 1),
        "the longest message": good + HEADER.pack(Type.REPORT, len(report)) + report,
        "half a message": good + HEADER.pack(Type.REPORT, len(report)) + report[:1000],
        "requests for light without end": good,
    }


async def test_nothing_that_the_other_end_says_ends_the_link(
    signatures: dict[str, Signatures], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A party that has Bob's key ends its own session; Bob goes on with the next one."""
    for name in ("PAUSE", "LONG_PAUSE"):
        monkeypatch.setattr(link_feed, name, 0.01)
    port = free_port()
    alice, bob = feed("alice", port, signatures), feed("bob", port, signatures)

    async def common() -> None:
        ours, theirs = await anext(alice.ends[0]), await anext(bob.ends[0])
        assert ours[0].key_id == theirs[0].key_id

    async def impostor(said: bytes) -> None:
        number = secrets.token_bytes(16)
        classical, quantum = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(2)]
        async with classical, quantum:
            await greet(classical, signatures["bob"], b"C", number, sends=BOB)
            await greet(quantum, signatures["bob"], b"Q", number, sends=BOB)
            await classical.receive_some()  # Alice's HELLO
            await classical.send_all(said)
            await quantum.send_all(b"\xff" * 4 * (len(said) % 3))
            if len(said) > 1:
                with contextlib.suppress(trio.BrokenResourceError):
                    await classical.send_eof()
                    while await classical.receive_some():
                        pass

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(alice.run)
            async with trio.open_nursery() as first:
                first.start_soon(bob._run_bob)
                await common()
                first.cancel_scope.cancel()
            for said in frames(alice._settings.digest).values():
                await impostor(said)
            nursery.start_soon(bob._run_bob)
            while bob.ends[0]._take.statistics().current_buffer_used:
                await anext(bob.ends[0])
            while alice.ends[0]._take.statistics().current_buffer_used:
                await anext(alice.ends[0])
            async with trio.open_nursery() as both:  # a block begins when both ask
                both.start_soon(anext, alice.ends[0])
                both.start_soon(anext, bob.ends[0])
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("full", ["alice", "bob"])
async def test_while_one_kme_is_full_the_session_waits_and_no_key_is_lost(
    full: str,
    signatures: dict[str, Signatures],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """For longer than a party waits for a message. Bob says so, too, if it is Alice's KME."""
    monkeypatch.setattr(link_feed, "SLOW", 0.1)
    monkeypatch.setattr(link_feed, "LATE", 0.05)
    monkeypatch.setattr(remote, "LATE", 0.05)
    monkeypatch.setitem(party._Party.__init__.__kwdefaults__, "timeout", 2.0)
    port = free_port()
    feeds = {name: feed(name, port, signatures) for name in ("alice", "bob")}
    taken: dict[str, list[str]] = {name: [] for name in feeds}
    room = trio.Event()
    begun, done = ({name: trio.Event() for name in feeds} for _ in range(2))

    async def kme(name: str) -> None:
        async for batch in feeds[name].ends[0]:
            taken[name] += [one.key_id for one in batch]
            begun[name].set()
            if name == full:
                await room.wait()
            if len(taken[name]) >= 100:
                done[name].set()

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for name, one in feeds.items():
                nursery.start_soon(one.run)
                nursery.start_soon(kme, name)
            for event in begun.values():
                await event.wait()
            await trio.sleep(3.0)
            assert "no block is begun" in caplog.text
            assert caplog.text.count("light is delayed") == (full == "alice")
            room.set()
            for event in done.values():
                await event.wait()
            nursery.cancel_scope.cancel()
    fewest = min(map(len, taken.values()))
    assert taken["alice"][:fewest] == taken["bob"][:fewest]
    assert "a new session begins" not in caplog.text


class FailingLink:
    """A link in one process whose first sessions fail."""

    def __init__(self, errors: list[BaseException]) -> None:
        self._errors = errors

    @asynccontextmanager
    async def open(self) -> AsyncIterator["FailingLink"]:
        yield self

    async def block(self) -> Any:
        if self._errors:
            raise self._errors.pop()
        block = SimpleNamespace(keys=("a key",))
        return block, block


async def test_a_link_in_one_process_begins_again(autojump_clock: Any) -> None:
    """Whatever ended its session, a passing lack of memory or threads, or a process that slept."""
    errors: list[BaseException] = [
        NoThread(),
        MemoryError(),
        ExceptionGroup("", [MemoryError()]),
        LinkError("the other party does not answer"),
        BlockAborted("too many errors"),
        LedgerDry("no authentication key is left"),
        ZeroDivisionError(),
    ]
    pair = link_feed.PairFeed(lambda: FailingLink(errors))  # type: ignore[arg-type, return-value]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pair.run)
        for end in pair.ends:
            assert await anext(end) == ["a key"]
        nursery.cancel_scope.cancel()
    assert not errors


async def test_sessions_that_are_cut_use_up_the_ledger_slowly(
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    signatures: dict[str, Signatures],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A man in the middle cuts each session after a tag; a block in between sets the pause back."""
    bob = feed("bob", 1, signatures)
    bob.ledger.add(0, "a block before", bytes(512))
    began: list[float] = []

    async def reach() -> list[Any]:
        await trio.lowlevel.checkpoint()
        return []

    async def session(*_: object) -> None:
        began.append(trio.current_time())
        if len(began) == 9:
            bob._used, bob._fruitless = bob.ledger.used, 0  # a block was made
        if len(began) != 4:  # that one ends before its first tag
            bob.ledger.draw(len(began), Direction.BOB_TO_ALICE, 16)
        await trio.sleep(link_feed.PAUSE)
        if len(began) == 14:
            scope.cancel()

    monkeypatch.setattr(bob, "_reach", reach)
    monkeypatch.setattr(bob, "_session", session)
    with trio.CancelScope() as scope:
        await bob._run_bob()
    pauses = [round(after - before) for before, after in pairwise(began)]
    assert pauses == [1, 1, 17, 1, 65, 257, 601, 601, 1, 1, 17, 65, 257]
    assert (
        "3 consecutive attempts used authentication key and made no block; 464 bytes" in caplog.text
    )


async def test_blocks_that_are_given_up_use_up_the_ledger_slowly(
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    signatures: dict[str, Signatures],
) -> None:
    """Light disturbed for ten minutes does not end the link; a block sets the pause back."""
    end = feed("bob", 1, signatures)
    end.ledger.add(0, "a block before", bytes(512))
    began: list[float] = []

    async def block(_: object) -> Any:
        began.append(trio.current_time())
        end.ledger.draw(len(began), Direction.BOB_TO_ALICE, 32)
        if len(began) == 4:
            end.ledger.add(4, "a block", bytes(128))
            return SimpleNamespace(keys=())
        raise BlockAborted("too many errors")

    monkeypatch.setattr(party.Bob, "block", block)
    for _ in range(12):
        await end._block(object.__new__(party.Bob))
    pauses = [round(after - before) for before, after in pairwise(began)]
    assert pauses == [1, 1, 17, 0, 1, 1, 17, 65, 257, 601, 1]  # less than a block's tags is left


def test_the_metrics_have_the_ledger_as_it_is_while_no_block_is_made(
    tmp_path: Path, signatures: dict[str, Signatures]
) -> None:
    address, credential = TcpAddress("127.0.0.1", 1), tmp_path / "alice" / "cert.pem"
    link = LinkConfig(party="bob", address=address, peer_credential=credential, tuned=False)
    config: Any = SimpleNamespace(
        id="a", key=tmp_path / "bob" / "key.pem", limits=SimpleNamespace(key_size=256)
    )
    metrics = KmeMetrics()
    feed_: Any = link_feed.link_feed(config, SimpleNamespace(id="b", link=link), metrics)  # type: ignore[arg-type]
    for change, bits in (
        (lambda: None, 0),
        (lambda: feed_.ledger.add(1, "a block", bytes(512)), 4096),
        (lambda: feed_.ledger.draw(2, Direction.BOB_TO_ALICE, 64), 3584),
    ):
        change()
        shown = f'hybridkex_qkd_link_ledger_bits{{kme="a",link="b"}} {bits}.0\n'
        assert shown in metrics.text().decode()


TROUBLES = [
    LedgerDry("the authentication key is used up"),
    LedgerLost("the other party lost its key"),
    LinkError("the other party closed the connection"),
    BlockAborted("too many errors"),
    ZeroDivisionError(),
    MemoryError(),
]


@pytest.mark.parametrize("error", TROUBLES, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("kind", ["one process", "two processes"])
async def test_a_link_without_blocks_logs_a_bounded_number_of_lines(
    kind: str,
    error: Exception,
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    signatures: dict[str, Signatures],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whatever the trouble is; the line that comes after a block is not held back."""
    monkeypatch.setitem(TokenBucket.__init__.__kwdefaults__, "clock", trio.current_time)
    failing = True

    async def block(*_: object) -> Any:
        await trio.sleep(0.1)
        if failing:
            raise error
        return SimpleNamespace(keys=("a key",))

    if kind == "one process":
        link = SimpleNamespace(open=lambda: contextlib.nullcontext(link))

        async def pair(*_: object) -> Any:
            return (await block(),) * 2

        link.block = pair
        feed_: Any = link_feed.PairFeed(lambda: link, name="a to b")  # type: ignore[arg-type, return-value]
    else:
        feed_ = feed("bob", 1, signatures, name="a to b")

        async def reach() -> Any:
            return trio.testing.memory_stream_pair()

        monkeypatch.setattr(feed_, "_reach", reach)
        monkeypatch.setattr(link_feed, "keep_alive", lambda _: None)
        monkeypatch.setattr(party.Bob, "block", block)

    def lines() -> list[str]:
        found = [one.getMessage() for one in caplog.records if one.levelname != "DEBUG"]
        caplog.clear()
        return [one for one in found if "suppressed" not in one]

    async def taken(end: link_feed.LinkEnd) -> None:
        async for _ in end:
            pass

    async with trio.open_nursery() as nursery:
        nursery.start_soon(feed_.run)
        for end in feed_.ends:
            nursery.start_soon(taken, end)
        await trio.sleep(300)
        told = lines()
        # A ledger that is lost or used up is said at once and then once a minute.
        at_once = 1 if isinstance(error, LedgerDry | LedgerLost) else 5
        assert at_once + 3 <= len(told) <= at_once + 5
        assert all(one.startswith("a to b: ") for one in told)
        for _ in range(3):
            failing = False
            await trio.sleep(15)
            failing = True
            caplog.clear()
            await trio.sleep(2)
            assert lines()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("who", ["alice", "bob"])
async def test_what_is_said_once_is_not_lost_among_other_lines(
    who: str,
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    signatures: dict[str, Signatures],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Sessions that were cut have used up the lines when the other party or the port is away."""
    monkeypatch.setitem(TokenBucket.__init__.__kwdefaults__, "clock", trio.current_time)

    async def refused(*_: object, **__: object) -> Any:
        raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")

    monkeypatch.setattr(trio, "open_tcp_stream", refused)
    monkeypatch.setattr(link_feed, "open_tcp_listeners", refused)
    feed_ = feed(who, 1, signatures)
    for level in (logging.WARNING, logging.ERROR):
        for _ in range(5):
            feed_._troubles.log(level, "the connection broke")
    with trio.move_on_after(300):
        await feed_.run()
    [line] = [one.getMessage() for one in caplog.records if "tried again" in one.getMessage()]
    assert "Connection refused" in line


@pytest.mark.parametrize("different", ["version", "settings"])
async def test_both_operators_read_why_two_ends_do_not_fit(
    different: str,
    monkeypatch: pytest.MonkeyPatch,
    signatures: dict[str, Signatures],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The connections that one end closes do not hide what the other end knows."""
    encode, words = Hello.encode, {"version": "another version", "settings": "different settings"}
    changed = 0 if different == "version" else 40

    def other(hello: Hello) -> bytes:
        body = bytearray(encode(hello))
        body[changed] ^= 1 << hello.role
        return bytes(body)

    monkeypatch.setattr(Hello, "encode", other)
    port = free_port()
    said = {"alice": 0, "bob": 0}
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for name in said:
                nursery.start_soon(feed(name, port, signatures, name=name).run)
            while min(said.values()) < 2:
                await trio.sleep(0.1)
                lines = [one.getMessage() for one in caplog.records]
                ended = [one for one in lines if "a new session begins" in one]
                assert all(words[different] in one for one in ended)
                said = {name: sum(one.startswith(name) for one in ended) for name in said}
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("refuses", ["alice", "bob"])
async def test_both_operators_read_which_credential_does_not_fit(
    refuses: str,
    tmp_path: Path,
    signatures: dict[str, Signatures],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One end has the certificate of somebody else for that of the other."""
    other, wrong = {"alice": "bob", "bob": "alice"}[refuses], tmp_path / "eve" / "cert.pem"
    key = tmp_path / refuses / "key.pem"
    signatures[refuses] = Signatures.from_files(key, wrong)
    port = free_port()
    said = {
        refuses: f"does not verify with the certificate last read from {wrong}",
        other: "it does not accept our signature: check that the certificate of ours",
    }

    def lines(who: str) -> list[str]:
        found = [one.getMessage() for one in caplog.records]
        return [one for one in found if one.startswith(f"{who}: ") and said[who] in one]

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for name in sorted(said, reverse=True):  # Bob has to wait for Alice's port
                nursery.start_soon(feed(name, port, signatures, name=name).run)
            await trio_until(lambda: all(map(lines, said)))
            nursery.cancel_scope.cancel()


async def test_bob_begins_another_session_after_a_greeting_that_was_cut(
    signatures: dict[str, Signatures], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alice may still have a connection of the one before, and refuse a second of its kind."""
    monkeypatch.setattr(link_feed, "PAUSE", 0.0)
    answers = [b"", b"\1", b"", b"\1", b"\1"]
    seen: list[bytes] = []

    async def alice(stream: trio.SocketStream) -> None:
        seen.append(await read_exactly(stream, 1 + NUMBER))
        await stream.send_all(bytes(32))
        await read_exactly(stream, int.from_bytes(await read_exactly(stream, 2)))
        await stream.send_all(answers[len(seen) - 1])
        await stream.aclose()

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
            nursery.start_soon(trio.serve_listeners, alice, [listener])
            for stream in await feed("bob", listener.socket.getsockname()[1], signatures)._reach():
                await stream.aclose()
            nursery.cancel_scope.cancel()
    assert [one[:1] for one in seen] == [b"C", b"C", b"Q", b"C", b"Q"]
    first, second, cut, third, last = (one[1:] for one in seen)
    assert second == cut
    assert third == last
    assert len({first, second, third}) == 3


async def test_alice_says_that_she_waits(
    autojump_clock: trio.testing.MockClock,
    signatures: dict[str, Signatures],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Once for each time, and however often Bob comes and goes, at a bounded rate."""
    monkeypatch.setattr(link_feed, "ALONE", 0.02)
    alice = feed("alice", 1, signatures)
    put, arrived = trio.open_memory_channel[Any](0)
    with trio.move_on_after(0.2):
        await alice._next_session(arrived)
    [line] = [one.getMessage() for one in caplog.records]
    assert "no session for 0.02 s: the other party has not connected to 127.0.0.1:1" in line
    async with trio.open_nursery() as nursery:
        for _ in range(9):
            nursery.start_soon(alice._next_session, arrived)
            await trio.sleep(0.05)
            await put.send("a session")
    assert len([one for one in caplog.records if "has not connected" in one.getMessage()]) == 5


OTHERS = {
    "preset": "bbm92",
    "distance_km": 1.0,
    "block_bits": 20_000,
    "tuned": False,
    "real_time": True,
    "bootstrap": "psk",
    "reauthentication": "signatures",
    "party": "bob",
    "address": TcpAddress("127.0.0.1", 2),
    "peer_credential": Path("eve/cert.pem"),
}
"""Another value for each setting of a link."""
READ = {
    "no link": set[str](),
    "one process": {"preset", "distance_km", "block_bits", "tuned", "real_time", "bootstrap"},
    "alice": set(OTHERS) - {"bootstrap"},
    "bob": set(OTHERS) - {"bootstrap"},
}


@pytest.mark.parametrize("mode", sorted(READ))
def test_each_setting_of_a_link_is_held_or_refused(
    mode: str, tmp_path: Path, signatures: dict[str, Signatures]
) -> None:
    """Whatever the mode: none is silently not read."""
    remote = mode in ("alice", "bob")
    usual: dict[str, Any] = {"preset": "rusca2018", "distance_km": 0.0, "block_bits": 30_000}
    if remote:
        peer = "bob" if mode == "alice" else "alice"
        usual |= {"party": mode, "address": TcpAddress("127.0.0.1", 1)}
        usual |= {"peer_credential": tmp_path / peer / "cert.pem"}
    config: Any = SimpleNamespace(
        id="a", key=tmp_path / "alice" / "key.pem", limits=SimpleNamespace(key_size=256)
    )

    def held(**settings: Any) -> tuple[Any, ...]:
        peer = PeerConfig(
            id="b",
            saes=(),
            url="https://b.example" if remote else None,
            producer="random" if mode == "no link" else "link",
            link=LinkConfig(**settings),
        )
        made: Any = link_feed.link_feed(config, peer, KmeMetrics())
        if remote:
            certificate = made._signatures.certificate
            return made._settings.digest, made._party, made._address, certificate
        return made._make.args[0].digest, made._make.keywords["bootstrap"]

    with pytest.raises(ConfigError, match="a port other than 0"):
        held(**usual | {"address": TcpAddress("127.0.0.1", 0)})
    assert sorted(OTHERS) == sorted(one.name for one in dataclasses.fields(LinkConfig))
    before = None if mode == "no link" else held(**usual)
    for name, value in OTHERS.items():
        if name == "party":
            value = "alice" if mode == "bob" else "bob"  # noqa: PLW2901
        if name == "peer_credential":
            value = tmp_path / value  # noqa: PLW2901
        if name in READ[mode]:
            assert held(**usual | {name: value}) != before, name
        else:
            with pytest.raises(ConfigError):
                held(**usual | {name: value})
    with pytest.raises(ConfigError, match=r"bootstrap must be|bootstrap = |a link table needs"):
        held(**usual | {"bootstrap": ""})


@pytest.mark.parametrize("asked", [None, "ecdsa", "ml-dsa", "psk", "rsa", "nonsense"])
@pytest.mark.parametrize("kinds", ["ecdsa ecdsa", "ml-dsa ml-dsa", "ecdsa ml-dsa", "rsa rsa"])
def test_what_signs_the_first_block_is_what_was_asked_for(
    asked: str | None, kinds: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own, other = kinds.split()
    for name, kind in (("own", own), ("other", other)):
        _credential(tmp_path / name, kind)
    config: Any = SimpleNamespace(
        id="a", key=tmp_path / "own" / "key.pem", limits=SimpleNamespace(key_size=256)
    )
    link = LinkConfig(
        party="bob",
        address=TcpAddress("127.0.0.1", 1),
        peer_credential=tmp_path / "other" / "cert.pem",
        bootstrap=asked,
        tuned=False,
    )
    peer = PeerConfig(id="b", saes=(), url="https://b.example", producer="link", link=link)
    caplog.set_level(logging.INFO)
    if asked is None or asked == own == other:
        link_feed.link_feed(config, peer, KmeMetrics())
        assert f"ours {own}, those of the other party {other}" in caplog.text
        return
    right = f'write bootstrap = "{own}"' if own == other else "leave it out"
    with pytest.raises(ConfigError, match=f'bootstrap = "{asked}", but .*{right}'):
        link_feed.link_feed(config, peer, KmeMetrics())


@functools.cache
def _identity(kind: str) -> tuple[DevCa, Any]:
    ca = DevCa.create()
    algorithm = {"ecdsa": "ecdsa", "ml-dsa": "mldsa65", "rsa": "rsa"}[kind]
    return ca, ca.issue("kme", algorithm=algorithm)


def _credential(folder: Path, kind: str) -> None:
    write_identity(folder, *_identity(kind))


@pytest.mark.parametrize("tuned", [True, False])
def test_a_link_that_cannot_be_is_named(tuned: bool) -> None:
    config: Any = SimpleNamespace(id="a", limits=SimpleNamespace(key_size=256 if tuned else 7))
    link = LinkConfig(distance_km=900.0, tuned=tuned)
    peer = PeerConfig(id="b", saes=(), producer="link", link=link)
    with pytest.raises(ConfigError, match=r"^a: the QKD link to b: "):
        link_feed.link_feed(config, peer, KmeMetrics())


def test_the_counters_of_a_link_begin_at_zero(
    tmp_path: Path, signatures: dict[str, Signatures]
) -> None:
    metrics = KmeMetrics()
    config: Any = SimpleNamespace(
        id="a", key=tmp_path / "alice" / "key.pem", limits=SimpleNamespace(key_size=256)
    )
    link = LinkConfig(preset="rusca2018", distance_km=0.0, block_bits=30_000)
    link_feed.link_feed(config, PeerConfig(id="b", saes=(), producer="link", link=link), metrics)
    shown = metrics.text().decode()
    for name in ("sifted_bits", "secret_bits"):
        assert f'hybridkex_qkd_link_{name}_total{{kme="a",link="b"}} 0.0' in shown
    for outcome in ("made", "aborted"):
        labels = f'kme="a",link="b",outcome="{outcome}"'
        assert f"hybridkex_qkd_link_blocks_total{{{labels}}} 0.0" in shown
