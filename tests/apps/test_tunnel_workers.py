"""``hybridkex tunnel`` with several workers: they serve, end, reload and count as one process."""

import ctypes
import errno
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from apps_glue import Run
from tunnel_glue import Tunnel, echo, exchange, receive_all, serving
from waiting import PATIENCE, trio_until

from hybridkex import DevCa, ServerConfig
from hybridkex.apps.tunnel import TunnelConfig, TunnelService, TunnelSettings, WorkerPool
from hybridkex.auth.dev_ca import write_identity
from hybridkex.cli import main
from hybridkex.cli.actions.tunnel import _WORKER as WORKER
from hybridkex.errors import ConfigError
from hybridkex.machine import NO_MEMORY, leaves
from hybridkex.net.address import TcpAddress, UnixAddress


@pytest.fixture
def tunnel(run: Run, tmp_path: Path, keys: Path) -> Tunnel:
    return Tunnel(run, tmp_path, keys)


def workers(tunnel: Tunnel) -> list[int]:
    """The processes that this one has started."""
    found: list[int] = []
    for thread in Path(f"/proc/{tunnel.process.pid}/task").iterdir():
        with suppress(OSError):  # it has ended
            found += map(int, (thread / "children").read_text().split())
    return found


def command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def runs(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def sums(tunnel: Tunnel, name: str) -> float:
    found = tunnel.metrics()
    return sum(value for key, value in found.items() if key.startswith(name + "{"))


@pytest.mark.slow
async def test_they_serve_reload_count_and_end_as_one(tunnel: Tunnel) -> None:
    """Connections, metrics, a worker that dies, reloads, and the end."""
    async with serving(echo) as target:
        tunnel.write(target, top={"workers": 2})
        await tunnel.start()
        first = workers(tunnel)
        assert len(first) == 2
        living = [await tunnel.connect() for _ in range(6)]
        for number, stream in enumerate(living):
            await stream.send_all(b"%d" % number)
            assert await stream.receive_some() == b"%d" % number
        assert sums(tunnel, "hybridkex_tunnel_connections_open") == 12
        assert sums(tunnel, "hybridkex_tunnel_handshakes_total") == 12

        # One dies: its connections are cut, the others go on, and another one takes its place.
        os.kill(first[0], signal.SIGKILL)
        await trio_until(lambda: tunnel.says(rf"worker {first[0]} ended \(SIGKILL\)"))
        left = []
        for stream in living:
            with suppress(trio.BrokenResourceError):
                await stream.send_all(b"still")
                if await stream.receive_some() == b"still":
                    left.append(stream)
        async with await tunnel.connect() as stream:
            assert await exchange(stream, b"x") == b"x"
        await trio_until(lambda: len(workers(tunnel)) == 2)
        assert sums(tunnel, "hybridkex_tunnel_handshakes_total") >= 12

        # A configuration that cannot be used changes nothing.
        good = tunnel.file.read_text()
        now = workers(tunnel)
        for broken, reason in (
            (good.replace("cert.pem", "none.pem"), "none.pem: No such file"),
            (good + '[[connect]]\nname = "third"\nlocal = "192.0.2.1:9"\nremote = "a:1"\n', "192"),
        ):
            tunnel.file.write_text(broken)
            await tunnel.reload("not reloaded, the old configuration stays")
            assert reason in tunnel.log.read_text()
            assert set(workers(tunnel)) >= set(now)
            async with await tunnel.connect() as stream:
                assert await exchange(stream, b"x") == b"x"
        await trio_until(lambda: len(workers(tunnel)) == 2)

        # A good one is for new connections; the old workers end with their last.
        other = tunnel.folder / "other"
        ca = DevCa.create()
        write_identity(other, ca, ca.issue("localhost"))
        tunnel._keys = other
        tunnel.write(target, top={"workers": 3})
        await tunnel.reload("reloaded")
        fresh = set(workers(tunnel)) - set(now)
        assert len(fresh) == 3
        async with await tunnel.connect() as stream:
            assert await exchange(stream, b"x") == b"x"
        for stream in left:
            assert await exchange(stream, b"goes on") == b"goes on"
            await stream.aclose()
        for stream in living:
            await trio.aclose_forcefully(stream)
        await trio_until(lambda: set(workers(tunnel)) == fresh)
        assert sums(tunnel, "hybridkex_tunnel_connections_open") == 0

        living = [await tunnel.connect() for _ in range(3)]
        for stream in living:
            await stream.send_all(b"x")
            assert await stream.receive_some() == b"x"
        tunnel.process.terminate()
        data = random.randbytes(500_000)
        for stream in living:
            assert await exchange(stream, data) == data
            await stream.aclose()
        assert await tunnel.ended() == 0
        assert not any(map(runs, fresh))


def adopt_orphans(adopts: bool) -> None:
    """Whether what our children leave behind becomes ours (prctl(2), PR_SET_CHILD_SUBREAPER)."""
    assert ctypes.CDLL(None).prctl(36, int(adopts), 0, 0, 0) == 0


@pytest.fixture(params=["init", "session"])
def orphans_of(request: pytest.FixtureRequest) -> Iterator[str]:
    """Who has the workers when the service is gone: for one of the same session, as in a container,
    the kernel does not continue those that are stopped."""
    adopt_orphans(request.param == "session")
    yield request.param
    adopt_orphans(False)


async def test_they_end_with_the_service_however_it_ends(tunnel: Tunnel, orphans_of: str) -> None:
    """kill -9, with a connection that is open, one that is silent, a worker that is stopped, and a
    port that is free then."""
    async with serving(echo) as target:
        tunnel.write(target, top={"workers": 2})
        await tunnel.start()
        living, silent = await tunnel.connect(), await tunnel.connect()
        await living.send_all(b"x")
        assert await living.receive_some() == b"x"
        there = workers(tunnel)
        for pid in there:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                os.kill(pid, number)  # They are for the service alone.
        await living.send_all(b"y")
        assert await living.receive_some() == b"y"
        os.kill(there[0], signal.SIGSTOP)
        tunnel.process.kill()
        await trio_until(lambda: not any(map(runs, there)))
        if orphans_of == "session":
            for pid in there:
                os.waitpid(pid, os.WNOHANG)  # noqa: ASYNC222  # it has ended
        with pytest.raises(trio.BrokenResourceError):
            await receive_all(living)
        with suppress(trio.BrokenResourceError):
            await receive_all(silent)
        with socket.create_server(("127.0.0.1", tunnel.port)):
            pass
        for stream in (living, silent):
            await trio.aclose_forcefully(stream)


@pytest.mark.slow
async def test_no_connection_is_refused_while_workers_change(tunnel: Tunnel) -> None:
    """Reloads one after the other, of a service whose Unix socket is taken away in between."""
    async with serving(echo) as target:
        tunnel.write(target, top={"workers": 2, "grace": 0.3})
        await tunnel.start()
        done = 0

        async def program(stop: trio.Event) -> None:
            nonlocal done
            while not stop.is_set():
                async with await tunnel.connect() as stream:
                    assert await exchange(stream, b"x") == b"x"
                    done += 1
                await trio.sleep(0.02)  # leave the processor to the workers that start

        async with trio.open_nursery() as nursery:
            stop = trio.Event()
            for _ in range(3):
                nursery.start_soon(program, stop)
            for _ in range(2):
                before = done
                await tunnel.reload("reloaded")
                await trio_until(lambda before=before: done > before + 3)
            stop.set()
        tunnel.middle.unlink()
        await trio_until(lambda: tunnel.says("was removed or replaced; it has been created again"))
        async with await tunnel.connect() as stream:
            assert await exchange(stream, b"x") == b"x"
        found = tunnel.metrics()
        assert found['hybridkex_tunnel_connections_cut_total{tunnel="in"}'] == 0
        assert found['hybridkex_tunnel_connections_total{tunnel="out"}'] == done + 1
        living = await tunnel.connect()
        await living.send_all(b"x")
        assert await living.receive_some() == b"x"
        tunnel.process.terminate()
        with pytest.raises(trio.BrokenResourceError):
            await receive_all(living)
        await living.aclose()
        assert await tunnel.ended() == 0
        assert not tunnel.middle.exists()


async def test_a_worker_that_cannot_start_ends_the_service(tunnel: Tunnel) -> None:
    tunnel.write(1, top={"workers": 2}, listen={"cert": "none.pem"})
    with tunnel.log.open("wb") as log:
        process = tunnel._run.start("tunnel", "run", tunnel.file, stderr=log)
    await trio_until(lambda: process.poll() is not None)
    assert process.returncode == 1
    lines = tunnel.log.read_text().splitlines()
    assert "none.pem: No such file" in lines[-1]
    assert not any("Traceback" in line for line in lines)
    assert not tunnel.middle.exists()


async def test_a_signal_ends_a_service_whose_workers_are_starting(tunnel: Tunnel) -> None:
    tunnel.write(1, top={"workers": 2, "grace": 60})
    with tunnel.log.open("wb") as log:
        tunnel.process = tunnel._run.start("tunnel", "run", tunnel.file, stderr=log)
    await trio_until(lambda: len(workers(tunnel)) == 2)
    there = workers(tunnel)
    service = command_line(tunnel.process.pid)
    # One that is stopped before its exec would stop subprocess.Popen as well.
    await trio_until(lambda: all(command_line(pid) != service for pid in there))
    for pid in there:
        os.kill(pid, signal.SIGSTOP)
    tunnel.process.terminate()
    assert await tunnel.ended() == 0
    assert tunnel.says("ending: SIGTERM")
    assert not any(map(runs, there))
    assert not tunnel.middle.exists()


@pytest.mark.parametrize("number", [1, 2])
async def test_what_a_killed_process_has_carried_does_not_look_complete(
    tunnel: Tunnel, number: int
) -> None:
    """The program and the target see a reset, where the kernel would send FIN."""
    ends: list[str] = []

    async def answer(stream: trio.SocketStream) -> None:
        await stream.send_all(await stream.receive_some())
        try:
            ends.append(repr(await stream.receive_some()))
        except trio.BrokenResourceError:
            ends.append("reset")

    async with serving(answer) as target:
        tunnel.write(target, top={"workers": number})
        await tunnel.start()
        async with await tunnel.connect() as living:
            await living.send_all(b"x")
            assert await living.receive_some() == b"x"
            for pid in workers(tunnel) or [tunnel.process.pid]:
                os.kill(pid, signal.SIGKILL)
            with pytest.raises(trio.BrokenResourceError):
                await receive_all(living)
        await trio_until(lambda: len(ends) == 1)
    assert ends == ["reset"]


ONE_THAT = """
import json, socket, sys, time
control = socket.socket(fileno=int(sys.argv[1]))
def say(**fields):
    control.sendall(json.dumps(fields).encode() + b"\\n")
"""


def no_settings() -> TunnelSettings:
    raise AssertionError


def two_workers(folder: Path) -> TunnelSettings:
    """One tunnel on a socket in a folder."""

    @asynccontextmanager
    async def channel() -> AsyncIterator[ServerConfig]:
        yield ServerConfig(identities=())

    local = UnixAddress(str(folder / "local"))
    tunnels = (TunnelConfig(name="one", local=local, forward=local, channel=channel),)
    return TunnelSettings(tunnels=tunnels, workers=2, recipe=no_settings)


@pytest.mark.parametrize(
    ("does", "complaint"),
    [
        ("time.sleep(60)", "a worker was not ready within 0.5 s"),
        ("say(error='no such key')", "no such key"),
        ("sys.exit(3)", "a worker ended before it was ready"),
        ("control.sendall(b'x' * 100_000)", "a worker ended before it was ready"),
        ("say(ready=True)", None),
        ("say(ready=True); time.sleep(0.3)", None),
        ("say(ready=True); time.sleep(60)", None),
    ],
)
async def test_workers_that_fail(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    does: str,
    complaint: str | None,
) -> None:
    """One that is not ready is a fault of the configuration; one that ends is replaced; one that
    does not end is killed."""
    monkeypatch.setattr(
        "hybridkex.apps.tunnel.workers.READY_SECONDS", 0.5 if "0.5" in f"{complaint}" else 30
    )
    monkeypatch.setattr("hybridkex.apps.tunnel.workers.AGAIN_SECONDS", 0.01)
    monkeypatch.setattr("hybridkex.apps.tunnel.workers.SURE_SECONDS", 0.1)
    settings = two_workers(tmp_path)
    pool = WorkerPool([sys.executable, "-c", ONE_THAT + does])
    with trio.fail_after(PATIENCE):
        if complaint is not None:
            with pytest.raises(ExceptionGroup) as raised:
                await pool.serve(settings)
            [error] = leaves(raised.value)
            assert isinstance(error, ConfigError)
            assert complaint in str(error)
        else:
            async with trio.open_nursery() as nursery:
                await nursery.start(pool.serve, settings)
                if "60" not in does:
                    await trio_until(lambda: caplog.text.count("another one starts") > 2)
                pool.close(0)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files; raise the limit"),
        (OSError(errno.EAGAIN, "Resource temporarily unavailable"), "Resource temporarily"),
        (RuntimeError("can't start new thread"), "no more threads can be started"),
        (MemoryError(), "no more memory"),
    ],
)
async def test_a_machine_that_gives_no_process_meanwhile(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    reason: str,
) -> None:
    """The service goes on: a worker that ended is replaced later, and a reload is refused."""
    monkeypatch.setattr("hybridkex.apps.tunnel.workers.AGAIN_SECONDS", 0.01)
    monkeypatch.setattr("hybridkex.apps.tunnel.workers.SURE_SECONDS", 0.1)
    settings = two_workers(tmp_path)
    pool = WorkerPool([sys.executable, "-c", ONE_THAT + "say(ready=True); time.sleep(60)"])
    open_process, started = trio.lowlevel.open_process, list[trio.Process]()

    async def counted(*words: Any, **more: Any) -> trio.Process:
        started.append(await open_process(*words, **more))
        return started[-1]

    async def failing(*words: Any, **more: Any) -> trio.Process:
        raise error

    monkeypatch.setattr(trio.lowlevel, "open_process", counted)
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            await nursery.start(pool.serve, settings)
            with monkeypatch.context() as scarce:
                scarce.setattr(trio.lowlevel, "open_process", failing)
                with pytest.raises(ConfigError, match=f"cannot start a worker: .*{reason}"):
                    await pool.apply_settings(settings)
                started[0].kill()
                await trio_until(lambda: caplog.text.count("no worker could be started") > 1)
            await trio_until(lambda: len(started) == 3)
            pool.close(0)


