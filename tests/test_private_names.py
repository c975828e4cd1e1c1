"""A name with an underscore is private to its module.

The sources are read, not run: imports, attributes of imported modules, and attributes of other
objects than ``self``. A module may use the private names that it defines itself or inherits.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("hybridkex", "examples")
    for path in (ROOT / folder).rglob("*.py")
)

ARGPARSE = "argparse has no public way to look options up"
TYPES = "a type of the standard library, which has no public name"

EXCEPTIONS = {
    ("hybridkex/aio/transport.py", "_FlowControlMixin"): "the base class of asyncio's transports",
    ("hybridkex/aio/transport.py", "_SendfileMode"): "asyncio asks a transport for it by this name",
    ("hybridkex/anyio.py", "_handshake"): "inherited from SecureDuplex",
    ("hybridkex/apps/transfer/folder.py", "_Hash"): TYPES,
    ("hybridkex/apps/transfer/part.py", "_Hash"): TYPES,
    ("hybridkex/apps/transfer/reception.py", "_Hash"): TYPES,
    ("hybridkex/apps/transfer/sender.py", "_Hash"): TYPES,
    ("hybridkex/cli/actions/completion.py", "_SubParsersAction"): ARGPARSE,
    ("hybridkex/cli/actions/completion.py", "_actions"): ARGPARSE,
    ("hybridkex/cli/arguments.py", "_ActionsContainer"): TYPES,
    ("hybridkex/cli/option_tables.py", "_AppendAction"): ARGPARSE,
    ("hybridkex/cli/option_tables.py", "_actions"): ARGPARSE,
    ("hybridkex/demos/rndl/later/__main__.py", "_exit"): "os._exit is public",
    # The demonstration's thief copies the memory of a process, which no interface gives away.
    ("hybridkex/demos/rndl/now/stage.py", "_connection"): "the thief of a session",
    ("hybridkex/demos/rndl/now/stage.py", "_connected"): "the thief of a session",
    ("hybridkex/demos/rndl/now/stage.py", "_generation"): "the thief of a session",
    ("hybridkex/demos/rndl/now/stage.py", "_records"): "the thief of a session",
    ("hybridkex/link/ranges.py", "_typeshed"): TYPES,
    ("hybridkex/net/event_loop.py", "_get_running_loop"): "documented by asyncio",
    ("hybridkex/net/event_loop.py", "_must_cancel"): "a cancellation that is still to be delivered",
    ("hybridkex/net/threads.py", "_thread"): "a documented module",
}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own_names(tree: ast.AST) -> set[str]:
    """The names that a module defines: functions, classes, variables, fields and attributes."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return found


def foreign_private_names(source: str) -> Iterator[str]:
    """The private names of other modules that a source uses."""
    tree = ast.parse(source)
    own, modules = own_names(tree), set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from filter(is_private, (node.module or "").split("."))
            yield from (one.name for one in node.names if is_private(one.name))
            modules |= {one.asname or one.name for one in node.names}
        elif isinstance(node, ast.Import):
            for one in node.names:
                yield from filter(is_private, one.name.split("."))
                modules.add(one.asname or one.name.partition(".")[0])
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            owner = ast.unparse(node.value)
            if owner not in ("self", "cls", "super()") and (
                owner in modules or node.attr not in own
            ):
                yield node.attr


@pytest.mark.parametrize("path", SOURCES)
def test_no_private_name_of_another_module(path: str) -> None:
    used = set(foreign_private_names((ROOT / path).read_text()))
    allowed = {name for file, name in EXCEPTIONS if file == path}
    assert used == allowed


def test_every_exception_is_of_a_source() -> None:
    assert {path for path, _ in EXCEPTIONS} <= set(SOURCES)


@pytest.mark.parametrize(
    "source",
    [
        "from cryptography.hazmat.bindings import _rust",
        "import cryptography.hazmat.bindings._rust",
        "from cryptography.hazmat.bindings._rust import x509",
        "from hybridkex.tls.client import _Offer",
        "from hybridkex.tls import client\nclient._Offer()",
        "from hybridkex.tls import client\ndef _retry(): ...\nclient._retry()",
        "def f(stream):\n    return stream._connection",
    ],
)
def test_it_is_noticed(source: str) -> None:
    assert list(foreign_private_names(source))
