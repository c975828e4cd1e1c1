"""The check of a history finds violations; and a short run of two sites under faults.

``python -m interop.kme`` makes longer runs.
"""

from dataclasses import replace
from typing import Any

import pytest

from interop.kme.figures import BEGIN, END, PAGE, table
from interop.kme.history import Call, check, from_json
from interop.kme.process import Manner
from interop.kme.run import Outcome, Plan, run
from interop.postgres import NoPostgres

DRAW = Call(
    kind="draw", sae="alice", other="bob", began=1, ended=2, outcome="keys", keys={"1": "x"}
)
COLLECT = Call(
    kind="collect", sae="bob", other="alice", began=3, ended=4, outcome="keys", ids=("1",),
    keys={"1": "x"},
)  # fmt: skip


def later(call: Call, **changes: Any) -> Call:
    return replace(call, **{"began": call.began + 10, "ended": call.ended + 10, **changes})


REFUSED = later(COLLECT, outcome="refused", keys={})
UNKNOWN = replace(COLLECT, outcome="unknown", keys={})
UNANSWERED = replace(DRAW, outcome="unknown", keys={})


@pytest.mark.parametrize(
    ("calls", "lost"),
    [
        ([DRAW, COLLECT], 0),
        ([DRAW, COLLECT, REFUSED], 0),
        ([DRAW, UNKNOWN, REFUSED], 1),
        ([DRAW, UNKNOWN, later(COLLECT)], 0),
        ([UNANSWERED, COLLECT], 0),
        # Two keys in one call: what became of one explains the refusal of both.
        ([replace(DRAW, keys={"1": "x", "2": "y"}), COLLECT, replace(REFUSED, ids=("1", "2"))], 1),
        ([DRAW, replace(REFUSED, ids=("1", "7"))], 1),
    ],
)
def test_what_may_happen(calls: list[Call], lost: int) -> None:
    verdict = check([from_json(call.to_json()) for call in calls])
    assert (verdict.violations, verdict.lost) == ([], lost)


@pytest.mark.parametrize(
    ("calls", "said"),
    [
        ([DRAW, later(DRAW)], "given to alice and again to alice"),
        ([DRAW, later(DRAW, sae="carol")], "given to alice and again to carol"),
        ([DRAW, later(DRAW, keys={"2": "x"})], "the same key"),
        ([DRAW, COLLECT, later(COLLECT)], "given to bob twice"),
        ([DRAW, replace(COLLECT, sae="mallory")], "drawn for bob, was given to mallory"),
        ([DRAW, replace(COLLECT, other="carol")], "drawn for bob, was given to bob"),
        ([DRAW, replace(COLLECT, keys={"1": "z"})], "differs between alice and bob"),
        ([COLLECT], "nobody drew it"),
        ([COLLECT, later(UNANSWERED)], "nobody drew it"),
        ([replace(UNANSWERED, other="dave"), COLLECT], "nobody drew it"),
        ([DRAW, REFUSED], "refused to bob, whose master has the keys"),
        ([DRAW, REFUSED, later(REFUSED, outcome="unknown")], "refused to bob"),
    ],
)
def test_what_may_not(calls: list[Call], said: str) -> None:
    verdict = check([from_json(call.to_json()) for call in calls])
    assert len(verdict.violations) == 1
    assert said in verdict.violations[0]


def test_the_page_has_the_figures_of_the_runs() -> None:
    assert f"{BEGIN}\n{table()}\n{END}" in PAGE.read_text()


QUICK = Plan(seed=19, seconds=5, at_once=2, pairs=2, lasts=0.3, manner=Manner(quick=True))


def outcome_of(store: str, **changes: Any) -> Outcome:
    if store == "postgresql":
        pytest.importorskip("psycopg")
    try:
        return run(replace(QUICK, store=store, **changes))
    except NoPostgres as reason:
        pytest.skip(str(reason))


@pytest.mark.slow
@pytest.mark.parametrize("store", ["postgresql", "sqlite"])
def test_two_sites_under_faults(store: str) -> None:
    outcome = outcome_of(store)
    assert outcome.verdict.violations == []
    assert outcome.verdict.collected > 50
    assert len(outcome.faults) >= 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("store", "mutant", "kinds", "seconds"),
    [
        ("postgresql", "answer-early", ("kill_database",), 5.0),
        ("sqlite", "answer-early", ("kill",), 2.0),
        ("sqlite", "forget-deliveries", ("clock",), 2.0),
    ],
)
def test_a_faulty_kme_is_found(
    store: str, mutant: str, kinds: tuple[str, ...], seconds: float
) -> None:
    """What it says is lost only if the moment of a fault suits: there are several short runs."""
    manner = Manner(quick=True, mutant=mutant)
    found: list[str] = []
    for seed in range(12):
        plan = {"seconds": seconds, "at_once": 0.3, "kinds": kinds, "manner": manner, "seed": seed}
        found = outcome_of(store, **plan).verdict.violations
        if found:
            break
    assert any("again" in one or "twice" in one or "refused" in one for one in found)
