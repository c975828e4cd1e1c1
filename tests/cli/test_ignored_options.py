"""No option is ignored without a word: least of all one that asks for QKD keys or fresh keys."""

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest

from hybridkex.cli import main
from hybridkex.cli.commands import COMMANDS, command_parser
from hybridkex.cli.values import number, whole_number
from tests.cli.test_arguments import parsers

IDENTITY = ("--cert", "cert.pem", "--key", "key.pem")
COMMAND_LINES = {
    "connect": ("connect", "localhost", "9"),
    "listen": ("listen", "0", "--once", *IDENTITY),
    "receive": ("receive", "inbox", "--port", "0", *IDENTITY, "--anyone"),
    "send": ("send", "ca.pem", "localhost:9", "--retries", "0"),
    "tunnel": ("tunnel", "connect", "--local", "127.0.0.1:0", "--remote", "localhost:9"),
}
ALONE = {
    "--kme-ca": "ca.pem",
    "--kme-cert": "cert.pem",
    "--kme-key": "key.pem",
    "--kme-id": "kme",
    "--kme-id-rule": "cn",
    "--kme-tls": "stdlib",
    "--sae": "alice",
    "--peer-sae": "bob",
    "--peer-kme-id": "kme",
    "--pool-key": "pool.key",
    "--psk-hash": "sha256",
    "--psk-import": "00",
    "--fresh-keys-policy": "require",
}
"""Options that need another one, each with a value: its default, if it has one."""


def test_every_option_about_qkd_keys_is_tried() -> None:
    groups = command_parser("connect")._action_groups
    (about_keys,) = (one for one in groups if one.title == "QKD keys")
    names = {text for one in about_keys._group_actions for text in one.option_strings}
    assert names - ALONE.keys() == {"--kme", "--key-pool", "--qkd"}


@pytest.mark.parametrize("option", ALONE)
@pytest.mark.parametrize("command", COMMAND_LINES)
def test_an_option_without_the_one_that_it_needs(
    command: str,
    option: str,
    keys: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(keys)
    assert main([*COMMAND_LINES[command], option, ALONE[option]]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"hybridkex: {option} "), said


@pytest.mark.parametrize("option", [one for one in ALONE if one.startswith("--kme-")])
def test_doctor_and_a_key_pool(
    option: str, keys: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(keys)
    for words in (["doctor"], ["connect", "localhost", "9", "--key-pool", "a.pool"]):
        assert main([*words, option, ALONE[option]]) == 1
        assert f"{option} requires --kme" in capsys.readouterr().err


def test_qkd_off_turns_the_others_off(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["connect", "localhost", "9", "--qkd", "off", "--sae", "a", "--kme-id", "b"]) == 1
    assert "cannot connect" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("qkd plot --kind qber --by preset -o a.svg", "require --scan"),
        ("qkd plot --scan a.csv --preset gys2005 -o a.svg", "require --kind"),
        ("qkd distil a.npz b.npz --key key.pem", "leave out --listen"),
        ("doctor --peer-sae bob", "--peer-sae requires --kme"),
        ("listen 0", "--cert and --key"),
        ("receive inbox", "--cert and --key"),
        ("listen 0 --cert cert.pem --key key.pem --require-client-cert", "add --ca"),
    ],
)
def test_what_is_missing_is_named_as_an_option(
    words: str,
    said: str,
    keys: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(keys)
    assert main(words.split()) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_numbers_have_a_type_with_plain_words(name: str) -> None:
    for parser in parsers(name):
        for action in parser._actions:
            assert action.type not in (int, float), action.option_strings or action.dest


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        *(
            (whole_number, text)
            for text in ("", "x", "1.5", "1e-3", "1e16", "1e400", "inf", "nan", "9" * 5000)
        ),
        *((number, text) for text in ("", "x", "1,5", "nan", "0x10")),
    ],
)
def test_a_wrong_number_in_plain_words(kind: Callable[[str], float], text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="number is needed, not '") as caught:
        kind(text)
    assert len(str(caught.value)) < 80


def test_a_whole_number_may_have_an_exponent() -> None:
    """The values of `qkd scan` may, so those of all options may."""
    for text in ("1e6", "1E6", "1000000", "1_000_000", "1.0e6", "1000000.0"):
        assert whole_number(text) == 1_000_000


def test_dev_up_replaces_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "alice").mkdir()
    (tmp_path / "alice" / "key.pem").write_text("the owner's")
    assert main(["kme", "dev-up", str(tmp_path), "--no-serve"]) == 1
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "alice" / "key.pem").read_text() == "the owner's"
    assert [one.name for one in tmp_path.iterdir()] == ["alice"]
