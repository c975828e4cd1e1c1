"""The search of J. A. Nelder and R. Mead, Computer Journal 7, 308 (1965).

Steps, coefficients and the first simplex are those of ``scipy.optimize.minimize``, and the result
has the same bits. That takes 0.3 s to load, and more time for each step.
"""

from collections.abc import Callable

Point = list[float]
MOST_STEPS = 1500


def minimum(
    function: Callable[[Point], float], start: Point, *, near: float, flat: float
) -> tuple[float, Point]:
    """The least value found, and its place.

    The search ends when no corner of the simplex is further than ``near`` from the best one in any
    coordinate, and no value further than ``flat``; or after :data:`MOST_STEPS`.
    """
    corners = [start]
    for place, one in enumerate(start):
        corners.append([*start[:place], 1.05 * one if one else 0.00025, *start[place + 1 :]])
    simplex = [(function(corner), corner) for corner in corners]
    simplex.sort(key=_value)
    for _ in range(1, MOST_STEPS):
        (least, best), (worst, last) = simplex[0], simplex[-1]
        if all(
            abs(value - least) <= flat
            and all(abs(x - y) <= near for x, y in zip(corner, best, strict=True))
            for value, corner in simplex[1:]
        ):
            break
        columns = zip(*(corner for _, corner in simplex[:-1]), strict=True)
        pairs = [(sum(column) / len(start), x) for column, x in zip(columns, last, strict=True)]
        reflected = [2.0 * middle - x for middle, x in pairs]
        value = function(reflected)
        found = value, reflected
        if value < least:
            further = [3.0 * middle - 2.0 * x for middle, x in pairs]
            found = min(found, (function(further), further), key=_value)
            moved = True
        elif value < simplex[-2][0]:
            moved = True
        elif value < worst:
            nearer = [1.5 * middle - 0.5 * x for middle, x in pairs]
            found = function(nearer), nearer
            moved = found[0] <= value
        else:
            inside = [0.5 * middle + 0.5 * x for middle, x in pairs]
            found = function(inside), inside
            moved = found[0] < worst
        if moved:
            simplex[-1] = found
        else:
            for number, (_, corner) in enumerate(simplex[1:], 1):
                halfway = [y + 0.5 * (x - y) for x, y in zip(corner, best, strict=True)]
                simplex[number] = function(halfway), halfway
        simplex.sort(key=_value)
    return simplex[0]


def _value(corner: tuple[float, Point]) -> float:
    return corner[0]
