"""Runs a module as ``python -m`` does, in a process where no thread can be started on demand.

``python -m interop.faults.launch FLAG MODULE WORD...``: while the file FLAG exists, a new thread is
refused as the system refuses it at its limit of tasks (pthread_create(3): EAGAIN).
"""

import _thread
import os
import runpy
import sys
import threading


def main() -> None:
    flag, module = sys.argv[1:3]
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