async def test_no_new_connection_has_the_old_configuration_after_a_reload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workers of the old one have closed their listening sockets by then."""
    monkeypatch.setattr("hybridkex.apps.tunnel.workers.SURE_SECONDS", 0.1)
    slow = (
        "import os\n"
        "orders = int.from_bytes(control.recv(4, socket.MSG_WAITALL), 'big')\n"
        "control.recv(orders, socket.MSG_WAITALL)\n"
        "lines = control.makefile()\n"
        "say(ready=True)\n"
        "while line := lines.readline():\n"
        "    if 'close' in line:\n"
        "        time.sleep(0.1)\n"
        f"        open({str(tmp_path / 'closed')!r} + str(os.getpid()), 'x').close()\n"
        "        say(closed=True)\n"
    )
    settings = two_workers(tmp_path)
    pool = WorkerPool([sys.executable, "-c", ONE_THAT + slow])
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            await nursery.start(pool.serve, settings)
            await pool.apply_settings(settings)
            assert sum(name.startswith("closed") for name in os.listdir(tmp_path)) == 2
            pool.close(0)


async def test_a_worker_that_hangs_delays_nothing_however_often_metrics_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hybridkex.apps.tunnel.workers.SCRAPE_SECONDS", 0.001)
    monkeypatch.setattr("hybridkex.apps.tunnel.workers.SURE_SECONDS", 0.1)
    settings = two_workers(tmp_path)
    pool = WorkerPool([sys.executable, "-c", ONE_THAT + "say(ready=True); time.sleep(60)"])
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            await nursery.start(pool.serve, settings)
            for _ in range(400):
                await pool.metrics()
            pool.close(0)


async def test_a_signal_ends_a_service_that_waits_for_an_old_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hybridkex.apps.tunnel.workers.CLOSE_SECONDS", 0.5)
    monkeypatch.setattr("hybridkex.apps.tunnel.workers.SURE_SECONDS", 0.1)
    pool = WorkerPool([sys.executable, "-c", ONE_THAT + "say(ready=True); time.sleep(60)"])
    tunnels = tuple(
        replace(one, local=TcpAddress("127.0.0.1", 0)) for one in two_workers(tmp_path).tunnels[:1]
    )
    first = replace(two_workers(tmp_path), tunnels=tunnels, grace=0.0)
    second = replace(first)
    ended: list[int] = []
    service = TunnelService(lambda: second, first, pool, on_end=ended.append)
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(service.run)
            await trio_until(service._started.is_set)
            os.kill(os.getpid(), signal.SIGHUP)
            await trio_until(lambda: pool._settings is second)
            os.kill(os.getpid(), signal.SIGTERM)
    assert ended == [signal.SIGTERM]


async def test_what_one_process_uses_is_refused_until_the_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one worker, too: old workers stay beside it."""
    monkeypatch.setattr("hybridkex.apps.tunnel.workers.SURE_SECONDS", 0.1)
    settings = two_workers(tmp_path)
    pool = WorkerPool([sys.executable, "-c", ONE_THAT + "say(ready=True); time.sleep(60)"])
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            await nursery.start(pool.serve, settings)
            [one] = settings.tunnels
            alone = replace(settings, workers=1, tunnels=(replace(one, sole="its key pool"),))
            with pytest.raises(ConfigError, match="its key pool is used by one process only"):
                await pool.apply_settings(alone)
            pool.close(0)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"workers": 0}, "workers must be 1 to 256"),
        ({"workers": 300}, "workers must be 1 to 256"),
        ({"workers": "many"}, "workers: a whole number is needed"),
        ({"workers": 3, "max-connections": 2}, "max_connections is shared by 3 workers"),
        (
            {"workers": 2, "key-pool": "keys", "sae": "a", "peer-sae": ["b"]},
            "its key pool is used by one process only",
        ),
    ],
)
def test_what_workers_cannot_do(
    tunnel: Tunnel,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, object],
    complaint: str,
) -> None:
    number = change.pop("workers")
    tunnel.write(1, top={"workers": number}, connect=change)
    assert main(["tunnel", "run", str(tunnel.file), "--check"]) == 1
    error = capsys.readouterr().err
    assert complaint in error
    assert len(error.strip().splitlines()) == 1


def test_a_worker_that_cannot_load_its_modules_says_so_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "trio.py").write_text("raise MemoryError")
    done = subprocess.run(
        [*WORKER, "0"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"hybridkex: {NO_MEMORY}\n"
