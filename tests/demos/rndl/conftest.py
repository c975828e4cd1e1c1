"""One whole trial, run as a user runs it, for all tests that look at its outcome."""

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rndl_glue import Report
from shared import made_once


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The first of the processes that run the tests makes it for all of them."""
    folder, outcome = made_once(tmp_path_factory, "rndl", run)
    return Report(
        **outcome,
        html=folder / "report.html",
        json=json.loads((folder / "report.json").read_text(encoding="utf-8")),
        kept=folder / "kept",
    )


def run(folder: Path) -> dict[str, Any]:
    """Run the command; its status, its output, and the processor time it took in seconds."""
    html, report, kept = folder / "report.html", folder / "report.json", folder / "kept"
    command = [sys.executable, "-W", "error", "-m", "hybridkex", "rndl"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.run(
        [*command, "--html", str(html), "--json", str(report), "--keep", str(kept)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=400,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert process.stderr == ""
    return {
        "status": process.returncode,
        "output": process.stdout,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    }
