"""What the two ends of a connection say when their options do not fit: the reason, whose side it
is, and what to change."""

import contextlib
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from forked import Forkserver, one_line
from waiting import until

from hybridkex.qkd.store import write_key_file

ALPN = ("--alpn", "hybridkex-transfer/2")
KEY, OTHER_KEY = "5a" * 32, "5b" * 32
BESIDE = ("TLS 1.3", "  keys from:", "  authenticated", "  peer", "  ALPN")
PLAIN = ("--cert", "cert.pem", "--key", "key.pem")
MUTUAL = (*PLAIN, "--ca", "ca.pem", "--require-client-cert")
PSK = ("--psk", f"site:{KEY}")
CA = ("--ca", "ca.pem")
FAULTS: tuple[tuple[tuple[str, ...], tuple[str, ...], str, str], ...] = (
    # options of the server, of the client, what the client says, what the server says
    (MUTUAL, CA, "it requires a certificate, and got none", "the client sent no certificate"),
    (
        MUTUAL,
        (*CA, "--cert", "other/cert.pem", "--key", "other/key.pem"),
        "unknown_ca: it does not trust the authority of our certificate",
        "has the same name and another key",
    ),
    (
        PLAIN,
        ("--ca", "other/ca.pem"),
        "has the same name and another key",
        "does not trust the authority",
    ),
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
    (
        PLAIN,
        (*CA, *PSK),
        "the server did not select one",
        "requires more than we negotiated: a PSK",
    ),
    (PSK, CA, "no group, cipher suite, signature algorithm or PSK in common", "offers none"),
    (
        PSK,
        ("--psk", f"other:{KEY}"),
        "no group, cipher suite, signature algorithm or PSK in common",
        "offers none that we know",
    ),
    (PSK, ("--psk", f"site:{OTHER_KEY}"), "the two ends may have different keys", "another key"),
    (
        (*PLAIN, "--groups", "x25519"),
        CA,
        "'--groups X25519MLKEM768,x25519' also offers a classical one",
        "no group in common",
    ),
    (PLAIN, (*CA, "--groups", "x25519"), "no group, cipher suite", "no group in common"),
    ((*PLAIN, "--fresh-keys", "peer"), CA, "fresh keys", "fresh keys"),
)


PEER_KEY = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
WG = ("wg-psk", "--interface", "wg0", "--peer-key", PEER_KEY, "--wg", "./wg",
      "--log-level", "warning", "--fresh-psk", "prefer", "--initial-psk", "random")  # fmt: skip
