"""Proof by mutation: a key schedule without one of its legs makes the suite fail.

The package is copied, a few lines in the copy make one leg count no more, in a way in which the
parties still understand each other, and the tests of ``test_rndl_legs.py`` run against the copy.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
LEGS = "test_rndl_legs.py"

QKD_TESTS = {
    f"test_the_qkd_key_cannot_be_left_out[{configuration}]"
    for configuration in ("x25519-qkd", "x25519mlkem768-qkd", "x25519mlkem768-qkd-psk")
}
MUTATIONS: dict[str, tuple[str, str, set[str]]] = {
    "nothing is changed": ("crypto/kex.py", "", set()),
    "the key schedule leaves out the PSK": (
        "crypto/schedule.py",
        """
_start = EarlySecret.start
EarlySecret.start = staticmethod(lambda hash_function, psk=None: _start(hash_function, None))
""",
        QKD_TESTS,
    ),
    "the PSK is imported from zeros": (
        "crypto/psk.py",
        """
from dataclasses import replace
_import_key = import_key
def import_key(psk, imported_identity, target):
    return _import_key(replace(psk, key=Secret(bytes(32))), imported_identity, target)
""",
        QKD_TESTS,
    ),
    "the hybrid leaves out ML-KEM": (
        "crypto/kex.py",
        """
_whole = _join
def _join(secrets):
    return _whole(list(secrets)[1:])
""",
        {"test_ml_kem_cannot_be_left_out"},
    ),
    "the hybrid leaves out X25519": (
        "crypto/kex.py",
        """
_whole = _join
def _join(secrets):
    return _whole(list(secrets)[:1])
""",
        {"test_ecdh_cannot_be_left_out"},
    ),
    "the key schedule leaves out the key exchange": (
        "crypto/schedule.py",
        """
_next = EarlySecret.handshake_secret
EarlySecret.handshake_secret = lambda self, shared: _next(self, Secret(bytes(32)))
""",
        {"test_the_key_exchange_cannot_be_left_out"},
    ),
}
"""What happens, where, the lines that are appended there, and the tests that must fail."""


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_suite_notices(mutation: str, tmp_path: Path) -> None:
    file, lines, expected = MUTATIONS[mutation]
    shutil.copytree(ROOT / "hybridkex", tmp_path / "hybridkex")
    with (tmp_path / "hybridkex" / file).open("a", encoding="utf-8") as module:
        module.write(lines)
    for name in (LEGS, "rndl_glue.py"):
        shutil.copy(ROOT / "tests/demos/rndl" / name, tmp_path)
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", LEGS]
    # With a folder of its own, it does not delete those of earlier runs when it ends.
    folders = ["--rootdir", str(tmp_path), "--basetemp", str(tmp_path / "tmp")]
    process = subprocess.run(
        [*command, "-c", os.devnull, *folders],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(tmp_path),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    failed = {
        line.split("::")[1].split(" ")[0]
        for line in process.stdout.splitlines()
        if line.startswith(f"FAILED {LEGS}::")
    }
    assert process.returncode == (1 if expected else 0), process.stdout + process.stderr
    assert failed >= expected, process.stdout
    # They fail because the adversary read what it lacks a secret for, not for another reason.
    told = r"^E .*assert \[True, (?:True|False)\] == \[False, False\]$"
    read = re.findall(told, process.stdout, re.M)
    assert len(read) == len(expected)
