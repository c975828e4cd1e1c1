"""Progress of a transfer: bars on a terminal, one line per file elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

from hybridkex.apps.transfer import Progress
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
def showing(verb: str, on_wire: Callable[[], int], total: int | None = None) -> Iterator[Progress]:
    """Progress on standard error. ``on_wire`` counts the bytes of the connection, TLS included."""
    rich = _rich() if sys.stderr.isatty() else None
    if rich is None:
        yield _Lines(verb)
        return
    bars = _Bars(rich, verb, on_wire, total)
    with bars.live:
        yield bars


def _rich() -> ModuleType | None:
    try:
        import rich.progress  # noqa: PLC0415  # an extra
    except ModuleNotFoundError:
        return None
    return rich


class _Lines:
    """One line when a file has ended."""

    def __init__(self, verb: str) -> None:
        self._verb = verb
        self._begun: dict[str, tuple[float, int, int]] = {}

    def begin(self, name: str, size: int, done: int) -> None:
        self._begun[name] = time.monotonic(), size, done

    def advance(self, name: str, count: int) -> None:
        pass

    def end(self, name: str, outcome: str | None) -> None:
        begun = self._begun.pop(name, None)
        if outcome is not None:
            _say(f"hybridkex: {name}: {outcome}")
        elif begun is not None:
            start, size, done = begun
            speed = rate(size - done, time.monotonic() - start)
            again = f", of which {done:,} were already there" if done else ""
            _say(f"{self._verb} {name}: {size:,} bytes{again}, {speed}")

    def note(self, text: str) -> None:
        _say(f"hybridkex: {text}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class _Bars:
    """A bar for each file in transfer, and one for the total."""

    def __init__(
        self, rich: ModuleType, verb: str, on_wire: Callable[[], int], total: int | None
    ) -> None:
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
        self._tasks: dict[str, int] = {}
        # A receiver knows no total: only the bars of the files are shown.
        self._all = self.live.add_task("all", total=total, wire="") if total is not None else None

    def begin(self, name: str, size: int, done: int) -> None:
        self._lines.begin(name, size, done)
        short = name if len(name) <= 40 else f"…{name[-39:]}"
        self._tasks[name] = self.live.add_task(short, total=size, completed=done, wire="")
        if done and self._all is not None:
            self.live.advance(self._all, done)

    def advance(self, name: str, count: int) -> None:
        wire = f"wire {rate(self._on_wire(), time.monotonic() - self._started)}"
        self.live.update(self._tasks[name], advance=count, wire=wire)
        if self._all is not None:
            self.live.update(self._all, advance=count, wire=wire)

    def end(self, name: str, outcome: str | None) -> None:
        task = self._tasks.pop(name, None)
        if task is not None:
            self.live.remove_task(task)
        self._lines.end(name, outcome)  # rich prints this above the bars

    def note(self, text: str) -> None:
        self._lines.note(text)
