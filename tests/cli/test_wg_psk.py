"""``hybridkex wg-psk`` as two processes, with a ``wg`` that records."""

import contextlib
import json
import os
import re
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from apps_glue import Process
from forked import Forkserver
from waiting import until

from hybridkex.auth import RawIdentity
from hybridkex.cli import main
from hybridkex.qkd.store import write_key_file

KEY = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
Start = Callable[..., "End"]
WG = """#!/bin/sh
if [ "$1" = show ]; then
    printf '%s\\t%s\\n' {key} "$(cat {folder}/psk 2>/dev/null || echo '(none)')"
    exit
fi
read -r psk
echo "$psk" > {folder}/psk
echo "$@" "$psk" >> {folder}/log
"""


class End(Process):
    """One end of the tunnel, whose lines of standard output are read as they come."""

    def __init__(self, forkserver: Forkserver, *words: str) -> None:
        reading, writing = os.pipe()
        self.stdout = os.fdopen(reading)
        with os.fdopen(writing, "wb") as out, Path(os.devnull).open("rb") as nothing:
            super().__init__(forkserver.start("wg-psk", *words, stdin=nothing, stdout=out))

    def communicate(self, timeout: float = 20) -> tuple[str, str]:
        _, told = super().communicate(timeout)
        with self.stdout:
            return self.stdout.read(), told


@pytest.fixture
def side(tmp_path: Path, forkserver: Forkserver) -> Iterator[Start]:
    """Starts one end of the tunnel; all that were started end with the test."""
    running = []

    def start(name: str, peer: str, *words: str) -> End:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        command = folder / "wg"
        command.write_text(WG.format(key=KEY, folder=folder))
        command.chmod(command.stat().st_mode | stat.S_IXUSR)
        fixed = ("--interface", "wg0", "--peer-key", KEY, "--wg", str(command))
        process = End(forkserver, *fixed, "--local", name, "--peer", peer, *words)
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.wait()
        process.stdout.close()


def keys(folder: Path) -> list[str]:
    """Every key that was installed, in order."""
    log = folder / "log"
    if not log.exists():
        return []
    lines = log.read_text().splitlines()
    found = [re.fullmatch(rf"set wg0 peer {KEY} preshared-key /dev/stdin (\S+)", x) for x in lines]
    return [one[1] for one in found if one]


def port_of(path: Path) -> str:
    until(path.exists)
    return path.read_text().strip()


def trust(tmp_path: Path) -> dict[str, list[str]]:
    """Raw keys for both, pinned by the other."""
    found = {}
    identities = {name: RawIdentity.generate() for name in "ab"}
    for name, other in (("a", "b"), ("b", "a")):
        path = tmp_path / f"{name}.pem"
        path.write_bytes(identities[name].to_pem())
        found[name] = ["--key", str(path), "--pin", identities[other].peer_view.pin]
    return found


def test_the_key_is_rotated_with_pinned_keys(tmp_path: Path, side: Start) -> None:
    known = trust(tmp_path)
    port = tmp_path / "port"
    b = side("b", "a", "--listen", "127.0.0.1:0", "--port-file", str(port), *known["b"])
    where = f"127.0.0.1:{port_of(port)}"
    a = side("a", "b", "--connect", where, "--interval", "0.2", "--json", *known["a"])
    until(lambda: len(keys(tmp_path / "a")) >= 3)
    ours, theirs = keys(tmp_path / "a"), keys(tmp_path / "b")
    assert ours[0] != theirs[0], "a random key blocks the tunnel before the first rotation"
    assert ours[1:] == theirs[1 : len(ours)]
    assert len(set(ours)) == len(ours)
    # The responder is gone: the initiator says why, stops the tunnel, and goes on trying.
    b.kill()
    b.communicate(timeout=20)
    events = (json.loads(line) for line in a.stdout)
    assert next(one for one in events if one["event"] != "rotated")["event"] == "stopped"
    stopped = keys(tmp_path / "a")[-1]
    assert stopped not in keys(tmp_path / "b")
    b = side("b", "a", "--listen", where, *known["b"])
    until(lambda: keys(tmp_path / "b")[-1] == keys(tmp_path / "a")[-1])
    assert b.poll() is None
    a.terminate()
    said = a.communicate(timeout=20)[1]
    assert re.search(
        r"rotation failed: cannot connect .*; the pre-shared key agreed \d+ s ago", said
    )
    assert "a random pre-shared key blocks the tunnel" in said


def test_a_tunnel_that_shall_go_on_without_a_fresh_key(tmp_path: Path, side: Start) -> None:
    """--fresh-psk prefer: what is there stays, and the log says that it is nothing."""
    words = ("--interval", "0.1", "--max-age", "0.3", "--fresh-psk", "prefer", "--json")
    a = side("a", "b", "--connect", "127.0.0.1:1", *words, *trust(tmp_path)["a"])
    assert json.loads(a.stdout.readline())["event"] == "overdue"
    assert a.poll() is None
    a.terminate()
    said = a.communicate(timeout=20)[1]
    assert keys(tmp_path / "a") == []
    assert "the tunnel has NO pre-shared key" in said
    assert "stays" not in said


