"""``hybridkex kme`` as a person runs it: processes and files."""

import dataclasses
import json
import math
import re
import signal
import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from forked import Forkserver
from waiting import until

from hybridkex.errors import ConfigError
from hybridkex.kme.config import KmeConfig, LinkConfig, ServeConfig, load_config
from hybridkex.kme.settings import KmeLimits
from hybridkex.net.address import TcpAddress
from hybridkex.net.http import HttpLimits
from hybridkex.qkd.pool import FilePool

Kme = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def kme(hybridkex: Forkserver) -> Kme:
    """Runs ``hybridkex kme`` to its end."""

    def run(*words: Any) -> "subprocess.CompletedProcess[str]":
        done = hybridkex.run("kme", *words)
        return subprocess.CompletedProcess(
            words, done.returncode, done.stdout.decode(), done.stderr.decode()
        )

    return run


@contextmanager
def site(
    hybridkex: Forkserver, folder: Path, *words: str
) -> Iterator[tuple[dict[str, str], list[str]]]:
    """``dev-up``; gives the KMEs' addresses and the lines with the two commands."""
    process = hybridkex.start("kme", "dev-up", folder, "--ports", "0,0", *words)
    try:
        until(lambda: re.search(rb"hybridkex connect.*\n", process.said()) is not None, process)
        lines = process.said().decode().splitlines()
        where = {line.split()[0]: line.split()[-1] for line in lines if "listens on" in line}
        yield where, [line for line in lines if line.startswith("  hybridkex ")]
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0


def access(folder: Path, url: str, sae: str, peer: str) -> list[Any]:
    files = folder / sae
    return [
        "--kme", url, "--kme-ca", files / "ca.pem", "--kme-cert", files / "cert.pem",
        "--kme-key", files / "key.pem", "--sae", sae, "--peer-sae", peer,
    ]  # fmt: skip


def test_a_second_server_on_one_store_is_refused(
    tmp_path: Path, hybridkex: Forkserver, kme: Kme
) -> None:
    """At once, in one line, with the first one going on."""
    with site(hybridkex, tmp_path):
        done = kme("serve", tmp_path / "kme.toml")
        assert done.returncode == 1
        assert "keys.db is in use by another process" in done.stderr
        assert len(done.stderr.splitlines()) == 1


async def test_dev_up_status_and_export_pool(
    tmp_path: Path, hybridkex: Forkserver, kme: Kme
) -> None:
    folder = tmp_path / "dev"
    with site(hybridkex, folder) as (where, commands):
        listen, connect = commands
        assert "--sae bob" in listen
        assert where["kme-b"] in listen
        assert "--sae alice" in connect
        assert where["kme-a"] in connect

        alice = access(folder, where["kme-a"], "alice", "bob")
        bob = access(folder, where["kme-b"], "bob", "alice")
        found = kme("status", *alice)
        assert found.returncode == 0, found.stderr
        assert json.loads(found.stdout)["target_KME_ID"] == "kme-b"

        # Each site draws for the other and takes what the other drew.
        for drawer, taker, ids in ((alice, bob, "a.ids"), (bob, alice, "b.ids")):
            for who, extra in ((drawer, ["--number", "130"]), (taker, ["--role", "slave"])):
                name = who[-3]
                done = kme(
                    "export-pool", *who, "--key-pool", tmp_path / f"{name}.pool", "--pool-key",
                    tmp_path / f"{name}.key", "--ids", tmp_path / ids, *extra,
                )  # fmt: skip
                assert done.returncode == 0, done.stderr
                assert json.loads(done.stdout)["keys"] == 130
        collect = ("export-pool", *bob, "--pool-key", tmp_path / "bob.key", "--role", "slave")
        again = kme(*collect, "--ids", tmp_path / "a.ids", "--key-pool", tmp_path / "bob.pool")
        assert again.returncode == 0, "the keys are there, and are not asked for again"
        twice = kme(*collect, "--ids", tmp_path / "a.ids", "--key-pool", tmp_path / "other.pool")
        assert twice.returncode == 1
        assert "130 of 130 keys are not in the pool" in twice.stderr
        assert "not found on KME" in twice.stderr

        # What was interrupted goes on: without the keys that are there, or are nowhere any more.
        ids = json.loads((tmp_path / "a.ids").read_text())
        more = kme(
            "export-pool", *alice, "--key-pool", tmp_path / "alice.pool", "--pool-key",
            tmp_path / "alice.key", "--ids", tmp_path / "more.ids", "--number", "200",
        )  # fmt: skip
        assert more.returncode == 0, more.stderr
        new = json.loads((tmp_path / "more.ids").read_text())
        mixed = [*ids[:3], *new[:90], str(uuid.uuid4()), *new[90:]]
        (tmp_path / "mixed.ids").write_text(json.dumps(mixed))
        rest = kme(*collect, "--ids", tmp_path / "mixed.ids", "--key-pool", tmp_path / "bob.pool")
        assert json.loads(rest.stdout)["keys"] == len(mixed) - 1, rest.stderr
        assert "1 of 204 keys are not in the pool" in rest.stderr

        wrong = kme("status", *access(folder, where["kme-a"], "alice", "nobody"))
        assert wrong.returncode == 1
        assert wrong.stderr.startswith("hybridkex: ")
        assert "Traceback" not in wrong.stderr
    async with (
        FilePool.open(tmp_path / "alice.pool", key_file=tmp_path / "alice.key") as a,
        FilePool.open(tmp_path / "bob.pool", key_file=tmp_path / "bob.key") as b,
    ):
        for master, slave in ((a, b), (b, a)):
            for _ in range(20):
                key = await master.get_key()
                assert await slave.get_key_with_id(key.name) == key
        # Alice has 330 of her own and Bob 130, but for those.
        assert [(await pool.status()).stored for pool in (a, b)] == [310, 110]

    refused = kme("dev-up", folder)
    assert refused.returncode == 1
    assert "exists already" in refused.stderr
    restarted = hybridkex.start("kme", "serve", folder / "kme.toml")
    until(lambda: restarted.said().startswith(b"kme-a listens on https://"), restarted)
    restarted.send_signal(signal.SIGTERM)
    assert restarted.wait(timeout=20) == 0


