"""``send`` and ``receive`` as processes, with the faults that a transfer meets."""

import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import gc
import hashlib
import io
import itertools
import json
import math
import os
import pty
import random
import re
import resource
import select
import shutil
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, cast

import pytest
import trio
import trio.testing
from apps_glue import (
    Run,
    Wire,
    begin,
    complete,
    connected,
    descriptors,
    look,
    memory,
    proved,
    small_disk,
)
from waiting import trio_until, until

from hybridkex import (
    ClientConfig,
    SecureStream,
    ServerConfig,
    TrustStore,
    open_secure_tcp_stream,
)
from hybridkex.apps.backoff import Backoff
from hybridkex.apps.transfer import (
    ConnectionLost,
    Folder,
    Outcome,
    Progress,
    Receiver,
    collect,
    send_items,
)
from hybridkex.apps.transfer.errors import NotStored
from hybridkex.apps.transfer.folder import Present
from hybridkex.apps.transfer.frames import Frames
from hybridkex.apps.transfer.handles import Handles
from hybridkex.apps.transfer.messages import (
    DATA,
    PROTOCOL,
    VERSION,
    WHOLE,
    Alive,
    Busy,
    Bye,
    Digest,
    Drop,
    End,
    Failed,
    Have,
    Hello,
    How,
    Message,
    Nanoseconds,
    Offer,
    Offers,
    ProtocolError,
    Send,
    Start,
    Stored,
    Whole,
    decode,
    encode,
    header,
    offers,
    split_header,
)
from hybridkex.apps.transfer.names import PARTIAL, UnsafeName, check_path
from hybridkex.apps.transfer.reception import _Current
from hybridkex.apps.transfer.source import Item
from hybridkex.cli import main

MakeWire = Callable[[int], AbstractAsyncContextManager[Wire]]
Said = Message | Offer | Whole | bytes
MIB = 1 << 20


def receive(run: Run, folder: Path, mutual: list[str], *more: object, **options: Any) -> Any:
    return run.server(
        "receive", folder, "--port", 0, "--bind", "127.0.0.1", *mutual, *more, **options
    )


