"""Handshakes with an imported PSK, derived again from the RFCs with ``hmac`` and ``hashlib`` alone.

No published vectors are known for RFC 9258 and RFC 9973. So the bytes of a whole handshake of two
engines are taken off the wire, and everything secret in it is computed here a second time: the
imported key, the binders, every traffic secret, the exporter, and the protected records down to
both Finished messages. The first inputs are fixed and their results pinned below, as vectors that
another implementation can use.
"""

import hashlib
import hmac
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from tls_glue import Pair

from hybridkex.auth import DevCa, TrustStore
from hybridkex.crypto.kex import SECP256R1MLKEM768, X25519MLKEM768, KeyExchange
from hybridkex.crypto.psk import ExternalPsk
from hybridkex.crypto.suites import TLS_AES_128_GCM_SHA256, TLS_AES_256_GCM_SHA384, CipherSuite
from hybridkex.qkd.psk import as_psk
from hybridkex.qkd.source import KeyPart, QkdKey
from hybridkex.secret import Secret
from hybridkex.tls.config import ClientConfig, ServerConfig
from hybridkex.tls.connection import Connection
from hybridkex.tls.negotiation import external_psks

KEY_ID = "994f95df-037c-40e9-8b79-79f79bb8eaa0"
QKD_KEY = QkdKey(
    name=(KeyPart("kme-a", "kme-b", KEY_ID),),
    master_sae="alice",
    slave_sae="bob",
    key=Secret(bytes(range(32))),
)

# Written by hand from the structures in hybridkex/qkd/psk.py.
IDENTITY = b"hkx-qkd\x01" + b"\x00\x31" + b"\x05kme-a" + b"\x05kme-b" + b"\x24" + KEY_ID.encode()
CONTEXT = b"hkx-qkd ctx\x01" + b"\x05alice" + b"\x03bob" + b"\x00\x0c" + b"\x05kme-a" + b"\x05kme-b"

PINNED = {
    "sha256": "9eb1da6a69c38cb4d078d49f1e5d32dc1ee69b48819185ec1309ef9813a9b05e",
    "sha384": "eb671e59b90e6acdd1ad2af8f677f6d78fd6fb284b24e2b0963b7b8963433d67"
    "9a81b32676d55b6e0f03fc6973ad7828",
}


# --- RFC 5869 and RFC 9846 section 7.1 ------------------------------------------------------------


def extract(name: str, salt: bytes, secret: bytes) -> bytes:
    return hmac.new(salt, secret, name).digest()


def expand_label(name: str, secret: bytes, label: bytes, context: bytes, length: int) -> bytes:
    full = b"tls13 " + label
    info = length.to_bytes(2, "big") + bytes((len(full),)) + full
    info += bytes((len(context),)) + context
    output, block, count = b"", b"", 1
    while len(output) < length:
        block = hmac.new(secret, block + info + bytes((count,)), name).digest()
        output, count = output + block, count + 1
    return output[:length]


def derive(name: str, secret: bytes, label: bytes, messages: bytes) -> bytes:
    digest = hashlib.new(name, messages).digest()
    return expand_label(name, secret, label, digest, hashlib.new(name).digest_size)


def imported(target: str) -> tuple[bytes, bytes]:
    """ImportedIdentity and ``ipskx`` (RFC 9258 sections 5.1 and 5.2), for TLS 1.3."""
    kdf = {"sha256": b"\x00\x01", "sha384": b"\x00\x02"}[target]
    identity = len(IDENTITY).to_bytes(2, "big") + IDENTITY
    identity += len(CONTEXT).to_bytes(2, "big") + CONTEXT + b"\x03\x04" + kdf
    epskx = extract("sha256", bytes(32), bytes(range(32)))
    digest = hashlib.sha256(identity).digest()
    size = hashlib.new(target).digest_size
    return identity, expand_label("sha256", epskx, b"derived psk", digest, size)


# --- a handshake and its bytes --------------------------------------------------------------------


class Known:
    """A key exchange whose secret the test gets to know."""

    def __init__(self, inner: KeyExchange) -> None:
        self.inner = inner
        self.secrets: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def respond(self, peer_share: bytes) -> tuple[bytes, Secret]:
        share, secret = self.inner.respond(peer_share)
        self.secrets.append(secret.reveal())
        return share, secret


