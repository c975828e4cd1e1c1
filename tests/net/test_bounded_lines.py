"""Every log line that a peer may cause is written at a bounded rate.

The sources are read: whoever writes to a logger itself, and not to a ``BoundedLog``, is in the
table, with the reason why a peer cannot cause the line without end, or why it shall be there.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from waiting import trio_until

from hybridkex import ClientConfig, DevCa, Pins, ServerConfig, TrustStore, open_secure_tcp_stream
from hybridkex.auth import InsecureNoVerification, spki_sha256
from hybridkex.cli.actions.listen import _listen
from hybridkex.net import supervisor

ROOT = Path(__file__).parents[2]
WRITES = {"info", "warning", "error", "critical", "exception", "log"}

OWNER = "what the owner of the process did: a start, an end, a reload"
FILES = "only whoever may remove the files of this user causes it"
DEFECT = "a defect of ours, which ends what it concerns"
DELIVERED = "the record of who had which key; limits.rate and limits.peer_rate bound the requests"
KNOWN = "a peer that has proved who it is: each of its connections is listed"
ALLOWED = {
    ("hybridkex/apps/tunnel/server.py", "_hold"): OWNER,
    ("hybridkex/apps/tunnel/server.py", "_secure"): KNOWN,
    ("hybridkex/apps/tunnel/server.py", "run"): OWNER,
    ("hybridkex/apps/tunnel/service.py", "_reload"): OWNER,
    ("hybridkex/apps/tunnel/service.py", "_say_ready"): OWNER,
    ("hybridkex/apps/tunnel/sockets.py", "failed"): FILES,
    ("hybridkex/apps/tunnel/sockets.py", "opened"): FILES,
    ("hybridkex/apps/tunnel/workers.py", "_replace"): "each attempt waits longer, up to 30 s",
    ("hybridkex/apps/tunnel/workers.py", "_watch"): "a process that ended; its successor waits",
    ("hybridkex/apps/wireguard/rotation.py", "_check"): "every 10 s at most; of another local user",
    ("hybridkex/apps/wireguard/rotation.py", "_complain"): "once until a key is installed",
    ("hybridkex/apps/wireguard/rotation.py", "run_initiator"): "our own attempts, with back-off",
    ("hybridkex/apps/wireguard/rotation.py", "start"): OWNER,
    ("hybridkex/auth/known_peers.py", "_remember"): "once for a connection that we make",
    ("hybridkex/cli/actions/kme.py", "_reload"): OWNER,
    ("hybridkex/cli/actions/tunnel.py", "_serve_metrics"): OWNER,
    ("hybridkex/cli/actions/wg_psk.py", "_report"): "the owner's reader of standard output",
    ("hybridkex/cli/own_certificate.py", "watched"): "twice for a certificate of ours",
    ("hybridkex/cli/running.py", "note"): OWNER,
    ("hybridkex/kme/audit.py", "_tell"): "once a minute",
    ("hybridkex/kme/audit.py", "_write_group"): FILES,
    ("hybridkex/kme/entity.py", "_log_keys"): "what its callers say",
    ("hybridkex/kme/entity.py", "_note_lost"): "once for each key that is erased",
    ("hybridkex/kme/entity.py", "_renew_when_asked"): OWNER,
    ("hybridkex/kme/entity.py", "_take_batch"): "once for the keys that a producer of ours made",
    ("hybridkex/kme/entity.py", "get_key"): DELIVERED,
    ("hybridkex/kme/entity.py", "get_key_with_ids"): DELIVERED,
    ("hybridkex/kme/entity.py", "peer_allots"): DELIVERED,
    ("hybridkex/kme/link_feed.py", "_slow_down"): "after a wait of 16 s or more",
    ("hybridkex/kme/link_feed.py", "link_feed"): OWNER,
    ("hybridkex/kme/link_feed.py", "note"): "once for a block of keys, and once for a link",
    ("hybridkex/kme/link_feed.py", "ready"): "once a minute",
    ("hybridkex/kme/link_feed.py", "renew"): OWNER,
    ("hybridkex/kme/serve.py", "_feed"): "once for a producer, at its end",
    ("hybridkex/kme/serve.py", "_keep_running"): DEFECT,
    ("hybridkex/kme/serve.py", "of"): "of a reload, and twice for a certificate",
    ("hybridkex/net/descriptors.py", "_log_reduced"): "once for each limit of the process",
    ("hybridkex/net/log.py", "flush"): "where lines are counted",
    ("hybridkex/net/log.py", "log"): "where lines are counted",
    ("hybridkex/qkd/postgres_store.py", "_prepare"): OWNER,
    ("hybridkex/qkd/postgres_store.py", "reserve"): "once for each damaged key, which is erased",
    ("hybridkex/qkd/prefetch.py", "fill"): "our own attempts, with back-off",
    ("hybridkex/qkd/sqlite_store.py", "_check_files"): FILES,
    ("hybridkex/qkd/sqlite_store.py", "reserve"): "once for each damaged key, which is erased",
    ("hybridkex/shell/key_renewer.py", "_run"): DEFECT,
    ("hybridkex/shell/pad_filler.py", "_guarded"): DEFECT,
    ("hybridkex/shell/ticket_file.py", "_write"): "at a client, once until its file can be written",
    ("examples/chat/__main__.py", "handle"): KNOWN,
    ("examples/chat/__main__.py", "renewed"): KNOWN,
    ("examples/chat/client.py", "_reconnect"): "our own attempts, with back-off",
    ("examples/chat/hub.py", "_deliver"): KNOWN,
    ("examples/chat/hub.py", "_write"): "once when the store fails, and once when it works again",
    ("examples/chat/hub.py", "serve"): KNOWN,
}


TELLERS = {"self._log_keys"}
"""Methods that write what their callers say."""


def loggers(tree: ast.AST) -> set[str]:
    """The names of a module that are loggers, and that of the logger of a class in ``net``."""
    found = {"_logger"}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign | ast.AnnAssign) or not isinstance(node.value, ast.Call):
            continue
        if ast.unparse(node.value.func) in ("get_logger", "logging.getLogger"):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            found.add(ast.unparse(target))
    return found


def writers(node: ast.AST, names: set[str], function: str = "") -> Iterator[str]:
    """The functions that write to one of these loggers, or pass on a method of it that does."""
    for child in ast.iter_child_nodes(node):
        inner = function
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            inner = child.name
        if not isinstance(child, ast.Attribute):
            yield from writers(child, names, inner)
        elif ast.unparse(child) in TELLERS or (
            child.attr in WRITES and ast.unparse(child.value).removeprefix("self.") in names
        ):
            yield function
        else:
            yield from writers(child, names, inner)


def test_nobody_else_writes_to_a_logger() -> None:
    found = set()
    for folder in ("hybridkex", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            text, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
            if "ogger" in text:  # get_logger, getLogger, _logger
                tree = ast.parse(text)
                found |= {(name, function) for function in writers(tree, loggers(tree))}
    assert found == set(ALLOWED), "use BoundedLog where a peer may cause the line without end"


@pytest.mark.parametrize("by", ["nothing", "no verification", "authority", "pin"])
async def test_what_listen_prints_of_sessions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], by: str
) -> None:
    """Of each session of a known client; else a few, and how many there were."""
    monkeypatch.setattr(supervisor, "SERVED_RATE", 0.001)
    monkeypatch.setattr(supervisor, "SERVED_BURST", 3)
    ca = DevCa.create(algorithm="ed25519")
    trust, identity = TrustStore((ca.certificate,)), ca.issue("127.0.0.1", algorithm="ed25519")
    verifiers = {
        "no verification": InsecureNoVerification(),
        "authority": trust,
        "pin": Pins(frozenset((spki_sha256(identity.leaf),))),
    }
    server = ServerConfig(identities=(identity,), client_verifier=verifiers.get(by))
    client = ClientConfig(verifier=trust, identity=identity)
    channel = SimpleNamespace(bind="127.0.0.1", json=False)
    options: Any = SimpleNamespace(
        port=0, port_file=tmp_path / "port", once=False, echo=True, channel=channel
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_listen, options, server)
        await trio_until((tmp_path / "port").exists)
        port = int((tmp_path / "port").read_text())
        for _ in range(7):
            async with await open_secure_tcp_stream("127.0.0.1", port, client) as stream:
                await stream.send_all(b"x")
                assert await stream.receive_some() == b"x"
        nursery.cancel_scope.cancel()
    known = by in ("authority", "pin")
    assert capfd.readouterr().err.count("keys from:") == (7 if known else 3)
