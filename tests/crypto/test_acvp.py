"""NIST's ACVP vectors for ML-KEM, ML-DSA and TLS 1.3's key schedule, through what is ours."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import mldsa, mlkem

from hybridkex.crypto.kex import MLKEM768, MLKEM1024
from hybridkex.crypto.kex_oqs import OqsKem, via_oqs
from hybridkex.crypto.oqs import load, oqs_status
from hybridkex.crypto.schedule import EarlySecret
from hybridkex.crypto.signatures import ALL_SCHEMES
from hybridkex.crypto.suites import (
    SHA256,
    SHA384,
    TLS_AES_128_GCM_SHA256,
    TLS_AES_256_GCM_SHA384,
)
from hybridkex.errors import IllegalParameter
from hybridkex.secret import Secret

VECTORS = Path(__file__).parents[1] / "vectors" / "acvp"
KEMS: dict[str, tuple[Any, Any]] = {
    "ML-KEM-768": (MLKEM768, mlkem.MLKEM768PrivateKey),
    "ML-KEM-1024": (MLKEM1024, mlkem.MLKEM1024PrivateKey),
}
SIGNATURES: dict[str, tuple[Any, Any]] = {
    "ML-DSA-44": (mldsa.MLDSA44PrivateKey, mldsa.MLDSA44PublicKey),
    "ML-DSA-65": (mldsa.MLDSA65PrivateKey, mldsa.MLDSA65PublicKey),
    "ML-DSA-87": (mldsa.MLDSA87PrivateKey, mldsa.MLDSA87PublicKey),
}
STATUS = oqs_status()
needs_oqs = pytest.mark.skipif(not STATUS.available, reason=f"needs liboqs: {STATUS.problem}")


def rows(file: str, table: str) -> list[list[Any]]:
    found: list[list[Any]] = json.loads((VECTORS / file).read_text(encoding="ascii"))[table]
    assert found
    return found


def started(name: str, seed: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The key exchange of this library, with the key pair of a seed."""
    group, private = KEMS[name]
    key = private.from_seed_bytes(bytes.fromhex(seed))
    with monkeypatch.context() as patch:
        patch.setattr(group.exchange, "generate", lambda: key)
        return group.exchange.start()


def test_ml_kem_shares_and_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ciphertexts include changed ones, whose secret is the implicit rejection's."""
    seen: Counter[str] = Counter()
    for _, name, seed, share, _ in rows("ml_kem.json", "key_pair"):
        assert started(name, seed, monkeypatch).share.hex() == share
        seen[name] += 1
    for number, name, seed, ciphertext, secret in rows("ml_kem.json", "open_with_seed"):
        found = started(name, seed, monkeypatch).finish(bytes.fromhex(ciphertext))
        assert found.reveal().hex() == secret, number
        seen[name] += 1
    assert seen == {"ML-KEM-768": 2, "ML-KEM-1024": 2}


def test_ml_kem_shares_that_are_keys_and_that_are_none() -> None:
    seen: Counter[bool] = Counter()
    for number, name, share, good in rows("ml_kem.json", "check"):
        exchange = KEMS[name][0].exchange
        if good:
            exchange.respond(bytes.fromhex(share))
        else:
            with pytest.raises(IllegalParameter):
                exchange.respond(bytes.fromhex(share))
        assert number
        seen[good] += 1
    assert seen[True] > 1
    assert seen[False] > 1


@needs_oqs
def test_ml_kem_of_liboqs() -> None:
    for _, name, seed, share, private in rows("ml_kem.json", "key_pair"):
        native = load().KeyEncapsulation(name)
        assert native.generate_keypair_seed(bytes.fromhex(seed)).hex() == share
        assert native.export_secret_key().hex() == private
        native.free()
    for number, name, private, ciphertext, secret in rows("ml_kem.json", "open"):
        found = OqsKem(name).open(Secret(bytes.fromhex(private)), bytes.fromhex(ciphertext))
        assert found.reveal().hex() == secret, number
    for _, name, share, good in rows("ml_kem.json", "check"):
        exchange = via_oqs(KEMS[name][0]).exchange
        if good:
            exchange.respond(bytes.fromhex(share))
        else:
            with pytest.raises(IllegalParameter):
                exchange.respond(bytes.fromhex(share))


