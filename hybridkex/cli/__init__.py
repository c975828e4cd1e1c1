"""The ``hybridkex`` command.

A command is two modules: one here with a dataclass of its options (:mod:`hybridkex.cli.arguments`)
and ``COMMAND``, which describes it, and one in :mod:`hybridkex.cli.actions` with the function that
takes this dataclass and returns the exit status. The first imports neither the engine nor trio nor
any extra, the second is imported when the command runs.
"""

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hybridkex import __version__
from hybridkex.cli.commands import COMMANDS, Parser, command_parser
from hybridkex.cli.standard_streams import (
    StandardOutput,
    discard_standard_output,
    unfailing_standard_error,
)
from hybridkex.cli.threads import bounded_thread_starts
from hybridkex.errors import HybridkexError
from hybridkex.machine import refusal
from hybridkex.text import PrintableOutput, printable

__all__ = ["main", "run_program"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; ``argv`` is without the program's name. Returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_program(lambda: _run(arguments))


def run_program(act: Callable[[], int]) -> int:
    """Run a program whose errors are one line on standard error. Returns the exit status."""
    with unfailing_standard_error(), _safe_output(), bounded_thread_starts():
        return _reported(act)


@contextmanager
def _safe_output() -> Iterator[None]:
    """Escape control characters in the output, and hide warnings meant for developers."""
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        own = sys.stdout, sys.stderr
        named: Any = StandardOutput(sys.stdout)
        sys.stdout, sys.stderr = PrintableOutput(named), PrintableOutput(sys.stderr)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = own


def _reported(act: Callable[[], int]) -> int:
    try:
        try:
            return act()
        finally:
            sys.stdout.flush()  # here, where an error can still be reported
    except HybridkexError as error:
        _print_error(error)
        return 1
    except OSError as error:
        discard_standard_output()
        if not isinstance(error, BrokenPipeError):  # the reader has closed the pipe
            _print_error(refusal(error))
        return 1
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        reason = refusal(error)
        if reason is None:
            raise
        _print_error(reason)
        return 1


def _print_error(message: object) -> None:
    print(f"hybridkex: {printable(str(message))}", file=sys.stderr)


def _run(arguments: list[str]) -> int:
    top = Parser(
        prog="hybridkex",
        description="Secure channels whose keys are derived from ECDH, ML-KEM and QKD together.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="commands:\n"
        + "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
        + "\n\n'hybridkex COMMAND --help' lists options and examples. To begin: hybridkex demo\n"
        "The pages docs/NAME.md that help texts name come with the source only.",
    )
    top.add_argument("--version", action="version", version=f"hybridkex {__version__}")
    top.add_argument("command", choices=COMMANDS, metavar="command", help="one of those below")
    name = top.parse_args(arguments[:1]).command
    options = command_parser(name).parse_args(arguments[1:])
    action: Callable[[argparse.Namespace], int] = options.action
    return action(options)
