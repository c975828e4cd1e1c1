"""The combiner: ETSI's vectors and its reference implementation, the formulas by hand, and what
makes a difference."""

import hashlib
import hmac
import itertools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from hybridkex.combiner import Leg, Method, cas_kdf, cat_kdf, combine
from hybridkex.crypto.suites import SHA256, SHA384, HashFunction
from hybridkex.errors import ConfigError
from hybridkex.secret import Secret

K1 = Secret(bytes(range(66)))
K2 = Secret(bytes(range(0x80, 0xA0)))
PSK = Secret(bytes(range(0x40, 0x60)))
LABEL = bytes(range(0xC0, 0xE0))
MA = bytes(i % 251 for i in range(1300))
MB = bytes(i % 241 for i in range(1200))
INFO = b"hybridkex test vector"

# Printed by hkex_concat_hkdf and hkex_cascade_hkdf of ETSI's reference implementation of
# TS 103 744 V1.2.1 (etsi-forge/cyber.103744_QHKEX), given the inputs above.
ETSI = {
    SHA256: {
        "cat": "ca5d59f3af9efb9118defe2bed8e0f4b07e34a2b4abbb64a2e22ee8a39f4abe5"
        "e4a61b2ca9b513710394a75fff881177",
        "cat without psk": "b40b566aab23904ada025ec95fc96be9",
        "chain 1": "375bb1582e2231aa31fcad11fbc7ad64d03e278568879cabf53f483dfb967997",
        "key 1": "925104fb89fe4862f65a7fc305dc2634c56d3c2a08af6ad0ab1249efe7bd7cd9",
        "chain 2": "f8f20e42a0ed954987a590722f1bf6b59b780fa43e876f9bfbb27cb05f4dfde0",
        "key 2": "b78e4d2339b0bee887009a4a461993da1665afa5d8e128ba7423e5e3a8c7449c",
    },
    SHA384: {
        "cat": "d8443fd52175eeb02998e8608b6eaf4ccabd9fe5e9d8ea23f1be3bdaf16bc9e2"
        "53c0c9524b8b151a321849b35980cbfd",
        "cat without psk": "1ccf4a2d5abf322259f8e14b0525bae3",
        "chain 1": "475924879d02190139fb796bdf1a36f861809bfb998c755150bc99a464afd68e"
        "8faf9f8ea80e6e4316c07e9c58feb15e",
        "key 1": "d318a033cba603f32bed458a625874dacf7c59db2548db2e9cce4ef675ebce62",
        "chain 2": "eeb222e1d54a6a0cbe58f7fb1b9a613a58ae85f46967309807e39b30aaee3eff"
        "d4817e2c78e632254179973dcbeb279a",
        "key 2": "d350f58feb1c56430cc51f6e3c988567330ccc48202201b7ecff1529e6a11a9d",
    },
}
both_hashes = pytest.mark.parametrize("function", [SHA256, SHA384], ids=lambda one: one.name)


def cut(secret: Secret, length: int) -> Secret:
    return Secret(secret.reveal()[:length])


def shown(secret: Secret) -> str:
    return secret.reveal().hex()


@both_hashes
def test_cat_kdf_as_etsi_computes_it(function: HashFunction) -> None:
    common = {"message_a": MA, "message_b": MB, "label": LABEL, "info": INFO, "hash": function}
    key = cat_kdf([cut(K1, 32), K2], psk=PSK, length=48, **common)
    assert shown(key) == ETSI[function]["cat"]
    key = cat_kdf([K1, K2], length=16, **common)
    assert shown(key) == ETSI[function]["cat without psk"]


@both_hashes
def test_cas_kdf_as_etsi_computes_it(function: HashFunction) -> None:
    common = {"label": LABEL, "info": INFO, "hash": function, "length": 32}
    chain, key = cas_kdf(PSK, cut(K1, 32), message_a=MA[:32], message_b=MB[:32], **common)
    assert [shown(chain), shown(key)] == [ETSI[function]["chain 1"], ETSI[function]["key 1"]]
    chain, key = cas_kdf(chain, K2, message_a=MA[:1184], message_b=MB[:1088], **common)
    assert [shown(chain), shown(key)] == [ETSI[function]["chain 2"], ETSI[function]["key 2"]]


VECTORS = Path(__file__).parents[1] / "vectors" / "etsi103744" / "hkdf.json"


def xor(one: str, other: str) -> bytes:
    return bytes(a ^ b for a, b in zip(bytes.fromhex(one), bytes.fromhex(other), strict=True))


def message(cid: str, *values: str) -> bytes:
    """A message of the vectors: ``len`` counts hexadecimal digits there."""
    return bytes.fromhex(cid) + b"".join(
        len(value).to_bytes(4, "big") + bytes.fromhex(value) for value in values
    )


def test_the_vectors_of_the_standard() -> None:
    """Those with HKDF, of P-256, P-384 and X25519 with ML-KEM, in both methods."""
    seen: Counter[tuple[str, str]] = Counter()
    for case in json.loads(VECTORS.read_text(encoding="ascii"))["cases"]:
        function = {"sha256": SHA256, "sha384": SHA384}[case["hash"]]
        common = {"info": b"ETSI_QSHKE_TEST_VECTORS_V_1_2", "hash": function}
        k1, k2 = (Secret(bytes.fromhex(case[name])) for name in ("k1", "k2"))
        seen[case["method"], case["hash"]] += 1
        if case["method"] == "CatKDF":
            key = cat_kdf(
                [k1, k2],
                message_a=message(case["cid"], case["LA"], case["PA1"], case["PA2"]),
                message_b=message(case["cid"], case["LB"], case["PB1"], case["PB2"]),
                label=xor(case["LA"], case["LB"]),
                length=len(case["key material"]) // 2,
                **common,
            )
            assert shown(key) == case["key material"], case["cid"]
            continue
        chain = Secret(b"")
        for number, secret in (("1", k1), ("2", k2)):
            chain, key = cas_kdf(
                chain,
                secret,
                message_a=message(case["cid"], case["LA" + number], case["PA" + number]),
                message_b=message(case["cid"], case["LB" + number], case["PB" + number]),
                label=xor(case["LA" + number], case["LB" + number]),
                length=len(case["key_material" + number]) // 2,
                **common,
            )
            assert shown(chain) == case["chain_secret" + number], case["cid"]
            assert shown(key) == case["key_material" + number], case["cid"]
    assert seen == {
        (kind + "KDF", f"sha{bits}"): count
        for kind in ("Cat", "Cas")
        for bits, count in ((256, 4), (384, 2))
    }


