"""A plain connection is upgraded to TLS at servers that nobody here wrote: PostgreSQL (SSLRequest),
an SMTP server (STARTTLS), and a web server behind an HTTP proxy (CONNECT)."""

import asyncio
import contextlib
import os
import shutil
import ssl
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aio_glue import Run, closed, echo, plain_server

from hybridkex import (
    SECP256R1,
    X25519,
    ClientConfig,
    DevCa,
    Policy,
    Requirement,
    TrustStore,
)
from hybridkex.aio import SecureConnectionError, upgrade
from hybridkex.auth.dev_ca import write_identity
from hybridkex.errors import CertificateRejected
from interop.ports import free_port


@pytest.fixture
def client(ca: DevCa) -> ClientConfig:
    """For servers with OpenSSL 3.0, which has no ML-KEM."""
    return ClientConfig(
        verifier=TrustStore((ca.certificate,)),
        groups=(X25519, SECP256R1),
        policy=Policy(post_quantum=Requirement.PREFER),
    )


@pytest.fixture
def stranger(client: ClientConfig) -> ClientConfig:
    """Trusts another authority."""
    verifier = TrustStore((DevCa.create().certificate,))
    return ClientConfig(verifier=verifier, groups=client.groups, policy=client.policy)


@pytest.fixture
def stock(tmp_path: Path, ca: DevCa) -> ssl.SSLContext:
    """The server's side, of the standard library."""
    write_identity(tmp_path, ca, ca.issue("localhost"))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    return context


# --- PostgreSQL -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def postgresql(ca: DevCa) -> Iterator[int]:
    """The port of a server with TLS 1.3."""
    initdb, server = shutil.which("initdb"), shutil.which("postgres")
    if initdb is None or server is None:
        pytest.skip("PostgreSQL is not installed, or is not in PATH")
    with tempfile.TemporaryDirectory(prefix="hybridkex-") as name:
        folder = Path(name)
        write_identity(folder, ca, ca.issue("localhost"))
        as_user: dict[str, Any] = {}
        if os.geteuid() == 0:  # which PostgreSQL refuses
            as_user = {"user": "postgres", "group": "postgres"}
            try:
                for path in (folder, *folder.iterdir()):
                    shutil.chown(path, **as_user)
            except LookupError:
                pytest.skip("root cannot run PostgreSQL, and there is no user postgres")
        with serving_postgresql(initdb, server, folder, as_user) as port:
            yield port


@contextlib.contextmanager
def serving_postgresql(
    initdb: str, server: str, folder: Path, as_user: dict[str, Any]
) -> Iterator[int]:
    data = folder / "data"
    subprocess.run(
        [initdb, "-D", data, "-A", "trust", "-U", "postgres", "--no-sync", "--locale=C"],
        check=True,
        capture_output=True,
        cwd=folder,
        **as_user,
    )
    port: int = free_port()
    settings = {
        "listen_addresses": "127.0.0.1",
        "port": port,
        "unix_socket_directories": "",
        "ssl": "on",
        "ssl_cert_file": folder / "cert.pem",
        "ssl_key_file": folder / "key.pem",
        "ssl_min_protocol_version": "TLSv1.3",
        "fsync": "off",
    }
    options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
    process = subprocess.Popen(
        [server, "-D", data, *options],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        **as_user,
    )
    assert process.stderr is not None
    try:
        assert any("ready to accept connections" in line for line in process.stderr)
        yield port
    finally:
        process.terminate()
        process.communicate(timeout=20)


