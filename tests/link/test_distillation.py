"""Cascade, Toeplitz hashing, tags, ledger, messages: each alone."""

import contextlib
import hashlib
import math
import sys
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, x25519
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridkex.errors import ConfigError, LedgerDry, LedgerLost, LinkAuthenticationError, LinkError
from hybridkex.link import cascade, cascade_arrays
from hybridkex.link.authentication import Signatures, WegmanCarter, collision_probability
from hybridkex.link.cascade import Cascade, Plan
from hybridkex.link.ledger import LANE_RESERVE, Direction, Ledger
from hybridkex.link.party import verification_hash
from hybridkex.link.reconciliation import Reconciler, ReconciliationError
from hybridkex.link.statistics import binary_entropy
from hybridkex.link.toeplitz import MAX_INPUT, compress, rounding_bound, seed_length
from hybridkex.link.wire import (
    Corrected,
    Finish,
    Hello,
    Report,
    Sift,
    Verdict,
    pack_bits,
    unpack_bits,
)
from hybridkex.secret import Secret

# -- Cascade


def reconcile(
    alice: "np.ndarray", bob: "np.ndarray", rate: float, *, method: Reconciler | None = None
) -> tuple[int, int, list[bytes]]:
    """Run both sides; bits disclosed by each, and what Bob sent."""
    method = Cascade() if method is None else method
    answers, search = method.respond(alice, rate), method.correct(bob, rate)
    sent: list[bytes] = []
    try:
        request = next(search)
        while True:
            sent.append(request)
            request = search.send(answers.answer(request))
    except StopIteration as end:
        found = end.value
        assert (found.disclosed, found.announced) == (answers.disclosed, answers.announced)
        return found.disclosed, found.announced, sent


def noisy(length: int, rate: float, seed: int) -> tuple["np.ndarray", "np.ndarray"]:
    draw = np.random.default_rng(seed)
    alice = draw.integers(0, 2, length, dtype=np.uint8)
    return alice, alice ^ (draw.random(length) < rate).astype(np.uint8)


@pytest.mark.parametrize("rate", [0.01, 0.02, 0.03, 0.04, 0.05])
def test_cascade_at_a_million_bits(rate: float) -> None:
    alice, bob = noisy(1_000_000, rate, int(rate * 100))
    shannon = len(alice) * binary_entropy(float((alice != bob).mean()))
    disclosed, _, sent = reconcile(alice, bob, rate)
    assert (alice == bob).all()
    assert 1.0 < disclosed / shannon <= 1.065
    assert len(sent) <= 220


def test_ten_million_bits_take_no_more_rounds_than_one_million() -> None:
    alice, bob = noisy(10_000_000, 0.05, 1)
    _, _, sent = reconcile(alice, bob, 0.05)
    assert (alice == bob).all()
    assert len(sent) <= 200


@pytest.mark.parametrize("length", [1, 2, 7, 100, 5000, 70_001, 300_000, 1_100_000])
@pytest.mark.parametrize("rate", [0.0, 0.02, 0.09])
def test_compiled_and_not_compiled_send_the_same(length: int, rate: float) -> None:
    pytest.importorskip("numba")
    alice, bob = noisy(length, rate, length)
    other = bob.copy()
    arrays = reconcile(alice, bob, rate, method=Cascade(compiled=False))
    loops = reconcile(alice, other, rate, method=Cascade(compiled=True))
    assert arrays == loops
    assert (bob == other).all()


def test_groups_follow_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """What bounds the memory of a long key."""
    monkeypatch.setattr(cascade, "GROUP", 20_000)
    alice, bob = noisy(90_000, 0.03, 2)
    reconcile(alice, bob, 0.03)
    assert (alice == bob).all()


@pytest.mark.parametrize("rate", [0.0, 0.001, 0.1, 0.2])
@pytest.mark.parametrize("expected", [0.001, 0.05, 0.5])
def test_cascade_with_a_wrong_idea_of_the_error_rate(rate: float, expected: float) -> None:
    alice, bob = noisy(20_000, rate, 1)
    disclosed, _, _ = reconcile(alice, bob, expected)
    assert (alice != bob).sum() <= 2
    assert disclosed < 2 * len(alice)


