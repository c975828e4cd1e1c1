"""``wg-psk --json``: rotations go on when nobody reads the lines any more."""

import fcntl
import io
import logging
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hybridkex.cli.actions.wg_psk import _report
from hybridkex.cli.arguments import from_namespace
from hybridkex.cli.commands import command_parser
from hybridkex.cli.wg_psk import WgPskOptions
from hybridkex.qkd.store import write_key_file

WORDS = [
    "--listen",
    "0",
    "--interface",
    "wg0",
    "--peer-key",
    "KEY",
    "--local",
    "b",
    "--peer",
    "a",
    "--psk-file",
    "psk",
    "--json",
]


def options() -> WgPskOptions:
    return from_namespace(WgPskOptions, command_parser("wg-psk").parse_args(WORDS))


def test_the_reader_has_gone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reader, writer = os.pipe()
    with os.fdopen(reader), os.fdopen(writer, "w") as output:
        monkeypatch.setattr("sys.stdout", output)
        _report(options(), "rotated")
        assert b'"rotated"' in os.read(reader, 1000)
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as output:
        monkeypatch.setattr("sys.stdout", output)
        with caplog.at_level(logging.WARNING, "hybridkex"):
            for _ in range(3):
                _report(options(), "rotated")
    assert [record.getMessage() for record in caplog.records] == [
        "the reader of standard output has closed it: no more JSON lines; rotations continue"
    ]


def test_the_reader_has_stopped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What it does not take is lost; rotations do not wait for it."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    with os.fdopen(reader), os.fdopen(writer, "w") as output:
        monkeypatch.setattr("sys.stdout", output)
        with caplog.at_level(logging.WARNING, "hybridkex"):
            for _ in range(100):
                _report(options(), "rotated")
        assert "cannot write a JSON line: the reader of standard output does not" in caplog.text
        os.read(reader, 1 << 16)
        _report(options(), "stopped")
        assert os.read(reader, 1 << 16).count(b'"stopped"') == 1


def test_the_disk_is_full_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with io.TextIOWrapper((tmp_path / "lines").open("wb")) as output:
        monkeypatch.setattr("sys.stdout", output)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
            with caplog.at_level(logging.WARNING, "hybridkex"):
                _report(options(), "rotated")
            assert "cannot write a JSON line" in caplog.text
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, old)
        _report(options(), "stopped")
    assert "stopped" in (tmp_path / "lines").read_text()


def test_nothing_stays_open_where_wg_fails(tmp_path: Path) -> None:
    """Python's development mode tells of a socket that nobody has closed."""
    write_key_file(tmp_path / "psk")
    words = ["127.0.0.1:0" if word == "0" else word for word in WORDS]
    words[words.index("KEY")] = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
    ended = subprocess.run(
        [sys.executable, "-X", "dev", "-m", "hybridkex", "wg-psk", *words, "--wg", "/bin/false"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert ended.returncode == 1
    assert ended.stderr.startswith("hybridkex: ")
    assert ended.stderr.count("\n") == 1, ended.stderr
