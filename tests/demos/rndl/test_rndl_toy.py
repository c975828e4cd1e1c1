"""The toy curve: a group as it should be, and far too small."""

import random

import pytest

from hybridkex.demos.rndl import toy_curve
from hybridkex.demos.rndl.toy_curve import (
    GENERATOR,
    ORDER,
    TOY_GROUP,
    decode,
    discrete_log,
    encode,
    multiply,
    shared_secret,
)
from hybridkex.errors import IllegalParameter


def is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def test_the_curve_is_what_it_says() -> None:
    assert is_prime(toy_curve.PRIME)
    assert is_prime(ORDER)
    assert decode(encode(GENERATOR)) == GENERATOR
    # A point of prime order inside Hasse's bound generates all there are.
    assert abs(ORDER - toy_curve.PRIME - 1) <= 2 * toy_curve.PRIME**0.5
    assert multiply(ORDER - 1, GENERATOR) == (GENERATOR[0], toy_curve.PRIME - GENERATOR[1])
    assert multiply(ORDER, GENERATOR) is None
    assert 2 * ORDER > toy_curve.PRIME + 1 + 2 * toy_curve.PRIME**0.5


def test_group_law() -> None:
    rng = random.Random(1)
    for _ in range(50):
        a, b = rng.randrange(ORDER), rng.randrange(ORDER)
        one, other = multiply(a, GENERATOR), multiply(b, GENERATOR)
        assert toy_curve.add(one, other) == multiply(a + b, GENERATOR)
        assert toy_curve.add(one, one) == multiply(2 * a, GENERATOR)
        assert toy_curve.add(one, None) == one
        assert shared_secret(a, other) == shared_secret(b, one)


def test_key_exchange() -> None:
    started = TOY_GROUP.exchange.start()
    share, secret = TOY_GROUP.exchange.respond(started.share)
    assert started.finish(share) == secret
    assert len(share) == len(started.share) == TOY_GROUP.exchange.offer_length
    assert 0xFE00 <= TOY_GROUP.code <= 0xFEFF, "private use (RFC 9846 section 4.3.7)"


def test_what_is_no_share() -> None:
    good = encode(GENERATOR)
    for share in (b"", good[:-1], good + b"\0", b"\x02" + good[1:], good[:-1] + b"\0"):
        with pytest.raises(IllegalParameter, match="toy curve"):
            decode(share)
    with pytest.raises(IllegalParameter, match="toy curve"):
        decode(b"\x04" + b"\xff" * 10)


def test_the_discrete_logarithm_is_computed() -> None:
    said = []
    for factor in (random.Random(2).randrange(ORDER), ORDER - 1):
        target = multiply(factor, GENERATOR)
        assert discrete_log(target, lambda *step: said.append(step)) == factor
    assert {what for what, _, _ in said} == {"baby steps", "giant steps"}
    assert all(done <= total for _, done, total in said)
