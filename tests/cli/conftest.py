"""What the tests of the commands share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from forked import Forkserver

from hybridkex.auth.dev_ca import DevCa, write_identity


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
