"""``--key`` without ``--cert``, and ``--known-peers``, as a person uses them."""

import subprocess
import sys
import time
from pathlib import Path

from hybridkex.auth import RawIdentity

COMMAND = (sys.executable, "-m", "hybridkex")


def test_first_use_then_known_then_somebody_else(tmp_path: Path) -> None:
    key, known, port_file = tmp_path / "key.pem", tmp_path / "known", tmp_path / "port"
    key.write_bytes(RawIdentity.generate().to_pem())
    server = subprocess.Popen(
        [
            *COMMAND,
            "listen",
            "0",
            "--bind",
            "127.0.0.1",
            "--port-file",
            str(port_file),
            "--echo",
            "--key",
            str(key),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def connect() -> "subprocess.CompletedProcess[bytes]":
        words = ["connect", "127.0.0.1", port_file.read_text().strip(), "--json"]
        return subprocess.run(
            [*COMMAND, *words, "--known-peers", str(known)],
            input=b"hello",
            capture_output=True,
            timeout=30,
            check=False,
        )

    try:
        deadline = time.monotonic() + 20
        while not (port_file.exists() and port_file.read_text().strip()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
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
    finally:
        server.terminate()
        server.wait(timeout=10)
