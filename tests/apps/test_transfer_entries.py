"""Entries as disks have them: every one arrives as it is, or is named while the others arrive.

Sender and receiver run in one process, over a pair of streams in memory.
"""

import contextlib
import dataclasses
import errno
import hashlib
import os
import random
import shutil
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unicodedata import category, normalize

import pytest
import trio
import trio.testing
from apps_glue import become_a_pipe, begin, complete, connected, replace

from hybridkex import ClientConfig, SecureStream, ServerConfig
from hybridkex.apps.transfer import Folder, Outcome, Progress, Receiver, collect, send_items
from hybridkex.apps.transfer import sender as sending
from hybridkex.apps.transfer.arrivals import Arrivals
from hybridkex.apps.transfer.frames import Frames
from hybridkex.apps.transfer.messages import (
    VERSION,
    WHOLE,
    Digest,
    End,
    Failed,
    Have,
    Hello,
    How,
    Message,
    Nanoseconds,
    Offer,
    Send,
    Start,
    Stored,
    Whole,
    offers,
)
from hybridkex.apps.transfer.names import PARTIAL, shown
from hybridkex.apps.transfer.part import partial_path
from hybridkex.apps.transfer.reception import Reception
from hybridkex.errors import ConfigError

Configs = tuple[ClientConfig, ServerConfig]


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    """The one of most machines."""
    before = os.umask(0o022)
    yield
    os.umask(before)


async def deliver(
    configs: Configs, target: Path, *sources: Path, overwrite: bool = False
) -> tuple[Outcome, list[str]]:
    """Send and receive; the outcome, and what was left out from the beginning."""
    left_out: list[str] = []
    items = collect(list(sources), left_out.append)
    folder = Folder(target, overwrite=overwrite)
    try:
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:

                async def connect() -> SecureStream[Any]:
                    client, server = await connected(configs)
                    nursery.start_soon(Receiver(folder).serve, server)
                    return client

                outcome = await send_items(items, connect, Progress(), retries=0)
    finally:
        folder.close()
    return outcome, left_out


def named(name: str, outcome: Outcome, left_out: list[str]) -> bool:
    """Whether an entry was said not to be carried."""
    text = shown((name,))
    failed = {shown((path,)) for path in (*outcome.failed, *outcome.incomplete)}
    return any(text in line for line in (*left_out, *failed))


# --- dates, modes, names, kinds: one folder with all of them ------------------------------------

DATES = (
    -(2**33),
    -2_208_988_800,  # 1900
    -1,
    0,
    2**31,  # 2038
    2**32,  # 2106
    9_223_372_037,  # 2262, the end of 64 bits of nanoseconds
    13_569_465_600,  # 2400
    2**34,  # 2514
    253_402_300_800,  # year 10000
    2**40,
)
MODES = (
    *(0o600, 0o400, 0o640, 0o755, 0o777, 0o000, 0o4755, 0o2755, 0o1644, 0o7777),
    *random.Random(14).sample(range(0o10000), 40),
)
NAMES = (
    *(b"a" * 255, "ü".encode() * 127, b"-rf", b" ", b"a ", b"a.", b"...", b"con", b"a\\b", b"a:b"),
    *(b"\xff\xfe", b"a\nb", b"a\x1b[2J", b"a\x7f", "a\u202eb".encode(), "\U0001f511".encode()),
    *(normalize(form, "Å").encode() for form in ("NFC", "NFD")),
    *(b"README", b"readme", "straße".encode(), b"STRASSE", b"%00", b"~", b"*", b"{n}", b".hidden"),
    *(
        bytes(random.Random(number).choices([*range(1, 47), *range(48, 256)], k=number % 40 + 1))
        for number in range(60)
    ),
)


def test_every_kind_of_entry_is_here() -> None:
    names = [os.fsdecode(name) for name in NAMES]
    refused = [name for name in names if any(category(one) == "Cc" for one in name)]
    assert len(refused) > 10
    assert len(names) - len(refused) > 20


