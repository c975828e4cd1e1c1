"""The engine does no I/O: the shell brings a ticket store to disk, in time."""

import errno
import json
import os
import signal
import warnings
from dataclasses import replace
from itertools import count
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import trio
import trio.testing

from hybridkex import ClientConfig, DevCa, SecureStream, ServerConfig, TrustStore
from hybridkex.files import write_file
from hybridkex.shell.ticket_file import FileTicketStore
from hybridkex.tls.connection import ClientConnection


def configs(path: Path) -> tuple[ClientConfig, ServerConfig]:
    ca = DevCa.create()
    trust = TrustStore((ca.certificate,))
    return (
        ClientConfig(verifier=trust, ticket_store=FileTicketStore(path)),
        ServerConfig(identities=(ca.issue("localhost"),)),
    )


def tickets_in(path: Path) -> int:
    if not path.exists():
        return 0
    return sum(map(len, json.loads(path.read_text()).values()))


async def connect(client: ClientConfig, server: ServerConfig, sent: list[int], path: Path) -> bool:
    """One connection; ``sent`` gets the tickets in the file whenever the client sends."""
    near, far = trio.testing.memory_stream_pair()
    send = near.send_stream.send_all

    async def sending(data: Any) -> None:
        sent.append(tickets_in(path))
        await send(data)

    near.send_stream.send_all = sending  # type: ignore[method-assign]
    ours = SecureStream(near, client, server_hostname="localhost")
    theirs = SecureStream(far, server)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(theirs.send_all, b"with tickets")
        assert await ours.receive_some() == b"with tickets"
    return ours.session.resumed


async def test_a_ticket_leaves_the_file_before_it_is_sent(tmp_path: Path) -> None:
    path = tmp_path / "tickets"
    client, server = configs(path)
    assert not await connect(client, server, [], path)
    assert tickets_in(path) == 2
    # Another process, as it were.
    again = replace(client, ticket_store=FileTicketStore(path))
    sent: list[int] = []
    assert await connect(again, server, sent, path)
    assert sent[0] == 1
    assert tickets_in(path) == 3


async def test_the_file_stays_readable(tmp_path: Path) -> None:
    """Many servers, or long chains, take room from the servers that were met longest ago."""
    path = tmp_path / "tickets"
    client, server = configs(path)
    await connect(client, server, [], path)
    store = client.ticket_store
    assert isinstance(store, FileTicketStore)
    ticket = store.take("localhost")
    assert ticket is not None
    long = replace(ticket, chain=(bytes(120_000),), ticket=bytes(65_000))
    for number in range(40):
        for _ in range(4):
            store.put(f"host{number}.example", long)
    store.flush()
    again = FileTicketStore(path)
    assert path.stat().st_size <= 4 << 20
    assert again.take("host39.example") == long
    assert again.take("host0.example") is None
    for number in range(40):  # used up
        while again.take(f"host{number}.example") is not None:
            pass
    again.flush()
    assert "host" not in path.read_text().replace("localhost", "")


ODD = (
    *(None, True, -1, 1.5, 1 << 32, 10**300, 1e308, -1e308, float("inf"), float("-inf")),
    *(float("nan"), "", "x", "AA==", "1", "inf", "é", "\ud800", [], [[]], ["AA=="], [None], {}),
)
TAKEN = {
    "server_name": (None, "", "x", "AA==", "1", "inf", "é", "\ud800"),  # checked by the engine
    "chain": ([], ["AA=="]),
    "psk_identity": (None, "", "AA=="),
    "psk_context": (None, "", "AA=="),
    "binding": ("", "AA=="),
    "ticket": ("AA==",),
    "lifetime": (),
    "began_at": (1.5, 1 << 32),
}


