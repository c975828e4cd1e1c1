"""Processes in a folder of their own, and the checks on them."""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Final

from interop.forks import Forked, Forks

__all__ = ["Broken", "Process", "World", "until"]

PATIENCE: Final = 60.0
"""Seconds to wait for a condition; the machine may be busy."""
TOKEN: Final = "HYBRIDKEX_FAULTS"
LINES_PER_SECOND: Final = 40
"""Log lines that a process may write on average: a fault must not cause a flood."""
LINES_OF_RELOAD: Final = 4


@cache
def _forks() -> Forks:
    return Forks("interop.faults.launch")


class Broken(Exception):
    """A check failed: the service did not survive a fault."""


def until(condition: Callable[[], object], what: str, within: float = PATIENCE) -> None:
    """Wait for a condition; raises :class:`Broken`."""
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            raise Broken(f"{what}: not within {within:g} s")
        time.sleep(0.02)


@dataclass
class Process:
    """A process under test."""

    name: str
    running: Forked
    log: Path
    started: float = field(default_factory=time.monotonic)
    descriptors_before: int = 0
    lines_allowed: int = 100
    """Log lines that it may write in addition."""
    log_before: int = 0
    """Length of the log when it started, in bytes; an earlier process wrote these."""

    @property
    def pid(self) -> int:
        return self.running.pid

    def alive(self) -> bool:
        return self.running.poll() is None

    def descriptors(self) -> int:
        with contextlib.suppress(OSError):
            return len(os.listdir(f"/proc/{self.pid}/fd"))
        return 0

    def memory(self) -> int:
        """Size of its address space in bytes (proc(5), statm)."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[0])
        return pages * resource.getpagesize()

    def limit(self, kind: int, soft: int | None) -> None:
        """Set a soft limit of the running process; ``None`` sets it to the hard limit."""
        _, hard = resource.prlimit(self.pid, kind)
        resource.prlimit(self.pid, kind, (hard if soft is None else soft, hard))

    def signal(self, number: int) -> None:
        if self.alive():
            self.running.send_signal(number)
            if number == signal.SIGHUP:  # its owner asks for these lines
                self.lines_allowed += LINES_OF_RELOAD

    def check_log(self) -> None:
        """Raises :class:`Broken` for a traceback or a flood."""
        with contextlib.suppress(FileNotFoundError):
            text = self.log.read_bytes()[self.log_before :].decode(errors="replace")
            for sign in ("Traceback", "internal error", "never awaited", "ResourceWarning"):
                if sign in text:
                    raise Broken(f"{self.name}: its log has {sign!r}:\n{text[-3000:]}")
            lines, seconds = text.count("\n"), time.monotonic() - self.started
            if lines > self.lines_allowed + LINES_PER_SECOND * seconds:
                raise Broken(f"{self.name}: {lines} log lines in {seconds:.0f} s")


class World:
    """A folder and the processes that use it; both end together.

    Args:
        folder: empty; everything that the processes write is inside.
    """

    def __init__(self, folder: Path) -> None:
        self.folder: Final = folder
        self.temporary: Final = folder / "temporary"
        self.temporary.mkdir(parents=True)
        self.at_end: Final = contextlib.ExitStack()
        """Contexts that end with the world."""
        self.logs: Final = folder / "logs"
        self.logs.mkdir()
        self.no_threads: Final = folder / "no-threads"
        """While this file exists, no process can start a thread."""
        self._clock = folder / "clock"
        self.processes: Final[list[Process]] = []
        self._environment = {"TMPDIR": str(self.temporary), TOKEN: str(folder)}

    def set_clock(self, ahead: float) -> None:
        """Let the clocks of all processes be so many seconds ahead."""
        new = self._clock.with_suffix(".new")
        new.write_text(str(ahead))
        new.replace(self._clock)

    def start(self, name: str, *words: object, module: str = "hybridkex") -> Process:
        """Start a command and write its standard error to a log."""
        log = self.logs / f"{name}.log"
        request = {
            "folder": str(self.folder),
            "environment": self._environment,
            "module": module,
            "words": list(map(str, words)),
        }
        with log.open("ab") as errors:
            before = errors.tell()
            running = _forks().start(request, errors)
        process = Process(name, running, log, log_before=before)
        self.processes.append(process)
        return process

    def end(self, process: Process, number: int = signal.SIGTERM) -> int:
        """End a process by a signal; raises :class:`Broken` if it does not end."""
        process.signal(signal.SIGCONT)
        process.signal(number)
        try:
            status = process.running.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise Broken(f"{process.name} does not end on signal {number}") from None
        finally:
            self.processes.remove(process)
        process.check_log()
        return status

    def left_over(self) -> list[str]:
        """Processes that carry our token, or run in our folder, although we did not start them."""
        known = {process.pid for process in self.processes}
        token, found = f"{TOKEN}={self.folder}".encode(), []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                # A program that was executed carries the token; what was forked has our folder.
                ours = token in (entry / "environ").read_bytes() or (
                    (entry / "cwd").readlink().is_relative_to(self.folder)
                )
                if ours and int(entry.name) not in known:
                    found.append((entry / "cmdline").read_text().replace("\0", " "))
        return found

    def check_nothing_left(self) -> None:
        """Raises :class:`Broken` for a process or a temporary file."""
        until(lambda: not self.left_over(), f"processes outlive their parent: {self.left_over()}")
        until(
            lambda: not any(self.temporary.iterdir()),
            f"temporary files are left: {list(self.temporary.rglob('*'))}",
        )

    def close(self) -> None:
        """Kill all remaining processes."""
        for process in self.processes:
            process.signal(signal.SIGKILL)
            process.signal(signal.SIGCONT)
            process.running.wait()
        self.processes.clear()
        self.at_end.close()
        shutil.rmtree(self.folder, ignore_errors=True)
