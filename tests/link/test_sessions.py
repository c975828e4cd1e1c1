"""Sessions over one ledger: connections that are cut anywhere, parties that lost their state."""

import dataclasses
from functools import cache

import numpy as np
import pytest
import trio
from cryptography.hazmat.primitives.asymmetric import ec
from trio.testing import memory_stream_pair

from hybridkex.errors import (
    BlockAborted,
    ConfigError,
    LedgerDry,
    LedgerLost,
    LinkError,
)
from hybridkex.link.authentication import Signatures, tag_bytes
from hybridkex.link.finite_key import Security
from hybridkex.link.ledger import LANE_RESERVE, Direction, Ledger
from hybridkex.link.optimise import tuned
from hybridkex.link.party import Alice, Block, Bob
from hybridkex.link.physics import Transmitter
from hybridkex.link.presets import PRESETS
from hybridkex.link.quantum import OpticalLink
from hybridkex.link.settings import LinkSettings
from hybridkex.link.simulated import SimulatedLink
from hybridkex.link.wire import HEADER, Hello, Type
from hybridkex.secret import Secret
from tests.link.recording import RecordingStream

pytestmark = pytest.mark.usefixtures("steps_in_place")

SETTINGS = LinkSettings(
    preset=dataclasses.replace(
        PRESETS["rusca2018"],
        channel=dataclasses.replace(PRESETS["rusca2018"].channel, misalignment=0.005),
        transmitter=Transmitter(
            intensities=(0.52, 0.15), probabilities=(0.25, 0.75), key_basis_probability=0.6
        ),
        security=Security(secrecy=0.1, correctness=1e-9),
    ),
    block_bits=12_000,
    key_bits=64,
    tolerance=0.3,
)
ANY = dataclasses.replace(SETTINGS, reauthentication="signatures")


class Cut(RecordingStream):
    """Breaks after so many bytes were sent on it."""

    def __init__(self, stream: trio.abc.Stream, after: int | None) -> None:
        super().__init__(stream)
        self.left = after

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self.left is not None:
            self.left -= len(data)
            if self.left < 0:
                await self.stream.aclose()
                raise trio.BrokenResourceError
        await super().send_all(data)


@cache
def signatures() -> tuple[Signatures, Signatures]:
    one, two = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    return Signatures(one, two.public_key()), Signatures(two, one.public_key())


async def session(
    ledgers: tuple[Ledger, Ledger],
    *,
    settings: LinkSettings = SETTINGS,
    blocks: int = 1,
    cut: tuple[int, int] | None = None,
    signs: bool = True,
    seed: int = 1,
    repeats: bool = False,
) -> tuple[list[list[Block | LinkError]], tuple[Cut, Cut]]:
    """Some blocks; what each party has of them. ``cut``: who, after how many bytes sent.

    ``repeats``: a session with the same seed sends the same number of bytes.
    """
    ends = memory_stream_pair()
    streams = tuple(
        Cut(end, cut[1] if cut is not None and cut[0] == who else None)
        for who, end in enumerate(ends)
    )
    light = OpticalLink(settings.preset.channel, settings.preset.transmitter, seed=seed)
    ours: list[Signatures | Ledger] = list(signatures() if signs else ledgers)
    own = seed if repeats else None
    parties = (
        Alice(streams[0], settings, light.record, bootstrap=ours[0], ledger=ledgers[0], seed=own),
        Bob(streams[1], settings, light, bootstrap=ours[1], ledger=ledgers[1], seed=own),
    )
    found: list[list[Block | LinkError]] = [[], []]

    async def play(who: int) -> None:
        for _ in range(blocks):
            try:
                found[who].append(await parties[who].block())
            except LinkError as error:
                found[who].append(error)
                if not isinstance(error, BlockAborted):
                    await streams[who].aclose()
                    return

    async with trio.open_nursery() as nursery:
        nursery.start_soon(play, 0)
        nursery.start_soon(play, 1)
    return found, (streams[0], streams[1])


def keys(blocks: list[Block | LinkError]) -> list[bytes]:
    assert all(isinstance(one, Block) for one in blocks), blocks
    return [key.key.reveal() for one in blocks if isinstance(one, Block) for key in one.keys]


def stock(ledger: Ledger) -> list[tuple[int, int]]:
    return [(ledger.position(lane).start, ledger.position(lane).end) for lane in Direction]


async def test_a_session_goes_on_with_the_key_of_the_one_before() -> None:
    ledgers = Ledger(), Ledger()
    first, _ = await session(ledgers, blocks=2)
    second, _ = await session(ledgers, seed=2)
    assert keys(first[0]) == keys(first[1])
    assert keys(second[0]) == keys(second[1])
    names = [one.authentication for one in (*first[0], *second[0]) if isinstance(one, Block)]
    assert names == ["signatures", "wegman-carter", "wegman-carter"]
    assert stock(ledgers[0]) == stock(ledgers[1])


