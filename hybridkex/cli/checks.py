"""The checks of ``hybridkex doctor``: what is installed, and whether it computes correctly.

Each check runs the real code: published vectors, key exchanges, signatures, a complete handshake
with ECDH, ML-KEM and a QKD key over a socket pair. Nothing leaves the machine, except to a KME that
was named.
"""

import hashlib
import importlib.util
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import cryptography
import trio
from cryptography.hazmat.backends.openssl.backend import backend
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, mldsa, mlkem, rsa, x25519

from hybridkex.auth import DevCa, TrustStore
from hybridkex.cli.extras import modules_of_extras
from hybridkex.crypto.kex import ALL_GROUPS
from hybridkex.crypto.oqs import oqs_status
from hybridkex.crypto.rsa_pss import RsaPssKey
from hybridkex.crypto.schedule import hkdf_expand_label, hkdf_extract
from hybridkex.crypto.signatures import ALL_SCHEMES
from hybridkex.crypto.suites import SHA256
from hybridkex.errors import ConfigError, HybridkexError
from hybridkex.machine import leaves
from hybridkex.qkd.in_process import in_process_pair
from hybridkex.secret import Secret
from hybridkex.shell.qkd_keys import QkdPskSource
from hybridkex.streams import SecureStream
from hybridkex.tls.config import ClientConfig, ServerConfig

if TYPE_CHECKING:
    from hybridkex.qkd.etsi014.client import KmeAccess

X25519_CASE: Final = (
    "c8a9d5a91091ad851c668b0736c1c9a02936c0d3ad62670858088047ba057475",
    "504a36999f489cd2fdbc08baff3d88fa00569ba986cba22548ffde80f9806829",
    "436a2c040cf45fea9b29a0cb81b1f41458f863d0d61b453d0a982720d6d61320",
)
"""Private key, public key, shared secret: Wycheproof, x25519, case 1."""
ML_KEM_768: Final = (
    "3d8ae89b6566cfae0dc737722c5f942c620592d064ffbcd7daa457c3b6d21b4f"
    "122e700c5fb75b1d557f2c4f8a525ef21d9fd511968927ae974753c083242d39",
    "ca5ca8b3fcf054e11dff5cf3eb9fd0b3fdf4eb19f31a86aa998078a85f20690e",
)
"""Seed, and the SHA-256 of the encapsulation key: NIST ACVP, ML-KEM keyGen, case 1."""
ML_DSA_65: Final = (
    "30f314182cebdbf9ddff9fa61c5e74d22cb1514bdd4625df329a2cdcb74779bc",
    "1cdecb53ba9cc81585eacc6bee0b7ead0650b9cd726df699da492f628df1a103",
)
"""Seed, and the SHA-256 of the public key: NIST ACVP, ML-DSA keyGen, case 26."""
RFC_8448: Final = (
    "33ad0a1c607ec03b09e6cd9893680ce210adf300aa1f2660e1b22e10f170f92a",
    "6f2615a108c702c5678f54fc9dbab69716c076189c48250cebeac3576c3611ba",
)
"""Section 3: the early secret without a PSK, and what "derived" makes of it."""

