"""What holds for all tests, and what several folders share."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked import Forkserver

from hybridkex.auth.dev_ca import DevCa, write_identity


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--thorough",
        action="store_true",
        help="try every member where a test else tries a sample (takes hours)",
    )


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
def _log_as_it_was() -> Iterator[None]:
    """A command that a test runs in this process sets up the library's log for the process."""
    logger = logging.getLogger("hybridkex")
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
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