@given(length=st.integers(1, 600), rate=st.floats(0, 0.12), data=st.data())
@settings(max_examples=300, deadline=None)
def test_random_blocks_end_with_equal_keys_or_are_given_up(
    length: int, rate: float, data: st.DataObject
) -> None:
    """Error correction, verification and privacy amplification of any block, as the parties do."""
    number = data.draw(st.integers(0, 2**32))
    alice, bob = noisy(length, rate, number)
    draw = np.random.default_rng(number + 1)
    disclosed, _, _ = reconcile(alice, bob, rate)
    assert disclosed <= 3 * length + 200
    left = int((alice != bob).sum())
    assert left % 2 == 0
    seed = draw.bytes(32)
    agree = (verification_hash(alice, seed, 50) == verification_hash(bob, seed, 50)).all()
    assert agree == (left == 0)
    if agree:
        secret = data.draw(st.integers(0, length))
        matrix = draw.integers(0, 2, seed_length(length), dtype=np.uint8)
        ours = compress(alice, matrix, secret)
        assert len(ours) == secret
        assert (ours == compress(bob, matrix, secret)).all()


def test_few_blocks_are_left_with_wrong_bits() -> None:
    """The passes are as many as MISSED_PAIRS asks for."""
    left = 0
    for seed in range(60):
        alice, bob = noisy(20_000, 0.03, seed)
        reconcile(alice, bob, 0.03)
        left += int((alice != bob).any())
    assert left <= 2


def test_alice_refuses_malformed_requests() -> None:
    key = np.zeros(1000, dtype=np.uint8)
    plan = Plan.for_error_rate(1000, 0.05)
    tree = 2 << plan.room
    root = plan.roots(0).start

    def ask(*nodes: int) -> bytes:
        return b"".join(node.to_bytes(4, "little") for node in nodes)

    for requests in (
        [b""],
        [b"\x03"],
        [b"\x00" + ask(0)],
        [b"\x01"],
        [b"\x02\x00"],
        [b"\x02", b"\x02"],
        [b"\x02", b"\x00"],
        [b"\x02", b"\x00" + ask(8 * root)],
        [b"\x02", b"\x00" + ask(8 * 2 * root - 1)],
        [b"\x02", b"\x00" + ask(8 * tree)],
        [b"\x02", b"\x00" + ask(2**32 - 1)],
        [b"\x02", *([b"\x01"] * len(plan.heights))],
        [b"\x02", *([b"\x00" + ask(*range(8))] * 2000)],
    ):
        alice = Cascade().respond(key, 0.05)
        for request in requests[:-1]:
            with contextlib.suppress(ReconciliationError):
                alice.answer(request)
        with pytest.raises(ReconciliationError):
            alice.answer(requests[-1])


@pytest.mark.parametrize("rate", [0.005, 0.023, 0.025, 0.027])
def test_the_second_pass_keeps_to_few_round_trips(rate: float) -> None:
    """With blocks of twice as many bits there, it is 200 to 230 at these error rates."""
    alice, bob = noisy(500_000, rate, 3)
    _, _, sent = reconcile(alice, bob, rate)
    assert (alice == bob).all()
    assert len(sent) <= 150


