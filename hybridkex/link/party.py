"""Alice and Bob: from detections to secret keys, one block after the other.

A block in the order of its messages::

    Bob                                  Alice
    REPORT pulses, bases, test bits, TAG ──────►   drops what was measured in another basis
                        ◄────── SIFT bases, intensities, test bits, TAG
    both count, and give the block up if the QBER or the decoys say so
    ASK  ───────────────────────────────►
                        ◄─────────────── TELL          Cascade, many times
    FOUND wrong bits by intensity, TAG ─────────►
    both compute the secret length from the counts and what was disclosed, and give up at zero
                        ◄────── FINISH hash, seeds, name, TAG
    VERDICT, TAG ───────────────────────────────►
    both hash their key to the secret length: first the ledger's share, the rest are keys

Each party uses its own end of the quantum channel and what it hears, nothing else.
"""

import hashlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final
from uuid import UUID

import numpy as np
import trio
from cryptography.hazmat.primitives.poly1305 import Poly1305
from numpy.typing import NDArray

from hybridkex.errors import BlockAborted, LinkAuthenticationError, LinkError
from hybridkex.link.authentication import Authenticator, Signatures, WegmanCarter
from hybridkex.link.cascade import FRAME, CascadeAlice, CascadeError, Plan, cascade_bob
from hybridkex.link.entropy import binary_entropy
from hybridkex.link.finite_key import Counts
from hybridkex.link.ledger import Direction, Ledger
from hybridkex.link.line import Line
from hybridkex.link.quantum import Clicks, Detector, Log, Sent
from hybridkex.link.randomness import Randomness
from hybridkex.link.settings import LinkSettings
from hybridkex.link.toeplitz import compress, seed_length
from hybridkex.link.wire import (
    CHUNK,
    Ask,
    Finish,
    Found,
    Hello,
    Report,
    Sift,
    Type,
    Verdict,
    pack_bits,
    unpack_bits,
)
from hybridkex.qkd.producer import ProducedKey
from hybridkex.secret import Secret

__all__ = ["Alice", "Block", "Bob", "verification_hash"]

TIMEOUT: Final = 60.0
"""Seconds that a party waits for a message."""

Bits = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block that made keys, and the numbers behind them."""

    number: int
    keys: tuple[ProducedKey, ...]
    pulses: int
    seconds: float
    """How long the laser took for them."""
    sifted: int
    """Bits of the key basis."""
    tested: int
    """Bits of the test basis, all disclosed."""
    qber: float
    """Share of wrong bits in the key basis."""
    test_qber: float
    phase_error: float
    leak: int
    """Parities that Cascade disclosed, bits."""
    efficiency: float
    """f: the leak over Shannon's bound."""
    rounds: int
    """Questions of Cascade."""
    secret_bits: int
    to_ledger: int
    """Bits of those that went into the ledger."""
    ledger_bits: int
    """The ledger's balance afterwards."""
    authentication: str
    epsilon: float
    """All that can go wrong unnoticed: secrecy, correctness and forgery, added up."""

    @property
    def rate(self) -> float:
        """Secret bits per second of the link's time."""
        return self.secret_bits / self.seconds


def verification_hash(key: Bits, seed: bytes, bits: int) -> Bits:
    """A 2-universal hash of ``bits`` bits, at most 127.

    Poly1305's polynomial (keys of ``L`` bytes collide with probability ``8 ⌈L/16⌉ / 2^106``), and
    Toeplitz hashing of its 128 bits (``2^-bits``); ``seed`` has 16 bytes for each.
    """
    mac = Poly1305(seed[:16] + bytes(16))
    mac.update(pack_bits(key))
    short = np.unpackbits(np.frombuffer(mac.finalize(), dtype=np.uint8))
    return compress(short, np.unpackbits(np.frombuffer(seed[16:], dtype=np.uint8))[:127], bits)


def _key_ids(name: bytes, count: int) -> Iterator[str]:
    for number in range(count):
        digest = hashlib.shake_256(name + number.to_bytes(4)).digest(16)
        yield str(UUID(bytes=digest, version=4))