async def test_a_file_with_odd_tickets(tmp_path: Path) -> None:
    """Whatever a member of a ticket is: the ticket is as if it were not there."""
    path = tmp_path / "tickets"
    client, server = configs(path)
    await connect(client, server, [], path)
    [(name, [good, *_])] = json.loads(path.read_text()).items()
    for member in good:
        for odd in ODD:
            path.write_text(json.dumps({name: [{**good, member: odd}]}))
            ticket = FileTicketStore(path).take(name)
            if repr(odd) not in map(repr, TAKEN.get(member, ())):
                assert ticket is None, (member, odd)
        path.write_text(json.dumps({name: [{key: good[key] for key in good if key != member}]}))
        assert FileTicketStore(path).take(name) is None
    for odd in ODD:
        path.write_text(json.dumps({name: [odd, good, odd]}))
        assert FileTicketStore(path).take(name) is not None
        path.write_text(json.dumps({name: [{**good, "received_at": odd, "began_at": odd}]}))
        again = replace(client, ticket_store=FileTicketStore(path))
        assert not await connect(again, server, [], path)


def test_the_engine_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client, _ = configs(tmp_path / "tickets")

    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("the engine does no I/O")

    for name in ("open", "replace", "write", "fsync"):
        monkeypatch.setattr(os, name, forbidden)
    monkeypatch.setattr("builtins.open", forbidden)
    engine = ClientConnection(client, "localhost")
    engine.start()
    assert engine.has_data_to_send


async def test_new_tickets_that_cannot_be_written_are_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "removed" / "tickets"
    path.parent.mkdir()
    client, server = configs(path)
    path.parent.rmdir()
    assert not await connect(client, server, [], path)
    assert [one.levelname for one in caplog.records] == ["WARNING"]  # for two tickets
    assert "new session tickets are not stored: cannot write" in caplog.text
    path.parent.mkdir()
    assert await connect(client, server, [], path)
    assert tickets_in(path) == 3
    assert len(caplog.records) == 1


@pytest.mark.parametrize("failures", [1, 2, 3])
async def test_a_taken_ticket_leaves_the_file_on_a_full_disk(
    failures: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tickets"
    client, server = configs(path)
    assert not await connect(client, server, [], path)
    assert tickets_in(path) == 2
    left = iter(range(failures))

    def full(path: Path, content: bytes) -> None:
        for _ in left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_file(path, content)

    monkeypatch.setattr("hybridkex.shell.ticket_file.write_file", full)
    again = replace(client, ticket_store=FileTicketStore(path))
    sent: list[int] = []
    assert await connect(again, server, sent, path)
    assert sent[0] == (1 if failures == 1 else 0)
    assert tickets_in(path) == 3  # the one that was not taken, and two new ones


async def test_a_taken_ticket_that_stays_in_the_file_is_not_sent(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "tickets"
    path.parent.mkdir()
    client, server = configs(path)
    assert not await connect(client, server, [], path)
    path.parent.rename(tmp_path / "gone")
    near, far = trio.testing.memory_stream_pair()
    ours = SecureStream(near, client, server_hostname="localhost")
    with pytest.raises(trio.BrokenResourceError, match="cannot write"):
        await ours.do_handshake()
    await near.send_stream.aclose()
    assert await far.receive_some() == b""


async def test_a_stream_that_is_closed_while_the_tickets_are_written(tmp_path: Path) -> None:
    """It is not open afterwards."""
    client, server = configs(tmp_path / "tickets")
    store, writing, written = client.ticket_store, Event(), Event()
    assert isinstance(store, FileTicketStore)
    flush, calls = store.flush, count()

    def slow_flush() -> None:
        flush()
        if next(calls):  # behind the handshake
            writing.set()
            written.wait()

    store.flush = slow_flush  # type: ignore[method-assign]
    near, far = trio.testing.memory_stream_pair()
    ours = SecureStream(near, client, server_hostname="localhost")
    theirs = SecureStream(far, server)

    async def fails() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await ours.do_handshake()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(theirs.do_handshake)
        nursery.start_soon(fails)
        await trio.to_thread.run_sync(writing.wait)
        await ours.aclose()
        written.set()


def test_the_child_of_a_fork_does_not_wait_for_a_thread_of_its_parent(tmp_path: Path) -> None:
    store = FileTicketStore(tmp_path / "tickets")
    with store._flushing, store._changing:  # as another thread may have them
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # other tests have threads
            child = os.fork()
        if not child:
            try:
                signal.alarm(10)
                store.take("localhost")
                store.flush()
                os._exit(7)
            finally:
                os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
