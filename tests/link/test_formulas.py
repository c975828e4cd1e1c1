"""The closed forms, written a second time from the papers, in decimal arithmetic of 50 digits.

Each is compared at 200 random points. The tight bounds are in
``tests/link/test_bounds.py``.
"""

from decimal import Decimal, localcontext
from typing import Any

import numpy as np
import pytest

from hybridkex.link import asymptotic
from hybridkex.link.finite_key import (
    Counts,
    OneDecoy,
    Published,
    SecretLength,
    Security,
    TwoDecoys,
    expected_counts,
)
from hybridkex.link.physics import Channel, Transmitter

POINTS = 200
TOLERANCE = 1e-9
HALF = Decimal("0.5")


@pytest.fixture(autouse=True)
def _fifty_digits() -> Any:
    with localcontext() as context:
        context.prec = 50
        yield


def log2(x: Decimal) -> Decimal:
    return x.ln() / Decimal(2).ln()


def h(x: Decimal) -> Decimal:
    return -x * log2(x) - (1 - x) * log2(1 - x) if 0 < x < 1 else Decimal(0)


def close(found: float, expected: Decimal, *, scale: Decimal | None = None) -> bool:
    """Whether they agree, relative to ``scale`` where terms cancel each other."""
    return abs(Decimal(found) - expected) <= Decimal(TOLERANCE) * abs(scale or expected)


def any_channel(draw: np.random.Generator, *, afterpulses: bool = False) -> Channel:
    return Channel(
        distance_km=draw.uniform(0, 120),
        attenuation_db_per_km=draw.uniform(0.15, 0.3),
        receiver_efficiency=draw.uniform(0.03, 0.9),
        dark_count_probability=10 ** draw.uniform(-9, -5.5),
        misalignment=draw.uniform(0.001, 0.06),
        afterpulse_probability=draw.uniform(0, 0.05) if afterpulses else 0.0,
    )


def eta_of(channel: Channel) -> Decimal:
    loss = Decimal(channel.attenuation_db_per_km) * Decimal(channel.distance_km) / 10
    return Decimal(channel.receiver_efficiency) * Decimal(10) ** -loss


# -- X. Ma, B. Qi, Y. Zhao, H.-K. Lo, PRA 72, 012326 (2005)


def test_infinitely_long_keys() -> None:
    draw = np.random.default_rng(2005)
    for _ in range(POINTS):
        channel = any_channel(draw)
        mu, nu, weaker = draw.uniform(0.2, 0.9), draw.uniform(0.02, 0.15), draw.uniform(0, 0.01)
        f = draw.uniform(1.0, 1.3)
        eta, y0 = eta_of(channel), 2 * Decimal(channel.dark_count_probability)
        e_d, factor = Decimal(channel.misalignment), Decimal(f)

        def q(k: Decimal, y0: Decimal = y0, eta: Decimal = eta) -> Decimal:
            return y0 + 1 - (-eta * k).exp()

        def eq(k: Decimal, y0: Decimal = y0, eta: Decimal = eta, e_d: Decimal = e_d) -> Decimal:
            return HALF * y0 + e_d * (1 - (-eta * k).exp())

        u, v, w = Decimal(mu), Decimal(nu), Decimal(weaker)
        assert close(asymptotic.gain(channel, mu), q(u))
        assert close(asymptotic.error_rate(channel, mu), eq(u) / q(u))

        y1 = y0 + eta - y0 * eta
        infinite = asymptotic.infinite_decoy(channel)
        assert close(infinite.yield_1, y1)
        assert close(infinite.error_1, (HALF * y0 + e_d * eta) / y1)
        leak = q(u) * factor * h(eq(u) / q(u))
        rate = HALF * (y1 * u * (-u).exp() * (1 - h((HALF * y0 + e_d * eta) / y1)) - leak)
        assert close(asymptotic.infinite_decoy_rate(channel, mu, f=f), rate, scale=leak)

        for second in (Decimal(0), w):
            low = (v * q(second) * second.exp() - second * q(v) * v.exp()) / (v - second)
            y0_low = max(low, Decimal(0))
            y1_low = (u / (u * v - u * second - v**2 + second**2)) * (
                q(v) * v.exp()
                - q(second) * second.exp()
                - (v**2 - second**2) / u**2 * (q(u) * u.exp() - y0_low)
            )
            e1_up = (eq(v) * v.exp() - eq(second) * second.exp()) / ((v - second) * y1_low)
            found = asymptotic.decoy_bounds(channel, mu, nu, float(second))
            assert close(found.yield_1, y1_low, scale=q(v) / (v - second))
            assert close(found.error_1, e1_up, scale=max(e1_up, HALF * q(second) / (v * y1_low)))
            if second == 0:
                single = y1_low * u * (-u).exp()
                secret = single * (1 - h(e1_up)) if e1_up < HALF else Decimal(0)
                weak = asymptotic.vacuum_weak_rate(channel, mu, nu, f=f)
                assert close(weak, HALF * (secret - leak), scale=leak)


