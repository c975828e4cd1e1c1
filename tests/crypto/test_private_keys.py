"""Private keys in the forms that other software writes; ML-DSA's three of RFC 9881."""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519, mldsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_public_key,
)
from leaks import leaks

from hybridkex.crypto.private_keys import load_private_key
from hybridkex.errors import ConfigError

VECTORS = json.loads((Path(__file__).parents[1] / "vectors/acvp/ml_dsa.json").read_text())
OIDS = {"ML-DSA-44": 17, "ML-DSA-65": 18, "ML-DSA-87": 19}
SIZES = {"ML-DSA-44": 2560, "ML-DSA-65": 4032, "ML-DSA-87": 4896}


def der(tag: int, content: bytes) -> bytes:
    length = len(content)
    if length < 128:
        return bytes((tag, length)) + content
    size = (length.bit_length() + 7) // 8
    return bytes((tag, 0x80 | size)) + length.to_bytes(size, "big") + content


def pem(name: str, private: bytes, *more: bytes) -> bytes:
    """PKCS #8 with this content."""
    oid = bytes.fromhex("060960864801650304 03") + bytes((OIDS[name],))
    info = der(
        0x30, b"\2\1" + bytes((len(more) > 0,)) + der(0x30, oid) + der(4, private) + b"".join(more)
    )
    body = base64.encodebytes(info)
    return b"-----BEGIN PRIVATE KEY-----\n" + body + b"-----END PRIVATE KEY-----\n"


def expanded(name: str, seed: bytes, public: bytes) -> bytes:
    """The beginning that hashes give (FIPS 204 algorithm 6), and room for the rest."""
    rows, columns = {"ML-DSA-44": (4, 4), "ML-DSA-65": (6, 5), "ML-DSA-87": (8, 7)}[name]
    hashed = hashlib.shake_256(seed + bytes((rows, columns))).digest(128)
    assert hashed[:32] == public[:32]
    start = hashed[:32] + hashed[96:] + hashlib.shake_256(public).digest(64)
    return start.ljust(SIZES[name], b"r")


@pytest.fixture(params=VECTORS["key_pair"], ids=lambda row: row[1])
def row(request: pytest.FixtureRequest) -> tuple[str, bytes, bytes]:
    _, name, seed, public = request.param
    return name, bytes.fromhex(seed), bytes.fromhex(public)


def test_a_seed(row: tuple[str, bytes, bytes]) -> None:
    name, seed, public = row
    key = load_private_key(pem(name, der(0x80, seed)), None, "key.pem")
    assert key.public_key().public_bytes_raw() == public


@pytest.mark.parametrize("with_public", [False, True])
def test_both(row: tuple[str, bytes, bytes], with_public: bool) -> None:
    """As OpenSSL 3.5 writes it."""
    name, seed, public = row
    both = der(0x30, der(4, seed) + der(4, expanded(name, seed, public)))
    more = (der(0x81, b"\0" + public),) if with_public else ()
    key = load_private_key(pem(name, both, *more), None, "key.pem")
    assert key.public_key().public_bytes_raw() == public
    assert key.private_bytes_raw() == seed


@pytest.mark.parametrize("place", [0, 31, 32, 63, 64, 127, -1])
def test_halves_that_do_not_match(row: tuple[str, bytes, bytes], place: int) -> None:
    name, seed, public = row
    wrong = bytearray(expanded(name, seed, public))
    if place < 0:
        wrong.pop()
    else:
        wrong[place] ^= 1
    both = der(0x30, der(4, seed) + der(4, bytes(wrong)))
    with pytest.raises(ConfigError, match="an ML-DSA seed and an expanded key that"):
        load_private_key(pem(name, both), None, "key.pem")


def test_an_expanded_key_alone(row: tuple[str, bytes, bytes]) -> None:
    name, seed, public = row
    with pytest.raises(ConfigError, match="without its seed") as caught:
        load_private_key(pem(name, der(4, expanded(name, seed, public))), None, "key.pem")
    assert not leaks(str(caught.value), seed)


