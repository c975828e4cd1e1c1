"""TLS between an SAE and its KME: both kinds accept the same authorities, on all Pythons."""

import ssl
import subprocess
import sys
from pathlib import Path

import pytest
import trio
import trio.testing

from hybridkex.errors import KeySourceError
from hybridkex.qkd.etsi014.mutual_tls import client_tls, server_tls
from tests.auth.corpus import authority, basic, key_of, leaf, san
from tests.auth.der import DAY, NOW, time
from tests.auth.test_corpus import pem

DATES = {"not_before": time(NOW - 7300 * DAY), "not_after": time(NOW + 7300 * DAY)}
AUTHORITIES = {
    "usual": {},
    "without keyUsage (openssl req -x509 of old)": {"ku": None},
    "without key identifiers": {"ids": False},
    "basicConstraints not critical": {"bc": basic(True, critical=False)},
}


def files(folder: Path, root: bytes, certificate: bytes) -> dict[str, Path]:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = key_of("p256/leaf").private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    folder.mkdir(exist_ok=True)
    content = {"ca": pem(root), "certificate": pem(certificate), "key": key}
    for name, data in content.items():
        (folder / name).write_bytes(data)
        (folder / name).chmod(0o600)
    return {name: folder / name for name in content}


async def meet(kind: str, folder: dict[str, Path]) -> None:
    client, server = client_tls(kind, **folder), server_tls(kind, **folder)
    near, far = trio.testing.memory_stream_pair()

    async def serve() -> None:
        stream, certificate = await server(far, "")
        assert certificate
        await stream.send_all(b"x")

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            stream, _ = await client(near, "a.example")
            assert await stream.receive_some(1) == b"x"


@pytest.mark.parametrize("kind", ["stdlib", "hybridkex"])
@pytest.mark.parametrize("shape", AUTHORITIES)
async def test_one_rule(kind: str, shape: str, tmp_path: Path) -> None:
    root = authority(**{**DATES, **AUTHORITIES[shape]})
    certificate = leaf(names=san("a.example"), ids=shape != "without key identifiers", **DATES)
    await meet(kind, files(tmp_path / "files", root, certificate))


@pytest.mark.parametrize("kind", ["stdlib", "hybridkex"])
async def test_a_common_name_is_no_host_name(kind: str, tmp_path: Path) -> None:
    certificate = leaf(subject="a.example", names=None, **DATES)
    folder = files(tmp_path / "files", authority(**DATES), certificate)
    with pytest.raises((KeySourceError, trio.BrokenResourceError, ExceptionGroup)):
        await meet(kind, folder)


def test_no_rule_of_one_python(tmp_path: Path) -> None:
    """Python 3.13 made VERIFY_X509_STRICT its default: set it, and the same files are refused."""
    from hybridkex.qkd.etsi014 import mutual_tls

    folder = files(tmp_path / "files", authority(**DATES), leaf(**DATES))
    for purpose in (ssl.Purpose.SERVER_AUTH, ssl.Purpose.CLIENT_AUTH):
        context = mutual_tls._context(purpose, **folder)
        assert not context.verify_flags & ssl.VERIFY_X509_STRICT
        assert context.verify_flags & ssl.VERIFY_X509_PARTIAL_CHAIN


async def test_a_client_without_an_ml_kem_group_is_named(tmp_path: Path) -> None:
    """Python's TLS with OpenSSL before 3.5, or with a curve chosen: aiohttp, requests, httpx."""
    made = files(tmp_path / "files", authority(**DATES), leaf(names=san("a.example"), **DATES))
    context = ssl.create_default_context(cafile=str(made["ca"]))
    context.load_cert_chain(made["certificate"], made["key"])
    context.set_ecdh_curve("prime256v1")
    near, far = trio.testing.memory_stream_pair()
    said: list[str] = []

    async def serve() -> None:
        with pytest.raises(KeySourceError) as refused:
            await server_tls("hybridkex", **made)(far, "")
        said.append(str(refused.value))

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            stream = trio.SSLStream(near, context, server_hostname="a.example")
            with pytest.raises(trio.BrokenResourceError):
                await stream.do_handshake()
    assert "offers no ML-KEM group" in said[0]
    assert 'set tls = "stdlib"' in said[0]


WITHOUT_MEMORY = """
import resource, ssl
from hybridkex.qkd.etsi014.mutual_tls import _KeptBytes
kept = _KeptBytes(ssl.create_default_context())
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (3 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
held = []
try:
    while len(held) < 10_000:
        held.append(kept.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname="x"))
except MemoryError:
    held.clear()
    print("no memory")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of memory that is kept")
def test_connections_without_memory() -> None:
    """Python's ssl would crash (CPython issue 144833), and with it the KME."""
    command = [sys.executable, "-c", WITHOUT_MEMORY]
    found = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "no memory\n"), found.stderr
