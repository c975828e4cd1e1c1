"""Vectors of Project Wycheproof through what this library composes, edge cases included."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric import ec, mldsa, mlkem, x25519
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from hybridkex.crypto import kex
from hybridkex.crypto.kex import MLKEM768, MLKEM1024, SECP256R1, SECP384R1, X25519, Group, Started
from hybridkex.crypto.schedule import hkdf_extract
from hybridkex.crypto.signatures import ALL_SCHEMES
from hybridkex.crypto.suites import (
    SHA256,
    SHA384,
    TLS_AES_128_GCM_SHA256,
    TLS_AES_256_GCM_SHA384,
    TLS_CHACHA20_POLY1305_SHA256,
    HashFunction,
)
from hybridkex.errors import DecryptError, IllegalParameter
from hybridkex.secret import Secret

VECTORS = Path(__file__).parents[1] / "vectors" / "wycheproof"


@dataclass
class Case:
    """One case: its number and verdict, and the named values."""

    number: int
    result: str
    values: dict[str, Any]

    def __getitem__(self, name: str) -> bytes:
        return bytes.fromhex(self.values[name])


def cases(name: str) -> Iterator[Case]:
    table = json.loads((VECTORS / f"{name}.json").read_text(encoding="ascii"))
    for number, result, *values in table["rows"]:
        yield Case(number, result, dict(zip(table["columns"][2:], values, strict=True)))


def outcome(started: Started, share: bytes) -> bytes | None:
    """The secret, or ``None`` where the share is refused."""
    try:
        return started.finish(share).reveal()
    except IllegalParameter:
        return None


def test_x25519(monkeypatch: pytest.MonkeyPatch) -> None:
    """Points on the twist and of low order are "acceptable"; of these we refuse a zero result."""
    seen: Counter[tuple[str, bool]] = Counter()
    for case in cases("x25519"):
        private = x25519.X25519PrivateKey.from_private_bytes(case["private"])
        fixed = SimpleNamespace(
            X25519PrivateKey=SimpleNamespace(generate=lambda private=private: private),
            X25519PublicKey=x25519.X25519PublicKey,
        )
        with monkeypatch.context() as patch:
            patch.setattr(kex, "x25519", fixed)
            started = X25519.exchange.start()
        zero = case["shared"] == bytes(32)
        expected = None if zero else case["shared"]
        assert outcome(started, case["public"]) == expected, case.number
        assert not (zero and case.result == "valid")
        seen[case.result, zero] += 1
    assert seen == {("valid", False): 264, ("acceptable", False): 223, ("acceptable", True): 31}


@pytest.mark.parametrize(
    ("name", "group", "curve", "counts"),
    [
        ("ecdh_secp256r1_ecpoint", SECP256R1, ec.SECP256R1(), {"valid": 186, "invalid": 24}),
        ("ecdh_secp384r1_ecpoint", SECP384R1, ec.SECP384R1(), {"valid": 166, "invalid": 18}),
    ],
    ids=["P-256", "P-384"],
)
def test_ecdh(
    name: str,
    group: Group,
    curve: ec.EllipticCurve,
    counts: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Compressed points are "acceptable" to Wycheproof and forbidden in TLS 1.3."""
    seen: Counter[str] = Counter()
    for case in cases(name):
        private = ec.derive_private_key(int.from_bytes(case["private"], "big"), curve)
        with monkeypatch.context() as patch:
            patch.setattr(ec, "generate_private_key", lambda _curve, private=private: private)
            started = group.exchange.start()
        expected = case["shared"] if case.result == "valid" else None
        assert outcome(started, case["public"]) == expected, case.number
        seen[case.result] += 1
    assert seen == {**counts, "acceptable": 1}


