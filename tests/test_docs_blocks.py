"""The code blocks of the documentation are what the program takes."""

import argparse
import ast
import dataclasses
import importlib
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked import Forkserver

from hybridkex.cli.commands import COMMANDS, command_parser
from hybridkex.kme.config import KmeConfig, load_config

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "examples" / "README.md"])
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^ {4}.*\n)+", re.MULTILINE)


def blocks(kind: str) -> list[tuple[str, str]]:
    """Page and text of each block of this language."""
    return [
        (f"{page.relative_to(ROOT)}-{number}", text)
        for page in PAGES
        for number, (language, text) in enumerate(FENCED.findall(page.read_text(encoding="utf-8")))
        if language == kind
    ]


def command_lines() -> Iterator[tuple[str, str]]:
    """Page and words of each command line that a page shows: in a block, or in backquotes."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        shown = [block for language, block in FENCED.findall(text) if language in ("sh", "")]
        shown += INDENTED.findall(FENCED.sub("", text))
        lines = "".join(shown).replace("\\\n", " ").splitlines()
        lines += re.findall(r"`(hybridkex [^`\n]+)`", FENCED.sub("", text))
        for line in lines:
            for part in re.split(r"\|(?!\|)|&&", re.sub(r" #.*", "", line)):
                found = re.search(r"(?:^|[\s/])hybridkex ([a-z][a-z-]* ?.*)", part)
                if found and found[1].split()[0] in COMMANDS:
                    yield str(page.relative_to(ROOT)), found[1].rstrip("& ")


LINES = list(command_lines())


def named_options(parser: argparse.ArgumentParser) -> set[str]:
    """The options of a command and of its own commands."""
    names = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                names |= named_options(child)
    return names


@pytest.mark.parametrize(("page", "line"), LINES)
def test_a_command_line(page: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It parses; one that is cut short by ``...`` names options that exist."""
    name, _, rest = line.partition(" ")
    words = shlex.split(re.sub(r"[<>] \S+", "", rest))
    parser = command_parser(name)
    for word in words:
        if word.startswith("--"):
            assert word.partition("=")[0] in named_options(parser), f"{page}: {line}"
    if "`" + "hybridkex " + line + "`" in (ROOT / page).read_text(encoding="utf-8"):
        return  # a mention in a sentence need not be whole
    if "..." in words:
        return
    try:
        parser.parse_args(words)
    except SystemExit:
        pytest.fail(f"{page}: {line}: {capsys.readouterr().err}")


def test_command_lines_are_found() -> None:
    assert len(LINES) > 30
    assert {line.split()[0] for _, line in LINES} >= COMMANDS.keys() - {"completion", "doctor"}


@pytest.mark.parametrize(("where", "text"), blocks("python"))
def test_a_python_block(where: str, text: str) -> None:
    """It compiles, and every name that it imports from here is there."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hybridkex"):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                assert hasattr(module, alias.name), f"{where}: {node.module}.{alias.name}"


@pytest.mark.parametrize(("where", "text"), blocks("toml"))
def test_a_toml_block(where: str, text: str) -> None:
    tomllib.loads(text)


def test_getting_started_to_the_letter(hybridkex: Forkserver, tmp_path: Path) -> None:
    """The commands and the program of the page, in its order, on another port than 4433."""
    page = (ROOT / "docs" / "getting-started.md").read_text(encoding="utf-8")
    channel = page.partition("## A channel from the command line")[2]
    shown = [text for language, text in FENCED.findall(channel) if language == "sh"]
    make, listen = shown[0].splitlines()
    assert hybridkex.run(*make.split()[1:], folder=tmp_path).returncode == 0
    program, name, port, *options = listen.split()
    assert (program, name, port) == ("hybridkex", "listen", "4433")
    with hybridkex.listening(tmp_path, *options) as (free, _):
        found = re.fullmatch(r"echo (\w+) \| hybridkex (.*)\n", shown[1])
        assert found is not None
        words = found[2].replace(port, free).split()
        done = hybridkex.run(*words, data=f"{found[1]}\n".encode(), folder=tmp_path)
        assert (done.returncode, done.stdout) == (0, b"hello\n")
        assert b"X25519MLKEM768" in done.stderr
        text = next(text for language, text in FENCED.findall(channel) if language == "python")
        ran = subprocess.run(
            [sys.executable, "-c", text.replace(port, free)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=True,
            capture_output=True,
            timeout=60,
        )
        assert ran.stdout.startswith(b"b'hello'\nTLS 1.3")


def block_of(page: str, kind: str) -> str:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return str(next(block for language, block in FENCED.findall(text) if language == kind))


def test_the_configuration_of_a_kme_shows_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "kme.toml").write_text(block_of("kme.md", "toml"), encoding="utf-8")
    (shown,) = load_config(tmp_path / "kme.toml").kme
    for field in dataclasses.fields(KmeConfig):
        if field.default is not dataclasses.MISSING and field.name not in ("peer", "audit"):
            assert getattr(shown, field.name) == field.default, field.name
        elif field.name in ("limits", "http"):
            assert callable(field.default_factory)
            assert getattr(shown, field.name) == field.default_factory(), field.name


def test_the_settings_of_a_tunnel_have_the_defaults_that_the_page_tells() -> None:
    page = (ROOT / "docs" / "tunnel.md").read_text(encoding="utf-8")
    table = page.partition("| setting | default | |\n")[2].partition("\n\n")[0]
    told = dict(re.findall(r"^\| `(\w+)` \| (\w+) \|", table, re.MULTILINE))
    assert len(told) > 5
    parser = argparse.ArgumentParser()
    for action in command_parser("tunnel")._actions:
        if isinstance(action, argparse._SubParsersAction):
            parser = action.choices["listen"]
    for name in ("max_connections", "handshake_timeout", "connect_timeout", "socket_mode"):
        assert float(told[name]) == float(parser.get_default(name)), name
    assert told["idle_timeout"] == "none"
    assert parser.get_default("idle_timeout") is None


def test_the_extras_of_the_page_are_those_of_the_package() -> None:
    page = (ROOT / "docs" / "getting-started.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"^\| `(\w+)` \| ", page, re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert shown <= extras.keys()
    (whole,) = extras["all"]
    parts = set(re.findall(r"\w+", whole.partition("[")[2]))
    row = re.search(r"^\| `all` \| (.*?):", page, re.MULTILINE)
    assert row is not None
    assert parts == set(re.findall(r"`(\w+)`", row[1]))
