"""Key exchange: layouts, agreement, and shares that a peer should not have sent.

Layouts are checked from outside: shares are cut by hand and completed with `cryptography` alone.
"""

from collections.abc import Callable, Sequence
from functools import partial

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, mlkem, x448, x25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridkex.constants import Alert, GroupCode
from hybridkex.crypto.kex import (
    ALL_GROUPS,
    CLASSICAL_GROUPS,
    HYBRID_GROUPS,
    MAX_SHARE,
    MLKEM768,
    MLKEM1024,
    SECP256R1,
    SECP256R1MLKEM768,
    SECP384R1,
    SECP384R1MLKEM1024,
    X25519,
    X25519MLKEM768,
    Concat,
    Group,
    KeyExchange,
    Property,
    Started,
)
from hybridkex.errors import ConfigError, IllegalParameter
from hybridkex.secret import Secret

# Code point, client share, server share, secret: RFC 10024 and
# RFC 9846 section 4.3.8.2, added up by hand; the groups of the registry.
TABLE = {
    X25519MLKEM768: (0x11EC, 1184 + 32, 1088 + 32, 64),
    SECP256R1MLKEM768: (0x11EB, 65 + 1184, 65 + 1088, 64),
    SECP384R1MLKEM1024: (0x11ED, 97 + 1568, 97 + 1568, 80),
    MLKEM768: (0x0201, 1184, 1088, 32),
    MLKEM1024: (0x0202, 1568, 1568, 32),
    X25519: (0x001D, 32, 32, 32),
    SECP256R1: (0x0017, 65, 65, 32),
    SECP384R1: (0x0018, 97, 97, 48),
}

# Client share, server share, secret, and kind of each part: FIPS 203, RFC 7748, SEC 1.
PARTS = {
    "X25519": (32, 32, 32, Property.CLASSICAL),
    "P-256": (65, 65, 32, Property.CLASSICAL),
    "P-384": (97, 97, 48, Property.CLASSICAL),
    "ML-KEM-768": (1184, 1088, 32, Property.POST_QUANTUM),
    "ML-KEM-1024": (1568, 1568, 32, Property.POST_QUANTUM),
}
FREE = "0xFEC0 to 0xFEFF"
PRIVATE_USE = range(0xFE00, 0xFEFF + 1)
"""RFC 9846 section 4.3.7."""

every_group = pytest.mark.parametrize("group", ALL_GROUPS, ids=str)


def refuse(action: Callable[[], object], reason: str | None = None) -> None:
    """The share is refused, with the right alert, and with this reason where one is given."""
    with pytest.raises(IllegalParameter, match=reason) as caught:
        action()
    assert caught.value.alert == Alert.ILLEGAL_PARAMETER
    assert caught.value.__cause__ is None


def lengths_of(group: Group) -> tuple[int, int, int]:
    """The lengths of the client's share, the server's share and the secret."""
    parts = [PARTS[name][:3] for name in group.part_names]
    client, server, secret = (sum(column) for column in zip(*parts, strict=True))
    return client, server, secret


@every_group
def test_the_tables_are_whole(group: Group) -> None:
    """Of a new group with a private code point, they need its parts alone."""
    for name in group.part_names:
        assert name in PARTS, f"add the lengths and the kind of {name} to PARTS"
        assert name in MALFORMED, f"add shares of {name} that must be refused to MALFORMED"
    if group.code not in PRIVATE_USE:
        assert group in TABLE, f"add {group} to TABLE, from its RFC, or give it a code of {FREE}"
        assert TABLE[group] == (group.code, *lengths_of(group))
        assert group.code in set(GroupCode), f"add {group} to GroupCode in hybridkex/constants.py"


def test_every_registered_group_is_there() -> None:
    # ML-KEM-512 is liboqs's alone.
    codes = [group.code for group in ALL_GROUPS]
    assert {code for code in codes if code not in PRIVATE_USE} == (
        set(GroupCode) - {GroupCode.MLKEM512}
    )
    assert set(TABLE) <= set(ALL_GROUPS)
    assert len(set(codes)) == len(codes)
    assert ALL_GROUPS[0] is X25519MLKEM768