def test_bob_ends_soon_if_the_answers_are_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first bit that would be corrected twice."""
    rounds, still = 0, cascade_arrays._still

    def counted(*arguments: Any) -> Any:
        nonlocal rounds
        rounds += 1
        return still(*arguments)

    monkeypatch.setattr(cascade_arrays, "_still", counted)
    draw = np.random.default_rng(2)

    def converse(compiled: bool) -> None:
        search = Cascade(compiled=compiled).correct(draw.integers(0, 2, 5000, dtype=np.uint8), 0.05)
        alice = Cascade().respond(np.zeros(5000, dtype=np.uint8), 0.05)
        request = next(search)
        while True:
            answer = alice.answer(request)
            request = search.send(draw.bytes(len(answer)))

    for compiled in [False] * 8 + [True] * 8 * (find_spec("numba") is not None):
        with pytest.raises(ReconciliationError, match="contradict one another"):
            converse(compiled)
    assert rounds < 100


def test_an_answer_of_the_wrong_length_is_refused() -> None:
    for answer in (b"", bytes(3), bytes(9999)):
        search = Cascade().correct(np.zeros(1000, dtype=np.uint8), 0.05)
        next(search)
        with pytest.raises(ReconciliationError, match="wrong length"):
            search.send(answer)


def test_what_bob_sends_follows_from_the_parities_announced() -> None:
    """Why counting his parities covers his requests: another key with the same ones, same bytes."""
    alice, bob = noisy(3000, 0.03, 5)
    flip = np.random.default_rng(6).integers(0, 2, 3000, dtype=np.uint8)
    first, second = bob.copy(), bob ^ flip
    assert reconcile(alice, first, 0.03)[2] == reconcile(alice ^ flip, second, 0.03)[2]


# -- privacy amplification


def by_the_book(key: "np.ndarray", seed: "np.ndarray", length: int) -> "np.ndarray":
    """The matrix (1 | T), written out, times the key in integers."""
    tail = key[length:]
    rows = np.arange(length)[:, None] - np.arange(len(tail))[None, :] + len(tail) - 1
    return (key[:length] + seed[rows].astype(np.int64) @ tail) % 2 if len(tail) else key[:length]


WITH_NUMBA = pytest.mark.skipif(not find_spec("numba"), reason="numba is not installed")
KINDS = (False, pytest.param(True, marks=WITH_NUMBA))


@pytest.mark.parametrize("compiled", KINDS)
@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_toeplitz_is_the_matrix_product(data: st.DataObject, compiled: bool) -> None:
    n = data.draw(st.integers(1, 400))
    m = data.draw(st.integers(0, n))
    draw = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    key = draw.integers(0, 2, n, dtype=np.uint8)
    seed = draw.integers(0, 2, seed_length(n), dtype=np.uint8)
    assert (compress(key, seed, m, compiled=compiled) == by_the_book(key, seed, m)).all()


@pytest.mark.parametrize("compiled", KINDS)
def test_toeplitz_hashing_of_the_shortest_keys(compiled: bool) -> None:
    draw = np.random.default_rng(11)
    for n in range(1, 20):
        for m in range(n + 1):
            key = draw.integers(0, 2, n, dtype=np.uint8)
            seed = draw.integers(0, 2, seed_length(n), dtype=np.uint8)
            assert (compress(key, seed, m, compiled=compiled) == by_the_book(key, seed, m)).all()


@pytest.mark.parametrize("compiled", KINDS)
@pytest.mark.parametrize(("n", "m"), [(1_000_000, 250_000), (1_000_000, 3), (3_000_000, 1_500_000)])
def test_toeplitz_at_size_agrees_with_integers(n: int, m: int, compiled: bool) -> None:
    """All ones is the worst that rounding can meet; random bits are what there will be."""
    draw = np.random.default_rng(n + m)
    for key, seed in (
        (np.ones(n, dtype=np.uint8), np.ones(n - 1, dtype=np.uint8)),
        (draw.integers(0, 2, n, dtype=np.uint8), draw.integers(0, 2, n - 1, dtype=np.uint8)),
    ):
        out = compress(key, seed, m, compiled=compiled)
        tail = key[m:]
        for row in {0, 1, m // 2, m - 2, m - 1} & set(range(m)):
            stretch = seed[row : row + len(tail)][::-1]
            assert out[row] == (int(key[row]) + int((stretch & tail).sum())) % 2


@pytest.mark.parametrize("odd", [1, 3, 5, 9, 15])
def test_integer_transforms_of_every_shape(odd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each odd part of the size with several powers of two, against the transform in numpy."""
    loops = pytest.importorskip("hybridkex.link.toeplitz_loops")
    monkeypatch.setattr(loops, "ODD", {odd: loops.ODD[odd]})
    loops._plan.cache_clear()
    draw = np.random.default_rng(odd)
    for n in (5000, 5000 * odd, 13_000 * odd, 34_567 * odd):
        key = draw.integers(0, 2, n, dtype=np.uint8)
        seed = draw.integers(0, 2, seed_length(n), dtype=np.uint8)
        m = int(draw.integers(1, n))
        ours, theirs = (compress(key, seed, m, compiled=kind) for kind in (True, False))
        assert (ours == theirs).all()
    loops._plan.cache_clear()


def test_without_numba_numpy_makes_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(10)
    key, seed = (draw.integers(0, 2, n, dtype=np.uint8) for n in (5000, 4999))
    expected = compress(key, seed, 1000, compiled=False)
    monkeypatch.setitem(sys.modules, "hybridkex.link.toeplitz_loops", None)
    assert (compress(key, seed, 1000) == expected).all()
    with pytest.raises(ImportError):
        compress(key, seed, 1000, compiled=True)


