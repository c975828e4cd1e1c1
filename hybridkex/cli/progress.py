"""Progress of a transfer: bars on a terminal, one line per file elsewhere."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

from hybridkex.apps.transfer import Progress
from hybridkex.apps.transfer.names import shown
from hybridkex.apps.transfer.progress import File
from hybridkex.errors import ConfigError
from hybridkex.text import terminal


def rate(count: float, seconds: float) -> str:
    """A human-readable rate in bytes per second."""
    value = count / max(seconds, 1e-9)
    for unit in ("B/s", "kB/s", "MB/s"):
        if value < 1000:
            return f"{value:.0f} {unit}"
        value /= 1000
    return f"{value:.2f} GB/s"


@contextmanager
def showing(
    verb: str, on_wire: Callable[[], int], count: Callable[[], int] | None = None
) -> Iterator[Progress]:
    """Progress on standard error.

    Args:
        verb: ``sent`` or ``received``.
        on_wire: counts the bytes of the connection, TLS included.
        count: adds up the bytes of all files, which may take a while; it is called in a thread, and
            only if there is a bar to show them.
    """
    rich = _rich() if sys.stderr.isatty() else None
    if rich is None:
        yield _Lines(verb)
        return
    bars = _Bars(rich, verb, on_wire)
    if count is not None:
        with contextlib.suppress(RuntimeError, MemoryError):  # no thread: a bar without an end
            threading.Thread(target=bars.expect, args=(count,), daemon=True).start()
    with bars.live:
        yield bars


def _rich() -> ModuleType | None:
    try:
        import rich.progress  # noqa: PLC0415  # an extra
    except ModuleNotFoundError:
        return None
    return rich


class _Lines(Progress):
    """Prints one line when a file has ended."""

    def __init__(self, verb: str) -> None:
        self._verb = verb
        self._begun: dict[int, tuple[File, float, int]] = {}

    def begin(self, file: File, done: int) -> None:
        self._begun[id(file)] = file, time.monotonic(), done

    def end(self, file: File, outcome: str | None) -> None:
        begun = self._begun.pop(id(file), None)
        if outcome is not None:
            _print_line(f"hybridkex: {shown(file.path)}: {outcome}")
        elif begun is not None:
            _, start, done = begun
            speed = rate(file.size - done, time.monotonic() - start)
            again = f", of which {done:,} were already there" if done else ""
            _print_line(f"{self._verb} {shown(file.path)}: {file.size:,} bytes{again}, {speed}")

    def stored(self, files: Sequence[File]) -> None:
        _print_line(
            "\n".join(f"{self._verb} {shown(one.path)}: {one.size:,} bytes" for one in files)
        )

    def note(self, text: str) -> None:
        _print_line(f"hybridkex: {text}")


def _print_line(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class _Bars(Progress):
    """A bar for each file in transfer, and one for the total."""

    def __init__(self, rich: ModuleType, verb: str, on_wire: Callable[[], int]) -> None:
        progress = rich.progress
        self.live = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            progress.TextColumn("{task.fields[wire]}", markup=False),
            progress.TimeRemainingColumn(),
            console=rich.console.Console(file=terminal(sys.stderr)),
        )
        self._lines = _Lines(verb)
        self._on_wire = on_wire
        self._started = time.monotonic()
        self._tasks: dict[int, int] = {}
        self._all = self.live.add_task("all", total=None, wire="")

    def begin(self, file: File, done: int) -> None:
        self._lines.begin(file, done)
        if id(file) in self._tasks:  # on another connection, which broke
            self.live.remove_task(self._tasks[id(file)])
        name = shown(file.path)
        short = name if len(name) <= 40 else f"…{name[-39:]}"
        self._tasks[id(file)] = self.live.add_task(short, total=file.size, completed=done, wire="")
        self.live.advance(self._all, done)

    def advance(self, file: File, count: int) -> None:
        wire = self._wire()
        for task in (self._tasks.get(id(file)), self._all):
            if task is not None:  # it ends while its last data are still being sent
                self.live.update(task, advance=count, wire=wire)

    def _wire(self) -> str:
        return f"wire {rate(self._on_wire(), time.monotonic() - self._started)}"

    def expect(self, count: Callable[[], int]) -> None:
        """Count the bytes of all files, for a bar that has an end."""
        with contextlib.suppress(ConfigError):  # told where the files are collected
            self.live.update(self._all, total=count())

    def end(self, file: File, outcome: str | None) -> None:
        task = self._tasks.pop(id(file), None)
        if task is not None:
            self.live.remove_task(task)
        self._lines.end(file, outcome)  # rich prints this above the bars

    def stored(self, files: Sequence[File]) -> None:
        self.live.update(self._all, advance=sum(one.size for one in files), wire=self._wire())
        self._lines.stored(files)

    def note(self, text: str) -> None:
        self._lines.note(text)
