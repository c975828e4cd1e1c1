"""Alice and Bob: from detections to secret keys, block by block.

A block in the order of its messages::

    Bob                                  Alice
    REPORT pulses, bases, test bits, TAG ──────►   drops what was measured in another basis, and
                                                   of the key basis, at random, what is too much;
                                                   tests whether Alice's bits can be random
                        ◄────── SIFT kept, intensities, test bits, TAG
    both count, and abort the block if the QBER or the decoys say so
    ASK  ───────────────────────────────►
                        ◄─────────────── TELL          error correction, many times
    CORRECTED bits disclosed, error counts, TAG ►
    both compute the secret length from these counts, and abort at zero
                        ◄────── FINISH numbers, hash, seeds, name, TAG
    VERDICT, TAG ───────────────────────────────►  an abort if a hash or a number differs
    both hash their key to the secret length: first the ledger's share, the rest are keys

Each party uses its own end of the quantum channel and what it received, nothing else.

A session begins with HELLO, which says where each party's ledger stands. The first tag of the other
party, which covers both HELLOs, confirms it; until then nothing is dropped from the ledger.
"""

import hashlib
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Generic, TypeVar
from uuid import UUID

import numpy as np
import trio
from cryptography.hazmat.primitives.poly1305 import Poly1305
from numpy.typing import NDArray

from hybridkex.errors import (
    BlockAborted,
    ConfigError,
    LedgerDry,
    LedgerLost,
    LinkAuthenticationError,
    LinkError,
)
from hybridkex.link import wire
from hybridkex.link.authentication import (
    LEAST_SECRET,
    Authenticator,
    Signatures,
    WegmanCarter,
    suffices,
)
from hybridkex.link.classical import ClassicalChannel
from hybridkex.link.finite_key import Counts
from hybridkex.link.health import check_chosen, check_measured
from hybridkex.link.ledger import Direction, Ledger, Position
from hybridkex.link.physics import PairSource
from hybridkex.link.quantum import Detections, Detector, PulseRecord, Sent
from hybridkex.link.randomness import Randomness
from hybridkex.link.ranges import bit_array, instance, whole, within
from hybridkex.link.reconciliation import Correction, ReconciliationError, checked
from hybridkex.link.settings import LinkSettings
from hybridkex.link.statistics import binary_entropy
from hybridkex.link.toeplitz import compress, seed_length
from hybridkex.net.event_loop import in_thread
from hybridkex.qkd.producer import ProducedKey
from hybridkex.secret import Secret

TIMEOUT: Final = 60.0
"""Seconds that a party waits for a message."""

Bits = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Epsilon:
    """Probabilities of all undetected failures of a block; they add up."""

    secrecy: float
    """Distance from keys unknown to Eve: estimates, smoothing, privacy amplification."""
    correctness: float
    """Different keys that the verification does not notice: its hash, and Poly1305."""
    authentication: float
    """A forged tag under this block's messages, by the bound of Wegman and Carter; 0 for
    signatures, whose security is computational."""
    inherited: float
    """Failures of the earlier blocks, whose keys authenticate this one."""
    conditional: bool
    """Whether the others assume that no signature was forged while the link began."""

    @property
    def total(self) -> float:
        """The sum."""
        return self.secrecy + self.correctness + self.authentication + self.inherited


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block that made keys, with its statistics."""

    number: int
    keys: tuple[ProducedKey, ...]
    pulses: int | None
    """``None`` for measured detections without the numbers of their pulses."""
    seconds: float | None
    """Time of these pulses at the laser's clock rate."""
    sifted: int
    """Bits of the key basis."""
    tested: int
    """Bits of the test basis, all disclosed."""
    qber: float | None
    """Share of wrong bits in the key basis; ``None`` at Alice's end if Bob does not announce it."""
    test_qber: float
    phase_error: float
    leak: int
    """Bits that error correction disclosed, as the settings count them."""
    parities: int
    """Bits that Alice disclosed among them."""
    efficiency: float | None
    """f: Alice's parities over Shannon's bound; ``None`` where the QBER is unknown or 0."""
    rounds: int
    """Round trips of error correction."""
    secret_bits: int
    to_ledger: int
    """Bits of those that went into the ledger."""
    ledger_bits: int
    """The ledger's balance afterwards."""
    authentication: str
    epsilon: Epsilon

    @property
    def too_short(self) -> str | None:
        """Why there is no key although there are secret bits; ``None`` if there are keys."""
        if self.keys:
            return None
        return (
            f"{self.secret_bits - self.to_ledger:,} secret bits are left for keys, fewer than one "
            "key takes"
        )

    @property
    def rate(self) -> float | None:
        """Secret bits per second of the link's time; ``None`` where that is unknown."""
        return None if self.seconds is None else self.secret_bits / self.seconds

    @property
    def numbers(self) -> dict[str, Any]:
        """All of it for JSON, with the number of the keys in their place."""
        found = {**asdict(replace(self, keys=())), "keys": len(self.keys)}
        found["epsilon"]["total"] = self.epsilon.total
        return found if self.keys else {**found, "aborted": self.too_short}


