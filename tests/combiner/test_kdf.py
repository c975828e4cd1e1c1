"""The combiner: ETSI's vectors and its reference implementation, the formulas by hand, and what
makes a difference."""

import functools
import hashlib
import hmac
import itertools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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


SALT = b"hybridkex combine v1"
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
    u32 = functools.partial(int.to_bytes, length=4, byteorder="big")
    info = vectors(method.value.encode(), function.name.encode(), b"label")
    info += u32(80) + u32(32) + u32(3)
    info += b"".join(vectors(leg.name.encode()) + u32(len(leg.secret)) for leg in LEGS)
    info += vectors(b"ctx")
    if method is Method.CONCATENATE:
        secret = PSK.reveal() + b"".join(leg.secret.reveal() for leg in LEGS)
        offers = vectors(*(leg.offer for leg in LEGS))
        answers = vectors(*(leg.answer for leg in LEGS))
        digest = hashlib.new(function.name, vectors(info, offers, answers)).digest()
        expected = by_hand_hkdf(function.name, SALT, secret, digest, 80)
    else:
        chain, expected = PSK.reveal(), b""
        for leg in LEGS:
            said = vectors(leg.secret.reveal(), leg.offer, leg.answer)
            digest = hashlib.new(function.name, said).digest()
            secret = hmac.digest(chain, digest, function.name)
            output = by_hand_hkdf(function.name, SALT, secret, info, function.size + 80)
            chain, expected = output[: function.size], output[function.size :]
    assert key.reveal() == expected


# Values that HMAC, HKDF or a concatenation without lengths would confuse: trailing zeros, more than
# a block and its hash, one field's bytes at the end of another.
LONG = bytes(range(1, 151))
TRICKY = [b"", b"\0", b"a", b"a\0", b"a\0\0", b"ab", b"b", LONG]
TRICKY += [f.digest(LONG) + pad for f in (SHA256, SHA384) for pad in (b"", b"\0")]
texts = st.sampled_from(TRICKY) | st.binary(max_size=3)
secrets = st.sampled_from([one for one in TRICKY if one]) | st.binary(min_size=1, max_size=3)
names = st.sampled_from(["a", "aa", "ab", "b", "é", "e\u0301", "a\0"])
legs = st.lists(st.tuples(names, secrets, texts, texts), min_size=1, max_size=3).map(tuple)
ARGUMENTS: dict[str, st.SearchStrategy[Any]] = {
    "legs": legs,
    "label": secrets,
    "context": texts,
    "length": st.integers(16, 40),
    "hash": st.sampled_from([SHA256, SHA384]),
    "psk": texts,
    "method": st.sampled_from(Method),
}


def derived(arguments: dict[str, Any]) -> bytes:
    """The first 16 bytes: a key that is a prefix of another is not another key."""
    given = dict(arguments)
    given["legs"] = [
        Leg(name=name, secret=Secret(secret), offer=offer, answer=answer)
        for name, secret, offer, answer in given["legs"]
    ]
    given["psk"] = Secret(given["psk"])
    key = combine(given.pop("legs"), **given)
    assert len(key) == arguments["length"]
    return key.reveal()[:16]


@settings(max_examples=400, deadline=None)
@given(first=st.fixed_dictionaries(ARGUMENTS), second=st.fixed_dictionaries(ARGUMENTS))
def test_other_arguments_give_another_key(first: dict[str, Any], second: dict[str, Any]) -> None:
    """All arguments at once, and each on its own."""
    cases = [second, *(first | {name: second[name]} for name in ARGUMENTS)]
    for other in cases:
        assert (derived(first) == derived(other)) == (first == other)


@settings(max_examples=150, deadline=None)
@given(arguments=st.fixed_dictionaries(ARGUMENTS), data=st.data())
def test_other_legs_give_another_key(arguments: dict[str, Any], data: st.DataObject) -> None:
    """One field of one leg, the order, and bytes that move from one field to the next."""
    one = arguments["legs"]
    index = data.draw(st.integers(0, len(one) - 1))
    leg = list(one[index])
    field = data.draw(st.integers(0, 3))
    leg[field] = data.draw((names, secrets, texts, texts)[field])
    changed = (*one[:index], tuple(leg), *one[index + 1 :])
    name, secret, offer, answer = one[index]
    moved = (*one[:index], (name, secret, offer + answer, b""), *one[index + 1 :])
    for legs in (changed, moved, one[::-1], one + one[:1]):
        assert (derived(arguments) == derived(arguments | {"legs": legs})) == (one == legs)


def test_each_pair_of_labels() -> None:
    """All pairs: the property above draws some of them."""
    for method in Method:
        keys = [combine(LEGS, label=label, context=b"", method=method) for label in TRICKY[1:]]
        assert len({shown(key) for key in keys}) == len(keys)


WRONG = (None, "text", 1, 1.5, True, bytearray(b"x"), memoryview(b"x"), object(), [b"x"])


@pytest.mark.parametrize("name", list(ARGUMENTS))
def test_wrong_types_are_refused(name: str) -> None:
    good: dict[str, Any] = {"legs": LEGS, "label": b"l", "context": b"c"}
    for value in WRONG:
        if name == "length" and type(value) is int:
            continue
        with pytest.raises(ConfigError, match=name):
            combine(**(good | {name: value}))


@pytest.mark.parametrize("name", ["name", "secret", "offer", "answer"])
def test_wrong_types_in_a_leg_are_refused(name: str) -> None:
    for value in WRONG:
        if name == "name" and type(value) is str:
            continue
        with pytest.raises(ConfigError, match=f"{name} of a leg"):
            replace(LEGS[0], **{name: value})
    for value in ("", "\ud800"):
        with pytest.raises(ConfigError, match="Unicode"):
            replace(LEGS[0], name=value)


def test_wrong_types_at_the_bare_functions() -> None:
    common: dict[str, Any] = {"message_a": b"", "message_b": b"", "label": b"l", "info": b""}
    for name in (*common, "length", "hash"):
        given = common | {"length": 32, name: None}
        with pytest.raises(ConfigError, match=name):
            cat_kdf([K1], **given)
        with pytest.raises(ConfigError, match=name):
            cas_kdf(PSK, K1, **given)
    for wrong in (K1, b"secret", [b"secret"], [None]):
        with pytest.raises(ConfigError, match="secrets"):
            cat_kdf(wrong, length=32, **common)  # type: ignore[arg-type]


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
    with pytest.raises(ConfigError, match="empty"):
        replace(LEGS[0], secret=Secret(b""))
    for legs, options in (
        ((), {"label": b"l"}),
        (LEGS, {"label": b""}),
        (LEGS, {"label": b"l", "length": 0}),
        (LEGS, {"label": b"l", "length": 255 * 32 + 1}),
        (LEGS, {"label": b"l", "length": 254 * 32 + 1, "method": Method.CASCADE}),
    ):
        with pytest.raises(ConfigError):
            combine(legs, context=b"", **options)
    assert "12" not in repr(Leg(name="a", secret=Secret(b"12"), offer=b"")).replace("bytes", "")
