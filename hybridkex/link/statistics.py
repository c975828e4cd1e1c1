"""Confidence bounds for the security of finite keys; each fails with at most the given probability.

* :func:`mean_upper`, :func:`mean_lower`: the expectation of a sum of independent events, from how
  many of them happened. W. Hoeffding, J. Am. Stat. Assoc. 58, 13 (1963), theorem 1, in its form
  with the Kullback-Leibler divergence: for ``n`` independent events with the mean probability
  ``p``, and any ``x > p``, ``Pr[share >= x] <= exp(-n D(x || p))`` with
  ``D(x || p) = x ln(x/p) + (1-x) ln((1-x)/(1-p))``, and the same for ``x < p``. Solved for ``p``.
  The usual square root follows from ``D(x || p) >= 2 (x - p)^2``.
* :func:`trials_upper`: how many fair coins were thrown, from how many showed heads; the same
  theorem at ``p = 1/2``.
* :func:`unseen_errors`: how many errors are in the part of a population that was not looked at,
  from the errors in a random sample: the hypergeometric tail itself, inverted.

Counts may be fractions where they are expected values.
"""

import math
from functools import lru_cache

from hybridkex.link.ranges import MOST_EVENTS, finite, probability, whole, within

SAFETY = 1e-12
"""Relative room for the rounding of floating-point numbers, on the safe side."""
CLOSE = 1e-6
"""Newton's method ends with a step that is so short beside the gap between the observed share and
the bound. What is left is of the order of its square, and on the safe side."""
STEPS = 100
TERMS = 60


def binary_entropy(probability: float) -> float:
    """Shannon's h(p) in bits; 0 outside the open interval (0, 1). Raises ``ConfigError``."""
    p = finite("probability", probability)
    return -p * math.log2(p) - (1.0 - p) * math.log2(1.0 - p) if 0.0 < p < 1.0 else 0.0


def _deviance(x: float, mean: float) -> float:
    """``x ln(x / mean) + mean - x`` without cancellation.

    C. Loader, "Fast and accurate computation of binomial probabilities" (2000), with as many terms
    as doubles need.
    """
    v = (x - mean) / (x + mean)
    if abs(v) > 0.02:
        return (x * math.log(x / mean) if x > 0.0 else 0.0) + mean - x
    w = v * v
    series = 1.0 / 3.0 + w * (0.2 + w * (1.0 / 7.0 + w * (1.0 / 9.0 + w / 11.0)))
    return v * (x - mean + 2.0 * x * w * series)


def divergence(x: float, p: float) -> float:
    """D(x || p) in nats, for 0 < p < 1."""
    return _deviance(x, p) + _deviance(1.0 - x, 1.0 - p)


def _first_guess(x: float, goal: float, sign: float) -> float:
    """An estimate, from its series, of where D(x || p) reaches the goal; ``x`` if it would be too
    far.

    """
    variance = x * (1.0 - x)
    spread = math.sqrt(2.0 * variance * goal)
    if spread > 0.3 * min(x, 1.0 - x):
        return x
    third = goal * (1.0 - 13.0 * variance) / (18.0 * variance)
    return x + sign * spread * (1.0 + third) + 2.0 / 3.0 * (1.0 - 2.0 * x) * goal


def mean_upper(seen: float, total: float, failure: float) -> float:
    """The greatest expectation of ``seen`` among ``total`` independent events.

    ``seen`` counts as 0 below 0, and as ``total`` above it. Raises ``ConfigError``.
    """
    seen, total = finite("seen", seen), finite("total", total)
    return upper_of_mean(seen, total, -math.log(probability("failure", failure)))


def mean_lower(seen: float, total: float, failure: float) -> float:
    """The least expectation of ``seen`` among ``total`` independent events.

    ``seen`` counts as ``total`` above it. Raises ``ConfigError``.
    """
    seen, total = finite("seen", seen), finite("total", total)
    return lower_of_mean(seen, total, -math.log(probability("failure", failure)))


