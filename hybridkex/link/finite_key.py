"""The length of the secret key of a finite block.

Two decoy methods, distinguished by the number of intensities, and two kinds of statistics.

* :class:`TwoDecoys`: Lim, Curty, Walenta, Xu, Zbinden, PRA 89, 022307 (2014), arXiv:1311.7129.
* :class:`OneDecoy`: Rusca, Boaron, Grünenfelder, Martin, Zbinden, APL 112, 171104 (2018),
  arXiv:1801.03443.

Both are written for the *key* basis (X in Lim, Z in Rusca) and the *test* basis (Z, X).

* :class:`Published` has the papers' formulas, to the digits that they give. They are kept for
  comparison: they are for a key of fixed length, and their gap between test and key basis exceeds
  its failure probability when errors are few (``docs/qkd-link-proofs.md``).
* :class:`Tight`, the default, bounds the same events with the inequalities of
  :mod:`hybridkex.link.statistics`, and its length is that of a variable-length protocol.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, Protocol, TypeAlias

from hybridkex.errors import ConfigError
from hybridkex.link.physics import Channel, Light, PairSource, Source, Transmitter
from hybridkex.link.ranges import MOST_EVENTS, check_ranges, instance, one_of, within, within_all
from hybridkex.link.statistics import (
    binary_entropy,
    lower_of_mean,
    trials_upper,
    unseen_errors,
    upper_of_mean,
)

ROUNDING: Final = 1.0 + 1e-9
"""The factor by which rounded expected errors may exceed detections, if all bits are wrong."""
_Numbers: TypeAlias = Sequence[float]
FINITE_KEY: Final = ("tight", "published")
"""Kinds of statistics, by name; the first is the default."""


@dataclass(frozen=True, kw_only=True)
class Security:
    """The two failure probabilities that the key as a whole is allowed."""

    secrecy: float = 1e-9
    """eps_sec: the largest trace distance of the key from one about which Eve knows nothing."""
    correctness: float = 1e-15
    """eps_cor: the probability that the two keys differ unnoticed."""

    def __post_init__(self) -> None:
        # The bounds use the square of a fifteenth, which must not become zero.
        check_ranges(self, secrecy=(1e-100, 1.0), correctness=(1e-100, 1.0))
        if not 0.0 < self.secrecy < 1.0 or not 0.0 < self.correctness < 1.0:
            raise ConfigError("secrecy and correctness must lie between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Detections of a block with equal bases, for each intensity; expected values may be
    fractions.

    Raises ``ConfigError`` unless all four are of one length, at least 1, with numbers from 0 on,
    and no more errors than detections.
    """

    key: tuple[float, ...]
    """n_k of the key basis."""
    key_errors: tuple[float, ...]
    """m_k of the key basis, known after error correction; only the one-decoy proof uses them."""
    test: tuple[float, ...]
    test_errors: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("key", "key_errors", "test", "test_errors"):
            counts = within_all(name, getattr(self, name), 0.0, MOST_EVENTS)
            object.__setattr__(self, name, counts)
            if len(counts) != len(self.key) or not counts:
                raise ConfigError(f"{name} has one number for each intensity, as the other counts")
        for name, errors, detections in (
            ("key_errors", self.key_errors, self.key),
            ("test_errors", self.test_errors, self.test),
        ):
            if any(m > n * ROUNDING for m, n in zip(errors, detections, strict=True)):
                raise ConfigError(f"{name} has more wrong bits than there are detections")

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
    """A bound and the estimates behind it. Numbers of events, unless stated otherwise."""

    vacuum: float
    """Lower bound on detections of the key basis that came from empty pulses."""
    single: float
    """Lower bound on those that came from single photons."""
    single_test: float
    """Lower bound on detections of the test basis that came from single photons."""
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


