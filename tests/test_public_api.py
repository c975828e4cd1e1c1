"""The public names: each has a docstring, which names the parameters and the errors, and none
changes unnoticed.

``python tests/test_public_api.py`` writes the snapshot anew.
"""

import ast
import importlib
import inspect
import itertools
import pydoc
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from types import FunctionType, GenericAlias
from typing import cast

import pytest

import hybridkex

SNAPSHOT = Path(__file__).with_name("public_api.txt")

REFERENCE = Path(__file__).parents[1] / "docs/reference"

MODULES = (
    "hybridkex",
    *sorted(
        module
        for page in REFERENCE.glob("*.md")
        if page.name != "api.md"
        for module in re.findall(
            r"^::: (hybridkex\.[a-z0-9_.]+)$", page.read_text("utf-8"), re.MULTILINE
        )
    ),
)
"""Where users import from: the package, whose names are in ``api.md``, and the modules of the
other pages."""

PROPERTIES = (property, cached_property)

SHARED = ("hybridkex.shell.secure_duplex",)
"""Modules whose classes are bases of public ones."""


def names(module: str) -> Iterator[tuple[str, object]]:
    loaded = importlib.import_module(module)
    for name in loaded.__all__:
        yield f"{module}.{name}", getattr(loaded, name)


def members(name: str, thing: object) -> Iterator[tuple[str, object]]:
    """A class's public methods and properties: its own, and those of a base that is not public."""
    if not inspect.isclass(thing) or issubclass(thing, Enum):
        return
    bases = thing.__mro__[1:]
    shared = [vars(one) for one in bases if one.__module__ in SHARED or one.__name__[0] == "_"]
    for member, value in [one for part in (vars(thing), *shared) for one in part.items()]:
        if member.startswith("_") or member in getattr(thing, "__dataclass_fields__", {}):
            continue
        if isinstance(value, staticmethod | classmethod):
            yield f"{name}.{member}", value.__func__
        elif inspect.isfunction(value) or isinstance(value, PROPERTIES):
            yield f"{name}.{member}", value


def signature(thing: object) -> str:
    """The parameters by name; ``=`` marks those with a default. An enumeration's members."""
    if inspect.isclass(thing) and issubclass(thing, Enum):
        return ": " + " | ".join(thing.__members__)
    if isinstance(thing, GenericAlias):
        return ": alias"
    if isinstance(thing, PROPERTIES):
        return ": property"
    if not callable(thing):
        return f": {type(thing).__name__}"
    try:
        parameters = inspect.signature(thing).parameters.values()
    except (TypeError, ValueError):
        return f": {type(thing).__name__}"
    described = (
        {one.VAR_POSITIONAL: "*", one.VAR_KEYWORD: "**", one.KEYWORD_ONLY: "key "}.get(one.kind, "")
        + one.name
        + ("" if one.default is one.empty else "=")
        for one in parameters
    )
    return f"({', '.join(described)})"


def snapshot() -> str:
    lines = []
    for module in MODULES:
        for name, thing in names(module):
            lines.append(
                name + (signature(thing) if callable(thing) else f": {type(thing).__name__}")
            )
            lines += [member + signature(value) for member, value in members(name, thing)]
    return "\n".join(sorted(set(lines))) + "\n"


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_has_a_docstring(module: str) -> None:
    missing = []
    for name, thing in names(module):
        if not (inspect.isclass(thing) or inspect.isfunction(thing)):
            continue
        document = thing.__doc__ or ""
        own_words = not document.startswith(f"{thing.__name__}(")  # or a dataclass's signature
        if not document or not own_words:
            missing.append(name)
        missing += [
            member
            for member, value in members(name, thing)
            if not value.__doc__ and not documented_by_a_base(thing, member)
        ]
    assert missing == []


def documented_by_a_base(thing: type, member: str) -> bool:
    """Whether a documented base class has the method."""
    method = member.rpartition(".")[2]
    return any(getattr(vars(base).get(method), "__doc__", None) for base in thing.__mro__[1:])


Callable = type | FunctionType


def everything() -> dict[str, tuple[Callable, object]]:
    """The public callables, each once, with what they are members of."""
    found: dict[Callable, tuple[str, object]] = {}
    for module in MODULES:
        for name, thing in names(module):
            for member, value in ((name, thing), *members(name, thing)):
                if inspect.isclass(value) or inspect.isfunction(value):
                    found.setdefault(value, (member, thing))
    return {name: (value, owner) for value, (name, owner) in found.items()}


EVERYTHING = everything()
INTERFACES = [one for one, _ in EVERYTHING.values() if getattr(one, "_is_protocol", False)]


def is_ours(kind: type) -> bool:
    return kind.__module__.startswith("hybridkex.")


def documents(name: str, value: Callable, owner: object) -> str:
    """What the reference says about a callable.

    A class: also the docstrings of its bases, of ``__init__`` and of its fields. A method: also
    those of the bases' and of the interfaces' method of this name. A constructor: also its class's.
    """
    if inspect.isclass(value):
        kinds = [one for one in value.__mro__ if is_ours(one)]
        of_init = [vars(one).get("__init__") for one in kinds]
        documented = [one for kind in kinds for one in fields_explained(kind)]
        return "\n".join([*map(text_of, (*kinds, *of_init)), *documented])
    if not inspect.isclass(owner):
        return text_of(value)
    method = name.rpartition(".")[2]
    same = [vars(one).get(method) for one in (*owner.__mro__, *INTERFACES)]
    constructs = isinstance(vars(owner).get(method), classmethod)
    return "\n".join(map(text_of, (value, *same, *([owner] if constructs else []))))