def command(*words: object) -> tuple[int, str]:
    """The command in this process, which saves the start of one; its status and what it said."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        status = main(list(map(str, words)))
    return status, said.getvalue()


def send(mutual: list[str], port: int, *words: object) -> tuple[int, str]:
    return command("send", *words, f"localhost:{port}", *mutual)


def there(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if PARTIAL not in str(path)}


def test_files_and_folders_and_once_more(tmp_path: Path, run: Run, mutual: list[str]) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "empty").mkdir(parents=True)
    (source / "deep" / "er").mkdir(parents=True)
    for number in range(150):
        (source / "deep" / "er" / f"{number} ü").write_bytes(bytes([number]) * number)
    (source / "large").write_bytes(random.randbytes(5 * MIB + 17))
    (source / "large").chmod(0o755)
    os.utime(source / "large", (1_000_000_000, 1_000_000_000))
    (source / "link").symlink_to("/etc/passwd")
    single = tmp_path / os.fsdecode(b"not utf-8 \xff")
    single.write_bytes(b"x")
    server, port = receive(run, target, mutual)
    status, errors = send(mutual, port, source, single)
    assert status == 1, "a link was left out, which is not success"
    assert "link: a symbolic link" in errors
    below = sum(not path.is_symlink() for path in source.rglob("*"))
    files = sum(path.is_file() and not path.is_symlink() for path in source.rglob("*")) + 1
    assert f"{below + 2} stored" in errors, "what is in the folder, the folder, the single file"
    compared = subprocess.run(
        ["diff", "-r", "-x", "link", str(source), str(target / "source")], check=False
    )
    assert compared.returncode == 0
    assert (target / single.name).read_bytes() == b"x"
    arrived = (target / "source" / "large").stat()
    assert (arrived.st_mode & 0o777, arrived.st_mtime) == (0o755, 1_000_000_000)
    assert not (target / "source" / "link").is_symlink()
    status, errors = send(mutual, port, source, single)
    assert (
        f"0 stored, {below + 2} already there ({files:,} by size and date); 0 bytes of files"
        in errors
    )
    server.terminate()
    server.communicate(timeout=10)
    assert server.returncode == 0
    assert not (target / PARTIAL).exists()


def test_nothing_is_overwritten_unless_told(tmp_path: Path, run: Run, mutual: list[str]) -> None:
    target, file, longer = tmp_path / "target", tmp_path / "same", tmp_path / "longer"
    target.mkdir()
    for path in (file, longer):
        path.write_text("new content")
    (target / "same").write_text("old content")
    (target / "longer").write_text("old content that is longer")
    _, port = receive(run, target, mutual)
    status, errors = send(mutual, port, file, longer)
    assert status == 1
    assert errors.count("exists already, with other content") == 2
    assert (target / "same").read_text() == "old content"
    _, port = receive(run, target, mutual, "--overwrite")
    status, errors = send(mutual, port, file, longer)
    assert status == 0, errors
    assert {(target / name).read_text() for name in ("same", "longer")} == {"new content"}


async def test_a_cut_connection_goes_on_where_it_was(
    tmp_path: Path, run: Run, mutual: list[str], wire: MakeWire
) -> None:
    """Cut three times at random places, the last one in the middle of many small files."""
    target = tmp_path / "target"
    (tmp_path / "many").mkdir()
    for number in range(40):
        (tmp_path / "many" / str(number)).write_bytes(random.randbytes(64 << 10))
    content = random.randbytes(24 * MIB)
    (tmp_path / "file").write_bytes(content)
    server, port = receive(run, target, mutual)
    before = descriptors(server)
    async with wire(port) as proxy:
        sender = run.start(
            "send", tmp_path / "file", tmp_path / "many", f"localhost:{proxy.port}", *mutual
        )
        for mark in (random.randrange(1, 9), random.randrange(13, 22), 26):
            proxy.cut_after = mark * MIB
            await trio_until(lambda: proxy.cut_after is None or sender.poll() is not None)
        _, errors = await trio.to_thread.run_sync(sender.communicate)
        assert sender.returncode == 0, errors
        assert "trying again in" in errors
        assert proxy.connections == 4
        assert re.search(r"sent file: 25,165,824 bytes, of which [\d,]+ were already there", errors)
    assert (target / "file").read_bytes() == content
    for path in (tmp_path / "many").iterdir():
        assert (target / "many" / path.name).read_bytes() == path.read_bytes()
    assert len(there(target)) == 42
    await trio_until(lambda: descriptors(server) <= before + 1)  # its port file may still be open


def test_a_killed_receiver_is_found_again(tmp_path: Path, run: Run, mutual: list[str]) -> None:
    source, target = tmp_path / "file", tmp_path / "target"
    content = random.randbytes(40 * MIB)
    source.write_bytes(content)
    server, port = receive(run, target, mutual)
    sender = run.start("send", source, f"localhost:{port}", *mutual)
    parts = target / PARTIAL
    until(lambda: any(part.stat().st_size > 4 * MIB for part in parts.glob("*")), sender)
    server.kill()
    server.communicate()
    assert there(target) == set(), "nothing half-written under a final name"
    run.server("receive", target, "--port", port, "--bind", "127.0.0.1", *mutual)
    errors = sender.communicate(timeout=30)[1]
    assert sender.returncode == 0, errors
    assert re.search(r"of which [\d,]+ were already there", errors)
    assert (target / "file").read_bytes() == content


def test_a_killed_sender_leaves_nothing_under_a_final_name(
    tmp_path: Path, run: Run, mutual: list[str]
) -> None:
    source, target = tmp_path / "file", tmp_path / "target"
    source.write_bytes(random.randbytes(40 * MIB))
    server, port = receive(run, target, mutual)
    sender = run.start("send", source, f"localhost:{port}", *mutual)
    parts = target / PARTIAL
    until(lambda: any(part.stat().st_size > 4 * MIB for part in parts.glob("*")), sender)
    sender.kill()
    sender.communicate()
    assert there(target) == set()
    status, errors = send(mutual, port, source)
    assert status == 0, errors
    assert "already there" in errors
    assert (target / "file").read_bytes() == source.read_bytes()
    assert server.poll() is None


def test_disk_full_before_and_in_the_middle(tmp_path: Path, run: Run, mutual: list[str]) -> None:
    with small_disk(tmp_path / "disk", 12) as disk:
        server, port = receive(run, disk / "in", mutual)
        large, small = tmp_path / "large", tmp_path / "small"
        large.write_bytes(bytes(16 * MIB))
        small.write_bytes(b"fits")
        status, errors = send(mutual, port, large, small)
        assert status == 1
        assert re.search(r"large: the disk is full: 16,777,216 bytes are still to come", errors)
        assert (disk / "in" / "small").read_bytes() == b"fits", "the next file is tried"
        # Each of two fits, both do not: the end of the disk comes in the middle.
        files = [tmp_path / "one", tmp_path / "two"]
        for file in files:
            file.write_bytes(random.randbytes(9 * MIB))
        senders = [run.start("send", file, f"localhost:{port}", *mutual) for file in files]
        told = [sender.communicate(timeout=30)[1] for sender in senders]
        assert any("the disk is full" in errors for errors in told), told
        for file in files:
            arrived = disk / "in" / file.name
            assert not arrived.exists() or arrived.read_bytes() == file.read_bytes()
        server.terminate()
        server.communicate(timeout=10)


def test_a_write_error_in_the_middle(tmp_path: Path, run: Run, mutual: list[str]) -> None:
    """Where no tmpfs may be mounted this is the full disk: writing fails after 3 MiB."""
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (3 * MIB, 3 * MIB))
    target = tmp_path / "target"
    _, port = receive(run, target, mutual, start=run.fresh, preexec_fn=limit)
    large, small = tmp_path / "large", tmp_path / "small"
    large.write_bytes(bytes(8 * MIB))
    small.write_bytes(b"fits")
    status, errors = send(mutual, port, large, small)
    assert status == 1
    assert (
        "large: cannot write it: the file is larger than this file system or process may write"
        in errors
    )
    assert there(target) == {"small"}


def test_a_large_file_in_constant_memory(tmp_path: Path, run: Run, mutual: list[str]) -> None:
    """Twenty times the bytes, the same memory; 10 GB were measured in the same way."""
    server, port = receive(run, tmp_path / "target", mutual, start=run.fresh)
    peaks = []
    for megabytes in (8, 160):
        source = tmp_path / f"sparse-{megabytes}"
        with source.open("wb") as file:
            file.truncate(megabytes * MIB)
        sender = run.fresh("send", source, f"localhost:{port}", *mutual)
        peak = 0
        while sender.poll() is None:
            peak = max(peak, memory(sender.pid))
            time.sleep(0.02)
        assert sender.returncode == 0
        assert (tmp_path / "target" / source.name).stat().st_size == megabytes * MIB
        peaks.append((peak, memory(server.pid)))
    for small, large in zip(*peaks, strict=True):
        assert 0 < large < small + 20 * MIB < 120 * MIB


def test_bars_on_a_terminal(tmp_path: Path, run: Run, mutual: list[str]) -> None:
    source = tmp_path / "file"
    source.write_bytes(bytes(20 * MIB))
    _, port = receive(run, tmp_path / "target", mutual)
    ours, theirs = pty.openpty()
    words = ["send", str(source), f"localhost:{port}", *mutual]
    process = subprocess.Popen(
        [sys.executable, "-m", "hybridkex", *words],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(theirs)
    screen = b""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if select.select([ours], [], [], 0.1)[0]:
            try:
                screen += os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
    os.close(ours)
    assert process.wait(timeout=10) == 0
    text = screen.decode()
    assert "━" in text
    assert "wire" in text
    assert "1 stored; 20,971,520 bytes of files" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["receive", "d", "--cert", "{cert}", "--key", "{key}"], "could write files here"),
        (["send", "/nowhere", "localhost", "--ca", "{ca}"], "No such file or directory"),
        (["send", "{ca}", "localhost:1", "--ca", "{ca}"], "cannot connect to localhost:1"),
        (["send", "{ca}", "localhost:x", "--ca", "{ca}"], "is not HOST:PORT"),
        (["send", "{ca}", "{ca}", "localhost", "--ca", "{ca}"], "have the same name"),
        (["receive", "{ca}/x", "--anyone", "--cert", "{cert}", "--key", "{key}"], "cannot use"),
    ],
)
def test_mistakes_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    keys: Path,
    words: list[str],
    said: str,
) -> None:
    paths = {name: str(keys / f"{name}.pem") for name in ("ca", "cert", "key")}
    monkeypatch.chdir(tmp_path)
    status, errors = command(*(word.format(**paths) for word in words))
    assert status == 1
    assert said in errors
    assert len(errors.strip().splitlines()) == 1


def test_a_stranger_sends_nothing(tmp_path: Path, run: Run, keys: Path, mutual: list[str]) -> None:
    _, port = receive(run, tmp_path / "target", mutual)
    status, errors = command("send", keys / "ca.pem", f"localhost:{port}", "--ca", keys / "ca.pem")
    assert status == 1
    assert len(errors.splitlines()[-1]) > 20, "the last line says why"
    assert there(tmp_path / "target") == set()


def test_no_permission(tmp_path: Path, run: Run, mutual: list[str]) -> None:
    """A folder that may not be written to costs its own files, and the reason is told."""
    source, target = tmp_path / "source", tmp_path / "target"
    for folder in ("closed", "open"):
        (source / folder).mkdir(parents=True)
        (source / folder / "file").write_text(folder)
    closed = target / "source" / "closed"
    closed.mkdir(parents=True)
    closed.chmod(0o555)
    # Root may write everywhere, unless it gives that up.
    drop = drop_capabilities if os.geteuid() == 0 else None
    _, port = receive(run, target, mutual, start=run.fresh, preexec_fn=drop)
    status, errors = send(mutual, port, source)
    assert status == 1
    assert "source/closed/file: cannot write it: permission denied" in errors
    assert there(target / "source") == {"closed", "open", "open/file"}
    refused, told = receive_once(run, closed, mutual, preexec_fn=drop)
    assert (refused, told) == (1, f"hybridkex: no permission to write to the folder {closed}\n")


def drop_capabilities() -> None:
    """Root without CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, also after exec (prctl(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in (1, 2):
        if libc.prctl(24, capability, 0, 0, 0):  # PR_CAPBSET_DROP
            raise OSError(ctypes.get_errno(), "prctl")


def receive_once(
    run: Run, folder: Path, mutual: list[str], **options: Any
) -> tuple[int | None, str]:
    process = run.fresh("receive", folder, "--port", 0, *mutual, **options)
    _, errors = process.communicate(timeout=30)
    return process.returncode, errors


def test_a_disk_that_ignores_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a disk takes two names for one, and FAT has no hard links: the first name stays."""
    for name in ("open", "stat", "mkdir", "unlink"):
        monkeypatch.setattr(os, name, ignoring_case(getattr(os, name)))
    monkeypatch.setattr(os, "rename", ignoring_case(os.rename, 2))
    monkeypatch.setattr(os, "link", no_links)
    folder = Folder(tmp_path / "in")
    parts = []
    for name in ("readme", "README"):
        # Both were offered before one of them had its name.
        parts.append(begin(folder, offer(name)))
        parts[-1].write([memoryview(b"abc")])
    complete(folder, parts[0], hashlib.sha256(b"abc").hexdigest())
    with pytest.raises(NotStored, match="README: the receiver's file system treats"):
        complete(folder, parts[1], hashlib.sha256(b"abc").hexdigest())
    with pytest.raises(NotStored, match="ReadMe: exists already"):
        look(folder, offer("ReadMe", size=4))
    folder.close()
    assert there(tmp_path / "in") == {"readme"}


def ignoring_case(call: Callable[..., Any], names: int = 1) -> Callable[..., Any]:
    def ignoring(*words: Any, **more: Any) -> Any:
        if not any(name.endswith("dir_fd") for name in more):
            return call(*words, **more)
        return call(*(str(word).lower() for word in words[:names]), *words[names:], **more)

    return ignoring


def no_links(*words: object, **more: object) -> None:
    raise PermissionError(errno.EPERM, "no hard links here")


def test_two_transfers_of_one_name(tmp_path: Path) -> None:
    """What was hashed when a file was offered may be another's when it begins."""
    folder = Folder(tmp_path / "in")
    offered = offer("x", size=WHOLE + 6)
    part = begin(folder, offered)
    part.write([memoryview(b"abc")])
    with pytest.raises(NotStored, match="another transfer is writing it"):
        begin(folder, offered)
    part.close()
    prefix = proved(folder, offered, b"abc")
    assert prefix is not None
    assert prefix.size == 3
    other = begin(folder, offered)
    other.write([memoryview(b"ABCD")])
    other.close()
    with pytest.raises(NotStored, match="another transfer has changed it"):
        begin(folder, offered, prefix)
    folder.close()
    assert there(tmp_path / "in") == set()


def test_a_file_is_not_begun_again_when_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One transfer opens the incomplete file, the other one gives it its final name, and then the
    first one has the lock."""
    folder = Folder(tmp_path / "in")
    offered = offer("x")
    first = begin(folder, offered)
    first.write([memoryview(b"abc")])
    flock = fcntl.flock

    def late(file: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        complete(folder, first, hashlib.sha256(b"abc").hexdigest())
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(NotStored, match="another transfer has just stored it"):
        begin(folder, offered)
    assert (tmp_path / "in" / "x").read_bytes() == b"abc"
    folder.close()


def test_a_replacement_of_the_same_size_goes_on_where_it_was(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x").write_bytes(bytes(WHOLE + 3))
    new = random.randbytes(WHOLE + 3)
    folder = Folder(tmp_path / "in", overwrite=True)
    offered = offer("x", size=len(new))
    assert look(folder, offered).complete
    part = begin(folder, offered)
    part.write([memoryview(new)[:2]])
    part.close()
    present = look(folder, offered)
    assert (present.size, present.complete) == (2, False)
    part = begin(folder, offered, proved(folder, offered, new[:2]))
    part.write([memoryview(new)[2:]])
    complete(folder, part, hashlib.sha256(new).hexdigest())
    folder.close()
    assert (tmp_path / "in" / "x").read_bytes() == new
    assert there(tmp_path / "in") == {"x"}


# --- who is slow, and who has vanished --------------------------------------------------------


class SlowFolder(Folder):
    """A disk that takes 50 seconds of the test's clock for each look."""

    def look(self, offer: Offer, handles: Handles) -> Present:
        time.sleep(2.0)
        return super().look(offer, handles)


async def transfer(
    tmp_path: Path,
    configs: tuple[ClientConfig, ServerConfig],
    clock: trio.testing.MockClock,
    serve: Callable[[SecureStream[Any]], Awaitable[object]],
    rate: float = 25,
) -> Outcome:
    """A file of three bytes; when the handshake is done, time goes ``rate`` times as fast."""
    (tmp_path / "x").write_bytes(b"abc")
    clock.rate = 1

    async def connect() -> SecureStream[Any]:
        client, server = await connected(configs)
        nursery.start_soon(serve, server)
        clock.rate = rate
        return client

    async with trio.open_nursery() as nursery:
        outcome = await send_items(collect([tmp_path / "x"], print), connect, Progress(), retries=0)
        nursery.cancel_scope.cancel()
    return outcome


async def test_a_slow_disk_is_waited_for(
    tmp_path: Path,
    configs: tuple[ClientConfig, ServerConfig],
    mock_clock: trio.testing.MockClock,
) -> None:
    folder = SlowFolder(tmp_path / "in")
    outcome = await transfer(tmp_path, configs, mock_clock, Receiver(folder).serve)
    assert (outcome.stored, outcome.connections) == (1, 1)
    folder.close()


async def test_a_receiver_that_has_vanished_is_given_up(
    tmp_path: Path,
    configs: tuple[ClientConfig, ServerConfig],
    mock_clock: trio.testing.MockClock,
) -> None:
    """It answers once, and then no more."""

    async def vanish(stream: SecureStream[Any]) -> None:
        await Frames(stream).send(Alive())
        let_time_jump()
        await trio.sleep_forever()

    with pytest.RaisesGroup(pytest.RaisesExc(ConnectionLost, match="was silent for 45 s")):
        await transfer(tmp_path, configs, mock_clock, vanish)


def let_time_jump() -> None:
    """From now on, only the time that passes matters: until then, the sender may read its files,
    in threads, for which the clock would not wait."""
    clock = trio.lowlevel.current_clock()
    assert isinstance(clock, trio.testing.MockClock)
    clock.autojump_threshold = 0.02


async def alive(frames: Frames) -> None:
    let_time_jump()
    while True:
        await frames.send(Alive())
        await trio.sleep(30)


async def stays_alive(stream: SecureStream[Any]) -> None:
    await alive(Frames(stream))


async def asks_and_stays_alive(stream: SecureStream[Any]) -> None:
    frames = Frames(stream)
    while not isinstance(await frames.receive(), Offers):
        pass
    await frames.send(Send(files=((0, 0),)))
    await alive(frames)


async def gives_up_and_stays_alive(stream: SecureStream[Any]) -> None:
    """Everything is settled, and its goodbye never comes."""
    frames = Frames(stream)
    while not isinstance(await frames.receive(), Offers):
        pass
    await frames.send(Failed(n=0, reason="no"))
    await alive(frames)


async def says_nothing_in_many_words(stream: SecureStream[Any]) -> None:
    """What it says settles nothing and asks for nothing."""
    frames = Frames(stream)
    while not isinstance(await frames.receive(), Offers):
        pass
    let_time_jump()
    while True:
        await frames.send(Send(files=()), Stored(files=(), how=How.NEW, lost=""))
        await trio.sleep(30)


@pytest.mark.parametrize(
    "serve",
    [
        stays_alive,
        asks_and_stays_alive,
        gives_up_and_stays_alive,
        says_nothing_in_many_words,
    ],
)
async def test_a_receiver_that_is_alive_for_ever(
    tmp_path: Path,
    configs: tuple[ClientConfig, ServerConfig],
    mock_clock: trio.testing.MockClock,
    serve: Callable[[SecureStream[Any]], Awaitable[object]],
) -> None:
    """It holds a sender no longer than it may, whatever it has begun."""
    with (
        trio.fail_after(650),
        pytest.RaisesGroup(pytest.RaisesExc(ConnectionLost, match="made no progress for 600 s")),
    ):
        await transfer(tmp_path, configs, mock_clock, serve, rate=1)


async def test_data_that_are_sent_again_and_again_are_no_progress(
    tmp_path: Path,
    configs: tuple[ClientConfig, ServerConfig],
) -> None:
    """A receiver that takes two megabytes and leaves, each time."""
    (tmp_path / "big").write_bytes(bytes(4 << 20))
    connections = 0

    async def connect() -> SecureStream[Any]:
        nonlocal connections
        connections += 1
        client, server = await connected(configs)
        nursery.start_soon(take_some, server)
        return client

    async def take_some(stream: SecureStream[Any]) -> None:
        frames = Frames(stream)
        while not isinstance(await frames.receive(), Offers):
            pass
        await frames.send(Send(files=((0, 0),)))
        taken = 0
        while taken < 2 << 20:
            piece = await frames.receive()
            taken += len(piece) if isinstance(piece, memoryview) else 0
        await trio.aclose_forcefully(stream)

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            with pytest.raises(ConnectionLost, match="gave up after 3 retries"):
                await send_items(
                    collect([tmp_path / "big"], print),
                    connect,
                    Progress(),
                    retries=3,
                    backoff=Backoff(first=0.001, most=0.001),
                )
            nursery.cancel_scope.cancel()
    assert connections <= 6


async def test_no_file_is_lost_with_a_connection_that_ends_while_it_is_listed(
    tmp_path: Path,
    configs: tuple[ClientConfig, ServerConfig],
) -> None:
    """A receiver is busy, cuts the connection, or ends it, while the files are being listed."""
    for number in range(40):
        (tmp_path / f"file {number}").write_text(str(number))
    folder = Folder(tmp_path / "in")
    listing, go = threading.Event(), threading.Event()

    def slowly() -> Iterator[Item]:
        for item in collect(sorted(tmp_path.glob("file *")), print):
            listing.set()
            go.wait(10)
            yield item

    async def connect() -> SecureStream[Any]:
        client, server = await connected(configs)
        nursery.start_soon(ends.pop() if ends else Receiver(folder).serve, server)
        return client

    async def end(stream: SecureStream[Any]) -> None:
        """Say something, and end the connection once the first file is listed."""
        await Frames(stream).send(Alive())
        await trio.to_thread.run_sync(listing.wait)
        await Frames(stream).send(Busy())
        await trio.testing.wait_all_tasks_blocked(0.05)
        go.set()

    ends = [end]
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            outcome = await send_items(
                slowly(), connect, Progress(), backoff=Backoff(first=0.001, most=0.001)
            )
            nursery.cancel_scope.cancel()
    folder.close()
    assert (outcome.stored, outcome.connections, outcome.failed) == (40, 2, {})
    assert len(there(tmp_path / "in")) == 40


class Frail(trio.abc.Stream):
    """A connection without TLS that is cut after so many calls of one side, perhaps within a
    message."""

    def __init__(self, stream: trio.StapledStream[Any, Any], chance: random.Random, calls: float):
        self._stream = stream
        self._chance = chance
        self._left = calls
        self.session = SimpleNamespace(alpn=PROTOCOL)

    async def _call(self) -> None:
        self._left -= 1
        if self._left < 0:
            await self.aclose()
            raise trio.BrokenResourceError("cut")
        for _ in range(self._chance.randrange(3)):
            await trio.lowlevel.checkpoint()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._call()
        try:
            if not self._left:
                await self._stream.send_all(bytes(data)[: self._chance.randrange(len(data))])
                await self._call()  # at once: nobody sends the rest, and both could wait for it
            await self._stream.send_all(data)
        except trio.ClosedResourceError:
            raise trio.BrokenResourceError("cut") from None

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        await self._call()
        try:
            data = await self._stream.receive_some(self._chance.choice((1000, 1 << 16, 1 << 20)))
        except trio.ClosedResourceError:
            data = b""
        if not data:
            raise trio.BrokenResourceError("cut")
        return data

    async def aclose(self) -> None:
        await trio.aclose_forcefully(self._stream)

    abort = aclose


@pytest.mark.parametrize("seed", range(6))
async def test_connections_that_are_cut_at_any_moment(tmp_path: Path, seed: int) -> None:
    """Six of them, by either side, and the seventh holds: everything is there."""
    chance = random.Random(seed)
    for number in range(60):
        (tmp_path / "t" / f"d{number % 7}").mkdir(parents=True, exist_ok=True)
        size = chance.choice((0, 1, 500, 20_000, WHOLE, WHOLE + 1))
        (tmp_path / "t" / f"d{number % 7}" / f"{number}").write_bytes(chance.randbytes(size))
    folder = Folder(tmp_path / "in")
    receiver = Receiver(folder)
    connections = 0

    async def connect() -> SecureStream[Any]:
        nonlocal connections
        connections += 1
        ours, theirs = trio.testing.memory_stream_pair()
        calls = [math.inf, math.inf if connections > 6 else chance.choice((2, 3, 5, 8, 13, 30))]
        chance.shuffle(calls)
        far: Any = Frail(theirs, chance, calls[0])
        nursery.start_soon(receiver.serve, far)
        near: Any = Frail(ours, chance, calls[1])
        return cast("SecureStream[Any]", near)

    outcome = None
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            while outcome is None:
                with contextlib.suppress(ConnectionLost):  # cut before the first answer
                    outcome = await send_items(
                        collect([tmp_path / "t"], print),
                        connect,
                        Progress(),
                        backoff=Backoff(first=0.0005, most=0.001),
                    )
            nursery.cancel_scope.cancel()
    folder.close()
    assert outcome.failed == {}
    assert outcome.stored + outcome.already == 68
    sent = {path.relative_to(tmp_path): path for path in (tmp_path / "t").rglob("*")}
    assert there(tmp_path / "in") == {"t", *map(str, sent)}
    for name, path in sent.items():
        if path.is_file():
            assert (tmp_path / "in" / name).read_bytes() == path.read_bytes()


async def test_a_receiver_that_has_more_than_there_is(
    tmp_path: Path,
    configs: tuple[ClientConfig, ServerConfig],
    mock_clock: trio.testing.MockClock,
) -> None:
    async def lie(stream: SecureStream[Any]) -> None:
        frames = Frames(stream)
        while not isinstance(await frames.receive(), Offers):
            pass
        await frames.send(Have(n=0, size=4))
        await trio.sleep_forever()

    with pytest.RaisesGroup(pytest.RaisesExc(ProtocolError, match="more bytes of a file")):
        await transfer(tmp_path, configs, mock_clock, lie)


# --- what is left of connections --------------------------------------------------------------


async def test_a_flood_keeps_nobody_out(tmp_path: Path, run: Run, mutual: list[str]) -> None:
    """Connections that say nothing take a descriptor each, and the sender has its turn."""
    (tmp_path / "file").write_text("x")
    server, port = receive(run, tmp_path / "target", mutual, "--max-connections", 3)
    before = descriptors(server)
    silent = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(300)]
    sender = run.start("send", tmp_path / "file", f"localhost:{port}", *mutual)
    _, errors = await trio.to_thread.run_sync(sender.communicate)
    assert sender.returncode == 0, errors
    assert descriptors(server) - before < 320
    for stream in silent:
        await stream.aclose()
    # When it was counted first, the server may not yet have begun to accept.
    await trio_until(lambda: descriptors(server) <= before + 2)


async def test_a_sender_waits_for_a_receiver_that_serves_others(
    tmp_path: Path,
    run: Run,
    mutual: list[str],
    configs: tuple[ClientConfig, ServerConfig],
    keys: Path,
) -> None:
    """``--max-connections``: the next sender is told, and tries again until there is room."""
    (tmp_path / "file").write_text("x")
    _, port = receive(run, tmp_path / "target", mutual, "--anyone", "--max-connections", 1)
    config = dataclasses.replace(configs[0], verifier=TrustStore.from_file(keys / "ca.pem"))
    first = await open_secure_tcp_stream("localhost", port, config)
    await first.do_handshake()
    frames = Frames(first)
    await frames.send(Hello(version=VERSION, transfer="first"))
    await frames.send(*offers([offer("first")]))
    assert isinstance(await frames.receive(), Send)  # it has the place
    log = (tmp_path / "log").open("w+b")
    sender = run.start("send", tmp_path / "file", f"localhost:{port}", *mutual, stderr=log)
    await trio_until(
        lambda: b"has reached its limit of simultaneous senders; trying again" in read_all(log)
    )
    await first.aclose()
    await trio.to_thread.run_sync(sender.wait)
    assert sender.returncode == 0, read_all(log)
    log.close()


def read_all(file: BinaryIO) -> bytes:
    return os.pread(file.fileno(), 1 << 20, 0)


async def test_no_task_is_left(tmp_path: Path, configs: tuple[ClientConfig, ServerConfig]) -> None:
    """Connections that come to their end, that are cut, that say nothing, or nonsense."""
    folder = Folder(tmp_path / "in")
    gc.collect()  # the processes of earlier tests have pipes
    before = trio.lowlevel.current_statistics().tasks_living, len(os.listdir("/proc/self/fd"))
    data = header(DATA, 2) + b"ab"
    done = offer("x"), Start(n=0), header(DATA, 3) + b"abc"
    digest = hashlib.sha256(b"abc").hexdigest()
    async with trio.open_nursery() as nursery:
        for number in range(10):
            nursery.start_soon(talk, folder, configs, offer(f"cut {number}"), Start(n=0), data)
            nursery.start_soon(talk, folder, configs)
            nursery.start_soon(talk, folder, configs, b"\xff\0\0\0\0")
            nursery.start_soon(talk, folder, configs, *done, End(n=0, sha256=digest), Bye())
    assert before == (
        trio.lowlevel.current_statistics().tasks_living,
        len(os.listdir("/proc/self/fd")),
    )
    folder.close()
    assert there(tmp_path / "in") == {"x"}


# --- a peer that does not keep to the protocol ------------------------------------------------


async def talk(
    folder: Folder, configs: tuple[ClientConfig, ServerConfig], *said: Said
) -> list[object]:
    """What a receiver answers."""
    one, other = trio.testing.memory_stream_pair()
    client = SecureStream(one, configs[0], server_hostname="localhost")
    server = SecureStream(other, configs[1])
    answers: list[object] = []
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:

            async def serve() -> None:
                await server.do_handshake()
                answers.append(await Receiver(folder).serve(server))

            nursery.start_soon(serve)
            await client.do_handshake()
            frames = Frames(client)
            try:
                for message in (Hello(version=VERSION, transfer="t"), *said):
                    if isinstance(message, bytes):
                        await client.send_all(message)
                    elif isinstance(message, Offer):
                        await frames.send(*offers([message]))
                    else:
                        await frames.send(message)
                await client.send_eof()
                while (answer := await frames.receive()) is not None:
                    answers.append(answer)
            except trio.BrokenResourceError:
                pass
            await client.aclose()
    return answers


def offer(*path: str, size: int = 3, mtime_ns: int = 0, mode: int = 0o644) -> Offer:
    return Offer(n=0, path=path, folder=False, size=size, mtime_ns=Nanoseconds(mtime_ns), mode=mode)


@pytest.mark.parametrize(
    "path",
    [
        (),
        ("..", "x"),
        ("a", "..", "x"),
        ("/etc", "x"),
        ("a/b",),
        ("",),
        (".",),
        ("a\0b",),
        ("a\x1b[2J",),
        ("a\nb",),
        ("x" * 256,),
        ("ü" * 128,),
        ("\ud800",),
        (PARTIAL, "x"),
        (PARTIAL.upper() + ". ", "x"),
        ("a",) * 129,
    ],
)
async def test_no_path_escapes(
    tmp_path: Path, configs: tuple[ClientConfig, ServerConfig], path: tuple[str, ...]
) -> None:
    with pytest.raises(UnsafeName):
        check_path(path)
    folder = Folder(tmp_path / "in")
    # A message always has a name, so it cannot even say that there is none.
    answers = await talk(folder, configs, offer(*path or ("",)))
    folder.close()
    assert any(isinstance(answer, Failed) for answer in answers)
    assert there(tmp_path) == {"in"}


async def test_links_lead_nobody_out(
    tmp_path: Path, configs: tuple[ClientConfig, ServerConfig]
) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "out").symlink_to(tmp_path / "outside")
    (tmp_path / "in" / "file").symlink_to(tmp_path / "outside" / "file")
    folder = Folder(tmp_path / "in", overwrite=True)
    for path in (("out", "x"), ("file",)):
        answers = await talk(folder, configs, offer(*path))
        assert any(isinstance(answer, Failed) for answer in answers), answers
    made = offer("out", "f", size=0)._replace(folder=True)
    assert any(isinstance(answer, Failed) for answer in await talk(folder, configs, made))
    folder.close()
    assert list((tmp_path / "outside").iterdir()) == []