EXTRAS: Final = {
    "kme": "ETSI 014 client, KME server",
    "apps": "tunnel; progress bars of send and receive",
    "postgres": "the key store of a KME in PostgreSQL",
    "completion": "completion in the shell",
    "link": "the simulated QKD link",
    "fast": "compiled error correction for the link",
    "parquet": "detections and scans of the link as Parquet files",
    "dask": "scans of the link on a Dask cluster",
    "plot": "pictures of the link's rates",
    "openpgp": "raw public keys endorsed by OpenPGP signatures",
    "anyio": "hybridkex.anyio",
    "http": "adapters for httpx, hypercorn and uvicorn",
    "examples": "the input line of the chat, and the HTTP examples",
}
"""The purpose of each extra; liboqs has a check of its own."""
HANDSHAKE_LIMIT: Final = 30.0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of one check."""

    name: str
    works: bool
    required: bool
    """Whether the library is useless without it."""
    detail: str
    advice: str | None = None
    """The next step if it does not work."""

    def as_json(self) -> dict[str, object]:
        return asdict(self)


class _Wrong(Exception):
    """A check gave a wrong result."""


async def examine() -> list[Finding]:
    """Every check that needs nothing but this machine."""
    broken = "reinstall: pip install --force-reinstall hybridkex cryptography"
    findings = [_versions()]
    required: tuple[tuple[str, Callable[[], str]], ...] = (
        ("published vectors", _vectors),
        ("groups", _groups),
        ("signature schemes", _signatures),
    )
    for name, check in required:
        findings.append(await _required(name, _awaitable(check), broken))
    findings.append(await _required("handshake, three legs", _handshake, broken))
    findings += [_trust_store(), _liboqs(), *_extras()]
    return findings


def _awaitable(check: Callable[[], str]) -> Callable[[], Awaitable[str]]:
    async def run() -> str:
        await trio.lowlevel.checkpoint()
        return check()

    return run


async def _required(name: str, check: Callable[[], Awaitable[str]], advice: str) -> Finding:
    try:
        detail = await check()
    except Exception as error:
        # Whatever a broken installation raises becomes a line, not a traceback.
        first = next(leaves(error))
        detail = str(first.__cause__ or first) or type(first).__name__
        return Finding(name=name, works=False, required=True, detail=detail, advice=advice)
    return Finding(name=name, works=True, required=True, detail=detail)


def _versions() -> Finding:
    parts = [f"Python {sys.version.split()[0]}"]
    parts += [f"{one.__name__} {one.__version__}" for one in (cryptography, trio)]
    parts.append(f"{backend.openssl_version_text()} inside")
    return Finding(name="packages", works=True, required=True, detail=", ".join(parts))


def _vectors() -> str:
    private, public, shared = map(bytes.fromhex, X25519_CASE)
    key = x25519.X25519PrivateKey.from_private_bytes(private)
    _same("X25519", key.exchange(x25519.X25519PublicKey.from_public_bytes(public)), shared)
    seed, digest = map(bytes.fromhex, ML_KEM_768)
    kem = mlkem.MLKEM768PrivateKey.from_seed_bytes(seed).public_key().public_bytes_raw()
    _same("ML-KEM-768", hashlib.sha256(kem).digest(), digest)
    seed, digest = map(bytes.fromhex, ML_DSA_65)
    dsa = mldsa.MLDSA65PrivateKey.from_seed_bytes(seed).public_key().public_bytes_raw()
    _same("ML-DSA-65", hashlib.sha256(dsa).digest(), digest)
    early = hkdf_extract(SHA256, bytes(32), Secret(bytes(32)))
    derived = hkdf_expand_label(SHA256, early, b"derived", SHA256.digest(b""), 32)
    _same("the key schedule", early.reveal() + derived, bytes.fromhex("".join(RFC_8448)))
    return "X25519 (Wycheproof), ML-KEM-768 and ML-DSA-65 (ACVP), key schedule (RFC 8448)"


def _same(what: str, found: bytes, expected: bytes) -> None:
    if found != expected:
        raise _Wrong(f"{what} does not give what its published vector says")


def _groups() -> str:
    for group in ALL_GROUPS:
        started = group.exchange.start()
        share, theirs = group.exchange.respond(started.share)
        _agree(group.name, started.finish(share).reveal() == theirs.reveal())
    return ", ".join(group.name for group in ALL_GROUPS)


def _agree(what: str, equal: bool) -> None:
    if not equal:
        raise _Wrong(f"{what}: both sides computed different secrets")


def _signatures() -> str:
    rsa_key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    keys: tuple[Any, ...] = (
        *(kind.generate() for kind in (mldsa.MLDSA44PrivateKey, mldsa.MLDSA65PrivateKey)),
        mldsa.MLDSA87PrivateKey.generate(),
        *(ec.generate_private_key(curve()) for curve in (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)),
        ed25519.Ed25519PrivateKey.generate(),
        rsa_key,
        RsaPssKey(rsa_key, parameters=None),
    )
    content = b"hybridkex doctor"
    for scheme in ALL_SCHEMES:
        key = next((one for one in keys if scheme.suits(one)), None)
        if key is None:
            raise _Wrong(f"{scheme.name}: this command has no key to test it with")
        scheme.verify(key.public_key(), scheme.sign(key, content), content)
    return ", ".join(scheme.name for scheme in ALL_SCHEMES)


async def _handshake() -> str:
    ca = DevCa.create()
    ends = [trio.SocketStream(trio.socket.from_stdlib_socket(one)) for one in socket.socketpair()]
    sources = in_process_pair("doctor-a", "doctor-b")
    client = SecureStream(
        ends[0],
        ClientConfig(verifier=TrustStore.from_pem(ca.pem), psk_source=QkdPskSource(sources[0])),
        server_hostname="localhost",
    )
    server = SecureStream(
        ends[1],
        ServerConfig(identities=(ca.issue("localhost"),), psk_source=QkdPskSource(sources[1])),
    )
    with trio.fail_after(HANDSHAKE_LIMIT):
        async with client, server, trio.open_nursery() as nursery:
            nursery.start_soon(server.do_handshake)
            await client.do_handshake()
    session = client.session
    if not session.qkd_key_ids or not session.post_quantum:
        raise _Wrong(f"a key exchange or the QKD key is missing: {session}")
    return f"{' + '.join(session.parts)} + a QKD key, {session.cipher_suite}, certificate verified"


def _trust_store() -> Finding:
    try:
        store = TrustStore.system()
    except ConfigError as error:
        return Finding(
            name="trust store",
            works=False,
            required=False,
            detail=str(error),
            advice="install ca-certificates, or name authorities with --ca or SSL_CERT_FILE",
        )
    detail = f"{len(store.authorities)} authorities from {store.source}"
    return Finding(name="trust store", works=True, required=False, detail=detail)


def _liboqs() -> Finding:
    status = oqs_status()
    if not status.available:
        reason, _, advice = (status.problem or "").partition(": ")
        return Finding(name="liboqs", works=False, required=False, detail=reason, advice=advice)
    detail = (
        f"{status.library_version} at {status.location}, liboqs-python {status.package_version}: "
        f"{len(status.kems)} KEMs, {len(status.signatures)} signatures"
    )
    return Finding(name="liboqs", works=True, required=False, detail=detail)


def _extras() -> Iterator[Finding]:
    extras = modules_of_extras()
    if not extras:
        yield Finding(
            name="extras",
            works=False,
            required=False,
            detail="their packages are not known: hybridkex runs from a checkout where it is not "
            "installed",
            advice="pip install -e . in the checkout",
        )
    for extra, modules in extras.items():
        if (purpose := EXTRAS.get(extra)) is None:
            continue
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        yield Finding(
            name=f"extra [{extra}]",
            works=not missing,
            required=False,
            detail=f"{purpose}: {', '.join(missing)} missing" if missing else purpose,
            advice=f"pip install 'hybridkex[{extra}]'" if missing else None,
        )


async def examine_kme(access: "KmeAccess", peer_sae: str) -> Finding:
    """Whether a KME answers over mutual TLS, and how many keys it has for a peer; draws none."""
    from hybridkex.qkd.etsi014.client import KmeClient  # noqa: PLC0415  # needs the extra

    works = False
    try:
        async with KmeClient(access) as client:
            status = await client.status(peer_sae)
    except HybridkexError as error:
        detail = str(error)
    else:
        works = True
        detail = (
            f"{status.source_kme_id}: {status.stored_key_count} keys of {status.key_size} bits "
            f"for {peer_sae}"
        )
    return Finding(
        name=f"KME {access.url}",
        works=works,
        required=True,
        detail=detail,
        advice=None if works else "check --kme, --kme-ca, --kme-cert, --kme-key and the SAE IDs",
    )
