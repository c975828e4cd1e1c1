"""``connect``, ``listen``, ``dev-ca`` and ``demo`` as a person runs them: processes and files."""

import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from forked import Forkserver, one_line

from interop.ports import free_port

JSON_KEYS = {
    "version",
    "cipher_suite",
    "group",
    "parts",
    "signature_scheme",
    "alpn",
    "psk_identity",
    "auth",
    "resumed",
    "peer_subject",
    "verified_by",
    "vouched_names",
    "policy",
    "qkd_fallback",
    "qkd_key_ids",
    "qkd_sources",
    "one_time_pad",
    "key_updates",
    "epoch",
    "epochs",
}
PSK = "qkd-1:" + "5a" * 32


def server_keys(keys: Path) -> list[str]:
    return ["--cert", str(keys / "cert.pem"), "--key", str(keys / "key.pem")]


def test_a_file_crosses_and_both_sides_say_the_same(
    hybridkex: Forkserver, tmp_path: Path, keys: Path
) -> None:
    content = os.urandom(3_000_001)
    with hybridkex.listening(tmp_path, *server_keys(keys), "--once", "--json") as (port, server):
        source = tmp_path / "source"
        source.write_bytes(content)
        with source.open("rb") as file:
            words = ["connect", "localhost", port, "--ca", str(keys / "ca.pem"), "--json"]
            client = hybridkex.start(*words, stdin=file)
        received, server_errors = server.communicate(b"thank you", timeout=30)
        answer, client_errors = client.communicate(timeout=30)
        assert received == content
        assert answer == b"thank you"
        assert (client.returncode, server.returncode) == (0, 0)
    ours, theirs = json.loads(client_errors), json.loads(server_errors)
    assert set(ours) == set(theirs) == JSON_KEYS
    assert ours["group"] == theirs["group"] == "X25519MLKEM768"
    assert ours["parts"] == ["ML-KEM-768", "X25519"]
    assert ours["peer_subject"] == "CN=localhost"
    assert ours["auth"] == "certificate"
    assert ours["resumed"] is False


def test_echo_serves_many_and_sessions_resume(
    hybridkex: Forkserver, tmp_path: Path, keys: Path
) -> None:
    store = tmp_path / "sessions"
    with hybridkex.listening(tmp_path, *server_keys(keys), "--echo") as (port, _):
        common = ["connect", "localhost", port, "--ca", str(keys / "ca.pem"), "--json"]
        resumed = []
        for _ in range(3):
            done = hybridkex.run(*common, "--resume", str(store), data=b"ping")
            assert (done.returncode, done.stdout) == (0, b"ping"), done.stderr
            resumed.append(json.loads(done.stderr)["resumed"])
        assert resumed == [False, True, True]
        assert store.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--groups", "SecP384r1MLKEM1024"], {"group": "SecP384r1MLKEM1024"}),
        (
            ["--suites", "TLS_CHACHA20_POLY1305_SHA256"],
            {"cipher_suite": "TLS_CHACHA20_POLY1305_SHA256"},
        ),
        (["--alpn", "x,demo"], {"alpn": "demo"}),
    ],
)
def test_options_reach_the_handshake(
    hybridkex: Forkserver, tmp_path: Path, keys: Path, words: list[str], expected: dict[str, str]
) -> None:
    with hybridkex.listening(tmp_path, *server_keys(keys), "--echo", "--alpn", "demo") as (port, _):
        ca = str(keys / "ca.pem")
        done = hybridkex.run("connect", "localhost", port, "--ca", ca, "--json", *words, data=b"x")
        assert done.returncode == 0, done.stderr
        assert expected.items() <= json.loads(done.stderr).items()


def test_psk_alone_and_with_certificates(hybridkex: Forkserver, tmp_path: Path, keys: Path) -> None:
    psk = ["--psk", PSK, "--psk-import", "aabb"]
    with hybridkex.listening(tmp_path, *psk, "--echo") as (port, _):
        done = hybridkex.run("connect", "localhost", port, *psk, "--json", data=b"x")
        assert done.returncode == 0, done.stderr
        session = json.loads(done.stderr)
        assert (session["auth"], session["psk_identity"]) == ("psk", "qkd-1")
        other = hybridkex.run(
            "connect", "localhost", port, "--psk", "qkd-1:" + "00" * 32, data=b"x"
        )
        assert other.returncode == 1
        assert "handshake failed" in one_line(other.stderr)
    with hybridkex.listening(tmp_path, *server_keys(keys), *psk, "--echo") as (port, _):
        ca = str(keys / "ca.pem")
        done = hybridkex.run("connect", "localhost", port, *psk, "--ca", ca, "--json", data=b"x")
        assert json.loads(done.stderr)["auth"] == "certificate+psk"


