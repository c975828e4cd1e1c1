"""Dataclasses that declare the options of commands, and become the arguments of their functions.

Each field is an option or a positional argument (:func:`option`, :func:`argument`), or a dataclass
of further ones (:func:`nested`). The field's type says how a value is parsed, how often an option
may be given, and whether it must be. The function's module is imported when the command runs, so
that ``--help`` and wrong options need neither heavy imports nor an extra.
"""

import argparse
import dataclasses
import gc
import importlib
import signal
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, Final, TypeVar, cast, get_args, get_origin, get_type_hints

from hybridkex.cli.extras import modules_of_extras
from hybridkex.cli.help_text import HelpFormatter, below_options, paragraphs
from hybridkex.cli.values import comma_list, file_path, number, whole_number
from hybridkex.errors import ConfigError
from hybridkex.machine import hangup_mask

T = TypeVar("T")

_PARSED: Final[dict[object, dict[str, Any]]] = {
    int: {"type": whole_number, "metavar": "N"},
    float: {"type": number},
    Path: {"type": file_path, "metavar": "FILE"},
}
"""How values are parsed, unless an option says otherwise."""


@dataclass(frozen=True, eq=False)
class Group:
    """A group of options under a title of its own."""

    title: str
    description: str | None = None

    def made_in(self, parser: argparse.ArgumentParser) -> argparse._ActionsContainer:
        return parser.add_argument_group(self.title, self.description)


@dataclass(frozen=True, eq=False)
class Exclusive:
    """Options that exclude each other: at most one, or exactly one, can be given."""

    required: bool = False

    def made_in(self, parser: argparse.ArgumentParser) -> argparse._ActionsContainer:
        return parser.add_mutually_exclusive_group(required=self.required)


_AnyGroup = Group | Exclusive | None


def option(text: str, *flags: str, group: _AnyGroup = None, **settings: Any) -> Any:
    """A field that is an option.

    ``bool`` makes a flag, a list an option that may be repeated. Any other option is required,
    unless its type admits ``None`` or it has a default.

    Args:
        text: what ``--help`` says.
        flags: its names, where they are not the field's.
        group: where ``--help`` lists it.
        settings: further arguments of :meth:`argparse.ArgumentParser.add_argument`.
    """
    return _declared(_Declared(group, {"help": text, **settings}, flags))


def argument(text: str, **settings: Any) -> Any:
    """A field that is a positional argument. A list takes one value or more, ``None`` makes it
    optional. Its parameters are those of :func:`option`."""
    return _declared(_Declared(None, {"help": text, **settings}, None))


def nested(group: _AnyGroup = None, *, required: Collection[str] = ()) -> Any:
    """A field that is a dataclass of further options.

    Args:
        group: where ``--help`` lists those that name no group themselves.
        required: the names of fields that must be given here.
    """
    return _declared(_Nested(group, required))


def add_options(parser: argparse.ArgumentParser, options: type, **preset: Any) -> None:
    """Add the options of a dataclass to a parser, a class's own before those of its base.

    Args:
        parser: where to add them.
        options: the dataclass.
        preset: values of fields that are not options here.
    """
    parser.set_defaults(**preset)
    _Adder(parser, preset).add(options)


@dataclass(frozen=True)
class _Declared:
    """An option; without ``flags``, a positional argument."""

    group: _AnyGroup
    settings: dict[str, Any]
    flags: tuple[str, ...] | None


@dataclass(frozen=True)
class _Nested:
    group: _AnyGroup
    required: Collection[str]


def _declared(what: _Declared | _Nested) -> Any:
    return dataclasses.field(metadata={_Declared: what})


class _Adder:
    def __init__(self, parser: argparse.ArgumentParser, preset: Collection[str]) -> None:
        self._parser = parser
        self._preset = preset
        self._parts: dict[_AnyGroup, argparse._ActionsContainer] = {None: parser}

    def add(self, options: type, group: _AnyGroup = None, required: Collection[str] = ()) -> None:
        kinds = get_type_hints(options)
        fields = {one.name: one.metadata[_Declared] for one in dataclasses.fields(options)}
        for name in _own_first(options):
            if name in self._preset:
                continue
            what, kind = fields[name], kinds[name]
            if isinstance(what, _Nested):
                self.add(kind, what.group or group, what.required)
                continue
            part = self._part(what.group or group)
            if what.flags is None:
                part.add_argument(name, **_of_argument(kind, what.settings))
            else:
                flags = what.flags or (f"--{name.replace('_', '-')}",)
                settings = _of_option(kind, what.settings)
                if name in required:
                    settings["required"] = True
                part.add_argument(*flags, dest=name, **settings)

    def _part(self, group: _AnyGroup) -> argparse._ActionsContainer:
        part = self._parts.get(group)
        if part is None:
            part = self._parts[group] = cast(Group | Exclusive, group).made_in(self._parser)
        return part


def _own_first(options: type) -> Iterable[str]:
    """The names of fields, a class's own before those of its base."""
    return dict.fromkeys(
        name for one in options.__mro__ for name in vars(one).get("__annotations__", ())
    )