@pytest.mark.parametrize("parts", [True, False])
async def test_a_wrong_digest_stores_nothing(
    tmp_path: Path, configs: tuple[ClientConfig, ServerConfig], *, parts: bool
) -> None:
    folder = Folder(tmp_path / "in")
    data = header(DATA, 3) + b"abc"
    sent = [Start(n=0), data, End(n=0, sha256="0" * 64)] if parts else [Whole(0, bytes(32), b"abc")]
    answers = await talk(folder, configs, offer("x"), *sent)
    folder.close()
    failures = [answer.reason for answer in answers if isinstance(answer, Failed)]
    assert failures == ["x: the received data differ from what was sent"]
    assert there(tmp_path / "in") == set()


async def test_small_pieces_take_as_much_memory_as_they_have_bytes(
    tmp_path: Path, configs: tuple[ClientConfig, ServerConfig]
) -> None:
    """A sender may cut its data into frames of a byte."""
    current = _Current(0, None)
    data = random.Random(1).randbytes(1 << 16)
    tracemalloc.start()
    try:
        for start in range(len(data)):
            current.gather(memoryview(data)[start : start + 1])
        assert tracemalloc.get_traced_memory()[1] < 4 * len(data)
    finally:
        tracemalloc.stop()
    assert b"".join(current.pieces) == data

    cuts = [0, 1, 2, 3, 20_000, 36_384, 36_385, 53_000, 53_001, len(data)]
    frames = [
        header(DATA, there - here) + data[here:there] for here, there in itertools.pairwise(cuts)
    ]
    end = End(n=0, sha256=hashlib.sha256(data).hexdigest())
    folder = Folder(tmp_path / "in")
    await talk(folder, configs, offer("x", size=len(data)), Start(n=0), *frames, end)
    folder.close()
    assert (tmp_path / "in" / "x").read_bytes() == data