def cause(errors: Iterable[LinkError]) -> LinkError:
    """The error that ended a session, not what the other party made of its end."""
    return min(errors, key=lambda one: isinstance(one, wire.SessionEnded))


def verification_hash(key: Bits, seed: bytes, bits: int) -> Bits:
    """A 2-universal hash of ``bits`` bits, at most 127.

    Poly1305's polynomial (keys of ``L`` bytes collide with probability ``8 ⌈L/16⌉ / 2^106``), and
    Toeplitz hashing of its 128 bits (``2^-bits``); ``seed`` has 16 bytes for each. Raises
    ``ConfigError``.
    """
    if len(instance("seed", seed, bytes)) != 32:
        raise ConfigError("seed takes 32 bytes")
    key, bits = bit_array("key", key), int(within("bits", whole("bits", bits), 0, 127))
    mac = Poly1305(seed[:16] + bytes(16))
    mac.update(wire.pack_bits(key))
    short = np.unpackbits(np.frombuffer(mac.finalize(), dtype=np.uint8))
    return compress(short, np.unpackbits(np.frombuffer(seed[16:], dtype=np.uint8))[:127], bits)


def _key_ids(name: bytes, count: int) -> Iterator[str]:
    for number in range(count):
        digest = hashlib.shake_256(name + number.to_bytes(4)).digest(16)
        yield str(UUID(bytes=digest, version=4))


@dataclass(frozen=True, kw_only=True)
class _Sifted:
    """One party's bits after sifting, and the counts that both know."""

    key: Bits = field(repr=False)
    intensity: Bits
    """Indices of the intensities of the bits of ``key``."""
    counts: Counts
    """Without the errors of the key basis."""
    pulses: int | None


@dataclass(frozen=True, kw_only=True)
class _Corrected:
    """The result of error correction at one party."""

    disclosed: int
    announced: int
    """Bob's counts, from which both compute."""
    own: Correction
    """The counts of this party."""
    rounds: int
    errors: tuple[int, ...] | None
    """Wrong bits of each intensity; ``None`` if this party does not know them."""


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """The result of the bound."""

    counts: Counts
    leak: int
    bits: int
    phase_error: float


L = TypeVar("L")


