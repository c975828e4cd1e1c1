"""``--key`` without ``--cert``, and ``--known-peers``, as a person uses them."""

import subprocess
from pathlib import Path

from forked import Forkserver

from hybridkex.auth import RawIdentity


def test_first_use_then_known_then_somebody_else(hybridkex: Forkserver, tmp_path: Path) -> None:
    key, known = tmp_path / "key.pem", tmp_path / "known"
    key.write_bytes(RawIdentity.generate().to_pem())
    with hybridkex.listening(tmp_path, "--echo", "--key", key) as (port, _):

        def connect() -> "subprocess.CompletedProcess[bytes]":
            words = ("connect", "127.0.0.1", port, "--json", "--known-peers", known)
            return hybridkex.run(*words, data=b"hello")

        lock = tmp_path / ".known.lock"
        lock.mkdir()
        done = connect()
        assert (done.returncode, done.stdout) == (0, b"hello"), done.stderr
        assert b"hybridkex: WARNING: the key of 127.0.0.1 is not remembered: cannot" in done.stderr
        lock.rmdir()
        for expected in (b'"first use"', b'"known"'):
            done = connect()
            assert (done.returncode, done.stdout) == (0, b"hello"), done.stderr
            assert expected in done.stderr
            assert b"WARNING" not in done.stderr
        name, _ = known.read_text().split()
        known.write_text(f"{name} AAAA\n")
        done = connect()
        assert done.returncode == 1
        assert b"another key" in done.stderr
        assert b"Traceback" not in done.stderr
