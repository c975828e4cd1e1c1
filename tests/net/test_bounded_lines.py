"""Where peers come in, every log line that they may cause is written at a bounded rate."""

import ast
from pathlib import Path

import pytest

import hybridkex

HOME = Path(hybridkex.__file__).parent
DOORS = ("aio", "streams", "shell", "adapters", "net", "apps/transfer", "combiner", "tls", "auth")
"""The rooms whose code runs for a peer before, or without, anybody's permission."""
WRITES = {"info", "warning", "error", "critical", "exception", "log"}
ALLOWED = {
    # A fault of ours that ends the connection.
    ("shell/key_renewer.py", "exception"),
    ("shell/pad_filler.py", "exception"),
    # What writes the bounded lines. A supervisor's ``log`` is one of them.
    ("net/log.py", "warning"),
    ("net/log.py", "log"),
    ("net/supervisor.py", "log"),
    # Once, when a limit is set.
    ("net/descriptors.py", "warning"),
    # At a client, of its own file: once for a connection that it makes.
    ("auth/known_peers.py", "warning"),
    # Also there, once until the file can be written again.
    ("shell/ticket_file.py", "warning"),
}


def modules() -> list[Path]:
    found = [path for door in DOORS for path in sorted((HOME / door).rglob("*.py"))]
    return [HOME / "anyio.py", *found]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(HOME)))
def test_no_door_writes_to_a_logger_itself(path: Path) -> None:
    name = str(path.relative_to(HOME))
    unbounded = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        target, method = node.func.value, node.func.attr
        logger = target.attr if isinstance(target, ast.Attribute) else getattr(target, "id", "")
        is_logger = logger.lower().strip("_") in ("log", "logger")
        if is_logger and method in WRITES and (name, method) not in ALLOWED:
            unbounded.append(f"{name}:{node.lineno}: {logger}.{method}")
    assert not unbounded, "use BoundedLog: a peer may cause these lines without end"
