"""The ``hybridkex`` command.

A command is a module of this folder with ``configure(parser)``, which adds its options, and
``run(args) -> int``, which gives the exit status. It is imported only when it is called, so that a
command whose extra is not installed does not stop the others.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Final

from hybridkex import __version__
from hybridkex.errors import HybridkexError

__all__ = ["main"]

COMMANDS: Final = {
    "connect": "open a secure channel to a server; standard input and output are the data",
    "listen": "accept secure channels; standard input and output are the data",
    "send": "send files and folders; broken transfers go on where they were",
    "receive": "take in files and folders, verified before they appear",
    "tunnel": "carry the connections of other programs through secure channels",
    "wg-psk": "keep the pre-shared key of a WireGuard tunnel fresh, with QKD keys in it",
    "demo": "two sites in one terminal: a real file across, and what its keys rest on",
    "rndl": "record now, decrypt later: adversaries of the future try our recordings",
    "dev-ca": "make a small certificate authority and a certificate for tests and first steps",
    "kme": "run, ask or set up a key management entity (ETSI GS QKD 014)",
    "qkd": "run a simulated QKD link, with or without Eve; draw its rates",
    "doctor": "say what is there and works on this machine, and what is missing",
}
"""Name and one-line summary of each command, in the order that ``--help`` shows."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; ``argv`` is without the program's name. Returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    top = argparse.ArgumentParser(
        prog="hybridkex",
        description="Secure channels whose keys rest on ECDH, ML-KEM and QKD at once.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="commands:\n" + "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items()),
    )
    top.add_argument("--version", action="version", version=f"hybridkex {__version__}")
    top.add_argument("command", choices=COMMANDS, metavar="command", help="one of those below")
    name = top.parse_args(arguments[:1]).command
    try:
        module = importlib.import_module(f"hybridkex.cli.{name.replace('-', '_')}")
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.startswith("hybridkex"):
            raise
        return _fail(f"'{name}' needs the package {missing.name}: pip install 'hybridkex[all]'")
    parser = argparse.ArgumentParser(prog=f"hybridkex {name}", description=COMMANDS[name])
    module.configure(parser)
    try:
        status: int = module.run(parser.parse_args(arguments[1:]))
    except HybridkexError as error:
        return _fail(str(error))
    except BrokenPipeError:
        # The reader of our output is gone; so is the place for a complaint.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    return status


def _fail(message: str) -> int:
    print(f"hybridkex: {message}", file=sys.stderr)
    return 1
