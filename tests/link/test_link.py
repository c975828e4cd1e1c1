"""The protocol as a whole: keys, aborts, attacks, authentication."""

import contextlib
import dataclasses
import functools
import hashlib
import random
import re
from collections.abc import Sequence

import hypothesis
import numpy as np
import pytest
import scipy  # its modules are loaded when a test needs them: scipy.stats takes 0.3 s
import trio
from hypothesis import strategies as st
from trio.testing import memory_stream_pair

from hybridkex.auth import DevCa, TrustStore
from hybridkex.cli import main
from hybridkex.errors import (
    BlockAborted,
    ConfigError,
    LedgerDry,
    LinkAuthenticationError,
    LinkError,
)
from hybridkex.link import party
from hybridkex.link.finite_key import Counts, Security, expected_counts
from hybridkex.link.ledger import Direction, Ledger, Position
from hybridkex.link.optimise import tuned
from hybridkex.link.party import Alice, Block, Bob, verification_hash
from hybridkex.link.physics import Transmitter
from hybridkex.link.presets import PRESETS, Preset
from hybridkex.link.quantum import Detections, OpticalLink, sample
from hybridkex.link.randomness import Randomness
from hybridkex.link.settings import LinkSettings
from hybridkex.link.simulated import SimulatedLink
from hybridkex.link.wire import HEADER, Hello, Type
from hybridkex.secret import Secret
from hybridkex.streams import SecureStream
from hybridkex.tls.config import ClientConfig, ServerConfig
from tests.link.recording import RecordingStream

pytestmark = pytest.mark.usefixtures("steps_in_place")


@functools.cache
def best(name: str, distance: float, block_bits: int) -> Preset:
    return tuned(PRESETS[name].at(distance), block_bits)


def settings(
    name: str = "lim2014", distance: float = 10, block_bits: int = 200_000
) -> LinkSettings:
    return LinkSettings(preset=best(name, distance, block_bits), block_bits=block_bits)


async def blocks(link: SimulatedLink, count: int) -> list[tuple[Block, Block]]:
    async with link.open():
        return [await link.block() for _ in range(count)]


def keys(made: Sequence[Block]) -> list[tuple[str, bytes]]:
    return [(str(key.key_id), key.key.reveal()) for block in made for key in block.keys]


@pytest.mark.parametrize("bootstrap", ["psk", "ecdsa", "ml-dsa"])
@pytest.mark.parametrize("name", ["lim2014", "rusca2018"])
async def test_both_ends_have_the_same_keys(name: str, bootstrap: str) -> None:
    """Signatures are the same for a smaller block."""
    chosen = settings(name, block_bits=200_000 if bootstrap == "psk" else 60_000)
    made = await blocks(SimulatedLink(chosen, bootstrap=bootstrap, seed=1), 2)
    for alice, bob in made:
        # With two decoys the proof does not need the errors of the key basis: Bob does not tell.
        unknown = {"qber": None, "efficiency": None} if name == "lim2014" else {}
        assert dataclasses.replace(bob, keys=(), **unknown) == dataclasses.replace(alice, keys=())
        assert bob.qber is not None
        assert keys([alice]) == keys([bob])
        assert len(alice.keys) == (alice.secret_bits - alice.to_ledger) // 256 > 10
    names = [block.authentication for block, _ in made]
    assert names == ["wegman-carter" if bootstrap == "psk" else "signatures", "wegman-carter"]
    ids = [key_id for key_id, _ in keys([alice for alice, _ in made])]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    ("name", "distance"),
    [("gys2005", 10), ("lim2014", 50), ("rusca2018", 100), ("boaron2018", 150)],
)
async def test_each_preset_makes_keys(name: str, distance: float) -> None:
    """Intensities, dead time and after-pulses are those of the paper's; distances are usual."""
    chosen = settings(name, distance)
    ((alice, bob),) = await blocks(SimulatedLink(chosen, seed=4), 1)
    assert keys([alice]) == keys([bob])
    assert alice.keys
    expected = expected_counts(chosen.preset.channel, chosen.preset.transmitter, 1.0)
    spread = np.sqrt(expected.key_error_rate / alice.sifted)
    assert abs(bob.qber - expected.key_error_rate) < 5 * spread
    assert alice.secret_bits < alice.sifted - alice.leak
    assert bob.efficiency < 1.25
    assert alice.epsilon.total < 1.001e-9