WG_SCRIPT = f"""#!/bin/sh
[ "$1" = show ] && printf '%s\\t(none)\\n' {PEER_KEY} || cat >/dev/null
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, forkserver: Forkserver) -> Path:
    folder = tmp_path_factory.mktemp("peers")
    for words in (("dev-ca", "."), ("dev-ca", "other")):
        assert forkserver.run(*words, folder=folder).returncode == 0
    (folder / "file").write_text("hello")
    write_key_file(folder / "psk")
    write_key_file(folder / "other-psk")
    (folder / "wg").write_text(WG_SCRIPT)
    (folder / "wg").chmod(0o755)
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


@pytest.mark.parametrize(
    ("server", "client", "said", "logged"), FAULTS, ids=[said[:30] for _, _, said, _ in FAULTS]
)
def test_both_ends_of_a_tunnel_say_why(
    hybridkex: Forkserver,
    place: Path,
    tmp_path: Path,
    server: tuple[str, ...],
    client: tuple[str, ...],
    said: str,
    logged: str,
) -> None:
    words = ("--port-file", tmp_path / "far", "--log-level", "warning")
    far = hybridkex.start(
        *("tunnel", "listen", "--local", "127.0.0.1:0", "--target", "127.0.0.1:1", *words),
        *server,
        folder=place,
    )
    until((tmp_path / "far").exists, far)
    told = through_a_tunnel(hybridkex, place, tmp_path, (tmp_path / "far").read_text(), client)
    assert said in told
    until(lambda: bool(far.told()))
    assert logged in one_line(far.told())
    assert far.poll() is None


def through_a_tunnel(
    hybridkex: Forkserver, place: Path, tmp_path: Path, port: str, options: tuple[str, ...]
) -> str:
    """What ``tunnel connect`` says of one connection."""
    near = hybridkex.start(
        *("tunnel", "connect", "--local", "127.0.0.1:0", "--remote", f"localhost:{port.strip()}"),
        *("--port-file", tmp_path / "near", *options),
        folder=place,
    )
    until((tmp_path / "near").exists, near)
    where = ("127.0.0.1", int((tmp_path / "near").read_text()))
    with socket.create_connection(where) as program, contextlib.suppress(OSError):
        program.settimeout(30)
        assert program.recv(1) == b""
    # A server that refuses our certificate does so after our handshake is done (RFC 9846 section
    # 4.5.1.3): the connection was open for a moment.

    def ends() -> list[str]:
        return [line for line in near.lines() if " refused: " in line or " cut: " in line]

    until(lambda: bool(ends()))
    assert near.poll() is None
    (line,) = ends()
    return line


# --- peers that are something else ----------------------------------------------------------------

Act = Callable[[socket.socket], object]


def reset(peer: socket.socket) -> None:
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def hears_and_resets(peer: socket.socket) -> None:
    peer.recv(1)
    reset(peer)


def hears_and_closes(peer: socket.socket) -> None:
    time.sleep(0.05)
    peer.recv(1 << 16)


def says(words: bytes, peer: socket.socket) -> None:
    peer.sendall(words)
    peer.shutdown(socket.SHUT_WR)
    while peer.recv(1 << 16):
        pass


def tls(folder: Path, most: ssl.TLSVersion, peer: socket.socket) -> None:
    """OpenSSL, which has no ML-KEM before 3.5."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    context.maximum_version = most
    with contextlib.suppress(OSError), context.wrap_socket(peer, server_side=True) as channel:
        channel.recv(1)


