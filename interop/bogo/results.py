"""The results of a run of the suite, test by test."""

import json
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from pathlib import Path

from interop.bogo.launch import UNSUPPORTED, launcher

__all__ = ["GROUPS", "Outcome", "Results", "run"]

CONFIG = Path(__file__).with_name("config.json")

GROUPS = {
    "TLS13": "*TLS13*",
    "MLKEM": "*MLKEM*",
    "PSK": "PSK-*",
    "certificate types": "*CertificateType-*",
    "all": "*",
}
"""Tests by what is in their name; one may be in several groups."""


class Outcome(Enum):
    """How a test ended."""

    PASSED = "passed"
    OTHER_ALERT = "refused with another alert"
    """As the test demands, but with an alert that the RFC gives and the runner does not expect;
    ``config.json`` says which and why."""
    UNSUPPORTED = "not supported"
    """The shim was asked for what hybridkex does not have (exit code 89)."""
    FAILED = "failed"


@dataclass(frozen=True)
class Results:
    """Outcomes by the name of the test; those that ``config.json`` leaves out do not appear."""

    tests: dict[str, Outcome]
    unsupported: Counter[str]
    """The features that unsupported tests need, by their names in ``config.json``."""

    def of(self, outcome: Outcome) -> list[str]:
        """The tests with an outcome."""
        return sorted(name for name, got in self.tests.items() if got is outcome)

    def counts(self) -> dict[str, dict[str, int]]:
        """The number of tests by group and outcome."""
        return {
            group: {
                outcome.value: sum(
                    got is outcome and fnmatchcase(name, pattern)
                    for name, got in self.tests.items()
                )
                for outcome in Outcome
            }
            for group, pattern in GROUPS.items()
        }

    def without_reason(self) -> list[str]:
        """The missing features for which ``config.json`` has no reason."""
        reasons = json.loads(CONFIG.read_text())["NotSupported"]
        return sorted(set(self.unsupported) - {one for names in reasons.values() for one in names})

    def as_json(self) -> dict[str, object]:
        """The result as plain values, for the result page."""
        return {
            "groups": self.counts(),
            "other alerts": self.of(Outcome.OTHER_ALERT),
            "not supported": dict(sorted(self.unsupported.items())),
        }


def run(runner: Path, pattern: str = "", workers: int = 2) -> Results:
    """Run the tests whose names fit ``pattern`` (``;`` separates several; all without one)."""
    config = json.loads(CONFIG.read_text())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ours = ("OtherAlerts", "NotSupported")
        runner_config = {key: one for key, one in config.items() if key not in ours}
        (folder / "config.json").write_text(json.dumps(runner_config))
        command: list[str | Path] = [
            runner.resolve(),
            "-pipe",
            "-allow-unimplemented",
            "-num-workers",
            str(workers),
        ]
        command += ["-shim-config", folder / "config.json", "-json-output", folder / "out.json"]
        command += ["-test", pattern] if pattern else []
        with launcher(folder) as shim:
            process = subprocess.run(
                [*command, "-shim-path", shim],
                cwd=folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                check=False,
            )
        if not (folder / "out.json").exists():
            raise RuntimeError(f"the runner ended without results: {process.stdout[-2000:]}")
        tests = json.loads((folder / "out.json").read_text())["tests"]
        missing = folder / UNSUPPORTED
        lines = missing.read_text().splitlines() if missing.exists() else []
    reports = _reports(process.stdout)
    outcomes = {
        name: _outcome(name, test["actual"], reports.get(name, ""), config["OtherAlerts"])
        for name, test in tests.items()
    }
    return Results(outcomes, Counter(lines))


def _reports(output: str) -> dict[str, str]:
    pieces = re.split(r"^FAILED \((.*)\)$", output, flags=re.MULTILINE)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


def _outcome(name: str, actual: str, report: str, others: dict[str, dict[str, str]]) -> Outcome:
    if actual == "PASS":
        return Outcome.PASSED
    if actual == "SKIP":
        return Outcome.UNSUPPORTED
    for pattern, other in others.items():
        refused = "unexpected error" in report and f'local: "{other["sees"]}' in report.replace(
            "remote error: ", ""
        ).replace("tls: ", "")
        if fnmatchcase(name, pattern) and refused:
            return Outcome.OTHER_ALERT
    return Outcome.FAILED
