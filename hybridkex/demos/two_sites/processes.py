"""The programs that the demonstration starts and ends."""

import subprocess
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any, Final, TypeAlias

import trio

from hybridkex.errors import HybridkexError

_TIMEOUT: Final = 60.0

Finished: TypeAlias = subprocess.CompletedProcess[bytes]


class DemonstrationFailed(HybridkexError):
    """A step of the demonstration failed."""


@asynccontextmanager
async def running(command: list[str], **options: Any) -> AsyncIterator[trio.Process]:
    """Run a program until the end of the block."""
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, **options}
    async with trio.open_nursery() as nursery:
        run = partial(trio.run_process, command, stderr=subprocess.PIPE, check=False, **options)
        process: trio.Process = await nursery.start(run)
        yield process
        nursery.cancel_scope.cancel()


@contextmanager
def deadline(complaint: str) -> Iterator[None]:
    """Raises ``DemonstrationFailed`` when the block takes more than a minute."""
    try:
        with trio.fail_after(_TIMEOUT):
            yield
    except trio.TooSlowError:
        raise DemonstrationFailed(f"{complaint} within {_TIMEOUT:g} s") from None


async def lines(process: trio.Process) -> AsyncGenerator[str, None]:
    """The lines of a program's standard output. Raises ``DemonstrationFailed`` when it ends."""
    assert process.stdout is not None
    buffer = b""
    async for data in process.stdout:
        *whole, buffer = (buffer + data).split(b"\n")
        for line in whole:
            yield line.decode()
    raise failure(await finished(process))


async def finished(process: trio.Process) -> Finished:
    """Wait for the end of a program."""
    assert process.stderr is not None
    errors = b"".join([bytes(data) async for data in process.stderr])
    return Finished(process.args, await process.wait(), stderr=errors)


def failure(process: Finished) -> DemonstrationFailed:
    """The last line of a program's standard error, as an error."""
    said = process.stderr.decode(errors="replace").splitlines() or [
        f"{' '.join(process.args[2:4])} ended without a message, exit status {process.returncode}; "
        "check the limits of the shell (ulimit -a)"
    ]
    return DemonstrationFailed(said[-1].removeprefix("hybridkex: "))


async def contents(file: trio.Path, process: trio.Process) -> str:
    """Wait for a file that the program writes, and return its content."""
    while not await file.exists():
        if process.returncode is not None:
            raise failure(await finished(process))
        await trio.sleep(0.02)
    return await file.read_text()
