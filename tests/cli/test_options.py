"""What each option of ``connect``, ``listen`` and ``dev-ca`` does, told by what the two ends say.

Trust, client certificates, resumption and --once are in ``test_channel_commands.py``.
"""

import json
import re
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from forked import Forkserver, one_line
from waiting import until

from hybridkex.auth.dev_ca import DevCa, write_identity
from hybridkex.cli import main

KEY = "5a" * 32
PSK = ("--psk", f"site:{KEY}")
SPELLED = {
    "version", "cipher_suite", "group", "parts", "signature_scheme", "alpn", "psk_identity", "auth",
    "resumed", "peer_subject",
}  # fmt: skip


def server_keys(folder: Path) -> list[str]:
    return ["--cert", str(folder / "cert.pem"), "--key", str(folder / "key.pem")]


def session(stderr: bytes) -> dict[str, Any]:
    found = json.loads(one_line(stderr, beside=["hybridkex: WARNING"]))
    assert isinstance(found, dict)
    return found


# --- pre-shared keys ------------------------------------------------------------------------------

SUITE_OF = {"sha256": "TLS_AES_128_GCM_SHA256", "sha384": "TLS_AES_256_GCM_SHA384"}


@pytest.mark.parametrize("psk_hash", ["sha256", "sha384"])
def test_psk_hash_chooses_the_suite(hybridkex: Forkserver, tmp_path: Path, psk_hash: str) -> None:
    """A PSK goes with the suites of its own hash (RFC 9846 section 4.3.11)."""
    words = (*PSK, "--psk-hash", psk_hash)
    other = next(name for name in SUITE_OF if name != psk_hash)
    with hybridkex.listening(tmp_path, *words, "--echo", "--json") as (port, server):
        connect = ("connect", "localhost", port, *PSK, "--json")
        done = hybridkex.run(*connect, "--psk-hash", psk_hash, data=b"hello")
        assert (done.returncode, done.stdout) == (0, b"hello"), done.stderr
        ours = session(done.stderr)
        assert (ours["auth"], ours["psk_identity"]) == ("psk", "site")
        assert ours["cipher_suite"].rpartition("_")[2].lower() == psk_hash
        assert session(server.told())["cipher_suite"] == ours["cipher_suite"]

        mismatch = hybridkex.run(*connect, "--psk-hash", other)
        assert mismatch.returncode == 1
        assert "handshake failed" in one_line(mismatch.stderr)
        only = hybridkex.run(*connect, "--psk-hash", psk_hash, "--suites", SUITE_OF[other])
        assert only.returncode == 1
        assert "hybridkex: " in one_line(only.stderr)


def test_psk_import_binds_the_context_and_fits_every_suite(
    hybridkex: Forkserver, tmp_path: Path
) -> None:
    """RFC 9258, 4.1: one imported PSK for each hash of the suites."""
    words = (*PSK, "--psk-import", "aabb")
    with hybridkex.listening(tmp_path, *words, "--echo") as (port, _):
        connect = ("connect", "localhost", port, *PSK, "--json")
        for psk_hash, suite in SUITE_OF.items():
            done = hybridkex.run(*connect, "--psk-import", "aabb", "--suites", suite)
            assert session(done.stderr)["cipher_suite"] == suite, psk_hash
        for wrong in (["--psk-import", "aabc"], []):
            refused = hybridkex.run(*connect, *wrong)
            assert refused.returncode == 1
            assert "handshake failed" in one_line(refused.stderr)


def openssl(*words: str) -> list[str]:
    path = shutil.which("openssl")
    if path is None:
        pytest.skip("needs the openssl command: install your distribution's package 'openssl'")
    return [path, *words]


def der(tag: int, content: bytes) -> bytes:
    assert len(content) < 128
    return bytes([tag, len(content)]) + content