def test_only_registered_groups_are_offered_by_default() -> None:
    """HYBRID_GROUPS and CLASSICAL_GROUPS are the default offer of every configuration."""
    offered = HYBRID_GROUPS + CLASSICAL_GROUPS
    private = [str(group) for group in offered if group.code in PRIVATE_USE]
    assert private == [], f"list {private} in ALL_GROUPS alone: its code point is private"
    for group in HYBRID_GROUPS:
        assert group.properties == Property.CLASSICAL | Property.POST_QUANTUM
        assert len(group.part_names) == 2
    for group in CLASSICAL_GROUPS:
        assert group.properties == Property.CLASSICAL
        assert len(group.part_names) == 1


@every_group
def test_lengths_and_agreement(group: Group) -> None:
    client, server, secret = lengths_of(group)
    assert (group.exchange.offer_length, group.exchange.answer_length) == (client, server)
    started = group.exchange.start()
    answer, ours = group.exchange.respond(started.share)
    theirs = started.finish(answer)
    assert (len(started.share), len(answer), len(ours)) == (client, server, secret)
    assert ours == theirs
    assert ours.reveal() != bytes(secret)


@every_group
def test_every_run_is_fresh(group: Group) -> None:
    """Neither side uses a key twice, not even against the same share."""
    first, second = group.exchange.start(), group.exchange.start()
    assert first.share != second.share
    answers = [group.exchange.respond(first.share) for _ in range(3)]
    assert len({share for share, _ in answers}) == 3
    assert len({secret.reveal() for _, secret in answers}) == 3


@every_group
def test_every_part_of_a_share_is_fresh(group: Group) -> None:
    """In a hybrid, no part stays the same while another changes."""
    first, second = group.exchange.start().share, group.exchange.start().share
    start = 0
    for part in group.exchange.parts:
        end = start + part.offer_length
        assert first[start:end] != second[start:end]
        start = end
    assert start == len(first)


@every_group
def test_properties(group: Group) -> None:
    expected = Property(0)
    for name in group.part_names:
        expected |= PARTS[name][3]
    assert group.properties == expected
    assert str(group) == group.name


def test_names() -> None:
    assert X25519MLKEM768.part_names == ("ML-KEM-768", "X25519")
    assert SECP256R1MLKEM768.part_names == ("P-256", "ML-KEM-768")
    assert SECP384R1MLKEM1024.part_names == ("P-384", "ML-KEM-1024")
    assert X25519.part_names == ("X25519",)
    assert X25519MLKEM768.exchange.name == "ML-KEM-768+X25519"


# The layouts, against `cryptography` alone


def encode_point(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)


def test_our_client_against_x25519mlkem768_by_hand() -> None:
    started = X25519MLKEM768.exchange.start()
    encapsulation_key, point = started.share[:1184], started.share[1184:]
    kem_secret, ciphertext = mlkem.MLKEM768PublicKey.from_public_bytes(
        encapsulation_key
    ).encapsulate()
    private = x25519.X25519PrivateKey.generate()
    ecdh_secret = private.exchange(x25519.X25519PublicKey.from_public_bytes(point))
    answer = ciphertext + private.public_key().public_bytes_raw()
    assert started.finish(answer).reveal() == kem_secret + ecdh_secret


def test_our_server_against_x25519mlkem768_by_hand() -> None:
    kem, private = mlkem.MLKEM768PrivateKey.generate(), x25519.X25519PrivateKey.generate()
    share = kem.public_key().public_bytes_raw() + private.public_key().public_bytes_raw()
    answer, secret = X25519MLKEM768.exchange.respond(share)
    ecdh_secret = private.exchange(x25519.X25519PublicKey.from_public_bytes(answer[1088:]))
    assert secret.reveal() == kem.decapsulate(answer[:1088]) + ecdh_secret


NIST_HYBRIDS = pytest.mark.parametrize(
    ("group", "curve", "kem", "public_kem", "point_length"),
    [
        (
            SECP256R1MLKEM768,
            ec.SECP256R1(),
            mlkem.MLKEM768PrivateKey,
            mlkem.MLKEM768PublicKey,
            65,
        ),
        (
            SECP384R1MLKEM1024,
            ec.SECP384R1(),
            mlkem.MLKEM1024PrivateKey,
            mlkem.MLKEM1024PublicKey,
            97,
        ),
    ],
    ids=["SecP256r1MLKEM768", "SecP384r1MLKEM1024"],
)
type_of_kem = type[mlkem.MLKEM768PrivateKey] | type[mlkem.MLKEM1024PrivateKey]
type_of_public_kem = type[mlkem.MLKEM768PublicKey] | type[mlkem.MLKEM1024PublicKey]


