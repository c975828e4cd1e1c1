"""Every command says what it does, what each option means, and gives examples that work."""

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from hybridkex.cli import main
from hybridkex.cli.commands import COMMANDS, command_parser
from hybridkex.cli.values import file_path, folder_path


def parsers(name: str) -> Iterator[argparse.ArgumentParser]:
    """A command's parser and those of its own commands."""
    waiting = [command_parser(name)]
    for parser in waiting:
        yield parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                waiting += action.choices.values()


def options(name: str) -> Iterator[tuple[argparse.ArgumentParser, argparse.Action]]:
    for parser in parsers(name):
        for action in parser._actions:
            if not isinstance(action, argparse._SubParsersAction):
                yield parser, action


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_text(name: str) -> None:
    for parser, action in options(name):
        where = f"{parser.prog} {action.option_strings or action.dest}"
        assert action.help, where
        assert len(action.help) > 4, where
        if action.option_strings and action.default not in (None, False, [], argparse.SUPPRESS):
            assert "default" in action.help, f"{where} does not tell its default"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_examples_that_it_takes(name: str) -> None:
    for parser in parsers(name):
        assert parser.description, parser.prog
        assert len(parser.description) > 60, parser.prog
        epilog = parser.epilog or ""
        assert "exit status:" in epilog, parser.prog
        examples = epilog.partition("examples:\n")[2].partition("\n\n")[0]
        lines = examples.replace("\\\n", " ").splitlines()
        assert lines, parser.prog
        for line in lines:
            words = shlex.split(line.partition(" > ")[0].partition(" < ")[0], comments=True)
            assert words[:2] == ["hybridkex", name], line
            command_parser(name).parse_args(words[2:])  # SystemExit where it is not taken


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_a_terminal(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a command and of its own commands, and every example can still be copied."""
    monkeypatch.setenv("COLUMNS", "80")
    for parser in parsers(name):
        text = parser.format_help()
        assert max(map(len, text.splitlines())) <= 80, parser.prog
        broken = re.findall(r"\w-\n *(\S+)", text)
        assert not broken, f"{parser.prog}: a word is broken at a hyphen before {broken}"
        shown = text.partition("examples:\n")[2].partition("\n\n")[0]
        given = (parser.epilog or "").partition("examples:\n")[2].partition("\n\n")[0]
        assert shown.replace("\\\n", " ").split() == given.split(), parser.prog


@pytest.mark.parametrize("columns", ["0", "1", "2", "3", "9", "-5", "x", "100000"])
def test_a_terminal_of_any_width(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parser is made before a command runs: nothing would."""
    monkeypatch.setenv("COLUMNS", columns)
    for name in COMMANDS:
        for parser in parsers(name):
            assert parser.format_help()


@pytest.mark.parametrize("name", ["--help", *COMMANDS])
def test_help_is_readable(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"] if name != "--help" else [name])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    if name == "--help":
        assert all(command in text for command in COMMANDS)
        assert "docs/NAME.md that help texts name come with the source" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_no_option_takes_an_empty_path(name: str) -> None:
    """``Path("")`` is the current folder, and ``send "$UNSET" HOST`` would send all of it."""
    for _, action in options(name):
        assert action.type is not Path, action.option_strings or action.dest
    for kind in (file_path, folder_path):
        with pytest.raises(argparse.ArgumentTypeError, match="the path is empty"):
            kind("")
        assert kind(".") == Path()
