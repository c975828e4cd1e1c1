"""Every socket that the project listens on is under the supervisor."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOOPS = {"serve_listeners", "serve_tcp", "serve_ssl_over_tcp", "create_server", "start_server"}
LOOPS |= {"create_unix_server", "start_unix_server", "serve_forever"}
SOCKETS = {"open_tcp_listeners", "open_unix_listeners", "create_tcp_listener", "TCPServer"}
SOCKETS |= {"create_unix_listener", "HTTPServer", "UnixStreamServer"}

WORDS = {*LOOPS, *SOCKETS, ".accept(", ".bind(", ".listen("}

STAGE = "a stage of a demonstration, on loopback, for as long as one recording takes"
ALLOWED = {
    "hybridkex/net/supervisor.py": "the supervisor",
    "hybridkex/net/listening.py": "makes the sockets that it serves",
    "hybridkex/apps/tunnel/sockets.py": "makes the Unix sockets that it serves",
    "hybridkex/streams/listener.py": "the listener of secure streams, which it serves",
    "hybridkex/aio/connect.py": "asyncio's own server; hybridkex.aio.places bounds its connections",
    "hybridkex/cli/actions/listen.py": "listen --once: of one connection, whose failure is its end",
    "hybridkex/demos/rndl/now/link.py": STAGE,
    "hybridkex/demos/rndl/now/tap.py": STAGE,
}


def accepting(tree: ast.AST) -> Iterator[ast.expr]:
    """Calls that make a listening socket or accept connections from one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name, words = node.func.attr, bool(node.args or node.keywords)
            if words == {"accept": False, "bind": True, "listen": True}.get(name):  # of a socket
                yield node
        if isinstance(node, ast.Attribute) and node.attr in LOOPS | SOCKETS:
            yield node


def test_nobody_else_accepts_connections() -> None:
    found = set()
    for folder in ("hybridkex", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            if any(word in text for word in WORDS) and any(accepting(ast.parse(text))):
                found.add(path.relative_to(ROOT).as_posix())
    assert found == set(ALLOWED)