def _of_argument(kind: Any, settings: dict[str, Any]) -> dict[str, Any]:
    kind, optional = _without_none(kind)
    if get_origin(kind) is list:
        return {"nargs": "+", **_PARSED.get(get_args(kind)[0], {}), **settings}
    return {**({"nargs": "?"} if optional else {}), **_PARSED.get(kind, {}), **settings}


def _of_option(kind: Any, settings: dict[str, Any]) -> dict[str, Any]:
    kind, optional = _without_none(kind)
    if kind is bool:
        return {"action": "store_true", **settings}
    if settings.get("type") is comma_list:
        return {**settings}
    if get_origin(kind) is list:
        default: list[Any] | None = None if optional else []
        parsed = _PARSED.get(get_args(kind)[0], {})
        return {"action": "append", "default": default, **parsed, **settings}
    required = {} if optional or "default" in settings else {"required": True}
    return {**required, **_PARSED.get(kind, {}), **settings}


def _without_none(kind: Any) -> tuple[Any, bool]:
    """A type without ``None``, and whether it admits it."""
    parts = get_args(kind)
    if NoneType not in parts:
        return kind, False
    return next(one for one in parts if one is not NoneType), True


def from_namespace(options: type[T], namespace: argparse.Namespace) -> T:
    """Build a dataclass whose fields have the names of the parsed options.

    A field that is a dataclass itself is a group of options and is filled from the same namespace.
    """
    kinds = get_type_hints(options)
    return options(
        **{
            name: from_namespace(kind, namespace)
            if isinstance(kind, type) and dataclasses.is_dataclass(kind)
            else getattr(namespace, name)
            for name, kind in kinds.items()
        }
    )


@dataclass(frozen=True)
class Action:
    """The action of a command; see :class:`Command`.

    Args:
        module: its module in :mod:`hybridkex.cli.actions`.
        options: a dataclass of options.
        extra: what to install in brackets if a package is missing, such as ``kme,link``.
        function: takes the dataclass and returns the exit status.
        reloads: whether SIGHUP, which ends other commands, is for it to take when it is ready.
    """

    module: str
    options: type
    extra: str | None = None
    function: str = "run"
    reloads: bool = False

    def __call__(self, namespace: argparse.Namespace) -> int:
        """Run it.

        Raises:
            ConfigError: a package of an extra is missing; the message names the extra.
        """
        options: object = from_namespace(self.options, namespace)
        with hangup_mask(signal.SIG_BLOCK) if self.reloads else nullcontext():
            run = self._load()
            try:
                return run(options)
            except ModuleNotFoundError as missing:
                raise self._explained(missing) from None

    def _load(self) -> Callable[[Any], int]:
        try:
            with _without_collecting():
                module = importlib.import_module(f"hybridkex.cli.actions.{self.module}")
        except ModuleNotFoundError as missing:
            raise self._explained(missing) from None
        run: Callable[[Any], int] = getattr(module, self.function)
        return run

    def _explained(self, missing: ModuleNotFoundError) -> Exception:
        if self.extra is None or missing.name is None or missing.name.startswith("hybridkex"):
            return missing
        package = missing.name.partition(".")[0]
        return ConfigError(
            f"this command needs the package {package}, which is not installed: "
            f"pip install 'hybridkex[{_extras(self.extra, package)}]'"
        )


def _extras(declared: str, package: str) -> str:
    """The extras of a command, and the smallest one with the package if none of them has it."""
    found = modules_of_extras()
    extras = [extra for extra, modules in found.items() if package in modules]
    if not extras or not set(extras).isdisjoint(declared.split(",")):
        return declared
    return f"{declared},{min(extras, key=lambda extra: len(found[extra]))}"


@contextmanager
def _without_collecting() -> Iterator[None]:
    """Import modules while the garbage collector rests. They stay until the process ends, so the
    collector never examines them afterwards either."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


@dataclass(frozen=True)
class Command:
    """A command, or a command of a command.

    Args:
        text: what it does; an empty line separates paragraphs.
        examples: command lines, without the name of the program.
        status: the meaning of the exit status.
        notes: where to read more, or further remarks.
        action: what it does, unless it has ``commands``.
        preset: values of fields that are not options here.
        summary: the line for it in the help of the command above it.
        commands: its own commands, by name.
    """

    text: str
    _: KW_ONLY
    examples: Sequence[str]
    status: str = "0 on success, 1 after an error, with one line on standard error"
    notes: str = ""
    action: Action | None = None
    preset: Mapping[str, Any] = field(default_factory=dict)
    summary: str = ""
    commands: "Mapping[str, Command]" = field(default_factory=dict)

    def configure(self, parser: argparse.ArgumentParser) -> None:
        parser.formatter_class = HelpFormatter
        parser.description = paragraphs(self.text)
        parser.epilog = below_options(self.examples, self.status, self.notes)
        if self.action is not None:
            add_options(parser, self.action.options, **self.preset)
            parser.set_defaults(action=self.action)
        if self.commands:
            parsers = parser.add_subparsers(metavar="command", required=True)
            for name, command in self.commands.items():
                command.configure(parsers.add_parser(name, help=command.summary))