# -- what Lim 2014 and Rusca 2018 share


def tau(n: int, mu: list[Decimal], p: list[Decimal]) -> Decimal:
    return sum((b * (-a).exp() * a**n for a, b in zip(mu, p, strict=True)), Decimal(0))


def delta(total: Decimal, terms: int, eps: Decimal) -> Decimal:
    return (total / 2 * (terms / eps).ln()).sqrt()


def plus_minus(
    n: list[Decimal], mu: list[Decimal], p: list[Decimal], terms: int, eps: Decimal, *, clamp: bool
) -> tuple[list[Decimal], list[Decimal]]:
    wide = delta(sum(n, Decimal(0)), terms, eps)
    rows = list(zip(n, mu, p, strict=True))
    low = [a.exp() / b * (max(c - wide, Decimal(0)) if clamp else c - wide) for c, a, b in rows]
    return low, [a.exp() / b * (c + wide) for c, a, b in rows]


def gamma(a: Decimal, b: Decimal, c: Decimal, d: Decimal, terms: int) -> Decimal:
    inner = log2((c + d) / (c * d * (1 - b) * b) * terms**2 / a**2)
    return ((c + d) * (1 - b) * b / (c * d * Decimal(2).ln()) * inner).sqrt()


def lim(
    mu: list[Decimal], p: list[Decimal], counts: Counts, eps: Decimal, *, clamp: bool
) -> dict[str, Decimal]:
    def photons(n: tuple[float, ...]) -> tuple[Decimal, Decimal]:
        low, up = plus_minus([Decimal(c) for c in n], mu, p, 21, eps, clamp=clamp)
        s0 = tau(0, mu, p) * (mu[1] * low[2] - mu[2] * up[1]) / (mu[1] - mu[2])
        s0 = max(s0, Decimal(0))
        inside = low[1] - up[2]
        inside -= (mu[1] ** 2 - mu[2] ** 2) / mu[0] ** 2 * (up[0] - s0 / tau(0, mu, p))
        below = mu[0] * (mu[1] - mu[2]) - mu[1] ** 2 + mu[2] ** 2
        return s0, tau(1, mu, p) * mu[0] * inside / below

    s_x0, s_x1 = photons(counts.key)
    _, s_z1 = photons(counts.test)
    errors = [Decimal(m) for m in counts.test_errors]
    low, up = plus_minus(errors, mu, p, 21, eps, clamp=clamp)
    v_z1 = tau(1, mu, p) * (up[1] - low[2]) / (mu[1] - mu[2])
    return {"vacuum": s_x0, "single": s_x1, "single_test": s_z1, "single_test_errors": v_z1}


def rusca(
    mu: list[Decimal], p: list[Decimal], counts: Counts, eps: Decimal, *, clamp: bool
) -> dict[str, Decimal]:
    def photons(n: tuple[float, ...], m: tuple[float, ...]) -> tuple[Decimal, Decimal]:
        seen, wrong = [Decimal(c) for c in n], [Decimal(c) for c in m]
        low, up = plus_minus(seen, mu, p, 19, eps, clamp=clamp)
        s0_low = tau(0, mu, p) / (mu[0] - mu[1]) * (mu[0] * low[1] - mu[1] * up[0])
        wide = delta(sum(wrong, Decimal(0)), 19, eps)
        s0_up = min(
            2 * (tau(0, mu, p) * a.exp() / b * (c + wide) + delta(sum(seen, Decimal(0)), 19, eps))
            for a, b, c in zip(mu, p, wrong, strict=True)
        )
        inside = low[1] - mu[1] ** 2 / mu[0] ** 2 * up[0]
        inside -= (mu[0] ** 2 - mu[1] ** 2) / mu[0] ** 2 * s0_up / tau(0, mu, p)
        s1 = tau(1, mu, p) * mu[0] / (mu[1] * (mu[0] - mu[1])) * inside
        return max(s0_low, Decimal(0)), s1

    s_z0, s_z1 = photons(counts.key, counts.key_errors)
    _, s_x1 = photons(counts.test, counts.test_errors)
    errors = [Decimal(m) for m in counts.test_errors]
    low, up = plus_minus(errors, mu, p, 19, eps, clamp=clamp)
    v_x1 = tau(1, mu, p) / (mu[0] - mu[1]) * (up[0] - low[1])
    return {"vacuum": s_z0, "single": s_z1, "single_test": s_x1, "single_test_errors": v_x1}


