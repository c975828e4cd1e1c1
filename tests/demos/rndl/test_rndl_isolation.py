"""The adversary of the future is alone with files.

Its code imports nothing of what runs while the parties talk; its process opens what is in its
folder, and no connection to anybody.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rndl_glue import Report

from hybridkex.demos.rndl.capture.pcapng import PcapngWriter

ROOT = Path(__file__).parents[3]
PACKAGE = ROOT / "hybridkex"


def imports_of(path: Path) -> set[str]:
    """Everything of ours that a module imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("hybridkex") and source(name).exists()}


def source(module: str) -> Path:
    path = ROOT / Path(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def test_its_code_knows_no_party() -> None:
    """Followed through the adversary's own modules; of the library it takes these and no others."""
    todo = {"hybridkex.demos.rndl.later.__main__"}
    own, others = set(), set()
    while todo:
        module = todo.pop()
        own.add(module)
        for name in imports_of(source(module)):
            if not name.startswith("hybridkex.demos.rndl"):
                others.add(name)
            elif name not in own:
                todo.add(name)
    assert {name.split(".")[3] for name in own if name.count(".") >= 3} == {
        "later",
        "capture",
        "toy_curve",
    }
    modules = {name for name in others if not source(name).name.startswith("__init__")}
    assert modules == {
        "hybridkex.constants",
        "hybridkex.crypto.kex",  # the layout of shares; the toy curve is a plug-in of it
        "hybridkex.errors",
        "hybridkex.qkd.psk",  # the form of an identity on the wire
        "hybridkex.secret",  # the toy curve's
        "hybridkex.text",  # how foreign text is shown
        "hybridkex.wire.codec",
        "hybridkex.wire.extensions",
        "hybridkex.wire.messages",
        "hybridkex.wire.records",
        "hybridkex.wire.update_messages",
    }


def test_its_key_schedule_is_its_own() -> None:
    found = imports_of(PACKAGE / "demos/rndl/later/derivation.py")
    assert found == set()


WATCHED = """
import json, runpy, sys
log = open(sys.argv[1], "w")
def hook(event, args):
    if event == "open" and not isinstance(args[0], int):
        print(json.dumps([event, str(args[0])]), file=log)
    elif event.split(".")[0] in {"socket", "subprocess", "os", "sqlite3", "ctypes", "mmap"}:
        print(json.dumps([event, ""]), file=log)
sys.argv = ["adversary", sys.argv[2]]
# What is imported is the library's code; from here on only the adversary acts.
import hybridkex.demos.rndl.later.__main__
sys.addaudithook(hook)
try:
    runpy.run_module("hybridkex.demos.rndl.later.__main__", run_name="__main__")
finally:
    log.flush()
"""


def test_its_process_opens_its_folder_and_nothing_else(report: Report, tmp_path: Path) -> None:
    folder, log = tmp_path / "elsewhere", tmp_path / "log"
    shutil.copytree(report.kept / "adversaries/hop-classical-both", folder)
    process = subprocess.run(
        [sys.executable, "-c", WATCHED, str(log), str(folder)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin"},
    )
    assert process.returncode == 0, process.stderr
    verdicts = {
        line["case"]: line["verdicts"] for line in map(json.loads, process.stdout.splitlines())
    }
    assert len(verdicts) == 7
    for configuration, found in verdicts.items():
        assert found == report.verdicts(configuration, "hop-classical-both")

    events = [json.loads(line) for line in log.read_text().splitlines()]
    opened = {Path(path).resolve() for event, path in events if event == "open"}
    theirs = {path for path in opened if path.is_relative_to(folder.resolve())}
    assert {path.name for path in theirs} == {
        "session.pcapng",
        "hop-alice.pcapng",
        "hop-bob.pcapng",
        "ecdh.jsonl",
        "ml-kem.jsonl",
    }
    code = (Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve(), PACKAGE.resolve())
    assert not [p for p in opened - theirs if not any(p.is_relative_to(c) for c in code)]
    # Listing its folder is all that it asks of the system besides.
    assert {event for event, _ in events} <= {"open", "os.listdir", "os.scandir"}


def test_its_process_says_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "case").mkdir()
    (tmp_path / "case/a.pcapng").write_bytes(b"not a capture")
    for argument, status, complaint in (
        (tmp_path / "missing", 2, "usage:"),
        (tmp_path, 1, "a.pcapng: it does not start with a pcapng section header"),
    ):
        process = subprocess.run(
            [sys.executable, "-m", "hybridkex.demos.rndl.later", str(argument)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert process.returncode == status
        assert complaint in process.stderr
        assert "Traceback" not in process.stderr


@pytest.mark.parametrize("folders", [1, 2])
def test_its_reader_has_left(folders: int, tmp_path: Path) -> None:
    """As with ``| head``: no traceback."""
    named = [tmp_path / str(number) for number in range(folders)]
    for folder in named:
        (folder / "case").mkdir(parents=True)
        with (folder / "case/a.pcapng").open("wb") as file:
            PcapngWriter(file)
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "wb") as closed:
        process = subprocess.run(
            [sys.executable, "-m", "hybridkex.demos.rndl.later", *named],
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert process.returncode == 1
    assert process.stderr == ""
