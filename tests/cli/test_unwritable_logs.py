"""A log, a key log or standard error that cannot be written ends nothing."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
from forked import Forkserver
from waiting import until


@contextlib.contextmanager
def no_reader() -> Iterator[IO[bytes]]:
    """A pipe whose reader has gone."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        yield pipe


@contextlib.contextmanager
def full() -> Iterator[IO[bytes]]:
    """A file on a file system without room."""
    with Path("/dev/full").open("wb") as file:
        yield file


@pytest.mark.parametrize("broken", [no_reader, full], ids=["EPIPE", "ENOSPC"])
@pytest.mark.parametrize("level", ["warning", "debug"])
def test_standard_error(
    hybridkex: Forkserver,
    tmp_path: Path,
    keys: Path,
    broken: type[contextlib.AbstractContextManager[IO[bytes]]],
    level: str,
) -> None:
    """Clients that fail their handshake and clients that do not, again and again."""
    port_file = tmp_path / "port"
    with broken() as stderr:
        server = hybridkex.start(
            *("listen", "0", "--echo", "--port-file", port_file, "--log-level", level),
            *("--cert", keys / "cert.pem", "--key", keys / "key.pem", "--keylog", "/dev/full"),
            stderr=stderr,
            to_the_end=True,
        )
        until(lambda: port_file.exists() and port_file.read_text())
        port = port_file.read_text().strip()
        connect = ("connect", "localhost", port)
        for _ in range(2):
            bad = hybridkex.run(*connect)
            assert bad.returncode == 1
            done = hybridkex.run(*connect, "--ca", keys / "ca.pem", data=b"x")
            assert (done.returncode, done.stdout) == (0, b"x"), done.stderr
            assert server.poll() is None
        server.kill()


@pytest.mark.parametrize("broken", [no_reader, full], ids=["EPIPE", "ENOSPC"])
def test_the_status_is_that_of_the_work(
    hybridkex: Forkserver,
    tmp_path: Path,
    keys: Path,
    broken: type[contextlib.AbstractContextManager[IO[bytes]]],
) -> None:
    words = ("--cert", keys / "cert.pem", "--key", keys / "key.pem", "--echo")
    with hybridkex.listening(tmp_path, *words) as (port, _), broken() as stderr:
        connect = ("connect", "localhost", port)
        done = hybridkex.run(
            *connect, "--ca", keys / "ca.pem", data=b"x", stderr=stderr, to_the_end=True
        )
        assert (done.returncode, done.stdout) == (0, b"x")
        assert hybridkex.run(*connect, stderr=stderr, to_the_end=True).returncode == 1


def test_a_closed_standard_error_is_no_other_file(tmp_path: Path, keys: Path) -> None:
    """With descriptor 2 closed, the next file that is opened must not get the messages."""
    script = tmp_path / "script"
    script.write_text('exec "$@" 2>&- </dev/null\n')
    key_log = tmp_path / "keylog"
    done = subprocess.run(
        [
            *("sh", script, sys.executable, "-m", "hybridkex", "connect", "localhost", "1"),
            *("--keylog", key_log, "--ca", keys / "ca.pem"),
        ],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == b""
    assert key_log.read_bytes() == b""
