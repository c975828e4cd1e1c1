"""Many small files: how few calls they take, when they are called stored, what is left of them."""

import errno
import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from apps_glue import Run, become_a_pipe, begin, connected, look, memory, replace, store
from waiting import until

from hybridkex import ClientConfig, SecureStream, ServerConfig
from hybridkex.apps.transfer import (
    Folder,
    Outcome,
    Progress,
    Receiver,
    arrivals,
    collect,
    durable,
    receiver,
    send_items,
    sender,
)
from hybridkex.apps.transfer.arrivals import Arrivals
from hybridkex.apps.transfer.frames import Frames
from hybridkex.apps.transfer.handles import Handles
from hybridkex.apps.transfer.messages import WHOLE, How, Nanoseconds, Offer
from hybridkex.apps.transfer.names import PARTIAL, WORK

Configs = tuple[ClientConfig, ServerConfig]
COMMAND = [sys.executable, "-m", "hybridkex"]


def fill(folder: Path, count: int, *, size: int = 100) -> Path:
    """Small files, a hundred in a folder."""
    for number in range(count):
        below = folder / f"{number // 100:03}"
        below.mkdir(parents=True, exist_ok=True)
        (below / f"{number:05}").write_bytes(random.Random(number).randbytes(size))
    return folder


async def deliver(
    configs: Configs,
    folder: Folder,
    *sources: Path,
    checksum: bool = False,
    progress: Any = None,
) -> Outcome:
    """Send and receive in this process."""
    left_out: list[str] = []
    with trio.fail_after(120):
        async with trio.open_nursery() as nursery:

            async def connect() -> SecureStream[Any]:
                client, server = await connected(configs)
                nursery.start_soon(Receiver(folder).serve, server)
                return client

            outcome = await send_items(
                collect(sources, left_out.append),
                connect,
                progress or Progress(),
                retries=0,
                checksum=checksum,
            )
    assert not left_out
    return outcome


def same(source: Path, target: Path) -> bool:
    return subprocess.run(["diff", "-rq", source, target], check=False).returncode == 0


# --- how few calls ------------------------------------------------------------------------------

CALLS = ("open", "close", "stat", "fstat", "pread", "pwrite", "fchmod", "utime", "link", "unlink")
RARE = ("mkdir", "rmdir", "fsync", "fstatvfs", "scandir", "listdir", "rename", "ftruncate")


