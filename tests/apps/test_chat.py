"""The chat as people use it: processes, a terminal, two hundred clients, a server that dies."""

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path

import pyte
import pytest
import trio
import trio.testing

from examples.chat.client import Client
from examples.chat.hub import Hub
from examples.chat.protocol import (
    MAX_FRAME,
    Action,
    Entry,
    Frames,
    Hello,
    Message,
    ProtocolError,
    decode,
    encode,
    printable,
)
from examples.chat.store import Store
from hybridkex import (
    ClientConfig,
    DevCa,
    Identity,
    QkdKeys,
    SecureStream,
    ServerConfig,
    TrustStore,
    serve_secure_tcp,
)
from hybridkex.apps.backoff import Backoff
from hybridkex.auth.dev_ca import write_identity
from hybridkex.qkd.in_process import in_process_pair

ROOT = Path(__file__).parents[2]
CHAT = [sys.executable, "-m", "examples.chat"]
WITHIN = 30


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The server's, alice's and bob's certificates, and a stranger's authority."""
    folder = tmp_path_factory.mktemp("ids")
    authority = DevCa.create()
    for name in ("localhost", "alice", "bob"):
        write_identity(folder / name, authority, authority.issue(name))
    stranger = DevCa.create()
    write_identity(folder / "stranger", stranger, stranger.issue("localhost"))
    return folder


def options(ids: Path, name: str) -> list[str]:
    words = [(f"--{one}", str(ids / name / f"{one}.pem")) for one in ("ca", "cert", "key")]
    return [word for pair in words for word in pair]


class Processes:
    def __init__(self, ids: Path, folder: Path) -> None:
        self._ids, self._folder = ids, folder
        self.started: list[subprocess.Popen[str]] = []

    def start(self, name: str, *words: object) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [*CHAT, *map(str, words), *options(self._ids, name)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        self.started.append(process)
        return process

    def listening(self, mode: str, *words: object, port: int = 0) -> tuple[int, int]:
        """A server, or the listening one of a pair: its index and its port."""
        port_file = self._folder / f"port-{len(self.started)}"
        address = ("--bind", "127.0.0.1", "--port", port, "--port-file", port_file)
        process = self.start("localhost", mode, *address, *words)
        deadline = time.monotonic() + WITHIN
        while not port_file.exists():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return len(self.started) - 1, int(port_file.read_text())


@pytest.fixture
def processes(ids: Path, tmp_path: Path) -> Iterator[Processes]:
    made = Processes(ids, tmp_path)
    yield made
    for process in made.started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def read_until(process: "subprocess.Popen[str]", text: str) -> str:
    """The output, to the line with this in it."""
    assert process.stdout is not None
    deadline, seen = time.monotonic() + WITHIN, ""
    while text not in seen:
        ready, _, _ = select.select([process.stdout], [], [], deadline - time.monotonic())
        assert ready, f"no {text!r} in {seen!r}"
        data = os.read(process.stdout.fileno(), 65536)
        assert data, f"no {text!r} in {seen!r}"
        seen += data.decode()
    return seen


def type_in(process: "subprocess.Popen[str]", line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


# --- as processes ----------------------------------------------------------------------------


def test_rooms_names_and_leaving(processes: Processes) -> None:
    index, port = processes.listening("server")
    alice = processes.start("alice", "client", f"localhost:{port}", "--nick", "alice")
    read_until(alice, "alice joined lobby")
    bob = processes.start("bob", "client", f"localhost:{port}", "--nick", "bob")
    read_until(alice, "bob joined lobby")

    type_in(bob, "good \x1b[31mmorning\u202e")
    assert "<bob> good [31mmorning" in read_until(alice, "morning")

    other = processes.start("bob", "client", f"localhost:{port}", "--nick", "alice")
    out, _ = other.communicate(timeout=WITHIN)
    assert (out, other.returncode) == ("chat: the nickname 'alice' is taken\n", 1)

    type_in(bob, "/join den")
    read_until(bob, "bob joined den")
    read_until(alice, "bob left lobby")
    type_in(bob, "nobody hears this")
    read_until(bob, "nobody hears this")
    type_in(bob, "/rooms")
    read_until(bob, "den (1), lobby (1)")
    type_in(alice, "/who")
    assert "nobody" not in read_until(alice, "in lobby: alice")

    type_in(bob, "/quit")
    assert bob.wait(WITHIN) == 0
    again = processes.start("alice", "client", f"localhost:{port}", "--nick", "bob")
    read_until(again, "bob joined lobby")  # The name is free again.
    processes.started[index].send_signal(signal.SIGTERM)
    assert processes.started[index].wait(WITHIN) == 0


def test_a_wrong_certificate_is_refused_in_one_line(processes: Processes, ids: Path) -> None:
    _, port = processes.listening("server")
    out, _ = processes.start(
        "stranger", "client", f"localhost:{port}", "--nick", "eve"
    ).communicate(timeout=WITHIN)
    assert len(out.splitlines()) == 1
    assert out.startswith("chat: ")
    # One who trusts the server and is not trusted by it.
    mixed = [*options(ids, "stranger"), "--ca", str(ids / "localhost" / "ca.pem")]
    words = [*CHAT, "client", f"localhost:{port}", "--nick", "eve", *mixed]
    made = subprocess.run(
        words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=WITHIN, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert (made.returncode, len(made.stderr.splitlines())) == (1, 1), made.stderr
    assert "unknown_ca" in made.stderr or "certificate" in made.stderr


def test_two_parties_without_a_server(processes: Processes) -> None:
    index, port = processes.listening("pair", "--nick", "alice")
    alice = processes.started[index]
    bob = processes.start("bob", "pair", f"localhost:{port}", "--nick", "bob", "--rekey", "0.3")
    read_until(alice, "bob joined pair")
    for number in range(20):
        type_in(bob, f"b{number}.")
        type_in(alice, f"a{number}.")
        time.sleep(0.02)
    said = read_until(alice, "b19."), read_until(bob, "a19.")
    for text, who in zip(said, "ba", strict=True):
        assert re.findall(rf" ({who}\d+)\.", text) == [f"{who}{number}" for number in range(20)]
    third = processes.start("bob", "pair", f"localhost:{port}", "--nick", "carol")
    assert third.communicate(timeout=WITHIN)[0] == "chat: there is no seat left\n"
    type_in(alice, "/keys")
    read_until(alice, "keys rest on:")
    type_in(bob, "/quit")
    read_until(alice, "bob left pair")
    assert bob.wait(WITHIN) == 0
    type_in(alice, "/quit")
    assert alice.wait(WITHIN) == 0


# --- on a terminal ---------------------------------------------------------------------------


class Screen:
    """A terminal of 24 lines that a process runs on."""

    def __init__(self, words: list[str]) -> None:
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            os.environ.update(TERM="xterm", PYTHONPATH=str(ROOT))
            os.execv(words[0], words)
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 130, 0, 0))
        self._screen = pyte.Screen(130, 24)
        self._screen.write_process_input = self.type  # It is asked where its cursor stands.
        self._stream = pyte.ByteStream(self._screen)

    def wait_for(self, shown: Callable[[list[str]], bool]) -> list[str]:
        deadline = time.monotonic() + WITHIN
        while True:
            lines = [line.rstrip() for line in self._screen.display if line.strip()]
            if shown(lines):
                return lines
            left = deadline - time.monotonic()
            assert select.select([self.terminal], [], [], max(left, 0))[0], lines
            self._stream.feed(os.read(self.terminal, 65536))

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def end(self) -> int:
        """Its exit status; what it still says has to be read meanwhile."""
        deadline = time.monotonic() + WITHIN
        while time.monotonic() < deadline:
            if select.select([self.terminal], [], [], 0.02)[0]:
                try:
                    os.read(self.terminal, 65536)
                except OSError:
                    break  # Nobody is on it any more.
        _, status = os.waitpid(self.pid, 0)
        os.close(self.terminal)
        return os.waitstatus_to_exitcode(status)


def test_input_line_history_and_status_line(processes: Processes, ids: Path) -> None:
    _, port = processes.listening("server")
    bob = processes.start("bob", "client", f"localhost:{port}", "--nick", "bob")
    read_until(bob, "bob joined lobby")
    words = [*CHAT, "client", f"localhost:{port}", "--nick", "alice", *options(ids, "alice")]
    screen = Screen(words)
    lines = screen.wait_for(lambda lines: bool(lines) and "alice in lobby |" in lines[-1])
    lines = screen.wait_for(lambda lines: "keys" in lines[-1])
    assert "ML-KEM-768 + X25519, by certificate | keys" in lines[-1]
    screen.type("half a li")
    screen.wait_for(lambda lines: any("> half a li" in line for line in lines))
    type_in(bob, "in between")
    # What others say goes above the line that is being typed, and leaves it as it is.
    lines = screen.wait_for(lambda lines: any("<bob> in between" in line for line in lines))
    screen.wait_for(lambda lines: lines[-2].startswith("> half a li"))
    screen.type("ne\r")
    read_until(bob, "<alice> half a line")
    screen.type("\x1b[A")  # The arrow up: the last line again.
    screen.wait_for(lambda lines: lines[-2].startswith("> half a line"))
    screen.type("\r")
    read_until(bob, "<alice> half a line")
    screen.type("\x04")
    read_until(bob, "alice left lobby")
    assert screen.end() == 0


# --- many, and faults ------------------------------------------------------------------------

Connect = Callable[[], Awaitable[SecureStream[trio.SocketStream]]]


def connector(ids: Path, name: str, port: int) -> Connect:
    config = ClientConfig(
        verifier=TrustStore.from_file(ids / name / "ca.pem"),
        identity=Identity.from_files(ids / name / "cert.pem", ids / name / "key.pem"),
        alpn=("hkx-chat/1",),
    )

    async def connect() -> SecureStream[trio.SocketStream]:
        tcp = await trio.open_tcp_stream("127.0.0.1", port)
        stream = SecureStream(tcp, config, server_hostname="localhost")
        await stream.do_handshake()
        return stream

    return connect


async def collect(client: Client, heard: list[str]) -> None:
    async for news in client.news:
        if isinstance(news, Entry) and news.kind == "said":
            heard.append(news.text)


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(WITHIN):
        while not condition():  # noqa: ASYNC110  # of another process, often
            await trio.sleep(0.02)


async def test_two_hundred_clients_and_one_that_never_reads(
    processes: Processes, ids: Path
) -> None:
    index, port = await trio.to_thread.run_sync(
        partial(processes.listening, "server", "--queue", "40", "--log-level", "warning")
    )
    connect = connector(ids, "alice", port)
    clients = [Client(connect, f"c{number}", "lobby") for number in range(199)]
    heard: list[list[str]] = [[] for _ in clients]
    async with trio.open_nursery() as nursery:
        for client, said in zip(clients, heard, strict=True):
            nursery.start_soon(client.run)
            nursery.start_soon(collect, client, said)
        await until(lambda: all(client.online for client in clients))
        # The one that never reads: with a small buffer, so that it is full soon.
        sleeper = await trio.open_tcp_stream("127.0.0.1", port)
        sleeper.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stream = SecureStream(
            sleeper,
            ClientConfig(
                verifier=TrustStore.from_file(ids / "bob" / "ca.pem"),
                identity=Identity.from_files(ids / "bob" / "cert.pem", ids / "bob" / "key.pem"),
                alpn=("hkx-chat/1",),
            ),
            server_hostname="localhost",
        )
        await Frames(stream).send(Hello("sleeper", "lobby", "ab" * 32, 0))
        texts: list[str] = []
        server = processes.started[index]
        assert server.stdout is not None
        os.set_blocking(server.stdout.fileno(), False)
        told = ""
        with trio.fail_after(WITHIN):
            while "sleeper was dropped: you did not read" not in told:
                texts.append(f"{len(texts)} " + "x" * 3900)
                await clients[len(texts) % 199].say(texts[-1])
                await until(lambda: all(len(said) == len(texts) for said in heard))
                with contextlib.suppress(BlockingIOError):
                    told += os.read(server.stdout.fileno(), 65536).decode()
        # It is told why when it comes back, and goes on where it was.
        back = Client(connector(ids, "bob", port), "sleeper", "lobby")
        back._token = "ab" * 32
        nursery.start_soon(back.run)
        reason = await back.news.receive()
        assert "you were dropped: you did not read" in reason.text
        again: list[str] = []
        nursery.start_soon(collect, back, again)
        await until(lambda: len(again) == len(texts))
        assert sorted(again) == sorted(texts)
        assert all(sorted(said) == sorted(texts) for said in heard)
        await trio.aclose_forcefully(stream)
        nursery.cancel_scope.cancel()


async def test_a_server_that_is_killed(processes: Processes, ids: Path, tmp_path: Path) -> None:
    store = ("--store", tmp_path / "log.sqlite")
    index, port = await trio.to_thread.run_sync(partial(processes.listening, "server", *store))
    backoff = partial(Backoff, first=0.1, most=0.5)
    clients = [
        Client(connector(ids, "alice", port), f"c{number}", "lobby", backoff=backoff())
        for number in range(5)
    ]
    heard: list[list[str]] = [[] for _ in clients]
    said: list[str] = []

    async with trio.open_nursery() as nursery:
        for client, texts in zip(clients, heard, strict=True):
            nursery.start_soon(client.run)
            nursery.start_soon(collect, client, texts)
        await until(lambda: all(client.online for client in clients))

        async def talk(number: int) -> None:
            for count in range(60):
                said.append(f"{number}:{count}")
                await clients[number].say(said[-1])
                await trio.sleep(0.01)

        async with trio.open_nursery() as talks:
            for number in range(5):
                talks.start_soon(talk, number)
            await until(lambda: len(heard[0]) > 50)
            processes.started[index].kill()
            await until(lambda: not any(client.online for client in clients))
            await trio.to_thread.run_sync(partial(processes.listening, "server", *store, port=port))
        await until(lambda: all(len(texts) >= len(said) for texts in heard))
        await until(lambda: not any(client.unacknowledged for client in clients))
        for texts in heard:
            assert sorted(texts) == sorted(said)
            mine = [text for text in texts if text.startswith("3:")]
            assert mine == [f"3:{count}" for count in range(60)]
        assert all(client.connections == 2 for client in clients)
        nursery.cancel_scope.cancel()


async def test_new_keys_under_traffic(nursery: trio.Nursery) -> None:
    """Only QKD keys, both ends authenticated by them; no message lost or doubled."""
    before = len(os.listdir("/proc/self/fd"))
    ours, theirs = in_process_pair("alice", "bob")
    hub = Hub(Store())
    key_ids: list[str] = []
    alpn = ("hkx-chat/1",)

    async def handle(stream: SecureStream[trio.SocketStream]) -> None:
        key_ids.extend(stream.session.qkd_key_ids)
        await hub.serve(stream, "")

    server = ServerConfig(psk_source=QkdKeys(theirs), alpn=alpn)
    keys = QkdKeys(ours)
    async with trio.open_nursery() as all_of_it:
        all_of_it.start_soon(hub.run)
        listeners = await all_of_it.start(
            partial(serve_secure_tcp, handle, 0, server, host="127.0.0.1")
        )
        port = listeners[0].transport_listener.socket.getsockname()[1]

        async def connect() -> SecureStream[trio.SocketStream]:
            tcp = await trio.open_tcp_stream("127.0.0.1", port)
            stream = SecureStream(tcp, ClientConfig(psk_source=keys, alpn=alpn))
            await stream.do_handshake()
            return stream

        clients = [Client(connect, name, "lobby", rekey=0.1) for name in ("a", "b")]
        heard: list[list[str]] = [[], []]
        for client, texts in zip(clients, heard, strict=True):
            all_of_it.start_soon(client.run)
            all_of_it.start_soon(collect, client, texts)
        await until(lambda: all(client.online for client in clients))
        count = 0
        while min(client.connections for client in clients) < 8:
            await clients[count % 2].say(str(count))
            assert clients[0].online
            count += 1
            await trio.sleep(0.001)
        await until(lambda: all(len(texts) >= count for texts in heard))
        for texts in heard:
            assert sorted(texts, key=int) == [str(number) for number in range(count)]
        assert count > 50
        assert len(key_ids) == len(set(key_ids)) >= 16
        for client in clients:
            await client.leave()
        await until(lambda: not hub._connections)
        all_of_it.cancel_scope.cancel()
    assert len(os.listdir("/proc/self/fd")) <= before + 1


# --- the protocol ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff",
        b"[]",
        b"[" * 30_000,
        b'{"type": "ask"}',
        b'{"type": "ask", "what": 1}',
        b'{"type": "ask", "what": "who", "more": 1}',
        b'{"type": "accepted", "number": true}',
        b'{"type": "accepted", "number": -1}',
        b'{"type": "accepted", "number": 1.5}',
        b'{"type": "accepted", "number": 9999999999999999999999}',
        b'{"type": "notice", "text": "\\ud800"}',
        b'{"type": "action", "number": 1, "verb": "shout", "text": ""}',
        b'{"type": "action", "number": 1, "verb": "join", "text": "a b"}',
        b'{"type": "hello", "nickname": "", "room": "a", "token": "", "seen": 0}',
        b'{"type": "nothing"}',
        b'{"type": ["ask"], "what": "who"}',
    ],
)
def test_what_is_no_message(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(body)


def test_what_is_one() -> None:
    message: Message = Action(3, "say", "Grüße, 世界")
    assert decode(encode(message)[4:]) == message


async def test_a_frame_that_is_too_long() -> None:
    left, right = trio.testing.memory_stream_pair()
    await left.send_all(struct.pack(">I", MAX_FRAME + 1))
    with pytest.raises(ProtocolError, match="at most"):
        await Frames(right).receive()


def test_what_a_terminal_may_show() -> None:
    assert printable("a\x1b[2J\r\nb\u202ec\u2028\x9b1;1H") == "a[2Jbc1;1H"
    assert printable("日本 é 👩\u200d💻") == "日本 é 👩\u200d💻"
