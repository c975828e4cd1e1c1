"""The chat as people use it: processes, a terminal, two hundred clients, a server that dies."""

import contextlib
import fcntl
import os
import pty
import re
import select
import shutil
import signal
import socket
import sqlite3
import struct
import sys
import termios
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pyte
import pytest
import trio
import trio.testing
from apps_glue import Kmes, Process, descriptors, small_disk
from forked import Forkserver
from waiting import PATIENCE, trio_until

import examples.chat.__main__ as chat
from examples.chat.client import Client
from examples.chat.hub import Hub, _Member
from examples.chat.protocol import (
    MAX_FRAME,
    Accepted,
    Action,
    Ask,
    Bye,
    ChatError,
    Entry,
    Frames,
    Hello,
    Message,
    Notice,
    ProtocolError,
    Welcome,
    decode,
    encode,
    printable,
)
from examples.chat.store import Change, Slot, Store
from hybridkex import (
    ClientConfig,
    DevCa,
    FreshKeys,
    Identity,
    KnownPeers,
    Policy,
    QkdPskSource,
    RawIdentity,
    Requirement,
    SecureStream,
    ServerConfig,
    Session,
    TrustStore,
    serve_secure_tcp,
)
from hybridkex.apps.backoff import Backoff
from hybridkex.auth.dev_ca import write_identity
from hybridkex.cli import main
from hybridkex.errors import ConfigError
from hybridkex.qkd.in_process import in_process_pair
from hybridkex.qkd.store import write_key_file

ROOT = Path(__file__).parents[2]
CHAT = [sys.executable, "-m", "examples.chat"]
WITHIN = 60


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


class Talking(Process):
    """A chat whose standard input and output are pipes of the test."""

    def __init__(self, forkserver: Forkserver, words: list[str]) -> None:
        reads, self.stdin = os.pipe()
        self.stdout, writes = os.pipe()
        with os.fdopen(reads, "rb") as theirs, os.fdopen(writes, "wb") as said:
            super().__init__(
                forkserver.start(
                    *words,
                    program="examples.chat.__main__",
                    stdin=theirs,
                    stdout=said,
                    stderr=said,
                )
            )

    def rest(self) -> str:
        """What it still says until its end, with its standard input closed."""
        self.hang_up()
        said = b""
        while data := os.read(self.stdout, 65536):
            said += data
        self.wait(WITHIN)
        return said.decode()

    def hang_up(self) -> None:
        if self.stdin >= 0:
            os.close(self.stdin)
            self.stdin = -1

    def close(self) -> None:
        self.hang_up()
        self.kill()
        self.wait(WITHIN)
        os.close(self.stdout)


class Processes:
    def __init__(self, ids: Path, forkserver: Forkserver) -> None:
        self._ids = ids
        self._forkserver = forkserver
        self.started: list[Talking] = []

    def start(self, who: str | list[str], *words: object) -> Talking:
        """As somebody with a certificate, or with other options."""
        proof = options(self._ids, who) if isinstance(who, str) else who
        process = Talking(self._forkserver, [*map(str, words), *proof])
        self.started.append(process)
        return process

    def listening(
        self, mode: str, *words: object, port: int = 0, who: str | list[str] = "localhost"
    ) -> tuple[Talking, int]:
        """A server, or the listening one of a pair, and its port."""
        process = self.start(who, mode, "--bind", "127.0.0.1", "--port", port, *words)
        told = read_until(process, "\n")
        assert told.startswith("listening on port "), told
        return process, int(told.splitlines()[0].split()[-1])


@pytest.fixture
def processes(ids: Path, forkserver: Forkserver) -> Iterator[Processes]:
    made = Processes(ids, forkserver)
    yield made
    for process in made.started:
        process.close()


def read_until(process: Talking, text: str) -> str:
    """The output, to the line with this in it."""
    deadline, seen = time.monotonic() + WITHIN, ""
    while text not in seen:
        ready, _, _ = select.select([process.stdout], [], [], deadline - time.monotonic())
        assert ready, f"no {text!r} in {seen[-2000:]!r}"
        data = os.read(process.stdout, 65536)
        assert data, f"no {text!r} in {seen[-2000:]!r}"
        seen += data.decode()
    return seen


def type_in(process: Talking, line: str) -> None:
    os.write(process.stdin, f"{line}\n".encode())