class _Party(Generic[L]):
    """The part of the protocol that is the same for Alice and Bob."""

    direction: Direction

    def __init__(  # noqa: PLR0913  # keywords with defaults
        self,
        stream: trio.abc.Stream,
        settings: LinkSettings,
        light: L,
        *,
        bootstrap: Ledger | Signatures,
        ledger: Ledger | None = None,
        seed: int | None = None,
        patient: bool = False,
        timeout: float = TIMEOUT,
        first_pulse: int | None = 0,
        commit: Callable[[], None] | None = None,
    ) -> None:
        """``light``: Alice's record of what she sends, Bob's detector.

        ``bootstrap``: a ledger with a shared secret in it, or signatures for the first block.

        ``ledger``: the authentication key of an earlier session over the same link, beside
        signatures. It goes on from there. ``seed`` is for runs that must be repeated: it makes all
        random choices foreseeable. ``patient``: Alice waits for Bob's first report of a block
        without a limit, because its light takes as long as on a real link, or because Bob may begin
        when he likes. ``timeout``: seconds. ``first_pulse``: where the first block begins; ``None``
        if detections have numbers that are not of pulses. ``commit``: called in each block before
        error correction discloses anything of the key (at Bob first); if it raises ``LinkError``,
        nothing is.
        """
        self._channel = ClassicalChannel(stream, sends=self.direction, timeout=timeout)
        self._settings = settings
        self._light = light
        self._patient = patient
        self._signatures = bootstrap if isinstance(bootstrap, Signatures) else None
        if isinstance(bootstrap, Ledger):
            ledger = bootstrap
        self.ledger: Final = Ledger() if ledger is None else ledger
        self._randomness = Randomness.seeded(seed, f"party {self.direction}")
        self._number = 0
        self._begun = False
        self._restarts = False
        self._agreed: dict[Direction, Position] | None = None
        self._last_pulse = -1
        self._first_pulse = first_pulse
        self._commit = commit
        self._secrets: list[Bits] = []

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes sent and received on the classical channel."""
        return self._channel.sent_bytes, self._channel.received_bytes

    async def block(self) -> Block:
        """Make one block.

        Raises :class:`~hybridkex.errors.BlockAborted`, after which the next can be tried, and
        other :class:`~hybridkex.errors.LinkError`, after which the session is over. Either way
        what the block had is erased.
        """
        try:
            if not self._begun:
                await self._greet()
                self._begun = True
            self._number += 1
            self._channel.begin_block(self._number, self._authenticator())
            try:
                return await self._block()
            except ReconciliationError as error:
                raise LinkAuthenticationError(f"error correction: {error}") from None
        except (BlockAborted, wire.SessionEnded):  # the other party knows
            raise
        except LinkError as error:
            await self._channel.end(error)
            raise
        finally:
            for secret in self._secrets:
                secret.fill(0)
            self._secrets.clear()

    async def _greet(self) -> None:
        raise NotImplementedError

    async def _block(self) -> Block:
        sifted = await self._sift()
        self._settings.check(sifted.counts, pulses=sifted.pulses)
        try:
            corrected = await self._correct(sifted)
        except ConfigError as error:
            method = type(self._settings.reconciler).__name__
            raise LinkError(f"the error correction {method} is wrong: {error}") from error
        outcome = self._bound(sifted, corrected)
        own = corrected.own
        numbers = (own.disclosed, own.announced, outcome.bits, self.ledger.wanting)
        finish, agree = await self._verify(sifted.key, numbers)
        disclosed, announced, *_ = finish.numbers
        if (disclosed, announced) != (corrected.disclosed, corrected.announced):
            raise BlockAborted(
                f"error correction: Alice counts {disclosed} bits disclosed and {announced} "
                f"announced, Bob {corrected.disclosed} and {corrected.announced}; its method must "
                "count the same at both ends"
            )
        if not agree:
            raise BlockAborted("verification: the keys differ, or their lengths")
        return await self._amplify(sifted, corrected, outcome, finish)

    async def _sift(self) -> _Sifted:
        """Steps 2 and 3: exchange bases, keep the detections whose bases agree, count them."""
        raise NotImplementedError

    async def _correct(self, sifted: _Sifted) -> _Corrected:
        """Steps 5 and 6: error correction. It begins with :meth:`_committed`."""
        raise NotImplementedError

    async def _committed(self) -> None:
        """Commit the detections: from here on, the key is disclosed in part. Alice commits after
        Bob, so that detections that Bob refuses or cannot use are not used up at Alice's end."""
        if self._commit is not None:
            await in_thread(self._commit)

    async def _verify(self, key: Bits, numbers: tuple[int, ...]) -> tuple[wire.Finish, bool]:
        """Steps 8 and 9: Alice's last message, and whether its hash and numbers are Bob's."""
        raise NotImplementedError

    def _hello(self) -> wire.Hello:
        return wire.Hello(
            role=int(self.direction),
            nonce=self._randomness.bytes(32),
            settings=self._settings.digest,
            positions=self.ledger.positions if self.ledger.filled else None,
        )

    def _begin_session(self, ours: wire.Hello, theirs: wire.Hello) -> None:
        """Compare the two HELLOs. Raises ``LinkError``."""
        if theirs.role != 1 - ours.role:
            raise LinkError("both ends of the link have the same role")
        if theirs.settings != ours.settings:
            raise LinkError(
                "the two ends of the link have different settings: compare their presets or files "
                "(with measured detections, the numbers of rows too) and their options"
            )
        self._channel.begin_session(
            *(hello.encode() for hello in sorted((ours, theirs), key=lambda one: one.role))
        )
        if ours.positions is None or theirs.positions is None:
            if ours.positions is not None or theirs.positions is not None:
                self._may_restart("this" if ours.positions is None else "the other")
            if self._signatures is None:
                raise LinkError("the link has neither authentication key nor signatures")
            self._restarts = True
            return
        try:
            self._agreed = self.ledger.agreement(self.direction, theirs.positions)
        except LedgerLost:
            self._may_restart("one")
            self._restarts = True

    def _may_restart(self, who: str) -> None:
        if self._settings.reauthentication != "signatures" or self._signatures is None:
            raise LedgerLost(
                f"{who} party of the link lost its authentication key: restart both ends, or set "
                'reauthentication = "signatures" at both'
            )

    def _authenticator(self) -> Authenticator:
        if self._restarts:
            assert self._signatures is not None
            return self._signatures
        lanes = self._agreed or self.ledger.positions
        if not suffices(lanes):
            # Here both parties know it. Where only one of them found out in the middle of a block,
            # the other would see no more than a connection that ends.
            raise LedgerDry(
                "the authentication key is used up by blocks that were given up and sessions that "
                "were cut, and the link stops: find their cause, then restart both ends, so that "
                "they authenticate from the beginning"
            )
        return WegmanCarter(
            self.ledger, self._number, starts={lane: one.start for lane, one in lanes.items()}
        )

    async def _verify_tag(self) -> None:
        """Check the other party's tag; the first one of a session confirms the agreed positions."""
        await self._channel.verify_tag()
        if self._agreed is not None:
            self.ledger.cut(self._number, self._agreed)
            self._agreed = None
        if self._restarts and self.ledger.filled:
            self.ledger.clear()

    def _pulses_until(self, last: int) -> int | None:
        """The pulses of a block that ends with this one."""
        before, self._last_pulse = self._last_pulse, last
        first = self._first_pulse
        return None if first is None else last - max(before, first - 1)

    def _erase_later(self, bits: Bits) -> Bits:
        """Erase these at the end of the block."""
        self._secrets.append(bits)
        return bits

    def _count(
        self, own: Bits, basis: Bits, intensity: Bits, tests: tuple[Bits, Bits], pulses: int | None
    ) -> _Sifted:
        """The key and counts of the kept detections; ``tests``: both parties' bits of the test."""
        kinds = len(self._settings.preset.transmitter.probabilities)

        def count(which: Bits) -> tuple[float, ...]:
            return tuple(map(float, np.bincount(which, minlength=kinds)))

        in_test = basis.astype(bool)
        key_intensity, test_intensity = intensity[~in_test], intensity[in_test]
        counts = Counts(
            key=count(key_intensity),
            key_errors=(0.0,) * kinds,
            test=count(test_intensity),
            test_errors=count(test_intensity[tests[0] != tests[1]]),
        )
        key = self._erase_later(own[~in_test].copy())
        return _Sifted(key=key, intensity=key_intensity, counts=counts, pulses=pulses)

    def _bound(self, sifted: _Sifted, corrected: _Corrected) -> _Outcome:
        counts = sifted.counts
        if corrected.errors is not None:
            counts = Counts(
                key=counts.key,
                key_errors=tuple(map(float, corrected.errors)),
                test=counts.test,
                test_errors=counts.test_errors,
            )
        leak = self._settings.leaked(
            counts, disclosed=corrected.disclosed, announced=corrected.announced
        )
        length = self._settings.secret_length(counts, leak=leak)
        if self._restarts and length.bits // 8 < min(LEAST_SECRET, self.ledger.wanting):
            # With less in the ledger no later block could be authenticated, not even by signatures.
            raise BlockAborted(
                f"{length.bits} secret bits are too few to authenticate the next block, which "
                f"takes {8 * LEAST_SECRET}; use more detections in each block"
            )
        return _Outcome(counts=counts, leak=leak, bits=length.bits, phase_error=length.phase_error)

    async def _amplify(
        self, sifted: _Sifted, corrected: _Corrected, outcome: _Outcome, finish: wire.Finish
    ) -> Block:
        """Privacy amplification, the ledger, keys."""
        secret = self._erase_later(await in_thread(compress, sifted.key, finish.seed, outcome.bits))
        whole = secret[: len(secret) // 8 * 8]
        output = wire.pack_bits(whole)
        epsilon = self._epsilon()
        share = min(len(output), self.ledger.wanting)
        self.ledger.add(self._number, "from the link", output[:share])
        self.ledger.inherited = epsilon.total
        self.ledger.conditional = epsilon.conditional
        self._restarts = False
        size = self._settings.key_bits // 8
        usable = output[share:]
        count = len(usable) // size
        keys = tuple(
            ProducedKey(key_id=key_id, key=Secret(usable[number * size : (number + 1) * size]))
            for number, key_id in enumerate(_key_ids(finish.name, count))
        )
        counts, sifted_bits = outcome.counts, len(sifted.key)
        qber = None if corrected.errors is None else counts.key_error_rate
        shannon = sifted_bits * binary_entropy(qber or 0.0)
        clock = self._settings.preset.channel.repetition_rate_hz
        return Block(
            number=self._number,
            keys=keys,
            pulses=sifted.pulses,
            seconds=None if sifted.pulses is None else sifted.pulses / clock,
            sifted=sifted_bits,
            tested=int(sum(counts.test)),
            qber=qber,
            test_qber=counts.test_error_rate,
            phase_error=outcome.phase_error,
            leak=outcome.leak,
            parities=corrected.disclosed,
            efficiency=corrected.disclosed / shannon if shannon else None,
            rounds=corrected.rounds,
            secret_bits=outcome.bits,
            to_ledger=8 * share,
            ledger_bits=8 * self.ledger.balance,
            authentication=self._channel.authentication,
            epsilon=epsilon,
        )

    def _epsilon(self) -> Epsilon:
        settings = self._settings
        return Epsilon(
            secrecy=settings.preset.security.secrecy,
            correctness=2.0**-settings.verification_bits + settings.collision,
            authentication=0.0 if self._restarts else self._channel.forgery,
            inherited=self.ledger.inherited,
            conditional=self._restarts or self.ledger.conditional,
        )


class Alice(_Party[PulseRecord]):
    """The sender of the light."""

    direction = Direction.ALICE_TO_BOB

    async def _greet(self) -> None:
        ours = self._hello()
        await self._channel.send(ours)
        self._begin_session(ours, wire.Hello.decode(await self._channel.receive(wire.Type.HELLO)))

    async def _verify(self, key: Bits, numbers: tuple[int, ...]) -> tuple[wire.Finish, bool]:
        draw = self._randomness
        hash_seed = draw.bytes(wire.Finish.HASH_SEED)
        finish = wire.Finish(
            numbers=numbers,
            hash_seed=hash_seed,
            hash=verification_hash(key, hash_seed, self._settings.verification_bits),
            name=draw.bytes(wire.Finish.NAME),
            seed=draw.bits(seed_length(len(key))),
        )
        await self._channel.send(finish)
        await self._channel.send_tag()
        verdict = wire.Verdict.decode(await self._channel.receive(wire.Type.VERDICT))
        await self._verify_tag()
        return finish, verdict.agree

    async def _sift(self) -> _Sifted:
        try:
            reports, sent, pulses = await self._recall()
        finally:
            self._light.forget()
        keeps = self._choose(sent, reports)
        mine: list[Sent] = []
        theirs: list[Bits] = []
        answers: list[wire.Sift] = []
        for one, report, kept in zip(sent, reports, keeps, strict=True):
            chosen = Sent(intensity=one.intensity[kept], basis=one.basis[kept], bit=one.bit[kept])
            mine.append(chosen)
            theirs.append(report.bit[kept[report.basis.astype(bool)]])
            in_test = chosen.basis.astype(bool)
            answers.append(
                wire.Sift(
                    kept=kept.astype(np.uint8),
                    intensity=chosen.intensity,
                    bit=chosen.bit[in_test],
                )
            )
        basis = np.concatenate([one.basis for one in mine])
        bit = self._erase_later(np.concatenate([one.bit for one in mine]))
        intensity = np.concatenate([one.intensity for one in mine])
        tests = bit[basis.astype(bool)], np.concatenate(theirs)
        sifted = self._count(bit, basis, intensity, tests, pulses)
        if self._settings.bit_check == "on":  # before any of them is disclosed
            await in_thread(self._check_bits, reports, sent, sifted)
        for answer in answers:
            await self._channel.send(answer)
        await self._channel.send_tag()
        return sifted

    def _check_bits(self, reports: list[wire.Report], sent: list[Sent], sifted: _Sifted) -> None:
        """Raises ``NotRandom``."""
        settings, source = self._settings, self._settings.preset.transmitter
        if isinstance(source, PairSource):
            security = settings.preset.security
            length = settings.proof.secret_length(
                source, sifted.counts, security=security, leak=0.0
            )
            check_measured(sifted.key, length.phase_error)
            return
        check_chosen(
            self._erase_later(np.concatenate([one.bit for one in sent])),
            np.concatenate([one.basis for one in sent]),
            np.concatenate([one.intensity for one in sent]),
            np.concatenate([one.pulse for one in reports]),
        )

    async def _recall(self) -> tuple[list[wire.Report], list[Sent], int | None]:
        """Bob's reports, what was sent in those pulses, and how many pulses the block took."""
        reports: list[wire.Report] = []
        missing = self._settings.detections
        last = self._last_pulse
        while missing:
            body = await self._channel.receive(
                wire.Type.REPORT, patient=self._patient and not reports
            )
            report = wire.Report.decode(body)
            missing -= len(report.pulse)
            if missing < 0 or int(report.pulse[0]) <= last:
                raise LinkError("the reports of a block do not fit together")
            last = int(report.pulse[-1])
            reports.append(report)
        await self._verify_tag()
        pulses = self._pulses_until(last)
        sent = [self._light.recall(report.pulse) for report in reports]
        for one in sent:
            self._erase_later(one.bit)
        return reports, sent, pulses

    def _choose(self, sent: list[Sent], reports: list[wire.Report]) -> list[NDArray[np.bool_]]:
        """Choose the detections to keep: equal bases, and a random sample of the key basis."""
        keeps = [one.basis == report.basis for one, report in zip(sent, reports, strict=True)]
        in_key = [kept & (one.basis == 0) for one, kept in zip(sent, keeps, strict=True)]
        surplus = sum(int(one.sum()) for one in in_key) - self._settings.block_bits
        if surplus > 0:
            places = np.flatnonzero(np.concatenate(in_key))
            drawn = self._randomness.uniform(len(places))
            drop = places[np.argpartition(drawn, surplus)[:surplus]]
            start = 0
            for kept in keeps:
                here = drop[(drop >= start) & (drop < start + len(kept))] - start
                kept[here] = False
                start += len(kept)
        return keeps

    async def _correct(self, sifted: _Sifted) -> _Corrected:
        """Answer Bob's requests."""
        responder = await in_thread(
            self._settings.reconciler.respond, sifted.key, sifted.counts.test_error_rate
        )
        whole = all(hasattr(responder, one) for one in ("answer", "disclosed", "announced"))
        checked("respond must return a Responder", responder, whole)
        rounds = 0
        while True:
            kind, body = await self._channel.receive_one_of(wire.Type.ASK, wire.Type.CORRECTED)
            if not rounds:
                await self._committed()
            if kind is wire.Type.CORRECTED:
                break
            answer = await in_thread(responder.answer, body)
            checked("answer must return bytes", answer, isinstance(answer, bytes))
            rounds += 1
            await self._channel.send(wire.Answer(answer))
        tells = self._settings.proof.uses_key_errors
        most = tuple(map(int, sifted.counts.key)) if tells else ()
        theirs = wire.Corrected.decode(body, most=most)
        await self._verify_tag()
        return _Corrected(
            disclosed=theirs.disclosed,
            announced=theirs.announced,
            own=Correction(disclosed=responder.disclosed, announced=responder.announced),
            rounds=rounds,
            errors=theirs.errors if tells else None,
        )


class Bob(_Party[Detector]):
    """The receiver of the light."""

    direction = Direction.BOB_TO_ALICE

    async def _greet(self) -> None:
        theirs = await self._channel.receive(wire.Type.HELLO)
        ours = self._hello()
        await self._channel.send(ours)  # first, so that both see what does not fit
        self._begin_session(ours, wire.Hello.decode(theirs))

    async def _verify(self, key: Bits, numbers: tuple[int, ...]) -> tuple[wire.Finish, bool]:
        finish = wire.Finish.decode(
            await self._channel.receive(wire.Type.FINISH),
            hash_bits=self._settings.verification_bits,
            seed_bits=seed_length(len(key)),
        )
        await self._verify_tag()
        ours = verification_hash(key, finish.hash_seed, self._settings.verification_bits)
        agree = finish.numbers == numbers and bool((ours == finish.hash).all())
        await self._channel.send(wire.Verdict(agree=agree))
        await self._channel.send_tag()
        return finish, agree

    async def _sift(self) -> _Sifted:
        seen = await self._light.detect(self._settings.detections)
        self._erase_later(seen.bit)
        parts = [
            Detections(
                pulse=seen.pulse[start : start + wire.CHUNK],
                basis=seen.basis[start : start + wire.CHUNK],
                bit=seen.bit[start : start + wire.CHUNK],
            )
            for start in range(0, len(seen.pulse), wire.CHUNK)
        ]
        for part in parts:
            in_test = part.basis.astype(bool)
            await self._channel.send(
                wire.Report(pulse=part.pulse, basis=part.basis, bit=part.bit[in_test])
            )
        await self._channel.send_tag()
        pulses = self._pulses_until(int(seen.pulse[-1]))
        answers = [
            wire.Sift.decode(
                await self._channel.receive(wire.Type.SIFT),
                basis=part.basis,
                intensities=len(self._settings.preset.transmitter.probabilities),
            )
            for part in parts
        ]
        await self._verify_tag()
        kept = np.concatenate([answer.kept for answer in answers]).astype(bool)
        basis, bit = seen.basis[kept], self._erase_later(seen.bit[kept])
        if int((basis == 0).sum()) > self._settings.block_bits:
            raise LinkError("the other party kept more detections than a block has")
        intensity = np.concatenate([answer.intensity for answer in answers])
        tests = bit[basis.astype(bool)], np.concatenate([answer.bit for answer in answers])
        return self._count(bit, basis, intensity, tests, pulses)

    async def _correct(self, sifted: _Sifted) -> _Corrected:
        """Send requests until the key agrees with Alice's."""
        before = self._erase_later(sifted.key.copy())
        search = self._settings.reconciler.correct(sifted.key, sifted.counts.test_error_rate)
        checked("correct must be a generator", search, isinstance(search, Generator))
        rounds = 0
        result: Any = None

        def step(answer: bytes | None) -> Any:
            nonlocal result
            try:
                request = next(search) if answer is None else search.send(answer)
            except StopIteration as end:
                result = end.value
                return None
            return checked("correct must yield bytes", request, isinstance(request, bytes))

        request = await in_thread(step, None)
        await self._committed()
        while request is not None:
            rounds += 1
            await self._channel.send(wire.Request(request))
            request = await in_thread(step, await self._channel.receive(wire.Type.TELL))
        fits = isinstance(result, Correction)
        correction: Correction = checked("correct must return a Correction", result, fits)
        bit_array("the corrected key", sifted.key)
        wrong = sifted.intensity[before != sifted.key]
        errors = tuple(map(int, np.bincount(wrong, minlength=len(sifted.counts.key))))
        tells = self._settings.proof.uses_key_errors
        await self._channel.send(
            wire.Corrected(
                disclosed=correction.disclosed,
                announced=correction.announced,
                errors=errors if tells else (),
            )
        )
        await self._channel.send_tag()
        return _Corrected(
            disclosed=correction.disclosed,
            announced=correction.announced,
            own=correction,
            rounds=rounds,
            errors=errors,
        )
