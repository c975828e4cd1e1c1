"""A disk that fails while a group of files is stored: nothing is called there that may be lost."""

import errno
import fcntl
import hashlib
import os
import random
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from apps_glue import begin, look, proved

from hybridkex.apps.transfer import Folder, arrivals
from hybridkex.apps.transfer.arrivals import Arrivals
from hybridkex.apps.transfer.errors import NotStored
from hybridkex.apps.transfer.folder import UnsettledNames
from hybridkex.apps.transfer.messages import (
    WHOLE,
    End,
    Nanoseconds,
    Offer,
    Start,
    Whole,
    offers,
)
from hybridkex.apps.transfer.names import PARTIAL, WORK
from hybridkex.apps.transfer.progress import Progress
from hybridkex.apps.transfer.reception import Reception
from hybridkex.errors import ConfigError

SMALL, LARGE = 3, WHOLE + 1


def offered(number: int, size: int) -> Offer:
    return Offer(number, (f"file {number}",), False, size, Nanoseconds(number), 0o644)


def content(offer: Offer) -> bytes:
    return random.Random(offer.n).randbytes(offer.size)


def add(folder: Folder, group: Arrivals, offer: Offer) -> None:
    """A complete file, which has yet to be flushed and named."""
    data = content(offer)
    digest = hashlib.sha256(data)
    if offer.size <= WHOLE:
        with folder.open() as handles:
            group.write(offer, Whole(offer.n, digest.digest(), data), handles)
        return
    part = begin(folder, offer, proved(folder, offer, data[: look(folder, offer).size]))
    part.write([memoryview(data)[part.size :]])
    group.add(part.complete(digest.hexdigest(), folder.umask))


def errors(group: Arrivals) -> list[NotStored | None]:
    return [one.error for one in group.settle()]


class Disk:
    """The flushes of the receiver, which fail while ``fails`` says so for what is flushed: "small",
    "large" or "names"."""

    def __init__(self) -> None:
        self.fails: Callable[[str], object] = lambda what: False

    def fsync(self, file: int) -> None:
        place = os.readlink(f"/proc/self/fd/{file}")
        what = "large" if PARTIAL in place else "names"
        if WORK in place:
            what = "small"
        if self.fails(what):
            raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    made = Disk()
    monkeypatch.setattr(os, "fsync", made.fsync)
    monkeypatch.setattr(arrivals, "flush_all", made.fsync)
    monkeypatch.setattr(arrivals, "has_flush_all", lambda file: True)
    return made


@pytest.fixture(params=[False, True], ids=["keep", "overwrite"])
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Folder]:
    made = Folder(tmp_path / "in", overwrite=request.param)
    yield made
    made.close()


def stored(folder: Folder, group: Arrivals, offers: list[Offer]) -> None:
    for offer in offers:
        add(folder, group, offer)
    assert errors(group) == [None] * len(offers)


@pytest.mark.parametrize("before", [0, 1, 20])
@pytest.mark.parametrize("count", [1, 8, 9, 20])
def test_large_files_after_small_ones(
    folder: Folder, disk: Disk, tmp_path: Path, before: int, count: int
) -> None:
    """The folder of the small files is gone when a group has large ones alone."""
    group = Arrivals(folder)
    if before:
        stored(folder, group, [offered(n, SMALL) for n in range(before)])
    large = [offered(n, LARGE) for n in range(100, 100 + count)]
    stored(folder, group, large)
    for offer in large:
        assert (tmp_path / "in" / offer.path[0]).read_bytes() == content(offer)
    group.close()


