"""What the adversary's tests have in common."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hybridkex.demos.rndl.later.decrypt import Adversary, Verdict
from hybridkex.demos.rndl.later.knowledge import Knowledge
from hybridkex.demos.rndl.later.reading import Connection, read_capture
from hybridkex.demos.rndl.now.stage import Stage

ADVERSARIES = (
    "none",
    "ecdh",
    "ml-kem",
    "both",
    "signatures",
    "hop-classical",
    "hop-classical-both",
    "hop-hybrid",
    "hop-hybrid-both",
    "qkd-channel",
    "certificate-key",
    "key-store-after",
    "key-store-before",
    "ticket-key",
    "ticket-key-both",
    "session",
    "session-both",
)

# Written down by hand, not computed: R is read, a dot is safe; the columns are ADVERSARIES.
_EXPECTED = {
    "x25519":                         ". R . R . R R R R R . R R . R R R",
    "x25519-resumed":                 ". R . R . R R R R R . R R . R R R",
    "x25519mlkem768":                 ". . . R . . R . R R . R R . R R R",
    "x25519mlkem768-resumed":         ". . . R . . R . R R . R R . R R R",
    "x25519-qkd":                     ". . . . . R R . R . . . R . . R R",
    "x25519-qkd-resumed":             ". . . . . R R . R . . . R . R R R",
    "x25519mlkem768-qkd":             ". . . . . . R . R . . . R . . R R",
    "x25519mlkem768-qkd-resumed":     ". . . . . . R . R . . . R . R R R",
    "x25519mlkem768-qkd-psk":         ". . . . . . R . R . . . R . . R R",
    "x25519mlkem768-qkd-psk-resumed": ". . . . . . R . R . . . R . R R R",
    "x25519mlkem768-fresh":           ". . . R . . R . R R . R R . R . R",
    "x25519mlkem768-qkd-fresh":       ". . . . . . R . R . . . R . . . .",
}  # fmt: skip

EXPECTED = {
    (row, adversary): mark == "R"
    for row, marks in _EXPECTED.items()
    for adversary, mark in zip(ADVERSARIES, marks.split(), strict=True)
}
"""Whether an adversary reads a connection."""


@dataclass(frozen=True)
class Report:
    """What ``hybridkex rndl`` left behind."""

    status: int
    output: str
    cpu_seconds: float
    html: Path
    json: dict[str, Any]
    kept: Path

    def verdicts(self, configuration: str, adversary: str) -> list[dict[str, Any]]:
        """What one adversary's process said about one configuration's connections."""
        for one in self.json["recordings"]:
            if (one["configuration"], one["adversary"]) == (configuration, adversary):
                verdicts: list[dict[str, Any]] = one["verdicts"]
                return verdicts
        raise KeyError((configuration, adversary))


def attack(case: Path, stage: Stage, *oracles: str) -> list[Verdict]:
    """What an adversary with these oracles makes of a folder of recordings, in this process."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "oracle").mkdir()
        for primitive in oracles:
            shutil.copy(stage.escrow.file(primitive), folder / "oracle")
        knowledge = Knowledge.from_folder(folder)
    found: list[Connection] = []
    for capture in sorted(case.glob("*.pcapng")):
        connections, others = read_capture(capture)
        found += connections
        knowledge.overheard += [
            flow.stream(from_client=side) for flow in others for side in (True, False)
        ]
    return Adversary(knowledge).attack(found)
