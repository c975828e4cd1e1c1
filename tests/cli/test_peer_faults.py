"""What the two ends of a connection say when their options do not fit: the reason, whose side it
is, and what to change."""

from pathlib import Path

import pytest
from forked import Forkserver, one_line

ALPN = ("--alpn", "hybridkex-transfer/1")
KEY, OTHER_KEY = "5a" * 32, "5b" * 32
BESIDE = ("TLS 1.3", "  keys rest on", "  authenticated", "  peer", "  ALPN")
PLAIN = ("--cert", "cert.pem", "--key", "key.pem")
MUTUAL = (*PLAIN, "--ca", "ca.pem", "--require-client-cert")
PSK = ("--psk", f"site:{KEY}")
CA = ("--ca", "ca.pem")
FAULTS: tuple[tuple[tuple[str, ...], tuple[str, ...], str, str], ...] = (
    # options of the server, of the client, what the client says, what the server says
    (MUTUAL, CA, "it demands a certificate, and got none", "the client sent no certificate"),
    (
        MUTUAL,
        (*CA, "--cert", "other/cert.pem", "--key", "other/key.pem"),
        "unknown_ca: it does not trust the authority of our certificate",
        "same name, other key",
    ),
    (PLAIN, ("--ca", "other/ca.pem"), "same name, other key", "does not trust the authority"),
    (
        PLAIN,
        (*CA, "--server-name", "db.example"),
        "is for localhost, 127.0.0.1, ::1, not for db.example",
        "bad_certificate: it refuses our certificate",
    ),
    (
        PLAIN,
        ("--pin", "00" * 32),
        "which is not pinned",
        "certificate_unknown: it refuses our certificate",
    ),
    (PLAIN, (*CA, *PSK), "the server did not take one", "too weak for it: no PSK"),
    (PSK, CA, "no group, cipher suite, signature algorithm or PSK in common", "offers no PSK"),
    (
        PSK,
        ("--psk", f"other:{KEY}"),
        "no group, cipher suite, signature algorithm or PSK in common",
        "offers no PSK that we know",
    ),
    (PSK, ("--psk", f"site:{OTHER_KEY}"), "the two ends may have different keys", "another key"),
    (
        (*PLAIN, "--groups", "x25519"),
        CA,
        "'--groups X25519MLKEM768,x25519' also offers a classical one",
        "no group in common",
    ),
    (PLAIN, (*CA, "--groups", "x25519"), "no group, cipher suite", "no group in common"),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, forkserver: Forkserver) -> Path:
    folder = tmp_path_factory.mktemp("peers")
    for words in (("dev-ca", "."), ("dev-ca", "other")):
        assert forkserver.run(*words, folder=folder).returncode == 0
    (folder / "file").write_text("hello")
    return folder


@pytest.mark.parametrize("command", ["connect", "send"])
@pytest.mark.parametrize(
    ("server", "client", "said", "logged"), FAULTS, ids=[said[:30] for _, _, said, _ in FAULTS]
)
def test_both_ends_say_why(
    hybridkex: Forkserver,
    place: Path,
    command: str,
    server: tuple[str, ...],
    client: tuple[str, ...],
    said: str,
    logged: str,
) -> None:
    with hybridkex.listening(place, "--once", *ALPN, *server) as (port, listening):
        where = ("localhost", port) if command == "connect" else ("file", f"localhost:{port}")
        done = hybridkex.run(command, *where, *client, folder=place)
        assert done.returncode == 1
        assert said in one_line(done.stderr, beside=BESIDE)
        assert listening.wait(30) == 1
    assert logged in one_line(listening.told(), beside=BESIDE)
