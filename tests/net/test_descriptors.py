"""Budgets of connections fit the descriptors of the process; whole servers with too few of them."""

import contextlib
import logging
import re
import resource
import signal
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
from forked import Forkserver, Running
from waiting import until

from hybridkex.auth.dev_ca import DevCa, write_identity
from hybridkex.net import descriptors
from hybridkex.net.budget import Budget
from hybridkex.net.pending import PendingConnections

FILES = 256
IDLE = 300
LIMIT = 40.0


@pytest.fixture(autouse=True)
def _nothing_logged() -> None:
    """As in a new process, which logs each line once."""
    descriptors._log_reduced.cache_clear()


@pytest.mark.parametrize(
    ("files", "wanted", "each", "given"),
    [
        (256, 128, 1, 24),
        (256, 256, 2, 12),
        (256, 20, 1, 20),
        (64, 128, 1, 1),
        (1024, 120, 1, 120),
        (20_000, 10_000, 1, 10_000),
        (20_000, 10_000, 2, 9_456),
        (resource.RLIM_INFINITY, 10**9, 2, 10**9),
    ],
)
def test_a_budget_fits(
    files: int,
    wanted: int,
    each: int,
    given: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (files, files))
    with caplog.at_level(logging.WARNING, "hybridkex.net.descriptors"):
        for _ in range(10):  # tunnels of one process
            budget = Budget(wanted, what="guests", descriptors=each)
    assert budget.total == given
    assert len(caplog.records) == (given < wanted)
    if given < wanted:
        assert f"at most {given} guests at once, not {wanted}" in caplog.text
        assert "ulimit -n" in caplog.text
    budget.total = 1
    assert budget.total == 1


def test_a_budget_has_what_one_peer_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 64))
    assert Budget(8, fewest=4).total == 4
    assert Budget(2, fewest=4).total == 2


@pytest.mark.parametrize(
    ("files", "given"), [(10, 8), (64, 8), (256, 24), (1024, 120), (10**6, 2048)]
)
def test_a_share(files: int, given: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (files, files))
    assert descriptors.share(2048) == given
    assert descriptors.share(5) == 5


