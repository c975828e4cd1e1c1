"""Text of the peer's choice, pushed through every door of the command that shows text."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from forked import Forkserver
from waiting import until

from hybridkex import ClientConfig, DevCa, Identity, InsecureNoVerification, SecureStream
from hybridkex.auth.dev_ca import write_identity
from hybridkex.text import json_line
from tests.test_text import MEMBERS, is_safe

FORGED = "x\n2026-11-25 12:00:00,000 INFO forged\r\x1b[2J"
ENCODABLE = "".join(char for char in MEMBERS if not "\ud800" <= char <= "\udfff")
EVIL = FORGED + ENCODABLE


class Evil:
    """An authority and a certificate whose every name is evil, and the PEM files of both."""

    def __init__(self, folder: Path, text: str = EVIL) -> None:
        folder.mkdir()
        attributes = [x509.NameAttribute(NameOID.COMMON_NAME, text[:64])]
        attributes += [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, text[at : at + 64])
            for at in range(0, len(text), 64)
        ]
        name = x509.Name(attributes)
        now = datetime.now(UTC)
        keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
        ascii_text = "".join(char for char in text if char.isascii())

        def certificate(index: int, *extensions: tuple[x509.ExtensionType, bool]) -> Any:
            builder = (
                x509.CertificateBuilder()
                .subject_name(name)
                .issuer_name(name)
                .public_key(keys[index].public_key())
                .serial_number(x509.random_serial_number())
                .not_valid_before(now - timedelta(1))
                .not_valid_after(now + timedelta(1))
            )
            for extension, critical in extensions:
                builder = builder.add_extension(extension, critical)
            return builder.sign(keys[0], hashes.SHA256())

        self.ca = certificate(0, (x509.BasicConstraints(True, None), True))
        leaf = certificate(
            1,
            (
                x509.SubjectAlternativeName(
                    [
                        x509.DNSName(ascii_text),
                        x509.UniformResourceIdentifier(ascii_text),
                        x509.DNSName("localhost"),
                    ]
                ),
                False,
            ),
        )
        pem = leaf.public_bytes(Encoding.PEM)
        key = keys[1].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        self.identity = Identity.from_pem(pem, key)
        for file, content in (
            ("ca.pem", self.ca.public_bytes(Encoding.PEM)),
            ("cert.pem", pem),
            ("key.pem", key),
        ):
            (folder / file).write_bytes(content)
        self.own = ["--cert", str(folder / "cert.pem"), "--key", str(folder / "key.pem")]
        self.trusted = ["--ca", str(folder / "ca.pem")]


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> Evil:
    return Evil(tmp_path_factory.mktemp("evil") / "keys")


def own_lines(shown: bytes, *, least: int = 1) -> list[str]:
    """Nothing in the text steers a terminal, and no line of it is the peer's."""
    text = shown.decode("utf-8")
    assert is_safe(text, keep="\n"), ascii(text)
    lines = text.splitlines()
    assert len(lines) >= least
    for line in lines:
        assert not line.startswith("2026-11-25 12:00:00,000 INFO forged"), text
    assert "Traceback" not in text
    return lines


@pytest.mark.parametrize("form", [[], ["--json"]])
@pytest.mark.parametrize("trust", ["ca", "insecure"])
def test_connect_and_listen(
    hybridkex: Forkserver, tmp_path: Path, evil: Evil, form: list[str], trust: str
) -> None:
    trusted = evil.trusted if trust == "ca" else ["--insecure"]
    server = [*evil.own, *trusted, "--require-client-cert", "--once", "--echo", *form]
    with hybridkex.listening(tmp_path, *server) as (port, listening):
        done = hybridkex.run("connect", "localhost", port, *evil.own, *trusted, *form, data=b"hi")
        _, told = listening.communicate(timeout=30)
    assert done.returncode == 0, done.stderr
    for shown in (done.stderr, told):
        lines = own_lines(shown)
        if form:
            line = lines[-1]  # without verification, a warning comes first
            assert json.loads(line)["peer_subject"]
        else:
            assert sum(line.startswith("  peer:") for line in lines) == 1


@pytest.mark.parametrize("words", [["other.example"], ["localhost"]])
def test_connect_says_why(
    hybridkex: Forkserver, tmp_path: Path, evil: Evil, words: list[str], keys: Path
) -> None:
    """The wrong name, and an authority that is not known: both errors quote the certificate."""
    trusted = evil.trusted if words != ["localhost"] else ["--ca", str(keys / "ca.pem")]
    with hybridkex.listening(tmp_path, *evil.own, "--echo") as (port, listening):
        done = hybridkex.run("connect", "127.0.0.1", port, "--server-name", *words, *trusted)
        assert done.returncode == 1
        (line,) = own_lines(done.stderr)
        assert line.startswith("hybridkex: ")
        assert "forged" in line
        listening.send_signal(15)
        own_lines(listening.communicate()[1], least=0)  # it may end before it logs the refusal


async def test_server_names_and_protocols(
    hybridkex: Forkserver, tmp_path: Path, keys: Path
) -> None:
    """What a client offers in the clear: ALPN in a session, a server name in a refusal."""
    alpn = EVIL.encode("utf-8")[:255].decode("utf-8", "ignore")
    own = ["--cert", str(keys / "cert.pem"), "--key", str(keys / "key.pem")]
    with hybridkex.listening(tmp_path, *own, "--once", "--echo", "--json", "--alpn", "x") as (
        port,
        listening,
    ):
        config = ClientConfig(verifier=InsecureNoVerification(), alpn=(alpn, "x"))
        stream = SecureStream(
            await trio.open_tcp_stream("127.0.0.1", int(port)), config, server_hostname="localhost"
        )
        async with stream:
            with trio.fail_after(30):
                await stream.do_handshake()
                await stream.send_eof()
        own_lines(listening.communicate(timeout=30)[1])


