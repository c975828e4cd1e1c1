"""Settings and fixtures for all tests."""

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
"""Modules that limit the log lines of the whole process."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--thorough",
        action="store_true",
        help="try every case where a test otherwise tries a sample (takes hours)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        config.add_cleanup(_compile_ahead())
    # No deadline: Hypothesis measures 200 ms by the wall clock, and other work on the machine may
    # take that long. Fixed examples: a test must fail because of a change, not because of random
    # examples.
    settings.register_profile(
        "hybridkex", deadline=None, derandomize=not config.getoption("--thorough")
    )
    settings.load_profile("hybridkex")
    _heed_signals()
    _keep_bytecode()
    _leave_data_to_the_system()
    # In debug mode, asyncio stores a stack of ten calls for each callback, which takes a sixth of a
    # test's time.
    asyncio.constants.DEBUG_STACK_DEPTH = 1  # type: ignore[misc]


def _compile_ahead() -> Callable[[], object]:
    """Begin to compile for numba while the processes that run the tests start. In a fresh checkout,
    each process that needs this code before it is on disk would compile it itself, in 6 s.

    Returns a function that waits until it is done."""
    root = Path(__file__).parents[1]
    version = "".join(map(str, sys.version_info[:2]))
    if any(root.glob(f"hybridkex/link/__pycache__/*.py{version}.nbi")):
        return lambda: None
    command = [sys.executable, str(root / "tests/link/compile_ahead.py")]
    where = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.Popen(command, env=where, stderr=subprocess.DEVNULL).wait


def _keep_bytecode() -> None:
    """Write bytecode even if PYTHONDONTWRITEBYTECODE forbids it, as container images of Python
    often do. Otherwise each process compiles all of its imports: the processes that run the tests,
    and the hundreds that tests start."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False


def _leave_data_to_the_system() -> None:
    """Do not flush files to the disk. Written data survives the end of a process; a flush protects
    only against the end of the machine, which no test causes, and it waits for all that other
    programs write."""

    def check_only(file: Any) -> None:
        os.fstat(file)

    os.fsync = check_only
    sqlite_file.SYNCHRONOUS = "OFF"  # type: ignore[misc]


def _heed_signals() -> None:
    """Restore the default handling of signals that tests send: a shell that starts pytest in the
    background has it, and its child processes, ignore them."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_IGN:
            is_interrupt = number == signal.SIGINT
            signal.signal(number, signal.default_int_handler if is_interrupt else signal.SIG_DFL)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Disable garbage collection while tests are collected: there is no garbage, and the search for
    it takes a sixth of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Lock each test file while it is collected, so that the first of several processes compiles it
    for the others."""
    if not isinstance(collector, pytest.Module):
        return (yield)
    with collector.path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run files with slow tests first, so that no process runs one alone at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Exclude the modules and the items, which stay to the end, from garbage collection: a test
    that collects garbage then takes a millisecond for it, not 200."""
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, object, object]:
    """Likewise exclude what remains after the tests of a file: imported modules, caches,
    reports."""
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
    """Each process takes the tests of a file together, as long as no process is idle: then mostly
    one process sets up the fixtures of a file or a session."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.getoption("dist") == "load" else None


@pytest.fixture(scope="session")
def thorough(request: pytest.FixtureRequest) -> bool:
    """Whether a test tries every case, not a sample."""
    return bool(request.config.getoption("--thorough"))


@pytest.fixture
def no_log() -> Iterator[None]:
    """Disable logging: pytest stores each line, which would disturb a test that measures memory."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(autouse=True)
def _same_draws_in_each_run(request: pytest.FixtureRequest) -> None:
    """Seed the module ``random``, which many tests use, with the name of the test."""
    random.seed(request.node.nodeid)


@pytest.fixture(autouse=True)
def _log_as_it_was() -> Iterator[None]:
    """Restore the library's log after a test: a command that runs in this process configures it."""
    logger = logging.getLogger("hybridkex")
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    for name in _BOUNDED:
        if name in sys.modules:  # earlier tests may have used up its lines
            sys.modules[name]._LINES._buckets.clear()
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)
    logger.propagate = propagate


@pytest.fixture(scope="session")
def forkserver() -> Iterator[Forkserver]:
    """The process that forks the commands."""
    server = Forkserver()
    yield server
    server.close()


@pytest.fixture
def hybridkex(forkserver: Forkserver) -> Iterator[Forkserver]:
    """Starts commands, and ends them with the test."""
    yield forkserver
    forkserver.end()


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``ca.pem``, ``cert.pem`` and ``key.pem`` for localhost."""
    folder = tmp_path_factory.mktemp("keys") / "one"
    ca = DevCa.create()
    write_identity(folder, ca, ca.issue("localhost", "127.0.0.1", "::1"))
    return folder