@dataclass(frozen=True)
class Expectations:
    """Bounds on what one vector of counts would be on average, times ``e^k / p_k``.

    Both take the number of the intensity. They are computed on request, as no proof needs all of
    them.
    """

    lower: Callable[[int], float]
    upper: Callable[[int], float]


class Statistics(Protocol):
    """The inequalities that a proof uses, and the constant terms of its length."""

    @property
    def name(self) -> str:
        """One of :data:`FINITE_KEY`."""

    def expectations(
        self, transmitter: Transmitter, counts: Sequence[float], security: Security
    ) -> Expectations:
        """Bounds n± of one vector of counts; each fails with its share of epsilon."""

    def vacuum(self, wrong: float, detections: float, security: Security) -> float:
        """The most vacuum detections, given that at most ``wrong`` of them show a wrong bit."""

    def phase_error(
        self, wrong: float, single_test: float, single: float, security: Security
    ) -> float:
        """Upper bound on the phase error rate of ``single`` detections of the key basis.

        ``wrong`` of ``single_test`` detections of the test basis showed a wrong bit, at most.
        """

    def length(self, vacuum: float, secret: float, security: Security) -> float:
        """The length before the leak is subtracted, from vacuum events and secret bits."""


@dataclass(frozen=True)
class Published:
    """The formulas of Lim et al. 2014 (``terms`` = 21) and Rusca et al. 2018 (19).

    Estimates below zero are raised to zero, which is valid and tighter; ``clamp=False`` gives the
    papers' raw values.
    """

    terms: int
    clamp: bool = True

    name: ClassVar[str] = "published"

    def _deviation(self, total: float, security: Security) -> float:
        # sqrt(n/2 ln(1/eps)), with the total of the vector, not the part of one intensity.
        return math.sqrt(total / 2.0 * math.log(self.terms / security.secrecy))

    def expectations(
        self, transmitter: Transmitter, counts: Sequence[float], security: Security
    ) -> Expectations:
        """Hoeffding's inequality: Lim et al., equations 2 to 4; Rusca et al., equation 4."""
        deviation = self._deviation(sum(counts), security)
        floor = 0.0 if self.clamp else -math.inf
        scales = _scales(transmitter)
        return Expectations(
            lower=lambda k: scales[k] * max(floor, counts[k] - deviation),
            upper=lambda k: scales[k] * (counts[k] + deviation),
        )

    def vacuum(self, wrong: float, detections: float, security: Security) -> float:
        """Rusca et al., equation 5."""
        return 2.0 * (wrong + self._deviation(detections, security))

    def phase_error(
        self, wrong: float, single_test: float, single: float, security: Security
    ) -> float:
        """gamma of Lim et al., below equation 5; Rusca et al., equation 10 of the appendix."""
        # The formula ends in zero for a rate of zero, as if no error in a small sample proved that
        # there are none: so no fewer than one is taken for seen.
        rate = max(wrong, 1.0) / single_test
        if not 0.0 < rate < 1.0:
            return 0.5
        spread = rate * (1.0 - rate)
        weight = (single_test + single) / (single_test * single)
        log = math.log2(weight / spread * (self.terms / security.secrecy) ** 2)
        return min(0.5, rate + math.sqrt(max(0.0, weight * spread / math.log(2.0) * log)))

    def length(self, vacuum: float, secret: float, security: Security) -> float:
        """Equation 1 of both papers."""
        price = 6.0 * math.log2(self.terms / security.secrecy)
        return vacuum + secret - price - math.log2(2.0 / security.correctness)