def fill(source: Path) -> tuple[set[str], set[str]]:
    """Make a folder; the names of what must arrive, and of what must be named."""
    source.mkdir()
    arrives, refused = set(), set()

    def file(name: str, content: bytes = b"content") -> Path:
        (source / name).write_bytes(content)
        arrives.add(name)
        return source / name

    for date in DATES:
        path = file(f"date {date}")
        os.utime(path, ns=(date * 10**9 + 123_000_000, date * 10**9 + 123_000_000))
    for mode in MODES:
        file(f"mode {mode:o}").chmod(mode)
    for name in dict.fromkeys(map(os.fsdecode, NAMES)):
        if name in (".", ".."):
            continue
        file(name)
        if any(category(one) == "Cc" for one in name):
            arrives.remove(name)
            refused.add(name)
    file("empty", b"")
    with file("sparse").open("r+b") as sparse:
        sparse.seek(3 << 20)
        sparse.write(b"end")
    with (source / "larger than any disk").open("wb") as huge, contextlib.suppress(OSError):
        huge.truncate(1 << 43)
        refused.add("larger than any disk")
    os.mkfifo(source / "pipe")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(os.path.relpath(source / "socket"))
    for name, target in (
        *(("loop", "loop"), ("dangling", "nowhere"), ("outside", "/etc/hostname")),
        ("inside", "empty"),
    ):
        (source / name).symlink_to(target)
        refused.add(name)
    refused |= {"pipe", "socket"}
    with contextlib.suppress(PermissionError):
        os.mknod(source / "device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        refused.add("device")
    return arrives, refused


async def test_odd_entries_arrive_as_they_are_or_are_named(
    tmp_path: Path, configs: Configs
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    arrives, refused = fill(source)
    outcome, left_out = await deliver(configs, target, source)
    assert outcome.connections == 1
    assert {path.name for path in (target / "source").iterdir()} == arrives
    for name in arrives:
        sent, arrived = source / name, target / "source" / name
        assert arrived.read_bytes() == sent.read_bytes(), name
        ours, theirs = sent.stat(), arrived.stat()
        assert stat.S_IMODE(theirs.st_mode) == stat.S_IMODE(ours.st_mode) & 0o755, name
        if theirs.st_mtime_ns != ours.st_mtime_ns:
            assert named(name, outcome, left_out), name
    for name in refused:
        assert named(name, outcome, left_out), name
    assert len(left_out) + len(outcome.failed) == len(refused)
    assert not any("\n" in line or "\x1b" in line for line in (*left_out, *outcome.failed))
    # And nothing of it is sent twice.
    again, _ = await deliver(configs, target, source)
    assert (again.stored, again.payload) == (0, 0)
    assert again.already == len(arrives) + 1


async def test_a_tree_that_is_too_deep(tmp_path: Path, configs: Configs) -> None:
    """Deeper than Python's stack, and with a path longer than any system call takes."""
    source, target = tmp_path / "source", tmp_path / "target"
    for top, name, depth in (("fits", "d", 100), ("deep", "d", 1100), ("long", "n" * 255, 30)):
        (source / top).mkdir(parents=True)
        (source / top / "file").write_text(top)
        here = os.open(source / top, os.O_RDONLY)
        for _ in range(depth):
            os.mkdir(name, dir_fd=here)
            below = os.open(name, os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = below
        os.close(here)
    try:
        outcome, left_out = await deliver(configs, target, source)
    finally:
        subprocess.run(  # noqa: ASYNC221
            ["rm", "-rf", str(source / "deep"), str(source / "long")], check=True
        )
    assert outcome.failed == {}
    assert len(left_out) == 2
    assert all("everything below" in line or "too" in line for line in left_out), left_out
    for top in ("fits", "deep", "long"):
        assert (target / "source" / top / "file").read_text() == top
    assert (target / "source" / "fits").joinpath(*["d"] * 100).is_dir()


async def test_a_named_path_that_cannot_be_sent_costs_itself_alone(
    tmp_path: Path, configs: Configs
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "link").symlink_to("file")
    paths = [tmp_path / name for name in ("nowhere", "loop", "file", "link")]
    outcome, left_out = await deliver(configs, tmp_path / "target", *paths, Path("/"), Path("a\0b"))
    assert outcome.stored == 2
    assert len(left_out) == 4
    assert (tmp_path / "target" / "link").read_text() == "x"
    assert not (tmp_path / "target" / "link").is_symlink()


async def test_directory_modes(tmp_path: Path, configs: Configs) -> None:
    """Never wider for others than at the sender's, and its owner can fill it."""
    source, target = tmp_path / "source", tmp_path / "target"
    modes = (0o700, 0o750, 0o755, 0o777, 0o500, 0o2770, 0o1777, 0o711)
    for mode in modes:
        folder = source / f"{mode:o}"
        folder.mkdir(parents=True)
        (folder / "file").write_text("x")
        folder.chmod(mode)
    outcome, left_out = await deliver(configs, target, source)
    assert (outcome.failed, left_out) == ({}, [])
    for mode in modes:
        arrived = target / "source" / f"{mode:o}"
        assert arrived.stat().st_mode & 0o7777 == (mode & 0o755 | 0o700)
        assert (arrived / "file").read_text() == "x"


# --- privacy ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640, 0o644, 0o4700])
@pytest.mark.parametrize("overwrite", [False, True])
async def test_a_file_is_never_wider_than_its_source(
    tmp_path: Path,
    configs: Configs,
    monkeypatch: pytest.MonkeyPatch,
    mode: int,
    overwrite: bool,
) -> None:
    """Looked at after every call that writes, names or changes a file."""
    source, target = tmp_path / "file", tmp_path / "target"
    source.write_bytes(bytes(3 << 20))
    source.chmod(mode)
    seen: list[int] = []

    def looking(call: Callable[..., Any]) -> Callable[..., Any]:
        def look(*args: Any, **more: Any) -> Any:
            done = call(*args, **more)
            seen.extend(path.stat().st_mode for path in target.rglob("*") if path.is_file())
            return done

        return look

    for name in ("open", "pwrite", "fchmod", "utime", "ftruncate", "link", "unlink", "rename"):
        monkeypatch.setattr(os, name, looking(getattr(os, name)))
    outcome, _ = await deliver(configs, target, source, overwrite=overwrite)
    assert outcome.stored == 1
    assert len(seen) > 10
    assert not [f"{one:o}" for one in seen if one & 0o7077 & ~mode]
    assert not [f"{one:o}" for one in seen if one & 0o7000]


async def test_a_disk_with_one_mode_for_all_files(
    tmp_path: Path, configs: Configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FAT and some network shares: nothing private is written to them, not even in part."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for mode in (0o600, 0o644, 0o755):
        (source / f"{mode:o}").write_bytes(b"content")
        (source / f"{mode:o}").chmod(mode)
    fstat, written = os.fstat, []

    def wide(file: int) -> os.stat_result:
        found = list(fstat(file))
        if PARTIAL in os.readlink(f"/proc/self/fd/{file}"):
            found[0] = stat.S_IFREG | 0o755
        return os.stat_result(found, {"st_mtime_ns": fstat(file).st_mtime_ns})

    pwrite = os.pwrite

    def write(file: int, data: bytes, offset: int) -> int:
        written.append(os.readlink(f"/proc/self/fd/{file}"))
        return pwrite(file, data, offset)

    monkeypatch.setattr(os, "fchmod", not_permitted)
    monkeypatch.setattr(os, "fstat", wide)
    monkeypatch.setattr(os, "pwrite", write)
    outcome, _ = await deliver(configs, target, source)
    assert sorted(outcome.failed) == ["source/600", "source/644"]
    assert "would let others read it" in outcome.failed["source/600"]
    assert {path.name for path in (target / "source").iterdir()} == {"755"}
    assert len(written) == 1


def not_permitted(*args: object, **more: object) -> None:
    raise PermissionError(errno.EPERM, "Operation not permitted")


async def test_a_date_that_the_disk_does_not_have(
    tmp_path: Path, configs: Configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The content arrives, and it is said that the date did not."""
    paths = [tmp_path / name for name in ("refused", "rounded", "kept")]
    for path in paths:
        path.write_text(path.name)
    os.utime(paths[0], (1, 1))
    os.utime(paths[1], (2, 2))
    utime = os.utime

    def limited(file: int, *, ns: tuple[int, int]) -> None:
        if ns[1] == 10**9:
            raise OverflowError("timestamp out of range for platform time_t")
        utime(file, ns=(5 * 10**9, 5 * 10**9) if ns[1] == 2 * 10**9 else ns)

    monkeypatch.setattr(os, "utime", limited)
    outcome, _ = await deliver(configs, tmp_path / "target", *paths)
    assert outcome.stored == 3
    assert set(outcome.incomplete) == {"refused", "rounded"}
    assert "date" in outcome.incomplete["refused"]


async def alone(folder: Folder, configs: Configs, *said: Message | Offer) -> list[Message]:
    """What a receiver answers to these messages."""
    client, server = await connected(configs)
    answers: list[Message] = []
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Receiver(folder).serve, server)
            frames = Frames(client)
            await frames.send(Hello(version=VERSION, transfer="t"))
            for message in said:
                await frames.send(*(offers([message]) if isinstance(message, Offer) else [message]))
            await client.send_eof()
            with contextlib.suppress(trio.BrokenResourceError):
                while (answer := await frames.receive()) is not None:
                    assert not isinstance(answer, memoryview | Whole)
                    answers.append(answer)
            await client.aclose()
    return answers


def offer(*path: str, size: int) -> Offer:
    when = Nanoseconds(0)
    return Offer(n=0, path=path, folder=False, size=size, mtime_ns=when, mode=0o600)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("is_complete", [False, True])
async def test_a_receiver_tells_nobody_what_it_has(
    tmp_path: Path, configs: Configs, overwrite: bool, is_complete: bool
) -> None:
    """Neither the digest of somebody's file nor of its beginning, and nothing by guessing."""
    content = b"the secret of somebody else" + bytes(WHOLE)
    lengths = [*range(1, 30), 4096, WHOLE, len(content) - 1, len(content)]
    digests = [hashlib.sha256(content[:length]).hexdigest() for length in lengths]
    folder = Folder(tmp_path / "in", overwrite=overwrite)
    size = len(content) + (0 if is_complete else 1)
    part = begin(folder, offer("x", size=size))
    part.write([memoryview(content)])
    if is_complete:
        complete(folder, part, digests[-1])
    part.close()
    asked = offer("x", size=size)._replace(checksum=True)
    for claimed in (None, "", "0" * 64, *digests[:-1], "\ud800", "é"):
        said = [] if claimed is None else [Digest(n=0, sha256=claimed)]
        answers = await alone(folder, configs, asked, *said)
        assert answers[0] == Have(n=0, size=len(content))
        for answer in answers:
            assert not any(digest in str(answer) for digest in digests)
        if claimed is not None and is_complete and not overwrite:
            assert [type(answer) for answer in answers] == [Have, Failed]
        elif claimed is not None:
            assert answers[1:] == [Send(files=((0, 0),))]
    (_, proved) = await alone(folder, configs, asked, Digest(n=0, sha256=digests[-1]))
    stored, rest = Stored(files=(0,), how=How.SAME, lost=""), Send(files=((0, len(content)),))
    assert proved == (stored if is_complete else rest)
    folder.close()


def test_no_message_of_a_receiver_has_room_for_a_digest() -> None:
    assert {field.name for field in dataclasses.fields(Have)} == {"n", "size"}
    assert {field.name for field in dataclasses.fields(Send)} == {"files"}


# --- files that are not what they seem, or do not stay it ---------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        *("/proc/cpuinfo", "/proc/self/status", "/proc/self/maps", "/proc/sys/kernel/ostype"),
        *("/sys/kernel/mm/transparent_hugepage/enabled", "/proc/self/mem", "/proc/self/environ"),
    ],
)
async def test_files_that_the_system_makes_up(tmp_path: Path, configs: Configs, path: str) -> None:
    source = Path(path)
    if not os.path.exists(source):  # noqa: ASYNC240
        pytest.skip("this machine does not have it")
    (tmp_path / "plain").write_text("plain")
    outcome, left_out = await deliver(configs, tmp_path / "in", source, tmp_path / "plain")
    arrived = tmp_path / "in" / source.name
    if arrived.exists():  # an empty one
        assert arrived.read_bytes() == b""
    else:
        assert named(source.name, outcome, left_out)
    assert (tmp_path / "in" / "plain").read_text() == "plain"


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def grow_and_hide_it(path: Path) -> None:
    """Longer, under the old date."""
    before = path.stat()
    grow(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def shrink(path: Path) -> None:
    os.truncate(path, 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def rewrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"other")


def become_a_link(path: Path) -> None:
    """To a file elsewhere that has the same size and date."""
    before = path.stat()
    other = path.parent.parent / "elsewhere"
    other.write_bytes(bytes(before.st_size))
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    path.unlink()
    path.symlink_to(other)


def vanish(path: Path) -> None:
    path.unlink()


CHANGES = (
    *(grow, grow_and_hide_it, shrink, empty, rewrite),
    *(replace, become_a_pipe, become_a_link, vanish),
)
OPEN_FILES_STAY = (replace, become_a_pipe, become_a_link, vanish)
"""Who has the file open when this happens reads on what was offered."""


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("moment", ["before it is opened", "while it is read"])
@pytest.mark.parametrize("had", ["nothing", "a part", "all"])
async def test_files_that_change(
    tmp_path: Path,
    configs: Configs,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], None],
    moment: str,
    had: str,
) -> None:
    """Nothing is stored under the name but what was offered, and the next file arrives."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    content = random.Random(14).randbytes(2_100_000)
    (source / "a").write_bytes(content)
    os.utime(source / "a", (1_000_000_000, 1_000_000_000))
    (source / "b").write_text("the next one")
    if had != "nothing":
        whole = offer("source", "a", size=len(content))
        folder = Folder(target)
        part = begin(folder, whole)
        part.write([memoryview(content if had == "all" else content[: 1 << 20])])
        if had == "all":
            complete(folder, part, hashlib.sha256(content).hexdigest())
        part.close()
        folder.close()
    done = []

    def before(call: Callable[..., Any]) -> Callable[..., Any]:
        def first(*args: Any, **more: Any) -> Any:
            if not done:
                done.append(change(source / "a"))
            return call(*args, **more)

        return first

    for name in ("_opened",) if moment == "before it is opened" else ("_read_frame", "hash_prefix"):
        monkeypatch.setattr(sending, name, before(getattr(sending, name)))
    outcome, _ = await deliver(configs, target, source)
    assert done
    assert (target / "source" / "b").read_text() == "the next one"
    arrived = target / "source" / "a"
    if had == "all":
        assert arrived.read_bytes() == content
    if "source/a" not in outcome.failed:
        assert change in OPEN_FILES_STAY
        assert moment == "while it is read"
        assert arrived.read_bytes() == content
    elif had != "all":
        assert not arrived.exists()


def write_and_hide_it(path: Path) -> None:
    """Other content at the beginning, of the same length, under the old date."""
    before = path.stat()
    rewrite(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def touch(path: Path) -> None:
    """The content stays."""
    path.chmod(0o600)
    os.link(path, path.parent.parent / "second name")


@pytest.mark.parametrize("change", [write_and_hide_it, touch])
@pytest.mark.parametrize(("size", "had"), [(100_000, 0), (2_100_000, 0), (2_100_000, 1 << 20)])
async def test_a_file_that_is_written_under_its_old_date(
    tmp_path: Path,
    configs: Configs,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], None],
    size: int,
    had: int,
) -> None:
    """Half of the old content and half of the new are not a file; a new mode or name is no harm."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    odd = source / "a"
    odd.write_bytes(content := random.Random(18).randbytes(size))
    (source / "b").write_text("the next one")
    if had:
        folder = Folder(target)
        part = begin(folder, offer("source", "a", size=size))
        part.write([memoryview(content)[:had]])
        part.close()
        folder.close()
    inode, done = odd.stat().st_ino, []

    def first(call: Callable[..., Any]) -> Callable[..., Any]:
        def change_then(file: int, *args: Any, **more: Any) -> Any:
            result = call(file, *args, **more)
            if os.fstat(file).st_ino == inode and not done:
                done.append(change(odd))
            return result

        return change_then

    call = "pread" if size <= WHOLE else "preadv"
    monkeypatch.setattr(os, call, first(getattr(os, call)))
    outcome, _ = await deliver(configs, target, source)
    assert done
    arrived = target / "source" / "a"
    if change is touch:
        assert not outcome.failed
        assert arrived.read_bytes() == content
    else:
        assert outcome.failed == {"source/a": "it changed while it was being sent"}
        assert not arrived.exists()
    assert (target / "source" / "b").read_text() == "the next one"


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ENOENT, errno.EMFILE])
async def test_a_file_that_cannot_be_read(
    tmp_path: Path, configs: Configs, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("closed", "open"):
        (source / name).write_text(name)
    open_ = os.open

    def refuse(path: Any, *args: Any, **more: Any) -> int:
        if path == os.fspath(source / "closed"):
            raise OSError(code, os.strerror(code))
        return open_(path, *args, **more)

    monkeypatch.setattr(os, "open", refuse)
    outcome, _ = await deliver(configs, tmp_path / "in", source)
    assert list(outcome.failed) == ["source/closed"]
    assert "cannot read" in outcome.failed["source/closed"]
    assert (tmp_path / "in" / "source" / "open").read_text() == "open"


# --- disks that take two names for one ----------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "fold"),
    [
        (("README", "readme"), str.casefold),
        ((normalize("NFC", "Åb"), normalize("NFD", "Åb")), lambda name: normalize("NFC", name)),
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
async def test_two_names_that_the_disk_takes_for_one(
    tmp_path: Path,
    configs: Configs,
    monkeypatch: pytest.MonkeyPatch,
    names: tuple[str, str],
    fold: Callable[[str], str],
    overwrite: bool,
) -> None:
    """Neither is lost without a word, also where files are replaced."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for name in names:
        (source / name).write_text(f"the content of {name}")

    def folding(call: Callable[..., Any], count: int = 1) -> Callable[..., Any]:
        """Like such a disk, which keeps the name that was there first."""

        def folded(*words: Any, **more: Any) -> Any:
            keys = [key for key in more if key.endswith("dir_fd")]
            if not keys:
                return call(*words, **more)
            found = []
            for word, key in zip(words[:count], keys, strict=True):
                there = os.listdir(more[key])
                found.append(next((one for one in there if fold(one) == fold(word)), word))
            return call(*found, *words[count:], **more)

        return folded

    with monkeypatch.context() as patched:
        for name in ("open", "stat", "mkdir", "unlink"):
            patched.setattr(os, name, folding(getattr(os, name)))
        for name in ("rename", "link"):
            patched.setattr(os, name, folding(getattr(os, name), 2))
        outcome, _ = await deliver(configs, target, source, overwrite=overwrite)
    (arrived,) = (target / "source").iterdir()
    assert arrived.read_text() == f"the content of {arrived.name}"
    assert len(outcome.failed) == 1
    assert not named(arrived.name, outcome, [])


LACKS = ("fchmod", "utime", "fsync", "link")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
@pytest.mark.parametrize("calls", [*((call,) for call in LACKS), LACKS], ids="+".join)
async def test_a_file_system_that_lacks_calls(
    tmp_path: Path,
    configs: Configs,
    monkeypatch: pytest.MonkeyPatch,
    calls: tuple[str, ...],
    number: int,
) -> None:
    """FUSE file systems and network shares have no call for modes, dates, links or flushing, and
    each has its own number for that."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for size in (0, 1, 3 << 20):
        (source / f"{size}").write_bytes(bytes(size))

    def lacking(*args: object, **more: object) -> None:
        raise OSError(number, os.strerror(number))

    for call in calls:
        monkeypatch.setattr(os, call, lacking)
    outcome, _ = await deliver(configs, target, source)
    assert not outcome.failed
    assert {int(path.name): path.stat().st_size for path in (target / "source").iterdir()} == {
        size: size for size in (0, 1, 3 << 20)
    }
    assert not [path for path in (target / PARTIAL).glob("*") if path.is_file()]


async def test_a_disk_that_counts_no_blocks(
    tmp_path: Path, configs: Configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "file", tmp_path / "target"
    source.write_bytes(b"content")
    monkeypatch.setattr(os, "fstatvfs", lambda file: os.statvfs_result((512, 512, *[0] * 8)))
    outcome, _ = await deliver(configs, target, source)
    assert not outcome.failed


@pytest.mark.parametrize("call", ["fsync", "pwrite", "rename"])
async def test_a_failing_disk_is_no_lack(
    tmp_path: Path, configs: Configs, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    source, target = tmp_path / "file", tmp_path / "target"
    source.write_bytes(b"content")

    def failing(*args: object, **more: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, call, failing)
    outcome, _ = await deliver(configs, target, source, overwrite=True)
    # The path stands before the reason, and once.
    assert outcome.failed == {"file": "cannot write it: the disk reports an error"}
    assert not (target / "file").exists() or call == "fsync"


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.EXDEV, "on another file system than the receiver's folder"),
        (errno.EBUSY, "a file system is mounted under this name; unmount it, or send under"),
    ],
)
async def test_a_folder_on_another_file_system(
    tmp_path: Path, configs: Configs, monkeypatch: pytest.MonkeyPatch, number: int, said: str
) -> None:
    source, target = tmp_path / "file", tmp_path / "target"
    source.write_bytes(b"content")

    def elsewhere(*args: object, **more: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "rename", elsewhere)
    monkeypatch.setattr(os, "link", elsewhere)
    outcome, _ = await deliver(configs, target, source)
    assert said in outcome.failed["file"]


def decoys(folder: Path, kept: Path) -> dict[str, int]:
    """Files of others in every folder, under names as a receiver gives to its incomplete files:
    each is a link to one of those in ``kept``, by its inode."""
    made = {}
    kept.mkdir()
    for number in range(1, 121):
        (kept / str(number)).write_text(f"others' {number}")
    files = [(one.name, str(one), one.stat().st_ino) for one in kept.iterdir()]
    for place in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        for name, one, inode in files:
            os.link(one, f"{place}/{name}")
            made[f"{place}/{name}"] = inode
    return made


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("depth", [1, 3, 20])
async def test_more_folders_than_stay_open(
    tmp_path: Path, configs: Configs, depth: int, *, overwrite: bool
) -> None:
    """Each file of a batch gets its name in its own folder, and files of others stay."""
    source, target = tmp_path / "tree", tmp_path / "target"
    chosen = random.Random(depth)
    wanted = {}
    for number in range(120):
        folder = source.joinpath(*(f"in-{number % (level + 1)}" for level in range(depth - 1)))
        path = folder / f"own-{number}" / "file"
        path.parent.mkdir(parents=True)
        path.write_bytes(chosen.randbytes(number))
        wanted[path.relative_to(tmp_path)] = path.read_bytes()
    for path in source.rglob("own-*"):
        (target / path.relative_to(tmp_path)).mkdir(parents=True)
    kept = tmp_path / "others"
    others = decoys(target, kept) if depth < 5 else {}
    outcome, left_out = await deliver(configs, target, source, overwrite=overwrite)
    assert not outcome.failed
    assert not left_out
    assert {path: (target / path).read_bytes() for path in wanted} == wanted
    assert {path: os.lstat(path).st_ino for path in others} == others
    assert all(one.read_text() == f"others' {one.name}" for one in kept.rglob("*"))


def test_a_handle_is_valid_until_the_next_item(tmp_path: Path) -> None:
    """Whatever else is opened for the same item."""
    paths = [(f"a{number}", f"b{number % 7}") for number in range(100)]
    before = len(os.listdir("/dev/fd"))
    with Folder(tmp_path).open() as handles:
        for _ in handles.each(range(3)):
            held = {path: os.fstat(handles.get(path, make=True)).st_ino for path in paths}
            for path, inode in held.items():
                assert os.fstat(handles.get(path)).st_ino == inode
                assert (tmp_path.joinpath(*path)).stat().st_ino == inode
            assert len(os.listdir("/dev/fd")) > before + len(paths)
        assert len(os.listdir("/dev/fd")) < before + len(paths)


@pytest.mark.parametrize("places", [0, 1, 5])
def test_large_files_of_all_senders_share_descriptors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, places: int
) -> None:
    """However many senders there are, and however many files come at once."""
    monkeypatch.setattr("hybridkex.apps.transfer.folder.share", lambda _: places)
    folder = Folder(tmp_path)
    content = bytes(WHOLE + 1)
    senders = [Reception(folder, Progress()) for _ in range(4)]
    before = len(os.listdir("/dev/fd"))
    for which, reception in enumerate(senders):
        offered = [
            Offer(n, (f"of {which}", f"file {n}"), False, len(content), Nanoseconds(0), 0o644)
            for n in range(12)
        ]
        received: list[Any] = list(offers(offered))
        for n in range(12):
            end = End(n=n, sha256=hashlib.sha256(content).hexdigest())
            received += [Start(n=n), memoryview(content), end]
        answers = reception.process(received)
        assert not answers.failures
        assert len(os.listdir("/dev/fd")) <= before + places + 2
        stored = [*answers.messages, *reception.settle().messages]
        assert sum(len(one.files) for one in stored if isinstance(one, Stored)) == 12
    assert len(os.listdir("/dev/fd")) == before
    assert len([path for path in tmp_path.rglob("file *") if path.is_file()]) == 48


