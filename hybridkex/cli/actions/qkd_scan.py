"""``hybridkex qkd scan`` and ``plot``: key rates of links over their settings."""

import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, get_context
from multiprocessing.resource_tracker import ensure_running
from traceback import extract_tb
from typing import Any, Final

from rich.console import Console
from rich.progress import Progress

from hybridkex.cli.guarded import guarded_processes
from hybridkex.cli.logs import silenced
from hybridkex.cli.qkd_scan import PlotOptions, ScanOptions
from hybridkex.errors import ConfigError, LocalStateError
from hybridkex.files import reserve_file
from hybridkex.link.ranges import PICTURES, file_kind
from hybridkex.link.scan import ERROR, SUFFIXES, failed, grid, read_scan, scan, write_scan
from hybridkex.machine import writing
from hybridkex.text import printable, said

CONNECT_SECONDS: Final = 10
WORKER_SECONDS: Final = 5
"""Seconds after which it is said that a Dask cluster has no workers."""
MOST_VALUES: Final = 100_000
CORES: Final = os.cpu_count() or 1
TRACKER_IS_SILENT: Final = "ignore::UserWarning:multiprocessing.resource_tracker"
PER_CORE: Final = 4
"""Processes for each core, at most: each takes the memory of a block."""


def _value(text: str) -> Any:
    text = text.strip()
    known = {"none": None, "true": True, "false": False}
    if text.lower() in known:
        return known[text.lower()]
    if "/" in text:  # several numbers in one value, such as intensities
        return [_value(part) for part in text.split("/")]
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if number.is_integer() and math.isfinite(number) else number


def _values(text: str) -> tuple[str, list[Any]]:
    name, _, given = map(str.strip, text.partition("="))
    if not (name and given):
        raise ConfigError(f"--vary {text}: write NAME=VALUES")
    values: list[Any] = []
    for one in given.split(","):
        values += _range(text, one)
        if len(values) > MOST_VALUES:
            raise ConfigError(f"--vary {name} has more than {MOST_VALUES:,} values")
    return name, values


def _range(text: str, given: str) -> list[Any]:
    """The values of a part between commas: one, or those of FIRST:LAST:STEP."""
    parts = given.split(":")
    if len(parts) != 3:
        return [_value(given)]
    try:
        first, last, step = map(float, parts)
    except ValueError:
        raise ConfigError(f"--vary {text}: write FIRST:LAST:STEP with numbers") from None
    if not (step > 0.0 and last >= first and (last - first) / step < MOST_VALUES):
        raise ConfigError(f"--vary {text}: FIRST:LAST:STEP must ascend, in fewer than 1e5 steps")
    count = int((last - first) / step + 1e-9) + 1
    return [_value(repr(first + step * n)) for n in range(count)]


def run_scan(options: ScanOptions) -> int:
    file_kind(options.output, "a scan", SUFFIXES)
    if options.blocks < 0 or options.jobs < 0:
        raise ConfigError("--blocks and --jobs must not be negative")
    if options.jobs > PER_CORE * CORES:
        raise ConfigError(
            f"--jobs {options.jobs} is more than {PER_CORE} processes for each of this machine's "
            f"{CORES} cores: --jobs 0 starts one for each"
        )
    axes: dict[str, list[Any]] = {}
    for one in options.vary:
        name, values = _values(one)
        if name in axes:
            raise ConfigError(f"--vary {name} is given twice: write all of its values in one")
        axes[name] = values
    points = grid(axes)
    with writing(options.output), reserve_file(options.output, 1):
        pass  # a place that cannot be written to is better known before hours of work
    with _executor(options) as executor, _progress(len(points)) as progress:
        rows = scan(
            points, blocks=options.blocks, seed=options.seed, executor=executor, progress=progress
        )
    with writing(options.output):
        write_scan(options.output, rows)
    print(f"{options.output}: {len(rows)} rows")
    wrong = [row[ERROR] for row in rows if ERROR in row]
    if wrong:
        print(
            "hybridkex: rows without a result, because their settings are impossible: "
            f"{len(wrong)}; the column {ERROR!r} says why. The first: {printable(wrong[0])}",
            file=sys.stderr,
        )
    return 0