def test_send_and_receive(hybridkex: Forkserver, tmp_path: Path, evil: Evil) -> None:
    folder, port_file = tmp_path / "in", tmp_path / "port"
    folder.mkdir()
    files = tmp_path / "out"
    files.mkdir()
    for number, char in enumerate(MEMBERS):
        if char not in "\0\ud800\udfff":  # no file can have these
            name = f"{number} {FORGED if number % 2 else ''}{char}"
            (files / name).write_bytes(b"content")
    receiving = hybridkex.start(
        *("receive", str(folder), "--port", "0", "--bind", "127.0.0.1", "--port-file", port_file),
        *(*evil.own, *evil.trusted, "--once"),
    )
    until(port_file.exists, receiving)
    done = hybridkex.run(
        *("send", str(files), f"localhost:{port_file.read_text().strip()}"),
        *(*evil.own, *evil.trusted),
    )
    receiving.send_signal(15)
    own_lines(done.stderr + done.stdout, least=len(MEMBERS) // 4)
    own_lines(receiving.communicate(timeout=30)[1])


@pytest.mark.parametrize("form", [[], ["--json"]])
async def test_tunnel(hybridkex: Forkserver, tmp_path: Path, evil: Evil, form: list[str]) -> None:
    port_file, log = tmp_path / "port", tmp_path / "log"
    with log.open("wb") as file:
        tunnel = hybridkex.start(
            *("tunnel", "listen", "--local", "127.0.0.1:0", "--target", "127.0.0.1:9"),
            *("--port-file", port_file, *evil.own, *evil.trusted, "--require-client-cert"),
            *("--allow", "nobody.example", "--log-level", "debug", *form),
            stderr=file,
        )
    until(port_file.exists, tunnel)
    done = hybridkex.run(
        "connect", "localhost", port_file.read_text().strip(), *evil.own, "--insecure"
    )
    own_lines(done.stderr)
    until(lambda: b"nobody" in log.read_bytes() or b"is not allowed" in log.read_bytes(), tunnel)
    tunnel.send_signal(15)
    tunnel.wait()
    own_lines(log.read_bytes(), least=2)


def kme_files(folder: Path) -> tuple[Path, dict[str, Any]]:
    ca = DevCa.create()
    identity = ca.issue("127.0.0.1", "localhost", common_name="kme-a")
    write_identity(folder, ca, identity)
    return folder, {"ca": ca, "identity": identity}


WORDS: list[tuple[int, Callable[[], object]]] = [
    (400, lambda: {"message": EVIL}),
    (503, lambda: {"message": FORGED, "details": [{EVIL: EVIL}]}),
    (200, lambda: {"source_KME_ID": EVIL, "target_KME_ID": EVIL, "master_SAE_ID": EVIL}),
    (
        200,
        lambda: {
            "source_KME_ID": EVIL,
            "target_KME_ID": EVIL,
            "master_SAE_ID": EVIL,
            "slave_SAE_ID": EVIL,
            "key_size": 256,
            "stored_key_count": 1,
            "max_key_count": 1,
            "max_key_per_request": 1,
            "max_key_size": 256,
            "min_key_size": 256,
            "max_SAE_ID_count": 0,
        },
    ),
]


@pytest.mark.parametrize(("status", "words"), WORDS)
async def test_what_a_kme_says(
    hybridkex: Forkserver, tmp_path: Path, status: int, words: Callable[[], object]
) -> None:
    """``kme status`` and ``doctor`` against a KME whose every word is evil, in the reason too."""
    from hybridkex import ServerConfig, TrustStore

    folder, made = kme_files(tmp_path / "kme")
    config = ServerConfig(
        identities=(made["identity"],),
        client_verifier=TrustStore((made["ca"].certificate,)),
        require_client_certificate=True,
        alpn=("http/1.1",),
    )
    body = json_line(words()).encode()

    async def answer(stream: trio.SocketStream) -> None:
        secure = SecureStream(stream, config, https_compatible=True)
        try:
            while b"\r\n\r\n" not in await secure.receive_some():
                pass
            head = (
                f"HTTP/1.1 {status} a\x1b[2Jb\x7f\r\nX-\u00e4: \x9b\r\nContent-Length: {len(body)}"
            )
            head += f"Content-Length: {len(body)}\r\nContent-Type: application/json\r\n\r\n"
            await secure.send_all(head.encode("latin-1") + body)
        except trio.BrokenResourceError:
            pass
        await trio.aclose_forcefully(secure)

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, answer, 0)
        port = listeners[0].socket.getsockname()[1]
        access = ["--kme", f"https://127.0.0.1:{port}", "--kme-ca", folder / "ca.pem"]
        access += ["--kme-cert", folder / "cert.pem", "--kme-key", folder / "key.pem"]
        access += ["--peer-sae", "bob", "--kme-tls", "hybridkex"]
        for command in (["kme", "status", "--sae", "alice"], ["doctor"], ["doctor", "--json"]):
            done = await trio.to_thread.run_sync(lambda c=command: hybridkex.run(*c, *access))
            own_lines(done.stdout + done.stderr)
            if command[-1] == "--json" or (command[0] == "kme" and done.returncode == 0):
                json.loads(done.stdout)
        nursery.cancel_scope.cancel()
