"""Runs ``test_rndl_legs.py`` on mutants: forks of this process, which has imported all but ours.

A line of standard input names a module, the lines that are run at its end, and a folder; a line of
standard output gives pytest's exit status. What pytest wrote is in ``FOLDER/output``.
"""

import contextlib
import faulthandler
import gc
import importlib
import json
import os
import sys
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

TESTS = "test_rndl_legs.py"
PATIENCE = 50.0
"""Seconds, after which a mutant writes where it stands, and ends."""


class Mutation(Loader):
    """Loads a module as always, then runs lines in it."""

    def __init__(self, name: str, lines: str) -> None:
        self._name = name
        self._lines = lines
        self._loader: Any = None

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != self._name:
            return None
        spec = PathFinder.find_spec(name, path, target)
        assert spec is not None
        self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        exec(self._lines, vars(module))


def forget_ours() -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] in {"hybridkex", "rndl_glue"}:
            del sys.modules[name]


def become(module: str, lines: str, folder: Path) -> int:
    output = (folder / "output").open("wb", buffering=0)
    for standard in (1, 2):
        os.dup2(output.fileno(), standard)
    # Into the file itself: pytest has standard error replaced while a test runs.
    faulthandler.dump_traceback_later(PATIENCE, exit=True, file=output)
    sys.meta_path.insert(0, Mutation(module, lines))  # type: ignore[arg-type]  # finds by its shape
    options = ["-q", "-rf", "-p", "no:cacheprovider", "--noconftest", "-c", os.devnull]
    # With a folder of its own, it does not delete those of earlier runs when it ends.
    folders = ["--rootdir", str(Path.cwd()), "--basetemp", str(folder / "tmp")]
    return pytest.main([*options, *folders, TESTS])


def main() -> None:
    for name in ("rndl_glue", "hybridkex.demos.rndl.matrix", "_pytest.tmpdir", "_pytest.terminal"):
        importlib.import_module(name)
    forget_ours()
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            status = 70
            with contextlib.suppress(BaseException):
                module, lines, folder = json.loads(line)
                status = become(module, lines, Path(folder))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
