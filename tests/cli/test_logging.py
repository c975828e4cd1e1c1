"""What is logged is what ``docs/logging.md`` says, and no secret is in it."""

import ast
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import pytest
import trio
from leaks import leaks

from hybridkex import (
    ClientConfig,
    Policy,
    QkdPskSource,
    Requirement,
    SecureStream,
    ServerConfig,
    TrustStore,
)
from hybridkex.auth.dev_ca import DevCa
from hybridkex.cli import main
from hybridkex.errors import HybridkexError
from hybridkex.json_text import load_json
from hybridkex.kme.config import load_config
from hybridkex.kme.serve import KmeServer
from hybridkex.qkd.etsi014.client import Etsi014Source, KmeAccess, KmeClient
from hybridkex.secret import Secret

ROOT = Path(__file__).parents[2]
PREFER = Policy(psk=Requirement.PREFER)
LEVELS = {"DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"}


def calls(tree: ast.AST, name: str) -> Iterator[ast.Call]:
    """Calls of a method of this name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", None) == name:
            yield node


@cache
def logged_by(module: Path) -> frozenset[tuple[str, str]]:
    """Logger and level of each call that logs, read from the source."""
    source = module.read_text(encoding="utf-8")
    return frozenset(logged(module, ast.parse(source)) if "get_logger(" in source else ())


def logged(module: Path, tree: ast.Module) -> Iterator[tuple[str, str]]:
    loggers = {}
    own = ".".join(module.relative_to(ROOT).with_suffix("").parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            made = re.fullmatch(
                r"(?:BoundedLog\()?get_logger\((?:__name__|'([^']*)')\)+(?:, .*)?",
                ast.unparse(node.value),
            )
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            bounded = re.fullmatch(r"BoundedLog\((\w+)(?:, .*)?\)", ast.unparse(node.value))
            if made is not None:
                loggers[ast.unparse(target)] = made[1] or own
            elif bounded is not None and bounded[1] in loggers:
                loggers[ast.unparse(target)] = loggers[bounded[1]]
    for method in ("debug", "info", "warning", "error", "exception", "critical", "log"):
        for call in calls(tree, method):
            assert isinstance(call.func, ast.Attribute)
            logger = loggers.get(ast.unparse(call.func.value))
            if logger is None:
                continue
            if method == "log":
                # A method that passes a level on has those of its own calls.
                given = [call] if "logging." in ast.unparse(call.args[0]) else calls(tree, method)
                levels = " ".join(ast.unparse(one.args[0]) for one in given)
                words = set(re.findall(r"logging\.([A-Z]+)", levels))
                assert words, ast.unparse(call)
            else:
                words = {"ERROR" if method == "exception" else method.upper()}
            yield from ((logger, word) for word in words)
    # A supervisor of connections logs through the logger that it is given.
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("upervisor"):
            given = [ast.unparse(word.value) for word in node.keywords] + [
                ast.unparse(word) for word in node.args
            ]
            names = {loggers[word] for word in given if word in loggers}
            yield from ((name, word) for name in names for word in ("DEBUG", "WARNING", "ERROR"))


def test_the_page_lists_every_logger_and_level() -> None:
    found = set()
    for module in (ROOT / "hybridkex").rglob("*.py"):
        found |= set(logged_by(module))
    page = (ROOT / "docs" / "logging.md").read_text(encoding="utf-8")
    listed = {
        (name, level)
        for names, level in re.findall(r"^\| (`hybridkex.*?`) \| ([A-Z]+) \|", page, re.MULTILINE)
        for name in re.findall(r"`([\w.]+)`", names)
    }
    assert found == listed
    assert {level for _, level in found} <= LEVELS


def test_every_logger_is_found_by_that_reading() -> None:
    """A logger under a name that the reading does not know would be missing above."""
    for module in (ROOT / "hybridkex").rglob("*.py"):
        text = module.read_text(encoding="utf-8")
        if "get_logger(" in text and module.name != "text.py":
            assert logged_by(module), module


def test_a_program_that_asks_for_nothing_hears_nothing() -> None:
    """Without the NullHandler, logging writes warnings to standard error as a last resort."""
    program = "import hybridkex, logging; logging.getLogger('hybridkex.streams').warning('heard')"
    for begin, heard in (("", b""), ("import logging; logging.basicConfig();", b"heard")):
        done = subprocess.run(
            [sys.executable, "-c", begin + program], capture_output=True, check=False
        )
        assert done.returncode == 0
        assert heard in done.stderr
        assert bool(done.stderr) == bool(heard)


# --- no secret ------------------------------------------------------------------------------------


class Everything(logging.Handler):
    """Keeps every record as text, with the values and the traceback that it came with."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.name}: {self.format(record)} {record.args!r}")


