"""The part of the result page, from the results of a run and from ``config.json``."""

import json
from collections import defaultdict

from interop.bogo.results import CONFIG, GROUPS, Outcome, Results

__all__ = ["page"]

HEAD = """## BoGo

BoringSSL's protocol tests, with a shim around hybridkex's engine (`interop/bogo/shim.py`). This
part of the page is generated: `python -m interop.bogo RUNNER --page docs/interop.md`.

A test counts as **refused with another alert** if the connection is refused, as it must be, with an
alert that the RFC specifies but the runner does not expect. **Not supported** are tests of features
that hybridkex does not have (the shim's exit code 89). Tests that do not apply are left out before
the run; the reasons are below. A test may be in several groups.
"""


def page(results: Results, version: str) -> str:
    """Markdown; ``version`` says which BoringSSL the runner is from."""
    config = json.loads(CONFIG.read_text())
    lines = [HEAD, f"BoringSSL: {version}.", "", "| group | names | " + _cells(Outcome)]
    lines.append("|---|---|" + "---:|" * len(Outcome))
    for group, counts in results.counts().items():
        numbers = " | ".join(str(count) for count in counts.values())
        lines.append(f"| {group} | `{GROUPS[group]}` | {numbers} |")
    lines += ["", "### Other alerts", "", "| tests | runner sees | because |", "|---|---|---|"]
    for pattern, other in config["OtherAlerts"].items():
        lines.append(f"| `{pattern}` | {other['sees']} | {other['because']} |")
    lines += ["", "### Not supported", "", "| tests | because | asked for by |", "|---:|---|---|"]
    rows = [
        (
            sum(results.unsupported[name] for name in names),
            reason,
            ", ".join(f"`{one}`" for one in names),
        )
        for reason, names in config["NotSupported"].items()
    ]
    lines += [f"| {number} | {reason} | {names} |" for number, reason, names in sorted(rows)[::-1]]
    lines += ["", "### Left out", ""]
    by_reason = defaultdict(list)
    for pattern, reason in config["DisabledTests"].items():
        by_reason[reason].append(f"`{pattern}`")
    for reason, patterns in sorted(by_reason.items()):
        lines.append(f"- {reason}: {', '.join(patterns)}")
    return "\n".join(lines) + "\n"


def _cells(outcomes: type[Outcome]) -> str:
    return " | ".join(outcome.value for outcome in outcomes) + " |"
