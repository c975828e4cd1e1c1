"""curl, with the distribution's OpenSSL."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import trio

from interop.matrix.peer import Peer, PeerFailed, Running
from interop.matrix.peers.commands import find, key_log, run
from interop.matrix.peers.openssl import openssl_group
from interop.matrix.peers.reasons import NO_HYBRIDS, NO_MLDSA, OVER_HTTP
from interop.matrix.task import Report, Task, digest, text

__all__ = ["PEER"]


class _Curl:
    def __init__(self, path: str, version: str) -> None:
        self._path = path
        self.version = version

    async def connect(self, task: Task) -> list[Report]:
        with TemporaryDirectory(prefix="interop-") as name:
            return await self._fetch(task, Path(name))

    async def _fetch(self, task: Task, folder: Path) -> list[Report]:
        said, keys = folder / "said", folder / "keys"
        said.write_bytes(text(task.role, task.size))
        command = [self._path]
        for number in range(task.connections):
            command += ["--next"] if number else []
            command += [*self._options(task), "--data-binary", f"@{said}"]
            command += ["-o", str(folder / str(number))]
            command += [f"https://{task.server_name}:{task.port}/"]
        done = await run(command, env=os.environ | {"SSLKEYLOGFILE": str(keys)})
        if done.returncode != 0:
            raise PeerFailed(done.stderr.decode(errors="replace").strip())
        logs = key_log(keys)
        if len(logs) != task.connections:
            raise PeerFailed(f"{len(logs)} connections of {task.connections}")
        return [
            Report(received=digest((folder / str(number)).read_bytes()), key_log=log)
            for number, log in enumerate(logs)
        ]

    def _options(self, task: Task) -> list[str]:
        where = f"{task.server_name}:{task.port}:127.0.0.1"
        options = [
            "-sS",
            "--noproxy",
            "*",
            "--tlsv1.3",
            "--cacert",
            task.ca or "",
            "--resolve",
            where,
        ]
        if not task.alpn:
            options += ["--http1.1"]
        if task.groups:
            options += ["--curves", ":".join(map(openssl_group, task.groups))]
        if task.suites:
            options += ["--tls13-ciphers", ":".join(task.suites)]
        if task.own is not None:
            options += ["--cert", task.own.chain, "--key", task.own.key]
        return options

    async def serve(
        self, task: Task, *, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED
    ) -> list[Report]:
        raise PeerFailed("curl is a client")


@asynccontextmanager
async def _open() -> AsyncIterator[Running]:
    path = find("curl", "apt-get install curl")
    words = (await run([path, "--version"])).stdout.decode().split()
    library = next((word for word in words if word.startswith("OpenSSL/")), words[3])
    yield _Curl(path, f"{words[1]}, {library.replace('/', ' ')}")


PEER: Final = Peer(
    name="curl",
    open=_open,
    http=True,
    note="over HTTP",
    lacks={"server *": "a client alone"} | NO_HYBRIDS | NO_MLDSA | OVER_HTTP,
)
