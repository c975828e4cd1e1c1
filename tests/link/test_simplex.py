"""The search finds what scipy's finds, to the last bit, in as many steps."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.optimize

from hybridkex.link.simplex import Point, minimum


def valley(x: Point) -> float:
    return sum(100.0 * (x[n + 1] - x[n] ** 2) ** 2 + (1.0 - x[n]) ** 2 for n in range(len(x) - 1))


FUNCTIONS: dict[str, Callable[[Point], float]] = {
    "valley": valley,
    "bowl": lambda x: sum((n + 1.0) * (one - n) ** 2 for n, one in enumerate(x)),
    "wall": lambda x: math.inf if x[0] < 0.4 else valley(x),
    "corner": lambda x: sum(abs(one - 0.3) for one in x),
    "steps": lambda x: float(sum(round(3.0 * one) ** 2 for one in x)),
    "flat": lambda x: 1.0,
    "nowhere": lambda x: math.inf,
    "ripples": lambda x: sum(one**2 + math.sin(9.0 * one) for one in x),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("size", [2, 4, 5])
@pytest.mark.parametrize("tolerance", [1e-3, 1e-7])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_the_minimum_is_that_of_scipy(name: str, size: int, tolerance: float) -> None:
    draw = np.random.default_rng(size)
    for _ in range(4):
        start = [0.0, *draw.normal(0.5, 1.0, size - 1).tolist()]
        options = {"maxiter": 1500, "xatol": 0.3 * math.sqrt(tolerance), "fatol": tolerance}
        asked: list[list[Point]] = [[], []]

        def told(x: Point, to: int, asked: list[list[Point]] = asked) -> float:
            asked[to].append(list(x))
            return FUNCTIONS[name](list(x))

        one = scipy.optimize.minimize(told, start, (0,), method="Nelder-Mead", options=options)
        other = minimum(
            lambda x, told=told: told(x, 1),  # type: ignore[misc]
            start,
            near=options["xatol"],
            flat=tolerance,
        )
        assert other == (one.fun, one.x.tolist())
        assert asked[0] == asked[1]