FULL = tuple((f"{n}", 0o644, 1, 0) for n in range(512))
"""More of them than may await their outcome, in five messages."""


@pytest.mark.parametrize(
    "said",
    [
        [Start(n=0)],
        [offer("there"), Start(n=0), End(n=0, sha256="0" * 64)],
        [offer("x"), Digest(n=0, sha256="0" * 64)],
        [offer("there"), Digest(n=0, sha256="0" * 64), Digest(n=0, sha256="1" * 64)],
        [offer("x"), Start(n=0), header(DATA, 4) + b"abcd"],
        [header(DATA, 4) + b"abcd"],
        [Whole(0, hashlib.sha256(b"abc").digest(), b"abc")],
        [offer("x"), Whole(0, hashlib.sha256(b"ab").digest(), b"ab")],
        [offer("x"), Whole(0, hashlib.sha256(b"abcd").digest(), b"abcd")],
        [offer("there"), Whole(0, hashlib.sha256(b"abc").digest(), b"abc")],
        [offer("x"), Start(n=0), Whole(0, hashlib.sha256(b"abc").digest(), b"abc")],
        [offer("x"), offer("x")],
        [Offers(n=k * 512, folder=(), checksum=True, entries=FULL) for k in range(5)],
        [Have(n=0, size=0)],
        [b"\xff\0\0\0\0"],
        [header(2, 3) + b"{}]"],
        [header(2, 1 << 20)],
        [header(2, 100) + b"{"],
    ],
)
async def test_a_peer_out_of_its_mind_is_shown_out(
    tmp_path: Path, configs: tuple[ClientConfig, ServerConfig], said: list[Said]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "there").write_bytes(b"abc")
    folder = Folder(tmp_path / "in", overwrite=True)
    answers = await talk(folder, configs, *said)
    folder.close()
    assert False in answers
    assert there(tmp_path / "in") == {"there"}
    assert (tmp_path / "in" / "there").read_bytes() == b"abc"