def test_what_begins_on_a_display_ends_when_the_connection_breaks(tmp_path: Path) -> None:
    """The file whose data are arriving, and one that is complete and waits for its name."""
    shown_now: list[str] = []

    class Display(Progress):
        def begin(self, file: Any, done: int) -> None:
            shown_now.append(file.path[-1])

        def end(self, file: Any, outcome: str | None) -> None:
            shown_now.remove(file.path[-1])

    content = bytes(WHOLE + 1)
    folder = Folder(tmp_path)
    reception = Reception(folder, Display())
    offered = [
        Offer(n, (name,), False, len(content), Nanoseconds(0), 0o644)
        for n, name in enumerate(("complete", "half"))
    ]
    end = End(n=0, sha256=hashlib.sha256(content).hexdigest())
    received = [*offers(offered), Start(n=0), memoryview(content), end]
    answers = reception.process([*received, Start(n=1), memoryview(content[:100])])
    for report in answers.reports:
        report()
    assert shown_now == ["complete", "half"]
    reception.close()
    folder.close()
    assert shown_now == []


def vanishing(part: Path) -> None:
    part.unlink()


def vanishing_with_its_folder(part: Path) -> None:
    part.unlink()
    part.parent.rmdir()


def half_of_another(part: Path) -> None:
    """As when it is deleted by hand, and a second transfer of the same name begins."""
    part.unlink()
    part.write_bytes(b"half of another")


