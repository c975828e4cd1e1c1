"""The commands by name, and their parsers; a parser loads its command's module."""

import argparse
import importlib
from typing import Any, Final, NoReturn

from hybridkex.text import printable

COMMANDS: Final = {
    "connect": "open a secure channel to a server, for standard input and output",
    "listen": "accept secure channels, for standard input and output",
    "send": "send files and folders; resume interrupted transfers",
    "receive": "receive files and folders, and verify them before they appear",
    "tunnel": "carry the connections of other programs through secure channels",
    "wg-psk": "rotate the pre-shared key of a WireGuard tunnel, with QKD keys",
    "demo": "demonstrate two sites, a file transfer and an eavesdropper",
    "rndl": "show what future adversaries can decrypt of recorded traffic",
    "dev-ca": "make a certificate authority and a certificate for tests",
    "kme": "run, query or set up a key management entity (ETSI GS QKD 014)",
    "qkd": "run a simulated QKD link, with or without Eve; plot its rates",
    "doctor": "check this installation and report what is missing",
    "completion": "print a completion script for a shell",
}
"""Name and one-line summary of each command, in the order that ``--help`` shows."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line that points to ``--help``."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """An option that a subcommand lacks is its error: its help lists those that it has."""
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return found, rest

    def error(self, message: str) -> NoReturn:
        """Exit with status 2, as usual for wrong usage."""
        self.exit(2, f"hybridkex: {printable(message)}; try: {self.prog} --help\n")


def command_parser(name: str) -> argparse.ArgumentParser:
    parser = Parser(prog=f"hybridkex {name}", description=COMMANDS[name])
    importlib.import_module(f"hybridkex.cli.{name.replace('-', '_')}").COMMAND.configure(parser)
    return parser
