"""Proof by mutation: a key schedule without one of its legs makes the suite fail.

A few lines at the end of a module make one leg count no more, in a way in which the parties still
understand each other, and the tests of ``test_rndl_legs.py`` run against that (``mutants.py``).
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LEGS = "test_rndl_legs.py"

QKD_TESTS = {
    f"test_the_qkd_key_cannot_be_left_out[{configuration}]"
    for configuration in ("x25519-qkd", "x25519mlkem768-qkd", "x25519mlkem768-qkd-psk")
}
MUTATIONS: dict[str, tuple[str, str, set[str]]] = {
    "nothing is changed": ("hybridkex.crypto.kex", "", set()),
    "the key schedule leaves out the PSK": (
        "hybridkex.crypto.schedule",
        """
_start = EarlySecret.start
EarlySecret.start = staticmethod(lambda hash_function, psk=None: _start(hash_function, None))
""",
        QKD_TESTS,
    ),
    "the PSK is imported from zeros": (
        "hybridkex.crypto.psk",
        """
from dataclasses import replace
_import_key = import_key
def import_key(psk, imported_identity, target):
    return _import_key(replace(psk, key=Secret(bytes(32))), imported_identity, target)
""",
        QKD_TESTS,
    ),
    "the hybrid leaves out ML-KEM": (
        "hybridkex.crypto.kex",
        """
_whole = _join
def _join(secrets):
    return _whole(list(secrets)[1:])
""",
        {"test_ml_kem_cannot_be_left_out"},
    ),
    "the hybrid leaves out X25519": (
        "hybridkex.crypto.kex",
        """
_whole = _join
def _join(secrets):
    return _whole(list(secrets)[:1])
""",
        {"test_ecdh_cannot_be_left_out"},
    ),
    "the key schedule leaves out the key exchange": (
        "hybridkex.crypto.schedule",
        """
_next = EarlySecret.handshake_secret
EarlySecret.handshake_secret = lambda self, shared: _next(self, Secret(bytes(32)))
""",
        {"test_the_key_exchange_cannot_be_left_out"},
    ),
}
"""What happens, where, the lines that are run at its end, and the tests that must fail."""


Mutants = subprocess.Popen[str]


@pytest.fixture(scope="module")
def mutants() -> Iterator[Mutants]:
    """The process that mutants are forked from."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(HERE), str(HERE.parents[2]))),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    command = [sys.executable, "mutants.py"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=HERE, env=environment, text=True, **pipes) as process:
        yield process


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_suite_notices(mutation: str, mutants: Mutants, tmp_path: Path) -> None:
    module, lines, expected = MUTATIONS[mutation]
    assert mutants.stdin is not None
    assert mutants.stdout is not None
    print(json.dumps([module, lines, str(tmp_path)]), file=mutants.stdin, flush=True)
    status = int(mutants.stdout.readline())
    output = (tmp_path / "output").read_text(encoding="utf-8")
    failed = {
        line.split("::")[1].split(" ")[0]
        for line in output.splitlines()
        if line.startswith(f"FAILED {LEGS}::")
    }
    assert status == (1 if expected else 0), output
    assert failed >= expected, output
    # They fail because the adversary read what it lacks a secret for, not for another reason.
    told = r"^E .*assert \[True, (?:True|False)\] == \[False, False\]$"
    read = re.findall(told, output, re.M)
    assert len(read) == len(expected)
