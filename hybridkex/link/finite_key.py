"""How long a secret key a finite block gives.

Two proofs, told apart by the number of decoys, with the same shape: bound the vacuum and
single-photon events among the detections, bound the phase errors, subtract what was said aloud.

* :class:`TwoDecoys`: Lim, Curty, Walenta, Xu, Zbinden, PRA 89, 022307 (2014), arXiv:1311.7129.
* :class:`OneDecoy`: Rusca, Boaron, Grünenfelder, Martin, Zbinden, APL 112, 171104 (2018),
  arXiv:1801.03443.

Both are written for the *key* basis (X in Lim, Z in Rusca) and the *test* basis (Z, X). Estimates
below zero are raised to zero, which is valid and tighter; ``clamp=False`` gives the papers' raw
values.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from hybridkex.errors import ConfigError
from hybridkex.link.entropy import binary_entropy
from hybridkex.link.physics import Channel, Transmitter

__all__ = [
    "Counts",
    "FiniteKeyProof",
    "OneDecoy",
    "SecretLength",
    "Security",
    "TwoDecoys",
    "expected_counts",
    "proof_for",
]


@dataclass(frozen=True, kw_only=True)
class Security:
    """The two failure probabilities that the key as a whole is allowed."""

    secrecy: float = 1e-9
    """eps_sec: how far, in trace distance, the key may be from one that Eve knows nothing of."""
    correctness: float = 1e-15
    """eps_cor: the probability that the two keys differ unnoticed."""

    def __post_init__(self) -> None:
        if not 0.0 < self.secrecy < 1.0 or not 0.0 < self.correctness < 1.0:
            raise ConfigError("secrecy and correctness are probabilities between 0 and 1")

    @property
    def verification_bits(self) -> int:
        """Bits of the hash that both sides compare: ``ceil(log2(1 / eps_cor))``."""
        return math.ceil(-math.log2(self.correctness))


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Detections of a block with equal bases, for each intensity; expected values may be broken."""

    key: tuple[float, ...]
    """n_k of the key basis."""
    key_errors: tuple[float, ...]
    """m_k of the key basis, known after error correction; only the one-decoy proof needs it."""
    test: tuple[float, ...]
    test_errors: tuple[float, ...]

    @property
    def test_error_rate(self) -> float:
        """The share of wrong bits in the test basis; 0 if there is none."""
        total = sum(self.test)
        return sum(self.test_errors) / total if total else 0.0

    @property
    def key_error_rate(self) -> float:
        """The QBER of the key basis."""
        total = sum(self.key)
        return sum(self.key_errors) / total if total else 0.0


@dataclass(frozen=True, kw_only=True)
class SecretLength:
    """A bound and what it was made of; numbers of events, except as said."""

    vacuum: float
    """Lower bound on detections of the key basis that came from empty pulses."""
    single: float
    """Lower bound on those that came from single photons."""
    single_test: float
    """The same in the test basis."""
    single_test_errors: float
    """Upper bound on wrong bits among the latter."""
    phase_error: float
    """Upper bound on the phase error rate of the single photons; at least 1/2 means no key."""
    leak: float
    """Bits disclosed by error correction."""
    real: float
    """The bound itself, before it is rounded down; may be negative."""

    @property
    def bits(self) -> int:
        """The length of the key; 0 when the bound is not positive."""
        return max(0, math.floor(self.real))


class FiniteKeyProof(Protocol):
    """A proof: how long a key observed counts allow."""

    terms: ClassVar[int]
    """Into how many parts the proof divides eps_sec: 21 or 19."""

    def secret_length(
        self,
        transmitter: Transmitter,
        counts: Counts,
        *,
        security: Security,
        leak: float,
        clamp: bool = True,
    ) -> SecretLength:
        """The bound for these counts, with ``leak`` bits disclosed by error correction."""
        ...