@NIST_HYBRIDS
def test_our_client_against_a_nist_hybrid_by_hand(
    group: Group,
    curve: ec.EllipticCurve,
    kem: type_of_kem,
    public_kem: type_of_public_kem,
    point_length: int,
) -> None:
    started = group.exchange.start()
    point, key = started.share[:point_length], started.share[point_length:]
    private = ec.generate_private_key(curve)
    peer = ec.EllipticCurvePublicKey.from_encoded_point(curve, point)
    kem_secret, ciphertext = public_kem.from_public_bytes(key).encapsulate()
    expected = private.exchange(ec.ECDH(), peer) + kem_secret
    assert started.finish(encode_point(private) + ciphertext).reveal() == expected


@NIST_HYBRIDS
def test_our_server_against_a_nist_hybrid_by_hand(
    group: Group,
    curve: ec.EllipticCurve,
    kem: type_of_kem,
    public_kem: type_of_public_kem,
    point_length: int,
) -> None:
    private, decapsulation_key = ec.generate_private_key(curve), kem.generate()
    share = encode_point(private) + decapsulation_key.public_key().public_bytes_raw()
    answer, secret = group.exchange.respond(share)
    peer = ec.EllipticCurvePublicKey.from_encoded_point(curve, answer[:point_length])
    expected = private.exchange(ec.ECDH(), peer) + decapsulation_key.decapsulate(
        answer[point_length:]
    )
    assert secret.reveal() == expected


def test_an_ecdh_secret_keeps_its_leading_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """RFC 9846 section 7.4.2: the x-coordinate is padded to the size of the field."""
    private, peer = ec.derive_private_key(1, ec.SECP256R1()), None
    while peer is None or peer.public_key().public_numbers().x >> 248:
        peer = ec.generate_private_key(ec.SECP256R1())
    with monkeypatch.context() as patch:
        patch.setattr(ec, "generate_private_key", lambda _curve: private)
        started = SECP256R1.exchange.start()
    secret = started.finish(encode_point(peer))
    # The private key 1 makes the shared point the peer's own.
    assert secret.reveal() == peer.public_key().public_numbers().x.to_bytes(32, "big")
    assert secret.reveal()[0] == 0


# Shares of a wrong length


def wrong_lengths(right: int) -> list[int]:
    return [0, 1, right - 1, right + 1, 2 * right, MAX_SHARE]