def test_toeplitz_is_linear_and_rounding_is_bounded() -> None:
    draw = np.random.default_rng(9)
    seed = draw.integers(0, 2, 499_999, dtype=np.uint8)
    a, b = (draw.integers(0, 2, 500_000, dtype=np.uint8) for _ in range(2))
    assert (compress(a ^ b, seed, 9999) == compress(a, seed, 9999) ^ compress(b, seed, 9999)).all()
    assert rounding_bound(10**7) < 1e-6
    assert rounding_bound(MAX_INPUT) < 1e-3
    for bad in ((a, seed, 500_001), (a, seed[1:], 5), (a, seed, -1)):
        with pytest.raises(ValueError, match=r"longer than its input|takes a seed of 499999"):
            compress(*bad)


# -- tags and the ledger

SHARED = Secret(hashlib.shake_256(b"shared").digest(512))
STARTS = dict.fromkeys(Direction, 0)


def test_tags_fit_one_message_one_direction_once() -> None:
    def pair() -> tuple[WegmanCarter, WegmanCarter]:
        one, two = (WegmanCarter(Ledger(SHARED), 1, starts=STARTS) for _ in range(2))
        return one, two

    way = Direction.ALICE_TO_BOB
    alice, bob = pair()
    tag = alice.tag(way, [b"a", b"b"])
    bob.check(way, [b"ab"], tag)
    with pytest.raises(LinkAuthenticationError):
        bob.check(way, [b"ab"], tag)  # the pad is used once
    bob.check(way, [b"c"], alice.tag(way, [b"c"]))
    for direction, parts, wrong in (
        (Direction.BOB_TO_ALICE, [b"ab"], tag),
        (way, [b"ac"], tag),
        (way, [b"ab"], bytes([tag[0] ^ 1]) + tag[1:]),
        (way, [b"ab"], tag[:-1]),
        (way, [b"ab"], b""),
    ):
        with pytest.raises(LinkAuthenticationError):
            pair()[1].check(direction, parts, wrong)
    assert collision_probability(1 << 24) < 2**-82


def test_a_tag_that_does_not_verify_uses_no_key_up() -> None:
    ledger = Ledger(SHARED)
    for _ in range(100):
        with pytest.raises(LinkAuthenticationError):
            WegmanCarter(ledger, 1, starts=STARTS).check(Direction.ALICE_TO_BOB, [b"x"], bytes(16))
    assert ledger.balance == 512


def test_signatures_stand_in() -> None:
    ours, theirs = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    alice, bob = Signatures(ours, theirs.public_key()), Signatures(theirs, ours.public_key())
    tag = alice.tag(Direction.ALICE_TO_BOB, [b"x"])
    bob.check(Direction.ALICE_TO_BOB, [b"x"], tag)
    with pytest.raises(LinkAuthenticationError):
        bob.check(Direction.ALICE_TO_BOB, [b"y"], tag)
    with pytest.raises(LinkAuthenticationError):
        alice.check(Direction.ALICE_TO_BOB, [b"x"], tag)
    with pytest.raises(ConfigError):
        Signatures(x25519.X25519PrivateKey.generate(), ours.public_key())
    assert "0x" not in repr(alice)


def test_the_ledger_balances() -> None:
    ledger = Ledger(SHARED)
    assert ledger.balance == 512
    assert ledger.wanting == 0
    first = ledger.draw(1, Direction.ALICE_TO_BOB, 16)
    assert first == SHARED.reveal()[:16]
    assert ledger.wanting == 16
    ledger.add(1, "from the link", bytes(16))
    assert ledger.wanting == 0
    assert sum(entry.change for entry in ledger.history) == ledger.balance
    assert [entry.balance for entry in ledger.history] == [512, 496, 512]
    with pytest.raises(LedgerDry):
        ledger.draw(2, Direction.BOB_TO_ALICE, LANE_RESERVE + 1)
    with pytest.raises(ConfigError):
        Ledger(Secret(bytes(10)))


