"""Runs a module as ``python -m`` does, in a process with a clock and with threads of its own.

``python -m interop.faults.launch FOLDER MODULE WORD...``: the clock is ahead by as many seconds as
the file ``clock`` in the folder says (:mod:`interop.clock`). While there is a file ``no-threads``,
a new thread is refused as the system refuses it at its limit of tasks (pthread_create(3): EAGAIN).
"""

import _thread
import os
import runpy
import sys
import threading
from pathlib import Path

from interop.clock import follow


def main() -> None:
    folder, module = Path(sys.argv[1]), sys.argv[2]
    flag = folder / "no-threads"
    follow(folder / "clock")
    del sys.argv[:3]
    sys.argv.insert(0, module)
    start = threading._start_new_thread  # type: ignore[attr-defined]

    def limited(*arguments: object) -> int:
        if os.path.exists(flag):
            raise RuntimeError("can't start new thread")
        found: int = start(*arguments)
        return found

    threading._start_new_thread = limited  # type: ignore[attr-defined]
    _thread.start_new_thread = limited  # type: ignore[assignment]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
