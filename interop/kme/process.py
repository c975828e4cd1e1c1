"""KME processes that start in a few hundredths of a second, as a fault run kills thousands of them.

Each is forked from a server process that has imported everything. Its clock can be set; its time
limits may be short, so that a fault of a second affects it as half a minute affects a KME in
service; and it may be a mutant (:mod:`interop.kme.mutants`).
"""

import contextlib
import multiprocessing
import os
import sys
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Final

from interop.clock import follow
from interop.kme.mutants import MUTANTS

__all__ = ["QUICK_LIMITS", "Manner", "start"]

QUICK_LIMITS: Final = """
peer_timeout = 0.3
handshake_timeout = 1.0
http = { request = 1.0, handler = 0.9, idle = 60.0 }
"""
"""The time limits that are settings, for :attr:`Manner.quick`; sync_grace belongs to them."""
QUICK_GRACE: Final = 2.0

_CONTEXT: Final = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "__main__",
        "interop.kme.process",
        "hybridkex.cli.actions.kme",
        "hybridkex.net.http",
        "hybridkex.qkd.postgres_store",
    ]
)


@dataclass(frozen=True, kw_only=True)
class Manner:
    """How the processes of a run differ from those in service."""

    quick: bool = False
    """The time limits that are no settings are short."""
    mutant: str | None = None
    """One of :data:`~interop.kme.mutants.MUTANTS`."""


def start(folder: Path, log: Path, manner: Manner) -> BaseProcess:
    """``hybridkex kme serve kme.toml`` with the files of a folder.

    The file ``clock`` there has the seconds by which the process's clock is ahead; it is read ten
    times a second.
    """
    process = _CONTEXT.Process(target=_serve, args=(folder, log, manner), daemon=True)
    process.start()
    return process


def _serve(folder: Path, log: Path, manner: Manner) -> None:
    with log.open("ab") as file:
        os.dup2(file.fileno(), 2)
    with Path(os.devnull).open("ab") as file:
        os.dup2(file.fileno(), 1)
    from hybridkex.cli import main  # noqa: PLC0415  # not needed where processes are started

    follow(folder / "clock")
    if manner.quick:
        _be_quick()
    if manner.mutant is not None:
        MUTANTS[manner.mutant]()
    sys.argv = ["hybridkex", "kme", "serve", str(folder / "kme.toml")]
    os._exit(main(sys.argv[1:]))


def _be_quick() -> None:
    from hybridkex.kme import entity  # noqa: PLC0415

    entity.CHECK_EVERY = 5.0  # type: ignore[misc]
    entity.CHECK_LONGEST = 2.0  # type: ignore[misc]
    with contextlib.suppress(ImportError):  # an extra
        from hybridkex.qkd import postgres_connection, postgres_store  # noqa: PLC0415

        postgres_connection.STATEMENT_SECONDS = 0.6  # type: ignore[misc]
        postgres_connection.SILENT_SECONDS = 0.8  # type: ignore[misc]
        postgres_store.WAIT_SECONDS = 0.5  # type: ignore[misc]
        postgres_store.HOLD_SECONDS = 1.0  # type: ignore[misc]
