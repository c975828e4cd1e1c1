"""``hybridkex rndl``: record now, decrypt later, live.

Records channels of every configuration on loopback, lets future adversaries try to decrypt them,
each in its own process, and prints which of them succeeded. ``docs/record-now-decrypt-later.md``
says what is modelled, what is real and what it does not prove.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

from hybridkex import __version__
from hybridkex.cli.guarded import explained, guarded_folder, guarded_processes
from hybridkex.cli.rndl import RndlOptions
from hybridkex.cli.running import end_as_interrupted, run_trio
from hybridkex.demos.rndl import page
from hybridkex.demos.rndl.matrix import ADVERSARIES, rows
from hybridkex.demos.rndl.trial import Cell, Trial, run_trial
from hybridkex.errors import ConfigError
from hybridkex.files import PUBLIC, make_private_folder, write_file
from hybridkex.machine import writing
from hybridkex.text import terminal

_READ: Final = Text("R", style="bold red")
_SAFE: Final = Text("·", style="green")
_OTHER_KEEP: Final = "choose another one with --keep"
_WRONG: Final = Text("!", style="bold black on yellow")


def run(options: RndlOptions) -> int:
    """Run it; 0 if each adversary read what was predicted and nothing else."""
    console = Console(file=terminal(sys.stdout), highlight=False)
    for path in (options.html, options.json):
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"there is no folder {path.absolute().parent}")
        if path is not None and path.is_dir():
            raise ConfigError(f"{path} is a folder; the report needs the name of a file")
    with end_as_interrupted(), _folder(options.keep) as folder:
        trial = _watched(console, folder)
    _print_matrix(console, trial)
    _print_findings(console, trial)
    reports = []
    if options.html is not None:
        reports.append((options.html, page.render(trial, __version__).encode("utf-8")))
    if options.json is not None:
        report = {"hybridkex": __version__, **trial.as_json()}
        reports.append((options.json, json.dumps(report, indent=1).encode("ascii") + b"\n"))
    for path, content in reports:
        with writing(f"the report {path}"):
            write_file(path, content, mode=PUBLIC)
    for kept in (options.html, options.json, options.keep):
        if kept is not None:
            console.print(f"written: {kept}", markup=False)
    return 1 if trial.wrong else 0


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    """A folder that only we can read, since it holds private keys."""
    if keep is not None:
        with writing(keep):
            make_private_folder(keep)
        with guarded_processes(), explained(keep, _OTHER_KEEP):
            yield keep.absolute()
        return
    with guarded_folder("hybridkex-rndl-") as folder:
        yield folder


def _watched(console: Console, folder: Path) -> Trial:
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description:<58}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        console=console,
        transient=True,
    ) as progress:
        cells = progress.add_task("recording", total=len(rows()) * len(ADVERSARIES))
        toy = progress.add_task("toy curve: discrete logarithm", total=1)

        def report_toy(text: str) -> None:
            progress.update(toy, description=f"toy curve: {text}")

        def decided(cell: Cell) -> None:
            progress.advance(cells)

        return run_trio(
            lambda: run_trial(
                folder,
                report=lambda text: progress.update(cells, description=text),
                toy_progress=report_toy,
                decided=decided,
            )
        )


def _print_matrix(console: Console, trial: Trial) -> None:
    table = Table(
        title="Who could read the recordings?",
        title_justify="left",
        box=None,
        header_style="bold",
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("recorded", no_wrap=True)
    for number in range(1, len(ADVERSARIES) + 1):
        table.add_column(str(number), justify="right", min_width=2)
    for row in rows():
        title = "  resumed" if row.resumed else row.title
        marks = (_mark(trial.cell(row, adversary)) for adversary in ADVERSARIES)
        table.add_row(title, *marks)
    console.print(table)
    console.print("R: read, both directions in full; ·: safe\n")
    for number, adversary in enumerate(ADVERSARIES, 1):
        console.print(f"{number:>3}  {adversary.title}", markup=False)
    console.print()


def _mark(cell: Cell | None) -> Text:
    if cell is None or cell.wrong is not None:
        return _WRONG
    return _READ if cell.decrypted else _SAFE


def _print_findings(console: Console, trial: Trial) -> None:
    """One connection that was decrypted, one that was not, the toy curve, and any
    contradictions."""
    against = next(adversary for adversary in ADVERSARIES if adversary.id == "both")
    console.print(f"Against {against.title}:", style="bold")
    for row in rows():
        if not row.resumed:
            cell = trial.cell(row, against)
            if cell is None:
                found = "not tried"
            elif cell.decrypted:
                found = f"read {cell.plaintext!r}"
            else:
                found = f"lacks {', '.join(cell.missing)}"
            console.print(f"  {row.title}: {found}", markup=False, soft_wrap=True)
    if trial.toy is not None:
        first = trial.toy.verdict["to_server"].splitlines()[0]
        console.print(
            f"Without any oracle: the toy curve's discrete logarithm took {trial.toy.seconds:.1f} "
            f"s, and then: {first!r}",
            markup=False,
            soft_wrap=True,
        )
    console.print(
        f"{len(trial.cells)} cells in {trial.seconds:.1f} s, "
        + ("all as predicted" if not trial.wrong else f"{len(trial.wrong)} NOT as predicted:"),
        style="bold",
    )
    for text in trial.wrong:
        console.print(f"  {text}", markup=False, soft_wrap=True)
