"""Cut the traces of RFC 8448 out of its text: ``python parse.py rfc8448.txt`` writes the JSON here.

Every step of a trace is kept, in order and with all of its values; nothing is computed. A value
whose length is not the one that the RFC states ends the run.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

SECTIONS = {
    3: "simple_1rtt",
    4: "resumed_0rtt",
    5: "hello_retry_request",
    6: "client_authentication",
    7: "compatibility_mode",
}

PAGE_BREAK = re.compile(r"\n+Thomson +Informational +\[Page \d+\]\n\f?\n*RFC 8448 .*\n\n\n?")
HEADING = re.compile(r"^(\d+)\.  (\S.*)$", re.MULTILINE)
STEP = re.compile(r"^   \{(client|server)\}  ", re.MULTILINE)
VALUE = re.compile(r"(?m)^      ([A-Za-z ]+?)(?: \((\d+) octets\))?:  ")


def values_of(text: str) -> dict[str, str]:
    """The named values of a step, in hexadecimal."""
    values = {}
    pieces = VALUE.split(text)
    for name, length, body in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
        digits = "" if body.strip() in {"(empty)", "0 (all zero octets)"} else body
        value = bytes.fromhex("".join(digits.split()))
        if len(value) != int(length or 0):
            raise ValueError(f"{name} has {len(value)} bytes, not {length}")
        values[name] = value.hex()
    return values


def steps_of(text: str) -> list[dict[str, Any]]:
    """The steps of one section."""
    pieces = STEP.split(text)[1:]
    steps = []
    for role, body in zip(pieces[0::2], pieces[1::2], strict=True):
        title, _, rest = body.partition("\n\n")
        action, _, same_as = " ".join(title.split()).rstrip(":").partition(" (same as ")
        step: dict[str, Any] = {"by": role, "action": action}
        if same_as:
            step["same_as"] = same_as.rstrip(")")
        steps.append(step | values_of(rest))
    return steps


def main() -> None:
    """Write one file per trace beside this script."""
    text = PAGE_BREAK.sub("\n", Path(sys.argv[1]).read_text(encoding="ascii"))
    pieces = HEADING.split(text)
    for number, title, body in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
        if name := SECTIONS.get(int(number)):
            trace = {"section": int(number), "title": title, "steps": steps_of(body)}
            path = Path(__file__).with_name(f"{name}.json")
            path.write_text(json.dumps(trace, indent=1) + "\n", encoding="ascii")


if __name__ == "__main__":
    main()