@pytest.mark.parametrize(
    ("name", "group", "private"),
    [
        ("mlkem_768", MLKEM768, mlkem.MLKEM768PrivateKey),
        ("mlkem_1024", MLKEM1024, mlkem.MLKEM1024PrivateKey),
    ],
)
def test_ml_kem_decapsulation(
    name: str,
    group: Group,
    private: type[mlkem.MLKEM768PrivateKey] | type[mlkem.MLKEM1024PrivateKey],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: Counter[str] = Counter()
    exchange: Any = group.exchange
    for case in cases(name):
        key = private.from_seed_bytes(case["seed"])
        with monkeypatch.context() as patch:
            patch.setattr(exchange, "generate", lambda key=key: key)
            started = exchange.start()
        expected = case["K"] if case.result == "valid" else None
        assert outcome(started, case["c"]) == expected, case.number
        seen[case.result] += 1
    assert seen == {"valid": 17, "invalid": 16}


@pytest.mark.parametrize(
    ("name", "group", "counts"),
    [
        ("mlkem_768_encaps", MLKEM768, {"valid": 16, "invalid": 28}),
        ("mlkem_1024_encaps", MLKEM1024, {"valid": 16, "invalid": 32}),
    ],
)
def test_ml_kem_encapsulation_keys(name: str, group: Group, counts: dict[str, int]) -> None:
    """The checks of FIPS 203 section 7.2; encapsulation itself is random here."""
    seen: Counter[str] = Counter()
    for case in cases(name):
        try:
            group.exchange.respond(case["ek"])
        except IllegalParameter:
            assert case.result == "invalid", case.number
        else:
            assert case.result == "valid", case.number
        seen[case.result] += 1
    assert seen == counts


ML_DSA: dict[str, tuple[Any, Any]] = {
    "44": (mldsa.MLDSA44PrivateKey, mldsa.MLDSA44PublicKey),
    "65": (mldsa.MLDSA65PrivateKey, mldsa.MLDSA65PublicKey),
    "87": (mldsa.MLDSA87PrivateKey, mldsa.MLDSA87PublicKey),
}


def of_ml_dsa(size: str) -> Any:
    return next(scheme for scheme in ALL_SCHEMES if scheme.name == f"mldsa{size}")


@pytest.mark.parametrize(
    ("size", "counts"),
    [
        ("44", {"valid": 7, "invalid": 8}),
        ("65", {"valid": 7, "invalid": 8}),
        ("87", {"valid": 8, "invalid": 9}),
    ],
)
def test_ml_dsa_signatures(size: str, counts: dict[str, int]) -> None:
    """Hints and norms out of bounds, keys and signatures of wrong lengths."""
    scheme, (private, public) = of_ml_dsa(size), ML_DSA[size]
    length = len(private.generate().public_key().public_bytes_raw())
    seen: Counter[str] = Counter()
    for case in cases(f"mldsa_{size}_verify"):
        try:
            scheme.verify(public.from_public_bytes(case["publicKey"]), case["sig"], case["msg"])
        except (DecryptError, ValueError) as error:
            assert case.result == "invalid", case.number
            if isinstance(error, ValueError):  # what is no key never becomes one
                assert len(case["publicKey"]) != length, case.number
        else:
            assert case.result == "valid", case.number
        seen[case.result] += 1
    assert seen == counts


@pytest.mark.parametrize("size", ML_DSA)
def test_ml_dsa_keys(size: str) -> None:
    """Wycheproof's keys from their seeds, through signatures of ours; those are randomised."""
    scheme, seen = of_ml_dsa(size), 0
    for case in cases(f"mldsa_{size}_sign_seed"):
        key = ML_DSA[size][0].from_seed_bytes(case["privateSeed"])
        assert key.public_key().public_bytes_raw() == case["publicKey"], case.number
        scheme.verify(key.public_key(), scheme.sign(key, case["msg"]), case["msg"])
        seen += 1
    assert seen == 9


AEADS = {
    ("aes_gcm", 16): TLS_AES_128_GCM_SHA256,
    ("aes_gcm", 32): TLS_AES_256_GCM_SHA384,
    ("chacha20_poly1305", 32): TLS_CHACHA20_POLY1305_SHA256,
}


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("aes_gcm", {"valid": 79, "invalid": 54}),
        ("chacha20_poly1305", {"valid": 256, "invalid": 60}),
    ],
)
def test_aeads_into_buffers(name: str, counts: dict[str, int]) -> None:
    """encrypt_into and decrypt_into, from and into memory that holds more than the record."""
    seen: Counter[str] = Counter()
    for case in cases(name):
        aead = AEADS[name, len(case["key"])].aead(case["key"])
        message, sealed = case["msg"], case["ct"] + case["tag"]
        out = bytearray(b"\xee" * (len(message) + 4))
        inside = memoryview(out)[2:-2]
        if case.result == "valid":
            buffer = bytearray(b"\xee" * (len(sealed) + 4))
            length = aead.encrypt_into(case["iv"], message, case["aad"], memoryview(buffer)[2:-2])
            assert length == len(sealed)
            assert bytes(buffer) == b"\xee\xee" + sealed + b"\xee\xee", case.number
            assert aead.decrypt_into(case["iv"], sealed, case["aad"], inside) == len(message)
            assert bytes(inside) == message, case.number
        else:
            with pytest.raises(InvalidTag):
                aead.decrypt_into(case["iv"], sealed, case["aad"], inside)
        assert bytes(out[:2] + out[-2:]) == b"\xee" * 4
        seen[case.result] += 1
    assert seen == counts


@pytest.mark.parametrize(("function", "count"), [(SHA256, 83), (SHA384, 80)], ids=str)
def test_hkdf(function: HashFunction, count: int) -> None:
    seen = 0
    for case in cases(f"hkdf_{function.name}"):
        size = case.values["size"]
        key = hkdf_extract(function, case["salt"], Secret(case["ikm"]))
        expand = HKDFExpand(function.algorithm, size, case["info"])
        assert expand.derive(key.reveal()) == case["okm"], case.number
        seen += 1
    assert seen == count
