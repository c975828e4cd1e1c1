"""The distribution's ``openssl s_client`` and ``s_server``."""

import array
import fcntl
import re
import termios
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import trio

from interop.matrix.peer import Peer, Running
from interop.matrix.peers.commands import Command, find, key_log, run, running
from interop.matrix.peers.reasons import IMPORT, NO_HYBRIDS, NO_MLDSA
from interop.matrix.task import Material, Report, Role, Task, digest, text

__all__ = ["PEER", "openssl_group"]


def openssl_group(name: str) -> str:
    """OpenSSL's name of a group."""
    return {"x25519": "X25519", "secp256r1": "P-256", "secp384r1": "P-384"}.get(name, name)


class _OpenSsl:
    def __init__(self, path: str, version: str) -> None:
        self._path = path
        self.version = version

    async def connect(self, task: Task) -> list[Report]:
        with TemporaryDirectory(prefix="interop-") as name:
            return [await self._one(task, Path(name), number) for number in range(task.connections)]

    async def _one(self, task: Task, folder: Path, number: int) -> Report:
        keys, session = folder / f"keys{number}", str(folder / "session")
        command = [self._path, "s_client", "-connect", f"127.0.0.1:{task.port}"]
        command += _options(task, keys)
        command += ["-noservername"] if task.psk else ["-servername", task.server_name or ""]
        if task.psk is None:
            command += ["-verify_return_error", "-verify_hostname", task.server_name or ""]
        if task.alpn:
            command += ["-alpn", ",".join(task.alpn)]
        if task.connections > 1:
            command += ["-sess_in" if number else "-sess_out", session]
        async with running(command) as client:
            received = await _talk(client, task, "server", 1)
            await client.stdin.aclose()
            await client.end()
            said = bytes(client.output)
        return _report(task, said, received, key_log(keys)[0])

    async def serve(
        self, task: Task, *, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED
    ) -> list[Report]:
        with TemporaryDirectory(prefix="interop-") as name:
            keys = Path(name) / "keys"
            command = [self._path, "s_server", "-accept", "127.0.0.1:0"]
            command += ["-naccept", str(task.connections), *_options(task, keys)]
            if task.other is not None:
                command += ["-servername", task.other.name, "-cert2", task.other.chain]
                command += ["-key2", task.other.key]
            if task.ca is not None:
                command += ["-Verify", "3", "-verify_return_error"]
            if task.alpn:
                command += ["-alpn", ",".join(task.alpn)]
            if task.psk is not None:
                command += ["-nocert"]
            async with running(command) as server:
                port = await server.until(rb"ACCEPT 127\.0\.0\.1:(\d+)\n")
                task_status.started(int(port[1]))
                reports = []
                for number in range(1, task.connections + 1):
                    start = len(server.output)
                    received = await _talk(server, task, "client", number)
                    await server.until(b"CONNECTION CLOSED", times=number)
                    told = bytes(server.output[start:])
                    # For its second certificate, s_server logs nothing.
                    log = key_log(keys)[number - 1 : number]
                    reports.append(_report(task, told, received, log[0] if log else None))
        return reports


async def _talk(command: Command, task: Task, other: Role, number: int) -> bytes:
    """Return the text of the other end, which the command mixes with its own output."""
    # Both commands say this when the handshake is done.
    await command.until(rb"Secure Renegotiation IS|This TLS version forbids", times=number)
    if task.first in (None, task.role):
        await _speak(command, task)
    size = len(f"{other} {0:08d}\n")
    pattern = rf"{other} \d{{8}}\n".encode()
    lines = task.size // size
    await command.until(pattern, times=lines * number)
    found = re.findall(pattern, bytes(command.output))
    if task.first not in (None, task.role):
        await _speak(command, task)
    return b"".join(found[lines * (number - 1) :])


async def _speak(command: Command, task: Task) -> None:
    said = text(task.role, task.size)
    half = len(said) // 2
    if task.update:
        await command.stdin.send_all(said[:half])
        await _taken(command)
        await command.stdin.send_all(b"K\n")  # At the start of what it reads, it is a command.
        await _taken(command)
        said = said[half:]
    await command.stdin.send_all(said)


async def _taken(command: Command) -> None:
    """Wait until the command has read all that was written to it."""
    pipe = command.stdin.fileno()  # type: ignore[attr-defined]
    waiting = array.array("i", [1])
    while waiting[0]:
        await trio.sleep(0.01)
        fcntl.ioctl(pipe, termios.FIONREAD, waiting)


def _options(task: Task, keys: Path) -> list[str]:
    options = ["-tls1_3", "-keylogfile", str(keys)]
    options += ["-keymatexport", task.exporter, "-keymatexportlen", "32"]
    if task.groups:
        options += ["-groups", ":".join(map(openssl_group, task.groups))]
    if task.suites:
        options += ["-ciphersuites", ":".join(task.suites)]
    if task.own is not None:
        options += _shown(task.own)
    if task.ca is not None:
        options += ["-CAfile", task.ca]
    if task.psk is not None:
        options += ["-psk", task.psk.key, "-psk_identity", task.psk.identity]
        options += [] if task.suites else ["-ciphersuites", "TLS_AES_128_GCM_SHA256"]
    return options


def _shown(own: Material) -> list[str]:
    return ["-cert", own.chain, "-key", own.key]


def _report(task: Task, said: bytes, received: bytes, log: tuple[str, ...] | None) -> Report:
    told = said.decode(errors="replace")

    def find_in(pattern: str) -> str | None:
        found = re.search(pattern, told)
        return found[1] if found else None

    exporter = find_in(r"Keying material: ([0-9A-F]+)")
    # An external PSK counts as a session.
    resumed = None if task.psk else find_in(r"(?m)^(New|Reused), TLSv1\.3")
    return Report(
        suite=find_in(r"(?:Cipher is|CIPHER is) (TLS_\w+)"),
        alpn=find_in(r"ALPN protocol(?:s selected)?: (\S+)"),
        resumed=None if resumed is None else resumed == "Reused",
        exporter=exporter and exporter.lower(),
        key_log=log,
        received=digest(received),
    )


@asynccontextmanager
async def _open() -> AsyncIterator[Running]:
    path = find("openssl", "apt-get install openssl")
    version = (await run([path, "version"])).stdout.decode().split()[1]
    yield _OpenSsl(path, version)


PEER: Final = Peer(
    name="openssl",
    open=_open,
    lacks=NO_HYBRIDS
    | NO_MLDSA
    | {
        "* half-close": "s_client and s_server end both directions",
        "* speaking after our close_notify": "s_client and s_server end both directions",
    }
    | IMPORT,
)
