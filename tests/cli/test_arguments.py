"""Options are parsed once into a dataclass, and help costs no imports."""

import argparse
import contextlib
import dataclasses
import gc
import io
import re
import signal
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import trio

from hybridkex import ALL_GROUPS, ALL_SUITES
from hybridkex.apps.systemd import open_signals
from hybridkex.apps.transfer import PROTOCOL
from hybridkex.apps.wireguard import REKEY_AFTER
from hybridkex.auth.dev_ca import ALGORITHMS
from hybridkex.cli import choices, kme, main, tunnel
from hybridkex.cli.arguments import Action, Command
from hybridkex.cli.commands import COMMANDS, command_parser
from hybridkex.errors import ConfigError
from hybridkex.kme.config import PRODUCERS
from hybridkex.link.finite_key import FINITE_KEY
from hybridkex.link.presets import PRESETS
from hybridkex.link.scan import SUFFIXES
from hybridkex.link.settings import BIT_CHECKS, DECOY_CHECKS, LEAKS
from hybridkex.link.simulated import BOOTSTRAPS
from hybridkex.qkd.etsi014.mutual_tls import TLS_KINDS
from hybridkex.qkd.etsi014.naming import IdRule


def parsers(name: str) -> Iterator[argparse.ArgumentParser]:
    """A command's parser, or those of its own commands."""
    waiting = [command_parser(name)]
    for parser in waiting:
        inner = [one for one in parser._actions if isinstance(one, argparse._SubParsersAction)]
        if not inner:
            yield parser
        for action in inner:
            waiting += action.choices.values()


def fields(options: type) -> set[str]:
    """The names of a dataclass and of the groups in it."""
    found: set[str] = set()
    for name, kind in get_type_hints(options).items():
        nested = isinstance(kind, type) and dataclasses.is_dataclass(kind)
        found |= fields(kind) if nested else {name}
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_field_and_every_field_an_option(name: str) -> None:
    for parser in parsers(name):
        action = parser.get_default("action")
        assert isinstance(action, Action), parser.prog
        options = {one.dest for one in parser._actions if one.dest != "help"}
        # What a parser sets without an option, such as the protocol of `send`.
        options |= parser._defaults.keys() - {"action"}
        assert fields(action.options) == options, parser.prog


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_function_for_its_options(name: str) -> None:
    for parser in parsers(name):
        action: Action = parser.get_default("action")
        run: Any = action._load()
        (taken,) = (kind for key, kind in get_type_hints(run).items() if key != "return")
        assert taken is action.options, parser.prog


def test_the_choices_are_those_of_the_library() -> None:
    import shtab  # an extra

    groups = tuple(group.name for group in ALL_GROUPS)
    assert groups == choices.GROUPS, f"set GROUPS in hybridkex/cli/choices.py to {groups}"
    assert tuple(suite.name for suite in ALL_SUITES) == choices.SUITES
    assert tuple(ALGORITHMS) == choices.DEV_CA_ALGORITHMS
    assert tuple(rule.value for rule in IdRule) == choices.KME_ID_RULES
    assert IdRule.COMMON_NAME.value == choices.KME_ID_RULES[0]
    assert TLS_KINDS == choices.KME_TLS_KINDS
    assert PRODUCERS == choices.PRODUCERS
    assert REKEY_AFTER == choices.REKEY_AFTER
    assert PROTOCOL == choices.TRANSFER_PROTOCOL
    assert choices.BIT_CHECKS == BIT_CHECKS
    assert choices.DECOY_CHECKS == DECOY_CHECKS
    assert choices.FINITE_KEY == FINITE_KEY
    assert choices.LEAKS == LEAKS
    assert choices.LINK_BOOTSTRAPS == BOOTSTRAPS
    assert tuple(PRESETS) == choices.LINK_PRESETS
    assert choices.SCAN_SUFFIXES == SUFFIXES
    assert set(shtab.SUPPORTED_SHELLS) == set(choices.SHELLS)


# --- without the packages -------------------------------------------------------------------------

EXTRAS = [
    "h11",
    "httpcore",
    "httpx",
    "matplotlib",
    "numpy",
    "oqs",
    "prometheus_client",
    "pysequoia",
    "pyarrow",
    "rich",
    "scipy",
    "shtab",
]
ENGINE = ["cryptography", "trio", "hybridkex.tls.config", "hybridkex.crypto", "hybridkex.auth"]


@contextlib.contextmanager
def blocked(names: list[str]) -> Iterator[None]:
    """No module of these can be imported, as in an installation without their packages."""
    with pytest.MonkeyPatch.context() as patch:
        for loaded in [*sys.modules]:
            package = loaded.partition(".")[0]
            if package == "hybridkex" or package in names or loaded in names:
                patch.delitem(sys.modules, loaded)
        for name in names:
            patch.setitem(sys.modules, name, None)
        yield
        for loaded in [one for one in sys.modules if one.partition(".")[0] == "hybridkex"]:
            del sys.modules[loaded]


