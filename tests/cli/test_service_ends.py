"""A command that runs until it is asked to end does not end otherwise without saying so."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

import hybridkex.apps.tunnel.server
import hybridkex.cli.actions.wg_psk
import hybridkex.kme.serve
import hybridkex.net.supervisor
from hybridkex.auth.dev_ca import DevCa, write_identity
from hybridkex.cli import main
from hybridkex.cli.running import EndRequest, run_service, run_trio
from hybridkex.errors import LocalStateError
from hybridkex.net import threads
from hybridkex.qkd.store import write_key_file

UNASKED = "ended although nothing asked it to"


async def returns(*_: Any, **__: Any) -> None:
    """In the place of what runs for ever."""


def listen(folder: Path, patch: pytest.MonkeyPatch) -> list[object]:
    patch.setattr(hybridkex.net.supervisor.Supervisor, "serve", returns)
    return ["listen", 0, "--echo", "--cert", folder / "cert.pem", "--key", folder / "key.pem"]


def tunnel(folder: Path, patch: pytest.MonkeyPatch) -> list[object]:
    async def run(*_: Any, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()

    patch.setattr(hybridkex.apps.tunnel.server.TunnelServer, "run", run)
    patch.setattr(hybridkex.apps.tunnel.server.TunnelServer, "where", lambda *_: "somewhere")
    ends = ("--local", "127.0.0.1:0", "--target", "127.0.0.1:9")
    return ["tunnel", "listen", *ends, "--cert", folder / "cert.pem", "--key", folder / "key.pem"]


def kme(folder: Path, patch: pytest.MonkeyPatch) -> list[object]:
    patch.setattr(hybridkex.kme.serve.KmeServer, "serve", returns)
    return ["kme", "dev-up", folder / "sites", "--ports", "0,0"]


def wg_psk(folder: Path, patch: pytest.MonkeyPatch) -> list[object]:
    patch.setattr(hybridkex.cli.actions.wg_psk, "_rotate", returns)
    write_key_file(folder / "psk")
    peer = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
    ends = ("--interface", "wg0", "--peer-key", peer, "--listen", "127.0.0.1:0")
    return ["wg-psk", *ends, "--psk-file", folder / "psk", "--local", "a", "--peer", "b"]


@pytest.mark.parametrize("command", [listen, tunnel, kme, wg_psk])
def test_work_that_returns_is_an_error(
    command: Callable[[Path, pytest.MonkeyPatch], list[object]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    authority = DevCa.create()
    write_identity(tmp_path, authority, authority.issue("localhost"))
    assert main([str(word) for word in command(tmp_path, monkeypatch)]) == 1
    assert UNASKED in capsys.readouterr().err


def test_a_signal_is_named(caplog: pytest.LogCaptureFixture) -> None:
    async def work(request: EndRequest) -> None:
        with trio.open_signal_receiver(signal.SIGTERM) as received:
            os.kill(os.getpid(), signal.SIGTERM)
            request.note(await anext(received))
            request.note(signal.SIGINT)

    run_service(work)
    assert [record.getMessage() for record in caplog.records] == ["ending: SIGTERM"]


def test_work_that_is_done() -> None:
    async def work(request: EndRequest) -> None:
        request.finish()

    run_service(work)


def test_work_that_is_cancelled_from_within() -> None:
    async def work(_: EndRequest) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            nursery.cancel_scope.cancel()

    with pytest.raises(LocalStateError, match=UNASKED):
        run_service(work)


@pytest.mark.parametrize("receives", [True, False])
def test_an_interrupt_for_want_of_memory(receives: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker thread that cannot report sends the signal of Ctrl-C; that is no request to end."""
    monkeypatch.setattr(threads, "_interrupted", True)

    async def work(request: EndRequest) -> None:
        if not receives:
            raise KeyboardInterrupt
        with trio.open_signal_receiver(signal.SIGINT) as received:
            os.kill(os.getpid(), signal.SIGINT)
            request.note(await anext(received))

    with pytest.raises(LocalStateError, match="no more memory"):
        run_service(work)
    with pytest.raises(LocalStateError, match="no more memory"):
        run_trio(returns)