def converse(alice: Talking, bob: Talking) -> str:
    """Twenty lines from each, and the other one hears each of them once, in order; what the first
    of them showed meanwhile."""
    for number in range(20):
        type_in(bob, f"b{number}.")
        type_in(alice, f"a{number}.")
        time.sleep(0.04)  # so that new keys come in between
    shown = [
        read_until(process, f"<{who}> {who[0]}19.")
        for process, who in ((alice, "bob"), (bob, "alice"))
    ]
    for text, who in zip(shown, ("bob", "alice"), strict=True):
        heard = re.findall(rf"<{who}> {who[0]}(\d+)\.", text)
        assert heard == [str(number) for number in range(20)]
    return shown[0]


# --- as processes ----------------------------------------------------------------------------


def test_rooms_names_and_leaving(processes: Processes) -> None:
    server, port = processes.listening("server")
    alice = processes.start("alice", "client", f"localhost:{port}", "--nick", "alice")
    read_until(alice, "alice joined lobby")
    bob = processes.start("bob", "client", f"localhost:{port}", "--nick", "bob")
    read_until(alice, "bob joined lobby")

    type_in(bob, "good \x1b[31mmorning\u202e")
    assert "<bob> good [31mmorning" in read_until(alice, "morning")

    other = processes.start("bob", "client", f"localhost:{port}", "--nick", "alice")
    out = other.rest()
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
    server.send_signal(signal.SIGTERM)
    assert server.wait(WITHIN) == 0


def test_what_follows_quit_in_a_pipe_is_ignored(processes: Processes) -> None:
    """Further lines, and the end of the input, are waiting when the user has left."""
    _, port = processes.listening("server")
    alice = processes.start("alice", "client", f"localhost:{port}", "--nick", "alice")
    read_until(alice, "alice joined lobby")
    type_in(alice, "/quit\nafter\n/who")
    out = alice.rest()
    assert alice.returncode == 0, out
    assert "Traceback" not in out
    assert "after" not in out


def test_a_wrong_certificate_is_refused_in_one_line(processes: Processes, ids: Path) -> None:
    _, port = processes.listening("server")
    eve = processes.start("stranger", "client", f"localhost:{port}", "--nick", "eve")
    out = eve.rest()
    assert len(out.splitlines()) == 1
    assert out.startswith("chat: ")
    # One who trusts the server and is not trusted by it.
    mixed = [*options(ids, "stranger"), "--ca", str(ids / "localhost" / "ca.pem")]
    out = processes.start(mixed, "client", f"localhost:{port}", "--nick", "eve").rest()
    assert len(out.splitlines()) == 1
    assert "unknown_ca" in out or "certificate" in out


def test_two_parties_without_a_server(processes: Processes) -> None:
    alice, port = processes.listening("pair", "--nick", "alice", "--fresh-keys", "peer")
    bob = processes.start(
        "bob", "pair", f"localhost:{port}", "--nick", "bob", "--fresh-keys", "0.3s"
    )
    read_until(alice, "bob joined pair")
    converse(alice, bob)
    third = processes.start(
        "bob", "pair", f"localhost:{port}", "--nick", "carol", "--fresh-keys", "peer"
    )
    assert third.rest() == "chat: no slot is free\n"
    type_in(alice, "/keys")
    read_until(alice, "keys from:")
    type_in(bob, "/quit")
    read_until(alice, "bob left pair")
    assert bob.wait(WITHIN) == 0
    type_in(alice, "/quit")
    assert alice.wait(WITHIN) == 0


# --- who we are, in other ways ---------------------------------------------------------------


def ended(process: Talking) -> str:
    """What a process says that does not get in: one line."""
    out = process.rest()
    assert process.returncode == 1
    assert len(out.splitlines()) == 1, out
    return out


def test_two_kmes_and_no_certificate(processes: Processes, kmes: Kmes) -> None:
    """QKD keys authenticate both, and each renewal of the keys has a new one."""
    told = ("--log-level", "info", "--fresh-keys", "peer")
    alice, port = processes.listening("pair", "--nick", "alice", *told, who=kmes.bob)
    bob = processes.start(
        kmes.alice, "pair", f"localhost:{port}", "--nick", "bob", "--fresh-keys", "0.2s"
    )
    said = read_until(alice, "bob joined pair")
    said += converse(alice, bob)
    while said.count("a client: ") < 3:
        said += read_until(alice, "a client: ")
    type_in(alice, "/keys")
    said += read_until(alice, "authenticated: psk")
    assert "of kme-a > kme-b" in said
    type_in(bob, "/quit")
    said += read_until(alice, "bob left pair")
    keys = re.findall(r"a client: ML-KEM-768 \+ X25519 \+ QKD ([0-9a-f]{8}), by psk", said)
    assert len(keys) == len(set(keys)) >= 3, said
    assert bob.wait(WITHIN) == 0


