"""``connect`` and ``listen`` with QKD keys, as a person runs them: two KMEs, two processes."""

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from forked import Forkserver, Running, one_line

from hybridkex.auth.dev_ca import DevCa, write_identity

Listening = Callable[..., AbstractContextManager[tuple[str, Running]]]
Connect = Callable[..., "subprocess.CompletedProcess[bytes]"]


@dataclass
class Kmes:
    """The two sites of ``kme dev-up``; ``alice`` and ``bob`` are the options that it printed."""

    folder: Path
    alice: list[str]
    bob: list[str]
    process: Running


@contextmanager
def dev_up(forkserver: Forkserver, folder: Path, *words: str) -> Iterator[Kmes]:
    command = ("kme", "dev-up", folder, "--ports", "0,0", *words)
    with forkserver.telling(*command) as (said, process):
        options = {}
        for line in said:
            if found := re.match(r" +hybridkex (listen 4433 --bind|connect) 127.0.0.1 (.*)", line):
                words_ = found[2].removeprefix("4433 ").split()
                options["alice" if found[1] == "connect" else "bob"] = words_
            if len(options) == 2:
                break
        yield Kmes(folder, options["alice"], options["bob"], process)


@pytest.fixture(scope="module")
def kmes(tmp_path_factory: pytest.TempPathFactory, forkserver: Forkserver) -> Iterator[Kmes]:
    with dev_up(forkserver, tmp_path_factory.mktemp("sites") / "sites") as both:
        yield both


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    ca = DevCa.create()
    write_identity(folder / "bob", ca, ca.issue("localhost", "127.0.0.1"))
    write_identity(folder / "alice", ca, ca.issue("alice"))
    return folder


@pytest.fixture
def listening(hybridkex: Forkserver, tmp_path: Path) -> Listening:
    """``listen --once``."""

    @contextmanager
    def start(*words: str) -> Iterator[tuple[str, Running]]:
        with (
            Path(os.devnull).open("rb") as nothing,
            hybridkex.listening(tmp_path, "--once", "--json", *words, stdin=nothing) as both,
        ):
            yield both

    return start


@pytest.fixture
def connect(hybridkex: Forkserver) -> Connect:
    """``connect``, which says hello."""

    def run(port: str, *words: str) -> "subprocess.CompletedProcess[bytes]":
        return hybridkex.run("connect", "127.0.0.1", port, "--json", *words, data=b"hello")

    return run


def session(stderr: bytes) -> dict[str, object]:
    # Lines of the log, such as the warning of a session without a QKD key, may stand before it.
    found = json.loads(next(line for line in stderr.splitlines() if line.startswith(b"{")))
    assert isinstance(found, dict)
    return found


def test_the_qkd_key_alone(listening: Listening, connect: Connect, kmes: Kmes) -> None:
    with listening(*kmes.bob) as (port, server):
        client = connect(port, *kmes.alice)
        output, complaints = server.communicate()
    assert (client.returncode, output) == (0, b"hello"), client.stderr + complaints
    ours, theirs = session(client.stderr), session(complaints)
    assert ours["qkd_key_ids"] == theirs["qkd_key_ids"] != []
    assert ours["qkd_sources"] == ["kme-a > kme-b"]
    assert ours["auth"] == "psk"
    assert ours["policy"] == {
        "post_quantum": "require",
        "psk": "require",
        "authentication": "psk",
        "fresh_keys": "off",
        "fresh_qkd": "off",
        "one_time_pad": "off",
    }


def test_a_one_time_pad(listening: Listening, connect: Connect, kmes: Kmes) -> None:
    with listening(*kmes.bob, "--one-time-pad") as (port, server):
        client = connect(port, *kmes.alice, "--one-time-pad")
        output, complaints = server.communicate()
    assert (client.returncode, output) == (0, b"hello"), client.stderr + complaints
    for stderr in (client.stderr, complaints):
        assert session(stderr)["one_time_pad"] is True
        assert session(stderr)["key_updates"] == "fresh"


@pytest.mark.parametrize("words", [("--fresh-keys", "peer"), ()])
def test_a_one_time_pad_at_one_end(
    listening: Listening, connect: Connect, kmes: Kmes, words: tuple[str, ...]
) -> None:
    with listening(*kmes.bob, *words) as (port, _):
        client = connect(port, *kmes.alice, "--one-time-pad")
    assert client.returncode == 1
    assert "our policy requires a one-time pad" in one_line(client.stderr)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "--one-time-pad needs a source of QKD keys"),
        (["--resume", "tickets"], "--resume and --one-time-pad exclude each other"),
    ],
)
def test_a_one_time_pad_without_what_it_needs(
    connect: Connect, words: list[str], complaint: str
) -> None:
    client = connect("1", "--insecure", "--one-time-pad", *words)
    assert client.returncode == 1
    assert complaint.encode() in client.stderr