@dataclass(frozen=True)
class Tight:
    """Divergences for counts, the hypergeometric tail for the gap; lengths that vary.

    Each event has a fifteenth of eps_sec: two are the smoothing, one is the privacy amplification,
    and both decoy methods bound at most twelve expectations. The tail for the phase errors has the
    square of its share (a purified distance). See ``docs/qkd-link-proofs.md``.
    """

    smooth: bool = False
    """Use a smooth estimate of the phase error for a search; the bound itself has steps."""

    terms: ClassVar[int] = 15
    name: ClassVar[str] = "tight"

    def _share(self, security: Security) -> float:
        return security.secrecy / self.terms

    def expectations(
        self, transmitter: Transmitter, counts: Sequence[float], security: Security
    ) -> Expectations:
        """Hoeffding 1963, theorem 1."""
        total, nats = sum(counts), -math.log(self._share(security))
        scales = _scales(transmitter)
        return Expectations(
            lower=lambda k: scales[k] * lower_of_mean(counts[k], total, nats),
            upper=lambda k: scales[k] * upper_of_mean(counts[k], total, nats),
        )

    def vacuum(self, wrong: float, detections: float, security: Security) -> float:
        """A vacuum detection shows a wrong bit with probability 1/2, independent of the others."""
        return min(detections, trials_upper(wrong, self._share(security)))

    def phase_error(
        self, wrong: float, single_test: float, single: float, security: Security
    ) -> float:
        """The hypergeometric tail, inverted.

        The sizes are lower bounds on the true ones. The bound is for random subsets of exactly
        these sizes. A random subset of either side of a random partition is again part of a random
        partition and has no more errors than the whole, and the bits outside it may be given to
        Eve. So monotonicity in the sizes is not needed. Monotonicity in the errors holds.
        """
        key, test = math.floor(single), math.floor(single_test)
        if key < 1 or test < 1:
            return 0.5
        if self.smooth:
            rate = max(0.0, wrong) / single_test
            nats = -2.0 * math.log(self._share(security))
            most = upper_of_mean(max(0.0, wrong), single_test, nats)
            gap = (most / single_test - rate) * math.sqrt((single + single_test) / single)
            return min(0.5, rate + gap)
        most = unseen_errors(key, test, math.floor(max(0.0, wrong)), self._share(security) ** 2)
        return min(0.5, most / key)

    def length(self, vacuum: float, secret: float, security: Security) -> float:
        """Wiesemann et al., arXiv:2405.16578v3; vacuum events count as known to Eve."""
        price = 4.0 * math.log2(self.terms / security.secrecy) - 1.0
        return secret - price - math.log2(2.0 / security.correctness)


class FiniteKeyProof(Protocol):
    """A proof: the length of key that the observed counts allow."""

    @property
    def uses_key_errors(self) -> bool:
        """Whether ``Counts.key_errors`` must be known to both parties."""

    def secret_length(
        self, source: Source, counts: Counts, *, security: Security, leak: float
    ) -> SecretLength:
        """The bound for these counts, with ``leak`` bits disclosed by error correction."""


def _check(counts: Counts, security: Security, leak: float) -> None:
    """Raises ``ConfigError``."""
    instance("counts", counts, Counts)
    instance("security", security, Security)
    within("leak", leak, 0.0, math.inf)


def _scales(transmitter: Transmitter) -> list[float]:
    pairs = zip(transmitter.intensities, transmitter.probabilities, strict=True)
    return [math.exp(k) / p for k, p in pairs]


def _empty_and_single(transmitter: Transmitter) -> tuple[float, float]:
    """tau_0 and tau_1: the probabilities that Alice sends no photon and one."""
    pairs = zip(transmitter.intensities, transmitter.probabilities, strict=True)
    empty = [(k, p * math.exp(-k)) for k, p in pairs]
    return sum([p for _, p in empty]), sum([k * p for k, p in empty])