def upper_of_mean(seen: float, total: float, nats: float) -> float:
    """:func:`mean_upper` of checked numbers; the failure probability is ``exp(-nats)``."""
    if total <= 0.0:
        return 0.0
    x, goal = min(seen / total, 1.0), nats / total
    if x <= 0.0:
        return -total * math.expm1(-goal) * (1.0 + SAFETY)
    # Not below the root, as D >= 2 (p - x)^2, and D >= (p - x)^2 / 2p.
    p = x + min(math.sqrt(goal / 2.0), goal + math.sqrt(goal * (goal + 2.0 * x)))
    if x > 0.5 or p >= 1.0:  # D(x || p) = D(1 - x || 1 - p)
        rest = lower_of_mean(total - min(seen, total), total, nats)
        return min(total, (total - rest) * (1.0 + SAFETY))
    guess = _first_guess(x, goal, 1.0)
    p = guess if guess > x else p
    for _ in range(STEPS):  # D is convex: Newton's method comes down to the root, never below it
        step = (divergence(x, p) - goal) / ((p - x) / (p * (1.0 - p)))
        p -= step
        if abs(step) <= CLOSE * (p - x):
            break
    return min(total, total * p * (1.0 + SAFETY))


def lower_of_mean(seen: float, total: float, nats: float) -> float:
    """:func:`mean_lower` of checked numbers; the failure probability is ``exp(-nats)``."""
    if total <= 0.0 or seen <= 0.0:
        return 0.0
    x, goal = min(seen / total, 1.0), nats / total
    if x >= 1.0:
        return total * math.exp(-goal) * (1.0 - SAFETY)
    p = x - min(math.sqrt(goal / 2.0), math.sqrt(2.0 * x * goal))  # D >= (p - x)^2 / 2x
    t = math.log(p) if p > 0.0 else -math.inf
    t = max(t, math.log(x) - 1.0 - goal / x)  # all are at or below the root
    if t < -700.0:
        return 0.0
    guess = _first_guess(x, goal, -1.0)
    t = math.log(guess) if guess < x else t
    for _ in range(STEPS):  # D is convex in t = ln p, and falls: Newton's method comes up to it
        p = math.exp(t)
        slope = (x - p) / (1.0 - p)
        step = (divergence(x, p) - goal) / slope if p < x else 0.0
        t += step
        if abs(step) <= CLOSE * slope:
            break
    return total * math.exp(t) * (1.0 - SAFETY)


def trials_upper(heads: float, failure: float) -> float:
    """The greatest number of fair coins of which at most ``heads`` would show heads.

    Raises ``ConfigError``.
    """
    heads = within("heads", heads, 0.0, MOST_EVENTS)
    goal = math.log(1.0 / probability("failure", failure))
    n = 2.0 * heads + 2.0 * goal + 2.0 * math.sqrt(goal * (goal + 2.0 * heads)) + 1.0
    for _ in range(STEPS):  # n D grows with n and is convex: Newton's method comes down to the root
        step = (n * divergence(heads / n, 0.5) - goal) / math.log(2.0 * (1.0 - heads / n))
        n -= step
        if step <= SAFETY * n:
            break
    return n * (1.0 + SAFETY)


# -- sampling without replacement


@lru_cache(maxsize=4096)
def _stirling_error(n: int) -> float:
    """``ln n! - ln(sqrt(2 pi n) (n/e)^n)``."""
    if n < 16:
        return math.lgamma(n + 1.0) - (n + 0.5) * math.log(n) + n - 0.5 * math.log(2.0 * math.pi)
    square = 1.0 / (n * n)
    series = 1.0 / 1260.0 - square * (1.0 / 1680.0 - square / 1188.0)
    return (1.0 / 12.0 - square * (1.0 / 360.0 - square * series)) / n


def _log_binomial(hits: int, trials: int, share: float) -> float:
    """The logarithm of a binomial probability, 0 < share < 1."""
    misses = trials - hits
    if hits == 0:
        return trials * math.log1p(-share)
    if misses == 0:
        return trials * math.log(share)
    errors = _stirling_error(trials) - _stirling_error(hits) - _stirling_error(misses)
    deviances = _deviance(hits, trials * share) + _deviance(misses, trials * (1.0 - share))
    return errors - deviances + 0.5 * math.log(trials / (2.0 * math.pi * hits * misses))