def _frames(length: int) -> list[slice]:
    """A key in frames for Cascade, all about equal."""
    count = max(1, -(-length // FRAME))
    edges = [length * number // count for number in range(count + 1)]
    return [slice(start, end) for start, end in itertools.pairwise(edges)]


@dataclass(frozen=True, kw_only=True)
class _Sifted:
    """One party's bits after sifting, and what both know about them."""

    key: Bits
    intensity: Bits
    """Of the bits of ``key``."""
    counts: Counts
    """Without the errors of the key basis."""
    pulses: int


class _Party:
    """What Alice and Bob have in common."""

    direction: Direction

    def __init__(
        self,
        stream: trio.abc.Stream,
        settings: LinkSettings,
        *,
        bootstrap: Ledger | Signatures,
        seed: int | None = None,
        timeout: float = TIMEOUT,
    ) -> None:
        """``bootstrap``: a ledger with a shared secret in it, or signatures for the first block.

        ``seed`` is for runs that must be repeated: it makes all random choices foreseeable.
        """
        self._line = Line(stream, speaks=self.direction, timeout=timeout)
        self._settings = settings
        self._signatures = bootstrap if isinstance(bootstrap, Signatures) else None
        self.ledger: Final = bootstrap if isinstance(bootstrap, Ledger) else Ledger()
        self._randomness = Randomness.seeded(seed, f"party {self.direction}")
        self._number = 0
        self._begun = False
        self._last_pulse = -1
        self._secrets: list[Bits] = []

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes said and heard on the classical channel."""
        return self._line.said_bytes, self._line.heard_bytes

    async def block(self) -> Block:
        """Make one block.

        Raises :class:`~hybridkex.errors.BlockAborted`, after which the next can be tried, and
        other :class:`~hybridkex.errors.LinkError`, after which the link is over. Either way what
        the block had is erased.
        """
        try:
            if not self._begun:
                await self._greet()
                self._begun = True
            self._number += 1
            self._line.begin_block(self._number, self._authenticator())
            return await self._block()
        except CascadeError as error:
            raise LinkAuthenticationError(f"error correction: {error}") from None
        finally:
            for secret in self._secrets:
                secret.fill(0)
            self._secrets.clear()

    def _authenticator(self) -> Authenticator:
        if self._signatures is not None and not self.ledger.history:
            return self._signatures
        return WegmanCarter(self.ledger, self._number)

    async def _greet(self) -> None:
        raise NotImplementedError

    async def _block(self) -> Block:
        raise NotImplementedError

    def _hello(self) -> Hello:
        return Hello(
            role=int(self.direction),
            nonce=self._randomness.bytes(32),
            settings=self._settings.digest,
        )

    def _meet(self, ours: Hello, theirs: Hello) -> None:
        if theirs.role != 1 - ours.role:
            raise LinkError("both ends play the same party")
        if theirs.settings != ours.settings:
            raise LinkError("the two ends of the link have different settings")
        self._line.begin_session(
            *(hello.encode() for hello in sorted((ours, theirs), key=lambda one: one.role))
        )

    def _keep(self, bits: Bits) -> Bits:
        """Erase these at the end of the block."""
        self._secrets.append(bits)
        return bits

    def _sort(
        self, own: Bits, basis: Bits, intensity: Bits, tests: tuple[Bits, Bits], pulses: int
    ) -> _Sifted:
        """From kept detections to a key and counts; ``tests``: both parties' bits of the test."""
        kinds = len(self._settings.preset.transmitter.intensities)

        def count(which: Bits) -> tuple[float, ...]:
            return tuple(map(float, np.bincount(which, minlength=kinds)))

        in_test = basis.astype(bool)
        # Of the key basis no more than a block has, so that Cascade's orders fit.
        key_intensity = intensity[~in_test][: self._settings.block_bits]
        test_intensity = intensity[in_test]
        counts = Counts(
            key=count(key_intensity),
            key_errors=(0.0,) * kinds,
            test=count(test_intensity),
            test_errors=count(test_intensity[tests[0] != tests[1]]),
        )
        self._settings.check(counts, pulses=pulses)
        key = self._keep(own[~in_test][: self._settings.block_bits].copy())
        return _Sifted(key=key, intensity=key_intensity, counts=counts, pulses=pulses)

    def _plans(self, sifted: _Sifted) -> list[tuple[slice, Plan]]:
        rate = sifted.counts.test_error_rate
        return [
            (part, Plan.for_error_rate(part.stop - part.start, rate))
            for part in _frames(len(sifted.key))
        ]

    def _length(self, sifted: _Sifted, errors: tuple[int, ...], leak: int) -> "_Outcome":
        counts = Counts(
            key=sifted.counts.key,
            key_errors=tuple(map(float, errors)),
            test=sifted.counts.test,
            test_errors=sifted.counts.test_errors,
        )
        length = self._settings.secret_length(counts, leak=leak)
        return _Outcome(counts=counts, leak=leak, bits=length.bits, phase_error=length.phase_error)

    @property
    def _hash_bits(self) -> int:
        return min(127, self._settings.preset.security.verification_bits)

    async def _deliver(
        self, sifted: _Sifted, outcome: "_Outcome", finish: Finish, rounds: int
    ) -> Block:
        """Privacy amplification, the ledger, keys."""
        secret = self._keep(
            await trio.to_thread.run_sync(compress, sifted.key, finish.seed, outcome.bits)
        )
        whole = secret[: len(secret) // 8 * 8]
        output = pack_bits(whole)
        ledger_share = min(len(output), self.ledger.wanting)
        self.ledger.add(self._number, "from the link", output[:ledger_share])
        size = self._settings.key_bits // 8
        usable = output[ledger_share:]
        count = len(usable) // size
        keys = tuple(
            ProducedKey(key_id=key_id, key=Secret(usable[number * size : (number + 1) * size]))
            for number, key_id in enumerate(_key_ids(finish.name, count))
        )
        counts, security = outcome.counts, self._settings.preset.security
        sifted_bits = len(sifted.key)
        shannon = sifted_bits * binary_entropy(counts.key_error_rate)
        return Block(
            number=self._number,
            keys=keys,
            pulses=sifted.pulses,
            seconds=sifted.pulses / self._settings.preset.channel.repetition_rate_hz,
            sifted=sifted_bits,
            tested=int(sum(counts.test)),
            qber=counts.key_error_rate,
            test_qber=counts.test_error_rate,
            phase_error=outcome.phase_error,
            leak=outcome.leak,
            efficiency=outcome.leak / shannon if shannon else math.inf,
            rounds=rounds,
            secret_bits=outcome.bits,
            to_ledger=8 * ledger_share,
            ledger_bits=8 * self.ledger.balance,
            authentication=self._line.authentication,
            epsilon=security.secrecy + security.correctness + self._line.forgery,
        )


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """What both know after error correction."""

    counts: Counts
    leak: int
    bits: int
    phase_error: float


class Alice(_Party):
    """The sender of the light."""

    direction = Direction.ALICE_TO_BOB

    def __init__(
        self,
        stream: trio.abc.Stream,
        settings: LinkSettings,
        log: Log,
        *,
        bootstrap: Ledger | Signatures,
        seed: int | None = None,
        timeout: float = TIMEOUT,
    ) -> None:
        super().__init__(stream, settings, bootstrap=bootstrap, seed=seed, timeout=timeout)
        self._log = log

    async def _greet(self) -> None:
        ours = self._hello()
        await self._line.say(ours)
        self._meet(ours, Hello.decode(await self._line.hear(Type.HELLO)))

    async def _block(self) -> Block:
        try:
            sifted = await self._sift()
        finally:
            self._log.forget()
        errors, leak, rounds = await self._answer(sifted)
        outcome = self._length(sifted, errors, leak)
        draw = self._randomness
        hash_seed = draw.bytes(Finish.HASH_SEED)
        finish = Finish(
            hash_seed=hash_seed,
            hash=verification_hash(sifted.key, hash_seed, self._hash_bits),
            name=draw.bytes(Finish.NAME),
            seed=draw.bits(seed_length(len(sifted.key))),
        )
        await self._line.say(finish)
        await self._line.seal()
        verdict = Verdict.decode(await self._line.hear(Type.VERDICT))
        await self._line.confirm()
        if not verdict.agree:
            raise BlockAborted("verification: the keys differ")
        return await self._deliver(sifted, outcome, finish, rounds)

    async def _sift(self) -> _Sifted:
        reports: list[Report] = []
        missing = self._settings.detections
        last = self._last_pulse
        while missing:
            report = Report.decode(await self._line.hear(Type.REPORT))
            missing -= len(report.pulse)
            if missing < 0 or int(report.pulse[0]) <= last:
                raise LinkError("the reports do not fit together")
            last = int(report.pulse[-1])
            reports.append(report)
        await self._line.confirm()
        pulses, self._last_pulse = last - self._last_pulse, last
        kept_sent: list[tuple[Sent, Bits]] = []
        for report in reports:
            sent = self._log.recall(report.pulse)
            self._keep(sent.bit)
            kept = sent.basis == report.basis
            mine = Sent(intensity=sent.intensity[kept], basis=sent.basis[kept], bit=sent.bit[kept])
            in_test = mine.basis.astype(bool)
            theirs = report.bit[kept[report.basis.astype(bool)]]
            kept_sent.append((mine, theirs))
            await self._line.say(
                Sift(kept=kept.astype(np.uint8), intensity=mine.intensity, bit=mine.bit[in_test])
            )
        await self._line.seal()
        basis = np.concatenate([one.basis for one, _ in kept_sent])
        bit = self._keep(np.concatenate([one.bit for one, _ in kept_sent]))
        return self._sort(
            bit,
            basis,
            np.concatenate([one.intensity for one, _ in kept_sent]),
            (bit[basis.astype(bool)], np.concatenate([theirs for _, theirs in kept_sent])),
            pulses,
        )

    async def _answer(self, sifted: _Sifted) -> tuple[tuple[int, ...], int, int]:
        """Cascade: errors by intensity, bits disclosed, questions answered."""
        frames = iter(self._plans(sifted))
        cascade: CascadeAlice | None = None
        disclosed = rounds = 0
        while True:
            kind, body = await self._line.hear_one_of(Type.ASK, Type.FOUND)
            if kind is Type.FOUND:
                break
            question = Ask.decode(body).question
            if question is None:
                part, plan = next(frames, (None, None))
                if part is None or plan is None:
                    raise LinkError("there are no more frames")
                cascade = CascadeAlice(plan, sifted.key[part])
                continue
            if cascade is None:
                raise LinkError("a question before the first frame")
            found = cascade.answer(question)
            disclosed += len(found)
            rounds += 1
            if disclosed > 2 * len(sifted.key):
                raise LinkError("more was asked than there is to know")
            await self._line.say_raw(Type.TELL, pack_bits(found))
        errors = Found.decode(body, most=tuple(map(int, sifted.counts.key))).errors
        await self._line.confirm()
        return errors, disclosed, rounds


class Bob(_Party):
    """The receiver of the light."""

    direction = Direction.BOB_TO_ALICE

    def __init__(
        self,
        stream: trio.abc.Stream,
        settings: LinkSettings,
        detector: Detector,
        *,
        bootstrap: Ledger | Signatures,
        seed: int | None = None,
        timeout: float = TIMEOUT,
    ) -> None:
        super().__init__(stream, settings, bootstrap=bootstrap, seed=seed, timeout=timeout)
        self._detector = detector

    async def _greet(self) -> None:
        theirs = Hello.decode(await self._line.hear(Type.HELLO))
        ours = self._hello()
        await self._line.say(ours)
        self._meet(ours, theirs)

    async def _block(self) -> Block:
        sifted = await self._sift()
        before = self._keep(sifted.key.copy())
        leak, rounds = await self._ask(sifted)
        kinds = len(sifted.counts.key)
        wrong = sifted.intensity[before != sifted.key]
        errors = tuple(map(int, np.bincount(wrong, minlength=kinds)))
        await self._line.say(Found(errors=errors))
        await self._line.seal()
        outcome = self._length(sifted, errors, leak)
        finish = Finish.decode(
            await self._line.hear(Type.FINISH),
            hash_bits=self._hash_bits,
            seed_bits=seed_length(len(sifted.key)),
        )
        await self._line.confirm()
        ours = verification_hash(sifted.key, finish.hash_seed, self._hash_bits)
        agree = bool((ours == finish.hash).all())
        await self._line.say(Verdict(agree=agree))
        await self._line.seal()
        if not agree:
            raise BlockAborted("verification: the keys differ")
        return await self._deliver(sifted, outcome, finish, rounds)

    async def _sift(self) -> _Sifted:
        clicks = await self._detector.detect(self._settings.detections)
        self._keep(clicks.bit)
        parts = [
            Clicks(
                pulse=clicks.pulse[start : start + CHUNK],
                basis=clicks.basis[start : start + CHUNK],
                bit=clicks.bit[start : start + CHUNK],
            )
            for start in range(0, len(clicks.pulse), CHUNK)
        ]
        for part in parts:
            in_test = part.basis.astype(bool)
            await self._line.say(Report(pulse=part.pulse, basis=part.basis, bit=part.bit[in_test]))
        await self._line.seal()
        last = int(clicks.pulse[-1])
        pulses, self._last_pulse = last - self._last_pulse, last
        answers = [
            Sift.decode(
                await self._line.hear(Type.SIFT),
                basis=part.basis,
                intensities=len(self._settings.preset.transmitter.intensities),
            )
            for part in parts
        ]
        await self._line.confirm()
        kept = np.concatenate([answer.kept for answer in answers]).astype(bool)
        basis, bit = clicks.basis[kept], self._keep(clicks.bit[kept])
        return self._sort(
            bit,
            basis,
            np.concatenate([answer.intensity for answer in answers]),
            (bit[basis.astype(bool)], np.concatenate([answer.bit for answer in answers])),
            pulses,
        )

    async def _ask(self, sifted: _Sifted) -> tuple[int, int]:
        """Cascade: corrects the key; bits disclosed and questions asked."""
        disclosed = rounds = 0
        for part, plan in self._plans(sifted):
            await self._line.say(Ask(question=None))
            search = cascade_bob(plan, sifted.key[part])
            passes = 0
            try:
                question = next(search)
                while True:
                    await self._line.say(Ask(question=question))
                    if question.nodes is None:
                        roots = plan.forest.roots(passes)
                        count, passes = int(roots.stop - roots.start), passes + 1
                    else:
                        count = len(question.nodes)
                    disclosed += count
                    rounds += 1
                    parities = unpack_bits(await self._line.hear(Type.TELL), count)
                    question = search.send(parities)
            except StopIteration:
                pass
        return disclosed, rounds