@every_group
def test_wrong_lengths(group: Group) -> None:
    """Said as such, before any part of the share is looked at."""
    started = group.exchange.start()
    answer, _ = group.exchange.respond(started.share)
    for good, take in ((started.share, group.exchange.respond), (answer, started.finish)):
        for length in wrong_lengths(len(good)):
            share = (good * (length // len(good) + 1))[:length]
            refuse(partial(take, share), f"a share of {length} bytes instead of {len(good)}")


@pytest.mark.parametrize("group", HYBRID_GROUPS, ids=str)
def test_a_share_with_only_one_part(group: Group) -> None:
    """Nor can one part be left out, or come in the other's place."""
    started = group.exchange.start()
    cut = group.exchange.parts[0].offer_length
    refuse(lambda: group.exchange.respond(started.share[:cut]))
    refuse(lambda: group.exchange.respond(started.share[cut:]))
    # Misplaced, an ML-KEM key fails the modulus check and a point does not begin with 4, or is not
    # on the curve; that all of it happens to fit has a chance below 2^-64.
    refuse(lambda: group.exchange.respond(started.share[cut:] + started.share[:cut]))


# Malformed shares, part by part; each also inside every hybrid that has the part

P25519 = 2**255 - 19
# All encodings in 32 bytes of the points of order 1, 2, 4 and 8 on the curve and on its twist
# (RFC 7748 section 6.1 and Bernstein's list); bit 255 is ignored, so each counts twice.
_ORDER_8 = (
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
)
_LOW_ORDER = {0, 1, P25519 - 1, P25519, P25519 + 1, *_ORDER_8}
LOW_ORDER_POINTS = [
    (u | high << 255).to_bytes(32, "little") for u in sorted(_LOW_ORDER) for high in (0, 1)
]


def ec_malformed(curve: ec.EllipticCurve, prime: int) -> list[bytes]:
    """Points that are none, as long as an uncompressed point where that is possible."""
    private = ec.generate_private_key(curve)
    good = encode_point(private)
    compressed = private.public_key().public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
    half = (len(good) - 1) // 2
    x, y = good[1 : 1 + half], good[1 + half :]
    off_curve = bytes((*y[:-1], y[-1] ^ 1))
    return [
        b"\x04" + x + off_curve,
        b"\x04" + y + x,
        b"\x04" + bytes(2 * half),
        # Coordinates that are not reduced: the point would be on the curve after a reduction.
        b"\x04" + prime.to_bytes(half, "big") + y,
        b"\x04" + b"\xff" * (2 * half),
        # Hybrid form, with the right parity and with the wrong one.
        b"\x06" + x + y,
        b"\x07" + x + y,
        # Raw, compressed and infinity, padded to the length of a point.
        b"\x00" * (1 + 2 * half),
        b"\x00" + x + y,
        b"\x01" + x + y,
        b"\x05" + x + y,
        compressed + bytes(half),
        bytes(half) + compressed,
        # And as short as they are.
        compressed,
        b"\x00",
    ]


P256 = 2**256 - 2**224 + 2**192 + 2**96 - 1
P384 = 2**384 - 2**128 - 2**96 + 2**32 - 1
Q = 3329


def kem_malformed(key: bytes) -> list[bytes]:
    """Encapsulation keys with a 12-bit coefficient of q or more (FIPS 203 section 7.2).

    Two coefficients share three bytes, low bits first (section 4.2.1, ByteEncode with d = 12).
    """
    malformed = []
    last = (len(key) - 32) // 3 * 3 - 3
    for position in (0, 3 * 63, last):
        for value in (Q, Q + 1, 4095):
            low = bytes((value & 0xFF, key[position + 1] & 0xF0 | value >> 8))
            malformed.append(key[:position] + low + key[position + 2 :])
            high = bytes((key[position + 1] & 0x0F | (value & 0xF) << 4, value >> 4))
            malformed.append(key[: position + 1] + high + key[position + 3 :])
    return malformed


MALFORMED: dict[str, list[bytes]] = {
    "X25519": LOW_ORDER_POINTS,
    "P-256": ec_malformed(ec.SECP256R1(), P256),
    "P-384": ec_malformed(ec.SECP384R1(), P384),
    "ML-KEM-768": kem_malformed(
        mlkem.MLKEM768PrivateKey.generate().public_key().public_bytes_raw()
    ),
    "ML-KEM-1024": kem_malformed(
        mlkem.MLKEM1024PrivateKey.generate().public_key().public_bytes_raw()
    ),
}


def test_what_is_malformed_is_what_it_says() -> None:
    """The lists hold what they promise: as many as counted by hand, each different."""
    assert {name: len(set(shares)) for name, shares in MALFORMED.items()} == {
        "X25519": 14,
        "P-256": 15,
        "P-384": 15,
        "ML-KEM-768": 18,
        "ML-KEM-1024": 18,
    }
    # A coefficient of q - 1 in the same places is fine.
    key = mlkem.MLKEM768PrivateKey.generate().public_key().public_bytes_raw()
    edge = bytes(((Q - 1) & 0xFF, (Q - 1) >> 8 | ((Q - 1) & 0xF) << 4, (Q - 1) >> 4))
    for position in (0, 3 * 63, 3 * 383):
        MLKEM768.exchange.respond(key[:position] + edge + key[position + 3 :])


def test_low_order_points_give_zero() -> None:
    """Eight times each of them is the point at infinity, and the base point's is not."""
    for point in LOW_ORDER_POINTS:
        assert montgomery_ladder(8, point) == 0, point.hex()
    assert montgomery_ladder(8, (9).to_bytes(32, "little")) != 0


def montgomery_ladder(scalar: int, point: bytes) -> int:
    """``scalar * u`` on curve25519 (RFC 7748 section 5) without clamping; 0 is also infinity."""
    p, u = P25519, int.from_bytes(point, "little") % 2**255 % P25519
    x2, z2, x3, z3 = 1, 0, u, 1
    for bit in reversed(range(scalar.bit_length())):
        if scalar >> bit & 1:
            x2, z2, x3, z3 = x3, z3, x2, z2
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        aa, bb, da, cb = a * a % p, b * b % p, d * a % p, c * b % p
        x3, z3 = (da + cb) ** 2 % p, u * (da - cb) ** 2 % p
        e = aa - bb
        x2, z2 = aa * bb % p, e * (aa + 121665 * e) % p
        if scalar >> bit & 1:
            x2, z2, x3, z3 = x3, z3, x2, z2
    return x2 * pow(z2, p - 2, p) % p


def with_part(group: Group, share: bytes, lengths: Sequence[int], index: int, part: bytes) -> bytes:
    start = sum(lengths[:index])
    return share[:start] + part + share[start + lengths[index] :]


@every_group
def test_malformed_client_shares(group: Group) -> None:
    good = group.exchange.start().share
    lengths = [part.offer_length for part in group.exchange.parts]
    for index, name in enumerate(group.part_names):
        for malformed in MALFORMED[name]:
            share = with_part(group, good, lengths, index, malformed)
            refuse(partial(group.exchange.respond, share))
    group.exchange.respond(good)


@every_group
def test_malformed_server_shares(group: Group) -> None:
    started = group.exchange.start()
    good, secret = group.exchange.respond(started.share)
    lengths = [part.answer_length for part in group.exchange.parts]
    for index, name in enumerate(group.part_names):
        if name.startswith("ML-KEM"):
            continue  # every ciphertext of the right length is one: implicit rejection, below
        for malformed in MALFORMED[name]:
            share = with_part(group, good, lengths, index, malformed)
            refuse(partial(started.finish, share))
    assert started.finish(good) == secret


@pytest.mark.parametrize("group", [SECP256R1, SECP384R1], ids=str)
def test_the_form_of_a_point(group: Group) -> None:
    """Whatever the library below accepts, only 0x04 passes (RFC 9846 section 4.3.8.2)."""
    good = group.exchange.start().share
    for form in set(range(256)) - {4}:
        share = bytes((form,)) + good[1:]
        refuse(partial(group.exchange.respond, share), "uncompressed")


@pytest.mark.parametrize("group", [MLKEM768, MLKEM1024, *HYBRID_GROUPS], ids=str)
def test_a_changed_ciphertext_changes_the_secret(group: Group) -> None:
    """FIPS 203 section 6.3, implicit rejection: no error, another secret, always the same one."""
    started = group.exchange.start()
    answer, secret = group.exchange.respond(started.share)
    start = 0
    for part in group.exchange.parts:
        if part.name.startswith("ML-KEM"):
            break
        start += part.answer_length
    changed = answer[:start] + bytes((answer[start] ^ 1,)) + answer[start + 1 :]
    other = started.finish(changed)
    assert other != secret
    assert other == started.finish(changed)
    assert len(other) == len(secret)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), group=st.sampled_from(ALL_GROUPS))
