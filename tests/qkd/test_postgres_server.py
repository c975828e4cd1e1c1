"""The PostgreSQL server of the tests and of the runs under faults."""

import signal
from contextlib import suppress

import pytest

from interop import postgres as module
from interop.postgres import PostgresServer


def test_a_server_that_shuts_down_is_not_alive(
    postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It still accepts connections at its port, and refuses every session."""
    import psycopg

    assert postgres.process is not None
    last = psycopg.connect(postgres.url("public"))
    postgres.process.send_signal(signal.SIGTERM)  # it waits for the last session
    with suppress(psycopg.OperationalError):
        while True:
            psycopg.connect(postgres.url("public")).close()
    monkeypatch.setattr(module.time, "sleep", lambda _: last.close())
    assert not postgres.is_alive()
    monkeypatch.undo()
    postgres.start()
    assert postgres.is_alive()