@given(st.lists(st.tuples(st.integers(0, 300), st.sampled_from(Direction)), max_size=40))
@settings(deadline=None)
def test_two_ledgers_stay_alike_and_no_byte_is_used_twice(
    steps: list[tuple[int, Direction]],
) -> None:
    ours, theirs = Ledger(), Ledger()
    fresh = iter(range(1, 1 << 20))
    used: list[bytes] = []
    for number, (count, direction) in enumerate(steps):
        stock = b"".join(next(fresh).to_bytes(4) for _ in range(count // 4))
        ours.add(number, "", stock)
        theirs.add(number, "", stock)
        try:
            taken = ours.draw(number, direction, 4)
        except LedgerDry:
            with pytest.raises(LedgerDry):
                theirs.draw(number, direction, 4)
            continue
        assert theirs.draw(number, direction, 4) == taken
        used.append(taken)
    assert ours.balance == theirs.balance


def test_positions_are_agreed_from_who_speaks() -> None:
    """However the cut fell: the speaker is ahead of the listener, Bob may have a block more."""
    ab, ba = Direction.ALICE_TO_BOB, Direction.BOB_TO_ALICE
    alice, bob = Ledger(SHARED), Ledger(SHARED)
    alice.draw(1, ab, 48)
    bob.draw(1, ba, 32)
    alice.advance(1, ba, 32)
    bob.add(1, "a block that Alice never finished", bytes(100))
    views = [
        mine.agreement(speaks, {lane: theirs.position(lane) for lane in Direction})
        for mine, theirs, speaks in ((alice, bob, ab), (bob, alice, ba))
    ]
    assert views[0] == views[1]
    assert (views[0][ab].start, views[0][ba].start) == (48, 32)
    for ledger, view in zip((alice, bob), views, strict=True):
        ledger.cut(2, view)
        for lane in Direction:
            ledger.advance(2, lane, view[lane].start)
    assert all(alice.position(lane) == bob.position(lane) for lane in Direction)
    assert alice.draw(2, ab, 16) == bob.draw(2, ab, 16)


@pytest.mark.parametrize("lane", list(Direction))
def test_an_old_copy_of_a_ledger_is_refused(lane: Direction) -> None:
    """A speaker that is behind would use bytes again."""
    alice, bob = Ledger(SHARED), Ledger(SHARED)
    (alice if lane is Direction.BOB_TO_ALICE else bob).draw(1, lane, 16)
    for mine, theirs, speaks in ((alice, bob, 0), (bob, alice, 1)):
        with pytest.raises(LedgerLost, match="old copy"):
            mine.agreement(Direction(speaks), {one: theirs.position(one) for one in Direction})


# -- messages

BITS = st.lists(st.integers(0, 1), max_size=200).map(lambda bits: np.array(bits, dtype=np.uint8))


@given(BITS)
def test_bits_there_and_back(bits: "np.ndarray") -> None:
    assert (unpack_bits(pack_bits(bits), len(bits)) == bits).all()


@given(st.lists(st.integers(1, 2**32 - 1), min_size=1, max_size=50), st.data())
def test_reports_and_sifts_there_and_back(gaps: list[int], data: st.DataObject) -> None:
    draw = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    pulse = np.cumsum(np.array(gaps, dtype=np.int64))
    basis, kept = (draw.integers(0, 2, len(gaps), dtype=np.uint8) for _ in range(2))
    bit = draw.integers(0, 2, int(basis.sum()), dtype=np.uint8)
    again = Report.decode(Report(pulse=pulse, basis=basis, bit=bit).encode())
    assert (again.pulse == pulse).all()
    assert (again.basis == basis).all()
    assert (again.bit == bit).all()
    sift = Sift(
        kept=kept,
        intensity=draw.integers(0, 3, int(kept.sum()), dtype=np.uint8),
        bit=draw.integers(0, 2, int((kept & basis).sum()), dtype=np.uint8),
    )
    back = Sift.decode(sift.encode(), basis=basis, intensities=3)
    assert (back.kept == kept).all()
    assert (back.intensity == sift.intensity).all()
    assert (back.bit == sift.bit).all()


@given(st.binary(max_size=200))
@settings(max_examples=500)
def test_garbage_is_refused_or_has_one_reading(body: bytes) -> None:
    basis = np.ones(9, dtype=np.uint8)
    for decode in (
        Hello.decode,
        Report.decode,
        Verdict.decode,
        lambda data: Sift.decode(data, basis=basis, intensities=3),
        lambda data: Corrected.decode(data, most=(5, 5)),
        lambda data: Corrected.decode(data, most=()),
        lambda data: Finish.decode(data, hash_bits=50, seed_bits=99),
    ):
        try:
            found = decode(body)
        except LinkError:
            continue
        assert found.encode() == body


def test_entropy() -> None:
    assert binary_entropy(0.5) == 1.0
    assert binary_entropy(0.0) == binary_entropy(1.0) == 0.0
    assert math.isclose(binary_entropy(0.11), 0.4999, abs_tol=1e-4)