def pipe_in_its_place(part: Path) -> None:
    part.unlink()
    os.mkfifo(part)


def folder_in_its_place(part: Path) -> None:
    part.unlink()
    part.mkdir()


def link_in_its_place(part: Path) -> None:
    part.unlink()
    part.symlink_to("/etc/passwd")


@pytest.mark.parametrize("size", [7, WHOLE + 1])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        *(vanishing, vanishing_with_its_folder, half_of_another),
        *(pipe_in_its_place, folder_in_its_place, link_in_its_place),
    ],
)
async def test_an_incomplete_file_that_is_replaced(
    tmp_path: Path,
    configs: Configs,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], None],
    *,
    overwrite: bool,
    size: int,
) -> None:
    """What appears under the name is what was verified, or nothing, and the sender is told."""
    source, target = tmp_path / "file", tmp_path / "target"
    source.write_bytes(bytes(size))
    settle = Arrivals.settle

    def replaced(arrivals: Arrivals) -> Any:
        [incomplete] = (path for path in (target / PARTIAL).rglob("*") if path.is_file())
        change(incomplete)
        return settle(arrivals)

    with monkeypatch.context() as patch:
        patch.setattr(Arrivals, "settle", replaced)
        outcome, _ = await deliver(configs, target, source, overwrite=overwrite)
    assert "incomplete file was removed or replaced" in outcome.failed["file"]
    assert [path.name for path in target.iterdir()] in ([PARTIAL], [])
    if change in (vanishing, vanishing_with_its_folder, half_of_another):
        outcome, _ = await deliver(configs, target, source, overwrite=overwrite)
        assert not outcome.failed
        assert (target / "file").read_bytes() == bytes(size)