@dataclass(frozen=True)
class _DecoyProof:
    """The common part of the two decoy proofs: the bounded counts and the length from them."""

    statistics: Statistics = Tight()

    intensities: ClassVar[int]
    signal: ClassVar[int]
    """Number of the brighter of the two intensities that bound the errors of single photons; the
    next one is the dimmer."""

    def secret_length(
        self, source: Source, counts: Counts, *, security: Security, leak: float
    ) -> SecretLength:
        """The bound.

        Raises ``ConfigError`` for a source or counts with another number of intensities.
        """
        if not isinstance(source, Transmitter) or len(source.intensities) != self.intensities:
            raise ConfigError(f"this proof needs a laser with {self.intensities} intensities")
        _check(counts, security, leak)
        if len(counts.key) != self.intensities:
            raise ConfigError(f"this proof needs counts of {self.intensities} intensities")
        sent = _empty_and_single(source)
        vacuum, single = self._photons(source, sent, counts.key, counts.key_errors, security)
        _, single_test = self._photons(source, sent, counts.test, counts.test_errors, security)
        wrong = self.statistics.expectations(source, counts.test_errors, security)
        brighter, dimmer = self.signal, self.signal + 1
        difference = source.intensities[brighter] - source.intensities[dimmer]
        errors = sent[1] * (wrong.upper(brighter) - wrong.lower(dimmer)) / difference
        phase_error = 0.5
        if single > 0.0 and single_test > 0.0:
            phase_error = self.statistics.phase_error(errors, single_test, single, security)
        secret = max(0.0, single) * (1.0 - binary_entropy(phase_error))
        # Counts that no laser makes can bound more single photons than there were detections.
        secret = min(secret, sum(counts.key) - vacuum)
        return SecretLength(
            vacuum=vacuum,
            single=single,
            single_test=single_test,
            single_test_errors=errors,
            phase_error=phase_error,
            leak=leak,
            real=self.statistics.length(vacuum, secret, security) - leak,
        )

    def _photons(
        self,
        source: Transmitter,
        sent: tuple[float, float],
        counts: _Numbers,
        errors: _Numbers,
        security: Security,
    ) -> tuple[float, float]:
        """Lower bounds on the vacuum and single-photon detections of one basis.

        ``sent``: see :func:`_empty_and_single`.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class TwoDecoys(_DecoyProof):
    """Lim et al. 2014, equations 1 to 5: three intensities, the dimmest close to vacuum."""

    uses_key_errors: ClassVar[bool] = False
    intensities: ClassVar[int] = 3
    signal: ClassVar[int] = 1

    def _photons(
        self,
        source: Transmitter,
        sent: tuple[float, float],
        counts: _Numbers,
        errors: _Numbers,
        security: Security,
    ) -> tuple[float, float]:
        """s_0 (eq. 2) and s_1 (eq. 3)."""
        mu_1, mu_2, mu_3 = source.intensities
        tau_0, tau_1 = sent
        n = self.statistics.expectations(source, counts, security)
        vacuum = max(0.0, tau_0 * (mu_2 * n.lower(2) - mu_3 * n.upper(1)) / (mu_2 - mu_3))
        ratio = (mu_2**2 - mu_3**2) / mu_1**2
        inner = n.lower(1) - n.upper(2) - ratio * (n.upper(0) - vacuum / tau_0)
        single = tau_1 * mu_1 * inner / (mu_1 * (mu_2 - mu_3) - mu_2**2 + mu_3**2)
        return vacuum, single


@dataclass(frozen=True)
class OneDecoy(_DecoyProof):
    """Rusca et al. 2018, equations 1 to 6: two intensities; the errors bound the vacuum."""

    uses_key_errors: ClassVar[bool] = True
    intensities: ClassVar[int] = 2
    signal: ClassVar[int] = 0

    def _photons(
        self,
        source: Transmitter,
        sent: tuple[float, float],
        counts: _Numbers,
        errors: _Numbers,
        security: Security,
    ) -> tuple[float, float]:
        """s_0 (eq. 2) and s_1 (eq. 3), the upper bound on s_0 by eq. 5."""
        mu_1, mu_2 = source.intensities
        tau_0, tau_1 = sent
        n = self.statistics.expectations(source, counts, security)
        wrong = self.statistics.expectations(source, errors, security)
        dim, bright = n.lower(1), n.upper(0)
        vacuum = max(0.0, tau_0 * (mu_1 * dim - mu_2 * bright) / (mu_1 - mu_2))
        # An empty pulse shows a wrong bit half of the time, whatever its intensity was meant to be.
        empty = tau_0 * min(wrong.upper(0), wrong.upper(1))
        most = self.statistics.vacuum(empty, sum(counts), security)
        inner = dim - (mu_2**2 * bright + (mu_1**2 - mu_2**2) * most / tau_0) / mu_1**2
        single = tau_1 * mu_1 * inner / (mu_2 * (mu_1 - mu_2))
        return vacuum, single


@dataclass(frozen=True)
class EntangledPairs:
    """BBM92: there are no decoys, because the source is not trusted, and every coincidence counts.

    Without a name for the statistics the length is that of M. Tomamichel, C. C. W. Lim, N. Gisin,
    R. Renner, Nat. Commun. 3, 634 (2012), with its own gap (Serfling's inequality) and price.
    """

    statistics: Statistics | None = Tight()

    uses_key_errors: ClassVar[bool] = False

    def secret_length(
        self, source: Source, counts: Counts, *, security: Security, leak: float
    ) -> SecretLength:
        """The bound; Alice's and Bob's bits of the test basis are compared as a whole."""
        _check(counts, security, leak)
        key, test, wrong = sum(counts.key), sum(counts.test), sum(counts.test_errors)
        phase_error = 0.5
        if key > 0.0 and test > 0.0:
            if self.statistics is not None:
                phase_error = self.statistics.phase_error(wrong, test, key, security)
            else:
                log = math.log(4.0 / security.secrecy)
                gap = math.sqrt((key + test) / (key * test) * (test + 1.0) / test * log)
                phase_error = min(0.5, wrong / test + gap)
        secret = key * (1.0 - binary_entropy(phase_error))
        if self.statistics is not None:
            real = self.statistics.length(0.0, secret, security) - leak
        else:
            real = secret - leak - math.log2(2.0 / (security.secrecy**2 * security.correctness))
        return SecretLength(
            vacuum=0.0,
            single=key,
            single_test=test,
            single_test_errors=wrong,
            phase_error=phase_error,
            leak=leak,
            real=real,
        )


def proof_for(source: Source, finite_key: str = "tight", *, smooth: bool = False) -> FiniteKeyProof:
    """The proof for this kind of source; ``smooth``: see :class:`Tight`.

    Raises ``ConfigError`` for an unknown kind of proof.
    """
    one_of("finite_key", finite_key, FINITE_KEY)
    instance("source", source, Transmitter, PairSource)
    published, tight = finite_key == "published", Tight(smooth)
    if isinstance(source, PairSource):
        return EntangledPairs(None if published else tight)
    if len(source.probabilities) == 3:
        return TwoDecoys(Published(21) if published else tight)
    return OneDecoy(Published(19) if published else tight)


def expected_counts(
    channel: Channel, transmitter: Source, pulses: float, light: Light | None = None
) -> Counts:
    """The average counts of a block of ``pulses`` pulses; ``light``: with this eavesdropper.

    Raises ``ConfigError`` for a number of pulses that cannot be.
    """
    instance("channel", channel, Channel)
    instance("transmitter", transmitter, Transmitter, PairSource)
    within("pulses", pulses, 0.0, sys.float_info.max)
    q = transmitter.key_basis_probability
    pairs = list(zip(transmitter.response(channel, light), transmitter.probabilities, strict=True))
    seen = [pulses * p * gain for (gain, _), p in pairs]
    wrong = [pulses * p * error for (_, error), p in pairs]
    key, test = q**2, (1.0 - q) ** 2
    return Counts(
        key=tuple(key * n for n in seen),
        key_errors=tuple(key * m for m in wrong),
        test=tuple(test * n for n in seen),
        test_errors=tuple(test * m for m in wrong),
    )