@dataclass
class Wire:
    """The records that reached each side."""

    to: dict[str, list[tuple[int, bytes]]] = field(
        default_factory=lambda: {"client": [], "server": []}
    )
    server: Connection | None = None

    def __call__(self, target: Connection, data: bytes) -> bytes:
        records = self.to["server" if target is self.server else "client"]
        rest = data
        while rest:
            length = int.from_bytes(rest[3:5], "big")
            records.append((rest[0], rest[5 : 5 + length]))
            rest = rest[5 + length :]
        return data


def messages_in(records: list[tuple[int, bytes]]) -> list[bytes]:
    """The handshake messages that crossed in the clear."""
    return split(b"".join(data for kind, data in records if kind == 22))


def split(data: bytes) -> list[bytes]:
    found = []
    while data:
        length = 4 + int.from_bytes(data[1:4], "big")
        found.append(data[:length])
        data = data[length:]
    return found


def decrypt(name: str, secret: bytes, size: int, records: list[bytes]) -> list[bytes]:
    """The handshake messages in protected records (section 5.2)."""
    key = expand_label(name, secret, b"key", b"", size)
    iv = int.from_bytes(expand_label(name, secret, b"iv", b"", 12), "big")
    plain = b""
    for number, data in enumerate(records):
        header = b"\x17\x03\x03" + len(data).to_bytes(2, "big")
        inner = AESGCM(key).decrypt((iv ^ number).to_bytes(12, "big"), data, header)
        assert inner[-1] == 22
        plain += inner[:-1]
    return split(plain)


@pytest.fixture(scope="module")
def ca() -> DevCa:
    return DevCa.create()


