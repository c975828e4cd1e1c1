"""Peers that are commands: one process for each task."""

import re
import shutil
import subprocess
import sysconfig
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from interop.matrix.peer import Missing, PeerFailed

__all__ = ["Command", "find", "find_script", "key_log", "run", "running", "version_of"]


def find(name: str, package: str) -> str:
    """The path of a command.

    Raises:
        Missing: nowhere; ``package`` is how to get it.
    """
    path = shutil.which(name)
    if path is None:
        raise Missing(package)
    return path


def find_script(name: str, package: str) -> str:
    """Where a command is that belongs to this Python, or to the machine.

    Raises:
        Missing: nowhere; ``package`` is how to get it.
    """
    beside = Path(sysconfig.get_path("scripts")) / name
    return str(beside) if beside.exists() else find(name, package)


async def run(
    command: Sequence[str], *, env: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[bytes]":
    """Run a command to its end, without input."""
    return await trio.run_process(
        command,
        stdin=subprocess.DEVNULL,
        capture_stdout=True,
        capture_stderr=True,
        check=False,
        env=env,
    )


def key_log(path: Path) -> list[tuple[str, ...]]:
    """The lines of a key log, connection by connection; each has a client random of its own."""
    lines = path.read_text().splitlines() if path.exists() else []
    by_random: dict[str, list[str]] = {}
    for line in lines:
        if line.count(" ") == 2:
            by_random.setdefault(line.split()[1], []).append(line)
    return [tuple(found) for found in by_random.values()]


async def version_of(*command: str) -> str:
    """Return the first version number in the output of a command."""
    said = (await run(command)).stdout.decode(errors="replace")
    found = re.search(r"\d+(\.\d+)+", said)
    return found[0] if found else said.strip()


class Command:
    """A running command whose output can be waited for."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self.output = bytearray()
        self._news = trio.Event()
        self.ended = False

    @property
    def stdin(self) -> trio.abc.SendStream:
        assert self._process.stdin is not None
        return self._process.stdin

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for data in self._process.stdout:
            self.output += data
            self._news.set()
            self._news = trio.Event()
        self.ended = True
        self._news.set()

    async def until(self, pattern: bytes, *, times: int = 1) -> "re.Match[bytes]":
        """Wait until a pattern has occurred so many times; returns the last match.

        Raises:
            PeerFailed: the command ended without.
        """
        found, start = None, 0
        while times:
            found = re.compile(pattern).search(self.output, start)
            if found is not None:
                times, start = times - 1, found.end()
            elif self.ended:
                raise PeerFailed(self.output[-600:].decode(errors="replace"))
            else:
                await self._news.wait()
        assert found is not None
        return found

    def terminate(self) -> None:
        """Send SIGTERM."""
        self._process.terminate()

    async def end(self) -> None:
        """Wait for the end of its output."""
        while not self.ended:
            await self._news.wait()


@asynccontextmanager
async def running(
    command: Sequence[str], *, env: Mapping[str, str] | None = None
) -> AsyncIterator[Command]:
    """Start a command; it is killed at the end if it has not ended."""
    process = await trio.lowlevel.open_process(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env
    )
    try:
        started = Command(process)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(started._read)
            yield started
            nursery.cancel_scope.cancel()
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    await trio.aclose_forcefully(pipe)