class _Estimates:
    """The bounds n± of one vector of counts (Hoeffding; Lim eq. 2-4, Rusca eq. 4)."""

    def __init__(
        self, transmitter: Transmitter, counts: Sequence[float], eps: float, clamp: bool
    ) -> None:
        # sqrt(n/2 ln(1/eps)), with the total of the vector, not the part of one intensity.
        self.deviation = math.sqrt(sum(counts) / 2.0 * math.log(1.0 / eps))
        scales = [
            math.exp(k) / p
            for k, p in zip(transmitter.intensities, transmitter.probabilities, strict=True)
        ]
        floor = 0.0 if clamp else -math.inf
        pairs = list(zip(scales, counts, strict=True))
        self.lower = [scale * max(floor, n - self.deviation) for scale, n in pairs]
        self.upper = [scale * (n + self.deviation) for scale, n in pairs]


def _photon_number_probability(transmitter: Transmitter, photons: int) -> float:
    """tau_n: how often Alice sends n photons, over all intensities."""
    return sum(
        p * math.exp(-k) * k**photons / math.factorial(photons)
        for k, p in zip(transmitter.intensities, transmitter.probabilities, strict=True)
    )


def _sampling_gap(eps: float, terms: int, rate: float, test: float, key: float) -> float:
    """gamma: how far the phase errors of the key may be from the bit errors of the test.

    Lim et al., below eq. 5; Rusca et al., eq. 10 of the appendix, with 19 for 21.
    """
    if not 0.0 < rate < 1.0:
        return 0.0
    spread = rate * (1.0 - rate)
    weight = (test + key) / (test * key)
    log = math.log2(weight / spread * (terms / eps) ** 2)
    return math.sqrt(max(0.0, weight * spread / math.log(2.0) * log))


def _assemble(
    *,
    terms: int,
    security: Security,
    detections: float,
    leak: float,
    vacuum: float,
    single: float,
    single_test: float,
    single_test_errors: float,
) -> SecretLength:
    """From the estimates to the length: eq. 1 of both papers."""
    phase_error = 0.5
    if single > 0.0 and single_test > 0.0:
        # The gap's formula ends in zero for a rate of zero, as if no error in a small sample proved
        # that there are none: so no fewer than one is taken for seen.
        observed = max(single_test_errors, 1.0) / single_test
        gap = _sampling_gap(security.secrecy, terms, observed, single_test, single)
        phase_error = min(0.5, observed + gap)
    price = 6.0 * math.log2(terms / security.secrecy) + math.log2(2.0 / security.correctness)
    # Counts that no laser makes can bound more single photons than there were detections.
    entropy = min(detections, vacuum + max(0.0, single) * (1.0 - binary_entropy(phase_error)))
    real = entropy - leak - price
    return SecretLength(
        vacuum=vacuum,
        single=single,
        single_test=single_test,
        single_test_errors=single_test_errors,
        phase_error=phase_error,
        leak=leak,
        real=real,
    )


class TwoDecoys:
    """Lim et al. 2014: three intensities, the dimmest as close to vacuum as the laser can."""

    terms: ClassVar[int] = 21

    def secret_length(
        self,
        transmitter: Transmitter,
        counts: Counts,
        *,
        security: Security,
        leak: float,
        clamp: bool = True,
    ) -> SecretLength:
        """Equations 1 to 5. Raises ``ConfigError`` unless there are three intensities."""
        if len(transmitter.intensities) != 3:
            raise ConfigError("the two-decoy proof needs three intensities")
        eps = security.secrecy / self.terms
        tau_1 = _photon_number_probability(transmitter, 1)
        mu_2, mu_3 = transmitter.intensities[1:]
        vacuum, single = self._photons(transmitter, counts.key, eps, clamp)
        _, single_test = self._photons(transmitter, counts.test, eps, clamp)
        wrong = _Estimates(transmitter, counts.test_errors, eps, clamp)
        single_test_errors = tau_1 * (wrong.upper[1] - wrong.lower[2]) / (mu_2 - mu_3)
        return _assemble(
            terms=self.terms,
            security=security,
            detections=sum(counts.key),
            leak=leak,
            vacuum=vacuum,
            single=single,
            single_test=single_test,
            single_test_errors=single_test_errors,
        )

    @staticmethod
    def _photons(
        transmitter: Transmitter, counts: Sequence[float], eps: float, clamp: bool
    ) -> tuple[float, float]:
        """s_0 (eq. 2) and s_1 (eq. 3) of one basis."""
        mu_1, mu_2, mu_3 = transmitter.intensities
        tau_0 = _photon_number_probability(transmitter, 0)
        tau_1 = _photon_number_probability(transmitter, 1)
        n = _Estimates(transmitter, counts, eps, clamp)
        vacuum = max(0.0, tau_0 * (mu_2 * n.lower[2] - mu_3 * n.upper[1]) / (mu_2 - mu_3))
        ratio = (mu_2**2 - mu_3**2) / mu_1**2
        inner = n.lower[1] - n.upper[2] - ratio * (n.upper[0] - vacuum / tau_0)
        single = tau_1 * mu_1 * inner / (mu_1 * (mu_2 - mu_3) - mu_2**2 + mu_3**2)
        return vacuum, single