def _tail(seen: int, sample: int, wrong: int, total: int) -> float:
    """An upper bound on the probability of at most ``seen`` wrong ones in a sample.

    Exact but for rounding up to :data:`TERMS` terms; the rest is bounded by a geometric series.
    """
    if seen < max(0, sample - (total - wrong)):
        return 0.0
    if seen >= min(sample, wrong):
        return 1.0
    share = sample / total
    log = (
        _log_binomial(seen, wrong, share)
        + _log_binomial(sample - seen, total - wrong, share)
        - _log_binomial(sample, total, share)
    )
    found, term, ratio = 1.0, 1.0, 1.0
    least = max(0, sample - (total - wrong))
    for i in range(seen, max(least, seen - TERMS), -1):
        ratio = i * (total - wrong - sample + i) / ((wrong - i + 1) * (sample - i + 1))
        term *= ratio
        found += term
        if term < 1e-9 * found:
            break
    if seen - least > TERMS:
        # Ratios fall on the way down, so the last one bounds those to come.
        found += term * ratio / (1.0 - ratio) if ratio < 1.0 else math.inf
    else:
        found += 1e-9 * found
    return min(1.0, math.exp(log) * found)


def unseen_errors(unseen: int, sample: int, seen: int, failure: float) -> int:
    """The most errors among ``unseen`` items, if a random sample of ``sample`` had ``seen``.

    The greatest ``E`` with ``Pr[H <= seen] >= failure`` for a hypergeometric ``H``: so many wrong
    ones in a sample of ``sample`` out of ``unseen + sample``, of which ``seen + E`` are wrong.
    Whatever the number of errors in the population, the bound is too low with at most the
    probability ``failure``. It does not fall when ``seen`` grows. Raises ``ConfigError``.
    """
    for name, value in (("unseen", unseen), ("sample", sample), ("seen", seen)):
        within(name, whole(name, value), 0, MOST_EVENTS)
    unseen, sample, seen = int(unseen), int(sample), int(seen)
    failure = probability("failure", failure)
    if seen >= sample or unseen <= 0:
        return max(0, unseen)
    total, failure = unseen + sample, failure * (1.0 - 1e-6)

    def possible(errors: int) -> bool:
        return _tail(seen, sample, seen + errors, total) >= failure

    low = min(unseen, seen * unseen // sample)
    if _tail(seen, sample, seen + low, total) < failure:
        low = 0
    # Twice the distance that Serfling's inequality would have it at.
    reach = math.sqrt(total * (sample + 1.0) * math.log(1.0 / failure) / (2.0 * unseen)) / sample
    high = min(unseen, low + math.ceil(2.0 * unseen * reach) + 2)
    while _tail(seen, sample, seen + high, total) >= failure:
        if high == unseen:
            return unseen
        low, high = high, min(unseen, 2 * high)
    # Between the two by interpolation: the root of the tail's logarithm is nearly a straight line.
    goal = math.sqrt(-math.log(failure))
    ends = [0.0, 0.0]
    for side, errors in enumerate((low, high)):
        tail = _tail(seen, sample, seen + errors, total)
        ends[side] = math.sqrt(-math.log(max(tail, 1e-300))) - goal
    stuck = 0
    while high - low > 1:
        if stuck > 1:
            middle = (low + high) // 2
        else:
            part = ends[0] / (ends[0] - ends[1]) if ends[0] != ends[1] else 0.5
            middle = min(high - 1, max(low + 1, low + round((high - low) * part)))
        tail = _tail(seen, sample, seen + middle, total)
        far = math.sqrt(-math.log(max(tail, 1e-300))) - goal
        before = high - low
        if tail >= failure:
            low, ends[0] = middle, far
        else:
            high, ends[1] = middle, far
        stuck = stuck + 1 if 2 * (high - low) > before and stuck <= 1 else 0
    return low