@pytest.mark.parametrize(
    "private",
    [
        b"",
        b"\x30",
        b"\x30\0",
        der(0x30, der(4, b"short") + der(4, b"x")),
        der(0x80, b"short"),
        b"\2\0",
    ],
)
def test_rubbish_inside(private: bytes) -> None:
    with pytest.raises(ConfigError, match="key") as caught:
        load_private_key(pem("ML-DSA-65", private), None, "key.pem")
    assert caught.value.__context__ is None or caught.value.__suppress_context__


def write(key: Any, password: bytes | None) -> bytes:
    encryption = BestAvailableEncryption(password) if password else NoEncryption()
    pem_bytes: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
    return pem_bytes


@pytest.mark.parametrize("kind", [ed25519.Ed25519PrivateKey, mldsa.MLDSA44PrivateKey])
def test_passwords(kind: Any) -> None:
    key = kind.generate()
    public = key.public_key()
    assert load_private_key(write(key, None), None, "k").public_key() == public
    assert load_private_key(write(key, b"secret"), b"secret", "k").public_key() == public
    for text, password, error in (
        (write(key, None), b"secret", "k is not encrypted"),
        (write(key, b"secret"), None, "k is encrypted"),
        (write(key, b"secret"), b"other", "k is not a private key in PEM form, or the password"),
        (b"rubbish", None, "k is not a private key"),
    ):
        with pytest.raises(ConfigError, match=error):
            load_private_key(text, password, "k")


RFC9881 = Path(__file__).parents[1] / "vectors/rfc9881"


@pytest.mark.parametrize("name", ["ML-DSA-44-seed", *(f"{one}-both" for one in OIDS)])
def test_the_examples_of_rfc_9881(name: str) -> None:
    key = load_private_key((RFC9881 / f"{name}.pem").read_bytes(), None, "key.pem")
    public = load_pem_public_key((RFC9881 / f"{name[:9]}.pub.pem").read_bytes())
    assert key.public_key() == public
    assert key.private_bytes_raw() == bytes(range(32))


@pytest.mark.parametrize(
    ("name", "reason"),
    [("ML-DSA-44-expanded", "without its seed"), ("bad-ML-DSA-44-1", "do not match")],
)
def test_the_examples_of_rfc_9881_that_are_refused(name: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_private_key((RFC9881 / f"{name}.pem").read_bytes(), None, "key.pem")


RFC_8410 = """\
-----BEGIN PRIVATE KEY-----
MHICAQEwBQYDK2VwBCIEINTuctv5E1hK1bbY8fdp+K06/nwoy/HU++CXqI9EdVhC
oB8wHQYKKoZIhvcNAQkJFDEPDA1DdXJkbGUgQ2hhaXJzgSEAGb9ECWmEzf6FQbrB
Z9w7lshQhqowtrbLDFw4rXAxZuE=
-----END PRIVATE KEY-----
"""
"""Section 10.3: the key and its public key, with an attribute between them."""


def test_the_example_of_rfc_8410_with_its_public_key() -> None:
    key = load_private_key(RFC_8410.encode(), None, "key.pem")
    public = key.public_key().public_bytes_raw().hex()
    assert public == "19bf44096984cdfe8541bac167dc3b96c85086aa30b6b6cb0c5c38ad703166e1"
    other = base64.b64decode("".join(RFC_8410.splitlines()[1:-1]))[:-1] + b"\0"
    body = base64.encodebytes(other)
    wrong = b"-----BEGIN PRIVATE KEY-----\n" + body + b"-----END PRIVATE KEY-----\n"
    with pytest.raises(ConfigError, match="a private key and a public key that do not match"):
        load_private_key(wrong, None, "key.pem")


def test_a_seed_with_its_public_key(row: tuple[str, bytes, bytes]) -> None:
    name, seed, public = row
    written = pem(name, der(0x80, seed), der(0x81, b"\0" + public))
    key = load_private_key(written, None, "key.pem")
    assert key.public_key().public_bytes_raw() == public