def representative(public_key: bytes, formatted: bytes) -> bytes:
    """``μ`` of FIPS 204 algorithm 7, lines 6: a hash of the hashed key and the message ``M'``."""
    return hashlib.shake_256(hashlib.shake_256(public_key).digest(64) + formatted).digest(64)


def test_ml_dsa_keys_and_signatures() -> None:
    for _, name, seed, public in rows("ml_dsa.json", "key_pair"):
        key = SIGNATURES[name][0].from_seed_bytes(bytes.fromhex(seed))
        assert key.public_key().public_bytes_raw().hex() == public
    for _, name, seed, mu, signature in rows("ml_dsa.json", "signed_with_seed"):
        key = SIGNATURES[name][0].from_seed_bytes(bytes.fromhex(seed)).public_key()
        key.verify_mu(bytes.fromhex(signature), bytes.fromhex(mu))
    seen: Counter[bool] = Counter()
    for number, name, public, kind, content, signature, good in rows("ml_dsa.json", "verify"):
        raw = bytes.fromhex(public)
        mu = bytes.fromhex(content)
        if kind == "message":
            mu = representative(raw, mu)
        key = SIGNATURES[name][1].from_public_bytes(raw)
        try:
            key.verify_mu(bytes.fromhex(signature), mu)
        except InvalidSignature:
            assert not good, number
        else:
            assert good, number
        seen[good] += 1
    assert seen == {True: 1, False: 5}


def test_our_schemes_are_pure_ml_dsa_with_an_empty_context() -> None:
    """``M'`` is ``0 || 0 || M`` (FIPS 204 algorithm 2 line 10), as TLS wants it."""
    content = b"what CertificateVerify covers"
    for scheme in ALL_SCHEMES:
        for private, _ in SIGNATURES.values():
            key = private.generate()
            if scheme.suits(key):
                public = key.public_key()
                mu = representative(public.public_bytes_raw(), b"\0\0" + content)
                public.verify_mu(scheme.sign(key, content), mu)
                scheme.verify(public, key.sign_mu(mu), content)
                break
        else:
            assert not scheme.name.startswith("mldsa")


def test_key_schedule() -> None:
    """Every secret of every case; the "randoms" stand for the messages of the transcript.

    Two secrets of the set belong to 0-RTT data, which this library does not have: they are derived
    from the stage all the same.
    """
    seen: Counter[tuple[str, str]] = Counter()
    for row in rows("tls13_kdf.json", "cases"):
        suite, function = {
            "SHA2-256": (TLS_AES_128_GCM_SHA256, SHA256),
            "SHA2-384": (TLS_AES_256_GCM_SHA384, SHA384),
        }[row["hash"]]
        transcript, digests = b"", {}
        for message in ("helloClient", "helloServer", "finishedServer", "finishedClient"):
            transcript += bytes.fromhex(row[f"{message}Random"])
            digests[message] = hashlib.new(function.algorithm.name, transcript).digest()
        psk = Secret(bytes.fromhex(row["psk"])) if "psk" in row else None
        zeros = "00" * function.size
        early = EarlySecret.start(function, psk)
        handshake = early.handshake_secret(Secret(bytes.fromhex(row.get("dhe", zeros))))
        main = handshake.main_secret()
        hello, server, client = (
            digests[name] for name in ("helloServer", "finishedServer", "finishedClient")
        )
        found = {
            "clientEarlyTrafficSecret": early.derive(b"c e traffic", digests["helloClient"]),
            "earlyExporterMasterSecret": early.derive(b"e exp master", digests["helloClient"]),
            "clientHandshakeTrafficSecret": handshake.client_handshake_traffic(suite, hello).secret,
            "serverHandshakeTrafficSecret": handshake.server_handshake_traffic(suite, hello).secret,
            "clientApplicationTrafficSecret": main.client_application_traffic(suite, server).secret,
            "serverApplicationTrafficSecret": main.server_application_traffic(suite, server).secret,
            "exporterMasterSecret": main.exporter_secret(server).secret,
            "resumptionMasterSecret": main.resumption_secret(client).secret,
        }
        for name, secret in found.items():
            assert secret.reveal().hex() == row[name], (row["number"], name)
        seen[row["hash"], row["mode"]] += 1
    assert len(seen) == 6
    assert sum(seen.values()) == 10