def test_client_certificates(hybridkex: Forkserver, tmp_path: Path, keys: Path) -> None:
    ca = str(keys / "ca.pem")
    words = [*server_keys(keys), "--ca", ca, "--require-client-cert", "--echo"]
    with hybridkex.listening(tmp_path, *words) as (port, _):
        bare = hybridkex.run("connect", "localhost", port, "--ca", ca, data=b"x")
        assert bare.returncode == 1
        assert "certificate_required" in bare.stderr.decode()
        done = hybridkex.run(
            "connect", "localhost", port, "--ca", ca, *server_keys(keys), data=b"x"
        )
        assert (done.returncode, done.stdout) == (0, b"x"), done.stderr


def test_trust(hybridkex: Forkserver, tmp_path: Path, keys: Path) -> None:
    with hybridkex.listening(tmp_path, *server_keys(keys), "--echo") as (port, _):
        stranger = hybridkex.run("connect", "localhost", port, data=b"x")
        assert stranger.returncode == 1
        text = one_line(stranger.stderr)
        assert "handshake failed" in text or "trust store" in text
        ca = str(keys / "ca.pem")
        wrong_name = hybridkex.run(
            "connect", "localhost", port, "--ca", ca, "--server-name", "else.example", data=b"x"
        )
        assert "not for else.example" in one_line(wrong_name.stderr)
        wrong_pin = hybridkex.run("connect", "localhost", port, "--pin", "00" * 32, data=b"x")
        pin = re.search(r"has the key ([0-9a-f]{64})", one_line(wrong_pin.stderr))
        assert pin is not None
        assert (
            hybridkex.run("connect", "localhost", port, "--pin", pin[1], data=b"x").returncode == 0
        )
        loud = hybridkex.run("connect", "localhost", port, "--insecure", "--json", data=b"x")
        assert loud.returncode == 0
        assert b"WARNING" in loud.stderr
        assert b'"auth": "nothing"' in loud.stderr


def test_keylog_holds_the_secrets_of_the_session(
    hybridkex: Forkserver, tmp_path: Path, keys: Path
) -> None:
    log = tmp_path / "keys.log"
    with hybridkex.listening(tmp_path, *server_keys(keys), "--echo") as (port, _):
        words = ["--ca", str(keys / "ca.pem"), "--keylog", str(log)]
        assert hybridkex.run("connect", "localhost", port, *words, data=b"x").returncode == 0
    labels = [line.split()[0] for line in log.read_text().splitlines()]
    assert set(labels) == {
        "CLIENT_HANDSHAKE_TRAFFIC_SECRET",
        "SERVER_HANDSHAKE_TRAFFIC_SECRET",
        "CLIENT_TRAFFIC_SECRET_0",
        "SERVER_TRAFFIC_SECRET_0",
        "EXPORTER_SECRET",
    }
    assert log.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "words",
    [
        ["connect", "localhost", "1", "--psk", "nocolon"],
        ["connect", "localhost", "1", "--psk", "a:zz"],
        ["connect", "localhost", "1", "--groups", "nope"],
        ["connect", "localhost", "1", "--ca", "/does/not/exist"],
        ["connect", "localhost", "1", "--insecure", "--pin", "00" * 32],
        ["connect", "no host", "1", "--insecure"],
        ["listen", "0"],
        ["listen", "0", "--cert", "/does/not/exist"],
        ["dev-ca", "/proc/nowhere"],
        ["demo", "/does/not/exist"],
    ],
)
def test_mistakes_are_told_in_one_line(hybridkex: Forkserver, words: list[str]) -> None:
    done = hybridkex.run(*words)
    assert done.returncode == 1
    assert done.stderr.decode().strip().splitlines()[-1].startswith("hybridkex: ")
    assert b"Traceback" not in done.stderr
    assert b"5a5a" not in done.stderr


