"""The commands by name, and the parser of each, which loads its module."""

import argparse
import importlib
from typing import Final, NoReturn

__all__ = ["COMMANDS", "Parser", "command_parser"]

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
    "completion": "print a script that completes this command line in your shell",
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