async def ask_for_tls(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """An SSLRequest, and the server's consent."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(struct.pack("!ii", 8, 80877103))
    assert await reader.readexactly(1) == b"S"
    return reader, writer


async def message(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Type and body of one message of PostgreSQL's protocol."""
    kind, length = struct.unpack("!ci", await reader.readexactly(5))
    return kind, await reader.readexactly(length - 4)


async def ready(reader: asyncio.StreamReader) -> list[tuple[bytes, bytes]]:
    """All messages until the server is ready for a query."""
    found = [await message(reader)]
    while found[-1][0] != b"Z":
        found.append(await message(reader))
    return found


def test_postgresql(run: Run, client: ClientConfig, postgresql: int) -> None:
    async def query(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, text: str
    ) -> list[bytes]:
        """The columns of the first row."""
        body = text.encode() + b"\0"
        writer.write(b"Q" + struct.pack("!i", 4 + len(body)) + body)
        [row] = [body for kind, body in await ready(reader) if kind == b"D"]
        (count,), row, columns = struct.unpack("!h", row[:2]), row[2:], []
        for _ in range(count):
            size = int.from_bytes(row[:4], "big")
            columns.append(row[4 : 4 + size])
            row = row[4 + size :]
        return columns

    async def main() -> None:
        reader, plain = await ask_for_tls(postgresql)
        reader, writer = await upgrade(reader, plain, client, server_hostname="localhost")
        session = writer.get_extra_info("hybridkex_session")
        hello = struct.pack("!i", 196608) + b"user\0postgres\0database\0postgres\0\0"
        writer.write(struct.pack("!i", 4 + len(hello)) + hello)
        await ready(reader)
        view = "pg_stat_ssl where pid = pg_backend_pid()"
        found = await query(reader, writer, f"select ssl, version, cipher from {view}")
        assert found == [b"t", b"TLSv1.3", session.cipher_suite.encode()]
        [long] = await query(reader, writer, "select repeat('x', 3000000)")
        assert long == b"x" * 3_000_000
        writer.write(b"X" + struct.pack("!i", 4))
        await closed(writer)

    run(main())


def test_postgresql_of_another_authority(run: Run, stranger: ClientConfig, postgresql: int) -> None:
    async def main() -> None:
        reader, writer = await ask_for_tls(postgresql)
        with pytest.raises(SecureConnectionError) as caught:
            await upgrade(reader, writer, stranger, server_hostname="localhost")
        assert isinstance(caught.value.__cause__, CertificateRejected)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    run(main())


# --- SMTP -------------------------------------------------------------------------------------


def test_smtp(run: Run, client: ClientConfig, stock: ssl.SSLContext) -> None:
    """A mail to aiosmtpd, which takes none before STARTTLS."""
    smtp = pytest.importorskip("aiosmtpd.smtp", reason="needs aiosmtpd: pip install aiosmtpd")
    mails: list[tuple[str, bytes, bool]] = []

    class Handler:
        async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
            mails.append((envelope.mail_from, envelope.content, session.ssl is not None))
            return "250 taken"

    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(
            lambda: smtp.SMTP(
                Handler(), hostname="localhost", tls_context=stock, require_starttls=True
            ),
            "127.0.0.1",
            0,
        )
        port = server.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)

        async def say(line: str, code: int) -> None:
            if line:
                writer.write(line.encode() + b"\r\n")
            while (answer := await reader.readline())[3:4] == b"-":
                pass
            assert answer.startswith(str(code).encode()), answer

        await say("", 220)
        await say("EHLO localhost", 250)
        await say("MAIL FROM:<alice@localhost>", 530)
        await say("STARTTLS", 220)
        plain = writer
        reader, writer = await upgrade(reader, plain, client, server_hostname="localhost")
        await say("EHLO localhost", 250)
        await say("MAIL FROM:<alice@localhost>", 250)
        await say("RCPT TO:<bob@localhost>", 250)
        await say("DATA", 354)
        await say("Subject: a test\r\n\r\nhello\r\n.", 250)
        await say("QUIT", 221)
        with contextlib.suppress(ConnectionError):  # aiosmtpd leaves without close_notify
            await closed(writer)
        server.close()
        await server.wait_closed()
        await asyncio.sleep(0.05)
        assert mails == [("alice@localhost", b"Subject: a test\r\n\r\nhello\r\n", True)]

    run(main())


# --- an HTTP proxy ----------------------------------------------------------------------------


async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """CONNECT of RFC 9110 section 9.3.6, and nothing else."""
    request = (await reader.readuntil(b"\r\n\r\n")).split()
    assert request[0] == b"CONNECT"
    host, port = request[1].decode().rsplit(":", 1)
    there_reader, there_writer = await asyncio.open_connection(host, int(port))
    writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")

    async def carry(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(1 << 16):
                sink.write(data)
                await sink.drain()
            sink.write_eof()

    await asyncio.gather(carry(reader, there_writer), carry(there_reader, writer))
    for one in (there_writer, writer):
        with contextlib.suppress(ConnectionError):
            await closed(one)


def test_through_an_http_proxy(run: Run, client: ClientConfig, stock: ssl.SSLContext) -> None:
    async def main() -> None:
        async with plain_server(echo, ssl=stock) as port, plain_server(proxy) as proxy_port:
            reader, plain = await asyncio.open_connection("127.0.0.1", proxy_port)
            plain.write(f"CONNECT 127.0.0.1:{port} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            assert (await reader.readuntil(b"\r\n\r\n")).split()[1] == b"200"
            reader, writer = await upgrade(reader, plain, client, server_hostname="localhost")
            data = os.urandom(1 << 20)
            writer.write(data)
            assert await reader.readexactly(len(data)) == data
            await closed(writer)
            await asyncio.sleep(0.05)

    run(main())