async def test_one_seed_one_run_and_none_none() -> None:
    runs = [await blocks(SimulatedLink(settings(), seed=7), 1) for _ in range(2)]
    assert keys([runs[0][0][0]]) == keys([runs[1][0][0]])
    assert runs[0][0][0].leak == runs[1][0][0].leak
    free = [await blocks(SimulatedLink(settings()), 1) for _ in range(2)]
    assert keys([free[0][0][0]])[0] != keys([free[1][0][0]])[0]


async def test_without_a_seed_randomness_is_the_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is drawn comes through os.urandom: fix that, and the whole run is fixed."""
    streams = 0

    def run() -> list[tuple[str, bytes]]:
        counter = 0

        def fixed(count: int) -> bytes:
            nonlocal counter
            counter += 1
            return hashlib.shake_256(counter.to_bytes(8)).digest(count)

        monkeypatch.setattr("hybridkex.link.randomness.os.urandom", fixed)
        nonlocal streams
        made = sample(
            PRESETS["lim2014"].channel,
            PRESETS["lim2014"].transmitter,
            PRESETS["lim2014"].channel,
            5000,
            first=0,
            randomness=Randomness.system(),
        )
        streams = counter
        return [("bits", made[0].bit.tobytes()), ("clicks", made[1].pulse.tobytes())]

    assert run() == run()
    assert streams > 5


async def refused(link: SimulatedLink, count: int = 1) -> list[str]:
    """The reasons why blocks were given up."""
    reasons = []
    async with link.open():
        for _ in range(count):
            with pytest.raises(BlockAborted) as caught:
                await link.block()
            reasons.append(str(caught.value))
    return reasons


async def test_full_intercept_resend_is_seen_and_no_key_comes_out() -> None:
    seen: list[Block | BlockAborted] = []
    link = SimulatedLink(settings(), eve="intercept", seed=2, observer=seen.append)
    (reason,) = await refused(link)
    found = re.search(r"QBER of the test basis: ([\d.]+)%", reason)
    assert found is not None
    assert abs(float(found[1]) - 25) < 2.5
    assert [type(one) for one in seen] == [BlockAborted]


async def test_partial_intercept_resend_costs_the_whole_key() -> None:
    reasons = await refused(SimulatedLink(settings(), eve="intercept:0.2", seed=2), 2)
    assert all("no secret bit is left" in reason for reason in reasons)


@pytest.mark.parametrize(
    ("eve", "distance", "what"),
    [("pns", 60, "decoy statistics"), ("split:0.3", 10, "decoy statistics: all detections")],
)
async def test_decoys_show_who_touches_photons(eve: str, distance: float, what: str) -> None:
    (reason,) = await refused(SimulatedLink(settings(distance=distance), eve=eve, seed=2))
    assert what in reason


@pytest.mark.parametrize("bootstrap", ["psk", "ml-dsa"])
async def test_a_man_in_the_middle_does_not_pass_the_first_tag(bootstrap: str) -> None:
    link = SimulatedLink(settings(), eve="mitm", bootstrap=bootstrap)
    async with link.open():
        with pytest.raises(LinkAuthenticationError):
            await link.block()
        with pytest.raises(LinkError, match="not open"):
            await link.block()


class Recorder(RecordingStream):
    """May also flip one bit of what is sent."""

    def __init__(self, stream: trio.abc.Stream, *, flip: int | None = None) -> None:
        super().__init__(stream)
        self.flip = flip

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        changed = bytearray(data)
        start = len(self.sent)
        self.sent += data
        if self.flip is not None and start <= self.flip // 8 < len(self.sent):
            changed[self.flip // 8 - start] ^= 1 << self.flip % 8
        await self.stream.send_all(changed)


SMALL = LinkSettings(
    preset=dataclasses.replace(
        PRESETS["rusca2018"].at(0),
        name="small",
        transmitter=Transmitter(  # tuned to such blocks
            intensities=(0.4643, 0.1107),
            probabilities=(0.4918, 0.5082),
            key_basis_probability=0.6447,
        ),
    ),
    block_bits=30_000,
)


# Blocks as small as they come: with proofs that promise less, a few thousand bits make a key.
TINY = LinkSettings(
    preset=dataclasses.replace(
        PRESETS["rusca2018"],
        name="tiny",
        channel=dataclasses.replace(PRESETS["rusca2018"].channel, misalignment=0.005),
        transmitter=Transmitter(
            intensities=(0.52, 0.15), probabilities=(0.25, 0.75), key_basis_probability=0.6
        ),
        security=Security(secrecy=0.1, correctness=1e-9),
    ),
    block_bits=4000,
    key_bits=64,
    tolerance=0.3,
)


async def two_parties(
    settings: LinkSettings,
    *,
    flip: tuple[int, int] | None = None,
    seed: int = 11,
    patience: float = 30.0,
) -> tuple[list[Block | LinkError], tuple[Recorder, Recorder], list[Detections]]:
    """One block; ``flip``: whose message, and which bit of all that this party says."""
    left, right = memory_stream_pair()
    ends = tuple(
        Recorder(stream, flip=flip[1] if flip and flip[0] == who else None)
        for who, stream in enumerate((left, right))
    )
    fibre = OpticalLink(settings.preset.channel, settings.preset.transmitter, seed=seed)
    clicks: list[Detections] = []

    class Kept:
        async def detect(self, count: int) -> Detections:
            seen = await fibre.detect(count)
            clicks.append(dataclasses.replace(seen, bit=seen.bit.copy()))
            return seen

    alice = Alice(
        ends[0], settings, fibre.record, bootstrap=Ledger(PSK), seed=seed, timeout=patience
    )
    bob = Bob(ends[1], settings, Kept(), bootstrap=Ledger(PSK), seed=seed, timeout=patience)
    outcome: dict[int, Block | LinkError] = {}

    async def play(number: int, party: Alice | Bob) -> None:
        try:
            outcome[number] = await party.block()
        except LinkError as error:
            outcome[number] = error
            await ends[number].aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(play, 0, alice)
        nursery.start_soon(play, 1, bob)
    return [outcome[0], outcome[1]], (ends[0], ends[1]), clicks


PSK = Secret(bytes(range(256)) * 4)
"""More than the ledger wants, so that even a tiny block leaves keys."""


async def test_a_flipped_bit_in_any_message_costs_the_block() -> None:
    """One bit of the body of every single message that crosses, tags included."""
    made, ends, _ = await two_parties(TINY)
    assert isinstance(made[0], Block)
    assert isinstance(made[1], Block)
    draw = random.Random(5)
    kinds, delivered = set(), 0
    for who, end in enumerate(ends):
        position = 0
        while position < len(end.sent):
            kind, length = HEADER.unpack_from(end.sent, position)
            place = 8 * (position + HEADER.size) + draw.randrange(8 * length)
            position += HEADER.size + length
            kinds.add((who, kind))
            alice, bob = (await two_parties(TINY, flip=(who, place)))[0]
            assert isinstance(alice, LinkError), (who, kind, place)
            assert "does not answer" not in str(alice), "it was time that ended this"
            # Bob has the last word: if that is damaged, he has the block, and Alice has not.
            last_words = who == 1 and kind in (Type.VERDICT, Type.TAG)
            if isinstance(bob, Block):
                assert last_words, (who, kind, place)
                delivered += 1
        assert position == len(end.sent)
    # With a damaged verdict he may find that she has hung up before he has sealed it.
    assert delivered in (1, 2)
    assert kinds == {
        *((0, one) for one in (Type.HELLO, Type.SIFT, Type.TELL, Type.FINISH, Type.TAG)),
        *((1, one) for one in (Type.HELLO, Type.REPORT, Type.ASK, Type.CORRECTED)),
        *((1, one) for one in (Type.VERDICT, Type.TAG)),
    }


async def test_a_flipped_bit_in_a_header_costs_the_block() -> None:
    """Of one message of each kind; a length that has grown is waited for in vain."""
    _, ends, _ = await two_parties(TINY)
    draw = random.Random(6)
    for who, end in enumerate(ends):
        position, places = 0, {}
        while position < len(end.sent):
            kind, length = HEADER.unpack_from(end.sent, position)
            places[kind] = 8 * position + draw.randrange(8 * HEADER.size)
            position += HEADER.size + length
        for place in places.values():
            outcome = (await two_parties(TINY, flip=(who, place), patience=0.3))[0]
            assert isinstance(outcome[0], LinkError), (who, place)


@pytest.mark.parametrize("byte", [0, 40, 90, 5000, 20_000])
async def test_a_tamperer_of_the_simulated_link(byte: int) -> None:
    link = SimulatedLink(TINY, eve=f"tamper:{byte}", seed=3)
    async with link.open():
        with pytest.raises(LinkError):
            await link.block()
        with pytest.raises(LinkError, match="not open"):
            await link.block()


@pytest.mark.parametrize("byte", [0, 5000, 1 << 40])
async def test_a_tamperer_says_when_no_bit_was_flipped(
    byte: int, capsys: pytest.CaptureFixture[str]
) -> None:
    link = SimulatedLink(TINY, eve=f"tamper:{byte}", seed=3)
    async with link.open():
        with contextlib.suppress(LinkError):
            await link.block()
        received = link.traffic[1]
        assert (link.untouched is None) is (byte < received)
        if link.untouched is not None:
            assert f"from 0 to {received - 1:,}" in link.untouched
    arguments = ["qkd", "run", "--preset", "rusca2018", "--distance", "5", "--seed", "3"]
    arguments += ["--blocks", "1", "--block-bits", "20000", "--eve", f"tamper:{byte}"]
    assert await trio.to_thread.run_sync(main, arguments) == 1
    assert ("Eve flipped no bit" in capsys.readouterr().err) is (byte > received)


@pytest.mark.parametrize("byte", ["", "x", "-1", "9" * 5000, "²"])
def test_a_byte_that_has_no_number_cannot_be_tampered_with(byte: str) -> None:
    with pytest.raises(ConfigError, match="number of a byte"):
        SimulatedLink(TINY, eve=f"tamper:{byte}")


async def test_what_was_said_once_is_nothing_in_another_session() -> None:
    """All of Bob's messages of one session, replayed to Alice in the next."""
    _, ends, _ = await two_parties(TINY)
    fibre = OpticalLink(TINY.preset.channel, TINY.preset.transmitter, seed=11)
    await fibre.detect(TINY.detections)
    near, far = memory_stream_pair()
    await far.send_all(ends[1].sent)
    # The same light and the same shared secret, but a nonce of her own.
    alice = Alice(near, TINY, fibre.record, bootstrap=Ledger(PSK), seed=12)
    with pytest.raises(LinkAuthenticationError):
        await alice.block()


