"""A key source that never answers, and the pace of key updates: the same on every event loop."""

import math
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest
from test_every_shell import chain, together
from test_fresh_keys_on_every_loop import Sites, epoch_of
from test_one_time_pad_on_every_loop import Sites as PadSites
from test_one_time_pad_on_every_loop import pad_of

from hybridkex import FreshKeys, OneTimePad, QkdLimits, QkdPskSource
from hybridkex.errors import PadExhausted, PolicyRefused
from hybridkex.net.event_loop import Event, current_time, sleep
from hybridkex.shell.key_renewer import KeyRenewer
from hybridkex.tls.epochs import Epoch
from hybridkex.tls.events import EpochBegan

Conversation = Callable[[Any, Any], Awaitable[None]]
PATIENT = QkdLimits(timeout=3600.0)


def patient(sites: Any) -> Any:
    """Leave all time limits to the sessions."""
    for config, source in ((sites.client, sites.alice), (sites.server, sites.bob)):
        object.__setattr__(config, "psk_source", QkdPskSource(source, limits=PATIENT))
    return sites


async def hang() -> Any:
    await Event().wait()


async def listen(end: Any) -> BaseException | None:
    try:
        while await end.receive():
            pass
    except Exception as error:
        return error
    return None


def test_the_deadline_holds_while_a_draw_hangs(run: Any) -> None:
    sites = patient(Sites(client=FreshKeys(every=0.05, deadline=0.3)))

    async def conversation(client: Any, server: Any) -> None:
        sites.alice.get_key = hang
        began = current_time()
        error = await listen(client)
        assert error is not None
        assert any(isinstance(one, PolicyRefused) for one in chain(error))
        assert current_time() - began < 3

    run(sites, conversation)


@pytest.mark.parametrize("question", ["get_key", "status"])
def test_the_peer_goes_on_while_our_question_hangs(run: Any, question: str) -> None:
    """Its updates are answered, and ours wait for no statistics."""
    ours = FreshKeys(every=0.05, deadline=math.inf)
    theirs = None if question == "status" else FreshKeys(every=0.05, deadline=5.0)
    sites = patient(Sites(client=ours, server=theirs))

    async def conversation(client: Any, server: Any) -> None:
        setattr(sites.alice, question, hang)

        async def wait() -> None:
            await epoch_of(client, 5)
            await client.close()
            await server.close()

        async def ignore(end: Any) -> None:
            with suppress(Exception):
                await listen(end)

        await together(wait(), ignore(client), ignore(server))

    run(sites, conversation)


def test_the_deadline_of_a_pad_holds_while_a_draw_ahead_hangs(run: Any) -> None:
    sites = patient(PadSites(OneTimePad(hold=1024, deadline=0.3)))

    async def conversation(client: Any, server: Any) -> None:
        async def speak() -> None:
            began = current_time()
            await client.send(b"x" * 100)
            while pad_of(client).message < 900:
                await sleep(0.01)
            sites.alice.get_key = hang
            error: BaseException | None = None
            try:
                while current_time() - began < 5:
                    await client.send(b"x" * 50)
                    await sleep(0.001)
            except Exception as caught:
                error = caught
            if not client.send_waits:
                error = await listen(client)
            assert error is not None
            assert any(isinstance(one, PadExhausted) for one in chain(error))
            assert current_time() - began < 3

        await together(speak(), listen(server))

    run(sites, conversation)


def test_a_pad_waits_for_no_statistics(run: Any) -> None:
    sites = patient(PadSites(OneTimePad(hold=256, deadline=2.0)))

    async def conversation(client: Any, server: Any) -> None:
        sites.alice.status = hang

        async def speak() -> None:
            for _ in range(20):
                await client.send(b"x" * 100)
            await client.send_eof()

        heard = bytearray()

        async def hear() -> None:
            heard.extend(await server.receive_all())

        await together(speak(), hear())
        assert len(heard) == 2000

    run(sites, conversation)


@pytest.mark.parametrize("who", ["client", "server"])
def test_updates_by_bytes_that_one_end_only_receives(run: Any, who: str) -> None:
    """Many more in a row than may come without data between them."""
    sites = Sites(client=FreshKeys(every=60, after_bytes=65536))

    async def conversation(client: Any, server: Any) -> None:
        speaker, hearer = (client, server) if who == "client" else (server, client)

        async def speak() -> None:
            while client.session.epoch < 45:
                await speaker.send(bytes(1 << 16))
                await sleep(0.001)
            await speaker.send_eof()

        async def hear(end: Any) -> None:
            while await end.receive():
                pass
            if end is hearer:
                await end.send_eof()

        await together(speak(), hear(client), hear(server))

    run(sites, conversation)


@pytest.mark.parametrize("how", ["every", "asked"])
def test_updates_of_a_silent_session_keep_to_what_the_peer_takes(run: Any, how: str) -> None:
    """They come one by one a second after some, and the session lasts."""
    sites = Sites(client=FreshKeys(every=0.001) if how == "every" else None)

    async def conversation(client: Any, server: Any) -> None:
        reasons = []

        async def hear(end: Any) -> None:
            reasons.append(await listen(end))

        async def wait() -> None:
            began = current_time()
            while client.session.epoch <= 10 or current_time() - began < 0.5:  # 50 at 10 ms each
                if how == "asked":
                    await client.update_keys()
                await sleep(0.01)
            assert client.session.epoch < 18 + current_time() - began
            assert reasons == []
            await client.close()
            await server.close()

        await together(wait(), hear(client), hear(server))

    run(sites, conversation)


def test_an_update_that_is_asked_for_during_another(run: Any) -> None:
    """It is not taken for the one that is under way."""
    sites = Sites()

    async def conversation(client: Any, server: Any) -> None:
        sites.bob.look_up_delay = 0.1

        async def ask() -> None:
            await client.update_keys()
            await sleep(0.05)
            await client.update_keys()
            await epoch_of(client, 2)
            await client.close()
            await server.close()

        await together(ask(), listen(client), listen(server))

    run(sites, conversation)


def test_an_update_that_is_asked_for_before_the_last_is_reported(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine has changed its keys, and its event is still to be read."""
    saw = KeyRenewer.saw

    def asks_first(renewer: KeyRenewer, event: Any) -> None:
        match event:
            case EpochBegan(Epoch(number=1, why="asked")):
                renewer.update()
        saw(renewer, event)

    monkeypatch.setattr(KeyRenewer, "saw", asks_first)

    async def conversation(client: Any, server: Any) -> None:
        async def ask() -> None:
            await client.update_keys()
            await epoch_of(client, 2)
            await client.close()
            await server.close()

        await together(ask(), listen(client), listen(server))

    run(Sites(), conversation)
