"""Sessions that renew their keys while data flows: the same on every event loop."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from test_every_shell import chain, together

from hybridkex import (
    X25519,
    ClientConfig,
    DevCa,
    FreshKeys,
    KeyUpdates,
    Policy,
    QkdPskSource,
    Requirement,
    ServerConfig,
    TrustStore,
)
from hybridkex.errors import (
    AlertReceived,
    InternalError,
    KeySourceExhausted,
    KeySourceUnavailable,
    KeyUnknown,
    PolicyRefused,
)
from hybridkex.net.event_loop import current_time, on_trio, sleep
from hybridkex.net.log import BoundedLog
from hybridkex.qkd.in_process import InProcessSource, in_process_pair
from hybridkex.qkd.source import KeyReference, QkdKey
from hybridkex.shell import key_renewer
from hybridkex.tls.protection import WriteProtection

CA = DevCa.create(algorithm="ed25519")
TRUST, IDENTITY = TrustStore((CA.certificate,)), CA.issue("localhost", algorithm="ed25519")
REQUIRE, PREFER, OFF = Requirement.REQUIRE, Requirement.PREFER, Requirement.OFF


@pytest.fixture(autouse=True)
def lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """All lines of a test are written, however many the tests before it have caused."""
    fresh = BoundedLog(logging.getLogger("hybridkex.fresh_keys"))
    monkeypatch.setattr(key_renewer, "_LINES", fresh)


class Kme:
    """A key source that a test can make slow, or break."""

    def __init__(self, source: InProcessSource) -> None:
        self._source = source
        self.local_sae, self.peer_sae = source.local_sae, source.peer_sae
        self.knows, self.status = source.knows, source.status
        self.delay = self.look_up_delay = 0.0
        self.held = self.asked = False
        """Whether no answer comes, and whether somebody waits for one."""
        self.down = self.empty = self.forgets = False
        self.drawn = 0

    async def get_key(self) -> QkdKey:
        await self._wait()
        if self.empty:
            raise KeySourceExhausted("no key is left")
        self.drawn += 1
        return await self._source.get_key()

    async def get_key_with_id(self, name: KeyReference) -> QkdKey:
        await sleep(self.look_up_delay)
        await self._wait()
        if self.forgets:
            raise KeyUnknown("no such key")
        return await self._source.get_key_with_id(name)

    async def _wait(self) -> None:
        await sleep(self.delay)
        while self.held:
            self.asked = True
            await sleep(0.005)
        if self.down:
            raise KeySourceUnavailable("the KME does not answer")


class Sites:
    """Two configurations with QKD keys, for the handshake and for the updates."""

    def __init__(
        self,
        *,
        client: FreshKeys | None = None,
        server: FreshKeys | None = None,
        policy: dict[str, Any] | None = None,
        server_policy: dict[str, Any] | None = None,
    ) -> None:
        self.alice, self.bob = map(Kme, in_process_pair("alice", "bob"))
        stock: dict[str, Any] = {"post_quantum": PREFER, "fresh_keys": REQUIRE, **(policy or {})}
        theirs = {**stock, **(server_policy or {})}
        self.client = ClientConfig(
            verifier=TRUST,
            groups=(X25519,),
            psk_source=QkdPskSource(self.alice),
            fresh_keys=client,
            policy=Policy(**stock),
        )
        self.server = ServerConfig(
            identities=(IDENTITY,),
            groups=(X25519,),
            psk_source=QkdPskSource(self.bob),
            fresh_keys=server,
            policy=Policy(**theirs),
        )


Run = Callable[[Sites, Callable[[Any, Any], Awaitable[None]]], None]


async def echo(end: Any) -> None:
    while data := await end.receive():
        await end.send(data)
    await end.send_eof()


async def epoch_of(end: Any, number: int) -> None:
    while end.session.epoch < number:
        await sleep(0.005)


def test_a_schedule_under_load_in_both_directions(run: Run) -> None:
    """With both ends on a schedule, so that requests cross now and then."""
    often = FreshKeys(every=0.01, jitter=0.9)
    sites = Sites(client=often, server=often)
    size = 1 << 20

    async def conversation(client: Any, server: Any) -> None:
        assert client.session.key_updates is server.session.key_updates is KeyUpdates.FRESH
        said = {client: bytearray(), server: bytearray()}

        async def speak(end: Any) -> None:
            number = 0
            while end.session.epoch < 12 or len(said[end]) < size:
                piece = number.to_bytes(4, "big") * 5000
                said[end] += piece
                await end.send(piece)
                number += 1
                await sleep(0.001)
            await end.send_eof()

        heard = {}

        async def hear(end: Any) -> None:
            heard[end] = await end.receive_all()

        await together(speak(client), speak(server), hear(client), hear(server))
        assert heard[client] == said[server]
        assert heard[server] == said[client]
        ours, theirs = client.session.epochs, server.session.epochs
        assert min(len(ours), len(theirs)) >= 11
        for one, other in zip(ours, theirs, strict=False):
            assert one.qkd_key_ids == other.qkd_key_ids != ()
            assert one.confirmed
            assert {one.why, other.why} == {"every", "peer"}
        await client.close()

    run(sites, conversation)


@pytest.mark.parametrize("qkd", [REQUIRE, OFF], ids=["qkd", "no qkd"])
def test_peers_that_say_nothing(run: Run, qkd: Requirement) -> None:
    """Neither has data to send: the messages of the updates go out all the same."""
    sites = Sites(client=FreshKeys(every=0.01), policy={"fresh_qkd": qkd})

    async def conversation(client: Any, server: Any) -> None:
        async def watch() -> None:
            await epoch_of(client, 3)
            await client.send(b"done")
            await client.send_eof()

        async def listen(end: Any) -> None:
            assert await end.receive_all() in (b"done", b"")

        async def close_server() -> None:
            await listen(server)
            await server.send_eof()

        await together(watch(), close_server(), listen(client))

    run(sites, conversation)


def test_an_update_that_is_asked_for(run: Run) -> None:
    sites = Sites()

    async def conversation(client: Any, server: Any) -> None:
        async def speak() -> None:
            for number in range(1, 6):
                await (client if number % 2 else server).update_keys()
                while client.session.epoch < number:
                    await client.send(b"x")
                    assert await client.receive() != b""
                    await sleep(0.002)
            await client.send_eof()
            assert await client.receive_all() is not None

        await together(echo(server), speak())
        assert client.session.epoch == server.session.epoch == 5
        assert [one.why for one in client.session.epochs][:2] == ["asked", "peer"]

    run(sites, conversation)


@pytest.fixture
def half_is_fifty_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key has protected half of the records that it may after 50."""
    monkeypatch.setattr(
        WriteProtection, "update_early", lambda self: setattr(self, "_update_at", 50)
    )