async def test_calls_per_thousand_small_files(
    tmp_path: Path, configs: Configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of both ends together. Each bound is near today's figure, and a tenth of what a hand-over, a
    flush or a message for each file would make."""
    source = fill(tmp_path / "source", 1000)
    folder = Folder(tmp_path / "in")
    counts: Counter[str] = Counter()

    def counted(room: Any, name: str, kind: str) -> None:
        call = getattr(room, name)

        def count(*args: Any, **more: Any) -> Any:
            counts[kind] += 1
            return call(*args, **more)

        monkeypatch.setattr(room, name, count)

    for name in (*CALLS, *RARE):
        counted(os, name, name if name == "fsync" else "calls")
    for room in (sender, receiver):
        counted(room, "in_thread", "hand-overs")
    for room in (arrivals, durable):
        counted(room, "flush_all", "flushes")
    counted(Frames, "send_frames", "sends")
    outcome = await deliver(configs, folder, source)
    assert (outcome.stored, outcome.failed) == (1011, {})
    assert counts["calls"] < 22 * 1000
    assert counts["hand-overs"] < 100
    assert counts["sends"] < 100
    assert counts["flushes"] + counts["fsync"] < 100
    counts.clear()
    outcome = await deliver(configs, folder, source)
    assert (outcome.unchanged, outcome.stored) == (1000, 0)
    assert counts["calls"] < 1.3 * 1000, "one stat each at the receiver, beside the listing"
    assert counts["hand-overs"] < 60
    folder.close()


@pytest.mark.slow
def test_many_entries_in_flat_memory(
    tmp_path: Path, run: Run, mutual: list[str], *, thorough: bool
) -> None:
    """The receiver's folder is the one that holds the source: there is nothing to store. With
    ``--thorough`` a hundred thousand files, as the page on performance says."""
    source, made, peaks = tmp_path / "source", 0, []
    source.mkdir()
    counts = (2_000, 100_000) if thorough else (4_000, 16_000)
    server, port = run.server(
        *("receive", tmp_path, "--port", 0, "--bind", "127.0.0.1", *mutual), start=run.fresh
    )
    for count in counts:
        for number in range(made, count):
            os.mknod(f"{source}/a file with the number {number}")
        made = count
        sending = run.fresh("send", source, f"localhost:{port}", *mutual)
        peak = 0
        while sending.poll() is None:
            peak = max(peak, memory(sending.pid))
            time.sleep(0.02)
        assert f"({count:,} by size and date)" in sending.communicate(timeout=60)[1]
        peaks.append((peak, memory(server.pid)))
    for few, many in zip(*peaks, strict=True):
        # Two runs differ by up to 1 MB.
        most = few + 2**21 + 100 * (counts[1] - counts[0])
        assert 0 < many < most, "each in a list takes 700 bytes"


# --- stored means on disk -----------------------------------------------------------------------


class Watched(Progress):
    """Notes when files are reported."""

    def __init__(self, events: list[str]) -> None:
        self._events = events

    def stored(self, files: Any) -> None:
        self._events += ["stored"] * len(files)


@pytest.mark.parametrize("count", [3, 200])
@pytest.mark.parametrize("whole_disk", [True, False])
async def test_data_then_name_then_answer(
    tmp_path: Path,
    configs: Configs,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    *,
    whole_disk: bool,
) -> None:
    """No name before its data are flushed, and no answer before its name is."""
    source = fill(tmp_path / "source", count)
    events: list[str] = []

    def noting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def note(*args: Any, **more: Any) -> Any:
            done = call(*args, **more)
            events.append(name)
            return done

        return note

    monkeypatch.setattr(arrivals, "has_flush_all", lambda file: whole_disk)
    monkeypatch.setattr(arrivals, "flush_all", noting("all", os.fsync))
    monkeypatch.setattr(os, "fsync", noting("one", os.fsync))
    monkeypatch.setattr(os, "link", noting("name", os.link))
    monkeypatch.setattr(os, "pwrite", noting("data", os.pwrite))
    folder = Folder(tmp_path / "in")
    outcome = await deliver(configs, folder, source, progress=Watched(events))
    folder.close()
    assert outcome.stored >= count
    written = flushed = named = unnamed = unanswered = 0
    for event in events:
        if event == "data":
            written += 1
        elif event == "all":
            flushed, unnamed = written, 0
        elif event == "one":
            flushed, unnamed = min(flushed + 1, written), 0
        elif event == "name":
            named, unnamed = named + 1, unnamed + 1
            assert named <= flushed
        else:
            assert not unnamed
            unanswered += 1
    assert unanswered == count
    if count > 100:
        assert ("all" in events) == whole_disk


async def test_folders_on_a_file_system_that_is_mounted_below(
    tmp_path: Path, configs: Configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flush of the receiving folder's file system does not reach them."""
    source, target = tmp_path / "source" / "mounted", tmp_path / "in" / "mounted"
    for number in range(20):
        (source / str(number) / "below").mkdir(parents=True)
    target.mkdir(parents=True)
    fstat, fsync, unflushed = os.fstat, os.fsync, Counter[str]()

    def place(file: int) -> str:
        return os.readlink(f"/proc/self/fd/{file}")

    def other_device(file: int) -> os.stat_result:
        status = fstat(file)
        if not place(file).startswith(str(target)):
            return status
        return os.stat_result((*status[:2], status.st_dev + 1, *status[3:]))

    def make(name: str, mode: int = 0o777, *, dir_fd: int) -> None:
        unflushed[place(dir_fd)] += place(dir_fd).startswith(str(target))
        mkdir(name, mode, dir_fd=dir_fd)

    def flushed(file: int) -> None:
        unflushed.pop(place(file), None)
        fsync(file)

    mkdir = os.mkdir
    folder = Folder(tmp_path / "in")
    monkeypatch.setattr(arrivals, "has_flush_all", lambda file: True)
    monkeypatch.setattr(arrivals, "flush_all", lambda file: None)
    for name, fake in (("fstat", other_device), ("mkdir", make), ("fsync", flushed)):
        monkeypatch.setattr(os, name, fake)
    outcome = await deliver(configs, folder, source)
    assert (outcome.stored, outcome.already) == (40, 1)
    assert not unflushed.total()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("which", ["data", "names"])
async def test_an_error_of_the_disk_is_one_of_the_whole_group(
    tmp_path: Path,
    configs: Configs,
    monkeypatch: pytest.MonkeyPatch,
    which: str,
    *,
    overwrite: bool,
) -> None:
    """The kernel reports an error once, so flushing the files one by one afterwards shows nothing.
    What is not called stored has no name either, and the next attempt sends it again."""
    source = fill(tmp_path / "source", 50)
    calls: list[str] = []

    def failing(file: int) -> None:
        # Of names, once the files of the group have left its folder.
        unnamed = WORK in os.readlink(f"/proc/self/fd/{file}") and os.listdir(file)
        calls.append("data" if unnamed else "names")
        if calls[-1] == which and "data" in calls and is_broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    is_broken = True

    monkeypatch.setattr(arrivals, "has_flush_all", lambda file: True)
    monkeypatch.setattr(arrivals, "flush_all", failing)
    monkeypatch.setattr(arrivals, "_FEW", 0)
    monkeypatch.setattr(arrivals, "_LONGEST", 60.0)
    folder = Folder(tmp_path / "in", overwrite=overwrite)
    outcome = await deliver(configs, folder, source)
    files = {name for name in outcome.failed if len(name.split("/")) == 3}
    assert len(files) == 50
    assert set(outcome.failed.values()) == {"cannot write it: the disk reports an error"}
    assert not [*(tmp_path / "in").glob("source/*/*")]
    is_broken = False
    outcome = await deliver(configs, folder, source)
    folder.close()
    assert (len(outcome.failed), outcome.unchanged) == (0, 0)
    assert same(source, tmp_path / "in" / "source")


# --- several senders of one tree ----------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 100])
async def test_senders_of_the_same_files_at_once(
    tmp_path: Path, configs: Configs, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """A file that another sender has stored meanwhile is there already, if its content is the
    same."""
    sources = [fill(tmp_path / str(number) / "source", 20, size=size) for number in range(3)]
    odd = Path("000", "00007")
    for number in range(3):
        (tmp_path / "in" / "source" / "000").mkdir(parents=True, exist_ok=True)
        (sources[number] / odd).write_bytes(bytes([number]))
    barrier, begun = threading.Barrier(3), set[Arrivals]()
    settle = Arrivals.settle

    def together(group: Arrivals) -> Any:
        if group not in begun:
            begun.add(group)
            barrier.wait(20)
        return settle(group)

    monkeypatch.setattr(Arrivals, "settle", together)
    outcomes: list[Outcome] = []
    folder = Folder(tmp_path / "in")

    async def send(source: Path) -> None:
        outcomes.append(await deliver(configs, folder, source))

    async with trio.open_nursery() as nursery:
        for source in sources:
            nursery.start_soon(send, source)
    folder.close()
    assert sum(outcome.stored for outcome in outcomes) == 20
    assert sorted(len(outcome.failed) for outcome in outcomes) == [0, 1, 1]
    for outcome in outcomes:
        assert all("other content" in reason for reason in outcome.failed.values())
        assert set(outcome.failed) <= {f"source/{odd}"}
    assert not (tmp_path / "in" / PARTIAL).exists()


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("size", [3, WHOLE, WHOLE + 1])
@pytest.mark.parametrize(
    "there", ["same", "other", "shorter", "longer", "link", "pipe", "folder", "nothing"]
)
def test_a_name_that_is_taken_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, there: str, *, links: bool
) -> None:
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    content = random.Random(size).randbytes(size)
    folder, path = Folder(tmp_path / "in"), tmp_path / "in" / "x"
    offer = Offer(0, ("x",), False, size, Nanoseconds(0), 0o644)
    assert not look(folder, offer).size
    group = Arrivals(folder)
    digest = hashlib.sha256(content)
    if size <= WHOLE:
        with folder.open() as handles:
            group.write(offer, arrivals.Whole(0, digest.digest(), content), handles)
    else:
        part = begin(folder, offer)
        part.write([memoryview(content)])
        group.add(part.complete(digest.hexdigest(), folder.umask))
    match there:
        case "same":
            path.write_bytes(content)
        case "other":
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "shorter":
            path.write_bytes(content[:-1])
        case "longer":
            path.write_bytes(content + b"x")
        case "link":
            (tmp_path / "elsewhere").write_bytes(content)
            path.symlink_to(tmp_path / "elsewhere")
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
    [settled] = group.settle()
    group.close()
    folder.close()
    if there == "nothing":
        assert (settled.how, settled.error) == (How.NEW, None)
    elif there == "same":
        assert (settled.how, settled.error) == (How.SAME, None)
    else:
        assert settled.error is not None
    if there in ("same", "nothing"):
        assert path.read_bytes() == content
        assert not (tmp_path / "in" / PARTIAL).exists()


def no_links(*words: object, **more: object) -> None:
    raise PermissionError(errno.EPERM, "no hard links here")


# --- unchanged files ----------------------------------------------------------------------------


async def test_unchanged_by_size_and_date(tmp_path: Path, configs: Configs) -> None:
    """As in rsync; ``checksum`` looks at the content, and nothing is replaced either way."""
    file = tmp_path / "file"
    file.write_bytes(b"new")
    folder = Folder(tmp_path / "in")
    (tmp_path / "in" / "file").write_bytes(b"old")
    os.utime(tmp_path / "in" / "file", ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    outcome = await deliver(configs, folder, file)
    assert (outcome.already, outcome.unchanged) == (1, 1)
    outcome = await deliver(configs, folder, file, checksum=True)
    assert "exists already, with other content" in outcome.failed["file"]
    (tmp_path / "in" / "file").write_bytes(b"new")
    outcome = await deliver(configs, folder, file)
    assert (outcome.already, outcome.unchanged) == (1, 0), "another date: the content was compared"
    os.utime(file, ns=(1, 1))
    os.utime(tmp_path / "in" / "file", ns=(1, 1))
    outcome = await deliver(configs, folder, file, checksum=True)
    assert (outcome.already, outcome.unchanged, outcome.payload) == (1, 0, 0)
    folder.close()


async def test_replacing_needs_another_size_or_date_or_checksum(
    tmp_path: Path, configs: Configs
) -> None:
    (tmp_path / "file").write_bytes(b"new")
    folder = Folder(tmp_path / "in", overwrite=True)
    there = tmp_path / "in" / "file"
    there.write_bytes(b"old")
    status = (tmp_path / "file").stat()
    os.utime(there, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (await deliver(configs, folder, tmp_path / "file")).unchanged == 1
    outcome = await deliver(configs, folder, tmp_path / "file", checksum=True)
    assert outcome.stored == 1
    assert there.read_bytes() == b"new"
    folder.close()


# --- files that change while they are sent ------------------------------------------------------


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def shrink(path: Path) -> None:
    os.truncate(path, 1)


def rewrite(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def vanish(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("change", [grow, shrink, rewrite, replace, become_a_pipe, vanish])
@pytest.mark.parametrize("call", ["open", "pread"])
async def test_a_small_file_that_changes(
    tmp_path: Path,
    configs: Configs,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], None],
    call: str,
) -> None:
    """Nothing is stored under the name but what was offered, and its neighbours arrive."""
    source = fill(tmp_path / "source", 5)
    odd = source / "000" / "00002"
    content = odd.read_bytes()
    os.utime(odd, ns=(1, 1))
    original, inode = getattr(os, call), odd.stat().st_ino
    done: list[None] = []

    def before(target: Any, *args: Any, **more: Any) -> Any:
        ours = target == str(odd) if call == "open" else os.fstat(target).st_ino == inode
        if ours and not done:
            done.append(change(odd))
        return original(target, *args, **more)

    monkeypatch.setattr(os, call, before)
    folder = Folder(tmp_path / "in")
    outcome = await deliver(configs, folder, source)
    folder.close()
    assert done
    arrived = tmp_path / "in" / "source" / "000"
    assert len(list(arrived.iterdir())) >= 4
    if "source/000/00002" in outcome.failed:
        assert not (arrived / "00002").exists()
    else:
        assert (change, call) in {(one, "pread") for one in (replace, become_a_pipe, vanish)}
        assert (arrived / "00002").read_bytes() == content


# --- faults -------------------------------------------------------------------------------------


def test_a_killed_receiver_among_small_files(tmp_path: Path, run: Run, mutual: list[str]) -> None:
    """Each file is whole or not there, the sender goes on, and nothing hidden is left."""
    source, target = fill(tmp_path / "source", 3000), tmp_path / "in"
    server, port = run.server("receive", target, "--port", 0, "--bind", "127.0.0.1", *mutual)
    sending = run.start("send", source, f"localhost:{port}", *mutual)
    until(lambda: len(list(target.glob("source/*/*"))) > 100, sending)
    server.send_signal(signal.SIGKILL)
    server.communicate()
    for arrived in target.glob("source/*/*"):
        assert (
            arrived.read_bytes() == (source / arrived.relative_to(target / "source")).read_bytes()
        )
    server, _ = run.server("receive", target, "--port", port, "--bind", "127.0.0.1", *mutual)
    errors = sending.communicate(timeout=60)[1]
    assert sending.returncode == 0, errors
    assert same(source, target / "source")
    server.terminate()
    server.communicate()
    assert not (target / PARTIAL).exists()


def test_what_a_killed_receiver_leaves_is_removed_and_a_living_ones_is_not(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "in")
    group = Arrivals(folder)
    whole = arrivals.Whole(0, hashlib.sha256(b"abc").digest(), b"abc")
    offer = Offer(0, ("x",), False, 3, Nanoseconds(0), 0o644)
    with folder.open() as handles:
        group.write(offer, whole, handles)
    left = tmp_path / "in" / PARTIAL / f"{WORK}of-a-killed-one"
    left.mkdir()
    (left / "1").write_bytes(b"abc")
    other = Folder(tmp_path / "in")
    assert not left.exists()
    assert [one.error for one in group.settle()] == [None]
    assert (tmp_path / "in" / "x").read_bytes() == b"abc"
    left.mkdir(parents=True)  # a fault while it runs
    other.close()
    assert not (tmp_path / "in" / PARTIAL).exists()


def test_no_descriptor_is_left_by_a_group(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    folder = Folder(tmp_path / "in")
    for n in range(3):
        store(folder, Offer(n, ("a", f"{n}"), False, 3, Nanoseconds(0), 0o644), b"abc")
        part = begin(folder, Offer(n, (f"large {n}",), False, WHOLE + 1, Nanoseconds(0), 0o644))
        part.close()
    assert look(folder, Offer(9, ("a", "0"), False, 3, Nanoseconds(0), 0o644)).unchanged
    folder.close()
    assert len(os.listdir("/proc/self/fd")) == before


async def test_a_disk_that_hangs_holds_up_its_own_sender_alone(
    tmp_path: Path, configs: Configs
) -> None:
    """Disk work is in threads: the event loop goes on."""
    go_on = threading.Event()

    class Hanging(Folder):
        def look(self, offer: Offer, handles: Handles) -> Any:
            if offer.path == ("hangs",):
                go_on.wait(60)
            return super().look(offer, handles)

    for name in ("hangs", "passes"):
        (tmp_path / name).write_text(name)
    folder = Hanging(tmp_path / "in")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(deliver, configs, folder, tmp_path / "hangs")
        with trio.fail_after(30):
            assert (await deliver(configs, folder, tmp_path / "passes")).stored == 1
        assert not (tmp_path / "in" / "hangs").exists()
        go_on.set()
    assert (tmp_path / "in" / "hangs").exists()
    folder.close()