def text_of(thing: object) -> str:
    return inspect.cleandoc(getattr(thing, "__doc__", None) or "")


def syntax(thing: Callable) -> ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef:
    [node] = ast.parse(textwrap.dedent(inspect.getsource(thing))).body
    assert isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    return node


def fields_explained(kind: type) -> list[str]:
    """The names of the fields that have a docstring."""
    return [
        field.target.id
        for field, after in itertools.pairwise(syntax(kind).body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    ]


def parameters(value: Callable) -> list[str]:
    try:
        found = inspect.signature(value).parameters
    except ValueError:  # an enumeration, an exception
        return []
    return [one for one in found if one not in ("self", "cls")]


def explains(text: str, name: str, *, field: bool) -> bool:
    """Whether a name has a line of its own or is quoted; a function's may be any word there."""
    if field:
        return bool(re.search(rf"^ *{name}(: |$)|``[^`]*\b{name}\b[^`]*``", text, re.MULTILINE))
    return bool(re.search(rf"\b{name.replace('_', '[ _-]')}\b", text, re.IGNORECASE))


def test_every_parameter_and_field_is_explained() -> None:
    """``handshake_timeout`` and ``size`` were nowhere."""
    missing = {}
    for name, (value, owner) in EVERYTHING.items():
        if value in INTERFACES or (
            isinstance(value, type) and issubclass(value, Enum | BaseException)
        ):
            continue  # not made by users
        text, made = documents(name, value, owner), isinstance(value, type)
        unexplained = [one for one in parameters(value) if not explains(text, one, field=made)]
        if unexplained:
            missing[name] = unexplained
    assert missing == {}


def raised(function: object) -> set[str]:
    """Our exceptions that a function raises itself, or by a check that says so."""
    if not isinstance(function, FunctionType):
        return set()
    function = cast("FunctionType", inspect.unwrap(function))
    if function.__code__.co_filename == "<string>":  # a dataclass's
        return set()
    whole = syntax(function)
    found = {"ConfigError" for one in whole.decorator_list if ast.unparse(one) == "checked"}
    for node in ast.walk(whole):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            kind = function.__globals__.get(ast.unparse(node.exc.func))
            if inspect.isclass(kind) and issubclass(kind, hybridkex.HybridkexError):
                found.add(kind.__name__)
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith(("check", "_check")):
            check = text_of(function.__globals__.get(ast.unparse(node.func)))
            found |= set(re.findall(r"\b\w*Error\b", check.partition("Raise")[2]))
    return found


def test_whatever_raises_says_so() -> None:
    silent = {}
    for name, (value, owner) in EVERYTHING.items():
        run: Sequence[object] = [value]
        if inspect.isclass(value):
            made_by = ("__init__", "__post_init__")
            run = [vars(one).get(by) for one in value.__mro__ if is_ours(one) for by in made_by]
        found = set[str]().union(*map(raised, run))
        if found and not re.search(r"\b[Rr]aises?\b", documents(name, value, owner)):
            silent[name] = found
    assert silent == {}


def test_the_public_names_are_those_of_the_snapshot() -> None:
    assert snapshot().splitlines() == SNAPSHOT.read_text(encoding="utf-8").splitlines()


def test_the_list_of_the_first_docstring_is_indented() -> None:
    """Otherwise the rest of an item is shown as a new paragraph."""
    listed = (hybridkex.__doc__ or "").partition("\n- ")[2]
    assert [line for line in listed.splitlines()[1:] if not line.startswith(("- ", "  "))] == []


def test_the_reference_lists_every_name() -> None:
    page = (Path(__file__).parents[1] / "docs/reference/api.md").read_text(encoding="utf-8")
    listed = re.findall(r"^::: hybridkex\.(\w+)$", page, re.MULTILINE)
    assert sorted(listed) == sorted(importlib.import_module("hybridkex").__all__)


def test_help_starts_with_what_a_user_wants() -> None:
    start = pydoc.render_doc(hybridkex, renderer=pydoc.plaintext).partition("PACKAGE CONTENTS")[0]
    for name in ("open_secure_tcp_stream", "serve_secure_tcp", "SecureStream", "ClientConfig"):
        assert name in start
    for name in re.findall(r":class:`(\w+)`", hybridkex.__doc__ or ""):
        assert name in hybridkex.__all__


@pytest.mark.parametrize(
    "kind",
    [hybridkex.ClientConfig, hybridkex.ServerConfig, hybridkex.Policy, hybridkex.Limits],
    ids=lambda kind: kind.__name__,
)
def test_every_field_of_a_configuration_is_explained(kind: type) -> None:
    """In the list of arguments of the class or of a base."""
    documents = (inspect.cleandoc(one.__doc__ or "") for one in kind.__mro__ if is_dataclass(one))
    explained = set(re.findall(r"^    (\w+): ", "\n".join(documents), re.MULTILINE))
    public = {one.name for one in fields(kind) if one.init}
    assert public <= explained, public - explained


if __name__ == "__main__":
    SNAPSHOT.write_text(snapshot(), encoding="utf-8")