@contextmanager
def _executor(options: ScanOptions) -> Iterator[Executor | None]:
    if options.dask is not None:
        with dask_executor(options.dask) as executor:
            yield executor
    elif options.jobs == 1:
        yield None
    else:
        count = options.jobs or CORES
        _begin_tracking()  # before the guard, which would end it: it ends with its last user
        with (
            guarded_processes(),
            ProcessPoolExecutor(
                count,
                mp_context=get_context("spawn"),
                initializer=signal.signal,
                initargs=(signal.SIGINT, signal.SIG_IGN),  # Ctrl-C is for this process to handle
            ) as pool,
        ):
            try:
                yield pool
            except BrokenProcessPool:
                raise LocalStateError(
                    "something ended a process of the scan, perhaps the system, for lack of "
                    "memory (see dmesg); nothing is written. Try again with fewer --jobs"
                ) from None
            except BaseException:
                for worker in active_children():
                    worker.kill()  # otherwise the pool waits until it has finished its point
                raise


def _begin_tracking() -> None:
    """Start multiprocessing's resource tracker.

    It removes what a killed scan has left, and would warn of it on our standard error.
    """
    sys.warnoptions.append(TRACKER_IS_SILENT)  # it takes our options
    try:
        ensure_running()
    finally:
        sys.warnoptions.remove(TRACKER_IS_SILENT)


@contextmanager
def dask_executor(address: str) -> Iterator[Executor]:
    """An executor on a Dask cluster; the tasks of a worker that dies are repeated."""
    try:
        from distributed import Client, KilledWorker  # noqa: PLC0415  # an extra
        from distributed.comm.core import CommClosedError  # noqa: PLC0415
    except ModuleNotFoundError:
        raise ConfigError("this needs Dask: pip install 'hybridkex[dask]'") from None
    try:
        client: Any = Client(address, timeout=CONNECT_SECONDS)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, TimeoutError) as error:
        raise ConfigError(f"cannot reach the Dask cluster at {address}: {said(error)}") from None
    with silenced("distributed.client"), client:
        try:
            client.wait_for_workers(1, timeout=WORKER_SECONDS)
        except TimeoutError:  # an adaptive cluster starts them when it has work
            print(
                f"hybridkex: the Dask cluster at {address} has no workers, and the scan waits for "
                f"them: start one with dask worker {address}",
                file=sys.stderr,
            )
        try:
            yield client.get_executor(retries=3)
        except (CancelledError, CommClosedError, KilledWorker, ValueError) as error:
            # The scheduler cancels what it loses; a worker's own errors are not of these types. At
            # some of these tasks Dask's own conversion of errors fails.
            at = extract_tb(error.__traceback__)[-1].name
            if isinstance(error, ValueError) and at != "_cascade_future":
                raise
            raise LocalStateError(
                f"the Dask cluster at {address} lost the scan ({type(error).__name__}): check that "
                "its scheduler and its workers are alive; nothing is written"
            ) from None


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None] | None]:
    if not sys.stderr.isatty():
        yield None
        return
    with Progress(console=Console(file=sys.stderr)) as bars:
        task = bars.add_task("points", total=total)
        yield lambda done: bars.update(task, completed=done)


def plot(options: PlotOptions) -> int:
    if options.scan is None and (options.x or options.y or options.by):
        raise ConfigError("--x, --y and --by require --scan")
    if options.kind is None and (options.preset or options.block_bits):
        raise ConfigError("--preset and --block-bits require --kind")
    if options.kind != "qber" and options.distance is not None:
        raise ConfigError("--distance requires --kind qber: other pictures end where the key ends")
    if options.kind != "finite-key" and len(options.block_bits or ()) > 1:
        raise ConfigError("only --kind finite-key takes several --block-bits")
    file_kind(options.output, "a picture", PICTURES)
    try:
        from hybridkex.link.plots import draw, plot_scan, save  # noqa: PLC0415  # an extra
    except ModuleNotFoundError as missing:
        if missing.name != "matplotlib":
            raise
        raise ConfigError("this needs matplotlib: pip install 'hybridkex[plot]'") from None
    rows = [] if options.scan is None else read_scan(options.scan)
    wrong = [row[ERROR] for row in rows if failed(row)]
    if options.scan is not None:
        figure, _ = plot_scan(
            rows,
            x=options.x or "distance_km",
            y=options.y or "rate",
            by=options.by,
        )
    else:
        figure, _ = draw(
            options.kind or "",  # --scan or --kind is required
            presets=options.preset,
            distance_km=200.0 if options.distance is None else options.distance,
            block_bits=options.block_bits,
        )
    with writing(options.output):
        save(figure, options.output)
    print(options.output)
    if wrong:
        print(
            "hybridkex: rows with an error in place of results, which are not drawn: "
            f"{len(wrong)}. The first error: {printable(wrong[0])}",
            file=sys.stderr,
        )
    return 0
