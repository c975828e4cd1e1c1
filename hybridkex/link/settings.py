"""What both parties of a link must have configured alike."""

import hashlib
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

from hybridkex.errors import BlockAborted, ConfigError
from hybridkex.link.finite_key import Counts, FiniteKeyProof, SecretLength, proof_for
from hybridkex.link.presets import PRESETS, Preset
from hybridkex.link.toeplitz import MAX_INPUT

__all__ = ["LinkSettings"]

SIGMAS: Final = 6.0
"""Standard deviations that statistics may be off by before they are suspicious."""


@dataclass(frozen=True, kw_only=True)
class LinkSettings:
    """A link. The preset's channel is what the parties measured when it was set up."""

    preset: Preset = field(default_factory=lambda: PRESETS["lim2014"])
    block_bits: int = 1_000_000
    """n_X: bits of the key basis that make a block."""
    key_bits: int = 256
    max_qber: float = 0.11
    """Above this share of wrong bits in either basis a block is given up."""
    tolerance: float = 0.1
    """How far the rate of detections and their shares of the intensities may drift."""

    def __post_init__(self) -> None:
        if not 1000 <= self.block_bits <= MAX_INPUT // 2:
            raise ConfigError(f"block_bits lies between 1000 and {MAX_INPUT // 2}")
        if self.key_bits < 8 or self.key_bits % 8:
            raise ConfigError("key_bits is a positive multiple of 8")
        if not 0.0 < self.max_qber <= 0.5 or not 0.0 < self.tolerance < 1.0:
            raise ConfigError("max_qber lies between 0 and 0.5, tolerance between 0 and 1")
        if self.detections > 1 << 31:
            raise ConfigError("so many bits with so rare a key basis are too much for one block")

    @cached_property
    def detections(self) -> int:
        """How many detections a block takes, so that the key basis almost surely has enough."""
        share = self.preset.transmitter.key_basis_probability**2
        wanted = self.block_bits + 5.0 * math.sqrt(self.block_bits)
        return math.ceil(wanted / share)

    @property
    def proof(self) -> FiniteKeyProof:
        """What says how long the key is."""
        return proof_for(self.preset.transmitter)

    @property
    def digest(self) -> bytes:
        """A fingerprint of all of this."""
        return hashlib.sha256(repr(self).encode()).digest()

    def check(self, counts: Counts, *, pulses: int) -> None:
        """The rules on what was detected. Raises ``BlockAborted`` with the reason."""
        if not sum(counts.key) or not sum(counts.test):
            raise BlockAborted("a basis without detections")
        self.check_qber(counts.test_error_rate, "test")
        channel, transmitter = self.preset.channel, self.preset.transmitter
        gain = transmitter.mean_gain(channel)
        alive = max(1, pulses - self.detections * channel.dead_pulses)
        self._compare("all detections", self.detections, gain * alive)
        seen = [key + test for key, test in zip(counts.key, counts.test, strict=True)]
        for number, (mean, chosen) in enumerate(
            zip(transmitter.intensities, transmitter.probabilities, strict=True)
        ):
            expected = sum(seen) * chosen * channel.gain(mean) / gain
            self._compare(f"detections of intensity {number + 1}", seen[number], expected)

    def _compare(self, what: str, seen: float, expected: float) -> None:
        if abs(seen - expected) > self.tolerance * expected + SIGMAS * math.sqrt(expected):
            raise BlockAborted(
                f"decoy statistics: {what}: {seen:.0f}, and {expected:.0f} were expected"
            )

    def check_qber(self, rate: float, basis: str) -> None:
        """Raises ``BlockAborted`` for too many wrong bits."""
        if rate > self.max_qber:
            raise BlockAborted(
                f"QBER of the {basis} basis: {rate:.2%}, and at most {self.max_qber:.2%} is allowed"
            )

    def secret_length(self, counts: Counts, *, leak: int) -> SecretLength:
        """The bound. Raises ``BlockAborted`` when it leaves nothing."""
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