class OneDecoy:
    """Rusca et al. 2018: two intensities; the vacuum is bounded through the errors."""

    terms: ClassVar[int] = 19

    def secret_length(
        self,
        transmitter: Transmitter,
        counts: Counts,
        *,
        security: Security,
        leak: float,
        clamp: bool = True,
    ) -> SecretLength:
        """Equations 1 to 6. Raises ``ConfigError`` unless there are two intensities."""
        if len(transmitter.intensities) != 2:
            raise ConfigError("the one-decoy proof needs two intensities")
        eps = security.secrecy / self.terms
        mu_1, mu_2 = transmitter.intensities
        tau_1 = _photon_number_probability(transmitter, 1)
        vacuum, single = self._photons(transmitter, counts.key, counts.key_errors, eps, clamp)
        _, single_test = self._photons(transmitter, counts.test, counts.test_errors, eps, clamp)
        wrong = _Estimates(transmitter, counts.test_errors, eps, clamp)
        single_test_errors = tau_1 * (wrong.upper[0] - wrong.lower[1]) / (mu_1 - mu_2)
        return _assemble(
            terms=self.terms,
            security=security,
            detections=sum(counts.key),
            leak=leak,
            vacuum=vacuum,
            single=single,
            single_test=single_test,
            single_test_errors=single_test_errors,
        )

    @staticmethod
    def _photons(
        transmitter: Transmitter,
        counts: Sequence[float],
        errors: Sequence[float],
        eps: float,
        clamp: bool,
    ) -> tuple[float, float]:
        """s_0 (eq. 2) and s_1 (eq. 3) of one basis, the upper bound on s_0 by eq. 5."""
        mu_1, mu_2 = transmitter.intensities
        tau_0 = _photon_number_probability(transmitter, 0)
        tau_1 = _photon_number_probability(transmitter, 1)
        n = _Estimates(transmitter, counts, eps, clamp)
        wrong = _Estimates(transmitter, errors, eps, clamp)
        vacuum = max(0.0, tau_0 * (mu_1 * n.lower[1] - mu_2 * n.upper[0]) / (mu_1 - mu_2))
        # An empty pulse shows a wrong bit half of the time, whatever its intensity was meant to be.
        most = 2.0 * (tau_0 * min(wrong.upper) + n.deviation)
        inner = n.lower[1] - (mu_2**2 * n.upper[0] + (mu_1**2 - mu_2**2) * most / tau_0) / mu_1**2
        single = tau_1 * mu_1 * inner / (mu_2 * (mu_1 - mu_2))
        return vacuum, single


def proof_for(transmitter: Transmitter) -> FiniteKeyProof:
    """The proof for this number of intensities."""
    return TwoDecoys() if len(transmitter.intensities) == 3 else OneDecoy()


def expected_counts(channel: Channel, transmitter: Transmitter, pulses: float) -> Counts:
    """What a block of so many pulses shows on average."""
    q = transmitter.key_basis_probability
    pairs = list(zip(transmitter.intensities, transmitter.probabilities, strict=True))
    seen = [pulses * p * channel.gain(k) for k, p in pairs]
    wrong = [pulses * p * channel.error(k) for k, p in pairs]
    key, test = q**2, (1.0 - q) ** 2
    return Counts(
        key=tuple(key * n for n in seen),
        key_errors=tuple(key * m for m in wrong),
        test=tuple(test * n for n in seen),
        test_errors=tuple(test * m for m in wrong),
    )