@pytest.mark.usefixtures("half_is_fifty_records")
def test_a_key_that_has_protected_half_of_its_records(run: Run) -> None:
    """The engine asks for the update while it sends; all that comes is short."""
    sites = Sites(client=FreshKeys(every=3600))

    async def conversation(client: Any, server: Any) -> None:
        async def speak() -> None:
            for _ in range(1000):
                await client.send(b"x")
                await client.receive_exactly(1)
                if client.session.epoch:
                    break
            await client.send_eof()

        await together(echo(server), speak())
        assert client.session.epoch
        assert client.session.epochs[0].why in ("key limit", "peer")

    run(sites, conversation)


@pytest.mark.usefixtures("half_is_fifty_records")
def test_an_end_that_only_sends_renews_its_key_in_time(run: Run) -> None:
    """Nothing comes while the engine asks for the update, so that nobody takes its events."""
    sites = Sites(client=FreshKeys(every=3600))

    async def conversation(client: Any, server: Any) -> None:
        async def speak() -> None:
            for _ in range(2000):
                await client.send(b"x")
                await sleep(0.001)
                if client.session.epoch:
                    break
            await client.send_eof()

        async def listen() -> None:
            while await server.receive():
                pass
            await server.send_eof()

        async def hear() -> None:
            assert await client.receive() == b""

        await together(listen(), speak(), hear())
        assert client.session.epoch

    run(sites, conversation)


def test_after_so_many_bytes(run: Run) -> None:
    sites = Sites(client=FreshKeys(every=3600, after_bytes=1 << 16))

    async def conversation(client: Any, server: Any) -> None:
        async def speak() -> None:
            while client.session.epoch < 3:
                await client.send(bytes(5000))
                await client.receive_exactly(5000)
                await sleep(0)
            await client.send_eof()
            assert await client.receive() == b""

        await together(echo(server), speak())
        assert {one.why for one in client.session.epochs} == {"after_bytes"}

    run(sites, conversation)


