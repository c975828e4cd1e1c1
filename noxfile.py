"""Every check of the project: ``nox`` runs them all, ``nox -s lint`` one of them.

Sessions reuse their environments; the first run installs them.
"""

from pathlib import Path

import nox

nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = False
nox.options.sessions = ["lint", "types", "tests", "docs", "wheel", "smoke"]

SMOKE = [
    "tests/aio/test_aio.py",
    "tests/apps/test_chat.py",
    "tests/apps/test_transfer.py::test_no_task_is_left",
    "tests/apps/test_tunnel.py::test_no_task_is_left",
    "tests/apps/test_tunnel_programs.py",
    "tests/auth",
    "tests/qkd/test_store.py",
    "tests/streams",
    "tests/test_imports.py",
    "tests/test_public_api.py",
    "tests/tls/test_pair.py",
    "tests/tls/test_pyopenssl.py",
    "tests/wire",
]
"""The tests that run on the other Python versions. They include programs and services that exit:
Python 3.13 reports unclosed resources that older versions do not."""


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting with ruff."""
    session.install("ruff>=0.13")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Check types with mypy --strict."""
    session.install("-e", ".[dev]")
    session.run("mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """Run the whole suite; arguments after ``--`` go to pytest."""
    session.install("-e", ".[test]")
    session.run("pytest", "-q", "-n", "auto", *session.posargs)


@nox.session(python=["3.12", "3.13"])
def smoke(session: nox.Session) -> None:
    """Run the tests of SMOKE that are not marked slow, on the other Python versions."""
    session.install("-e", ".[test]")
    session.run("pytest", "-q", "-n", "auto", "-m", "not slow", *(session.posargs or SMOKE))


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation site; warnings are errors."""
    session.install("-e", ".[docs,apps,kme,link]")
    session.run("mkdocs", "build", "--quiet", "--strict", env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session
def wheel(session: nox.Session) -> None:
    """Build the wheel and the source distribution, check them, and use the wheel by itself."""
    session.install("build", "twine")
    folder = Path(session.create_tmp())
    for earlier in folder.iterdir():
        earlier.unlink()
    session.run("python", "-m", "build", "--outdir", str(folder), ".")
    session.run("twine", "check", "--strict", *map(str, folder.iterdir()))
    session.install("--force-reinstall", *map(str, folder.glob("*.whl")))
    with session.chdir(folder):
        session.run("hybridkex", "--version")
        session.run("hybridkex", "doctor")
