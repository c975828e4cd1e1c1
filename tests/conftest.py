"""What holds for all tests, and what several folders share."""

import asyncio
import fcntl
import gc
import logging
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from forked import Forkserver
from hypothesis import settings

from hybridkex.auth.dev_ca import DevCa, write_identity
from hybridkex.qkd import sqlite_file

_BOUNDED = [f"hybridkex.{name}" for name in ("aio.channel", "anyio", "net.http")]
_BOUNDED += ["hybridkex.shell.key_renewer", "hybridkex.shell.pad_filler"]
"""The modules with a bound for the log lines of the process."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--thorough",
        action="store_true",
        help="try every member where a test else tries a sample (takes hours)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        config.add_cleanup(_compile_ahead())
    # Hypothesis measures 200 ms by the wall clock, which other work on the machine uses up.
    # What stands in the way of a change must fail for the change, not for the examples of the day.
    settings.register_profile(
        "hybridkex", deadline=None, derandomize=not config.getoption("--thorough")
    )
    settings.load_profile("hybridkex")
    _heed_signals()
    _keep_bytecode()
    _leave_data_to_the_system()
    # In debug mode, asyncio keeps the last calls before each callback, for its messages: ten take
    # a sixth of the time of a test.
    asyncio.constants.DEBUG_STACK_DEPTH = 1  # type: ignore[misc]


def _compile_ahead() -> Callable[[], object]:
    """Begin to compile for numba while the processes that run the tests start. In a fresh checkout,
    each process that needs this code before it is on disk compiles it for itself, for 6 s.

    Returns what waits for the end."""
    root = Path(__file__).parents[1]
    version = "".join(map(str, sys.version_info[:2]))
    if any(root.glob(f"hybridkex/link/__pycache__/*.py{version}.nbi")):
        return lambda: None
    command = [sys.executable, str(root / "tests/link/compile_ahead.py")]
    where = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.Popen(command, env=where, stderr=subprocess.DEVNULL).wait


def _keep_bytecode() -> None:
    """An image of Python often forbids it, and then each process compiles anew all that it imports:
    each of those that run the tests, and each of the hundreds that tests start."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False


def _leave_data_to_the_system() -> None:
    """What a process wrote survives its end. A flush to disk is for the end of the machine, which
    no test brings about, and it waits for all that others write there."""

    def check_only(file: Any) -> None:
        os.fstat(file)

    os.fsync = check_only
    sqlite_file.SYNCHRONOUS = "OFF"  # type: ignore[misc]


def _heed_signals() -> None:
    """A shell that starts pytest in the background lets it, and all that it starts, ignore some
    signals. Tests send them."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_IGN:
            is_interrupt = number == signal.SIGINT
            signal.signal(number, signal.default_int_handler if is_interrupt else signal.SIG_DFL)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Tests that are being collected leave no garbage, and looking for it takes a sixth of the
    time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Where several processes begin together, the first one compiles a file for the others."""
    if not isinstance(collector, pytest.Module):
        return (yield)
    with collector.path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no process is left alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """The modules and the items stay to the end. Without them, a test that collects garbage does so
    in a millisecond, not in 200."""
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, object, object]:
    """So does what is left behind a file's tests: modules that they imported, caches, reports."""
    result = yield
    if nextitem is not None and nextitem.path != item.path:
        gc.collect()
        gc.freeze()
    return result


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Twice as many processes as there are cores: many tests wait for time or for other
    processes."""
    return 2 * len(os.sched_getaffinity(0))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Each process takes the tests of a file together, as long as none is idle: what a file or a
    session sets up once is then set up by one process, mostly."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.getoption("dist") == "load" else None


@pytest.fixture(scope="session")
def thorough(request: pytest.FixtureRequest) -> bool:
    """Whether a test tries every member of its kind, not a sample."""
    return bool(request.config.getoption("--thorough"))


@pytest.fixture
def no_log() -> Iterator[None]:
    """No log lines: pytest keeps each of them, which a test that measures memory would see."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(autouse=True)
def _same_draws_in_each_run(request: pytest.FixtureRequest) -> None:
    """The module's generator, which many tests draw from, begins with the name of the test."""
    random.seed(request.node.nodeid)


@pytest.fixture(autouse=True)
def _log_as_it_was() -> Iterator[None]:
    """A command that a test runs in this process sets up the library's log for the process."""
    logger = logging.getLogger("hybridkex")
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    for name in _BOUNDED:
        if name in sys.modules:  # or earlier tests have used its lines up
            sys.modules[name]._LINES._buckets.clear()
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)
    logger.propagate = propagate


@pytest.fixture(scope="session")
def forkserver() -> Iterator[Forkserver]:
    """The process that the commands come from."""
    server = Forkserver()
    yield server
    server.close()


@pytest.fixture
def hybridkex(forkserver: Forkserver) -> Iterator[Forkserver]:
    """Starts commands, which end with the test."""
    yield forkserver
    forkserver.end()


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``ca.pem``, ``cert.pem`` and ``key.pem`` for localhost."""
    folder = tmp_path_factory.mktemp("keys") / "one"
    ca = DevCa.create()
    write_identity(folder, ca, ca.issue("localhost", "127.0.0.1", "::1"))
    return folder
