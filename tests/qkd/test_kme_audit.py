"""The audit trail: every delivery, and no change in silence."""

import itertools
import json
import os
import random
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from test_kme_server import as_sae, filled

from hybridkex.cli import main
from hybridkex.errors import ConfigError, KeySourceUnavailable
from hybridkex.kme.audit import AuditTrail, _files, check_folder, verify
from hybridkex.net.address import TcpAddress

Site = Any  # of conftest.py


@contextmanager
def full_disk() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


async def written(folder: Path, *, files: int = 3, records: int = 5) -> list[Path]:
    """A whole trail, oldest file first."""
    found: list[Path] = []
    for number in range(files):
        trail = AuditTrail(folder, "kme-a")
        for index in range(records):
            await trail.note({"event": "drawn", "key_ids": [f"{number}-{index}"]})
        trail.close()
        found += [one for one in _files([folder]) if one not in found]
    return found


async def test_every_delivery_has_a_record(site: Site, serve: Any, tmp_path: Path) -> None:
    config = site.pair()
    config = replace(
        config, kme=tuple(replace(one, audit=tmp_path / f"audit-{one.id}") for one in config.kme)
    )
    ids: list[str] = []
    async with serve(config) as where:
        await filled(where, site)
        async with (
            as_sae(site, "alice", where.kmes["kme-a"]) as alice,
            as_sae(site, "bob", where.kmes["kme-b"]) as bob,
        ):
            for _ in range(3):
                [key] = (await alice.get("/bob/enc_keys")).json()["keys"]
                ids.append(key["key_ID"])
            await bob.get("/alice/dec_keys", params={"key_ID": ids[0]})
            await bob.get("/alice/dec_keys", params={"key_ID": ids[0]})
    found = []
    for kme in ("kme-a", "kme-b"):
        folder = tmp_path / f"audit-{kme}"
        assert verify([folder]).problems == []
        [file] = folder.iterdir()
        assert file.stat().st_mode & 0o77 == 0
        found.append([json.loads(line) for line in file.read_text().splitlines()])
        assert key["key"] not in file.read_text()
    drawn, collected = found
    assert [(one["event"], one.get("key_ids")) for one in drawn] == [
        ("begun", None),
        *(("drawn", [key_id]) for key_id in ids),
    ]
    assert [(one["event"], one.get("key_ids")) for one in collected] == [
        ("begun", None),
        ("collected", [ids[0]]),
    ]
    assert (drawn[1]["master"], drawn[1]["slaves"], drawn[1]["link"]) == ("alice", ["bob"], "kme-b")