def cuts_after_the_handshake(folder: Path, peer: socket.socket) -> None:
    """No close_notify: as a proxy's idle time-out, or a program that is killed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    with contextlib.suppress(OSError), context.wrap_socket(peer, server_side=True) as channel:
        channel.send(b"x")
        channel.recv(1 << 16)


def test_a_cut_after_the_handshake(hybridkex: Forkserver, place: Path) -> None:
    with somebody(partial(cuts_after_the_handshake, place)) as port:
        done = hybridkex.run("connect", "localhost", port, *CA, "--groups", "x25519", folder=place)
    assert done.returncode == 1
    assert "without close_notify, so data may be missing" in one_line(done.stderr, beside=BESIDE)


def test_a_proxy_with_nothing_behind_it(hybridkex: Forkserver, place: Path) -> None:
    with somebody(hears_and_closes) as port:
        groups = ("--groups", "X25519MLKEM768,x25519")
        done = hybridkex.run("connect", "localhost", port, *CA, *groups, folder=place)
    assert "closed the connection during the handshake; see its log, or" in one_line(done.stderr)


CUT = "the other end cut the connection (Connection reset by peer): its log may say why"
CLOSED = "closed the stream during the exchange: it may have another key, or be configured"
NO_MESSAGE = "the peer sent no message of this exchange"
OTHERS: tuple[tuple[str, Act | str, str, str], ...] = (
    # who is there; what clients of TLS say, what wg-psk says
    ("resets", hears_and_resets, CUT, CUT),
    ("closes", hears_and_closes, "the server may lack a post-quantum group: '--groups", CLOSED),
    ("HTTP", partial(says, b"HTTP/1.1 400 Bad Request\r\n\r\n"), "a plain HTTP response; is this",
     f"{NO_MESSAGE}: a length of 1213486160 bytes, or the text 'HTTP'"),
    ("SSH", partial(says, b"SSH-2.0-OpenSSH_9.2p1\r\n"), "an SSH greeting",
     "or the text 'SSH-', where"),
    ("SMTP", partial(says, b"220 mail ESMTP\r\n"), "a mail or FTP server; it expects STARTTLS",
     "check the address and the port"),
    ("zeros", partial(says, bytes(200)), "these bytes are not TLS",
     f"{NO_MESSAGE} (4 bytes are expected and 0 are left); check the address and the port"),
    ("TLS 1.2", "TLSv1_2", "protocol_version: it does not speak TLS 1.3", ""),
    ("TLS 1.3 without ML-KEM", "TLSv1_3", "the server may lack a post-quantum group", ""),
    ("nobody", "", "Connection refused; no program listens there: start the server, or check",
     "Connection refused; no program listens there: start the server, or check"),
)  # fmt: skip


@contextlib.contextmanager
def somebody(act: Act) -> Iterator[str]:
    """A TCP server in a thread; its port."""

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                peer, _ = listening.accept()
                with peer, contextlib.suppress(OSError):
                    act(peer)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield str(listening.getsockname()[1])
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join(30)


@pytest.mark.parametrize("command", ["connect", "send", "tunnel", "wg-psk"])
@pytest.mark.parametrize(("who", "act", "said", "said_outside"), OTHERS, ids=[o[0] for o in OTHERS])
def test_a_peer_that_is_something_else(
    hybridkex: Forkserver,
    place: Path,
    tmp_path: Path,
    command: str,
    who: str,
    act: Act | str,
    said: str,
    said_outside: str,
) -> None:
    if isinstance(act, str) and act:
        version = ssl.TLSVersion[act]
        if ssl.OPENSSL_VERSION_INFO >= (3, 5) and act == "TLSv1_3":
            pytest.skip("this OpenSSL has ML-KEM")
        act = partial(tls, place, version)
    with contextlib.ExitStack() as stack:
        if isinstance(act, str):
            closed = stack.enter_context(socket.socket())
            closed.bind(("127.0.0.1", 0))
            port = str(closed.getsockname()[1])
        else:
            port = stack.enter_context(somebody(act))
        if command == "tunnel":
            line = through_a_tunnel(hybridkex, place, tmp_path, port, CA)
        else:
            words = {
                "connect": ("connect", "localhost", port, *CA),
                "send": ("send", "file", f"localhost:{port}", *CA),
                "wg-psk": (*WG, "--local", "a", "--peer", "b", "--connect", f"127.0.0.1:{port}",
                           "--once", "--psk-file", "psk"),
            }[command]  # fmt: skip
            done = hybridkex.run(*words, folder=place)
            assert done.returncode == 1
            line = one_line(done.stderr)
    assert "[Errno" not in line
    assert (said_outside if command == "wg-psk" else said) in line, who


WG_FAULTS = (
    # of the responder, of the initiator; what the responder says
    (("--psk-file", "other-psk"), ("--psk-file", "psk"), "it has another pre-shared key, or is"),
    (("--key", "key.pem", "--pin", "00" * 32), ("--key", "key.pem", "--pin", "11" * 32), "pin"),
    (("--key", "key.pem", "--pin", "00" * 32), ("--psk-file", "psk"), ""),
)


@pytest.mark.parametrize(("responder", "initiator", "logged"), WG_FAULTS)
def test_both_ends_of_an_exchange_say_why(
    hybridkex: Forkserver,
    place: Path,
    tmp_path: Path,
    responder: tuple[str, ...],
    initiator: tuple[str, ...],
    logged: str,
) -> None:
    far = hybridkex.start(
        *(*WG, "--local", "b", "--peer", "a", "--listen", "127.0.0.1:0"),
        *("--port-file", tmp_path / "port", *responder),
        folder=place,
    )
    until((tmp_path / "port").exists, far)
    where = ("--connect", f"127.0.0.1:{(tmp_path / 'port').read_text().strip()}", "--once")
    done = hybridkex.run(*WG, "--local", "a", "--peer", "b", *where, *initiator, folder=place)
    assert done.returncode == 1
    assert CLOSED in one_line(done.stderr, beside=("20",))
    until(lambda: b"127.0.0.1" in far.told())
    assert logged in one_line(far.told(), beside=())
    assert far.poll() is None