def test_a_key_pool_that_runs_dry(processes: Processes, kmes: Kmes, tmp_path: Path) -> None:
    """Three keys are a handshake and two renewals; then the session goes on, and that is said."""

    def export(who: list[str], *words: str) -> list[str]:
        pool = tmp_path / who[who.index("--sae") + 1]
        files = [
            "--key-pool",
            str(pool),
            "--pool-key",
            f"{pool}.key",
            "--ids",
            str(tmp_path / "ids"),
        ]
        assert main(["kme", "export-pool", *who, *files, *words]) == 0
        return ["--key-pool", str(pool)]

    ours = export(kmes.alice, "--number", "3")
    server, port = processes.listening(
        "server",
        *("--log-level", "info", "--fresh-keys", "peer"),
        who=export(kmes.bob, "--role", "slave"),
    )
    alice = processes.start(
        ours, "client", f"localhost:{port}", "--nick", "alice", "--fresh-keys", "0.1s"
    )
    said = read_until(alice, "pool is empty")
    assert "no key update now: " in said
    type_in(alice, "still here")
    read_until(alice, "<alice> still here")
    type_in(alice, "/quit")
    assert alice.wait(WITHIN) == 0
    server.terminate()
    told = server.rest()
    keys = re.findall(r"QKD ([0-9a-f]{8}), by psk", told)
    assert len(set(keys)) == 3, told


