"""Every socket that the project listens on is under the supervisor."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
ALLOWED = {
    "hybridkex/net/supervisor.py",
    # Stages of a demonstration, on loopback, for as long as one recording takes.
    "hybridkex/demos/rndl/now/tap.py",
    "hybridkex/demos/rndl/now/link.py",
}


def test_nobody_else_accepts_connections() -> None:
    found = set()
    for folder in ("hybridkex", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and node.attr in (
                    "serve_listeners",
                    "serve_tcp",
                    "serve_ssl_over_tcp",
                ):
                    found.add(path.relative_to(ROOT).as_posix())
    assert found <= ALLOWED