def by_hand_hkdf(name: str, salt: bytes, secret: bytes, info: bytes, length: int) -> bytes:
    """RFC 5869, with nothing but the standard library."""
    prk = hmac.digest(salt, secret, name)
    output, block = b"", b""
    for counter in itertools.count(1):
        if len(output) >= length:
            return output[:length]
        block = hmac.digest(prk, block + info + bytes((counter,)), name)
        output += block
    raise AssertionError


def vectors(*values: bytes) -> bytes:
    return b"".join(len(value).to_bytes(4, "big") + value for value in values)


LEGS = (
    Leg(name="X25519", secret=cut(K1, 32), offer=MA[:32], answer=MB[:32]),
    Leg(name="ML-KEM-768", secret=K2, offer=MA[:1184], answer=MB[:1088]),
    Leg(name="QKD", secret=cut(K1, 16), offer=b"key-id"),
)


@both_hashes
@pytest.mark.parametrize("method", Method)
def test_combine_by_hand(function: HashFunction, method: Method) -> None:
    key = combine(
        LEGS, label=b"label", context=b"ctx", length=80, hash=function, psk=PSK, method=method
    )
    form = b"".join(vectors(leg.name.encode()) + len(leg.secret).to_bytes(4, "big") for leg in LEGS)
    info = vectors(method.value.encode(), bytes((0, 0, 0, 32)), form, b"ctx")
    if method is Method.CONCATENATE:
        secret = PSK.reveal() + b"".join(leg.secret.reveal() for leg in LEGS)
        offers = vectors(*(leg.offer for leg in LEGS))
        answers = vectors(*(leg.answer for leg in LEGS))
        digest = hashlib.new(function.name, vectors(info, offers, answers)).digest()
        expected = by_hand_hkdf(function.name, b"label", secret, digest, 80)
    else:
        chain, expected = PSK.reveal(), b""
        for leg in LEGS:
            said = vectors(leg.secret.reveal(), leg.offer, leg.answer)
            digest = hashlib.new(function.name, said).digest()
            secret = hmac.digest(chain, digest, function.name)
            output = by_hand_hkdf(function.name, b"label", secret, info, function.size + 80)
            chain, expected = output[: function.size], output[function.size :]
    assert key.reveal() == expected


@pytest.mark.parametrize("method", Method)
def test_everything_makes_a_difference(method: Method) -> None:
    a, b, c = LEGS
    common = {"label": b"l", "context": b"c", "method": method}
    keys = [
        combine(LEGS, **common),
        combine(LEGS, **(common | {"label": b"m"})),
        combine(LEGS, **(common | {"context": b"d"})),
        combine(LEGS, **common, psk=PSK),
        combine(LEGS, **common, hash=SHA384),
        combine((b, a, c), **common),
        combine((a, b), **common),
        combine((a, b, replace(c, name="PSK")), **common),
        combine((a, b, replace(c, secret=K2)), **common),
        combine((a, b, replace(c, offer=b"key-ie")), **common),
        combine((a, b, replace(c, answer=b"x")), **common),
        combine((replace(a, answer=b""), b, c), **common),
    ]
    assert len({shown(key) for key in keys}) == len(keys)
    other = {Method.CONCATENATE: Method.CASCADE, Method.CASCADE: Method.CONCATENATE}[method]
    assert combine(LEGS, **(common | {"method": other})) != keys[0]


def test_no_byte_passes_from_one_part_to_the_next() -> None:
    """The bare concatenation of CatKDF is the same for both; the names and lengths are not."""
    one = (
        Leg(name="a", secret=Secret(b"12"), offer=b"ab", answer=b""),
        Leg(name="b", secret=Secret(b"3"), offer=b"c", answer=b""),
    )
    two = (
        Leg(name="a", secret=Secret(b"1"), offer=b"a", answer=b""),
        Leg(name="b", secret=Secret(b"23"), offer=b"bc", answer=b""),
    )
    assert combine(one, label=b"l", context=b"") != combine(two, label=b"l", context=b"")
    moved = {"message_a": b"", "message_b": b"", "label": b"l", "info": b"", "length": 32}
    assert cat_kdf([leg.secret for leg in one], **moved) == cat_kdf(
        [leg.secret for leg in two], **moved
    )


def test_what_cannot_be_combined() -> None:
    empty = replace(LEGS[0], secret=Secret(b""))
    for legs, options in (
        ((), {"label": b"l"}),
        ((empty,), {"label": b"l"}),
        (LEGS, {"label": b""}),
        (LEGS, {"label": b"l", "length": 0}),
        (LEGS, {"label": b"l", "length": 255 * 32 + 1}),
    ):
        with pytest.raises(ConfigError):
            combine(legs, context=b"", **options)
    assert "12" not in repr(Leg(name="a", secret=Secret(b"12"), offer=b"")).replace("bytes", "")