@pytest.mark.parametrize("servers", [1, 2, 3, 8, 20, 40, 100])
@pytest.mark.parametrize("files", [256, 512, 1024, 2048, 4096, 20_000, 10**6])
def test_budgets_of_all_servers_fit(
    files: int, servers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strangers at some servers of a process leave descriptors for the others."""
    least = descriptors.LISTENING + descriptors.FEWEST_OF_MANY + 1 + 2
    if files < descriptors.RESERVE + servers * least:
        pytest.skip("not enough for so many servers")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (files, files))
    pending = PendingConnections[trio.SocketStream](lambda _: 0)
    handshakes, admitted = Budget(128), Budget(256, descriptors=2)
    with contextlib.ExitStack() as stack:
        for _ in range(servers):
            stack.enter_context(descriptors.listening())
        each = descriptors.LISTENING + pending.total + handshakes.total
        if servers > descriptors.FEW:
            each += 2 * admitted.total
        assert descriptors.RESERVE + servers * each <= files
    assert pending.total == descriptors.share(2048)


def test_a_smaller_number_is_told_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 256))
    budget = Budget(128, what="guests")
    assert "at most 24 guests" in caplog.text
    caplog.clear()
    with contextlib.ExitStack() as stack:
        for _ in range(10):
            stack.enter_context(descriptors.listening())
        assert {budget.total for _ in range(3)} == {5}
    assert [one.getMessage()[:17] for one in caplog.records] == ["at most 5 guests "]


def test_the_soft_limit_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    descriptors.raise_soft_limit()
    assert asked == [(4096, 4096)]

    def refuse(_: int, limits: tuple[int, int]) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    descriptors.raise_soft_limit()


# --- whole processes ------------------------------------------------------------------------------


@contextlib.contextmanager
def server(hybridkex: Forkserver, *words: object, log: Path) -> Iterator[Running]:
    with log.open("wb") as told:
        process = hybridkex.start(*words, stderr=told, limits={"RLIMIT_NOFILE": FILES})
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(LIMIT)


@contextlib.contextmanager
def idle(*ports: int, count: int = IDLE) -> Iterator[None]:
    """Connections that say nothing."""
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            for port in ports:
                one = socket.socket()
                stack.enter_context(one)
                one.setblocking(False)
                one.connect_ex(("127.0.0.1", port))
        time.sleep(0.5)
        yield


def found(pattern: str, read: Callable[[], str], process: Running) -> str:
    until(lambda: re.search(pattern, read()), process)
    match = re.search(pattern, read())
    assert match is not None
    return match[1]


def served(hybridkex: Forkserver, port: int, target: socket.socket, folder: Path) -> None:
    """A client of a tunnel gets what the target sends."""
    connect = hybridkex.start("connect", "127.0.0.1", port, "--ca", folder / "keys/ca.pem")
    target.settimeout(LIMIT)
    inner, _ = target.accept()
    with inner:
        inner.sendall(b"through")
    output, _ = connect.communicate(timeout=LIMIT)
    assert output == b"through"


def get_metrics(port: int) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=LIMIT) as answer:
        body: bytes = answer.read()
        return body


@pytest.mark.slow
def test_a_kme_with_300_idle_connections_at_each_door(
    hybridkex: Forkserver, tmp_path: Path
) -> None:
    words = ("kme", "dev-up", tmp_path / "sites", "--ports", "0,0", "--metrics", "127.0.0.1:0")
    log = tmp_path / "log"
    with server(hybridkex, *words, log=log) as process:

        def said() -> str:
            return process.said().decode()

        options = found(r"hybridkex connect .*?(--kme .*)\n", said, process).split()
        ports = [int(port) for port in re.findall(r"(?m)http.*:(\d+)(?:/metrics)?$", said())]
        assert len(ports) == 3
        with idle(*ports):
            assert b"hybridkex" in get_metrics(ports[2])
            asked = hybridkex.run("kme", "status", *options)
            assert asked.returncode == 0, asked.stderr
            assert b'"stored_key_count"' in asked.stdout
        assert process.poll() is None
        told = log.read_text()
        assert f"this process may open {FILES} files" in told
        assert "cannot accept connections" not in told


@pytest.mark.slow
def test_a_tunnel_with_300_idle_connections_at_each_door(
    hybridkex: Forkserver, tmp_path: Path
) -> None:
    ca = DevCa.create()
    write_identity(tmp_path / "keys", ca, ca.issue("localhost", "127.0.0.1"))
    log, port_file = tmp_path / "log", tmp_path / "port"
    keys = ("--cert", tmp_path / "keys/cert.pem", "--key", tmp_path / "keys/key.pem")
    with socket.create_server(("127.0.0.1", 0)) as target:
        words = (
            *("tunnel", "listen", "--local", "127.0.0.1:0", "--metrics", "127.0.0.1:0"),
            *("--target", f"127.0.0.1:{target.getsockname()[1]}", *keys),
            *("--port-file", port_file),
        )
        with server(hybridkex, *words, log=log) as process:
            line = r"metrics on http://127\.0\.0\.1:(\d+)"
            metrics = int(found(line, log.read_text, process))
            until(port_file.exists, process)
            port = int(port_file.read_text())
            with idle(port, metrics):
                assert b"hybridkex" in get_metrics(metrics)
                served(hybridkex, port, target, tmp_path)
            assert process.poll() is None
            assert "cannot accept connections" not in log.read_text()


@pytest.mark.slow
def test_strangers_at_nine_tunnels_leave_the_tenth_alone(
    hybridkex: Forkserver, tmp_path: Path
) -> None:
    ca = DevCa.create()
    write_identity(tmp_path / "keys", ca, ca.issue("localhost", "127.0.0.1"))
    log, file = tmp_path / "log", tmp_path / "tunnels.toml"
    with socket.create_server(("127.0.0.1", 0)) as target:
        text = 'metrics = "127.0.0.1:0"\n'
        for number in range(10):
            text += (
                f'[[listen]]\nname = "t{number}"\nlocal = "127.0.0.1:0"\n'
                f'target = "127.0.0.1:{target.getsockname()[1]}"\n'
                'cert = "keys/cert.pem"\nkey = "keys/key.pem"\n'
            )
        file.write_text(text)
        with server(hybridkex, "tunnel", "run", file, log=log) as process:
            lines = [rf"tunnel t{number}: listening on 127\.0\.0\.1:(\d+)," for number in range(10)]
            ports = [int(found(line, log.read_text, process)) for line in lines]
            line = r"metrics on http://127\.0\.0\.1:(\d+)"
            metrics = int(found(line, log.read_text, process))
            with idle(*ports[:9], count=IDLE // 3):
                for _ in range(3):
                    served(hybridkex, ports[9], target, tmp_path)
                assert b"hybridkex" in get_metrics(metrics)
            assert process.poll() is None
            assert "cannot accept connections" not in log.read_text()
