"""What the demonstration promises, as checks that a mutation test can run again and again.

Each check raises ``AssertionError`` where the promise is broken. None of them runs a whole trial.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rndl_glue import EXPECTED

from hybridkex.cli.actions import rndl
from hybridkex.cli.rndl import RndlOptions
from hybridkex.demos.rndl import page, trial
from hybridkex.demos.rndl.matrix import ADVERSARIES, CONFIGURATIONS, Adversary, Row, rows
from hybridkex.demos.rndl.now.escrow import ORACLES
from hybridkex.demos.rndl.now.stage import Plaintext
from hybridkex.errors import RecordingError

ROOT = Path(__file__).parents[3]
PLAINTEXT = Plaintext(to_server=b"question", to_client=b"answer", resumed=False, session={})
READ: dict[str, Any] = {
    "capture": "session.pcapng",
    "decrypted": True,
    "missing": [],
    "resumed": False,
    "to_server": "question",
    "to_client": "answer",
    "legs": [],
}
SAFE: dict[str, Any] = {
    **READ,
    "decrypted": False,
    "missing": ["X25519"],
    "to_server": "",
    "to_client": "",
}


def good_trial() -> trial.Trial:
    """A trial that came out as it must."""
    cells = [
        trial.Cell(
            row=row,
            adversary=adversary,
            decrypted=EXPECTED[row.id, adversary.id],
            missing=() if EXPECTED[row.id, adversary.id] else ("X25519",),
            plaintext=None,
            wrong=None,
        )
        for row in rows()
        for adversary in ADVERSARIES
    ]
    toy = trial.Toy(seconds=1.0, steps=(), verdict=READ, wrong=None)
    return trial.Trial(cells=cells, toy=toy)


def bad_trials() -> dict[str, trial.Trial]:
    """Trials of which each has one thing wrong, or lacks one."""
    found = {}
    for place in (0, 101, 203):
        one = good_trial()
        one.cells[place] = replace(one.cells[place], wrong="decrypted, but should be safe")
        found[f"cell {place}"] = one
        one = good_trial()
        del one.cells[place]
        found[f"no cell {place}"] = one
    found["no cells"] = replace(good_trial(), cells=[])
    found["no toy"] = replace(good_trial(), toy=None)
    toy = good_trial().toy
    assert toy is not None
    found["toy"] = replace(
        good_trial(), toy=replace(toy, wrong="not decrypted, but should have been")
    )
    return found


def status_of(outcome: trial.Trial) -> int:
    """The exit status of the command when this comes out."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(rndl, "_watched", lambda console, folder: outcome)
        patched.setattr(rndl, "_print_findings", lambda console, trial: None)
        return rndl.run(RndlOptions(html=None, json=None, keep=None))


def check_exit_status() -> None:
    assert status_of(good_trial()) == 0
    for name, outcome in bad_trials().items():
        assert status_of(outcome) == 1, name


def check_reports() -> None:
    assert good_trial().as_json()["as_predicted"] is True
    for name, outcome in bad_trials().items():
        assert outcome.as_json()["as_predicted"] is False, name
        assert len(outcome.wrong) >= 1, name
    shown = {rndl._mark(cell).plain for cell in good_trial().cells}
    assert shown == {"R", "·"}
    cell = good_trial().cells[0]
    assert rndl._mark(cell).plain == "·"
    assert rndl._mark(replace(cell, decrypted=True)).plain == "R"
    assert rndl._mark(replace(cell, wrong="x")).plain == rndl._mark(None).plain == "!"
    for wrong in (replace(cell, wrong="x"), None):
        assert "wrong" in page._cell(wrong).partition(">")[0]


def check_predictions() -> None:
    for row in rows():
        for adversary in ADVERSARIES:
            assert adversary.defeats(row) == EXPECTED[row.id, adversary.id], (row.id, adversary.id)


def check_contradictions() -> None:
    """Every way in which a verdict can be wrong, one at a time, and both directions."""
    judge = trial.contradiction
    assert judge(READ, PLAINTEXT, predicted=True) is None
    assert judge(SAFE, PLAINTEXT, predicted=False) is None
    for change, predicted in (
        ({}, False),
        ({"missing": ["QKD key"]}, True),
        ({"missing": ["QKD key"]}, False),
        ({"to_server": "another"}, True),
        ({"to_client": "another"}, True),
        ({"to_server": ""}, True),
        ({"to_client": ""}, True),
        ({"to_server": "answer", "to_client": "question"}, True),
        ({"to_client": "answer and more"}, True),
        ({"resumed": True}, True),
    ):
        assert judge({**READ, **change}, PLAINTEXT, predicted=predicted), (change, predicted)
    assert judge(SAFE, PLAINTEXT, predicted=True)
    assert judge({**SAFE, "missing": []}, PLAINTEXT, predicted=False)
    for silent in (replace(PLAINTEXT, to_server=b""), replace(PLAINTEXT, to_client=b"")):
        same = {"to_server": silent.to_server.decode(), "to_client": silent.to_client.decode()}
        assert judge({**READ, **same}, silent, predicted=True)


