"""The commands by name, and the parser of each, which loads its module."""

import argparse
import importlib
from typing import Final, NoReturn

__all__ = ["COMMANDS", "Parser", "command_parser"]

COMMANDS: Final = {
    "connect": "open a secure channel to a server, for standard input and output",
    "listen": "accept secure channels, for standard input and output",
    "send": "send files and folders; resume interrupted transfers",
    "receive": "receive files and folders, and verify them before they appear",
    "tunnel": "carry the connections of other programs through secure channels",
    "wg-psk": "renew the pre-shared key of a WireGuard tunnel, with QKD keys",
    "demo": "show two sites, a file that is sent, and an eavesdropper",
    "rndl": "show what future adversaries can decrypt of recorded traffic",
    "dev-ca": "make a certificate authority and a certificate for tests",
    "kme": "run, query or set up a key management entity (ETSI GS QKD 014)",
    "qkd": "run a simulated QKD link, with or without Eve; plot its rates",
    "doctor": "check this installation, and name what is missing",
    "completion": "print a completion script for a shell",
}
"""Name and one-line summary of each command, in the order that ``--help`` shows."""


class Parser(argparse.ArgumentParser):
    """A parser that complains in one line, which says where to read on."""

    def error(self, message: str) -> NoReturn:
        """End with the status 2, as is the custom."""
        self.exit(2, f"hybridkex: {message}; try: {self.prog} --help\n")


def command_parser(name: str) -> argparse.ArgumentParser:
    """The parser of a command's own arguments."""
    parser = Parser(prog=f"hybridkex {name}", description=COMMANDS[name])
    importlib.import_module(f"hybridkex.cli.{name.replace('-', '_')}").configure(parser)
    return parser
