"""The settings that must be the same at both ends of a link."""

import hashlib
import math
import numbers
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Final

from hybridkex.errors import BlockAborted, ConfigError
from hybridkex.fields import check_members
from hybridkex.link.authentication import collision_probability
from hybridkex.link.cascade import Cascade
from hybridkex.link.finite_key import FINITE_KEY, Counts, FiniteKeyProof, SecretLength, proof_for
from hybridkex.link.presets import PRESETS, Preset
from hybridkex.link.ranges import check_ranges, instance, one_of, whole
from hybridkex.link.reconciliation import Reconciler
from hybridkex.link.toeplitz import MAX_INPUT

__all__ = [
    "BIT_CHECKS",
    "DECOY_CHECKS",
    "LEAKS",
    "MEMORY",
    "MOST_BLOCK_BITS",
    "REAUTHENTICATION",
    "LinkSettings",
]

SIGMAS: Final = 6.0
"""Standard deviations by which statistics may differ from the expectation."""
VERIFICATION_BITS: Final = 127
"""The longest verification hash."""
LEAKS: Final = ("alice", "both")
DECOY_CHECKS: Final = ("full", "shares", "off")
BIT_CHECKS: Final = ("on", "off")
REAUTHENTICATION: Final = ("refuse", "signatures")
MOST_BLOCK_BITS: Final = MAX_INPUT // 2
MEMORY: Final = 8 << 30
"""Bytes that a block may take, both parties together; settings that ask for more are refused."""
FIXED_MEMORY: Final = 512 << 20
PER_DETECTION: Final = 80
PER_KEY_BIT: Final = 60
PER_KEY: Final = 1200
"""Bytes of a key at both ends, beside its bits: its ID and the objects."""
KEY_BITS: Final = 256
MOST_DETECTIONS: Final = (
    (MEMORY - FIXED_MEMORY) * KEY_BITS // ((PER_DETECTION + PER_KEY_BIT) * KEY_BITS + PER_KEY)
)
"""The most detections of a block. In a file, all of them may be in the key basis."""


def _canonical(value: object) -> object:
    """One form for equal values: one end may have read ``0`` or ``1e9`` and the other ``0.0`` or
    ``1000000000``."""
    if isinstance(value, tuple):
        return tuple(map(_canonical, value))
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return float(value) + 0.0  # not -0.0
    return value