def test_a_one_time_pad_that_is_used_up(processes: Processes, kmes: Kmes, tmp_path: Path) -> None:
    """What is left is shown and counts down; what is longer is refused; the end is said."""

    def export(who: list[str], ids: str, *words: str) -> list[str]:
        pool = tmp_path / who[who.index("--sae") + 1]
        files = ["--key-pool", str(pool), "--pool-key", f"{pool}.key", "--ids", str(tmp_path / ids)]
        assert main(["kme", "export-pool", *who, *files, *words]) == 0
        return ["--key-pool", str(pool)]

    export(kmes.alice, "ours", "--number", "42")
    export(kmes.bob, "theirs", "--number", "90")
    alice_keys = export(kmes.alice, "theirs", "--role", "slave")
    bob_keys = export(kmes.bob, "ours", "--role", "slave")
    server, port = processes.listening("server", "--one-time-pad", who=bob_keys)
    alice = processes.start(
        alice_keys, "client", f"localhost:{port}", "--nick", "alice", "--one-time-pad"
    )
    read_until(alice, "alice joined lobby")
    type_in(alice, "under the pad")
    read_until(alice, "<alice> under the pad")
    type_in(alice, "/keys")
    said = read_until(alice, "received")
    assert "under a one-time pad" in said
    ((now, stock),) = re.findall(r"one-time pad for ([\d,]+) bytes \+ ([\d,]+) at the KME", said)
    assert 500 < int(now.replace(",", "")) + int(stock.replace(",", "")) < 42 * 32
    type_in(alice, "x" * 2000)
    assert "bytes are left" not in read_until(alice, "are left; wait for more")
    said = ""
    while "not sent" not in said:
        type_in(alice, "y" * 100)
        said = read_until(alice, "\n")
    type_in(alice, "/quit")
    assert alice.wait(WITHIN) == 0
    server.terminate()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("localhost", "--port", "4502"), "--port is for the side that listens"),
        (("localhost:1", "--store", "x"), "--store is for the side that listens"),
        (("localhost", "--store-key", "x", "--store", "y"), "--store is for the side that listens"),
        (("localhost", "--store-key", "x"), "--store-key requires --store"),
        (("--store-key", "x"), "--store-key requires --store"),
        (("--server-name", "bob"), "--server-name is for the side that connects"),
    ],
)
def test_options_of_the_other_side(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    psk = ["--psk", "room:" + "5a" * 32]
    assert chat.main(["pair", *words, "--nick", "alice", *psk]) == 1
    assert message in capsys.readouterr().err


def test_a_psk(processes: Processes) -> None:
    psk = ["--psk", "room:" + "5a" * 32]
    _, port = processes.listening("server", who=psk)
    alice = processes.start(psk, "client", f"localhost:{port}", "--nick", "alice")
    read_until(alice, "alice joined lobby")
    type_in(alice, "/keys")
    read_until(alice, "authenticated: psk")
    wrong = ["--psk", "room:" + "a5" * 32]
    out = ended(processes.start(wrong, "client", f"localhost:{port}", "--nick", "eve"))
    assert "decrypt_error" in out
    assert "5a5a" not in out
    nothing = ended(processes.start([], "client", f"localhost:{port}", "--nick", "eve"))
    assert nothing.startswith("chat: both ends prove who they are")


def test_known_peers(processes: Processes, tmp_path: Path) -> None:
    """Raw public keys: the server's is trusted when it is first seen, the clients' are listed."""
    people = {name: RawIdentity.generate() for name in ("server", "alice", "eve")}
    proof = {}
    for name, identity in people.items():
        (tmp_path / f"{name}.pem").write_bytes(identity.to_pem())
        known = tmp_path / f"{name}.known"
        proof[name] = ["--key", str(tmp_path / f"{name}.pem"), "--known-peers", str(known)]
    KnownPeers(tmp_path / "server.known").add("alice", people["alice"].peer_view.spki)
    _, port = processes.listening("server", who=proof["server"])
    alice = processes.start(proof["alice"], "client", f"localhost:{port}", "--nick", "alice")
    read_until(alice, "alice joined lobby")
    eve = processes.start(proof["eve"], "client", f"localhost:{port}", "--nick", "eve")
    assert "certificate_unknown" in ended(eve)
    # The name that alice knows has another key now.
    other = tmp_path / "alice.known"
    other.write_text(other.read_text().split()[0] + " AAAA\n")
    again = processes.start(proof["alice"], "client", f"localhost:{port}", "--nick", "again")
    assert "has another key" in ended(again)


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
            if len(lines) > 1 and shown(lines):  # it may be blank for a moment
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
    lines = screen.wait_for(lambda lines: "alice in lobby |" in lines[-1])
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
    screen.wait_for(lambda lines: lines[-2] == ">")
    screen.type("\x1b[A")  # The arrow up: the last line again.
    screen.wait_for(lambda lines: lines[-2].startswith("> half a line"))
    screen.type("\r")
    read_until(bob, "<alice> half a line")
    screen.wait_for(lambda lines: lines[-2] == ">")
    screen.type("\x04")
    read_until(bob, "alice left lobby")
    assert screen.end() == 0


# --- many, and faults ------------------------------------------------------------------------

Connect = Callable[[], Awaitable[SecureStream[trio.SocketStream]]]


def config(ids: Path, name: str) -> ClientConfig:
    return ClientConfig(
        verifier=TrustStore.from_file(ids / name / "ca.pem"),
        identity=Identity.from_files(ids / name / "cert.pem", ids / name / "key.pem"),
        alpn=("hkx-chat/1",),
    )


def connector(ids: Path, name: str, port: int) -> Connect:
    ours = config(ids, name)

    async def connect() -> SecureStream[trio.SocketStream]:
        tcp = await trio.open_tcp_stream("127.0.0.1", port)
        stream = SecureStream(tcp, ours, server_hostname="localhost")
        await stream.do_handshake()
        return stream

    return connect


async def collect(client: Client, heard: list[str], pause: float = 0) -> None:
    async for news in client.news:
        await trio.sleep(pause)
        if isinstance(news, Entry) and news.kind == "said":
            heard.append(news.text)


async def test_two_hundred_clients_and_two_that_do_not_keep_up(
    processes: Processes, ids: Path
) -> None:
    """One reads slowly, one never: nobody waits for them, the first misses nothing, the second is
    dropped and can come back. When all have gone the server is as it was."""
    server, port = await trio.to_thread.run_sync(
        partial(processes.listening, "server", "--queue", "25", "--log-level", "warning")
    )
    before = descriptors(server)
    connect = connector(ids, "alice", port)
    clients = [Client(connect, f"c{number}", "lobby") for number in range(198)]
    heard: list[list[str]] = [[] for _ in clients]
    slow, slowly = Client(connect, "slow", "lobby"), list[str]()
    async with trio.open_nursery() as nursery:
        for number, (client, said) in enumerate(zip(clients, heard, strict=True), 1):
            nursery.start_soon(client.run)
            nursery.start_soon(collect, client, said)
            if number % 20 == 0:  # Each hears of all who come.
                await trio_until(lambda: all(client.online for client in clients[:number]))  # noqa: B023
        nursery.start_soon(slow.run)
        nursery.start_soon(collect, slow, slowly, 0.1)
        await trio_until(lambda: all(client.online for client in (*clients, slow)))
        sleeper = await trio.open_tcp_stream("127.0.0.1", port)
        # With a small buffer, so that it is full soon.
        sleeper.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stream = SecureStream(sleeper, config(ids, "bob"), server_hostname="localhost")
        await Frames(stream).send(Hello("sleeper", "lobby", "ab" * 32, 0))
        texts: list[str] = []
        os.set_blocking(server.stdout, False)
        told = ""
        with trio.fail_after(WITHIN):
            while "sleeper was dropped: you did not read" not in told:
                # Some are large, for the kernel's buffers; then each counts.
                size = 3900 if len(texts) < 12 else 10
                texts.append(f"{len(texts)} " + "\U0001f511" * size)  # four bytes each
                await clients[len(texts) % 198].say(texts[-1])
                await trio_until(lambda: all(len(said) == len(texts) for said in heard))
                with contextlib.suppress(BlockingIOError):
                    told += os.read(server.stdout, 65536).decode()
        assert told.count("was dropped") == 1
        # It is told why when it comes back, and goes on where it was.
        back = Client(connector(ids, "bob", port), "sleeper", "lobby")
        back._token = "ab" * 32
        nursery.start_soon(back.run)
        reason = await back.news.receive()
        assert "you were dropped: you did not read" in reason.text
        again: list[str] = []
        nursery.start_soon(collect, back, again)
        await trio_until(lambda: len(again) == len(slowly) == len(texts))
        assert sorted(again) == sorted(slowly) == sorted(texts)
        assert all(sorted(said) == sorted(texts) for said in heard)
        await trio.aclose_forcefully(stream)
        for client in clients[:100]:
            nursery.start_soon(client.leave)
        await trio_until(lambda: not any(client.unacknowledged for client in clients))
        nursery.cancel_scope.cancel()  # and the others are cut off
    await trio_until(lambda: descriptors(server) <= before + 1)


async def test_a_server_that_is_killed(processes: Processes, ids: Path, tmp_path: Path) -> None:
    store = ("--store", tmp_path / "log.sqlite")
    server, port = await trio.to_thread.run_sync(partial(processes.listening, "server", *store))
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
        await trio_until(lambda: all(client.online for client in clients))

        async def talk(number: int) -> None:
            for count in range(60):
                said.append(f"{number}:{count}")
                await clients[number].say(said[-1])
                await trio.sleep(0.01)

        async with trio.open_nursery() as talks:
            for number in range(5):
                talks.start_soon(talk, number)
            await trio_until(lambda: len(heard[0]) > 50)
            server.kill()
            await trio_until(lambda: not any(client.online for client in clients))
            await trio.to_thread.run_sync(partial(processes.listening, "server", *store, port=port))
        await trio_until(lambda: all(len(texts) >= len(said) for texts in heard))
        await trio_until(lambda: not any(client.unacknowledged for client in clients))
        for texts in heard:
            assert sorted(texts) == sorted(said)
            mine = [text for text in texts if text.startswith("3:")]
            assert mine == [f"3:{count}" for count in range(60)]
        assert all(client.connections == 2 for client in clients)
        nursery.cancel_scope.cancel()


@pytest.fixture
def store() -> Iterator[Store]:
    """A store in memory."""
    with closing(Store()) as store:
        yield store


async def test_new_keys_under_traffic(nursery: trio.Nursery, store: Store) -> None:
    """Only QKD keys, both ends authenticated by them; no message lost or doubled."""
    before = len(os.listdir("/proc/self/fd"))
    ours, theirs = in_process_pair("alice", "bob")
    hub = Hub(store)
    key_ids: list[str] = []
    alpn = ("hkx-chat/1",)

    async def handle(stream: SecureStream[trio.SocketStream]) -> None:
        key_ids.extend(stream.session.qkd_key_ids)
        await hub.serve(stream, "")

    def renewed(session: Session) -> None:
        key_ids.extend(session.epochs[-1].qkd_key_ids)

    server = ServerConfig(
        psk_source=QkdPskSource(theirs),
        alpn=alpn,
        policy=Policy(fresh_keys=Requirement.REQUIRE),
        on_epoch=renewed,
    )
    keys = QkdPskSource(ours)
    async with trio.open_nursery() as all_of_it:
        all_of_it.start_soon(hub.run)
        listeners = await all_of_it.start(
            partial(serve_secure_tcp, handle, 0, server, host="127.0.0.1")
        )
        port = listeners[0].transport_listener.socket.getsockname()[1]

        async def connect() -> SecureStream[trio.SocketStream]:
            tcp = await trio.open_tcp_stream("127.0.0.1", port)
            often = FreshKeys(every=0.1)
            stream = SecureStream(tcp, ClientConfig(psk_source=keys, alpn=alpn, fresh_keys=often))
            await stream.do_handshake()
            return stream

        clients = [Client(connect, name, "lobby") for name in ("a", "b")]
        heard: list[list[str]] = [[], []]
        for client, texts in zip(clients, heard, strict=True):
            all_of_it.start_soon(client.run)
            all_of_it.start_soon(collect, client, texts)
        await trio_until(lambda: all(client.online for client in clients))
        count = 0
        while len(key_ids) < 16:
            await clients[count % 2].say(str(count))
            assert clients[0].online
            count += 1
            await trio.sleep(0.001)
        await trio_until(lambda: all(len(texts) >= count for texts in heard))
        for texts in heard:
            assert sorted(texts, key=int) == [str(number) for number in range(count)]
        assert count > 50
        assert len(key_ids) == len(set(key_ids)) >= 16
        for client in clients:
            await client.leave()
        await trio_until(lambda: not hub._connections)
        all_of_it.cancel_scope.cancel()
    assert len(os.listdir("/proc/self/fd")) <= before + 1


async def test_one_peer_does_not_take_all_slots(store: Store) -> None:
    """Slots that it takes and leaves go to others; those of the others stay theirs."""
    hub = Hub(store, most=6)

    async def sit(nickname: str, peer: str, nursery: trio.Nursery) -> str:
        ours, theirs = trio.testing.memory_stream_pair()
        nursery.start_soon(hub.serve, theirs, peer)
        frames = Frames(ours)
        await frames.send(Hello(nickname, "lobby", "ab" * 32, 0))
        answer = await frames.receive()
        await ours.aclose()
        await trio.testing.wait_all_tasks_blocked(0.01)
        return "" if isinstance(answer, Welcome) else getattr(answer, "reason", "")

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hub.run)
            for number in range(6):
                assert await sit(f"m{number}", "many", nursery) == ""
            assert await sit("m6", "many", nursery) == "no slot is free"
            for nickname in ("a", "b", "c"):
                assert await sit(nickname, nickname, nursery) == ""
            assert await sit("a2", "a", nursery) == ""  # one more; "many" had three
            assert await sit("a3", "a", nursery) == "no slot is free"
            assert sorted(hub._members) == ["a", "a2", "b", "c", "m4", "m5"]
            nursery.cancel_scope.cancel()


