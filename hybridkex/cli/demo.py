"""``hybridkex demo``: a real file between two processes, and what the channel's keys rest on."""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cryptography.hazmat.bindings import _rust

from hybridkex.auth.dev_ca import DevCa, write_identity
from hybridkex.errors import ConfigError, HybridkexError

__all__ = ["configure", "run"]

_TIMEOUT = 60.0


class DemoFailed(HybridkexError):
    """A step of the demonstration did not work."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "file",
        nargs="?",
        metavar="FILE",
        help="what to send; by default the largest library that hybridkex uses",
    )


def run(args: argparse.Namespace) -> int:
    """Run it; 0 when the file arrived whole."""
    source = Path(args.file or _rust.__file__).resolve()
    try:
        size = source.stat().st_size
    except OSError as error:
        raise ConfigError(f"cannot read {source}: {error.strerror}") from None
    with tempfile.TemporaryDirectory(prefix="hybridkex-demo-") as name:
        folder = Path(name)
        authority = DevCa.create()
        write_identity(folder / "bob", authority, authority.issue("localhost", "127.0.0.1"))
        write_identity(folder / "alice", authority, authority.issue("alice"))
        print("two parties, each with a certificate of a development authority")
        target = folder / "received"
        seconds, session = _transfer(folder, source, target)
        if _digest(source) != _digest(target):
            raise DemoFailed("the file that arrived is not the file that was sent")
        print(f"{source.name}, {size:,} bytes, crossed in {seconds:.2f} s (start-up included)")
        print(f"SHA-256 of both ends: {_digest(target)}")
    print("what the keys rest on:")
    for leg in session["parts"]:
        print(f"  - {leg}")
    print(f"suite {session['cipher_suite']}, group {session['group']}")
    print(f"authentication: {session['auth']}, {session['signature_scheme']}, both ways")
    return 0


def _transfer(folder: Path, source: Path, target: Path) -> tuple[float, dict[str, list[str]]]:
    """Run ``listen`` and ``connect`` as two processes."""
    port_file = folder / "port"
    bob, alice = folder / "bob", folder / "alice"
    command = [sys.executable, "-m", "hybridkex"]
    listen = [*command, "listen", "0", "--bind", "127.0.0.1", "--once", "--port-file"]
    listen += [str(port_file), "--require-client-cert", *_credentials(bob)]
    started = time.monotonic()
    with target.open("wb") as sink, source.open("rb") as file:
        receiver = subprocess.Popen(
            listen, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.PIPE
        )
        try:
            port = _wait_for_port(port_file, receiver)
            sender = subprocess.run(
                [*command, "connect", "localhost", port, "--json", *_credentials(alice)],
                stdin=file,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=_TIMEOUT,
                check=False,
            )
            complaint = receiver.communicate(timeout=_TIMEOUT)[1]
        except subprocess.TimeoutExpired:
            raise DemoFailed(f"no end after {_TIMEOUT:g} s") from None
        finally:
            receiver.kill()
            receiver.wait()
    if sender.returncode or receiver.returncode:
        raise DemoFailed((sender.stderr + complaint).decode(errors="replace").strip())
    return time.monotonic() - started, json.loads(sender.stderr.splitlines()[0])


def _credentials(folder: Path) -> list[str]:
    return [
        word
        for option in ("ca", "cert", "key")
        for word in (f"--{option}", str(folder / f"{option}.pem"))
    ]


def _wait_for_port(path: Path, process: "subprocess.Popen[bytes]") -> str:
    deadline = time.monotonic() + _TIMEOUT
    while not path.exists():
        if process.poll() is not None:
            assert process.stderr is not None
            raise DemoFailed(process.stderr.read().decode(errors="replace").strip())
        if time.monotonic() > deadline:
            raise DemoFailed("the listener did not open its port")
        time.sleep(0.02)
    return path.read_text().strip()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