@pytest.mark.parametrize(
    ("room", "moment", "size"),
    [
        (Folder, "look", 7),
        (Folder, "hash", 7),
        (Folder, "begin", WHOLE + 1),
        (Arrivals, "write", 7),
        (Arrivals, "settle", 7),
        (Arrivals, "settle", WHOLE + 1),
    ],
)
async def test_a_folder_that_is_gone_is_named_with_the_file(
    tmp_path: Path,
    configs: Configs,
    monkeypatch: pytest.MonkeyPatch,
    room: type,
    moment: str,
    size: int,
) -> None:
    """Whatever was done before it was moved away."""
    source, target = tmp_path / "file", tmp_path / "target"
    source.write_bytes(bytes(size))
    if moment == "hash":
        await deliver(configs, target, source)
        source.touch()
    call = getattr(room, moment)

    def moved(one: Any, *args: Any) -> Any:
        with contextlib.suppress(FileNotFoundError):
            target.rename(tmp_path / "elsewhere")
        return call(one, *args)

    monkeypatch.setattr(room, moment, moved)
    outcome, _ = await deliver(configs, target, source)
    assert outcome.failed["file"].startswith("the receiver's folder was removed or moved")


# --- other users of the machine ------------------------------------------------------------------

NOBODY = 65534

only_root = pytest.mark.skipif(os.geteuid() != 0, reason="files of another user")


