"""A client that was written from the documentation alone, against a server of the library."""

import ast
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import second_implementation as second
import trio
from cryptography.exceptions import InvalidTag
from second_implementation import (
    FINISH,
    FRESH_CONFIRM,
    FRESH_DECLINE,
    FRESH_REQUEST,
    FRESH_RESPONSE,
    HANDSHAKE,
    PAD_KEY,
    AlertReceived,
    Client,
    Parts,
)

from hybridkex import (
    DevCa,
    FreshKeys,
    OneTimePad,
    Policy,
    QkdPskSource,
    Requirement,
    SecureStream,
    ServerConfig,
)
from hybridkex.errors import (
    HybridkexError,
    InternalError,
    LocalStateError,
    PeerError,
    TruncationError,
)
from hybridkex.qkd.in_process import in_process_pair
from hybridkex.qkd.source import KeyPart

Talk = Callable[[Client], None]

OFTEN = FreshKeys(every=0.02, jitter=0.9)
SCHEDULES = {"the client's": None, "both": OFTEN}


def test_it_has_nothing_of_the_library() -> None:
    tree = ast.parse(Path(second.__file__).read_text())
    found = {one.module for one in ast.walk(tree) if isinstance(one, ast.ImportFrom)}
    found |= {one.names[0].name for one in ast.walk(tree) if isinstance(one, ast.Import)}
    assert not any((name or "").startswith("hybridkex") for name in found)


async def against(
    ca: DevCa,
    talk: Talk,
    *,
    schedule: FreshKeys | None,
    kind: type[Client] = Client,
    slot: bool = True,
    pad: bool = False,
) -> tuple[SecureStream[Any], BaseException | None]:
    """An echo server with a key source, and this client in a thread; returns the server's end and
    its error."""
    alice, bob = in_process_pair("alice", "bob")
    options: dict[str, Any] = {"psk_source": QkdPskSource(bob)}
    if not slot:
        options = {"identities": (ca.issue("localhost"),)}
    if pad:
        options["one_time_pad"] = OneTimePad()
    config = ServerConfig(
        fresh_keys=schedule, policy=Policy(fresh_keys=Requirement.REQUIRE), **options
    )
    ours, theirs = socket.socketpair()
    server = SecureStream(trio.SocketStream(trio.socket.from_stdlib_socket(ours)), config)
    errors: list[BaseException | None] = []

    def draw() -> tuple[Parts, bytes]:
        key = trio.from_thread.run(alice.get_key)
        name = [(part.master_kme, part.slave_kme, str(part.key_id)) for part in key.name]
        return name, key.key.reveal()

    def look_up(parts: Parts) -> bytes:
        name = tuple(KeyPart(*part) for part in parts)
        return trio.from_thread.run(alice.get_key_with_id, name).key.reveal()

    def client() -> None:
        with theirs:
            theirs.settimeout(5)
            talk(kind(theirs, ("alice", "bob"), draw, look_up, psk=slot, slot=slot, pad=pad))

    async def echo() -> None:
        try:
            async for data in server:
                await server.send_all(data)
            await server.aclose()
        except trio.BrokenResourceError as error:
            errors.append(error.__cause__)

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(echo)
            await trio.to_thread.run_sync(client)
    await trio.aclose_forcefully(server)
    return server, errors[0] if errors else None


def has(client: Client, size: int) -> Callable[[], bool]:
    return lambda: len(client.received) >= size


def converse(client: Client, rng: random.Random, epochs: int) -> None:
    """Echoed data, and updates of ours whenever none is under way."""
    said = b""
    while client.epoch < epochs:
        if not client.under_way and rng.random() < 0.5:
            client.start_update()
        piece = rng.randbytes(rng.randrange(1, 300))
        client.send(piece)
        said += piece
        client.receive_until(has(client, len(said)))
        assert client.received == said


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
@pytest.mark.parametrize("slot", ["slot", "the draft alone", "pad"])
async def test_both_agree(stream_ca: DevCa, slot: str, schedule: str) -> None:
    def talk(client: Client) -> None:
        converse(client, random.Random(1), 12)
        client.close()
        client.receive_until(lambda: client.ended)
        assert client.log.count("ours") + client.log.count("theirs") == client.epoch
        assert "ours" in client.log

    slots, pad = slot != "the draft alone", slot == "pad"
    server, error = await against(
        stream_ca, talk, schedule=SCHEDULES[schedule], slot=slots, pad=pad
    )
    assert error is None
    epochs = server.session.epochs
    assert len(epochs) >= 12
    assert all(bool(epoch.qkd_key_ids) is slots for epoch in epochs)
    if server.pad is not None:
        assert server.pad.received > 0 < server.pad.sent


# --- a peer that does it wrong --------------------------------------------------------------------

WRONG = (FRESH_REQUEST, FRESH_RESPONSE, FINISH, FRESH_CONFIRM, PAD_KEY)


def spoilt(rng: random.Random, raw: bytes) -> list[bytes]:
    """One message in another way than it should be, as the contents of records."""
    body = bytearray(raw[4:])
    place, flipped = rng.randrange(len(body)), bytearray(body)
    flipped[place] ^= 1 << rng.randrange(8)
    other = rng.choice((FINISH, FRESH_DECLINE, FRESH_CONFIRM))
    extra = second.update(other, bytes(rng.randrange(33)))
    again = lambda body: second.message(second.UPDATE, bytes(body))  # noqa: E731
    return rng.choice(
        (
            [again(flipped)],
            [again(flipped)],
            [again(body[:place])],
            [again(body + bytes(1 + place))],
            [again(bytes((rng.randrange(3, 224),)) + body[1:])],
            [second.message(rng.choice((0, 4, 8, 20, 254)), bytes(body))],
            [raw, raw],
            [raw + raw],
            [extra],
            [raw, extra],
            [b"\x18\x00\x00\x01\x00", raw],  # KeyUpdate
            [b"", raw],
            [raw[:1] + b"\xff\xff\xff" + raw[4:]],
        )
    )


@pytest.mark.parametrize("seed", range(40))
async def test_a_message_that_is_wrong(stream_ca: DevCa, seed: int) -> None:
    """A typed error and its alert, or nothing that the two ends see differently."""
    rng = random.Random(seed)
    subtype = WRONG[seed % len(WRONG)]

    class Wrong(Client):
        done = False

        def write(self, kind: int, content: bytes) -> None:
            ours = kind == HANDSHAKE and content[:1] == bytes((second.UPDATE,))
            if self.done or not ours or content[4] != subtype or rng.random() < 0.5:
                super().write(kind, content)
                return
            self.done = True
            for one in spoilt(rng, content):
                super().write(kind, one)

    heard: list[BaseException] = []

    def talk(client: Client) -> None:
        try:
            converse(client, rng, 12)
        except (AlertReceived, ConnectionError, EOFError, InvalidTag, AssertionError) as error:
            heard.append(error)

    _, error = await against(stream_ca, talk, schedule=OFTEN, kind=Wrong, pad=subtype == PAD_KEY)
    assert not isinstance(error, InternalError | LocalStateError)
    assert isinstance(error, HybridkexError | OSError)
    if isinstance(error, PeerError) and not isinstance(error, TruncationError):
        assert heard  # the alert, or what the client has noticed by itself
