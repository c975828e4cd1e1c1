"""Forks processes that run a module as ``python -m`` does, with a clock and threads of their own.

In the folder where a process runs, the file ``clock`` has the seconds by which its clock is ahead
(:mod:`interop.clock`), and while there is a file ``no-threads``, a new thread is refused as the
system refuses it at its limit of tasks (pthread_create(3): EAGAIN).
"""

import _thread
import gc
import importlib
import os
import runpy
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from interop.clock import follow
from interop.forks import serve

STARTS: Final = (
    (threading, "_start_joinable_thread"),
    (threading, "_start_new_thread"),
    (_thread, "start_new_thread"),
)
"""What starts a thread; ``threading`` has the first from Python 3.13 on, and the second before."""
IMPORTED: Final = (
    *(f"hybridkex.cli.actions.{name}" for name in ("kme", "listen", "receive", "tunnel", "wg_psk")),
    "hybridkex.kme.link_feed",
    "examples.chat.__main__",
)
"""What the processes would import."""


def _limited(start: Callable[..., Any], flag: Path) -> Callable[..., Any]:
    def limited(*arguments: object, **options: object) -> Any:
        if flag.exists():
            raise RuntimeError("can't start new thread")
        return start(*arguments, **options)

    return limited


def main() -> None:
    # Before anything is imported that takes these from their modules.
    follow(Path("clock"))
    for owner, name in STARTS:
        start = getattr(owner, name, None)
        if start is not None:
            setattr(owner, name, _limited(start, Path("no-threads")))
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    request = serve(socket.socket(fileno=int(sys.argv[1])))
    os.chdir(request["folder"])
    os.environ.update(request["environment"])
    sys.argv = [request["module"], *request["words"]]
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
