"""The figures of fault runs: ``docs/data/kme-faults.json``, and the table in ``docs/kme.md``."""

import json
from pathlib import Path
from typing import Any, Final

from hybridkex.files import PUBLIC, write_files
from interop.kme.run import Outcome, Plan

__all__ = ["PAGE", "note", "table", "write_page"]

DOCS: Final = Path(__file__).parents[2] / "docs"
DATA: Final = DOCS / "data" / "kme-faults.json"
PAGE: Final = DOCS / "kme.md"
BEGIN: Final = "<!-- fault runs: python -m interop.kme --docs -->"
END: Final = "<!-- end of the fault runs -->"
NAMES: Final = {
    "kill": "kill -9 of a process",
    "stop": "SIGSTOP of a process, longer than its peers' time limits and its reservations",
    "cut": "cut network between the sites",
    "clock": "clock a day off",
    "full_disk": "full disk under a process",
    "read_only": "read-only store files",
    "kill_database": "kill -9 of PostgreSQL",
    "stop_database": "SIGSTOP of PostgreSQL, longer than the time limits",
    "full_database": "full disk under PostgreSQL",
}


def note(plan: Plan, outcome: Outcome, seconds: float) -> None:
    """Add a run to the data. A run with the same store and seed is replaced."""
    runs = [one for one in _runs() if (one["store"], one["seed"]) != (plan.store, plan.seed)]
    verdict = outcome.verdict
    runs.append(
        {
            "store": plan.store,
            "seed": plan.seed,
            "processes": plan.processes if plan.store == "postgresql" else 1,
            "seconds": round(seconds),
            "faults": dict(sorted(outcome.faults.items())),
            "calls": verdict.calls,
            "drawn": verdict.drawn,
            "collected": verdict.collected,
            "lost_to_slave": verdict.lost,
            "open": verdict.open,
            "unanswered_draws": verdict.unanswered,
            "left_the_stock": outcome.left,
            "violations": len(verdict.violations),
        }
    )
    runs.sort(key=lambda one: (one["store"], one["seed"]))
    lines = ",\n".join(json.dumps(one) for one in runs)
    write_files({DATA: (f"[\n{lines}\n]\n".encode(), PUBLIC)})


def _runs() -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = json.loads(DATA.read_text()) if DATA.exists() else []
    return runs


def table() -> str:
    """The sums of all runs, as a table in Markdown."""
    stores = {
        name: [one for one in _runs() if one["store"] == store]
        for name, store in (("SQLite", "sqlite"), ("PostgreSQL", "postgresql"))
    }
    rows = [("", *stores), ("---", *("---:" for _ in stores))]

    def row(name: str, values: list[str]) -> None:
        rows.append((name, *values))

    for fault, name in NAMES.items():
        counts = [sum(one["faults"].get(fault, 0) for one in runs) for runs in stores.values()]
        row(name, [f"{count:,}" if count else "" for count in counts])
    sums = {
        field: [sum(one[field] for one in runs) for runs in stores.values()]
        for field in (
            *("calls", "drawn", "collected", "violations", "lost_to_slave", "left_the_stock"),
            "unanswered_draws",
        )
    }
    for name, field in (
        ("calls of SAEs", "calls"),
        ("of these, draws without an answer or with 503", "unanswered_draws"),
        ("keys drawn by a master", "drawn"),
        ("keys collected by a slave", "collected"),
        ("**violations**", "violations"),
    ):
        row(name, [f"{value:,}" for value in sums[field]])
    parts = list(zip(sums["left_the_stock"], sums["drawn"], sums["lost_to_slave"], strict=True))
    both, slave = zip(*((_share(n - m, n), _share(s, m)) for n, m, s in parts), strict=True)
    row("keys lost to both sides, of those that left the stock", list(both))
    row("keys that a master got and its slave did not, of those drawn", list(slave))
    faults = [sum(sum(one["faults"].values()) for one in runs) for runs in stores.values()]
    lost = [n - m + s for n, m, s in parts]
    row(
        "lost keys for each fault",
        [
            f"{keys / number:.2f}" if number else ""
            for keys, number in zip(lost, faults, strict=True)
        ],
    )
    return "\n".join(f"| {' | '.join(one)} |" for one in rows)


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({part / whole:.2%})" if whole else ""


def write_page() -> None:
    """Put the table into the page."""
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    new = f"{before}{BEGIN}\n{table()}\n{END}{after}"
    write_files({PAGE: (new.encode(), PUBLIC)})