@dataclass(frozen=True, kw_only=True)
class LinkSettings:
    """A link. The preset's channel is the one measured when the link was set up.

    Raises:
        ConfigError: a setting has the wrong type or is out of range.
    """

    preset: Preset = field(default_factory=lambda: PRESETS["lim2014"])
    """What the link is made of; its fibre is as long as :meth:`Preset.at` says."""
    block_bits: int = 1_000_000
    """n_X: bits of the key basis that make a block, a random sample of those detected."""
    key_bits: int = KEY_BITS
    """Bits of each key that comes out, a multiple of 8."""
    max_qber: float = 0.11
    """Above this share of wrong bits in the test basis (and in the key basis, where it is
    announced) a block is aborted."""
    tolerance: float = 0.1
    """The relative drift that is allowed in the rate of detections and the intensities' shares."""
    finite_key: str = FINITE_KEY[0]
    """``tight`` or ``published``: see :mod:`hybridkex.link.finite_key`."""
    leak: str = LEAKS[0]
    """Whose parities count as disclosed: ``alice``, as in most of the literature, or ``both``,
    which also covers what Bob's requests disclose about Bob's key (arXiv:2307.00576)."""
    decoy_check: str = DECOY_CHECKS[0]
    """``full``: the rate of detections and the shares of the intensities must match the preset
    within ``tolerance``; ``shares``: only the shares; ``off``: neither. No bound depends on it."""
    bit_check: str = BIT_CHECKS[0]
    """``on``: a block ends the session if Alice's bits fail the :mod:`~hybridkex.link.health`
    tests; ``off``: the bounds take them for random untested."""
    reauthentication: str = REAUTHENTICATION[0]
    """After a party has lost its authentication key: ``refuse``, or begin with ``signatures``."""
    real_time: bool = False
    """Whether detections come at the rate of the laser's clock, else as fast as they can be
    simulated."""
    reconciler: Reconciler = field(default_factory=Cascade)
    """The error correction."""
    block_detections: int | None = None
    """Detections of a block, both bases; ``None``: enough that ``block_bits`` are among them."""

    def __post_init__(self) -> None:
        instance("preset", self.preset, Preset)
        instance("real_time", self.real_time, bool)
        for name in ("block_bits", "key_bits", "block_detections"):
            value = getattr(self, name)
            if value is not None or name != "block_detections":
                object.__setattr__(self, name, whole(name, value))
        if not 1000 <= self.block_bits <= MOST_BLOCK_BITS:
            raise ConfigError(f"block_bits lies between 1000 and {MOST_BLOCK_BITS}")
        if self.key_bits < 8 or self.key_bits % 8:
            raise ConfigError("key_bits is a positive multiple of 8")
        check_ranges(self, max_qber=(0.0, 0.5), tolerance=(0.0, 1.0))
        if not 0.0 < self.max_qber <= 0.5 or not 0.0 < self.tolerance < 1.0:
            raise ConfigError("max_qber is above 0 and at most 0.5, tolerance above 0 and below 1")
        for name, known in (
            ("finite_key", FINITE_KEY),
            ("leak", LEAKS),
            ("decoy_check", DECOY_CHECKS),
            ("bit_check", BIT_CHECKS),
            ("reauthentication", REAUTHENTICATION),
        ):
            one_of(name, getattr(self, name), known)
        check_members("reconciler", self.reconciler, Reconciler)
        if self.block_detections is not None and self.block_detections < 1:
            raise ConfigError("block_detections must be positive")
        if self.memory > MEMORY:
            raise ConfigError(
                f"a block of {self.block_bits:,} bits takes {self.detections:,} detections, with "
                f"{self.memory / 2**30:.1f} GiB of memory, and at most {MEMORY / 2**30:.0f} GiB "
                "are allowed: make the block smaller, the keys longer or the key basis more "
                "probable"
            )
        wanted = self.preset.security.correctness
        if self.verification_bits > VERIFICATION_BITS:
            least = 2.0 * max(self.collision, 2.0**-VERIFICATION_BITS)
            raise ConfigError(
                f"keys of {self.block_bits:,} bits cannot be verified with a correctness of "
                f"{wanted:g}: allow {least:.2g} or more"
            )

    @cached_property
    def detections(self) -> int:
        """The number of detections of a block; the key basis almost surely has enough of them."""
        if self.block_detections is not None:
            return self.block_detections
        share = self.preset.transmitter.key_basis_probability**2
        wanted = self.block_bits + 5.0 * math.sqrt(self.block_bits)
        return math.ceil(wanted / share)

    @property
    def memory(self) -> int:
        """Bytes that a block takes, at most, if both parties are in one process."""
        bits = PER_DETECTION * self.detections + PER_KEY_BIT * self.block_bits
        return FIXED_MEMORY + bits - (-PER_KEY * self.block_bits // self.key_bits)

    @property
    def collision(self) -> float:
        """The probability that Poly1305 maps two different keys to the same number."""
        return collision_probability(-(-self.block_bits // 8))

    @property
    def verification_bits(self) -> int:
        """Bits of the hash that both sides compare.

        So many that they and Poly1305, whose output they hash, miss a difference with no more than
        the probability that ``correctness`` allows.
        """
        left = self.preset.security.correctness - self.collision
        return math.ceil(-math.log2(left)) if left > 0.0 else VERIFICATION_BITS + 1

    @property
    def proof(self) -> FiniteKeyProof:
        """The proof that gives the length of the key."""
        return proof_for(self.preset.transmitter, self.finite_key)

    @property
    def digest(self) -> bytes:
        """A digest of everything that affects the behaviour, without names and citations."""
        mine: dict[str, object] = {
            one.name: getattr(self, one.name)
            for one in fields(self)
            if one.name not in ("preset", "reconciler")
        }
        mine |= {**self.preset.parameters, "reconciler": self.reconciler.name}
        same = [(name, _canonical(value)) for name, value in sorted(mine.items())]
        return hashlib.sha256(repr(same).encode()).digest()

    def check(self, counts: Counts, *, pulses: int | None) -> None:
        """Check the counts. Raises ``BlockAborted`` with the reason.

        ``pulses``: of the block; known where the decoy check is ``full``.
        """
        if not sum(counts.key) or not sum(counts.test):
            raise BlockAborted("nothing was detected in one of the bases")
        self.check_qber(counts.test_error_rate, "test")
        channel, transmitter = self.preset.channel, self.preset.transmitter
        gain = transmitter.mean_gain(channel)
        if self.decoy_check == "full":
            assert pulses is not None
            alive = max(1, pulses - self.detections * channel.dead_pulses)
            what = f"all detections of {pulses:,} pulses"
            self._compare(what, self.detections, gain * alive)
        if self.decoy_check == "off":
            return
        if gain <= 0.0:
            raise BlockAborted("decoy statistics: the preset's channel lets nothing be detected")
        # The key basis may have been thinned out, so each basis is compared by itself.
        for basis, seen in (("key", counts.key), ("test", counts.test)):
            for number, ((of_kind, _), chosen) in enumerate(
                zip(transmitter.response(channel), transmitter.probabilities, strict=True)
            ):
                expected = sum(seen) * chosen * of_kind / gain
                self._compare(
                    f"intensity {number + 1} in the {basis} basis", seen[number], expected
                )

    def _compare(self, what: str, seen: float, expected: float) -> None:
        if abs(seen - expected) > self.tolerance * expected + SIGMAS * math.sqrt(expected):
            raise BlockAborted(
                f"decoy statistics: {what}: {seen:.0f} detections, {expected:.0f} were expected"
            )

    def check_qber(self, rate: float, basis: str) -> None:
        """Refuse too high a ``rate`` of wrong bits, 0 to 1, in this ``basis``. Raises
        ``BlockAborted``."""
        if rate > self.max_qber:
            raise BlockAborted(
                f"QBER of the {basis} basis: {rate:.2%}, and at most {self.max_qber:.2%} is allowed"
            )

    def leaked(self, counts: Counts, *, disclosed: int, announced: int) -> int:
        """Bits to subtract for error correction; the verification hash is counted apart.

        ``disclosed``: bits about Alice's key, ``announced``: about Bob's. That the number of them
        is visible counts too, and so do the error counts, twice: as what they tell, and because
        the length depends on them.
        """
        bits = float(disclosed)
        if self.leak == "both":
            bits += announced
        bits += math.log2(2.0 * sum(counts.key) + 4096.0)
        # The proofs subtract log2(2 / eps_cor) for the hash, which Poly1305 may make longer.
        price = math.log2(2.0 / self.preset.security.correctness)
        bits += max(0.0, self.verification_bits - price)
        if self.proof.uses_key_errors:
            bits += 2.0 * sum(math.log2(n + 1.0) for n in counts.key)
        return math.ceil(bits)

    def secret_length(self, counts: Counts, *, leak: int) -> SecretLength:
        """The bound for these ``counts``, with ``leak`` bits by :meth:`leaked`.

        Raises ``BlockAborted`` when it leaves nothing.
        """
        if self.proof.uses_key_errors:
            self.check_qber(counts.key_error_rate, "key")
        found = self.proof.secret_length(
            self.preset.transmitter, counts, security=self.preset.security, leak=float(leak)
        )
        if found.bits <= 0:
            raise BlockAborted(
                f"no secret bit is left: the bound is {found.real:.0f} "
                f"(phase error {found.phase_error:.2%}, {leak} bits leaked)"
            )
        return found