async def meet(
    client: ClientConfig, server: ServerConfig, name: str = "localhost"
) -> tuple[SecureStream[trio.SocketStream], SecureStream[trio.SocketStream]]:
    """A handshake, a message and an end over loopback TCP."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    async with listener:
        tcp = await trio.open_tcp_stream("127.0.0.1", port)
        ours = SecureStream(tcp, client, server_hostname=name)
        theirs = SecureStream(await listener.accept(), server)
    async with ours, theirs:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(theirs.do_handshake)
            await ours.do_handshake()
        await ours.send_all(b"hello")
        assert await theirs.receive_some() == b"hello"
    return ours, theirs


async def test_no_secret_in_the_log_of_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """No secret that exists meanwhile stands in a log line or in the output.

    Why it failed at times under load, until November 2026: not for a secret. It went on as soon as
    kme-a had stored keys. While kme-b had not stored the same ones yet, kme-b refused the key that
    alice drew, and the handshake had no QKD key (503). With a delay of 0.4 s before kme-b stores
    keys it failed each time. The test waits for both KMEs now, and a KME repeats such a request
    (``LATE_WAITS``); with the same delay it passes.

    It is not a chance match: eight bytes of about 80 secrets are looked for in 25,000 characters,
    in five notations. That happens less than once in 10^10 runs.
    """
    secrets: set[bytes] = set()
    make = Secret.__init__

    def remember(self: Secret, value: bytes | bytearray | memoryview) -> None:
        secrets.add(bytes(value))
        make(self, value)

    monkeypatch.setattr(Secret, "__init__", remember)
    handler = Everything()
    root, library = logging.getLogger(), logging.getLogger("hybridkex")
    levels = root.level, library.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    library.setLevel(logging.DEBUG)
    try:
        await everything(tmp_path)
    finally:
        root.removeHandler(handler)
        root.setLevel(levels[0])
        library.setLevel(levels[1])

    out, err = capfd.readouterr()
    text = "\n".join([*handler.lines, out, err])
    names = {line.partition(":")[0] for line in handler.lines}
    assert {"hybridkex.qkd.etsi014.client", "hybridkex.kme.serve"} <= names
    assert {"hybridkex.qkd.keys", "httpcore.http11"} <= names
    kept = [secret for secret in secrets if len(secret) >= 16 and len(set(secret)) > 4]
    assert len(kept) > 50  # of the key schedules, the KMEs' stores and the link
    assert not leaks(text, *kept)
    assert leaks(f"{text}{kept[0]!r}", *kept)


async def everything(folder: Path) -> None:
    """A QKD link, two KMEs, handshakes with and without a QKD key, and some that fail."""
    assert main(["kme", "dev-up", str(folder), "--ports", "0,0", "--no-serve"]) == 0
    path = folder / "kme.toml"
    link = "producer = 'link'\nlink = {preset = 'rusca2018', distance_km = 0, block_bits = 30000}"
    path.write_text(path.read_text().replace('producer = "random"', link))
    server = KmeServer(load_config(path))
    ca = DevCa.create()
    trust = TrustStore.from_pem(ca.pem)
    identities = (ca.issue("localhost"),)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            where = await nursery.start(server.serve)

            def client(sae: str, kme: str) -> KmeClient:
                files = {
                    "ca": folder / sae / "ca.pem",
                    "certificate": folder / sae / "cert.pem",
                    "key": folder / sae / "key.pem",
                }
                return KmeClient(KmeAccess(url=f"https://{where.kmes[kme]}", **files))

            async with client("alice", "kme-a") as a, client("bob", "kme-b") as b:
                alice = Etsi014Source(a, sae="alice", peer_sae="bob")
                bob = Etsi014Source(b, sae="bob", peer_sae="alice")
                # Of both: a key that one end alone has cannot be used yet.
                for status in (partial(a.status, "bob"), partial(b.status, "alice")):
                    while not (await status()).stored_key_count:  # noqa: ASYNC110  # another's
                        await trio.sleep(0.05)
                ours = partial(ClientConfig, verifier=trust)
                theirs = partial(ServerConfig, identities=identities)
                stream, _ = await meet(
                    ours(psk_source=QkdPskSource(alice)), theirs(psk_source=QkdPskSource(bob))
                )
                assert stream.session.qkd_key_ids
                # A peer for whom the KME has no key.
                nobody = QkdPskSource(Etsi014Source(a, sae="alice", peer_sae="nobody"))
                await failing(ours(psk_source=nobody), theirs(psk_source=QkdPskSource(bob)))
                stream, _ = await meet(ours(psk_source=nobody, policy=PREFER), theirs())
                assert stream.session.qkd_fallback
                await failing(ours(), theirs(), "other.example")
            tcp = await trio.open_tcp_stream("127.0.0.1", where.kmes["kme-a"].port)
            async with tcp:  # rubbish at a KME's door
                await tcp.send_all(b"GET / HTTP/1.1\r\n\r\n")
                while await tcp.receive_some():
                    pass
            server.close()


async def failing(client: ClientConfig, server: ServerConfig, name: str = "localhost") -> None:
    with pytest.raises(BaseExceptionGroup) as raised:
        await meet(client, server, name)
    assert raised.group_contains((trio.BrokenResourceError, HybridkexError))


def test_other_libraries_log_in_the_same_form() -> None:
    program = """
import logging
from hybridkex.cli.logs import set_up_logging
set_up_logging("info", "json")
logging.getLogger("another.library").warning("one\\ntwo \\x1b[31m")
logging.getLogger("psycopg.pool").warning("discarding closed connection: <object at 0x7f5c>")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    [line] = done.stderr.splitlines()
    said = load_json(line)
    assert (said["logger"], said["level"]) == ("another.library", "WARNING")
    assert said["message"].isprintable()