@pytest.mark.parametrize("small", [0, 1, 20])
@pytest.mark.parametrize("count", [1, 9])
@pytest.mark.parametrize("which", ["small", "large"])
def test_what_the_disk_has_not_taken_is_sent_again(
    folder: Folder, disk: Disk, tmp_path: Path, small: int, count: int, which: str
) -> None:
    """An incomplete file is not resumed after an error: its content may be in memory alone. A large
    file's own descriptor reports errors that another group has been told of."""
    group = Arrivals(folder)
    large = [offered(n, LARGE) for n in range(100, 100 + count)]
    offers = [*(offered(n, SMALL) for n in range(small)), *large]
    for offer in offers:
        add(folder, group, offer)
    disk.fails = lambda what: what == which
    failed = [one.offer for one in group.settle() if one.error is not None]
    disk.fails = lambda what: False
    whole_group = small + count > 8 and (which == "small" if small else which == "large")
    lost = {"small": offers[:small], "large": large}[which]
    assert failed == (offers if whole_group else lost)
    for offer in failed:
        assert look(folder, offer).size == 0
    assert not [*(tmp_path / "in" / PARTIAL).iterdir()]
    if failed:
        stored(folder, group, failed)
    group.close()


@pytest.mark.parametrize("fails", ["neither", "first", "second", "both"])
@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_a_name_of_a_group_that_is_not_on_disk_yet(
    folder: Folder, disk: Disk, tmp_path: Path, size: int, fails: str
) -> None:
    """Another sender of the same file is not told that it is there: the group may fail."""
    offer, there = offered(1, size), tmp_path / "in" / "file 1"
    first, second = Arrivals(folder), Arrivals(folder)
    add(folder, first, offer)
    outcomes: list[list[NotStored | None]] = []

    def while_it_is_flushed(what: str) -> bool:
        if what != "names":
            return False
        assert there.exists()
        assert not look(folder, offer).complete
        add(folder, second, offer)
        disk.fails = lambda what: what == "names" and fails in ("second", "both")
        outcomes.append(errors(second))
        disk.fails = lambda what: False
        return fails in ("first", "both")

    disk.fails = while_it_is_flushed
    outcomes.insert(0, errors(first))
    ok = [outcome == [None] for outcome in outcomes]
    assert ok == [fails in ("neither", "second"), fails in ("neither", "first")]
    if any(ok):
        assert there.read_bytes() == content(offer)
    present = look(folder, offer)
    assert present.complete == ok[1], "the second group's file has taken the place of the first"
    if not ok[1]:
        stored(folder, second, [offer])
        assert look(folder, offer).unchanged
    first.close()
    second.close()


def test_a_file_that_is_replaced_is_not_lost_with_its_successor(tmp_path: Path, disk: Disk) -> None:
    folder, offer = Folder(tmp_path / "in", overwrite=True), offered(1, SMALL)
    there = tmp_path / "in" / "file 1"
    there.write_bytes(b"old")
    group = Arrivals(folder)
    add(folder, group, offer)
    disk.fails = lambda what: what == "names"
    assert errors(group) != [None]
    disk.fails = lambda what: False
    assert there.read_bytes() == content(offer)
    assert not look(folder, offer).complete
    stored(folder, group, [offer])
    assert look(folder, offer).unchanged
    folder.close()


