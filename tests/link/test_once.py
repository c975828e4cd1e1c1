"""The keys of measured detections are made once."""

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import trio

from hybridkex.cli import main
from hybridkex.cli.actions import qkd_data
from hybridkex.errors import BlockAborted, ConfigError, LinkError
from hybridkex.link import measured
from hybridkex.link.ledger import LANE_RESERVE, Ledger
from hybridkex.link.measured import (
    Measured,
    alice_of,
    bob_of,
    check_unused,
    mark_used,
    read_measured,
)
from hybridkex.link.settings import LinkSettings
from hybridkex.link.simulated import stream_pair
from hybridkex.link.wire import HEADER, Type
from hybridkex.secret import Secret
from tests.link.recording import RecordingStream

OF_THE_KEY = {Type.ASK, Type.TELL, Type.CORRECTED, Type.FINISH, Type.VERDICT}
"""Messages with something about the key, or that follow it."""


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    names = ("alice", "bob")
    return [shutil.copy(f"examples/qkd-data/{name}.npz", tmp_path) for name in names]


def markers(folder: Path) -> list[str]:
    return sorted(one.name for one in folder.glob("*.distilled"))


def types(sent: bytes) -> list[Type]:
    """The messages in a stream."""
    found, at = [], 0
    while at < len(sent):
        number, length = HEADER.unpack_from(sent, at)
        found.append(Type(number))
        at += HEADER.size + length
    return found


def play(
    files: list[str],
    commits: list[Callable[[], None] | None],
    change: Callable[[LinkSettings], LinkSettings] = lambda one: one,
    bob: Callable[[Measured], Measured] = lambda one: one,
) -> list[tuple[list[Type], LinkError | None]]:
    """Alice and Bob: the types of what each has sent, and how it ended."""
    (mine, preset), (theirs, _) = map(read_measured, files)
    settings = LinkSettings(preset=preset, decoy_check="shares")
    shared = Secret(bytes(2 * LANE_RESERVE))
    near, far = map(RecordingStream, stream_pair())
    alice = alice_of(mine, settings, near, Ledger(shared), commit=commits[0])
    other = bob_of(bob(theirs), change(settings), far, Ledger(shared), commit=commits[1])
    ends: dict[int, LinkError] = {}

    async def one(number: int) -> None:
        async with (near, far)[number]:
            try:
                await (alice, other)[number].block()
            except LinkError as error:
                ends[number] = error

    async def both() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one, 0)
            nursery.start_soon(one, 1)

    trio.run(both)
    return [(types(bytes(one.sent)), ends.get(n)) for n, one in enumerate((near, far))]


def test_each_end_commits_itself_before_it_discloses_anything_of_the_key(
    files: list[str],
) -> None:
    told: list[str] = []
    ends = play(files, [lambda: told.append("alice"), lambda: told.append("bob")])
    assert sorted(told) == ["alice", "bob"]
    assert all(error is None and OF_THE_KEY & set(sent) for sent, error in ends)


@pytest.mark.parametrize("number", [0, 1])
def test_an_end_that_cannot_commit_itself_discloses_nothing(files: list[str], number: int) -> None:
    def refuse() -> None:
        raise LinkError("no")

    commits: list[Callable[[], None] | None] = [None, None]
    commits[number] = refuse
    ends = play(files, commits)
    sent, error = ends[number]
    assert str(error) == "no"
    assert not OF_THE_KEY & set(sent)
    assert sent[-1] is Type.END
    assert ends[1 - number][1] is not None


def test_what_is_refused_before_may_be_tried_again(files: list[str]) -> None:
    """Other settings, a failed check of the counts: nothing of the key was disclosed."""
    told: list[str] = []
    commits: list[Callable[[], None] | None] = [
        partial(told.append, "alice"),
        partial(told.append, "bob"),
    ]
    for ends in (
        play(files, commits, change=lambda one: replace(one, leak="both")),
        play(files, commits, bob=lambda one: replace(one, bit=np.zeros_like(one.bit))),
    ):
        assert all(error is not None for _, error in ends)
    assert isinstance(ends[0][1], BlockAborted)  # the QBER
    assert not told


