"""The diffs of docs/contributing apply to the present tree, and what they add works."""

import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "contributing"
MOST_FILES = {
    "hybrid-group": 3,
    "key-source": 2,
    "tls-extension": 2,
    "event-loop-shell": 3,
    "option": 1,
    "error-correction": 2,
}
GUARDS = (
    "tests/test_imports.py",
    "tests/test_public_api.py",
    "tests/cli/test_arguments.py",
)
"""Tests of the suite that a change anywhere may break. Each new module is also one of the tests of
private names."""
NEIGHBOURS = (
    "tests/cli/test_help.py",
    "tests/crypto/test_kex.py",
    "tests/tls/test_bad_shares.py",
    "tests/tls/test_extension_rules.py",
    "tests/tls/test_pair.py::test_group_and_suite",
    "tests/tls/test_plug_in_members.py",
    "tests/tls/test_pyopenssl.py::test_we_connect",
    "tests/tls/test_pyopenssl.py::test_they_connect",
)
"""Tests of the suite that meet what an errand adds or changes: groups, extensions and plug-ins, the
options of ``connect``. The others run the same code as in the suite itself."""
GIT = shutil.which("git")


def touched(errand: str) -> list[str]:
    """The files that a diff touches."""
    text = (FOLDER / f"{errand}.diff").read_text(encoding="utf-8")
    return re.findall(r"^\+\+\+ b/(.+)$", text, re.MULTILINE)


def run(*command: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(cwd)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the diffs need of the present tree, with all of them applied."""
    if GIT is None:
        pytest.skip("git is not installed: apt install git")
    tree = tmp_path_factory.mktemp("errands")
    needless = shutil.ignore_patterns("vectors", ".*")
    for name in ("hybridkex", "tests", "docs"):
        shutil.copytree(ROOT / name, tree / name, ignore=needless)
    shutil.copy(ROOT / "pyproject.toml", tree)
    assert run(GIT, "init", "-q", cwd=tree).returncode == 0
    for errand in MOST_FILES:
        result = run(GIT, "apply", str(FOLDER / f"{errand}.diff"), cwd=tree)
        assert result.returncode == 0, result.stderr
    return tree


@pytest.mark.parametrize("errand", MOST_FILES)
def test_an_errand_touches_few_files(errand: str) -> None:
    files = touched(errand)
    assert 1 <= len(files) <= MOST_FILES[errand]
    assert f"({errand}.diff) | {len(files)} |" in (FOLDER / "README.md").read_text("utf-8")


def test_every_diff_is_an_errand() -> None:
    assert {path.stem for path in FOLDER.glob("*.diff")} == set(MOST_FILES)


@pytest.mark.parametrize("errand", MOST_FILES)
def test_an_errand_applies(errand: str) -> None:
    if GIT is None:
        pytest.skip("git is not installed: apt install git")
    result = run(GIT, "apply", "--check", str(FOLDER / f"{errand}.diff"), cwd=ROOT)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_the_errands(tree: Path, tmp_path: Path) -> None:
    """Their own tests pass, and those of the suite that could object."""
    tests = [*NEIGHBOURS, *GUARDS]
    for errand in MOST_FILES:
        own = [path for path in touched(errand) if path.startswith("tests/")]
        assert own or errand == "option"
        tests += own
        tests += [
            f"tests/test_private_names.py::test_no_private_name_of_another_module[{path}]"
            for path in touched(errand)
            if path.startswith("hybridkex/")
        ]
    result = run(
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k",
        "not no_extra_is_needed", "--basetemp", str(tmp_path / "tmp"), *dict.fromkeys(tests),
        cwd=tree,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"\d+ passed", result.stdout)


def test_the_option(tree: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        hello = b""

        def accept() -> None:
            nonlocal hello
            peer, _ = listener.accept()
            with peer:
                hello = peer.recv(65536)

        thread = threading.Thread(target=accept)
        thread.start()
        port = str(listener.getsockname()[1])
        result = run(
            sys.executable, "-m", "hybridkex", "connect", "127.0.0.1", port, "--insecure", "--http",
            cwd=tree,
        )  # fmt: skip
        thread.join(30)
    assert result.returncode == 1  # nobody answers
    assert b"\x08http/1.1" in hello, result.stderr