def with_length(
    found: dict[str, Decimal], terms: int, leak: float, eps: Decimal, eps_cor: Decimal
) -> dict[str, Decimal]:
    """Equation 1 of both papers."""
    rate = found["single_test_errors"] / found["single_test"]
    phi = HALF
    if rate < 1:
        phi = rate + gamma(eps, rate, found["single_test"], found["single"], terms)
        phi = min(phi, HALF)
    real = found["vacuum"] + found["single"] * (1 - h(phi)) - Decimal(leak)
    real -= 6 * log2(terms / eps) + log2(2 / eps_cor)
    return found | {"phase_error": phi, "real": real}


def agrees(found: SecretLength, expected: dict[str, Decimal], detections: float) -> None:
    # Estimates are differences of counts; what doubles lose there is in proportion to the counts.
    lost = Decimal(detections) * Decimal("1e-12")
    for name, value in expected.items():
        assert close(getattr(found, name), value, scale=abs(value) + lost / Decimal(TOLERANCE)), (
            name
        )


@pytest.mark.parametrize("clamp", [True, False])
@pytest.mark.parametrize(("kinds", "terms"), [(3, 21), (2, 19)])
def test_published_lengths(kinds: int, terms: int, clamp: bool) -> None:
    """C. C. W. Lim et al., PRA 89, 022307 (2014); D. Rusca et al., APL 112, 171104 (2018)."""
    draw = np.random.default_rng([kinds, clamp])
    points = keys = 0
    while points < POINTS:
        p = draw.uniform(0.2, 0.6), draw.uniform(0.1, 0.3)
        source = Transmitter(
            intensities=(draw.uniform(0.4, 0.8), draw.uniform(0.1, 0.3), 2e-4)[:kinds],
            probabilities=(*p, 1 - sum(p)) if kinds == 3 else (p[0], 1 - p[0]),
            key_basis_probability=draw.uniform(0.5, 0.95),
        )
        channel = any_channel(draw, afterpulses=True)
        average = expected_counts(channel, source, 10 ** draw.uniform(8, 12))
        counts = Counts(
            **{
                name: tuple(float(value) for value in draw.poisson(getattr(average, name)))
                for name in ("key", "key_errors", "test", "test_errors")
            }
        )
        security = Security(
            secrecy=10 ** -draw.uniform(3, 15), correctness=10 ** -draw.uniform(5, 15)
        )
        leak = draw.uniform(0, 0.4) * sum(counts.key)
        method = (TwoDecoys if kinds == 3 else OneDecoy)(Published(terms, clamp=clamp))
        found = method.secret_length(source, counts, security=security, leak=leak)
        mu, shares = ([Decimal(x) for x in s] for s in (source.intensities, source.probabilities))
        eps, eps_cor = Decimal(security.secrecy), Decimal(security.correctness)
        expected = (lim if kinds == 3 else rusca)(mu, shares, counts, eps, clamp=clamp)
        if min(expected["single"], expected["single_test"]) <= 0:
            assert found.phase_error == 0.5  # too few detections for any key
            continue
        expected = with_length(expected, terms, leak, eps, eps_cor)
        agrees(found, expected, sum(counts.key))
        points += 1
        keys += expected["real"] > 0
    assert keys > POINTS // 4


def test_expected_counts() -> None:
    """Lim et al. 2014, section IV, with the transmittance of the whole system in the errors."""
    draw = np.random.default_rng(4)
    for _ in range(POINTS):
        channel = any_channel(draw, afterpulses=True)
        source = Transmitter(
            intensities=(draw.uniform(0.4, 0.9), draw.uniform(0.05, 0.3)),
            probabilities=(0.6, 0.4),
            key_basis_probability=draw.uniform(0.1, 0.9),
        )
        pulses = 10 ** draw.uniform(6, 12)
        found = expected_counts(channel, source, pulses)
        eta, dark = eta_of(channel), Decimal(channel.dark_count_probability)
        ap, basis = Decimal(channel.afterpulse_probability), Decimal(source.key_basis_probability)
        for i, (mean, share) in enumerate(
            zip(source.intensities, source.probabilities, strict=True)
        ):
            lost = (-eta * Decimal(mean)).exp()
            click = 1 - (1 - 2 * dark) * lost
            wrong = dark + Decimal(channel.misalignment) * (1 - lost) + ap * click / 2
            sent = Decimal(pulses) * Decimal(share)
            assert close(found.key[i], sent * basis**2 * click * (1 + ap))
            assert close(found.key_errors[i], sent * basis**2 * wrong)
            assert close(found.test[i], sent * (1 - basis) ** 2 * click * (1 + ap))
            assert close(found.test_errors[i], sent * (1 - basis) ** 2 * wrong)
