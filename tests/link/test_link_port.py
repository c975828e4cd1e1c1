"""The port of a link: strangers neither end Alice nor keep her from Bob."""

import secrets
import socket
import struct
from pathlib import Path
from typing import Any

import pytest
import trio

from hybridkex.auth.dev_ca import DevCa, write_identity
from hybridkex.errors import LinkAuthenticationError, LinkError
from hybridkex.kme.link_feed import PartyFeed, greet, greeted
from hybridkex.link import party
from hybridkex.link.authentication import Signatures
from hybridkex.link.optimise import tuned
from hybridkex.link.presets import PRESETS
from hybridkex.link.settings import LinkSettings
from hybridkex.net.address import TcpAddress
from hybridkex.net.reading import EndOfStream
from hybridkex.net.threads import NoThread
from interop.ports import free_port


@pytest.fixture
def signatures(tmp_path: Path) -> dict[str, Signatures]:
    """Of Alice, of Bob, and of a stranger whose key is known to nobody."""
    ca = DevCa.create()
    for name in ("alice", "bob", "eve"):
        write_identity(tmp_path / name, ca, ca.issue(name))

    def of(own: str, peer: str) -> Signatures:
        return Signatures.from_files(tmp_path / own / "key.pem", tmp_path / peer / "cert.pem")

    return {"alice": of("alice", "bob"), "bob": of("bob", "alice"), "eve": of("eve", "alice")}


def feed(party: str, port: int, signatures: dict[str, Signatures]) -> PartyFeed:
    settings = LinkSettings(preset=tuned(PRESETS["rusca2018"].at(0), 30_000), block_bits=30_000)
    return PartyFeed(
        settings,
        party=party,
        address=TcpAddress("127.0.0.1", port),
        signatures=signatures[party],
        real_time=False,
        note=lambda block: None,
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


async def exchange(client: Signatures, server: Signatures, kind: bytes = b"C") -> bytes:
    one, other = trio.testing.memory_stream_pair()
    number = secrets.token_bytes(16)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(greet, one, client, kind, number)
        found = await greeted(other, server)
        assert found == (kind, number)
    return found[0]


async def test_only_bob_is_greeted(signatures: dict[str, Signatures]) -> None:
    assert await exchange(signatures["bob"], signatures["alice"]) == b"C"
    for wrong in ("eve", "alice"):  # a stranger, and Alice's own words sent back
        with pytest.RaisesGroup(LinkAuthenticationError):
            await exchange(signatures[wrong], signatures["alice"])
    with pytest.RaisesGroup(LinkError):
        await exchange(signatures["bob"], signatures["alice"], kind=b"Z")


async def test_a_greeting_is_not_good_twice(signatures: dict[str, Signatures]) -> None:
    """What Bob has said is worth nothing with another challenge."""
    one, other = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(greet, one, signatures["bob"], b"C", bytes(16))
        said = bytes(await other.receive_some())
        await other.send_all(bytes(32))
        said += bytes(await other.receive_some())
    one, other = trio.testing.memory_stream_pair()
    await one.send_all(said)
    with pytest.raises(LinkAuthenticationError):
        await greeted(other, signatures["alice"])
    one, other = trio.testing.memory_stream_pair()
    await one.send_all(said[:-1])
    await one.send_eof()
    with pytest.raises(EndOfStream):
        await greeted(other, signatures["alice"])


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
