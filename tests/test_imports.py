"""Imports go one way, from package to package, as the architecture says.

The sources are read, not run, so an import inside a function counts as well as one at the top.
"""

import ast
import importlib
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

import hybridkex

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hybridkex"

BASE = {"constants", "errors", "extras", "fields", "json_text", "lazy_names", "machine", "reasons"}
BASE |= {"secret", "text", "values"}
ENGINE = BASE | {"wire", "crypto", "auth", "tls"}

# What each package may import, besides itself. A file beside the packages counts as one; the public
# names of hybridkex/__init__.py are the package "".
MAY_IMPORT: dict[str, set[str]] = {
    "constants": set(),
    "reasons": {"constants"},
    "errors": {"constants", "reasons", "text"},
    "extras": set(),
    "json_text": set(),
    "secret": set(),
    "fields": {"errors"},
    "files": {"errors"},
    "machine": {"errors", "text"},
    "text": set(),
    "lazy_names": set(),
    "values": set(),
    # Addresses, HTTP and the like: it knows nothing of what is carried.
    "net": BASE,
    "wire": BASE,
    "crypto": BASE,
    "auth": BASE | {"files", "crypto"},
    "qkd": BASE | {"files", "wire", "crypto", "net"},
    "tls": BASE | {"wire", "crypto", "auth"},
    # The simulator knows of QKD keys what a producer of them must know.
    "link": BASE | {"crypto", "files", "net", "qkd"},
    # The one place where key sources meet the engine.
    "shell": ENGINE | {"files", "net", "qkd"},
    # Shells: one for each event loop.
    "streams": ENGINE | {"net", "shell"},
    "aio": ENGINE | {"net", "shell"},
    "anyio": ENGINE | {"net", "shell"},
    # Adapters to other people's HTTP, each to its own event loop.
    "adapters": ENGINE | {"net", "shell", "streams", "aio", "anyio"},
    "kme": ENGINE | {"files", "net", "qkd", "link", "shell", "streams"},
    "combiner": BASE | {"net", "wire", "crypto", "auth", "qkd"},
    # Applications need no more than what everybody has.
    "apps": {"errors", "extras", "files", "json_text", "machine", "net", "text", "combiner", ""},
    "demos": ENGINE | {"files", "net", "qkd", "link", "kme", "shell", "streams", ""},
    "cli": ENGINE
    | {"files", "combiner", "net", "qkd", "link", "kme", "demos", "apps", "shell", "streams", ""},
    "__main__": {"cli"},
    "": ENGINE | {"combiner", "qkd", "shell", "streams"},
}


class Exemption(NamedTuple):
    """An import inside a function that goes against the table."""

    importer: str
    packages: frozenset[str]
    reason: str


EXEMPT = (
    Exemption(
        "hybridkex.qkd.etsi014",
        frozenset({"aio", "auth", "tls", "streams"}),
        "the connection between an SAE and its KME can use this library's own TLS; imported when "
        "that is asked for, so that a key source as such knows nothing of the engine",
    ),
)

# The engine does no input and no output, and has no opinion on how its caller does.
SANS_IO = {
    "constants",
    "errors",
    "fields",
    "machine",
    "reasons",
    "secret",
    "text",
    "wire",
    "crypto",
    "auth",
    "tls",
}
# Finds the system's trust store while a configuration is made; no handshake comes here.
IO_EXEMPT = {
    ("hybridkex.auth.system", "ssl"),
    # A lock: a worker thread writes the file.
    ("hybridkex.shell.ticket_file", "threading"),
}
LOOPS = {"asyncio": {"aio", "adapters"}, "anyio": {"anyio", "adapters"}}
IO_MODULES = {"asyncio", "anyio", "trio", "socket", "ssl", "select", "selectors", "threading"}


class Import(NamedTuple):
    """One import statement's target, and whether it runs only when a function is called."""

    importer: str
    target: str
    line: int
    lazy: bool
    typing_only: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.target}"


