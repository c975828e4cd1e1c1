"""Runs a module as ``python -m`` does, in a process with a clock and with threads of its own.

``python -m interop.faults.launch FOLDER MODULE WORD...``: the clock is ahead by as many seconds as
the file ``clock`` in the folder says (:mod:`interop.clock`). While there is a file ``no-threads``,
a new thread is refused as the system refuses it at its limit of tasks (pthread_create(3): EAGAIN).
"""

import _thread
import runpy
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from interop.clock import follow

STARTS: Final = (
    (threading, "_start_joinable_thread"),
    (threading, "_start_new_thread"),
    (_thread, "start_new_thread"),
)
"""What starts a thread; ``threading`` has the first from Python 3.13 on, and the second before."""


def _limited(start: Callable[..., Any], flag: Path) -> Callable[..., Any]:
    def limited(*arguments: object, **options: object) -> Any:
        if flag.exists():
            raise RuntimeError("can't start new thread")
        return start(*arguments, **options)

    return limited


def main() -> None:
    folder, module = Path(sys.argv[1]), sys.argv[2]
    flag = folder / "no-threads"
    follow(folder / "clock")
    del sys.argv[:3]
    sys.argv.insert(0, module)
    for owner, name in STARTS:
        start = getattr(owner, name, None)
        if start is not None:
            setattr(owner, name, _limited(start, flag))
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
