"""Draws the key schedules of docs/record-now-decrypt-later.md from a report.

python docs/pictures/rndl.py REPORT.json, where ``hybridkex rndl --json REPORT.json`` made it.
"""

import json
import sys
from pathlib import Path

from hybridkex.demos.rndl.pictures import key_schedule, standalone

PICTURES = {
    "rndl-hybrid-read.svg": ("x25519mlkem768", "both", 0),
    "rndl-qkd-safe.svg": ("x25519mlkem768-qkd", "both", 0),
    "rndl-ticket-read.svg": ("x25519mlkem768-qkd", "ticket-key-both", 1),
}
"""File, configuration, adversary, and which of the two connections."""

report = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
for name, (configuration, adversary, number) in PICTURES.items():
    (verdicts,) = (
        one["verdicts"]
        for one in report["recordings"]
        if (one["configuration"], one["adversary"]) == (configuration, adversary)
    )
    sessions = [one for one in verdicts if one["capture"] == "session.pcapng"]
    picture = standalone(key_schedule(sessions[number]))
    Path(__file__).with_name(name).write_text(picture + "\n", encoding="utf-8")