def target_of(target: Path) -> Path:
    target.mkdir()
    target.chmod(0o777)
    return target


def plant(target: Path, name: str) -> Path:
    """The incomplete file of a name, made before the transfer by somebody who keeps it open."""
    (target / PARTIAL).mkdir(exist_ok=True)
    (target / PARTIAL).chmod(0o777)
    planted = target.joinpath(*partial_path((name,)))
    planted.touch()
    planted.chmod(0o666)
    return planted


@only_root
@pytest.mark.parametrize("size", [7, WHOLE + 1])
async def test_another_user_has_made_the_folder_for_incomplete_files(
    tmp_path: Path, configs: Configs, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "file", tmp_path / "target"
    source.write_bytes(b"s" * size)
    source.chmod(0o600)
    planted = plant(target_of(target), "file")
    for path in (planted, planted.parent):
        os.chown(path, NOBODY, NOBODY)
    with pytest.raises(ConfigError, match=rf"{PARTIAL} .* another user \(uid {NOBODY}\)"):
        Folder(target)
    shutil.move(planted.parent, tmp_path / "elsewhere")
    check = Folder.__init__

    def afterwards(folder: Folder, *args: Any, **more: Any) -> None:
        check(folder, *args, **more)
        shutil.move(tmp_path / "elsewhere", planted.parent)

    monkeypatch.setattr(Folder, "__init__", afterwards)
    outcome, _ = await deliver(configs, target, source)
    assert "belongs to another user" in outcome.failed["file"]
    assert planted.read_bytes() == b""
    assert [path.name for path in target.iterdir()] == [PARTIAL]


def of_another_user(planted: Path) -> None:
    if os.geteuid():
        pytest.skip("files of another user")
    os.chown(planted, NOBODY, NOBODY)


def with_a_second_name(planted: Path) -> None:
    planted.with_name("other").hardlink_to(planted)


@pytest.mark.parametrize("change", [of_another_user, with_a_second_name])
async def test_an_incomplete_file_that_others_reach(
    tmp_path: Path,
    configs: Configs,
    change: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        Folder, "_remove_abandoned", lambda folder: None
    )  # it comes after the start
    source, target = tmp_path / "file", tmp_path / "target"
    source.write_bytes(b"s" * (WHOLE + 1))
    planted = plant(target_of(target), "file")
    planted.write_bytes(b"theirs")
    change(planted)
    outcome, _ = await deliver(configs, target, source)
    assert "/".join(partial_path(("file",))) in outcome.failed["file"]
    assert planted.read_bytes() == b"theirs"
    assert stat.S_IMODE(planted.parent.stat().st_mode) == 0o700


async def test_a_disk_with_one_owner_for_all_files(
    tmp_path: Path, configs: Configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    (source / "small").write_bytes(b"1")
    (source / "large").write_bytes(bytes(WHOLE + 1))
    us = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: us + 1)
    (target / PARTIAL).mkdir(parents=True)
    outcome, left_out = await deliver(configs, target, source)
    assert not outcome.failed
    assert not left_out
    assert (target / "source" / "large").stat().st_size == WHOLE + 1
    assert [path.name for path in target.iterdir()] == ["source"]


@pytest.mark.parametrize("depth", [1, 3])
def test_a_folder_that_becomes_a_link_while_it_is_listed(tmp_path: Path, depth: int) -> None:
    """As the race of rsync (CVE-2024-12747): nothing outside is sent."""
    outside = tmp_path / "outside"
    (outside / "c").mkdir(parents=True)
    (outside / "secret").write_bytes(b"s")
    (outside / "c" / "secret").write_bytes(b"s")
    source = tmp_path / "source"
    swapped = source.joinpath(*"abd"[:depth])
    (swapped / "c").mkdir(parents=True)
    (swapped / "c" / "own").write_bytes(b"o")
    left_out: list[str] = []
    found = []
    for item in collect([source], left_out.append):
        found.append("/".join(item.path))
        if item.source == str(swapped):
            swapped.rename(tmp_path / "moved")
            swapped.symlink_to(outside)
    assert not [path for path in found if "secret" in path]
    assert left_out == [f"{swapped}: cannot list it: something that is not a folder has this name"]
