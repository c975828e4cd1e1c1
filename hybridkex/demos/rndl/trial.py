"""The whole trial: record, hand over the recordings, run every adversary, compare.

Each adversary is a separate process with a folder: copies of its recordings, of its oracles'
answers, of what it stole, and nothing else. Its claimed plaintext is then compared with the actual
plaintext.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from subprocess import PIPE
from typing import Any, Final

import trio

from hybridkex.demos.rndl.matrix import (
    ADVERSARIES,
    CONFIGURATIONS,
    TOY,
    Adversary,
    Configuration,
    Delivery,
    Row,
    rows,
)
from hybridkex.demos.rndl.now.stage import Plaintext, Stage
from hybridkex.errors import RecordingError

_AT_ONCE: Final = 2
_ADVERSARY_SECONDS: Final = 300.0
"""A generous limit, for a busy machine."""

Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The outcome of one adversary's attack on one connection."""

    row: Row
    adversary: Adversary
    decrypted: bool
    missing: tuple[str, ...]
    """The secrets that the adversary lacked."""
    plaintext: str | None
    """The first line that it read."""
    wrong: str | None
    """The contradiction to the prediction or the actual plaintext; ``None`` if there is none."""

    @property
    def verdict(self) -> str:
        return "decrypted" if self.decrypted else "safe"


@dataclass(frozen=True, kw_only=True)
class Toy:
    """The outcome of the break without an oracle."""

    seconds: float
    steps: tuple[str, ...]
    verdict: dict[str, Any]
    wrong: str | None


@dataclass(kw_only=True)
class Trial:
    cells: list[Cell] = field(default_factory=list)
    verdicts: dict[tuple[str, str], list[dict[str, Any]]] = field(default_factory=dict)
    """The process's verdict on each connection, by configuration and adversary."""
    toy: Toy | None = None
    seconds: float = 0.0
    at: float = field(default_factory=time.time)

    @property
    def wrong(self) -> list[str]:
        """Everything that contradicts the claim, including cells that were not tried."""
        found = []
        tried = {(one.row, one.adversary): one.wrong for one in reversed(self.cells)}
        for row in rows():
            for adversary in ADVERSARIES:
                wrong = tried.get((row, adversary), "not tried")
                if wrong is not None:
                    found.append(f"{row.title}, against {adversary.title}: {wrong}")
        toy_wrong = self.toy.wrong if self.toy is not None else "not tried"
        if toy_wrong is not None:
            found.append(f"toy curve: {toy_wrong}")
        return found

    def cell(self, row: Row, adversary: Adversary) -> Cell | None:
        """The cell of a row and an adversary, if it was tried."""
        for cell in self.cells:
            if cell.row == row and cell.adversary == adversary:
                return cell
        return None

    def as_json(self) -> dict[str, object]:
        return {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.at)),
            "seconds": round(self.seconds, 2),
            "as_predicted": not self.wrong,
            "rows": [{"id": row.id, "title": row.title} for row in rows()],
            "adversaries": [
                {"id": one.id, "title": one.title, "note": one.note} for one in ADVERSARIES
            ],
            "cells": [
                {
                    "row": cell.row.id,
                    "adversary": cell.adversary.id,
                    "verdict": cell.verdict,
                    "missing": list(cell.missing),
                    "plaintext": cell.plaintext,
                    "wrong": cell.wrong,
                }
                for cell in self.cells
            ],
            "recordings": [
                {"configuration": configuration, "adversary": adversary, "verdicts": verdicts}
                for (configuration, adversary), verdicts in self.verdicts.items()
            ],
            "toy": None
            if self.toy is None
            else {
                "seconds": round(self.toy.seconds, 2),
                "steps": list(self.toy.steps),
                "verdict": self.toy.verdict,
                "wrong": self.toy.wrong,
            },
        }


async def run_trial(
    folder: Path,
    *,
    report: Report,
    toy_progress: Report,
    decided: Callable[[Cell], None],
) -> Trial:
    """Run the whole trial in a new folder, and leave all files there.

    Args:
        folder: does not exist yet, or is empty.
        report: called with the current step.
        toy_progress: called with the progress of the discrete logarithm.
        decided: called with each cell as it becomes known.

    Raises:
        RecordingError: an adversary's process failed.
    """
    began = time.monotonic()
    trial, stage = Trial(), Stage(folder)
    sent = await _record(stage, report)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_break_toy, stage, sent, trial, toy_progress)
        for first in range(_AT_ONCE):
            some = ADVERSARIES[first::_AT_ONCE]
            nursery.start_soon(_attack, stage, some, sent, trial, report, decided)
    trial.seconds = time.monotonic() - began
    return trial


