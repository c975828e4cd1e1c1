"""``hybridkex doctor``: a healthy machine, one that computes wrongly, missing parts, a KME."""

import importlib.metadata
import importlib.util
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from forked import Forkserver

from hybridkex.cli import checks, main
from hybridkex.cli.actions import demo
from hybridkex.cli.extras import modules_of_extras
from hybridkex.crypto.oqs import oqs_status
from hybridkex.qkd.in_process import in_process_pair


def examined(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    status = main(["doctor", "--json", *words])
    report = json.loads(capsys.readouterr().out)
    assert report["healthy"] == (status == 0)
    return status, {one["name"]: one for one in report["checks"]}


def test_a_healthy_machine(capsys: pytest.CaptureFixture[str]) -> None:
    status, found = examined(capsys)
    assert status == 0
    assert all(one["works"] for one in found.values() if one["required"])
    assert "X25519MLKEM768" in found["groups"]["detail"]
    assert "QKD" in found["handshake, three legs"]["detail"]
    assert found["liboqs"]["works"] == oqs_status().available
    assert found["liboqs"]["works"] or "OQS_INSTALL_PATH" in found["liboqs"]["advice"]
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "everything required works"
    assert any(line.startswith("ok      published vectors") for line in lines)


@pytest.mark.parametrize("name", ["X25519_CASE", "ML_KEM_768", "ML_DSA_65", "RFC_8448"])
def test_a_wrong_result_is_told(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    *values, last = getattr(checks, name)
    monkeypatch.setattr(checks, name, (*values, "00" + last[2:]))
    status, found = examined(capsys)
    assert status == 1
    assert "published vector" in found["published vectors"]["detail"]
    assert found["published vectors"]["advice"]
    assert found["groups"]["works"]


def test_a_handshake_that_fails_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "in_process_pair", in_two_worlds)
    status, found = examined(capsys)
    assert status == 1
    assert not found["handshake, three legs"]["works"]


def in_two_worlds(a: str, b: str) -> Any:
    return in_process_pair(a, b)[0], in_process_pair(a, b)[1]


def test_what_is_missing_and_how_to_get_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "scipy" else real(name)
    )
    status, found = examined(capsys)
    assert status == 0
    link = found["extra [link]"]
    assert (link["works"], link["advice"]) == (False, "pip install 'hybridkex[link]'")
    assert "scipy missing" in link["detail"]


def test_every_extra_for_users_is_examined(capsys: pytest.CaptureFixture[str]) -> None:
    _, found = examined(capsys)
    declared = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    extras = set(declared["project"]["optional-dependencies"])
    others = {"oqs", "all", "test", "docs", "dev"}  # liboqs has a check of its own
    assert {f"extra [{one}]" for one in extras - others} == {
        name for name in found if name.startswith("extra ")
    }


def test_packages_that_are_not_installed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkout, a frozen program, or no descriptor left to read what is installed."""

    def nothing(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata.Distribution, "from_name", nothing)
    status, found = examined(capsys)
    assert status == 0
    assert re.search(r"cryptography \d.*trio \d.*OpenSSL \d", found["packages"]["detail"])
    assert demo._largest_library().stat().st_size > 1_000_000
    assert "not installed" in found["extras"]["detail"]
    assert found["extras"]["advice"] == "pip install -e . in the checkout"
    assert not any(name.startswith("extra ") for name in found)
    assert modules_of_extras() == {}


def test_a_kme_that_is_there_and_one_that_is_gone(
    forkserver: Forkserver, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with forkserver.telling("kme", "dev-up", tmp_path, "--ports", "0,0") as (said, _):
        for line in said:
            if found := re.search(r"hybridkex connect .*?(--kme .*)", line):
                words = found[1].split()
                break
        mine = words.index("--sae")
        words[mine : mine + 2] = []
        status, report = examined(capsys, *words)
        assert status == 0
        (kme,) = [one for name, one in report.items() if name.startswith("KME ")]
        assert "keys of 256 bits for bob" in kme["detail"]
    status, report = examined(capsys, *words)
    assert status == 1
    assert main(["doctor", "--kme", "https://127.0.0.1:1"]) == 1
    assert "--peer-sae" in capsys.readouterr().err