def test_random_shares(data: st.DataObject, group: Group) -> None:
    """Whatever arrives, it gives a secret of the right size or IllegalParameter."""
    exchange, secret_length = group.exchange, lengths_of(group)[2]
    exact = st.integers(0, 255).flatmap(
        lambda first: st.binary(min_size=63, max_size=63).map(
            lambda seed: bytes((first,)) + seed * (MAX_SHARE // 63)
        )
    )
    offer = data.draw(
        st.one_of(st.binary(max_size=70), exact.map(lambda share: share[: exchange.offer_length]))
    )
    try:
        answer, secret = exchange.respond(offer)
    except IllegalParameter:
        pass
    else:
        assert (len(answer), len(secret)) == (exchange.answer_length, secret_length)
    answer = data.draw(
        st.one_of(st.binary(max_size=70), exact.map(lambda share: share[: exchange.answer_length]))
    )
    try:
        secret = exchange.start().finish(answer)
    except IllegalParameter:
        pass
    else:
        assert len(secret) == secret_length


@settings(max_examples=60, deadline=None)
@given(data=st.data(), group=st.sampled_from(ALL_GROUPS))
def test_one_flipped_bit(data: st.DataObject, group: Group) -> None:
    """A share that is nearly right: refused, or both ends have different secrets."""
    started = group.exchange.start()
    bit = data.draw(st.integers(0, 8 * len(started.share) - 1))
    share = bytearray(started.share)
    share[bit // 8] ^= 1 << bit % 8
    try:
        answer, secret = group.exchange.respond(bytes(share))
    except IllegalParameter:
        return
    ignored = last_bit_of_x25519(group, bit)
    assert (started.finish(answer) == secret) == ignored


def last_bit_of_x25519(group: Group, bit: int) -> bool:
    """RFC 7748 section 5: the most significant bit of the last byte is masked away."""
    return group.part_names[-1] == "X25519" and bit == 8 * group.exchange.offer_length - 1


# Groups and hybrids of other people


class FromElsewhere:
    """A third party's key exchange: X448, in the shape that KeyExchange asks for."""

    name = "X448"
    properties = Property.CLASSICAL
    offer_length = answer_length = 56

    @property
    def parts(self) -> Sequence[KeyExchange]:
        return (self,)

    def start(self) -> Started:
        return StartedElsewhere()

    def respond(self, peer_share: bytes) -> tuple[bytes, Secret]:
        started = StartedElsewhere()
        return started.share, started.finish(peer_share)


class StartedElsewhere:
    def __init__(self) -> None:
        self._private = x448.X448PrivateKey.generate()
        self.share = self._private.public_key().public_bytes_raw()

    def finish(self, peer_share: bytes) -> Secret:
        try:
            public = x448.X448PublicKey.from_public_bytes(peer_share)
            return Secret(self._private.exchange(public))
        except ValueError:
            raise IllegalParameter("X448: not a share") from None


def test_a_key_exchange_from_elsewhere() -> None:
    x448_group = Group(code=0x001E, name="x448", exchange=FromElsewhere())
    hybrid = Group(
        code=0xFE00,
        name="MLKEM1024X448",
        exchange=Concat(MLKEM1024.exchange, x448_group.exchange, name="ML-KEM-1024 with X448"),
    )
    assert hybrid.part_names == ("ML-KEM-1024", "X448")
    assert hybrid.exchange.name == "ML-KEM-1024 with X448"
    assert hybrid.properties == Property.CLASSICAL | Property.POST_QUANTUM
    for group in (x448_group, hybrid):
        started = group.exchange.start()
        answer, secret = group.exchange.respond(started.share)
        assert started.finish(answer) == secret
        assert (len(started.share), len(answer)) == (
            group.exchange.offer_length,
            group.exchange.answer_length,
        )
    assert len(secret) == 32 + 56
    refuse(lambda: hybrid.exchange.respond(bytes(1568 + 55)))
    refuse(lambda: hybrid.exchange.respond(MLKEM1024.exchange.start().share + bytes(56)))


def test_a_hybrid_of_three_and_of_hybrids() -> None:
    """Concat takes whatever has the shape, itself included."""
    for exchange in (
        Concat(X25519.exchange, MLKEM768.exchange, SECP256R1.exchange),
        Concat(X25519MLKEM768.exchange, SECP256R1.exchange),
    ):
        started = exchange.start()
        answer, secret = exchange.respond(started.share)
        assert started.finish(answer) == secret
        assert len(secret) == 96
        assert len(started.share) == 32 + 1184 + 65


def test_the_order_of_the_parts_is_the_layout() -> None:
    swapped = Concat(X25519.exchange, MLKEM768.exchange)
    started = swapped.start()
    assert mlkem.MLKEM768PublicKey.from_public_bytes(started.share[32:])
    answer, secret = swapped.respond(started.share)
    assert started.finish(answer) == secret


def test_a_hybrid_has_two_parts() -> None:
    with pytest.raises(ConfigError, match="two parts"):
        Concat(X25519.exchange)
    with pytest.raises(ConfigError, match="two parts"):
        Concat()


def exchange_of(offer: int, answer: int) -> KeyExchange:
    class Sized(FromElsewhere):
        offer_length = offer
        answer_length = answer

    return Sized()


@pytest.mark.parametrize(("offer", "answer"), [(65536, 32), (32, 65536), (0, 32), (32, 0)])
def test_a_group_whose_share_does_not_fit(offer: int, answer: int) -> None:
    with pytest.raises(ConfigError, match="share of"):
        Group(code=0xFE00, name="McEliece", exchange=exchange_of(offer, answer))


def test_a_group_whose_share_just_fits() -> None:
    group = Group(code=0xFE00, name="McEliece", exchange=exchange_of(65535, 65535))
    assert group.exchange.offer_length == MAX_SHARE


@pytest.mark.parametrize("code", [0, -1, 0x10000])
def test_a_code_point_that_does_not_fit(code: int) -> None:
    with pytest.raises(ConfigError, match="code point"):
        Group(code=code, name="x", exchange=X25519.exchange)