def test_messages_there_and_back() -> None:
    file, folder = (
        offer("ü", "\udcff"),
        offer("ü", "f", size=0, mode=0o755)._replace(n=1, folder=True),
    )
    [message] = offers([file, folder])
    whole = Whole(7, bytes(32), b"content")
    for sent in (message, whole, Send(files=((0, 5),)), Stored(files=(1,), how=How.SAME, lost="")):
        frame = encode(sent)
        kind, length = split_header(frame[:5])
        assert length == len(frame) - 5
        assert decode(kind, frame[5:]) == sent
    assert list(message.each()) == [file, folder]
    for body in (
        *(b"[]", b"{}", b"[" * 9999, b'{"files":0}', b'{"files":[0]}', b'{"files":[[0]]}'),
        *(b'{"files":[[0,-1]]}', b'{"files":[[true,0]]}', b'{"files":[[0,0,0]]}'),
    ):
        with pytest.raises(ProtocolError):
            decode(5, body)
    for entry in ('""', "[]", '["a"]', '["a",-1]', '["a",1,1]', '["a",1,-1,0]', '["a",1,1,1,1]'):
        given = f'{{"n":0,"folder":[],"checksum":false,"entries":[{entry}]}}'
        with pytest.raises(ProtocolError):
            decode(2, given.encode())
    for short in (b"", bytes(39), b"\xff" * 40):
        with pytest.raises(ProtocolError):
            decode(14, short)


