"""One whole trial, run as a user runs it, for all tests that look at its outcome."""

import json
import resource
import subprocess
import sys

import pytest
from rndl_glue import Report


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("rndl")
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
    return Report(
        status=process.returncode,
        output=process.stdout,
        cpu_seconds=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        html=html,
        json=json.loads(report.read_text(encoding="utf-8")),
        kept=kept,
    )