def test_with_certificates_on_both_sides(
    listening: Listening, connect: Connect, kmes: Kmes, certificates: Path
) -> None:
    def files(who: str) -> list[str]:
        return [
            word
            for option in ("ca", "cert", "key")
            for word in (f"--{option}", str(certificates / who / f"{option}.pem"))
        ]

    with listening(*kmes.bob, *files("bob"), "--require-client-cert") as (port, server):
        client = connect(port, *kmes.alice, *files("alice"))
        _, complaints = server.communicate()
    assert client.returncode == 0, client.stderr
    ours, theirs = session(client.stderr), session(complaints)
    assert ours["auth"] == theirs["auth"] == "certificate+psk"
    assert ours["qkd_key_ids"] == theirs["qkd_key_ids"] != []
    assert theirs["peer_subject"] == "CN=alice"


@pytest.mark.parametrize("qkd", ["require", "prefer", "off"])
def test_one_side_has_no_keys(
    listening: Listening, connect: Connect, kmes: Kmes, certificates: Path, qkd: str
) -> None:
    cert = [str(certificates / "bob" / name) for name in ("cert.pem", "key.pem")]
    server_words = ["--cert", cert[0], "--key", cert[1], *kmes.bob, "--qkd", qkd]
    with listening(*server_words) as (port, server):
        client = connect(port, "--ca", str(certificates / "bob" / "ca.pem"))
        _, complaints = server.communicate()
    if qkd == "require":
        assert client.returncode == 1
        assert "handshake_failure" in one_line(client.stderr)
        assert "handshake failed" in one_line(complaints)
        return
    assert client.returncode == 0, client.stderr
    found = session(complaints)
    assert found["qkd_key_ids"] == []
    assert (found["qkd_fallback"] is None) == (qkd == "off")


def test_a_dead_kme(listening: Listening, connect: Connect, kmes: Kmes, certificates: Path) -> None:
    def replaced(url: str) -> list[str]:
        at = kmes.alice.index("--kme") + 1
        return [*kmes.alice[:at], url, *kmes.alice[at + 1 :]]

    with listening(*kmes.bob) as (port, _):
        client = connect(port, *replaced("https://127.0.0.1:1"))
    assert client.returncode == 1
    assert "handshake failed" in one_line(client.stderr)


def test_a_key_pool(
    listening: Listening, connect: Connect, hybridkex: Forkserver, tmp_path: Path, kmes: Kmes
) -> None:
    """Both sites fill a pool once, in both directions as it were; no KME is asked afterwards."""
    ids = tmp_path / "ids"

    def export(who: list[str], *words: str) -> list[str]:
        pool = tmp_path / f"{who[who.index('--sae') + 1]}.pool"
        files = ["--key-pool", str(pool), "--pool-key", f"{pool}.key", "--ids", str(ids)]
        done = hybridkex.run("kme", "export-pool", *who, *files, *words)
        assert done.returncode == 0, done.stderr
        return ["--key-pool", str(pool)]

    alice = export(kmes.alice, "--number", "2")
    bob = export(kmes.bob, "--role", "slave")
    seen = set()
    for _ in range(2):
        with listening(*bob) as (port, _):
            client = connect(port, *alice)
        assert client.returncode == 0, client.stderr
        seen.add(str(session(client.stderr)["qkd_key_ids"]))
    assert len(seen) == 2
    with listening(*bob) as (port, _):
        client = connect(port, *alice)
    assert client.returncode == 1
    assert "pool is empty" in one_line(client.stderr)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--qkd", "require"], "--qkd require needs --kme or --key-pool"),
        (["--kme", "https://127.0.0.1:1"], "--sae and --peer-sae"),
        (["--kme", "https://127.0.0.1:1", "--sae", "a", "--peer-sae", "b"], "--kme-ca"),
        (["--kme", "https://x:1", "--psk", "id:" + "00" * 32], "exclude each other"),
        (["--key-pool", "/nonexistent"], "no key pool"),
    ],
)
def test_options_that_cannot_be(connect: Connect, words: list[str], message: str) -> None:
    done = connect("1", *words)
    assert done.returncode == 1
    assert message in one_line(done.stderr)
