"""Methods of error correction with faults: no end has a key, and both are told."""

import functools
import math
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import trio

from hybridkex.errors import BlockAborted, LinkError
from hybridkex.link.cascade import Cascade
from hybridkex.link.finite_key import Counts, SecretLength
from hybridkex.link.ledger import LANE_RESERVE, Ledger
from hybridkex.link.measured import Measured, alice_of, bob_of
from hybridkex.link.optimise import tuned
from hybridkex.link.party import Alice, Block, Bob
from hybridkex.link.presets import PRESETS, Preset
from hybridkex.link.quantum import sample
from hybridkex.link.randomness import Randomness
from hybridkex.link.reconciliation import Bits, Correction, Responder
from hybridkex.link.settings import LinkSettings
from hybridkex.link.simulated import SimulatedLink, stream_pair
from hybridkex.secret import Secret

pytestmark = pytest.mark.usefixtures("steps_in_place")

ALICE, BOB = 0, 1
SHARED = Secret(bytes(2 * LANE_RESERVE))


class Answers:
    """Alice's side of Cascade, with some members replaced."""

    def __init__(self, whole: Responder, **members: Callable[[Responder], Any]) -> None:
        self._whole = whole
        self._members = members

    def __getattr__(self, name: str) -> Any:
        made = self._members.get(name)
        return getattr(self._whole, name) if made is None else made(self._whole)


Corrects = Callable[[Generator[bytes, bytes, Correction], Bits], Any]


@dataclass(frozen=True)
class Faulty:
    """Cascade, with the fault that a test wants."""

    alice: Callable[[Responder], Any] = lambda whole: whole
    bob: Corrects = lambda whole, _: whole
    name: str = "cascade"

    def respond(self, key: Bits, error_rate: float) -> Any:
        return self.alice(Cascade().respond(key, error_rate))

    def correct(self, key: Bits, error_rate: float) -> Any:
        return self.bob(Cascade().correct(key, error_rate), key)


def with_member(name: str, make: Callable[[Responder], Any]) -> Faulty:
    return Faulty(alice=lambda whole: Answers(whole, **{name: make}))


def with_result(make: Callable[[Correction], Any]) -> Faulty:
    def search(whole: Generator[bytes, bytes, Correction], _: Bits) -> Generator[bytes, bytes, Any]:
        return make((yield from whole))

    return Faulty(bob=search)


def with_count(end: int, name: str, change: Callable[[int], Any]) -> Faulty:
    if end == ALICE:
        return with_member(name, lambda whole: change(getattr(whole, name)))
    return with_result(lambda found: replace(found, **{name: change(getattr(found, name))}))


@functools.cache
def recorded(name: str, is_tuned: bool) -> tuple[Measured, Measured, Preset]:
    chosen = PRESETS[name].at(1)
    chosen = tuned(chosen, 40_000) if is_tuned else chosen
    sent, seen = sample(
        chosen.channel,
        chosen.transmitter,
        chosen.channel,
        60_000 if is_tuned else 200_000,
        first=0,
        randomness=Randomness.seeded(1, "measured"),
    )
    alice = Measured(pulse=seen.pulse, basis=sent.basis, bit=sent.bit, intensity=sent.intensity)
    return alice, Measured(pulse=seen.pulse, basis=seen.basis, bit=seen.bit), chosen


Outcome = list[Block | LinkError]


def play(
    faulty: Any = None,
    *,
    name: str = "rusca2018",
    is_tuned: bool = True,
    leak: str = "alice",
    kinds: tuple[type[LinkSettings], ...] = (LinkSettings, LinkSettings),
    reserves: tuple[int, int] = (0, 0),
) -> Outcome:
    """A block; what each end has of it."""
    alice, bob, chosen = recorded(name, is_tuned)
    ours, theirs = (
        kind(preset=chosen, leak=leak, reconciler=faulty or Cascade()) for kind in kinds
    )
    outcome: dict[int, Block | LinkError] = {}

    async def block(number: int, party: Alice | Bob, stream: trio.SocketStream) -> None:
        try:
            outcome[number] = await party.block()
        except LinkError as error:
            outcome[number] = error
            if not isinstance(error, BlockAborted):
                await stream.aclose()

    async def both() -> None:
        near, far = stream_pair()
        ledgers = [Ledger(SHARED, reserve=reserve) for reserve in reserves]
        async with near, far, trio.open_nursery() as nursery:
            nursery.start_soon(block, ALICE, alice_of(alice, ours, near, ledgers[0]), near)
            nursery.start_soon(block, BOB, bob_of(bob, theirs, far, ledgers[1]), far)

    trio.run(both)
    return [outcome[ALICE], outcome[BOB]]


def aborted(outcome: Outcome) -> str:
    """The reason for which both ends aborted the block."""
    alice, bob = outcome
    assert isinstance(alice, BlockAborted), alice
    assert isinstance(bob, BlockAborted), bob
    assert str(alice) == str(bob)
    return str(alice)


LINKS = [
    ("lim2014", True),
    ("rusca2018", True),  # untuned, a block this small makes no key
    ("bbm92", True),
    ("lim2014", False),
    ("bbm92", False),
]
CHANGES: dict[str, Callable[[int], int]] = {
    "one more": lambda count: count + 1,
    "one fewer": lambda count: count - 1,
    "none": lambda _: 0,
    "numpy's": lambda count: np.int64(count + 8),  # type: ignore[return-value]
}


@pytest.mark.parametrize(("name", "is_tuned"), LINKS)
def test_without_a_fault_both_ends_have_the_same_keys(name: str, is_tuned: bool) -> None:
    alice, bob = play(Faulty(), name=name, is_tuned=is_tuned)
    assert isinstance(alice, Block)
    assert isinstance(bob, Block)
    assert [(one.key_id, one.key.reveal()) for one in alice.keys] == [
        (one.key_id, one.key.reveal()) for one in bob.keys
    ]
    assert len(alice.keys) > 5


