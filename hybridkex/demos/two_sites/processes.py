"""The programs that the demonstration starts and ends."""

import subprocess
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any, Final

import trio

from hybridkex.errors import HybridkexError

_TIMEOUT: Final = 60.0


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
    raise DemonstrationFailed(said_last(await all_errors(process)))


async def all_errors(process: trio.Process) -> bytes:
    """A program's standard error, up to its end."""
    assert process.stderr is not None
    return b"".join([bytes(data) async for data in process.stderr])


def said_last(errors: bytes) -> str:
    """The last line of a program's standard error, as an error message."""
    whole = errors.decode(errors="replace").splitlines() or ["a program ended without a message"]
    return whole[-1].removeprefix("hybridkex: ")


async def contents(file: trio.Path, process: trio.Process) -> str:
    """Wait for a file that the program writes, and return its content."""
    while not await file.exists():
        if process.returncode is not None:
            raise DemonstrationFailed(said_last(await all_errors(process)))
        await trio.sleep(0.02)
    return await file.read_text()