@pytest.mark.parametrize("number", [40, 200])
def test_idle_strangers_do_not_stop_rotations(number: int, tmp_path: Path, side: Start) -> None:
    known = trust(tmp_path)
    port = tmp_path / "port"
    side("b", "a", "--listen", "127.0.0.1:0", "--port-file", str(port), *known["b"])
    address = ("127.0.0.1", int(port_of(port)))
    with contextlib.ExitStack() as stack:
        for _ in range(number):
            stack.enter_context(socket.create_connection(address, timeout=5))
        where = f"{address[0]}:{address[1]}"
        side("a", "b", "--connect", where, "--interval", "0.2", *known["a"])
        until(lambda: len(keys(tmp_path / "a")) >= 4, seconds=9)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_wg_that_hangs_does_not_outlive_us(
    number: signal.Signals, tmp_path: Path, side: Start
) -> None:
    """It has a key in its input."""
    hanging = tmp_path / "hanging"
    hanging.write_text(
        f"#!/bin/sh\nif [ $1 = show ]; then printf '{KEY}\\t(none)\\n'; exit; fi\n"
        f"echo $$ > {tmp_path}/pid.new; mv {tmp_path}/pid.new {tmp_path}/pid\n"
        "exec sleep 1000 2>&- >&-\n"
    )
    hanging.chmod(0o755)
    ours = side("a", "b", "--connect", "127.0.0.1:1", *trust(tmp_path)["a"], "--wg", str(hanging))
    until((tmp_path / "pid").exists)
    ours.send_signal(number)
    _, said = ours.communicate(timeout=30)
    assert ours.returncode == (130 if number == signal.SIGINT else 0), said
    assert "Traceback" not in said
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()


def test_help_offers_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["wg-psk", "--help"])
    said = capsys.readouterr().out
    assert "--qkd" not in said
    assert "ertificates" not in said.partition("--kme-ca")[0].partition("QKD keys:")[2]


def test_once_with_a_shared_key_and_a_qkd_pool(tmp_path: Path, side: Start) -> None:
    """Also that a stranger, and a wrong key, change nothing."""
    secret, wrong = tmp_path / "psk", tmp_path / "wrong"
    for path in (secret, wrong):
        write_key_file(path)
    port = tmp_path / "port"
    words = ("--listen", "127.0.0.1:0", "--port-file", str(port), "--psk-file", str(secret))
    b = side("b", "a", *words, "--once", "--json")
    where = ("--connect", f"127.0.0.1:{port_of(port)}", "--once")
    stranger = side("a", "b", *where, "--psk-file", str(wrong))
    _, said = stranger.communicate(timeout=30)
    assert stranger.returncode == 1
    assert said.splitlines()[-1].startswith("hybridkex: ")
    assert "Traceback" not in said
    assert keys(tmp_path / "a") == keys(tmp_path / "b") == []
    a = side("a", "b", *where, "--psk-file", str(secret), "--json")
    lines = [json.loads(one.communicate(timeout=30)[0]) for one in (a, b)]
    assert a.returncode == b.returncode == 0
    assert [line["peer"] for line in lines] == ["b", "a"]
    assert lines[0]["rests_on"] == ["X25519", "ML-KEM-768"]
    assert keys(tmp_path / "a") == keys(tmp_path / "b") != []


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--connect", "h", "--interval", "0", "--psk-file", "{psk}"], "interval"),
        (["--connect", "h"], "to authenticate the peer"),
        (["--connect", "h", "--psk-file", "/nowhere"], "/nowhere"),
        (["--connect", "h", "--psk-file", "x", "--pin", "00"], "cannot be combined"),
        (["--connect", "h:port", "--psk-file", "{psk}"], "HOST:PORT"),
        (["--listen", "x", "--psk-file", "{psk}"], "HOST:PORT"),
        (["--connect", "127.0.0.1:1", "--psk-file", "{psk}", "--once"], "cannot connect"),
        (["--connect", "h", "--psk-file", "{psk}", "--max-age", "1"], "age limit"),
        (["--connect", "h", "--psk-file", "{psk}", "--wg", "'"], "--wg"),
        (["--connect", "h", "--psk-file", "{psk}", "--wg", "/nowhere"], "cannot run /nowhere"),
    ],
)
def test_what_cannot_be(
    words: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    psk = tmp_path / "psk"
    write_key_file(psk)
    wg = tmp_path / "wg"
    wg.write_text(WG.format(key=KEY, folder=tmp_path))
    wg.chmod(0o700)
    given = ["--wg", str(wg), *(word.format(psk=psk) for word in words)]
    fixed = ["--interface", "wg0", "--peer-key", KEY, "--local", "a", "--peer", "b"]
    assert main(["wg-psk", *fixed, *given]) == 1
    said = capsys.readouterr().err
    last = said.splitlines()[-1]
    assert last.startswith("hybridkex: ")
    assert reason in last
    assert main(["wg-psk", *fixed[:2], "--peer-key", "AAAA", *fixed[4:], *given]) == 1
