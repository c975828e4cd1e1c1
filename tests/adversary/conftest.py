"""One whole trial, run as a user runs it, for all tests that look at its outcome."""

import json
import subprocess
import sys
import time

import pytest
from rndl_glue import Report


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("rndl")
    html, report, kept = folder / "report.html", folder / "report.json", folder / "kept"
    command = [sys.executable, "-W", "error", "-m", "hybridkex", "rndl"]
    began = time.monotonic()
    process = subprocess.run(
        [*command, "--html", str(html), "--json", str(report), "--keep", str(kept)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    assert process.stderr == ""
    return Report(
        status=process.returncode,
        output=process.stdout,
        seconds=time.monotonic() - began,
        html=html,
        json=json.loads(report.read_text(encoding="utf-8")),
        kept=kept,
    )