def test_a_name_that_cannot_be_removed(
    folder: Folder, disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file system may be read-only after its error."""
    offer, group = offered(1, SMALL), Arrivals(folder)
    add(folder, group, offer)
    disk.fails = lambda what: what == "names"
    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", read_only(os.unlink, offer.path[0]))
        assert errors(group) != [None]
    disk.fails = lambda what: False
    assert (tmp_path / "in" / "file 1").exists()
    assert not look(folder, offer).complete
    stored(folder, group, [offer])
    assert look(folder, offer).unchanged


def read_only(unlink: Callable[..., None], name: str) -> Callable[..., None]:
    def remove(path: str, **more: int) -> None:
        if path == name:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        unlink(path, **more)

    return remove


def test_the_content_to_resume_is_read_from_the_disk(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A receiver that was killed may have left data that the disk did not take."""
    offer = offered(1, LARGE)
    part = begin(folder, offer)
    part.write([content(offer)])
    part.close()
    calls: list[tuple[int, ...]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, *rest: calls.append(rest))
    assert proved(folder, offer, content(offer)) is not None
    assert calls == [(0, 0, os.POSIX_FADV_DONTNEED)]


class Flushed(Disk):
    """Notes what is flushed, below the receiving folder."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root
        self.what: list[str] = []

    def fsync(self, file: int) -> None:
        super().fsync(file)
        self.what.append(os.path.relpath(os.readlink(f"/proc/self/fd/{file}"), self.root))


@pytest.fixture
def flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Flushed:
    made = Flushed(tmp_path / "in")
    monkeypatch.setattr(os, "fsync", made.fsync)
    monkeypatch.setattr(arrivals, "has_flush_all", lambda file: False)
    return made


def folder_offer(*path: str) -> Offer:
    return Offer(0, path, True, 0, Nanoseconds(0), 0o755)


def make(folder: Folder, group: Arrivals, *path: str) -> bool:
    with folder.open() as handles:
        made = folder.make(folder_offer(*path), handles, group)
    if made:
        group.add_folder(folder_offer(*path))
    return made


@pytest.mark.parametrize("broken", [True, False], ids=["broken connection", "failed group"])
def test_a_folder_counts_as_there_once_its_name_is_on_disk(
    tmp_path: Path, flushed: Flushed, broken: bool
) -> None:
    folder = Folder(tmp_path / "in")
    first, second = Arrivals(folder), Arrivals(folder)
    assert make(folder, first, "d")
    assert (tmp_path / "in" / PARTIAL).is_dir(), "the next receiver knows by it, after a kill"
    if broken:
        first.close()
    else:
        flushed.fails = lambda what: what == "names"
        assert errors(first) != [None]
        flushed.fails = lambda what: False
    offer = offered(1, SMALL)._replace(path=("d", "file"))
    add(folder, second, offer)
    flushed.what.clear()
    assert errors(second) == [None]
    assert {".", "d"} <= set(flushed.what), "the file is lost without the name of its folder"
    flushed.what.clear()
    assert make(folder, second, "d")
    assert errors(second) == [None]
    assert {".", "d"} <= set(flushed.what), "and on ext2 the name without what it leads to"
    assert not make(folder, second, "d")
    folder.close()


@pytest.mark.parametrize("there", [False, True])
def test_names_that_a_killed_receiver_has_given_are_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(
        "hybridkex.apps.transfer.folder.flush_all",
        lambda file: calls.append(os.readlink(f"/proc/self/fd/{file}")),
    )
    partial = tmp_path / "in" / PARTIAL
    if there:
        partial.mkdir(0o700, parents=True)
    Folder(tmp_path / "in").close()
    assert calls == [str(partial)] * there


@pytest.mark.parametrize("fails", [False, True])
def test_names_of_broken_connections_are_flushed_at_the_end(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    monkeypatch.setattr("hybridkex.apps.transfer.folder.flush_all", disk.fsync)
    folder = Folder(tmp_path / "in")
    make(folder, Arrivals(folder), "d")
    disk.fails = lambda what: fails
    folder.close()
    assert (tmp_path / "in" / PARTIAL).exists() == fails, "for the next receiver, which flushes"


def test_a_disk_that_has_failed_since_a_receiver_was_killed(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hybridkex.apps.transfer.folder.flush_all", disk.fsync)
    (tmp_path / "in" / PARTIAL).mkdir(0o700, parents=True)
    disk.fails = lambda what: True
    with pytest.raises(ConfigError, match=r"disk reports an error; .* killed .* start again$"):
        Folder(tmp_path / "in")


@pytest.mark.parametrize("overwrite", [False, True])
def test_fat_holds_the_size_of_a_file_in_its_name(
    tmp_path: Path, flushed: Flushed, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    """There a file must be flushed after it is renamed, or it is empty after a loss of power."""
    folder = Folder(tmp_path / "in", overwrite=overwrite)
    monkeypatch.setattr("hybridkex.apps.transfer.durable._kind", lambda file: 0x4D44)
    offers = [*(offered(n, SMALL) for n in range(9)), offered(9, LARGE)]
    stored(folder, Arrivals(folder), offers)
    names = [offer.path[0] for offer in offers]
    *last, work, partial = flushed.what[-len(names) - 3 :]
    assert last == [*names, "."]
    assert work.startswith(f"{PARTIAL}/{WORK}")
    assert partial == PARTIAL
    folder.close()


def test_what_faults_have_left_is_removed(tmp_path: Path) -> None:
    partial = tmp_path / "in" / PARTIAL
    partial.mkdir(0o700, parents=True)
    for name, data in {"empty": b"", "stored": b"1", "incomplete": b"2", "locked": b""}.items():
        (partial / name).write_bytes(data)
    (tmp_path / "in" / "name").hardlink_to(partial / "stored")
    with (partial / "locked").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        folder = Folder(tmp_path / "in")
        assert sorted(one.name for one in partial.iterdir()) == ["incomplete", "locked"]
    folder.close()
    assert [one.name for one in partial.iterdir()] == ["incomplete"]


@pytest.mark.parametrize("count", [1, 9])
@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize("call", ["close", "unlink"])
def test_an_error_after_which_a_file_is_there(
    folder: Folder, disk: Disk, monkeypatch: pytest.MonkeyPatch, call: str, size: int, count: int
) -> None:
    """Of close(2), on network shares and FUSE, and of removing the other name."""
    real_close, real_unlink, group = os.close, os.unlink, Arrivals(folder)

    def close(file: int) -> None:
        is_file = stat.S_ISREG(os.fstat(file).st_mode)
        real_close(file)
        if is_file and call == "close":
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def unlink(path: str, **more: int) -> None:
        if call == "unlink":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real_unlink(path, **more)

    offers = [offered(n, size) for n in range(count)]
    with monkeypatch.context() as patched:
        patched.setattr(os, "close", close)
        patched.setattr(os, "unlink", unlink)
        stored(folder, group, offers)
    for offer in offers:
        assert look(folder, offer).unchanged


def test_a_file_that_appears_while_a_name_is_given_is_not_removed(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has been replaced: with its successor both would be lost."""
    folder, offer = Folder(tmp_path / "in", overwrite=True), offered(1, SMALL)
    there = tmp_path / "in" / offer.path[0]
    give = UnsettledNames.give

    def late(names: UnsettledNames, *rest: Any) -> bool:
        there.write_bytes(b"of another group")
        return give(names, *rest)

    monkeypatch.setattr(UnsettledNames, "give", late)
    group = Arrivals(folder)
    add(folder, group, offer)
    disk.fails = lambda what: what == "names"
    assert errors(group) != [None]
    assert there.read_bytes() == content(offer)


def test_small_files_are_flushed_as_was_decided_when_they_were_written(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """statfs(2) may fail meanwhile."""
    folder, flushes = Folder(tmp_path / "in"), []
    monkeypatch.setattr(arrivals, "flush_all", flushes.append)
    group = Arrivals(folder)
    for n in range(12):
        add(folder, group, offered(n, SMALL))
    monkeypatch.setattr(arrivals, "has_flush_all", lambda file: False)
    assert errors(group) == [None] * 12
    assert flushes


def test_memory_that_ends_while_a_file_is_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lock ends with the connection."""
    folder, offer = Folder(tmp_path / "in"), offered(0, LARGE)
    reception, data = Reception(folder, Progress()), content(offer)
    reception.process(offers([offer]))

    def no_memory(file: int, date: int) -> str:
        raise MemoryError

    monkeypatch.setattr("hybridkex.apps.transfer.part.set_date", no_memory)
    digest = hashlib.sha256(data).hexdigest()
    with pytest.raises(MemoryError):
        reception.process([Start(n=0), memoryview(data), End(n=0, sha256=digest)])
    reception.close()
    begin(folder, offer, proved(folder, offer, data)).close()
