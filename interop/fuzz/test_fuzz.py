"""Replays the corpus and runs the fuzzer for a short time on each target."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from interop.fuzz.seeds import CORPUS, seeds
from interop.fuzz.targets import TARGETS

ROOT = Path(__file__).parents[2]
FUZZ = [sys.executable, "-m", "interop.fuzz"]
BETWEEN = ["sh", "-c", '"$@"; exit $?', "sh"]
"""libFuzzer limits its peak memory, and Linux gives a new process the peak of the one that started
it: a shell stands between the tests and the fuzzer."""


def test_every_target_has_a_corpus() -> None:
    assert set(seeds()) == {folder.name for folder in CORPUS.iterdir()} == set(TARGETS)


@pytest.mark.parametrize("target", TARGETS)
def test_replay(target: str) -> None:
    inputs = sorted((CORPUS / target).iterdir())
    assert inputs
    for path in inputs:
        TARGETS[target](path.read_bytes())


@pytest.mark.parametrize("target", TARGETS)
def test_fresh_seeds(target: str) -> None:
    """Seeds that are made now, by the current code."""
    for data in seeds()[target].values():
        TARGETS[target](data)


def test_a_short_run(tmp_path: Path) -> None:
    if find_spec("atheris") is None:
        pytest.skip("needs atheris, which has no wheel for this Python: pip install atheris")
    # libFuzzer runs all seeds, however long that takes, and mutates them for the rest of a second.
    # To instrument all modules takes 5 s of processor time, and in a second coverage is no guide.
    # Each target's seeds with the byte that chooses it before them.
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, target in enumerate(TARGETS):
        for name, data in seeds()[target].items():
            (corpus / f"{target}-{name}").write_bytes(bytes((number,)) + data)
    words = ["everything", "--seconds", "1", "--corpus", str(corpus)]
    words += ["--instrument", "hybridkex.wire.messages"]
    done = subprocess.run(
        [*BETWEEN, *FUZZ, *words],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    executions = re.search(r"number_of_executed_units: (\d+)", done.stderr)
    assert executions is not None, done.stderr[-3000:]
    assert int(executions[1]) > 100  # on a busy machine