def test_a_slow_kme_never_stalls_the_data(run: Run) -> None:
    """While it does not answer at all, the two talk: first alice's, then bob's."""
    sites = Sites(client=FreshKeys(every=0.05, deadline=60))

    async def conversation(client: Any, server: Any) -> None:
        kmes = [sites.alice, sites.bob]
        for kme in kmes:
            kme.held = True

        async def speak() -> None:
            for kme in kmes:
                exchanged = 0
                while exchanged < 20:
                    await client.send(b"ping")
                    assert await client.receive_exactly(4) == b"ping"
                    exchanged += kme.asked
                    await sleep(0.002)
                assert client.session.epoch == 0
                kme.held = False
            while client.session.epoch < 1:
                await client.send(b"ping")
                assert await client.receive_exactly(4) == b"ping"
                await sleep(0.002)
            await client.send_eof()
            assert await client.receive() == b""

        await together(echo(server), speak())

    run(sites, conversation)


def test_an_outage_under_prefer_and_the_recovery(run: Run, caplog: Any) -> None:
    sites = Sites(client=FreshKeys(every=0.02), policy={"psk": PREFER})

    async def conversation(client: Any, server: Any) -> None:
        async def speak() -> None:
            await epoch_of(client, 2)
            sites.alice.down = True
            await epoch_of(client, client.session.epoch + 3)
            sites.alice.down, sites.bob.down = False, True
            await epoch_of(client, client.session.epoch + 3)
            sites.bob.down = False
            await epoch_of(client, client.session.epoch + 3)
            await client.send_eof()
            assert await client.receive() == b""

        await together(echo(server), speak(), drain(client))
        missing = [one.qkd_missing for one in client.session.epochs]
        assert missing[0] is None
        assert "the KME does not answer" in missing
        assert "the peer did not find the QKD key" in missing
        assert missing[-1] is None
        for one in client.session.epochs:
            assert (one.qkd_missing is None) is bool(one.qkd_key_ids)

    async def drain(end: Any) -> None:
        """Somebody has to read; nothing comes."""

    with caplog.at_level(logging.WARNING, "hybridkex"):
        run_reading(run, sites, conversation)
    assert "has no QKD key" in caplog.text


def run_reading(run: Run, sites: Sites, conversation: Any) -> None:
    """A conversation in which the client says a byte now and then, so that it reads."""

    async def with_pings(client: Any, server: Any) -> None:
        inner_receive = client.receive
        over = False

        async def ping() -> None:
            while not over:
                await client.send(b".")
                assert await inner_receive() != b""
                await sleep(0.002)

        async def talk() -> None:
            nonlocal over

            class Quiet:
                """The client for the conversation: its end is the end of the pings."""

                session = property(lambda self: client.session)

                async def send_eof(self) -> None:
                    nonlocal over
                    over = True

                async def receive(self) -> bytes:
                    return b""

            await conversation(Quiet(), server)

        async def end_server() -> None:
            while not over:
                await sleep(0.01)
            await sleep(0.02)
            await client.send_eof()

        await together(ping(), talk(), end_server())

    run(sites, with_pings)


@pytest.mark.parametrize("down", ["alice", "bob"])
def test_an_outage_under_require_ends_the_session(run: Run, down: str) -> None:
    sites = Sites(client=FreshKeys(every=0.02, deadline=0.3))

    async def conversation(client: Any, server: Any) -> None:
        reasons: list[BaseException | None] = []

        async def speak() -> None:
            while client.session.epoch < 2:
                await client.send(b"x")
                await client.receive()
                await sleep(0.002)
            getattr(sites, down).down = True
            began = current_time()
            try:
                assert await client.receive() == b"nobody sends anything"
            except Exception as error:
                reasons.append(error)
            assert 0.25 < current_time() - began < 3

        async def answer() -> None:
            try:
                while data := await server.receive():
                    await server.send(data)
            except Exception as error:
                reasons.append(error)

        await together(speak(), answer())
        causes = [one for reason in reasons for one in chain(reason)]
        assert any(isinstance(one, PolicyRefused) for one in causes)
        assert any(isinstance(one, AlertReceived) for one in causes)
        assert "before its deadline" in str(causes)

    run(sites, conversation)