def test_dev_up_with_post_quantum_tls(tmp_path: Path, hybridkex: Forkserver, kme: Kme) -> None:
    with site(hybridkex, tmp_path, "--tls", "hybridkex") as (where, commands):
        assert all("--kme-tls hybridkex" in command for command in commands)
        ours = access(tmp_path, where["kme-a"], "alice", "bob")
        assert kme("status", *ours, "--kme-tls", "hybridkex").returncode == 0
        plain = kme("status", *ours)  # no post-quantum group in this Python's TLS, or refused
        if plain.returncode != 0:
            assert plain.stderr.startswith("hybridkex: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no \\[\\[kme\\]\\]|kme is missing"),
        ("kme = 5", "must be an array"),
        ("[[kme]]\nid = 'a'", "is missing"),
        ("x = 1\nkme = []", "unknown setting x"),
        ("kme = [", "kme.toml"),
    ],
)
def test_configuration_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "kme.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


GOOD = """
metrics = "127.0.0.1:0"
[[kme]]
id = "a"
listen = "[::1]:8443"
saes = ["x"]
ca = "ca"
certificate = "c"
key = "k"
store = "s"
key_file = "f"
peer = [{ id = "b", saes = ["y"], url = "https://b:1" }]
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"[::1]:8443"', '"8443"', "is not HOST:PORT"),
        ('["x"]', '"x"', "saes must be an array"),
        ('["x"]', "[5]", r"saes\[0\] has the wrong type"),
        ('id = "a"', "id = true", "id has the wrong type"),
        ('key_file = "f"', 'key_file = "f"\nid_rule = "x"', "must be one of cn"),
        ('key_file = "f"', 'key_file = "f"\nlimits = { key_size = 7 }', "key sizes"),
        ('key_file = "f"', 'key_file = "f"\nlimits = { rate = "x" }', "limits.rate has the wrong"),
        (
            'key_file = "f"',
            'key_file = "f"\nmax_connections = 1e5',
            "an integer, such as 100000 and not",
        ),
        ('key_file = "f"', 'key_file = "f"\npeer_timeout = "x"', "wrong type: it must be a number"),
        (
            'key_file = "f"',
            'key_file = "f"\nreuse_port = 1',
            "wrong type: it must be true or false",
        ),
        ('id = "a"', "id = 5", "id has the wrong type: it must be a string"),
        (', url = "https://b:1"', "", "has no url and is not in this file"),
        ('"https://b:1"', '"https://b:1", producer = "x"', "producer must be one of"),
    ],
)
def test_settings(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "kme.toml"
    path.write_text(GOOD)
    config = load_config(path)
    assert config.kme[0].listen == TcpAddress("::1", 8443)
    assert config.kme[0].key == tmp_path / "k"
    assert old in GOOD
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_a_missing_file_is_one_line(tmp_path: Path, kme: Kme) -> None:
    path = tmp_path / "kme.toml"
    path.write_text(GOOD)
    for words in (["serve", tmp_path / "none.toml"], ["serve", path]):
        result = kme(*words)
        assert result.returncode == 1
        assert result.stderr.count("\n") == 1
        assert result.stderr.startswith("hybridkex: cannot ")


ODD_NUMBERS = ("nan", "-nan", "-inf", "-1", "-0.5", "9" * 400, "true", '"1"', "[]")
NUMBERS = [
    (where, one.name)
    for where, kind in (
        ("", ServeConfig),
        ("kme", KmeConfig),
        ("kme.limits", KmeLimits),
        ("kme.http", HttpLimits),
        ("link", LinkConfig),
    )
    for one in dataclasses.fields(kind)
    if one.type in ("int", "float", int, float)
]


@pytest.mark.parametrize(("where", "name"), NUMBERS)
def test_no_number_of_the_configuration_is_odd(tmp_path: Path, where: str, name: str) -> None:
    path = tmp_path / "kme.toml"
    for odd in ODD_NUMBERS:
        setting = f"{name} = {odd}\n"
        path.write_text(
            (setting if where == "" else "")
            + '[[kme]]\nid = "a"\nlisten = "127.0.0.1:0"\nsaes = ["s"]\nca = "c"\n'
            + 'certificate = "c"\nkey = "k"\nstore = "s"\nkey_file = "f"\n'
            + (setting if where == "kme" else "")
            + (f"[{where}]\n{setting}" if "." in where else "")
            + '[[kme.peer]]\nid = "b"\nsaes = ["t"]\nurl = "https://b.example"\n'
            + (f"link = {{ {name} = {odd} }}\n" if where == "link" else "")
        )
        with pytest.raises(ConfigError, match=name):
            load_config(path)


@pytest.mark.parametrize("limits", [HttpLimits, KmeLimits])
def test_no_limit_is_odd(limits: type) -> None:
    for one in dataclasses.fields(limits):
        if isinstance(one.default, int | float) and not isinstance(one.default, bool):
            for odd in (math.nan, -1, -math.inf):
                with pytest.raises(ConfigError):
                    limits(**{one.name: odd})


def test_paths_that_cannot_be(tmp_path: Path) -> None:
    path = tmp_path / "kme.toml"
    for odd in ("a\\u0000b", "a" * 300, "a/" * 3000):
        path.write_text(
            '[[kme]]\nid = "a"\nlisten = "127.0.0.1:0"\nsaes = ["s"]\nca = "c"\n'
            f'certificate = "c"\nkey = "k"\nstore = "{odd}"\nkey_file = "f"\n'
        )
        with pytest.raises(ConfigError, match="store: the path"):
            load_config(path)


def hold_hangup(process: Any) -> None:
    """Send SIGHUP as soon as the process blocks it."""

    def blocks() -> bool:
        status = Path(f"/proc/{process.pid}/status").read_text()
        return bool(int(status.partition("SigBlk:")[2].split()[0], 16) & 1)

    until(lambda: blocks() or b"metrics on" in process.said(), process)
    process.send_signal(signal.SIGHUP)


def test_each_process_of_a_file_has_metrics_of_its_own(
    tmp_path: Path, hybridkex: Forkserver
) -> None:
    """``--metrics`` goes before the file's address, after a reload, too."""
    folder = tmp_path / "s"
    words = ("--ports", "0,0", "--metrics", "127.0.0.1:1", "--no-serve")
    assert hybridkex.run("kme", "dev-up", folder, *words).returncode == 0
    process = hybridkex.start("kme", "serve", folder / "kme.toml", "--metrics", "127.0.0.1:0")
    hold_hangup(process)  # one that comes before the KMEs are ready is carried out when they are
    until(lambda: b"metrics on http://127.0.0.1:" in process.said(), process)
    until(lambda: process.told().count(b"reloaded") == 1, process)
    process.send_signal(signal.SIGHUP)
    until(lambda: process.told().count(b"reloaded") == 2, process)
    assert b"not reloaded" not in process.told()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 0


@pytest.mark.parametrize("producer", ["random", "link"])
def test_the_stock_of_a_simulated_link_is_small(producer: str, tmp_path: Path, kme: Kme) -> None:
    """The link uses the processor until it is full."""
    words = ("--producer", producer, "--no-serve")
    words += ("--distance", "25") if producer == "link" else ()
    assert kme("dev-up", tmp_path / "s", *words).returncode == 0
    for one in load_config(tmp_path / "s" / "kme.toml").kme:
        assert one.limits.max_key_count == (1000 if producer == "link" else 4096)
        assert one.peer[0].link.distance_km == (25.0 if producer == "link" else 50.0)
