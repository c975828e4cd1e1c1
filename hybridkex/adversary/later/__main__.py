"""``python -m hybridkex.adversary.later FOLDER``: attack the recordings in a folder.

Writes one JSON object a line to standard output: ``progress`` while a computation is long, then
``case`` and ``verdicts`` for each sub-folder with recordings. ``knowledge.py`` says what the folder
may hold.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from hybridkex.adversary.later.decrypt import Adversary
from hybridkex.adversary.later.knowledge import Knowledge
from hybridkex.adversary.later.reading import Connection, read_capture
from hybridkex.errors import HybridkexError


def _cases(folder: Path) -> Iterator[Path]:
    return iter(sorted({capture.parent for capture in folder.glob("*/*.pcapng")}))


def attack_case(folder: Path, case: Path) -> dict[str, object]:
    """The verdicts on one sub-folder, by an adversary who has seen no other."""
    knowledge = Knowledge.from_folder(folder)
    connections: list[Connection] = []
    for capture in sorted(case.glob("*.pcapng")):
        found, others = read_capture(capture)
        connections.extend(found)
        for flow in others:
            knowledge.overheard.extend(flow.stream(from_client=side) for side in (True, False))
    adversary = Adversary(knowledge, lambda text: _say({"progress": text}))
    verdicts = adversary.attack(connections)
    return {"case": case.name, "verdicts": [verdict.as_json() for verdict in verdicts]}


def _say(line: dict[str, object]) -> None:
    print(json.dumps(line), flush=True)


def main() -> int:
    """Attack every case of the folder that the command line names."""
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        print("usage: python -m hybridkex.adversary.later FOLDER", file=sys.stderr)
        return 2
    folder = Path(sys.argv[1])
    try:
        for case in _cases(folder):
            _say(attack_case(folder, case))
    except HybridkexError as error:
        print(f"hybridkex adversary: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