def test_an_outage_shorter_than_the_deadline(run: Run) -> None:
    sites = Sites(client=FreshKeys(every=0.02, deadline=10))

    async def conversation(client: Any, server: Any) -> None:
        async def speak() -> None:
            await reach(2)
            sites.alice.down = True
            await keep_talking(0.2)
            before = client.session.epoch
            sites.alice.down = False
            await reach(before + 2)
            await client.send_eof()
            assert await client.receive() == b""

        async def reach(number: int) -> None:
            while client.session.epoch < number:
                await keep_talking(0.005)

        async def keep_talking(seconds: float) -> None:
            until = current_time() + seconds
            while current_time() < until:
                await client.send(b"x")
                assert await client.receive() == b"x"
                await sleep(0.002)

        await together(echo(server), speak())
        assert all(one.qkd_key_ids for one in client.session.epochs)

    run(sites, conversation)


def test_a_schedule_with_a_peer_that_knows_key_update_alone(run: Run) -> None:
    sites = Sites(
        client=FreshKeys(every=0.01),
        policy={"fresh_keys": PREFER},
        server_policy={"fresh_keys": OFF},
    )

    async def conversation(client: Any, server: Any) -> None:
        assert client.session.key_updates is KeyUpdates.STANDARD

        async def speak() -> None:
            for _ in range(40):
                await client.send(b"x")
                assert await client.receive() == b"x"
                await sleep(0.003)
            await client.send_eof()
            assert await client.receive() == b""

        await together(echo(server), speak())
        assert client.session.epoch == 0

    run(sites, conversation)


def test_a_bug_in_the_renewal_ends_the_session(run: Run, caplog: Any) -> None:
    sites = Sites()

    async def fails() -> QkdKey:
        raise RuntimeError("a bug of the key source")

    async def conversation(client: Any, server: Any) -> None:
        sites.alice.get_key = fails  # type: ignore[method-assign]
        reasons: list[BaseException] = []

        async def listen(end: Any) -> None:
            try:
                await end.receive()
            except Exception as error:
                reasons.extend(chain(error))

        await together(client.update_keys(), listen(client), listen(server))
        assert any(isinstance(one, InternalError) for one in reasons)
        assert any(isinstance(one, AlertReceived) for one in reasons)

    with caplog.at_level(logging.ERROR, "hybridkex"):
        run(sites, conversation)
    assert "the keys are no longer renewed" in caplog.text


def renewer_of(end: Any) -> Any:
    return end.stream._renewer if hasattr(end, "stream") else end.writer.transport._life.renewer


def test_what_the_peer_sends_is_no_data_of_ours(run: Run) -> None:
    """BoringSSL takes 32 key updates without data of ours between them, whatever it sends."""
    sites = Sites(client=FreshKeys(every=3600), policy={"fresh_keys": PREFER})

    async def conversation(client: Any, server: Any) -> None:
        assert client.session.key_updates is KeyUpdates.STANDARD
        renewer = renewer_of(client)
        renewer._in_a_row = 7
        for size in (1, 100, 40_000, 1):
            await together(server.send(bytes(size)), client.receive_exactly(size))
        assert renewer._in_a_row == 7
        assert renewer._timer.bytes == 40_102
        await client.send(b"x")
        await server.receive_exactly(1)
        assert renewer._in_a_row == 0
        assert renewer._timer.bytes == 40_103

    sites.server = replace(sites.server, policy=Policy(post_quantum=PREFER, fresh_keys=OFF))
    run(sites, conversation)


def test_a_program_cancels_all_tasks_and_goes_on(run: Run) -> None:
    """A session whose keys are not renewed any more ends. (trio's system tasks are no task of the
    program.)"""
    sites = Sites(client=FreshKeys(every=3600), server=FreshKeys(every=3600))

    async def conversation(client: Any, server: Any) -> None:
        if on_trio():
            return
        await client.send(b"x")
        await server.receive_exactly(1)
        renewing = [one for one in asyncio.all_tasks() if "_begin" in repr(one.get_coro())]
        assert len(renewing) == 2
        for one in renewing:
            one.cancel()
        why = r"the renewal of the keys was cancelled|the peer sent internal_error"
        for end in (client, server):
            with pytest.raises(Exception, match=why):
                await end.receive()

    run(sites, conversation)