def psk_session(folder: Path, psk_hash: str) -> list[str]:
    """The PSK for openssl: by -psk it has SHA-256; with SHA-384 it comes as a session, whose suite
    tells the hash (s_client(1), d2i_SSL_SESSION(3))."""
    if psk_hash == "sha256":
        return ["-psk", KEY]
    fields = (
        (0x02, b"\x01"),  # version of the structure
        (0x02, b"\x03\x04"),  # TLS 1.3
        (0x04, b"\x13\x02"),  # TLS_AES_256_GCM_SHA384
        (0x04, b""),  # session ID
        (0x04, bytes.fromhex(KEY)),
    )
    path = folder / "psk.pem"
    body = der(0x30, b"".join(der(tag, content) for tag, content in fields))
    made = subprocess.run(openssl("base64"), input=body, capture_output=True, check=True).stdout
    label = "SSL SESSION PARAMETERS"
    path.write_text(f"-----BEGIN {label}-----\n{made.decode()}-----END {label}-----\n")
    return ["-psk_session", str(path)]


@pytest.mark.parametrize("psk_hash", ["sha256", "sha384"])
def test_psk_hash_with_stock_openssl_as_client(
    hybridkex: Forkserver, tmp_path: Path, psk_hash: str
) -> None:
    words = (*PSK, "--psk-hash", psk_hash, "--groups", "x25519", "--json", "--once")
    with hybridkex.listening(tmp_path, *words) as (port, server):
        client = openssl("s_client", "-connect", f"127.0.0.1:{port}", "-tls1_3", "-quiet")
        process = subprocess.Popen(
            [*client, "-psk_identity", "site", *psk_session(tmp_path, psk_hash)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert server.stdin is not None
        server.stdin.write(b"hello\n")
        assert process.stdout is not None
        assert process.stdout.readline() == b"hello\n"
        until(lambda: b"\n" in server.told())
        found = session(server.told())
        process.kill()
        process.communicate()
    assert found["auth"] == "psk"
    assert found["cipher_suite"].rpartition("_")[2].lower() == psk_hash


@pytest.mark.parametrize("psk_hash", ["sha256", "sha384"])
def test_psk_hash_with_stock_openssl_as_server(
    hybridkex: Forkserver, tmp_path: Path, psk_hash: str
) -> None:
    process = subprocess.Popen(
        [
            *openssl("s_server", "-accept", "127.0.0.1:0", "-tls1_3", "-nocert", "-rev"),
            *("-psk_identity", "site", *psk_session(tmp_path, psk_hash)),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if opened := re.match(rb"ACCEPT 127\.0\.0\.1:(\d+)", line):
                port = opened[1].decode()
                break
        words = ("--psk-hash", psk_hash, "--groups", "x25519", "--json")
        done = hybridkex.run("connect", "localhost", port, *PSK, *words, data=b"hello\n")
        assert (done.returncode, done.stdout) == (0, b"olleh\n"), done.stderr
        assert session(done.stderr)["cipher_suite"].rpartition("_")[2].lower() == psk_hash
    finally:
        process.kill()
        process.communicate()


# --- what is offered ------------------------------------------------------------------------------


def test_a_classical_group_is_taken_only_by_name(
    hybridkex: Forkserver, tmp_path: Path, keys: Path
) -> None:
    words = (*server_keys(keys), "--echo", "--groups", "x25519")
    with hybridkex.listening(tmp_path, *words) as (port, _):
        connect = ("connect", "localhost", port, "--ca", keys / "ca.pem", "--json")
        refused = hybridkex.run(*connect)
        assert refused.returncode == 1
        assert "handshake failed" in one_line(refused.stderr)
        done = hybridkex.run(*connect, "--groups", "MLKEM1024:X25519")  # order, case, separator
        assert session(done.stderr)["group"] == "x25519"


def test_nothing_in_common(hybridkex: Forkserver, tmp_path: Path, keys: Path) -> None:
    words = (*server_keys(keys), "--echo", "--suites", "TLS_AES_128_GCM_SHA256", "--alpn", "a")
    with hybridkex.listening(tmp_path, *words) as (port, _):
        connect = ("connect", "localhost", port, "--ca", keys / "ca.pem", "--json")
        alpn = hybridkex.run(*connect, "--alpn", "b")
        assert "no_application_protocol" in one_line(alpn.stderr)
        suite = hybridkex.run(*connect, "--suites", "TLS_AES_256_GCM_SHA384")
        assert "handshake_failure" in one_line(suite.stderr)
        assert (alpn.returncode, suite.returncode) == (1, 1)
        done = hybridkex.run(*connect)
        assert session(done.stderr).keys() >= SPELLED
        assert session(done.stderr)["alpn"] is None


# --- certificates, names, pins --------------------------------------------------------------------


def test_the_server_name_is_checked_and_sent(
    hybridkex: Forkserver, tmp_path: Path, keys: Path
) -> None:
    ca = DevCa.create()
    inner = tmp_path / "inner"
    write_identity(inner, ca, ca.issue("inner.example"))
    with hybridkex.listening(tmp_path, *server_keys(inner), "--echo") as (port, _):
        connect = ("connect", "127.0.0.1", port, "--ca", inner / "ca.pem", "--json")
        done = hybridkex.run(*connect, "--server-name", "inner.example")
        assert session(done.stderr)["peer_subject"] == "CN=inner.example"
        refused = hybridkex.run(*connect)
        assert refused.returncode == 1
        assert "not for 127.0.0.1" in one_line(refused.stderr)
        stranger = hybridkex.run(*connect[:3], "--ca", keys / "ca.pem")
        assert stranger.returncode == 1
        assert "handshake failed" in one_line(stranger.stderr)


@pytest.mark.parametrize("algorithm", ["ecdsa", "rsa", "ed25519", "mldsa65"])
def test_dev_ca_makes_what_the_commands_take(
    hybridkex: Forkserver, tmp_path: Path, algorithm: str
) -> None:
    folder = tmp_path / "made"
    made = hybridkex.run("dev-ca", folder, "--name", "localhost", "--alg", algorithm)
    assert (made.returncode, made.stderr) == (0, b"")
    assert {path.name for path in folder.iterdir()} == {"ca.pem", "cert.pem", "key.pem"}
    assert (folder / "key.pem").stat().st_mode & 0o077 == 0
    pin = re.search(r"pin of this key: (\S+)", made.stdout.decode())
    assert pin is not None
    with hybridkex.listening(tmp_path, *server_keys(folder), "--echo") as (port, _):
        both = ("--ca", folder / "ca.pem", "--pin", pin[1])
        done = hybridkex.run("connect", "localhost", port, *both, "--json", data=b"x")
        assert (done.returncode, done.stdout) == (0, b"x"), done.stderr
        scheme = session(done.stderr)["signature_scheme"]
        assert scheme.startswith({"rsa": "rsa_pss"}.get(algorithm, algorithm)), scheme
        one_wrong = hybridkex.run("connect", "localhost", port, *both[:3], "00" * 32)
        assert one_wrong.returncode == 1
        assert "has the key" in one_line(one_wrong.stderr)


def test_insecure_says_so_loudly_on_either_side(
    hybridkex: Forkserver, tmp_path: Path, keys: Path
) -> None:
    words = (*server_keys(keys), "--insecure", "--require-client-cert", "--echo")
    with hybridkex.listening(tmp_path, *words) as (port, server):
        done = hybridkex.run("connect", "localhost", port, "--insecure", *server_keys(keys))
        assert done.returncode == 0
        for told in (done.stderr, server.told()):
            assert b"WARNING: --insecure: the peer's certificate is NOT checked" in told
            assert b"(insecure)" in told


# --- files, addresses, ends -----------------------------------------------------------------------


def test_key_logs_of_both_sides_are_the_same(
    hybridkex: Forkserver, tmp_path: Path, keys: Path
) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    with hybridkex.listening(tmp_path, *server_keys(keys), "--echo", "--keylog", theirs) as (
        port,
        _,
    ):
        for _ in range(2):
            words = ("--ca", keys / "ca.pem", "--keylog", ours)
            assert hybridkex.run("connect", "localhost", port, *words).returncode == 0
    lines = ours.read_text().splitlines()
    assert len(lines) == 10  # five labels for each session: it is appended to
    assert sorted(lines) == sorted(theirs.read_text().splitlines())


def test_bind_on_either_side(hybridkex: Forkserver, tmp_path: Path, keys: Path) -> None:
    ca = ("--ca", keys / "ca.pem", "--server-name", "localhost")
    words = (*server_keys(keys), "--echo", "--bind", "127.0.0.2")
    with hybridkex.listening(tmp_path, *words) as (port, _):
        assert hybridkex.run("connect", "127.0.0.2", port, *ca).returncode == 0
        elsewhere = hybridkex.run("connect", "127.0.0.1", port, *ca)
        assert elsewhere.returncode == 1
        assert "refused" in one_line(elsewhere.stderr)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        client = hybridkex.start("connect", "127.0.0.1", port, *ca, "--bind", "127.0.0.3")
        accepted, (address, _) = listener.accept()
        accepted.close()
        assert address == "127.0.0.3"
        assert client.wait() == 1
        assert "handshake failed" in one_line(client.told())


def test_once_ends_and_a_cut_connection_is_no_success(
    hybridkex: Forkserver, tmp_path: Path, keys: Path
) -> None:
    with hybridkex.listening(tmp_path, *server_keys(keys), "--once") as (port, server):
        client = hybridkex.start("connect", "localhost", port, "--ca", keys / "ca.pem")
        until(lambda: b"peer:" in client.told() and b"keys from:" in server.told())
        server.kill()
        assert client.wait() == 1
        assert "close_notify" in client.told().decode().splitlines()[-1]
    with hybridkex.listening(tmp_path, *server_keys(keys), "--once") as (port, server):
        # A stranger who says nothing useful ends it, too, and it is told.
        with socket.create_connection(("127.0.0.1", int(port))) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            stranger.settimeout(30)
            assert stranger.recv(16)[:1] == b"\x15"  # an alert
        assert server.wait() == 1
        assert "handshake failed" in one_line(server.told())
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", int(port)))


def test_an_echo_serves_several_at_the_same_time(
    hybridkex: Forkserver, tmp_path: Path, keys: Path
) -> None:
    with hybridkex.listening(tmp_path, *server_keys(keys), "--echo") as (port, server):
        words = ("connect", "localhost", port, "--ca", keys / "ca.pem")
        clients = [hybridkex.start(*words) for _ in range(3)]
        until(lambda: all(b"peer:" in client.told() for client in clients))
        for index, client in reversed(list(enumerate(clients))):  # all of them are open
            assert client.communicate(b"%d" % index)[0] == b"%d" % index
            assert client.returncode == 0
        assert server.poll() is None


def test_without_echo_the_peers_wait_for_each_other(
    hybridkex: Forkserver, tmp_path: Path, keys: Path
) -> None:
    with hybridkex.listening(tmp_path, *server_keys(keys)) as (port, server):
        words = ("connect", "localhost", port, "--ca", keys / "ca.pem")
        first, second = hybridkex.start(*words), hybridkex.start(*words)
        until(lambda: b"peer:" in first.told() or b"peer:" in second.told())
        assert server.stdin is not None
        server.stdin.close()
        for client in (first, second):  # either may be the one that is served first
            assert client.stdin is not None
            client.stdin.write(b"hello ")
            client.stdin.close()
        for client in (first, second):
            assert client.wait() == 0
        until(lambda: server.said() == b"hello hello ")


@pytest.mark.parametrize("path", ["/", ".", "..", "~", "//", "x" * 5000])
def test_paths_without_a_name_as_a_key_pool(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The name of its key file would be made from it."""
    assert main(["connect", "localhost", "1", "--key-pool", path]) == 1
    assert capsys.readouterr().err.count("\n") == 1