async def test_questions_in_a_full_house(store: Store) -> None:
    """An answer fits its message, and who does not read the first one gets no second."""
    hub = Hub(store)
    for number in range(900):
        nickname = f"{number}{'ü' * 20}"
        slot = Slot(nickname, b"", "peer", 0, "lobby" if number % 2 else f"{number}{'r' * 20}")
        hub._members[nickname] = _Member(slot)
    ours, theirs = trio.testing.memory_stream_pair()
    frames = Frames(ours)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hub.run)
            nursery.start_soon(hub.serve, theirs, "asker")
            await frames.send(Hello("asker", "lobby", "ab" * 32, 0))
            assert isinstance(await frames.receive(), Welcome)
            assert isinstance(await frames.receive(), Entry)
            for what in ("who", "rooms"):
                await frames.send(Ask(what))
                answer = await frames.receive()
                assert isinstance(answer, Notice)
                assert answer.text.endswith(" more")
            theirs.send_stream.send_all_hook = trio.sleep_forever  # nothing is read any more
            for _ in range(300):
                await frames.send(Ask("who"))
            await trio.testing.wait_all_tasks_blocked(0.01)
            link = hub._members["asker"].link
            assert link is not None
            assert link._get.statistics().current_buffer_used <= 1
            nursery.cancel_scope.cancel()


