"""A PostgreSQL server of its own for tests."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from interop.postgres import NoPostgres, PostgresServer

__all__ = ["PostgresServer", "postgres_server"]


def postgres_server() -> Iterator[PostgresServer]:
    """A running server with the role ``kme``, which is not a superuser."""
    pytest.importorskip("psycopg")
    with tempfile.TemporaryDirectory(prefix="hybridkex-") as name:
        try:
            server = PostgresServer(Path(name))
        except NoPostgres as reason:
            pytest.skip(str(reason))
        server.start()
        try:
            server.make_role()
            yield server
        finally:
            server.stop()