@pytest.mark.parametrize("count", ["disclosed", "announced"])
@pytest.mark.parametrize("end", [ALICE, BOB])
@pytest.mark.parametrize(
    ("name", "is_tuned", "change"),
    [
        *((*link, "one more") for link in LINKS),
        *(("rusca2018", True, one) for one in list(CHANGES)[1:]),
    ],
)
def test_another_number_at_one_end_aborts_the_block_at_both(
    name: str, is_tuned: bool, end: int, count: str, change: str
) -> None:
    fault = with_count(end, count, CHANGES[change])
    reason = aborted(play(fault, name=name, is_tuned=is_tuned))
    assert "must count the same at both ends" in reason


@pytest.mark.parametrize("leak", ["alice", "both"])
@pytest.mark.parametrize("count", ["disclosed", "announced"])
@pytest.mark.parametrize("end", [ALICE, BOB])
def test_a_number_that_leaves_nothing_leaves_both_without_a_key(
    end: int, count: str, leak: str
) -> None:
    reason = aborted(play(with_count(end, count, lambda _: 1 << 62), leak=leak))
    by_bound = end == BOB and (count == "disclosed" or leak == "both")
    assert ("no secret bit is left" if by_bound else "must count the same") in reason


class Rounded(LinkSettings):
    """As if this end's arithmetic rounded otherwise."""

    def secret_length(self, counts: Counts, *, leak: int) -> SecretLength:
        found = super().secret_length(counts, leak=leak)
        return replace(found, real=found.real - 1)


@pytest.mark.parametrize("end", [ALICE, BOB])
def test_another_length_at_one_end_aborts_the_block_at_both(end: int) -> None:
    kinds = (Rounded, LinkSettings) if end == ALICE else (LinkSettings, Rounded)
    assert "their lengths" in aborted(play(kinds=kinds))
    reserves = (64, 400) if end == ALICE else (400, 64)
    assert "their lengths" in aborted(play(reserves=reserves))


async def test_after_such_a_block_the_link_goes_on() -> None:
    """The ends are in step: the next block, without the fault, has the same keys at both."""
    blocks = 0

    def answers(whole: Responder) -> Responder:
        nonlocal blocks
        blocks += 1
        return Answers(whole, disclosed=lambda one: one.disclosed + 1) if blocks == 1 else whole

    chosen = recorded("rusca2018", True)[2]
    link = SimulatedLink(
        LinkSettings(preset=chosen, block_bits=40_000, reconciler=Faulty(alice=answers)), seed=1
    )
    async with link.open():
        with pytest.raises(BlockAborted, match="must count the same at both ends"):
            await link.block()
        alice, bob = await link.block()
    assert [one.key for one in alice.keys] == [one.key for one in bob.keys]
    assert alice.keys


def yields(value: Any) -> Corrects:
    def search(_whole: Any, _key: Bits) -> Generator[Any, bytes, None]:
        yield value

    return search


def spoils(whole: Generator[bytes, bytes, Correction], key: Bits) -> Any:
    found = yield from whole
    key[:] = 7
    return found


class Text:
    """A count of no type that counts."""


NO_COUNTS = [None, -1, -5000, 1 << 63, 10**400, 0.5, 100.0, math.nan, math.inf, True, "9", Text()]
WRONG: list[tuple[int, Faulty, str]] = [
    (ALICE, Faulty(alice=lambda _: None), "respond must return a Responder, not None"),
    (ALICE, Faulty(alice=lambda _: object()), "respond must return a Responder, not an object"),
    *(
        (
            ALICE,
            with_member("answer", lambda _, it=it: lambda _: it),
            f"answer must return bytes, {it_is}",
        )
        for it, it_is in ((None, "not None"), ("x", "not a str"), ([1], "not a list"))
    ),
    (BOB, Faulty(bob=lambda *_: None), "correct must be a generator, not None"),
    (BOB, Faulty(bob=lambda *_: b"x"), "correct must be a generator, not a bytes"),
    (BOB, Faulty(bob=yields(None)), "correct must yield bytes, not None"),
    (BOB, Faulty(bob=yields("x")), "correct must yield bytes, not a str"),
    (BOB, with_result(lambda _: None), "correct must return a Correction, not None"),
    (BOB, with_result(lambda _: (1, 1)), "correct must return a Correction, not a tuple of int"),
    (BOB, Faulty(bob=spoils), "the corrected key takes an array of bits, each 0 or 1"),
    *(
        (end, with_count(end, name, lambda _, it=it: it), f"{name} must be ")
        for end in (ALICE, BOB)
        for name in ("disclosed", "announced")
        for it in NO_COUNTS
    ),
]


@pytest.mark.parametrize(("end", "faulty", "reason"), WRONG)
def test_a_wrong_result_is_named_at_its_end_and_the_other_is_told(
    end: int, faulty: Faulty, reason: str
) -> None:
    outcome = play(faulty)
    assert str(outcome[end]).startswith(f"the error correction Faulty is wrong: {reason}")
    assert str(outcome[1 - end]) == "the other party ended the session: see its log"


async def test_a_simulated_link_raises_it_without_a_group() -> None:
    chosen = recorded("rusca2018", True)[2]
    settings = LinkSettings(
        preset=chosen, block_bits=40_000, reconciler=with_result(lambda _: None)
    )
    async with (link := SimulatedLink(settings)).open():
        with pytest.raises(LinkError, match="Faulty is wrong: correct must return a Correction"):
            await link.block()