async def test_a_connection_that_ends_before_its_slot_is_written_leaves_none(store: Store) -> None:
    hub = Hub(store)
    with contextlib.suppress(trio.WouldBlock):
        while True:  # a disk that is slow: nothing more can be queued for it
            hub._jobs.send_nowait(None)  # type: ignore[arg-type]
    ours, theirs = trio.testing.memory_stream_pair()
    await Frames(ours).send(Hello("late", "lobby", "ab" * 32, 0))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hub.serve, theirs, "peer")
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert "late" in hub._members
        nursery.cancel_scope.cancel()
    assert "late" not in hub._members


async def test_a_slot_that_cannot_be_freed_now(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full when a client has been away for too long."""
    full, tried = True, 0
    apply = store.apply

    def apply_or_fail(changes: Iterable[Change]) -> list[list[Entry]]:
        nonlocal tried
        if full:
            tried += 1
            raise ChatError("cannot write the store: database or disk is full")
        return apply(changes)

    hub = Hub(store, away=0.5)
    ours, theirs = trio.testing.memory_stream_pair()
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hub.run)
            nursery.start_soon(hub.serve, theirs, "peer")
            await Frames(ours).send(Hello("away", "lobby", "ab" * 32, 0))
            assert isinstance(await Frames(ours).receive(), Welcome)
            monkeypatch.setattr(store, "apply", apply_or_fail)
            await ours.aclose()
            await trio_until(lambda: tried > 1)
            assert list(hub._members) == ["away"]
            full = False
            await trio_until(lambda: not hub._members)
            nursery.cancel_scope.cancel()


async def test_slots_that_share_a_psk_count_by_network(store: Store) -> None:
    """One client takes all the slots, and keeps them: the newest go to those from elsewhere."""
    hub = Hub(store, most=6)
    open_: list[trio.abc.Stream] = []

    async def sit(nickname: str, where: str, nursery: trio.Nursery) -> tuple[str, Frames]:
        ours, theirs = trio.testing.memory_stream_pair()
        open_.append(ours)
        nursery.start_soon(hub.serve, theirs, "", where)
        frames = Frames(ours)
        await frames.send(Hello(nickname, "lobby", "ab" * 32, 0))
        answer = await frames.receive()
        return getattr(answer, "reason", ""), frames

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hub.run)
            greedy = [(await sit(f"m{number}", "10.0.0.1", nursery))[1] for number in range(6)]
            assert (await sit("m6", "10.0.0.1", nursery))[0] == "no slot is free"
            for number, nickname in enumerate(("a", "b", "c")):
                assert (await sit(nickname, f"10.0.1.{number}", nursery))[0] == ""
            while not isinstance(farewell := await greedy[5].receive(), Bye):
                assert farewell is not None
            assert (farewell.reason, farewell.again) == (
                "your slot was needed for a participant with fewer slots",
                False,
            )
            assert (await sit("m7", "10.0.0.1", nursery))[0] == "no slot is free"
            assert sorted(hub._members) == ["a", "b", "c", "m0", "m1", "m2"]
            nursery.cancel_scope.cancel()


async def test_a_server_that_acknowledges_nothing(autojump_clock: trio.testing.MockClock) -> None:
    """It takes what is said; the client comes back with it to one that has a log."""
    connections = 0

    async def connect() -> trio.abc.Stream:
        nonlocal connections
        connections += 1
        ours, theirs = trio.testing.memory_stream_pair()
        nursery.start_soon(serve, Frames(theirs), connections)
        return ours

    async def serve(frames: Frames, number: int) -> None:
        assert isinstance(await frames.receive(), Hello)
        await frames.send(Welcome(0, 0, "lobby", number > 1))
        while isinstance(action := await frames.receive(), Action):
            if number > 1:
                await frames.send(Accepted(action.number))

    with trio.fail_after(600):
        async with trio.open_nursery() as nursery:
            client = Client(connect, "a", "lobby")
            nursery.start_soon(client.run)
            await client.say("hello")
            await trio_until(lambda: not client.unacknowledged, seconds=300)
            assert connections == 2
            nursery.cancel_scope.cancel()


async def test_no_task_is_left(store: Store) -> None:
    """A hundred, over sockets without TLS: some leave, some vanish, some never say hello."""

    def tasks() -> int:
        return trio.lowlevel.current_statistics().tasks_living

    async with trio.open_nursery() as nursery:
        hub = Hub(store)
        nursery.start_soon(hub.run)
        await trio.testing.wait_all_tasks_blocked()
        before, open_before = tasks(), len(os.listdir("/proc/self/fd"))

        async def connect() -> trio.SocketStream:
            ours, theirs = (
                trio.SocketStream(trio.socket.from_stdlib_socket(one))
                for one in socket.socketpair()
            )
            nursery.start_soon(hub.serve, theirs, "")
            return ours

        async def take_part(number: int) -> None:
            if number % 3 == 0:
                stream = await connect()
                if number % 2:
                    await stream.send_all(b"\xff\xff\xff\xff")
                await stream.aclose()
                return
            client = Client(connect, f"c{number}", "lobby")
            async with trio.open_nursery() as own:
                own.start_soon(client.run)
                own.start_soon(collect, client, [])
                await client.say("hello")
                await trio_until(lambda: client.online and not client.unacknowledged)
                if number % 3 == 1:
                    await client.leave()
                own.cancel_scope.cancel()

        async with trio.open_nursery() as clients:
            for number in range(100):
                clients.start_soon(take_part, number)
        await trio_until(lambda: tasks() == before and not hub._connections)
        assert len(os.listdir("/proc/self/fd")) == open_before
        nursery.cancel_scope.cancel()


def test_what_was_said_is_encrypted_in_the_file(tmp_path: Path) -> None:
    """With its key it comes back; without, with another key, or with a text moved to another place,
    it does not."""
    path, said = tmp_path / "log.sqlite", "meet me at the harbour"
    store = Store(path)
    slot = Slot("alice", bytes(32), "", 0, "lobby")
    store.apply([Change("enter", slot), *(Change("say", slot, 1, said + mark) for mark in "!?")])
    files = [one for one in tmp_path.iterdir() if one.name != "log.sqlite.key"]
    assert len(files) > 1  # the write-ahead log, too
    assert not any(b"harbour" in one.read_bytes() for one in files)
    assert {one.stat().st_mode & 0o777 for one in tmp_path.iterdir()} == {0o600}
    store.close()
    again = Store(path)
    assert [one.text for one in again.missed("alice", 1, 9, 9)] == [said + "!", said + "?"]
    again.close()

    with sqlite3.connect(path) as db:
        db.execute("UPDATE entry SET nickname = 'mallory' WHERE id = 2")
    db.close()
    moved = Store(path)
    with pytest.raises(ChatError, match="was changed"):
        moved.missed("alice", 0, 9, 9)
    moved.close()
    (tmp_path / "log.sqlite.key").unlink()
    with pytest.raises(ConfigError, match="key file"):
        Store(path)
    other = tmp_path / "other.key"
    write_key_file(other)
    with pytest.raises(ChatError, match="another key"):
        Store(path, other)


def test_a_store_has_one_server(tmp_path: Path) -> None:
    """A second one is refused, by any name; the next one may use it when the first has ended."""
    path, other = tmp_path / "log.sqlite", tmp_path / "other"
    first = Store(path)
    other.symlink_to(path)
    for name in (path, other):
        with pytest.raises(ChatError, match="is in use by another process"):
            Store(name, tmp_path / "log.sqlite.key")
    first.apply([Change("enter", Slot("alice", bytes(32), "", 0, "lobby"))])
    first.close()
    next_one = Store(path)
    assert next_one.head() == 1
    next_one.close()


def test_a_store_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.sqlite"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE entry (id INTEGER PRIMARY KEY, text TEXT)")
    db.close()
    write_key_file(tmp_path / "log.sqlite.key")
    with pytest.raises(ChatError, match="without encryption"):
        Store(path)


async def test_a_disk_that_is_full(processes: Processes, ids: Path, tmp_path: Path) -> None:
    """The server says so once, goes on, and loses nothing: it is sent again, once there is room."""
    with small_disk(tmp_path / "disk", 2) as disk:
        server, port = await trio.to_thread.run_sync(
            partial(processes.listening, "server", "--store", disk / "log.sqlite")
        )
        backoff, heard = Backoff(first=0.1, most=0.1), list[str]()
        client = Client(connector(ids, "alice", port), "alice", "lobby", backoff=backoff)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.run)
            nursery.start_soon(collect, client, heard)
            await client.say("first")
            await trio_until(lambda: client.connections > 0 and client.unacknowledged == 0)
            filler = disk / "filler"
            for megabyte in (1 << 20, 1 << 16, 1 << 12):
                with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
                    while file.write(bytes(megabyte)) == megabyte:
                        pass
            for number in range(20):
                await client.say(f"{number} " + "x" * 3000)
            await trio_until(lambda: client.connections > 3)  # it has tried again and again
            assert client.unacknowledged
            filler.unlink()
            await trio_until(lambda: client.unacknowledged == 0)
            nursery.cancel_scope.cancel()
        server.terminate()
        out = server.rest()
        assert out.count("cannot write the store: ") == 1
        assert "the store can be written again" in out
        for path in disk.iterdir():
            shutil.copy(path, tmp_path)
    store = Store(tmp_path / "log.sqlite")  # with its key file
    kept = [entry.text for entry in store.missed("alice", 0, store.head(), 10_000)]
    store.close()
    assert [text.split()[0] for text in kept if text] == ["first", *map(str, range(20))]


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
