"""The public names: each has a docstring, and none changes unnoticed.

``python tests/test_public_api.py`` writes the snapshot anew.
"""

import importlib
import inspect
import pydoc
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from types import GenericAlias

import pytest

import hybridkex

SNAPSHOT = Path(__file__).with_name("public_api.txt")

MODULES = (
    "hybridkex",
    "hybridkex.aio",
    "hybridkex.auth",
    "hybridkex.combiner",
    "hybridkex.errors",
    "hybridkex.qkd.composite",
    "hybridkex.qkd.etsi014.client",
    "hybridkex.qkd.in_process",
    "hybridkex.qkd.pool",
    "hybridkex.qkd.prefetch",
    "hybridkex.qkd.producer",
    "hybridkex.qkd.source",
    "hybridkex.tls.events",
)
"""Where users import from; the reference pages of the documentation list the same modules."""

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
