"""Bits of Alice that no key may be made of, and good ones, which pass."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import trio
from numpy.typing import NDArray

from hybridkex.cli import main
from hybridkex.errors import BlockAborted, LinkError, NotRandom
from hybridkex.link import health
from hybridkex.link.health import check_chosen, check_measured
from hybridkex.link.ledger import LANE_RESERVE, Ledger
from hybridkex.link.measured import Measured, alice_of, bob_of, distil, write_measured
from hybridkex.link.optimise import tuned
from hybridkex.link.presets import PRESETS, Preset
from hybridkex.link.quantum import sample
from hybridkex.link.randomness import Randomness
from hybridkex.link.settings import LinkSettings
from hybridkex.link.simulated import SimulatedLink, stream_pair
from hybridkex.link.statistics import mean_lower, mean_upper
from hybridkex.secret import Secret

pytestmark = pytest.mark.usefixtures("steps_in_place")

Bits = NDArray[np.uint8]
ROWS = 60_000


@cache
def recorded(name: str) -> tuple[Measured, Measured, Preset]:
    chosen = tuned(PRESETS[name].at(10), 40_000)
    draw = Randomness.seeded(1, "health")
    light = chosen.channel
    sent, seen = sample(light, chosen.transmitter, light, ROWS, first=0, randomness=draw)
    alice = Measured(pulse=seen.pulse, basis=sent.basis, bit=sent.bit, intensity=sent.intensity)
    return alice, Measured(pulse=seen.pulse, basis=seen.basis, bit=seen.bit), chosen


def with_bits(name: str, bits: Bits) -> tuple[Measured, Measured, LinkSettings]:
    """The same detections of other bits; the errors stay where they were."""
    alice, bob, chosen = recorded(name)
    wrong = alice.bit ^ bob.bit
    return replace(alice, bit=bits), replace(bob, bit=bits ^ wrong), LinkSettings(preset=chosen)


@cache
def prbs(order: int) -> Bits:
    """The test sequence of ITU-T O.150 with this many bits of state."""
    tap = {7: 6, 9: 5, 15: 14, 20: 3, 23: 18}[order]
    made, done, scale = np.ones(2**order - 1, np.uint8), order, 1
    while done < len(made):
        # The recurrence holds for distances times a power of two as well: squares modulo 2.
        scale *= 2 if 2 * scale * order <= done else 1
        step = min(scale * tap, len(made) - done)
        far, near = done - scale * order, done - scale * tap
        made[done : done + step] = made[far : far + step] ^ made[near : near + step]
        done += step
    return made


ROW = np.arange(ROWS)
Pattern = Callable[[Measured], Bits]
PATTERNS: dict[str, Pattern] = {
    "zeros": lambda one: 0 * one.bit,
    "ones": lambda one: 0 * one.bit + 1,
    "mostly zeros": lambda one: one.bit & (ROW % 50 == 0),
    "biased": lambda one: one.bit | (ROW % 16 == 0),
    "alternating": lambda one: ROW % 2,
    "pairs": lambda one: ROW // 2 % 2,
    "blocks": lambda one: ROW // 5000 % 2,
    "every bit twice": lambda one: np.repeat(one.bit[::2], 2),
    "period of 32": lambda one: np.resize(one.bit[:32], ROWS),
    "a byte": lambda one: np.resize(np.unpackbits(np.frombuffer(b"\x35", np.uint8)), ROWS),
    "the basis": lambda one: one.basis,
    "the key basis alone": lambda one: one.bit & one.basis,
    "dead for 100 rows": lambda one: one.bit * (abs(ROW - 30_000) >= 50),
    "biased for a while": lambda one: one.bit | (abs(ROW - 30_000) < 1024) & (ROW % 2),
    "one intensity alone": lambda one: one.bit & (one.intensity != 1),
    "rows that repeat": lambda one: np.resize(one.bit[:10_000], ROWS),
    "half twice": lambda one: np.resize(one.bit[: ROWS // 2], ROWS),
    "a pattern in the order of rows": lambda one: prbs(15)[ROW % (2**15 - 1)],
    "two states in turn": lambda one: one.pulse % 2,
    "four states in turn": lambda one: one.pulse // 2 % 2,
    "a pattern of 24 pulses": lambda one: one.bit[one.pulse % 24],
    "a pattern of 1,000 pulses": lambda one: one.bit[one.pulse % 1000],
    "a pattern of 512 pulses": lambda one: one.bit[one.pulse % 512],
    "PRBS7": lambda one: prbs(7)[one.pulse % (2**7 - 1)],
    "PRBS9": lambda one: prbs(9)[one.pulse % (2**9 - 1)],
    "PRBS15": lambda one: prbs(15)[one.pulse % (2**15 - 1)],
}
"""Mistakes; the last eight show only between pulses of the same place."""


@pytest.mark.parametrize("kind", PATTERNS)
@pytest.mark.parametrize("name", ["lim2014", "rusca2018"])
def test_no_key_is_made_of_bits_that_are_not_random(name: str, kind: str, thorough: bool) -> None:
    """That nothing else objects is shown for every second pattern of each preset, in turn, and for
    all with ``--thorough``."""
    bits = PATTERNS[kind](recorded(name)[0]).astype(np.uint8)
    alice, bob, settings = with_bits(name, bits)
    with pytest.raises(NotRandom, match=r"^Alice's bits are not random: [\d,]+ (of|bits)") as told:
        distil(alice, bob, settings)
    assert "\n" not in str(told.value)
    assert "check" in str(told.value)
    if thorough or list(PATTERNS).index(kind) % 2 == (name == "lim2014"):
        # Nothing else objects: but for the test these would be keys.
        assert distil(alice, bob, replace(settings, bit_check="off"))[1].keys


@pytest.mark.parametrize("name", ["lim2014", "rusca2018", "bbm92"])
def test_random_bits_make_keys(name: str) -> None:
    alice, bob, chosen = recorded(name)
    assert distil(alice, bob, LinkSettings(preset=chosen))[0].keys


MEASURED = ("zeros", "ones", "mostly zeros", "alternating", "pairs", "blocks")


@pytest.mark.parametrize("kind", MEASURED)
def test_pairs_whose_bits_contradict_their_phase_errors_make_no_key(kind: str) -> None:
    bits = PATTERNS[kind](recorded("bbm92")[0]).astype(np.uint8)
    alice, bob, _ = recorded("bbm92")
    kept = (alice.basis == bob.basis) & (alice.basis == 0)
    bits[kept] = PATTERNS[kind](alice)[: kept.sum()]
    alice, bob, settings = with_bits("bbm92", bits)
    with pytest.raises(NotRandom):
        distil(alice, bob, settings)


def test_pairs_may_be_biased_as_far_as_the_uncertainty_relation_lets_them() -> None:
    draw = Randomness.seeded(3, "pairs")
    for phi in (0.002, 0.01, 0.05):
        allowed = math.sqrt(phi * (1.0 - phi))
        for sign in (-1.0, 1.0):
            share = 0.5 + sign * allowed
            check_measured(draw.happens(share, 200_000).astype(np.uint8), phi)
            beyond = draw.happens(0.5 + sign * (allowed + 0.02), 200_000).astype(np.uint8)
            with pytest.raises(NotRandom):
                check_measured(beyond, phi)
    check_measured(np.zeros(10_000, np.uint8), 0.5)  # whose key has no length


def random_block(draw: Randomness, rows: int) -> tuple[Bits, Bits, Bits, NDArray[np.int64]]:
    basis, intensity = draw.happens(0.1, rows), draw.choice(np.array([7.0, 2.0, 1.0]), rows)
    pulse = np.cumsum(draw.gaps(0.01, rows))
    return draw.bits(rows), basis.astype(np.uint8), intensity, pulse


@pytest.mark.parametrize("rows", [1, 2, 40, 1023, 1024, 5000])
def test_good_bits_pass(rows: int) -> None:
    draw = Randomness.seeded(rows, "good bits")
    for _ in range(200):
        bit, basis, intensity, pulse = random_block(draw, rows)
        check_chosen(bit, basis, intensity, pulse)
        check_measured(bit, 1e-4)


def test_improbable_is_what_the_bounds_on_the_mean_exclude() -> None:
    draw = np.random.default_rng(4)
    seen = [0, 0]
    for _ in range(500):
        total, bias = int(10 ** draw.uniform(0, 6)), float(draw.choice([0.0, 0.01, 0.3, 0.5]))
        heads = int(draw.binomial(total, draw.choice([0.0, 0.4, 0.49, 0.5, 0.52, 0.9, 1.0])))
        least, most = (mean(heads, total, 1e-6) / total - 0.5 for mean in (mean_lower, mean_upper))
        improbable = health._beyond(heads, total, 1e-6, bias)
        assert improbable == (least > bias or most < -bias), (heads, total, bias)
        seen[improbable] += 1
    assert min(seen) > 50
    assert not health._beyond(0, 0, 1e-6, 0.0)


def test_false_alarms_are_no_more_than_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """With shares so large that there are some."""
    share = 1.0 / 256
    monkeypatch.setattr(health, "SHARE", share)
    draw, blocks, most = Randomness.seeded(7, "false alarms"), 500, 0
    seen: dict[str, int] = {}
    for _ in range(blocks):
        rows = random_block(draw, 3000)
        faults = list(health._chosen(*rows))
        most = max(most, len(faults))
        for fault in faults:
            kind = re.sub(r"one [\d,]{2,} before", "one further before", fault.split(" ", 3)[-1])
            seen[kind] = seen.get(kind, 0) + 1
    assert seen, "no test that can fail"
    expected = 2.0 * share * blocks  # of one test, in both directions
    for kind, times in seen.items():
        assert times <= expected + 6.0 * math.sqrt(expected), kind
    assert sum(seen.values()) >= 0.01 * blocks


def test_the_tests_are_no_more_than_their_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_beyond", lambda *_: True)
    monkeypatch.setattr(health, "_has_run", lambda *_: True)
    monkeypatch.setattr(health, "_repeats", lambda *_: iter(["one test"]))
    draw = Randomness.seeded(1, "counted")
    tests = len(list(health._chosen(*random_block(draw, 5000))))
    assert 60 < tests <= health.MOST_TESTS
    assert health.FALSE_ALARM == 2 * health.MOST_TESTS * health.SHARE


@pytest.mark.parametrize(
    ("order", "rows", "rate"),
    [(20, 20_000, 0.01), (20, 20_000, 1e-4), (23, 60_000, 0.001), (23, 300_000, 0.02)],
)
def test_long_test_sequences_that_repeat_are_seen(order: int, rows: int, rate: float) -> None:
    draw = Randomness.seeded(order, "test sequences")
    _, basis, intensity, _ = random_block(draw, rows)
    pulse = np.cumsum(draw.gaps(rate, rows))
    with pytest.raises(NotRandom, match="same place in a pattern"):
        check_chosen(prbs(order)[pulse % (2**order - 1)], basis, intensity, pulse)


def test_repetitions_are_counted_at_every_distance() -> None:
    for rows in (1, 2, 34, 35, 1000, 1024, 1025):
        draw, limit = Randomness.seeded(rows, "repeats"), 2.0 * math.log(rows / health.SHARE)
        for period in (33, 34, 100, 400):
            bits = np.resize(draw.bits(period), rows)
            expected = None
            for lag in range(33, rows):
                pairs, differ = rows - lag, int((bits[lag:] != bits[:-lag]).sum())
                if (pairs - 2 * differ) ** 2 > limit * pairs:
                    expected = f"{differ:,} of {pairs:,} bits differ from the one {lag:,} before"
                    break
            assert list(health._repeats(bits, "bits", 0.0)) == [expected] * (expected is not None)
            assert (expected is not None) == (rows - period > limit)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9, 64, 99, 100])
def test_runs_are_found_to_the_bit(length: int) -> None:
    for rows in (length - 1, length, 300):
        for run in (length - 1, length):
            true = np.zeros(rows, bool)
            true[max(0, rows - run) :] = run > 0
            assert health._has_run(true, length) == (min(run, rows) >= length), (rows, run)


def test_a_run_is_refused_from_the_cutoff_on() -> None:
    """The Repetition Count Test, with a false alarm of SHARE for all places in the block."""
    rows = 4096
    cutoff = 1 + math.ceil(math.log2(rows / health.SHARE))
    for run, refused in ((cutoff - 1, False), (cutoff, True)):
        bits = Randomness.seeded(2, "runs").bits(rows)
        bits[1000 : 1000 + run], bits[999], bits[1000 + run] = 1, 0, 0
        found = list(health._series(bits, "bits"))
        assert bool(found) == refused, found


def test_the_other_end_is_told_why_and_no_end_has_a_key() -> None:
    alice, bob, settings = with_bits("rusca2018", np.zeros(ROWS, np.uint8))
    errors: dict[str, LinkError] = {}

    async def play() -> None:
        near, far = stream_pair()
        shared = Secret(bytes(2 * LANE_RESERVE))
        ends = {
            "alice": (near, alice_of(alice, settings, near, Ledger(shared))),
            "bob": (far, bob_of(bob, settings, far, Ledger(shared))),
        }

        async def one(name: str) -> None:
            stream, party = ends[name]
            async with stream:
                try:
                    await party.block()
                except LinkError as error:
                    errors[name] = error

        async with trio.open_nursery() as nursery:
            for name in ends:
                nursery.start_soon(one, name)

    trio.run(play)
    assert isinstance(errors["alice"], NotRandom)
    assert not isinstance(errors["alice"], BlockAborted)  # the next would be no better
    told = "the other party ended the session: Alice's bits are not random: see its log"
    assert str(errors["bob"]) == told


def test_the_simulated_link_has_the_test_too(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = LinkSettings(preset=recorded("rusca2018")[2], block_bits=20_000)

    async def play(link: SimulatedLink) -> None:
        async with link.open():
            await link.block()

    trio.run(play, SimulatedLink(settings, seed=1))
    monkeypatch.setattr(Randomness, "bits", lambda _, count: np.zeros(count, np.uint8))
    with pytest.raises(NotRandom):
        trio.run(play, SimulatedLink(settings))


def test_the_command_says_it_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alice, bob, settings = with_bits("rusca2018", np.zeros(ROWS, np.uint8))
    files = [str(tmp_path / f"{name}.npz") for name in ("alice", "bob")]
    for path, one in zip(files, (alice, bob), strict=True):
        write_measured(path, one, settings.preset)
    keys = tmp_path / "keys"
    assert main(["qkd", "distil", *files, "--keys", str(keys)]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["keys"] == 0
    assert "Alice's bits are not random: 0 of " in found["aborted"]
    assert not keys.exists()
    assert main(["qkd", "distil", *files, "--bit-check", "off"]) == 0