def check_cells() -> None:
    """A cell is judged by the prediction, not by what was measured, and no connection is lost."""
    for configuration in CONFIGURATIONS:
        for adversary in ADVERSARIES:
            row = Row(configuration, resumed=False)
            for verdict in (READ, SAFE):
                [cell] = trial._cells(configuration, adversary, [verdict], [PLAINTEXT])
                assert cell.decrypted == verdict["decrypted"]
                right = verdict["decrypted"] == EXPECTED[row.id, adversary.id]
                assert (cell.wrong is None) == right, (row.id, adversary.id)
    for verdicts, plaintexts in (([], [PLAINTEXT]), ([READ], []), ([READ, READ], [PLAINTEXT])):
        with pytest.raises(RecordingError):
            trial._cells(CONFIGURATIONS[0], ADVERSARIES[0], verdicts, plaintexts)


def check_belongings(folder: Path) -> None:
    """An adversary's folder holds what its kind has, and nothing else."""
    stage = fake_stage(folder)
    for adversary in ADVERSARIES:
        given = trial.equip(stage, adversary)
        had = {
            path.relative_to(given).as_posix(): path.read_text()
            for path in given.rglob("*")
            if path.is_file()
        }
        assert had == belongings(adversary), adversary.id


def fake_stage(folder: Path) -> Any:
    """Every file that a trial leaves, each with its own name in it."""

    def write(name: str) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
        return path

    def recording(configuration: Any, delivery: Any) -> Path:
        return folder / "recordings" / f"{configuration.id}-{delivery.value}"

    for configuration in CONFIGURATIONS:
        for delivery in {one.delivery for one in ADVERSARIES}:
            for capture in ("session", "hop-alice", "hop-bob"):
                write(f"recordings/{configuration.id}-{delivery.value}/{capture}.pcapng")
    for primitive in ORACLES:
        write(f"oracle/{primitive}.jsonl")
    link = write("recordings/link.pcapng")
    for name in ("certificate/server.pem", "ticket-keys.jsonl", "sessions.jsonl"):
        write(f"stolen/{name}")
    for delivery in {one.delivery for one in ADVERSARIES}:
        for when in ("before", "after"):
            write(f"stolen/{delivery.value}/{when}/kme-a/keys.db")
    return SimpleNamespace(
        folder=folder,
        recording=recording,
        link_recording=link,
        escrow=SimpleNamespace(file=lambda primitive: folder / f"oracle/{primitive}.jsonl"),
    )


def belongings(adversary: Adversary) -> dict[str, str]:
    """What an adversary of this kind has, written down a second time."""
    had = {f"oracle/{one}.jsonl": f"oracle/{one}.jsonl" for one in adversary.oracles}
    for configuration in CONFIGURATIONS:
        source = f"recordings/{configuration.id}-{adversary.delivery.value}"
        names = ["session"] + ["hop-alice", "hop-bob"] * adversary.taps_delivery
        had |= {f"{configuration.id}/{one}.pcapng": f"{source}/{one}.pcapng" for one in names}
        if adversary.id == "qkd-channel" and configuration.qkd:
            had[f"{configuration.id}/link.pcapng"] = "recordings/link.pcapng"
    if adversary.id == "certificate-key":
        had["stolen/certificate/server.pem"] = "stolen/certificate/server.pem"
    if adversary.id.startswith("ticket-key"):
        had["stolen/ticket-keys.jsonl"] = "stolen/ticket-keys.jsonl"
    if adversary.id.startswith("session"):
        had["stolen/sessions.jsonl"] = "stolen/sessions.jsonl"
    if adversary.id.startswith("key-store-"):
        when = adversary.id.removeprefix("key-store-")
        had["stolen/kme/kme-a/keys.db"] = f"stolen/{adversary.delivery.value}/{when}/kme-a/keys.db"
    return had


SPY = """
import json, os, sys
log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
import hybridkex.demos.rndl.later.__main__ as adversary
{prelude}
def hook(event, args):
    if event in ("open", "os.listdir", "os.scandir") and isinstance(args[0], (str, os.PathLike)):
        os.write(log, (json.dumps([os.getpid(), os.path.abspath(args[0])]) + "\\n").encode())
sys.argv[1:] = sys.argv[2:]
sys.addaudithook(hook)
sys.exit(adversary.main())
"""


def check_that_siblings_are_left_alone(folder: Path, prelude: str = "") -> None:
    """Several adversaries in one go: each process opens its own folder, and no other's."""
    names = ("one", "two", "three")
    for name in names:
        for inside in ("oracle", "case"):
            (folder / name / inside).mkdir(parents=True)
        for primitive in ORACLES:
            (folder / name / f"oracle/{primitive}.jsonl").touch()
        (folder / name / "case/session.pcapng").touch()
    log = folder / "log"
    command = [sys.executable, "-c", SPY.format(prelude=prelude), str(log)]
    subprocess.run(
        [*command, *(str(folder / name) for name in names)],
        capture_output=True,
        timeout=60,
        check=False,
        cwd=ROOT,
    )
    opened: dict[int, set[str]] = {}
    for process, path in map(json.loads, log.read_text().splitlines()):
        if path.startswith(f"{folder}/") and path != str(log):
            name = Path(path).relative_to(folder).parts[0]
            opened.setdefault(process, set()).add(name)
    assert sorted(map(sorted, opened.values())) == sorted([name] for name in names)