def test_files_give_keys_once(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["qkd", "distil", *files]
    assert main(command) == 0  # numbers, and no keys
    assert main([*command, "--keys", str(tmp_path / "none"), "--key-bits", "8000"]) == 1
    assert markers(tmp_path) == []
    assert main([*command, "--keys", str(tmp_path / "keys")]) == 0
    assert markers(tmp_path) == ["alice.npz.distilled", "bob.npz.distilled"]
    capsys.readouterr()
    link = tmp_path / "link.npz"
    link.symlink_to(files[0])
    for again in (
        [*command, "--keys", str(tmp_path / "more")],
        ["qkd", "distil", str(link), files[1], "--keys", str(tmp_path / "more")],
        ["qkd", "distil", files[1], "--listen", "127.0.0.1:7000", "--key", "k", "--peer", "p"],
    ):
        assert main(again) == 1
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        assert ".npz have been used, as " in told
        assert "cannot be" not in told
    assert not (tmp_path / "more").exists()
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["keys"]


@pytest.mark.parametrize("name", ["alice.npz", "bob.npz"])
def test_two_commands_at_once_do_not_both_make_keys(
    files: list[str], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = qkd_data.distil

    def slow(*given: object) -> object:
        made = run(*given)  # type: ignore[arg-type]
        mark_used(tmp_path / name)  # by the other one
        return made

    monkeypatch.setattr(qkd_data, "distil", slow)
    keys = tmp_path / "keys"
    assert main(["qkd", "distil", *files, "--keys", str(keys)]) == 1
    assert "cannot be created beside them: File exists" in capsys.readouterr().out
    assert not keys.exists()


@pytest.mark.parametrize("reason", ["name", "room"])
def test_a_marker_that_cannot_be_made_is_told_before_anything_is_sent(
    files: list[str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(files[0])
    if reason == "name":
        path = path.rename(path.with_name("a" * 250))
    else:

        def full(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(measured, "try_writing", full)
    before = sorted(path.parent.iterdir())
    with pytest.raises(ConfigError, match=r"beside them: (File name too|No space)"):
        check_unused(path)
    assert sorted(path.parent.iterdir()) == before


def test_alice_commits_herself_after_bob(files: list[str]) -> None:
    """What Bob refuses, such as a signature of another key, is not used up at Alice's end."""

    def refuse() -> None:
        raise LinkError("no")

    told: list[str] = []
    ends = play(files, [partial(told.append, "alice"), refuse])
    assert str(ends[1][1]) == "no"
    assert ends[0][1] is not None
    assert told == []


def test_files_are_marked_together_or_not_at_all(files: list[str], tmp_path: Path) -> None:
    mark_used(files[1])
    before = markers(tmp_path)
    (tmp_path / "ring").symlink_to("ring")
    others = [str(tmp_path / one) for one in ("none.npz", "ring", "a\0")]
    for wrong in (files, *([files[0], one] for one in (files[0], *others, ""))):
        with pytest.raises(LinkError, match="are not used"):
            mark_used(*wrong)
        assert markers(tmp_path) == before
    with pytest.raises(ConfigError, match="No such file"):
        check_unused(tmp_path / "none.npz")
    for one in ("ring", "a\0"):
        with pytest.raises(ConfigError, match="cannot be created"):
            check_unused(tmp_path / one)


def test_files_beside_the_detections_stay(files: list[str], tmp_path: Path) -> None:
    """Also a backup that an editor has named after the marker."""
    backup = tmp_path / "alice.npz.distilled~"
    backup.write_text("mine")
    before = sorted(tmp_path.iterdir())
    check_unused(files[0])
    assert sorted(tmp_path.iterdir()) == before
    assert backup.read_text() == "mine"


def test_keys_do_not_replace_a_marker(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = str(tmp_path / "alice.npz.distilled")
    assert main(["qkd", "distil", *files, "--keys", keys]) == 1
    assert "choose another name for the file" in capsys.readouterr().err
    assert markers(tmp_path) == []