@pytest.mark.parametrize("retry", [False, True], ids=["at once", "after a retry"])
@pytest.mark.parametrize("certificates", [False, True], ids=["PSK alone", "RFC 9973"])
@pytest.mark.parametrize(
    ("suite", "name", "size"),
    [(TLS_AES_128_GCM_SHA256, "sha256", 16), (TLS_AES_256_GCM_SHA384, "sha384", 32)],
    ids=["SHA-256", "SHA-384"],
)
def test_a_whole_handshake(
    ca: DevCa, suite: CipherSuite, name: str, size: int, certificates: bool, retry: bool
) -> None:
    psk = as_psk(QKD_KEY)
    known = Known(X25519MLKEM768.exchange)
    group = replace(X25519MLKEM768, exchange=known)
    logged: dict[str, bytes] = {}

    def log(line: str) -> None:
        label, _, secret = line.split()
        logged[label] = bytes.fromhex(secret)

    client = ClientConfig(
        psks=(psk,),
        suites=(suite,),
        groups=(SECP256R1MLKEM768, X25519MLKEM768) if retry else (X25519MLKEM768,),
        verifier=TrustStore((ca.certificate,)) if certificates else None,
        compatibility_mode=False,
    )
    server = ServerConfig(
        psks=(psk,),
        groups=(group,),
        identities=(ca.issue("localhost"),) if certificates else (),
        key_log=log,
        tickets=None,
    )
    wire = Wire()
    pair = Pair.make(client, server, on_wire=wire)
    wire.server = pair.server
    pair.connect()

    # --- from here on, only the wire, the RFCs, and the shared secret of the key exchange
    (shared,) = known.secrets
    size_of_hash = hashlib.new(name).digest_size
    hellos, answers = messages_in(wire.to["server"]), messages_in(wire.to["client"])
    assert [len(hellos), len(answers)] == ([2, 2] if retry else [1, 1])
    before = b""
    if retry:  # section 4.1: message_hash
        first = hashlib.new(name, hellos[0]).digest()
        before = b"\xfe\x00\x00" + bytes((len(first),)) + first + answers[0]
    hello, answer = hellos[-1], answers[-1]

    identity, key = imported(name)
    assert key.hex() == PINNED[name]
    binder = hello[-size_of_hash:]
    truncated = hello[: -(2 + 1 + size_of_hash)]
    assert hello.count(identity) == 1
    early = extract(name, bytes(size_of_hash), key)
    binder_key = derive(name, early, b"imp binder", b"")
    finished_key = expand_label(name, binder_key, b"finished", b"", size_of_hash)
    digest = hashlib.new(name, before + truncated).digest()
    assert binder == hmac.new(finished_key, digest, name).digest()

    transcript = before + hello + answer
    handshake = extract(name, derive(name, early, b"derived", b""), shared)
    secrets = {
        "CLIENT_HANDSHAKE_TRAFFIC_SECRET": derive(name, handshake, b"c hs traffic", transcript),
        "SERVER_HANDSHAKE_TRAFFIC_SECRET": derive(name, handshake, b"s hs traffic", transcript),
    }

    # The flights are decrypted with what was derived, so that both Finished can be checked.
    of_server = [data for kind, data in wire.to["client"] if kind == 23]
    flight = decrypt(name, secrets["SERVER_HANDSHAKE_TRAFFIC_SECRET"], size, of_server)
    assert [message[0] for message in flight] == ([8, 11, 15, 20] if certificates else [8, 20])
    (of_client,) = [data for kind, data in wire.to["server"] if kind == 23]
    (last,) = decrypt(name, secrets["CLIENT_HANDSHAKE_TRAFFIC_SECRET"], size, [of_client])
    for message, owner, covered in (
        (flight[-1], "SERVER", transcript + b"".join(flight[:-1])),
        (last, "CLIENT", transcript + b"".join(flight)),
    ):
        base = secrets[f"{owner}_HANDSHAKE_TRAFFIC_SECRET"]
        finished_key = expand_label(name, base, b"finished", b"", size_of_hash)
        digest = hashlib.new(name, covered).digest()
        assert message[4:] == hmac.new(finished_key, digest, name).digest()

    transcript += b"".join(flight)
    main = extract(name, derive(name, handshake, b"derived", b""), bytes(size_of_hash))
    secrets |= {
        "CLIENT_TRAFFIC_SECRET_0": derive(name, main, b"c ap traffic", transcript),
        "SERVER_TRAFFIC_SECRET_0": derive(name, main, b"s ap traffic", transcript),
        "EXPORTER_SECRET": derive(name, main, b"exp master", transcript),
    }
    assert logged == secrets

    # RFC 9973 section 4: the extension is in both hellos, and pre_shared_key is the last.
    assert (b"\x00\x21\x00\x00" in hello) == certificates
    assert (b"\x00\x21\x00\x00" in answer) == certificates
    offer = len(identity) + 2 + 4 + 2 + 2 + 1 + size_of_hash
    assert hello[-offer - 4 : -offer] == b"\x00\x29" + offer.to_bytes(2, "big")


def test_identity_and_context() -> None:
    psk = as_psk(QKD_KEY)
    assert (psk.identity, psk.context) == (IDENTITY, CONTEXT)


def everything_else() -> list[tuple[str, Callable[[], ExternalPsk]]]:
    (part,) = QKD_KEY.name
    return [
        ("master SAE", lambda: as_psk(replace(QKD_KEY, master_sae="carol"))),
        ("slave SAE", lambda: as_psk(replace(QKD_KEY, slave_sae="carol"))),
        ("roles", lambda: as_psk(replace(QKD_KEY, master_sae="bob", slave_sae="alice"))),
        ("KME", lambda: as_psk(replace(QKD_KEY, name=(replace(part, master_kme="kme-c"),)))),
        (
            "key ID",
            lambda: as_psk(replace(QKD_KEY, name=(replace(part, key_id="1"),))),
        ),
        ("number", lambda: as_psk(replace(QKD_KEY, name=(part, part)))),
        ("key", lambda: as_psk(replace(QKD_KEY, key=Secret(bytes(32))))),
    ]


@pytest.mark.parametrize(("what", "make"), everything_else(), ids=[n for n, _ in everything_else()])
def test_whatever_differs_makes_another_key(what: str, make: Callable[[], ExternalPsk]) -> None:
    """The key derived differs; so does what is bound beside the key itself."""
    suites = (TLS_AES_128_GCM_SHA256,)
    (ours,), (other,) = external_psks(as_psk(QKD_KEY), suites), external_psks(make(), suites)
    assert ours.key.reveal() != other.key.reveal()
    assert (ours.identity == other.identity) == (what == "key")