def run(*words: str) -> tuple[int, str]:
    """The exit status and all that is printed, by a command that is loaded anew."""
    from hybridkex.cli import main  # the blocked one

    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            status = main(list(words))
        except SystemExit as end:
            status = int(end.code or 0)
    return status, output.getvalue()


def paths(name: str) -> Iterator[list[str]]:
    yield [name]
    for action in command_parser(name)._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from ([name, inner] for inner in action.choices)


HELPS = [[], *(path for name in COMMANDS for path in paths(name))]


@pytest.mark.parametrize("words", HELPS, ids=" ".join)
def test_help_imports_neither_trio_nor_the_engine_nor_an_extra(words: list[str]) -> None:
    with blocked([*EXTRAS, *ENGINE]):
        status, text = run(*words, "--help")
    assert status == 0, text
    assert "usage: hybridkex" in text


def test_help_loads_few_modules() -> None:
    """98 as this is written, with those of the start of Python; 420 when all was loaded at once."""
    program = "import sys; from hybridkex.cli import main\ntry: main(['--help'])\n"
    program += "except SystemExit: print(len(sys.modules), file=sys.stderr)"
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
    assert int(done.stderr) < 130


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        (["demo"], "kme,link"),
        (["rndl"], "apps,kme,link"),
        (["completion", "bash"], "completion"),
        (["kme", "serve", "none.toml"], "kme"),
        (["kme", "dev-up", "none"], "kme"),
        (["qkd", "run"], "link"),
        (["qkd", "distil", "none.npz"], "link"),
        (["tunnel", "run", "none.toml"], "apps"),
    ],
)
def test_a_missing_extra_is_named_when_the_work_begins(words: list[str], extra: str) -> None:
    with blocked(EXTRAS):
        status, text = run(*words)
    assert status == 1
    assert text.rstrip().endswith(f"pip install 'hybridkex[{extra}]'"), text
    assert len(text.splitlines()) == 1


PYPROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))
PACKAGES = {
    extra: {re.split(r"[<>=;[ ]", one)[0].replace("-", "_") for one in wanted}
    for extra, wanted in PYPROJECT["project"]["optional-dependencies"].items()
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_extras_that_are_named_have_the_missing_package(name: str) -> None:
    """Whatever a command turns out to need, such as the simulator under a KME."""
    for parser in parsers(name):
        action: Action = parser.get_default("action")
        for package in ("httpx", "rich", "numpy", "scipy", "matplotlib", "psycopg", "pyarrow"):
            missing = ModuleNotFoundError(name=f"{package}.inner")
            text = str(action._explained(missing))
            if action.extra is not None:
                named = text.partition("hybridkex[")[2].partition("]")[0].split(",")
                assert package in set().union(*(PACKAGES[extra] for extra in named)), text
                assert not {"all", "dev", "test"}.intersection(named), text


def test_a_mistake_in_the_options_is_told_before_anything_is_imported() -> None:
    with blocked([*EXTRAS, *ENGINE]):
        status, text = run("demo", "--distance", "far")
    assert status == 2
    assert "--distance" in text


def test_the_command_is_whole_again(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.startswith("hybridkex ")


def test_the_collector_rests_while_a_command_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def imported(name: str) -> Any:
        seen.append(gc.isenabled())
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr("hybridkex.cli.arguments.importlib.import_module", imported)
    try:
        with pytest.raises(ModuleNotFoundError):
            Action("connect", object)._load()
    finally:
        gc.unfreeze()
    assert seen == [False]
    assert gc.isenabled()


@pytest.mark.parametrize("fails", [False, True])
def test_a_command_that_reloads_takes_a_hangup_when_it_is_ready(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself it would end the process. The threads of other tests do not block it, so it is
    sent to this one."""
    heard: list[int] = []

    async def ready() -> None:
        with open_signals() as received, trio.fail_after(10):
            heard.append(await anext(received))

    def run(_: object) -> int:
        signal.pthread_kill(threading.get_ident(), signal.SIGHUP)
        if fails:
            raise ConfigError("it cannot start")
        trio.run(ready)
        signal.pthread_kill(threading.get_ident(), signal.SIGHUP)  # it is ending
        return 0

    monkeypatch.setattr(Action, "_load", lambda _: run)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    action = Action("none", Nothing, reloads=True)
    if fails:
        with pytest.raises(ConfigError):
            action(argparse.Namespace())
    else:
        assert action(argparse.Namespace()) == 0
    assert heard == ([] if fails else [signal.SIGHUP])
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


@dataclass
class Nothing:
    """No options."""


def test_the_commands_that_reload() -> None:
    def of(name: str, command: Command) -> dict[str, bool]:
        found = {} if command.action is None else {name: command.action.reloads}
        for inner, one in command.commands.items():
            found |= of(f"{name} {inner}", one)
        return found

    found = of("kme", kme.COMMAND) | of("tunnel", tunnel.COMMAND)
    assert {name for name, reloads in found.items() if reloads} == {
        "kme serve", "kme dev-up", "tunnel listen", "tunnel connect", "tunnel run",
    }  # fmt: skip