async def test_without_a_record_no_key_leaves(
    site: Site, serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = site.pair()
    first = replace(config.kme[0], audit=tmp_path / "audit")
    async with serve(replace(config, kme=(first, config.kme[1]))) as where:
        await filled(where, site, 200)
        async with as_sae(site, "alice", where.kmes["kme-a"]) as alice:
            with monkeypatch.context() as patch:

                def full(*_: Any) -> None:
                    raise OSError(28, "No space left on device")

                patch.setattr("os.fdatasync", full)
                patch.setattr("hybridkex.kme.audit.create_file", full)
                before = (await alice.get("/bob/status")).json()["stored_key_count"]
                for _ in range(5):
                    assert (await alice.get("/bob/enc_keys")).status_code == 503
            after = (await alice.get("/bob/status")).json()["stored_key_count"]
            assert after >= before - 1, "keys are not drawn in vain, but for the first"
            assert (await alice.get("/bob/enc_keys")).status_code == 200
    assert verify([tmp_path / "audit"]).problems == []


async def test_keys_that_no_record_let_out_are_counted(
    site: Site, serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At both ends: those that a master did not get can never be collected."""
    pair = site.pair()
    kmes = tuple(replace(one, audit=tmp_path / one.id) for one in pair.kme)
    metrics = TcpAddress("127.0.0.1", 0)
    async with (
        serve(replace(pair, kme=kmes, metrics=metrics)) as where,
        httpx.AsyncClient(verify=False) as web,
    ):
        await filled(where, site, 50)

        async def lost() -> dict[str, float]:
            text = (await web.get(f"http://{where.metrics}/metrics")).text
            found = re.findall(r'keys_lost_total{kme="(.+?)".*reason="(.+?)"} (.+)', text)
            return {
                f"{kme} {reason}": float(number) for kme, reason, number in found if float(number)
            }

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        async with (
            as_sae(site, "alice", where.kmes["kme-a"]) as alice,
            as_sae(site, "bob", where.kmes["kme-b"]) as bob,
        ):
            with monkeypatch.context() as patch:
                patch.setattr("os.fdatasync", full)
                refused = await alice.get("/bob/enc_keys", params={"number": 3})
                assert refused.status_code == 503
            assert await lost() == {"kme-a unrecorded": 3, "kme-b voided": 3}
            answer = await alice.get("/bob/enc_keys", params={"number": 2})
            ids = [{"key_ID": one["key_ID"]} for one in answer.json()["keys"]]
            with monkeypatch.context() as patch:
                patch.setattr("os.fdatasync", full)
                refused = await bob.post("/alice/dec_keys", json={"key_IDs": ids})
                assert refused.status_code == 503
            assert (await lost())["kme-b unrecorded"] == 2


async def test_a_full_disk_leaves_a_whole_trail(tmp_path: Path) -> None:
    folder = tmp_path / "audit"
    trail = AuditTrail(folder, "kme-a")
    for index in range(3):
        await trail.note({"event": "drawn", "key_ids": [f"{index}"]})
        with full_disk(), pytest.raises(KeySourceUnavailable, match="audit trail failed"):
            await trail.note({"event": "drawn", "key_ids": ["never"]})
        with full_disk(), pytest.raises(KeySourceUnavailable):
            await trail.check()
        await trail.check()
    trail.close()
    found = verify([folder])
    assert found.problems == []
    text = "".join(path.read_text() for path in folder.iterdir())
    assert [f'["{index}"]' in text for index in range(3)] == [True] * 3
    assert "never" not in text


async def test_a_file_that_is_removed_while_it_is_in_use(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By a rotation of logs, for example: later records are not lost with it."""
    folder = tmp_path / "audit"
    trail = AuditTrail(folder, "kme-a")
    for number in range(3):
        await trail.note({"event": "drawn", "key_ids": [f"{number}"]})
        [path] = folder.iterdir()
        path.unlink()
    await trail.note({"event": "drawn", "key_ids": ["last"]})
    trail.close()
    [path] = folder.iterdir()
    assert '["last"]' in path.read_text()
    assert verify([folder]).problems == []
    assert sum("was removed" in one.getMessage() for one in caplog.records) == 3


async def test_many_at_once(tmp_path: Path) -> None:
    trails = [AuditTrail(tmp_path / "audit", "https://kme/a") for _ in range(2)]
    async with trio.open_nursery() as nursery:
        for index, trail in itertools.product(range(50), trails):
            nursery.start_soon(trail.note, {"event": "drawn", "key_ids": [str(index)]})
    for trail in trails:
        trail.close()
    found = verify([tmp_path / "audit"])
    assert (found.problems, found.records) == ([], 102)


@pytest.mark.parametrize("seed", range(40))
async def test_no_change_stays_silent(tmp_path: Path, seed: int) -> None:
    """Of a record that a later one covers, or that a head which was kept elsewhere covers."""
    folder = tmp_path / "audit"
    files = await written(folder)
    heads = list(verify([folder]).heads.values())
    assert verify([folder], heads).problems == []
    choice = random.Random(seed)
    path = choice.choice(files)
    lines = path.read_bytes().splitlines(keepends=True)
    index = choice.randrange(len(lines))
    match seed % 5:
        case 0:  # a byte
            line = bytearray(lines[index])
            line[choice.randrange(len(line) - 1)] ^= 1 << choice.randrange(5)
            lines[index] = bytes(line)
        case 1:  # removed
            del lines[index]
        case 2:  # moved
            lines.insert(
                (index + 1 + choice.randrange(len(lines) - 1)) % len(lines), lines.pop(index)
            )
        case 3:  # cut
            lines = [b"".join(lines)[: choice.randrange(len(b"".join(lines)) - 1)]]
        case 4:  # the rest removed
            del lines[index:]
    content = b"".join(lines)
    if content == path.read_bytes():
        return
    path.write_bytes(content)
    assert verify([folder], heads).problems
    if path != files[-1]:
        assert verify([folder]).problems, "the next file knows what was here"


async def test_a_process_that_starts_again_and_again_writes_little(tmp_path: Path) -> None:
    """As by ``Restart=`` of systemd: the files grow by the same each time."""
    folder = tmp_path / "audit"
    live = AuditTrail(folder, "kme-a")
    for number in range(60):
        AuditTrail(folder, "kme-a").close()
        if number % 7 == 0:
            await live.note({"event": "drawn", "key_ids": [f"{number}"]})
    live.close()
    assert max(path.stat().st_size for path in folder.iterdir()) < 2000
    found = verify([folder])
    assert (found.problems, len(found.heads)) == ([], 61)
    named: set[str] = set()
    for path in _files([folder]):
        named |= json.loads(path.read_bytes().splitlines()[0])["others"].keys()
    for path in _files([folder]):
        content = path.read_bytes()
        path.unlink()
        assert bool(verify([folder]).problems) == (path.name in named)
        path.write_bytes(content)
    assert len(named) == 60


@pytest.mark.parametrize("put", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_is_named(put: Callable[[Path], object], tmp_path: Path) -> None:
    folder = tmp_path / "audit"
    AuditTrail(folder, "kme-a").close()
    put(folder / "x.audit")
    uses = (lambda: AuditTrail(folder, "kme-a"), lambda: verify([folder]))
    for use in (*uses, lambda: check_folder(folder)):
        with pytest.raises(ConfigError, match=r"not a regular file|Is a directory"):
            use()


@pytest.mark.parametrize("place", ["missing", "folder", "file", "link", "no/parent"])
def test_the_check_says_what_the_start_would(tmp_path: Path, place: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nothing")
    folder, before = tmp_path / place, sorted(tmp_path.rglob("*"))
    if place in ("missing", "folder"):
        check_folder(folder)
    else:
        with pytest.raises(ConfigError, match=f"cannot write an audit trail into {folder}: "):
            check_folder(folder)
    assert sorted(tmp_path.rglob("*")) == before
    if place in ("missing", "folder"):
        AuditTrail(folder, "kme-a").close()
    else:
        with pytest.raises(ConfigError, match=f"cannot write an audit trail into {folder}: "):
            AuditTrail(folder, "kme-a")


async def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, archive = tmp_path / "audit", tmp_path / "archive"
    with pytest.raises(ConfigError, match="there is no audit trail"):
        verify([tmp_path])
    files = await written(folder)
    assert main(["kme", "verify-audit", str(folder)]) == 0
    said = capsys.readouterr().out
    assert said.endswith("3 files, 18 records: the trail is whole\n")
    head = said.split()[0]
    archive.mkdir()
    files[0].rename(archive / files[0].name)
    assert main(["kme", "verify-audit", str(folder)]) == 1
    assert f"{files[0].name} is missing, which {files[1].name} names" in capsys.readouterr().out
    assert main(["kme", "verify-audit", str(folder), str(archive), "--head", head]) == 0
    assert main(["kme", "verify-audit", str(folder), str(archive), "--head", "ab" * 32]) == 1
    assert "there is no record with the SHA-256" in capsys.readouterr().out
    begun, *_ = files[1].read_bytes().splitlines(keepends=True)
    (archive / files[1].name).write_bytes(begun)  # a copy that was made earlier
    for folders in ((folder, archive), (archive, folder)):
        assert main(["kme", "verify-audit", *map(str, folders), "--head", head]) == 0


ODD = (None, True, 1, 1.5, "x", [], [1], {"a": 1}, {"a": None}, {"a": []}, {"a": {}}, "")


@pytest.mark.parametrize("member", ["n", "previous", "others", "event", None])
async def test_odd_records_are_problems(tmp_path: Path, member: str | None) -> None:
    """Whatever somebody has written into the file, the trail is verified to its end."""
    [path] = await written(tmp_path, files=1)
    lines = path.read_bytes().splitlines(keepends=True)
    begun = json.loads(lines[0])
    assert begun["event"] == "begun"
    for odd in ODD:
        changed = odd if member is None else {**begun, member: odd}
        if changed == begun:
            continue
        path.write_bytes(b"".join([json.dumps(changed).encode() + b"\n", *lines[1:]]))
        assert verify([tmp_path]).problems
        AuditTrail(tmp_path, "kme-a").close()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a folder of another user")
def test_a_folder_that_another_user_has_put_there(tmp_path: Path) -> None:
    """Its owner could remove files of the trail; a folder that this user gave is used."""
    tmp_path.chmod(0o1777)
    folder = tmp_path / "audit"
    folder.mkdir()
    os.chown(folder, 65534, 65534)
    for use in (check_folder, lambda one: AuditTrail(one, "kme-a")):
        with pytest.raises(ConfigError, match="belongs to another user"):
            use(folder)
    assert list(folder.iterdir()) == []
    tmp_path.chmod(0o755)
    check_folder(folder)
    AuditTrail(folder, "kme-a").close()
