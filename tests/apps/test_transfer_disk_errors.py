"""A disk that fails while a group of files is stored: nothing is called there that may be lost."""

import errno
import hashlib
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from apps_glue import begin, look, proved

from hybridkex.apps.transfer import Folder, arrivals
from hybridkex.apps.transfer.arrivals import Arrivals
from hybridkex.apps.transfer.errors import NotStored
from hybridkex.apps.transfer.messages import WHOLE, Nanoseconds, Offer, Whole
from hybridkex.apps.transfer.names import PARTIAL, WORK

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