def test_dev_ca_keeps_what_is_there(hybridkex: Forkserver, keys: Path) -> None:
    before = (keys / "key.pem").read_bytes()
    again = hybridkex.run("dev-ca", str(keys))
    assert again.returncode == 1
    assert "--force" in one_line(again.stderr)
    assert (keys / "key.pem").read_bytes() == before
    assert (keys / "key.pem").stat().st_mode & 0o077 == 0


def only_loopback() -> list[str]:
    """What starts a command where there is no network but loopback, if this machine lets us."""
    words = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    try:
        allowed = subprocess.run([*words, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        allowed = False
    return words if allowed else []


def test_demo(tmp_path: Path) -> None:
    """In a minute of processor time, and readable in a log file: no control characters."""
    command = [*only_loopback(), sys.executable, "-m", "hybridkex", "demo"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [*command, "--keep", str(tmp_path / "eve")], capture_output=True, timeout=600, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 60
    text = done.stdout.decode("ascii")
    assert text.replace("\n", "").isprintable()
    assert max(map(len, text.splitlines())) <= 100
    legs = re.findall(r"^   - (\S+)(?: key (\S+))?", text, re.MULTILINE)
    assert [leg for leg, _ in legs] == ["ML-KEM-768", "X25519", "QKD"]
    assert f"the ID (not the key) {legs[-1][1]}" in text
    assert re.search(
        r"([\d,]+) records was searched for it and for \d+ pieces .* none is there", text
    )
    assert re.search(
        r"over 25 km .*\n +[\d,]+ sifted bits, QBER [12]\.\d+%, [\d,]{7,} secret bits", text
    )
    assert (tmp_path / "eve" / "eve.pcapng").stat().st_size > 10_000_000


# --- a stock OpenSSL ------------------------------------------------------------------------------


def openssl() -> str:
    path = shutil.which("openssl")
    if path is None:
        pytest.skip("needs the openssl command: install your distribution's package 'openssl'")
    return path


def wait_until_open(port: int) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        else:
            return


@contextmanager
def s_server(*words: str) -> Iterator[str]:
    port = free_port()
    process = subprocess.Popen(
        [openssl(), "s_server", "-accept", f"127.0.0.1:{port}", "-tls1_3", "-quiet", *words],
        stdin=subprocess.PIPE,  # it ends when its standard input does
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until_open(port)
        yield str(port)
    finally:
        process.kill()
        process.communicate()


def test_connect_to_stock_openssl(hybridkex: Forkserver, keys: Path) -> None:
    certificates = ["-cert", str(keys / "cert.pem"), "-key", str(keys / "key.pem")]
    with s_server(*certificates, "-rev") as port:
        words = ["--ca", str(keys / "ca.pem"), "--groups", "X25519MLKEM768,x25519", "--json"]
        done = hybridkex.run("connect", "localhost", port, *words, data=b"hello\n")
        assert (done.returncode, done.stdout) == (0, b"olleh\n"), done.stderr
        assert json.loads(done.stderr)["group"] in ("x25519", "X25519MLKEM768")


def test_connect_to_stock_openssl_with_a_psk(hybridkex: Forkserver) -> None:
    identity, _, key = PSK.partition(":")
    words = ["-nocert", "-psk_identity", identity, "-psk", key, "-rev"]
    with s_server(*words) as port:
        ours = ["--psk", PSK, "--groups", "x25519", "--suites", "TLS_AES_128_GCM_SHA256", "--json"]
        done = hybridkex.run("connect", "localhost", port, *ours, data=b"hello\n")
        assert (done.returncode, done.stdout) == (0, b"olleh\n"), done.stderr
        assert json.loads(done.stderr)["auth"] == "psk"


def test_stock_openssl_connects_to_listen(
    hybridkex: Forkserver, tmp_path: Path, keys: Path
) -> None:
    words = [*server_keys(keys), "--echo", "--groups", "X25519MLKEM768,x25519"]
    with hybridkex.listening(tmp_path, *words) as (port, _):
        client = subprocess.Popen(
            [
                *(openssl(), "s_client", "-connect", f"127.0.0.1:{port}", "-tls1_3", "-quiet"),
                *("-CAfile", str(keys / "ca.pem"), "-verify_return_error"),
                *("-verify_hostname", "localhost"),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert client.stdin is not None
        assert client.stdout is not None
        client.stdin.write(b"hello\n")
        client.stdin.flush()
        assert client.stdout.readline() == b"hello\n"
        client.kill()
        client.communicate()
