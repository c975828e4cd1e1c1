"""The completion scripts, in the shells that are there."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hybridkex.cli import main
from hybridkex.cli.commands import COMMANDS

BASH = r"""
source "$1"; shift
function=$(complete -p hybridkex | sed 's/.*-F \([^ ]*\).*/\1/')
COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 ))
"$function" 2>&1
printf '%s\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "hybridkex.bash"
    command = [sys.executable, "-m", "hybridkex", "completion", "bash"]
    path.write_bytes(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout)
    return path


def completed(script: Path, *words: str, folder: Path | None = None) -> set[str]:
    """What bash offers for the last word."""
    command = ["bash", "-c", BASH, "bash", str(script), "hybridkex", *words]
    result = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=30, cwd=folder
    )
    assert result.stderr == ""
    return set(result.stdout.split())


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash: install it")
def test_bash(script: Path, tmp_path: Path) -> None:
    assert completed(script, "") >= set(COMMANDS)
    assert completed(script, "co") == {"connect", "completion"}
    assert completed(script, "connect", "--psk") == {"--psk", "--psk-hash", "--psk-import"}
    assert completed(script, "connect", "--psk-hash", "") == {"sha256", "sha384"}
    assert completed(script, "dev-ca", "--alg", "mldsa") == {"mldsa44", "mldsa65", "mldsa87"}
    assert completed(script, "tunnel", "") >= {"listen", "connect", "run"}
    assert completed(script, "tunnel", "connect", "--rem") == {"--remote"}
    assert completed(script, "kme", "serve", "--log-level", "w") == {"warning"}
    (tmp_path / "authority.pem").touch()
    (tmp_path / "folder").mkdir()
    found = completed(script, "connect", "--ca", "a", folder=tmp_path)
    assert found == {"authority.pem"}


@pytest.mark.parametrize("shell", ["zsh", "fish", "tcsh"])
def test_other_shells(shell: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The script names every command; where the shell is there, it can read it."""
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)
    if shutil.which(shell) is not None:
        path = tmp_path / "script"
        path.write_text(text)
        subprocess.run([shell, "-n", path], check=True, timeout=30)


def test_an_unknown_shell(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["completion", "cmd.exe"])
    assert ended.value.code == 2
    assert "invalid choice" in capsys.readouterr().err