@pytest.mark.parametrize("eve", [None, "intercept"])
async def test_a_block_is_erased_whatever_its_end(
    eve: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[np.ndarray] = []
    keep = party._Party._erase_later

    def kept(self: party._Party, bits: np.ndarray) -> np.ndarray:
        held.append(bits)
        return keep(self, bits)

    monkeypatch.setattr(party._Party, "_erase_later", kept)
    link = SimulatedLink(TINY, eve=eve, seed=3)
    async with link.open():
        if eve is None:
            await link.block()
        else:
            with pytest.raises(BlockAborted, match="QBER"):
                await link.block()
    assert len(held) >= 4
    assert not any(bits.any() for bits in held)


async def test_over_our_own_channel() -> None:
    """The classical channel may be a SecureStream; and both ends still have the same keys."""
    ca = DevCa.create()
    streams = memory_stream_pair()
    near = SecureStream(
        streams[0], ClientConfig(verifier=TrustStore((ca.certificate,))), server_hostname="alice"
    )
    far = SecureStream(streams[1], ServerConfig(identities=(ca.issue("alice"),)))
    fibre = OpticalLink(TINY.preset.channel, TINY.preset.transmitter, seed=1)
    alice = Alice(far, TINY, fibre.record, bootstrap=Ledger(PSK))
    bob = Bob(near, TINY, fibre, bootstrap=Ledger(PSK))
    made: dict[str, Block] = {}

    async def play(name: str, who: Alice | Bob) -> None:
        made[name] = await who.block()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(play, "alice", alice)
        nursery.start_soon(play, "bob", bob)
    assert keys([made["alice"]]) == keys([made["bob"]])
    assert made["alice"].keys


async def test_a_party_needs_nothing_but_its_own_end_and_what_it_heard() -> None:
    """Each party alone, with a recording in place of the other, makes the same keys again."""
    made, ends, clicks = await two_parties(SMALL)
    alice, bob = made
    assert isinstance(alice, Block)
    assert isinstance(bob, Block)
    assert keys([alice]) == keys([bob])

    class Played:
        async def detect(self, count: int) -> Detections:
            return clicks[0]

    near, far = memory_stream_pair()
    await far.send_all(ends[0].sent)
    alone = Bob(near, SMALL, Played(), bootstrap=Ledger(PSK), seed=11)
    assert keys([await alone.block()]) == keys([bob])

    fibre = OpticalLink(SMALL.preset.channel, SMALL.preset.transmitter, seed=11)
    await fibre.detect(SMALL.detections)
    near, far = memory_stream_pair()
    await far.send_all(ends[1].sent)
    other = Alice(near, SMALL, fibre.record, bootstrap=Ledger(PSK), seed=11)
    assert keys([await other.block()]) == keys([alice])
    # Nothing that crossed is a key.
    crossed = bytes(ends[0].sent + ends[1].sent)
    assert not any(key in crossed for _, key in keys([alice]))


async def test_settings_that_differ_are_found_at_once() -> None:
    left, right = memory_stream_pair()
    fibre = OpticalLink(SMALL.preset.channel, SMALL.preset.transmitter)
    other = dataclasses.replace(SMALL, key_bits=128)
    alice = Alice(left, SMALL, fibre.record, bootstrap=Ledger(PSK))
    bob = Bob(right, other, fibre, bootstrap=Ledger(PSK))
    refusals = []

    async def play(party: Alice | Bob) -> None:
        with pytest.raises(LinkError, match="different settings") as caught:
            await party.block()
        refusals.append(caught)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(play, alice)
        nursery.start_soon(play, bob)
    assert len(refusals) == 2


async def test_a_silent_party_is_not_waited_for_for_ever(autojump_clock: object) -> None:
    left, _right = memory_stream_pair()
    fibre = OpticalLink(SMALL.preset.channel, SMALL.preset.transmitter)
    with pytest.raises(LinkError, match="does not answer"):
        await Alice(left, SMALL, fibre.record, bootstrap=Ledger(PSK)).block()


@pytest.mark.parametrize("real_time", [True, False])
async def test_light_at_the_clock_of_the_laser_may_take_its_time(
    autojump_clock: object, real_time: bool
) -> None:
    """An hour passes between Bob's HELLO and his report."""
    near, far = memory_stream_pair()
    link = SimulatedLink(dataclasses.replace(SMALL, real_time=real_time))
    light = OpticalLink(SMALL.preset.channel, SMALL.preset.transmitter)
    alice = Alice(near, SMALL, light.record, bootstrap=Ledger(PSK), patient=real_time)
    hello = Hello(
        role=1,
        nonce=bytes(32),
        settings=SMALL.digest,
        positions={lane: Position(0, 256) for lane in Direction},
    ).encode()

    async def bob() -> None:
        await far.send_all(HEADER.pack(Type.HELLO, len(hello)) + hello)
        await trio.sleep(3600)
        await far.send_all(HEADER.pack(Type.REPORT, 0))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(bob)
        with pytest.raises(LinkError) as caught:
            await alice.block()
        nursery.cancel_scope.cancel()
    assert ("does not answer" in str(caught.value)) is not real_time
    async with link.open():
        assert link._parties[0]._patient is real_time


async def test_aborted_blocks_drain_the_ledger_and_the_link_stops() -> None:
    link = SimulatedLink(dataclasses.replace(SMALL, max_qber=0.001), bootstrap="psk", seed=1)
    async with link.open():
        endings: list[type[LinkError]] = []
        while LedgerDry not in endings:
            try:
                await link.block()
            except LinkError as error:
                endings.append(type(error))
        # After sifting each side has used two of the sixteen parts of 16 bytes of its lane, and
        # Bob needs four for a block.
        assert endings == [BlockAborted] * 7 + [LedgerDry]
        with pytest.raises(LinkError, match="not open"):
            await link.block()


def test_verification_finds_what_cascade_left() -> None:
    draw = np.random.default_rng(3)
    key = draw.integers(0, 2, 5000, dtype=np.uint8)
    for _ in range(200):
        other = key.copy()
        other[draw.integers(0, 5000, 2)] ^= 1
        seed = draw.bytes(32)
        same = (verification_hash(key, seed, 50) == verification_hash(other, seed, 50)).all()
        assert same == (key == other).all()


@pytest.mark.parametrize(
    "wrong",
    [{"block_bits": 10}, {"key_bits": 12}, {"max_qber": 0.0}, {"tolerance": 2.0}],
)
def test_impossible_settings(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        dataclasses.replace(SMALL, **wrong)
    with pytest.raises(ConfigError, match="bootstrap"):
        SimulatedLink(SMALL, bootstrap="none")
    with pytest.raises(ConfigError, match="tamper"):
        SimulatedLink(SMALL, eve="tamper")
    with pytest.raises(ConfigError, match="makes no key"):
        tuned(PRESETS["gys2005"].at(200), 10_000)


# -- thousands of blocks


@pytest.mark.parametrize("name", ["lim2014", "rusca2018"])
def test_the_length_is_never_more_than_the_bound(name: str, thorough: bool) -> None:
    chosen = LinkSettings(preset=PRESETS[name])
    kinds = len(chosen.preset.transmitter.intensities)
    numbers = st.tuples(*[st.integers(0, 10**7)] * kinds)

    @hypothesis.given(numbers, numbers, numbers, numbers, st.integers(0, 10**7))
    @hypothesis.settings(max_examples=1000 if thorough else 300, deadline=None)
    def check(
        key: tuple[int, ...],
        wrong: tuple[int, ...],
        test: tuple[int, ...],
        test_wrong: tuple[int, ...],
        leak: int,
    ) -> None:
        counts = Counts(
            key=tuple(map(float, key)),
            key_errors=tuple(float(min(m // 20, n)) for m, n in zip(wrong, key, strict=True)),
            test=tuple(map(float, test)),
            test_errors=tuple(
                float(min(m // 20, n)) for m, n in zip(test_wrong, test, strict=True)
            ),
        )
        bound = chosen.proof.secret_length(
            chosen.preset.transmitter, counts, security=chosen.preset.security, leak=leak
        )
        try:
            found = chosen.secret_length(counts, leak=leak)
        except BlockAborted:
            assert bound.real < 1 or counts.key_error_rate > chosen.max_qber
            return
        assert 0 < found.bits <= bound.real <= sum(key) - leak

    check()


async def test_many_small_blocks_agree_and_look_random() -> None:
    link = SimulatedLink(SMALL, seed=21)
    async with link.open():
        made = [await link.block() for _ in range(20)]
    for alice, bob in made:
        assert keys([alice]) == keys([bob])
        assert alice.secret_bits <= alice.sifted - alice.leak
    bits = np.unpackbits(
        np.frombuffer(b"".join(key for _, key in keys([a for a, _ in made])), dtype=np.uint8)
    ).astype(np.int64)
    count = len(bits)
    assert count > 60_000
    # NIST SP 800-22: frequency, runs, serial correlation, bytes.
    assert abs(bits.sum() - count / 2) < 4 * np.sqrt(count) / 2
    assert abs((bits[1:] != bits[:-1]).sum() - count / 2) < 4 * np.sqrt(count) / 2
    for lag in (2, 8, 256):
        assert abs((bits[lag:] ^ bits[:-lag]).sum() - (count - lag) / 2) < 4 * np.sqrt(count) / 2
    histogram = np.bincount(np.packbits(bits.astype(np.uint8)), minlength=256)
    assert (
        1e-4
        < scipy.stats.chi2.sf(((histogram - count / 2048) ** 2 / (count / 2048)).sum(), 255)
        < 1 - 1e-4
    )