def imports_of(importer: str, source: str, modules: set[str]) -> Iterator[Import]:
    """Every import in a source, as the module that it really means."""

    def visit(node: ast.AST, lazy: bool, typing_only: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(importer, alias.name, node.lineno, lazy, typing_only)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{importer}:{node.lineno}: a relative import"
            assert node.module is not None
            for alias in node.names:
                # `from package import module` means the module.
                full = f"{node.module}.{alias.name}"
                target = full if full in modules else node.module
                yield Import(importer, target, node.lineno, lazy, typing_only)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for statement in node.body:
                yield from visit(statement, lazy, True)
            for statement in node.orelse:
                yield from visit(statement, lazy, typing_only)
        else:
            inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from visit(child, inside, typing_only)

    yield from visit(ast.parse(source), False, False)


def package_of(module: str) -> str:
    return module.partition(".")[2].partition(".")[0]


def complaints(imports: list[Import]) -> list[str]:
    """What goes against the table."""
    found = []
    for item in imports:
        outside = item.target.split(".")[0]
        if outside != "hybridkex":
            pair = (item.importer, outside)
            if (
                package_of(item.importer) in SANS_IO
                and outside in IO_MODULES
                and pair not in IO_EXEMPT
            ):
                found.append(f"{item}: input and output are not the engine's business")
            if package_of(item.importer) == "wire" and outside == "cryptography":
                found.append(f"{item}: no cryptography on the wire")
            if (
                package_of(item.importer) == "shell"
                and outside in IO_MODULES
                and pair not in IO_EXEMPT
            ):
                found.append(f"{item}: an event loop is for a shell of its own")
            if outside in {"asyncio", "anyio"} and package_of(item.importer) not in LOOPS.get(
                outside, ()
            ):
                found.append(f"{item}: the shell is trio's")
            continue
        own, other = package_of(item.importer), package_of(item.target)
        if own not in MAY_IMPORT:
            found.append(f"{item}: the package {own!r} is not in the table")
        elif other != own and other not in MAY_IMPORT[own] and not exempt(item, other):
            found.append(f"{item}: {own!r} must not import {other!r}")
    return found


def exempt(item: Import, other: str) -> bool:
    return item.lazy and any(
        f"{item.importer}.".startswith(f"{exemption.importer}.") and other in exemption.packages
        for exemption in EXEMPT
    )


def cycle(imports: list[Import]) -> list[str] | None:
    """Modules that import each other in a ring when they are loaded, if there are any."""
    graph: dict[str, set[str]] = {}
    for item in imports:
        ours = item.target.startswith("hybridkex.") and item.target != item.importer
        if ours and not item.lazy and not item.typing_only:
            graph.setdefault(item.importer, set()).add(item.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        ring: list[str] = error.args[1]
        return ring
    return None


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def read_package() -> list[Import]:
    files = {module_name(path): path for path in PACKAGE.rglob("*.py")}
    return [
        item
        for name, path in files.items()
        for item in imports_of(name, path.read_text(encoding="utf-8"), set(files))
    ]


def test_imports_go_one_way() -> None:
    imports = read_package()
    assert len({item.importer for item in imports}) > 20
    assert complaints(imports) == []


def test_no_ring_of_imports() -> None:
    assert cycle(read_package()) is None


def test_the_table_itself_goes_one_way() -> None:
    inner = {own: others - {own, ""} for own, others in MAY_IMPORT.items() if own}
    TopologicalSorter(inner).prepare()
    assert "wire" not in MAY_IMPORT["crypto"]
    assert "crypto" not in MAY_IMPORT["wire"]


@pytest.mark.parametrize(
    ("importer", "source", "wrong"),
    [
        ("hybridkex.wire.records", "from hybridkex.crypto import kex", True),
        ("hybridkex.wire.records", "from hybridkex.constants import TLS13", False),
        ("hybridkex.wire.records", "from cryptography import x509", True),
        ("hybridkex.crypto.kex", "import hybridkex.wire.codec", True),
        ("hybridkex.crypto.kex", "def f():\n    from hybridkex.tls import config", True),
        ("hybridkex.crypto.kex", "if TYPE_CHECKING:\n    import hybridkex.tls", True),
        ("hybridkex.crypto.kex", "from hybridkex import ALL_GROUPS", True),
        ("hybridkex.tls.client", "from hybridkex.qkd.source import KeySource", True),
        ("hybridkex.tls.client", "from hybridkex.streams import SecureStream", True),
        ("hybridkex.tls.client", "import trio", True),
        ("hybridkex.tls.client", "def f():\n    import socket", True),
        ("hybridkex.auth.verify", "from hybridkex.tls.config import Policy", True),
        ("hybridkex.auth.verify", "import ssl", True),
        ("hybridkex.auth.system", "import ssl", False),
        ("hybridkex.auth.system", "import socket", True),
        ("hybridkex.shell.answers", "from hybridkex.qkd.source import KeySource", False),
        ("hybridkex.shell.answers", "import trio", True),
        ("hybridkex.streams.stream", "from hybridkex.qkd.source import KeySource", True),
        ("hybridkex.streams.stream", "from hybridkex.cli import main", True),
        ("hybridkex.streams.stream", "import asyncio", True),
        ("hybridkex.qkd.source", "def f():\n    from hybridkex.streams import x", True),
        ("hybridkex.qkd.etsi014.mutual_tls", "from hybridkex.streams import x", True),
        (
            "hybridkex.qkd.etsi014.mutual_tls",
            "def f():\n    from hybridkex.streams import x",
            False,
        ),
        ("hybridkex.qkd.etsi014.mutual_tls", "def f():\n    from hybridkex.cli import x", True),
        ("hybridkex.newpackage.x", "from hybridkex.secret import Secret", True),
    ],
)
def test_the_reader_sees_what_is_wrong(importer: str, source: str, wrong: bool) -> None:
    found = complaints(list(imports_of(importer, source, {"hybridkex.crypto.kex"})))
    assert bool(found) == wrong


def test_the_reader_sees_a_ring() -> None:
    modules = {"hybridkex.tls.a", "hybridkex.tls.b"}
    there = list(imports_of("hybridkex.tls.a", "from hybridkex.tls import b", modules))
    back = list(imports_of("hybridkex.tls.b", "import hybridkex.tls.a", modules))
    later = list(imports_of("hybridkex.tls.b", "def f():\n import hybridkex.tls.a", modules))
    assert cycle(there + back) is not None
    assert cycle(there + later) is None


def modules_of_extras() -> dict[str, set[str]]:
    """The modules of each extra that is not for tests, from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    return {
        extra: {
            "oqs" if package == "liboqs-python" else package.replace("-", "_")
            for package in (one.partition(">=")[0] for one in extras[extra])
        }
        for extra in extras.keys() - {"all", "dev", "docs", "test"}
    }


def optional_modules() -> set[str]:
    return set().union(*modules_of_extras().values())


WITHOUT_EXTRAS = """
import hybridkex, importlib, json, pkgutil, sys
sys.modules.update(dict.fromkeys(json.loads(sys.argv[1])))
commands = "hybridkex.__main__", "hybridkex.cli", "hybridkex.demos"  # see test_arguments.py
inner = "hybridkex.net.http"  # of two extras; its callers name theirs
errors = {}
for module in pkgutil.walk_packages(hybridkex.__path__, "hybridkex.", lambda name: None):
    if not module.name.startswith((*commands, inner)):
        try:
            importlib.import_module(module.name)
        except Exception as error:
            errors[module.name] = getattr(error, "name", ""), str(error)
print(json.dumps(errors))
"""


def test_a_module_whose_extra_is_missing_says_how_to_install_it() -> None:
    program = [sys.executable, "-c", WITHOUT_EXTRAS, json.dumps([*optional_modules()])]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60, cwd=ROOT, check=True)
    advised = {}
    for module, (package, text) in json.loads(done.stdout).items():
        extra = text.partition("pip install 'hybridkex[")[2].removesuffix("]'")
        modules = {"", *modules_of_extras().get(extra, ())}
        assert package.partition(".")[0] in modules, (module, text)
        advised[module] = extra
    expected = {
        "hybridkex.adapters.httpx": "http",
        "hybridkex.adapters.hypercorn": "http",
        "hybridkex.adapters.uvicorn": "http",
        "hybridkex.anyio": "anyio",
        "hybridkex.apps.tunnel": "apps",
        "hybridkex.kme.serve": "kme",
        "hybridkex.link": "link",
        "hybridkex.qkd.etsi014.client": "kme",
        "hybridkex.qkd.postgres_store": "postgres",
    }
    assert advised == advised | expected


@pytest.mark.parametrize(("module", "extra"), [("plots", "plot"), ("compiled", "fast")])
def test_a_further_extra_of_the_link_is_named(
    module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, f"hybridkex.link.{module}", raising=False)
    for package in modules_of_extras()[extra]:
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"pip install 'hybridkex\[{extra}\]'$"):
        importlib.import_module(f"hybridkex.link.{module}")


@pytest.mark.parametrize("module", ["hybridkex", "hybridkex.cli", "hybridkex.shell.qkd_keys"])
def test_no_extra_is_needed(module: str) -> None:
    """Every public name can be had without the extras."""
    optional = optional_modules()
    assert optional >= {"httpx", "h11", "numpy", "matplotlib", "oqs", "prometheus_client"}
    loaded = {name.partition(".")[0] for name in modules_after(f"from {module} import *")}
    assert "hybridkex" in loaded
    assert loaded & optional == set()


def test_importing_the_package_costs_next_to_nothing() -> None:
    """Its names come from their modules when they are first used (PEP 562)."""
    loaded = modules_after("import hybridkex")
    ours = {name for name in loaded if name.startswith("hybridkex.")}
    assert ours == set()
    assert loaded & {"trio", "cryptography", "ssl", "socket"} == set()


def test_connect_loads_what_it_uses() -> None:
    """The client's half of a program: no server, no key source, nothing of liboqs, no database. 384
    modules as this is written, 421 when the packages loaded all of theirs."""
    loaded = modules_after("import hybridkex.cli.actions.connect")
    for module in (
        "hybridkex.qkd",
        "hybridkex.streams.listener",
        "hybridkex.net.supervisor",
        "hybridkex.auth.dev_ca",
        "hybridkex.auth.web_of_trust",
        "hybridkex.crypto.rsa_pss_der",
        "importlib.metadata",
        "sqlite3",
        "asyncio",
    ):
        assert module not in loaded
    assert len(loaded) < 400


@pytest.mark.parametrize("package", ["hybridkex", "hybridkex.auth", "hybridkex.streams"])
def test_the_names_of_a_lazy_package_are_those_that_type_checkers_see(package: str) -> None:
    home = importlib.import_module(package)
    assert home.__file__ is not None
    tree = ast.parse(Path(home.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: item.module
        for item in block.body
        if isinstance(item, ast.ImportFrom)
        for alias in item.names
    }
    homes = {name: module for module, names in home._HOMES.items() for name in names}
    assert homes == seen
    assert sorted(homes) == sorted(home.__all__)
    for name in home.__all__:
        assert getattr(home, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Channel'"):
        home.Channel  # noqa: B018


def test_the_names_of_the_package_are_listed() -> None:
    assert set(hybridkex.__all__) <= set(dir(hybridkex))


def modules_after(statement: str) -> set[str]:
    """The modules that are loaded in a new interpreter once it has run a statement."""
    program = (
        f"import sys; before = {{*sys.modules}}; {statement}; print(*{{*sys.modules}} - before)"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())