def test_every_field_may_have_a_value_of_any_type() -> None:
    """A message or ``ProtocolError``, and no other error."""
    sent: tuple[Message, ...] = (
        Hello(version=VERSION, transfer="0"),
        *offers([offer("f", "g")]),
        Have(n=0, size=1),
        Digest(n=0, sha256="0"),
        Send(files=((0, 5),)),
        Start(n=0),
        End(n=0, sha256="0"),
        Drop(n=0, reason="gone"),
        Stored(files=(1,), how=How.SAME, lost=""),
        Failed(n=0, reason="full"),
    )
    odd = (None, True, -1, 1 << 63, 1.5, float("inf"), "", "\udcff", [], {}, [[]], [{}], [None, 1])
    for message in sent:
        frame = encode(message)
        fields = json.loads(frame[5:])
        for name in fields:
            for value in odd:
                with contextlib.suppress(ProtocolError):
                    decode(frame[0], json.dumps({**fields, name: value}).encode())


def test_offers_fit_their_messages() -> None:
    """Whatever the names are, and in as few messages as may be."""
    names = [
        "a", "a" * 255, "\"" * 255, "\\" * 255, "ü" * 127, "\U0001f511" * 63, "\udcff" * 255,
    ]  # fmt: skip
    for folder in ((), ("ü" * 127,) * 16, ("\udcff" * 250,) * 16):
        given = [
            offer(*folder, name, size=2**62, mtime_ns=-(2**90), mode=0o7777)._replace(n=n)
            for n, name in enumerate(names * 200)
        ]
        messages = list(offers(given))
        assert [one for message in messages for one in message.each()] == given
        for message in messages:
            frame = encode(message)
            split_header(frame[:5])
            assert decode(2, frame[5:]) == message
    many = [offer("f", f"{n:06}")._replace(n=n) for n in range(5120)]
    assert len(list(offers(many))) == 10
    gaps = [offer("f", f"{n}")._replace(n=n) for n in (1, 2, 4, 9)]
    assert [one.n for message in offers(gaps) for one in message.each()] == [1, 2, 4, 9]


@pytest.mark.parametrize("move", [True, False])
def test_a_folder_that_is_taken_away_and_comes_back(
    tmp_path: Path, run: Run, mutual: list[str], *, move: bool
) -> None:
    """As when a disk is mounted anew: what is stored is stored in the folder of that name."""
    place = tmp_path / "in"
    _, port = receive(run, place, mutual)
    files = [tmp_path / f"file-{number}" for number in range(2)]
    for file in files:
        file.write_text(file.name)
    assert send(mutual, port, files[0])[0] == 0
    if move:
        place.rename(tmp_path / "elsewhere")
    else:
        shutil.rmtree(place)
    status, said = send(mutual, port, files[1])
    assert status == 1
    assert "the receiver's folder was removed or moved" in said
    place.mkdir()
    assert send(mutual, port, files[1])[0] == 0
    assert there(place) == {"file-1"}