async def test_wherever_the_connection_is_cut_the_next_session_has_wegman_carter_tags() -> None:
    """Before each message of both parties, and in the middle of each."""
    start = Ledger(), Ledger()
    _, ends = await session(start)
    whole, ends = await session(start, seed=2, repeats=True)
    assert keys(whole[0])
    places = []
    for who, end in enumerate(ends):
        position = 0
        seen: dict[int, int] = {}
        while position < len(end.sent):
            kind, length = HEADER.unpack_from(end.sent, position)
            seen[kind] = seen.get(kind, 0) + 1
            if kind not in (Type.ASK, Type.TELL) or seen[kind] < 3:
                places.append((who, position + HEADER.size + length // 2))
            position += HEADER.size + length
    for number, place in enumerate(places):
        ledgers = Ledger(), Ledger()
        await session(ledgers)
        broken, _ = await session(ledgers, cut=place, seed=2, repeats=True)
        assert any(isinstance(one, LinkError) for one in (*broken[0], *broken[1]))
        found, _ = await session(ledgers, seed=4 + number)
        assert keys(found[0]) == keys(found[1])
        block = found[0][0]
        assert isinstance(block, Block)
        assert block.authentication == "wegman-carter", place
        assert stock(ledgers[0]) == stock(ledgers[1])
    assert len(places) > 12


async def test_no_byte_of_the_key_makes_two_tags(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through cuts and new sessions: what a lane gave once it never gives again."""
    taken: dict[tuple[int, Direction], int] = {}
    draw = Ledger.draw

    def drawn(self: Ledger, block: int, direction: Direction, count: int) -> bytes:
        start = self.position(direction).start
        assert start >= taken.get((id(self), direction), 0)
        taken[id(self), direction] = start + count
        return draw(self, block, direction, count)

    monkeypatch.setattr(Ledger, "draw", drawn)
    ledgers = Ledger(), Ledger()
    await session(ledgers, blocks=2)
    for number, after in enumerate((100, 3000, 7000, 30_000)):
        for who in (0, 1):
            await session(ledgers, cut=(who, after), seed=10 + number)
    found, _ = await session(ledgers, seed=99)
    assert keys(found[0]) == keys(found[1])
    assert taken


@pytest.mark.parametrize("who", [0, 1])
async def test_a_party_that_lost_its_key_is_refused_unless_signatures_may_begin_again(
    who: int,
) -> None:
    ledgers = [Ledger(), Ledger()]
    await session((ledgers[0], ledgers[1]))
    ledgers[who] = Ledger()
    refused, _ = await session((ledgers[0], ledgers[1]), seed=2)
    for one in (*refused[0], *refused[1]):
        assert isinstance(one, LedgerLost)
        assert "reauthentication" in str(one)
    assert ledgers[1 - who].balance == 512
    ledgers = [Ledger(), Ledger()]
    await session((ledgers[0], ledgers[1]), settings=ANY)
    ledgers[who] = Ledger()
    found, _ = await session((ledgers[0], ledgers[1]), settings=ANY, seed=2, blocks=2)
    assert keys(found[0]) == keys(found[1])
    assert stock(ledgers[0]) == stock(ledgers[1])
    names = [one.authentication for one in found[0] if isinstance(one, Block)]
    assert names == ["signatures", "wegman-carter"]


async def test_without_signatures_an_empty_ledger_is_no_link() -> None:
    found, _ = await session((Ledger(), Ledger()), signs=False)
    assert all(isinstance(one, LinkError) for one in (*found[0], *found[1]))


@pytest.mark.parametrize("role", [0, 1])
async def test_a_stranger_gets_no_key_out_of_a_ledger(role: int) -> None:
    """Whoever connects without the key, and claims any position, leaves it as it was at Alice's.

    At Bob's, who speaks first, a try costs the key of one tag.
    """
    ledgers = Ledger(), Ledger()
    await session(ledgers)
    before = [stock(one) for one in ledgers]
    theirs = Ledger(Secret(bytes(range(256)) * 4))
    for lane in Direction:
        theirs.advance(0, lane, 64)
    pair = (ledgers[0], theirs) if role == 1 else (theirs, ledgers[1])
    found, _ = await session(pair, signs=False, seed=3)
    assert not any(isinstance(one, Block) for one in (*found[0], *found[1]))
    if role == 1:
        assert stock(ledgers[0]) == before[0]
    else:
        spent = before[1][1][1] - before[1][1][0] - ledgers[1].balance + 256
        assert spent <= 32
        assert stock(ledgers[1])[0] == before[1][0]


async def test_epsilon_adds_up_and_says_what_it_rests_on() -> None:
    shared = Secret(bytes(range(256)) * 2)
    signed, _ = await session((Ledger(), Ledger()), blocks=3)
    given, _ = await session((Ledger(shared), Ledger(shared)), blocks=2, signs=False)
    epsilons = [one.epsilon for one in signed[0] if isinstance(one, Block)]
    assert [one.conditional for one in epsilons] == [True, True, True]
    assert epsilons[0].authentication == 0.0 < epsilons[1].authentication < 1e-24
    assert [one.inherited for one in epsilons[1:]] == [one.total for one in epsilons[:-1]]
    assert epsilons[0].total == pytest.approx(0.1 + 1e-9, rel=1e-3)
    assert epsilons[0].correctness <= SETTINGS.preset.security.correctness
    assert not any(one.epsilon.conditional for one in given[0] if isinstance(one, Block))


def test_a_correctness_that_poly1305_cannot_give_is_refused() -> None:
    def settings(correctness: float) -> LinkSettings:
        security = Security(correctness=correctness)
        preset = dataclasses.replace(PRESETS["lim2014"], security=security)
        return LinkSettings(preset=preset, block_bits=1_000_000)

    with pytest.raises(ConfigError, match="cannot be verified"):
        settings(7e-28)
    for correctness in (2e-27, 1e-15, 2.0**-50, 0.3):
        made = settings(correctness)
        assert 2.0**-made.verification_bits + made.collision <= correctness


async def test_counting_both_parties_costs_what_bob_announces() -> None:
    blocks = {}
    for leak in ("alice", "both"):
        ledgers = Ledger(), Ledger()
        found, _ = await session(ledgers, settings=dataclasses.replace(SETTINGS, leak=leak))
        blocks[leak] = found[1][0]
        if isinstance(found[1][0], Block):
            assert keys(found[0]) == keys(found[1])
    alice, both = blocks["alice"], blocks["both"]
    assert isinstance(alice, Block)
    assert isinstance(both, Block | BlockAborted)
    if isinstance(both, Block):
        assert both.leak > 1.9 * both.parities
    # The number of parities and, twice, the error counts are in it.
    assert alice.parities + 40 < alice.leak < alice.parities + 80


async def test_error_counts_are_announced_only_where_the_proof_uses_them() -> None:
    _, ends = await session((Ledger(), Ledger()))
    three = LinkSettings(
        preset=dataclasses.replace(
            PRESETS["lim2014"], security=Security(secrecy=0.1, correctness=1e-9)
        ),
        block_bits=30_000,
        key_bits=64,
        tolerance=0.5,
    )
    _, others = await session((Ledger(), Ledger()), settings=three)
    lengths = []
    for end in (ends[1], others[1]):
        position = 0
        while position < len(end.sent):
            kind, length = HEADER.unpack_from(end.sent, position)
            if kind == Type.CORRECTED:
                lengths.append(length)
            position += HEADER.size + length
    assert lengths == [32, 16]


async def test_the_key_is_a_random_sample_of_the_key_basis() -> None:
    """Where in the block the surplus was dropped: everywhere alike."""
    settings = dataclasses.replace(SETTINGS, block_detections=60_000)
    light = OpticalLink(settings.preset.channel, settings.preset.transmitter, seed=3)
    seen = await light.detect(settings.detections)
    record = light.record
    alice = Alice(memory_stream_pair()[0], settings, record, bootstrap=Ledger(), seed=5)
    sent = record.recall(seen.pulse)

    class Reported:
        basis, pulse, bit = seen.basis, seen.pulse, seen.bit

    (kept,) = alice._choose([sent], [Reported()])  # type: ignore[list-item]
    match = sent.basis == seen.basis
    assert (kept <= match).all()
    assert (kept[sent.basis == 1] == match[sent.basis == 1]).all()
    key = np.flatnonzero(kept & (sent.basis == 0))
    possible = np.flatnonzero(match & (sent.basis == 0))
    assert len(key) == settings.block_bits < len(possible)
    share = len(key) / len(possible)
    for part in np.array_split(possible, 6):
        count = int(kept[part].sum())
        assert abs(count - share * len(part)) < 5 * np.sqrt(share * (1 - share) * len(part))


def test_equal_numbers_have_equal_digests() -> None:
    """One end may have read ``0`` and the other ``0.0``."""

    def written(value: object, whole: type, broken: type) -> object:
        if isinstance(value, tuple):
            return tuple(written(one, whole, broken) for one in value)
        if not isinstance(value, int | float) or isinstance(value, bool):
            return value
        return whole(value) if value == int(value) else broken(value)

    for name in sorted(PRESETS):
        chosen = dataclasses.replace(PRESETS[name].at(25), efficiency=2.0)
        digests = set()
        for whole, broken in ((int, float), (float, float), (np.float64, np.float64)):
            parts = {
                part: dataclasses.replace(
                    getattr(chosen, part),
                    **{
                        one.name: written(getattr(getattr(chosen, part), one.name), whole, broken)
                        for one in dataclasses.fields(getattr(chosen, part))
                    },
                )
                for part in ("channel", "transmitter", "security")
            }
            again = dataclasses.replace(chosen, **parts, efficiency=whole(2))
            digests.add(LinkSettings(preset=again, tolerance=broken(0.5)).digest)
        assert len(digests) == 1


def test_a_digest_is_of_parameters_not_of_words() -> None:
    again = dataclasses.replace(
        SETTINGS.preset, name="other", reference=SETTINGS.preset.reference + "."
    )
    assert dataclasses.replace(SETTINGS, preset=again).digest == SETTINGS.digest
    digests = {SETTINGS.digest}
    for change in (
        {"leak": "both"},
        {"finite_key": "published"},
        {"decoy_check": "off"},
        {"reauthentication": "signatures"},
        {"max_qber": 0.1},
        {"block_bits": 12_001},
        {"preset": SETTINGS.preset.at(1.0)},
    ):
        digests.add(dataclasses.replace(SETTINGS, **change).digest)
    assert len(digests) == 8


@pytest.mark.parametrize(
    "wrong", [{"leak": "none"}, {"finite_key": "x"}, {"decoy_check": ""}, {"reauthentication": "?"}]
)
def test_unknown_settings_are_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="must be one of"):
        dataclasses.replace(SETTINGS, **wrong)


def test_hellos_with_positions_there_and_back() -> None:
    ledger = Ledger(Secret(bytes(512)))
    hello = Hello(
        role=1,
        nonce=bytes(32),
        settings=bytes(32),
        positions={lane: ledger.position(lane) for lane in Direction},
    )
    assert Hello.decode(hello.encode()) == hello


@pytest.mark.parametrize("bootstrap", ["ecdsa", "psk"])
async def test_a_ledger_is_not_begun_with_less_than_the_tags_of_a_block_take(
    bootstrap: str,
) -> None:
    """Otherwise the first short block of a link would be its last."""
    short = LinkSettings(
        preset=tuned(PRESETS["bbm92"].at(0), 3000), block_bits=3000, decoy_check="off"
    )
    made, endings = 0, []
    link = SimulatedLink(short, bootstrap=bootstrap, seed=4)
    async with link.open():
        for _ in range(6):
            try:
                await link.block()
                made += 1
            except BlockAborted as error:
                endings.append(str(error))
        ledgers = [party.ledger for party in link._parties]
    if bootstrap == "psk":
        assert made == 6
    else:
        assert made == 0
        assert all("use more detections in each block" in one for one in endings)
        assert not any(one.filled for one in ledgers)  # signatures may still begin it
    larger = dataclasses.replace(short, block_bits=6000)
    link = SimulatedLink(larger, bootstrap=bootstrap, seed=4)
    async with link.open():
        kinds = [(await link.block())[0].authentication for _ in range(3)]
    assert kinds[1:] == ["wegman-carter"] * 2


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("lane", list(Direction))
@pytest.mark.parametrize("left", ["nothing", -16, -1, 0, 16])
async def test_both_parties_know_that_the_ledger_is_used_up(
    lane: Direction, left: int | str, cut: bool
) -> None:
    """A lane with less than the tags of a block take can never be filled again.

    ``cut``: the party that speaks on the lane has used bytes and the other does not know yet.
    """
    ledgers = Ledger(), Ledger()
    await session(ledgers)
    stays = tag_bytes(lane) + left if isinstance(left, int) else 0
    for one in [ledgers[lane]] if cut else ledgers:
        one.draw(1, lane, LANE_RESERVE - stays)
    found, _ = await session(ledgers, seed=2)
    if left in (0, 16):
        assert keys(found[0]) == keys(found[1])
        return
    for end in found:
        assert [type(one) for one in end] == [LedgerDry]
        assert "restart both ends" in str(end[0])


async def test_both_parties_know_that_their_versions_differ(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encode = Hello.encode
    monkeypatch.setattr(Hello, "encode", lambda hello: b"\x07" + encode(hello)[1:])
    found, _ = await session((Ledger(), Ledger()))
    for end in found:
        assert ["another version" in str(one) for one in end] == [True]
