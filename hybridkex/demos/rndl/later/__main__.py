"""``python -m hybridkex.demos.rndl.later FOLDER ...``: attack the recordings in folders.

Each folder belongs to one adversary, and each adversary is a separate process: this one for one
folder, a fork for each of several. A fork has the code and none of the data.

Writes one JSON object a line to standard output: ``progress`` while a computation is long, then
``case`` and ``verdicts`` for each sub-folder with recordings, all with the ``folder``'s name.
``knowledge.py`` says what a folder may hold.
"""

import os
import sys
from pathlib import Path

from hybridkex.demos.rndl.later.decrypt import Adversary
from hybridkex.demos.rndl.later.knowledge import Knowledge
from hybridkex.demos.rndl.later.reading import Connection, read_capture
from hybridkex.errors import HybridkexError
from hybridkex.text import json_line


def _attack_folder(folder: Path) -> int:
    """Do one adversary's work; returns the exit status."""

    def emit(line: dict[str, object]) -> None:
        print(json_line({"folder": folder.name, **line}), flush=True)

    try:
        stolen = Knowledge.from_folder(folder)
        for case in sorted({capture.parent for capture in folder.glob("*/*.pcapng")}):
            # Each case is attacked without knowledge of any other case.
            knowledge = stolen.copy()
            connections: list[Connection] = []
            for capture in sorted(case.glob("*.pcapng")):
                found, others = read_capture(capture)
                connections.extend(found)
                for flow in others:
                    knowledge.overheard += [flow.stream(from_client=x) for x in (True, False)]
            adversary = Adversary(knowledge, lambda text: emit({"progress": text}))
            verdicts = [verdict.as_json() for verdict in adversary.attack(connections)]
            emit({"case": case.name, "verdicts": verdicts})
    except HybridkexError as error:
        print(f"hybridkex adversary: {error}", file=sys.stderr)
        return 1
    return 0


def _in_a_copy(folder: Path) -> int:
    """Do the same in a separate process, which ends with the work."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        status = _attack_folder(folder)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def main() -> int:
    folders = [Path(name) for name in sys.argv[1:]]
    if not folders or not all(folder.is_dir() for folder in folders):
        print("usage: python -m hybridkex.demos.rndl.later FOLDER ...", file=sys.stderr)
        return 2
    try:
        if len(folders) == 1:
            return _attack_folder(folders[0])
        return max(abs(_in_a_copy(folder)) for folder in folders)
    except BrokenPipeError:
        # The reader has left (``| head``). The interpreter flushes once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