_Plaintexts = dict[Path, list[Plaintext]]
"""The plaintexts by recording."""


async def _record(stage: Stage, report: Report) -> _Plaintexts:
    """Record every configuration with every delivery that some adversary attacks."""
    sent: _Plaintexts = {}
    for configuration in (*CONFIGURATIONS, TOY):
        report(f"recording: {configuration.title}")
        path = stage.recording(configuration, Delivery.IN_PROCESS)
        sent[path] = await stage.record(configuration)
    with_qkd = [configuration for configuration in CONFIGURATIONS if configuration.qkd]
    report("QKD link: making keys")
    async with stage.link() as sources:
        for configuration in with_qkd:
            report(f"recording: {configuration.title}, keys of the link")
            path = stage.recording(configuration, Delivery.LINK)
            sent[path] = await stage.record(configuration, Delivery.LINK, sources)
    for delivery in (Delivery.CLASSICAL_HOP, Delivery.HYBRID_HOP):
        async with stage.sites(delivery).running() as sites:
            for configuration in with_qkd:
                report(f"recording: {configuration.title}, keys by {delivery.value}")
                path = stage.recording(configuration, delivery)
                async with sites.tapped_sources(path) as sources:
                    sent[path] = await stage.record(configuration, delivery, sources)
    return sent


# --- adversaries ------------------------------------------------------------------------------


async def _attack(
    stage: Stage,
    adversaries: Sequence[Adversary],
    sent: _Plaintexts,
    trial: Trial,
    report: Report,
    decided: Callable[[Cell], None],
) -> None:
    adversary_of = {one.id: one for one in adversaries}
    configuration_of = {one.id: one for one in CONFIGURATIONS}

    def take(line: dict[str, Any]) -> None:
        adversary, configuration = adversary_of[line["folder"]], configuration_of[line["case"]]
        report(f"adversary: {adversary.title}")
        trial.verdicts[configuration.id, adversary.id] = line["verdicts"]
        plaintexts = sent[stage.recording(configuration, adversary.delivery)]
        for cell in _cells(configuration, adversary, line["verdicts"], plaintexts):
            trial.cells.append(cell)
            decided(cell)

    await _run_adversaries([equip(stage, one) for one in adversaries], take)


def equip(stage: Stage, adversary: Adversary) -> Path:
    """Create the folder that holds exactly what this adversary has."""
    folder = stage.folder / "adversaries" / adversary.id
    (folder / "oracle").mkdir(parents=True)
    for primitive in adversary.oracles:
        shutil.copy(stage.escrow.file(primitive), folder / "oracle")
    for configuration in CONFIGURATIONS:
        source, case = stage.recording(configuration, adversary.delivery), folder / configuration.id
        case.mkdir()
        for capture in source.glob("*.pcapng" if adversary.taps_delivery else "session.pcapng"):
            shutil.copy(capture, case)
        if configuration.qkd and adversary.taps_delivery and adversary.delivery is Delivery.LINK:
            shutil.copy(stage.link_recording, case)
    stolen = stage.folder / "stolen"
    if adversary.steals_certificate_key:
        shutil.copytree(stolen / "certificate", folder / "stolen/certificate")
    if adversary.steals_ticket_key:
        (folder / "stolen").mkdir(exist_ok=True)
        shutil.copy(stolen / "ticket-keys.jsonl", folder / "stolen")
    if adversary.steals_session:
        (folder / "stolen").mkdir(exist_ok=True)
        shutil.copy(stolen / "sessions.jsonl", folder / "stolen")
    if adversary.steals_key_store is not None:
        loot = stolen / adversary.delivery.value / adversary.steals_key_store
        shutil.copytree(loot, folder / "stolen/kme")
    return folder


def _cells(
    configuration: Configuration,
    adversary: Adversary,
    verdicts: list[Any],
    plaintexts: list[Plaintext],
) -> list[Cell]:
    sessions = [verdict for verdict in verdicts if verdict["capture"] == "session.pcapng"]
    cells = []
    if len(sessions) != len(plaintexts):
        raise RecordingError(
            f"an adversary found {len(sessions)} connections of {configuration.title} in the "
            f"recording of {len(plaintexts)}"
        )
    for verdict, plaintext in zip(sessions, plaintexts, strict=True):
        row = Row(configuration, plaintext.resumed)
        missing = list(verdict["missing"])
        if any(leg["kind"] == "ticket" and leg["how"] is None for leg in verdict["legs"]):
            # The ticket's PSK is derived in the first connection from its secrets.
            missing[-1] += f", which takes: {', '.join(sessions[0]['missing'])}"
        lines = verdict["to_server"].splitlines()
        cells.append(
            Cell(
                row=row,
                adversary=adversary,
                decrypted=verdict["decrypted"],
                missing=tuple(missing),
                plaintext=lines[0] if lines else None,
                wrong=contradiction(verdict, plaintext, predicted=adversary.defeats(row)),
            )
        )
    return cells


def contradiction(verdict: dict[str, Any], plaintext: Plaintext, *, predicted: bool) -> str | None:
    """The contradiction between a verdict of an adversary's process and the facts, if there is
    one."""
    if not plaintext.to_server or not plaintext.to_client:
        return "one direction carried no data, so nothing in it could be decrypted"
    if verdict["resumed"] != plaintext.resumed:
        return "the adversary misidentified the resumed connection"
    if verdict["decrypted"] and verdict["missing"]:
        return f"decrypted WITHOUT {', '.join(verdict['missing'])}: the keys do not depend on it"
    if verdict["decrypted"] != predicted:
        return (
            "not decrypted, but should have been" if predicted else "decrypted, but should be safe"
        )
    if verdict["decrypted"] and (
        verdict["to_server"].encode() != plaintext.to_server
        or verdict["to_client"].encode() != plaintext.to_client
    ):
        return "the decrypted text differs from what was sent"
    if not verdict["decrypted"] and not verdict["missing"]:
        return "no secret was missing, but it was not decrypted"
    return None


async def _break_toy(stage: Stage, sent: _Plaintexts, trial: Trial, progress: Report) -> None:
    recording = stage.recording(TOY, Delivery.IN_PROCESS)
    folder = stage.folder / "adversaries" / TOY.id
    shutil.copytree(recording, folder / TOY.id)
    began, steps = time.monotonic(), list[str]()

    def take(line: dict[str, Any]) -> None:
        if "progress" in line:
            steps.append(line["progress"])
            progress(line["progress"])
            return
        first = line["verdicts"][0]
        trial.toy = Toy(
            seconds=time.monotonic() - began,
            steps=tuple(steps),
            verdict=first,
            wrong=contradiction(first, sent[recording][0], predicted=True),
        )

    await _run_adversaries([folder], take)


async def _run_adversaries(folders: Sequence[Path], take: Callable[[dict[str, Any]], None]) -> None:
    """Start the adversaries' processes; ``take`` receives their output as it arrives."""
    command = [sys.executable, "-m", "hybridkex.demos.rndl.later", *map(str, folders)]
    complaint = bytearray()

    async def read_complaint(stream: trio.abc.ReceiveStream) -> None:
        async for data in stream:
            complaint.extend(data)

    with trio.move_on_after(_ADVERSARY_SECONDS) as scope:
        async with trio.open_nursery() as nursery:
            process: trio.Process = await nursery.start(
                partial(trio.run_process, command, stdout=PIPE, stderr=PIPE, check=False)
            )
            assert process.stdout is not None
            assert process.stderr is not None
            nursery.start_soon(read_complaint, process.stderr)
            buffer = b""
            async for data in process.stdout:
                *lines, buffer = (buffer + data).split(b"\n")
                for line in lines:
                    take(json.loads(line))
    if scope.cancelled_caught:
        raise RecordingError(f"adversaries did not finish within {_ADVERSARY_SECONDS:g} s")
    if process.returncode != 0:
        said = complaint.decode(errors="replace").splitlines() or ["it said nothing"]
        raise RecordingError(f"an adversary failed, exit status {process.returncode}: {said[-1]}")
