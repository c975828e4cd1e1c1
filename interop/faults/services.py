"""The long-running commands: how each is started and how its health is checked."""

import contextlib
import itertools
import json
import secrets
import shlex
import signal
import socket
import socketserver
import threading
import time
from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Final

import trio

from examples.chat.client import Client, Connect
from examples.chat.protocol import Entry
from hybridkex import (
    ClientConfig,
    DevCa,
    Identity,
    SecureStream,
    TrustStore,
    open_secure_tcp_stream,
)
from hybridkex.apps.transfer import PROTOCOL, Outcome, Progress, collect, send_items
from hybridkex.auth.dev_ca import write_identity
from hybridkex.qkd.etsi014.client import KmeAccess, KmeClient
from hybridkex.qkd.store import write_key_file
from interop.faults.world import PATIENCE, Broken, Process, World, until
from interop.ports import free_port

__all__ = ["SERVICES", "Service"]

ANSWER: Final = 8.0
"""Seconds within which a healthy service answers."""


class Service(ABC):
    """A command that runs until it receives a signal."""

    name: str
    reloads: Path | None = None
    """The configuration file that it reads again after SIGHUP."""
    watched: tuple[Path, ...] = ()
    """Files that it creates and others need, such as a socket or a store."""
    lines_each: int = 0
    """Log lines for each connection of a local program or of a peer that it trusts."""
    insiders: tuple[Path, ...] = ()
    """Folders with ``ca.pem``, ``cert.pem`` and ``key.pem`` of peers that it trusts."""
    port: int
    """The TCP port at which the checks use it."""
    link: tuple[Path, Path] | None = None
    """Bob's private key and Alice's certificate if it has a QKD link."""

    def __init__(self, world: World) -> None:
        self.world: Final = world
        self.keys: Final = world.folder / "keys"
        self.data: Final = world.folder / "data"
        self.data.mkdir(exist_ok=True)
        authority = DevCa.create()
        write_identity(self.keys, authority, authority.issue("localhost", "127.0.0.1"))
        self.channel: Final = [
            word for one in ("ca", "cert", "key") for word in (f"--{one}", self.keys / f"{one}.pem")
        ]
        self.client: Final = ClientConfig(
            verifier=TrustStore.from_pem((self.keys / "ca.pem").read_bytes()),
            identity=Identity.from_files(self.keys / "cert.pem", self.keys / "key.pem"),
        )
        self.insiders = (self.keys,)
        self.processes: list[Process] = []
        self.prepare()

    def prepare(self) -> None:  # noqa: B027  # not every service needs any
        """Write the files that the service needs."""

    @abstractmethod
    def launch(self) -> list[Process]:
        """Start its processes."""

    @abstractmethod
    def ask(self) -> None:
        """Use the service once, as a user does; raises any error."""

    def start(self) -> None:
        """Start the service and wait until it answers."""
        self.processes = self.launch()
        self._settle("start")

    def _settle(self, what: str) -> None:
        self.recover(what)
        for process in self.processes:
            process.descriptors_before = process.descriptors()

    def recover(self, what: str) -> None:
        """Wait until the service works again; raises :class:`Broken` if it does not."""
        deadline = time.monotonic() + PATIENCE
        while True:
            for process in self.processes:
                process.check_log()
                if not process.alive():
                    text = process.log.read_text(errors="replace")[-2000:]
                    raise Broken(
                        f"{what}: {process.name} ended with {process.running.returncode}: {text}"
                    )
            try:
                self.ask()
            except Exception as error:  # any error means that the service does not work
                if time.monotonic() > deadline:
                    logs = "\n".join(
                        process.log.read_text(errors="replace")[-1500:]
                        for process in self.processes
                    )
                    raise Broken(f"{what}: does not work again: {error!r}\n{logs}") from None
                time.sleep(0.05)
            else:
                return

    def check_descriptors(self, spare: int = 8) -> None:
        """Raises :class:`Broken` if more descriptors are open than before the faults."""
        for process in self.processes:
            most = process.descriptors_before + spare
            until(
                lambda process=process, most=most: process.descriptors() <= most,
                f"{process.name} has {process.descriptors()} descriptors, and had "
                f"{process.descriptors_before}",
                within=15,
            )

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End the service; raises :class:`Broken` if it does not end."""
        for process in self.processes:
            self.world.end(process, number)
        self.processes = []

    def restart(self) -> None:
        """Start the service again with the files of its earlier run."""
        for process in self.processes:
            if process.alive():
                self.world.end(process, signal.SIGKILL)
            else:
                self.world.processes.remove(process)
        self.processes = self.launch()
        self._settle("restart")

    def _echo(self, port: int) -> None:
        async def once() -> None:
            with trio.fail_after(ANSWER):
                stream = await open_secure_tcp_stream(
                    "127.0.0.1", port, self.client, server_hostname="localhost"
                )
                async with stream:
                    await stream.send_all(b"whole")
                    if bytes(await stream.receive_some()) != b"whole":
                        raise Broken("the echo is wrong")

        trio.run(once)


class Listen(Service):
    """``listen --echo``."""

    name = "listen"
    lines_each = 4  # what a session that was authenticated rests on

    def prepare(self) -> None:
        self.port = free_port()

    def launch(self) -> list[Process]:
        words = ("listen", self.port, "--bind", "127.0.0.1", "--echo", "--require-client-cert")
        keylog = ("--keylog", self.data / "keylog")
        return [self.world.start("listen", *words, *keylog, *self.channel)]

    def ask(self) -> None:
        self._echo(self.port)


class Receive(Service):
    """``receive``, used by ``send``."""

    name = "receive"
    lines_each = 6  # what a session that was authenticated rests on, and what became of the file

    def prepare(self) -> None:
        self.port = free_port()
        self.count = itertools.count()
        self.inbox = self.data / "in"

    def launch(self) -> list[Process]:
        words = ("receive", self.inbox, "--port", self.port, "--bind", "127.0.0.1", "--overwrite")
        return [self.world.start("receive", *words, *self.channel)]

    def ask(self) -> None:
        name = f"file-{next(self.count)}"
        content = name.encode() * 3000
        path = self.world.folder / name
        path.write_bytes(content)
        try:
            outcome = trio.run(self._send, path)
        finally:
            path.unlink()
        if outcome.stored != 1 or outcome.failed or outcome.incomplete:
            raise Broken(f"the sender was told {outcome}")
        if (self.inbox / name).read_bytes() != content:
            raise Broken("what was stored is not what was sent")

    async def _send(self, path: Path) -> Outcome:
        async def connect() -> SecureStream[trio.SocketStream]:
            config = replace(self.client, alpn=(PROTOCOL,))
            stream = await open_secure_tcp_stream(
                "127.0.0.1", self.port, config, server_hostname="localhost"
            )
            await stream.do_handshake()
            return stream

        with trio.fail_after(ANSWER):
            items = collect([path], lambda _: None)
            return await send_items(items, connect, Progress(), retries=2)


class _Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        with contextlib.suppress(OSError):
            while data := self.request.recv(65536):
                self.request.sendall(data)


def echo_server(world: World) -> int:
    """Start a program behind a tunnel and return its port. It ends with the world."""
    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Echo)
    server.daemon_threads = True
    world.at_end.enter_context(server)
    world.at_end.callback(server.shutdown)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    port: int = server.server_address[1]
    return port


class Tunnel(Service):
    """``tunnel run`` with both ends and a Unix socket between them."""

    name = "tunnel run"
    lines_each = 4  # opened and closed, at both ends

    def prepare(self) -> None:
        self.port, self.metrics = free_port(), free_port()
        self.reloads = self.world.folder / "tunnels.toml"
        middle = self.data / "middle.sock"
        self.watched = (middle,)
        files = "".join(
            f"{one} = {json.dumps(str(self.keys / f'{one}.pem'))}\n"
            for one in ("ca", "cert", "key")
        )
        self.reloads.write_text(
            f'metrics = "127.0.0.1:{self.metrics}"\ngrace = 1\n\n[[listen]]\nname = "in"\n'
            f"local = {json.dumps(f'unix:{middle}')}\n"
            f'target = "127.0.0.1:{echo_server(self.world)}"\nrequire_client_cert = true\n{files}\n'
            f'[[connect]]\nname = "out"\nlocal = "127.0.0.1:{self.port}"\n'
            f"remote = {json.dumps(f'unix:{middle}')}\n"
            f'server_name = "localhost"\n{files}'
        )

    def launch(self) -> list[Process]:
        return [self.world.start("tunnel", "tunnel", "run", self.reloads)]

    def ask(self) -> None:
        with socket.create_connection(("127.0.0.1", self.port), ANSWER) as connection:
            connection.sendall(b"whole")
            if connection.recv(100) != b"whole":
                raise Broken("the tunnel's echo is wrong")
        with socket.create_connection(("127.0.0.1", self.metrics), ANSWER) as connection:
            connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            if not connection.recv(100).startswith(b"HTTP/1.1 200"):
                raise Broken("the metrics do not answer")


class TunnelListen(Service):
    """``tunnel listen``, used through a channel over TCP."""

    name = "tunnel listen"

    def prepare(self) -> None:
        self.port = free_port()
        self.target = echo_server(self.world)

    def launch(self) -> list[Process]:
        words = ("tunnel", "listen", "--local", f"127.0.0.1:{self.port}", "--grace", "1")
        target = ("--target", f"127.0.0.1:{self.target}", "--require-client-cert")
        return [self.world.start("tunnel-listen", *words, *target, *self.channel)]

    def ask(self) -> None:
        self._echo(self.port)


class Kme(Service):
    """``kme serve`` with both KMEs; compares every delivered key with all earlier ones."""

    name = "kme serve"

    def prepare(self) -> None:
        ports = free_port(), free_port()
        self.port = ports[0]
        self.sites = self.world.folder / "sites"
        dev_up = self.world.start(
            *("dev-up", "kme", "dev-up", self.sites, "--ports", f"{ports[0]},{ports[1]}"),
            *("--no-serve", "--metrics", f"127.0.0.1:{free_port()}"),
        )
        if dev_up.running.wait(PATIENCE):
            raise Broken(f"kme dev-up failed: {dev_up.log.read_text()}")
        self.world.end(dev_up)
        self.insiders = tuple(self.sites / one for one in ("alice", "bob", "kme-a", "kme-b"))
        self.reloads = self.sites / "kme.toml"
        text = self.reloads.read_text()
        for kme in ("kme-a", "kme-b"):
            text = text.replace(f'"{kme}/keys.db"', json.dumps(str(self.data / f"{kme}.db")))
        self.reloads.write_text(text)
        self.watched = (self.data / "kme-a.db", self.data / "kme-b.db")
        self.access = {
            sae: KmeAccess(
                url=f"https://127.0.0.1:{port}",
                ca=self.sites / sae / "ca.pem",
                certificate=self.sites / sae / "cert.pem",
                key=self.sites / sae / "key.pem",
            )
            for sae, port in zip(("alice", "bob"), ports, strict=True)
        }
        self.delivered: dict[str, bytes] = {}

    def launch(self) -> list[Process]:
        return [self.world.start("kme", "kme", "serve", self.reloads)]

    def ask(self) -> None:
        trio.run(self._draw)

    async def _draw(self) -> None:
        with trio.fail_after(ANSWER):
            async with (
                KmeClient(self.access["alice"]) as alice,
                KmeClient(self.access["bob"]) as bob,
            ):
                [drawn] = (await alice.enc_keys("bob")).keys
                key = drawn.key.reveal()
                if drawn.key_id in self.delivered or key in self.delivered.values():
                    raise Broken(f"{drawn.key_id} was delivered twice")
                self.delivered[drawn.key_id] = key
                [collected] = (await bob.dec_keys("alice", [drawn.key_id])).keys
                if collected.key.reveal() != key:
                    raise Broken(f"the two halves of {drawn.key_id} differ")


class KmeLink(Kme):
    """Two processes of ``kme serve``, whose keys come over a QKD link between them."""

    name = "kme link"

    def prepare(self) -> None:
        super().prepare()
        text = self.reloads.read_text()
        self.reloads = None
        self.watched = ()
        metrics, kme_a, kme_b = text.split("[[kme]]")
        metrics = metrics.partition("metrics = ")[2].split("\n")[0]
        port = free_port()
        self.files = []
        for kme, other, party, table in (
            ("kme-a", "kme-b", "alice", kme_a),
            ("kme-b", "kme-a", "bob", kme_b),
        ):
            there = self.access["alice" if other == "kme-a" else "bob"].url
            link = (
                f'url = "{there}"\nproducer = "link"\n'
                'link = { preset = "rusca2018", distance_km = 0.0, block_bits = 30000, '
                f'party = "{party}", address = "127.0.0.1:{port}", '
                f'peer_credential = "{other}/cert.pem" }}\n'
            )
            path = self.sites / f"{kme}.toml"
            head = f"metrics = {metrics}\n" if party == "alice" else ""
            rest = table.replace('producer = "random"\n', "")
            path.write_text(f"{head}\n[[kme]]{rest}{link}")
            self.files.append(path)
        self.link = (self.sites / "kme-b" / "key.pem", self.sites / "kme-a" / "cert.pem")

    def launch(self) -> list[Process]:
        return [self.world.start(path.stem, "kme", "serve", path) for path in self.files]


_WG = """#!/bin/sh
place={place}
if [ "$1" = show ]; then
    printf '%s\\t%s\\n' '{peer}' "$(cat "$place" 2>/dev/null || echo '(none)')"
else
    cat >"$place.new" && mv "$place.new" "$place"
fi
"""
_WG_PEER = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="


class WgPsk(Service):
    """Both ends of ``wg-psk``, with a ``wg`` that stores the key in a file."""

    name = "wg-psk"

    def prepare(self) -> None:
        self.port = free_port()
        write_key_file(self.world.folder / "psk")
        self.installed = []
        for end in ("a", "b"):
            script, place = self.world.folder / f"wg-{end}", self.world.folder / f"installed-{end}"
            script.write_text(_WG.format(place=shlex.quote(str(place)), peer=_WG_PEER))
            script.chmod(0o755)
            self.installed.append(place)

    def launch(self) -> list[Process]:
        both = ("--interface", "wg0", "--peer-key", _WG_PEER, "--interval", "1", "--max-age", "4")
        psk = ("--psk-file", self.world.folder / "psk")
        ends = (
            ("a", "b", "--listen", f"127.0.0.1:{self.port}"),
            ("b", "a", "--connect", f"127.0.0.1:{self.port}"),
        )
        return [
            self.world.start(
                f"wg-{end}", "wg-psk", *role, "--local", end, "--peer", peer, *both, *psk,
                "--wg", self.world.folder / f"wg-{end}",
            )
            for end, peer, *role in ends
        ]  # fmt: skip

    def ask(self) -> None:
        before = self._keys()
        deadline = time.monotonic() + ANSWER
        while time.monotonic() < deadline:
            time.sleep(0.02)
            first, second = self._keys()
            if first == second and first is not None and first not in before:
                return
        raise Broken("no new key on both sides")

    def _keys(self) -> list[str | None]:
        return [place.read_text() if place.exists() else None for place in self.installed]


class Chat(Service):
    """The chat's server."""

    name = "chat"

    def prepare(self) -> None:
        self.port = free_port()

    def launch(self) -> list[Process]:
        words = ("server", "--port", self.port, "--bind", "127.0.0.1", "--away", "1")
        store = ("--store", self.data / "chat.db", "--store-key", self.keys / "chat.key")
        return [self.world.start("chat", *words, *store, *self.channel, module="examples.chat")]

    def ask(self) -> None:
        async def connect() -> trio.abc.Stream:
            return await open_secure_tcp_stream(
                "127.0.0.1", self.port, self.client, server_hostname="localhost"
            )

        async def once() -> None:
            with trio.fail_after(ANSWER):
                await _say(connect)

        trio.run(once)


async def _say(connect: Connect) -> None:
    """Join, send a message, receive it, leave."""
    name = f"n{secrets.token_hex(4)}"
    client = Client(connect, name, "lobby")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run)
        await client.say(name)
        async for news in client.news:
            if isinstance(news, Entry) and news.text == name:
                break
        await client.leave()


SERVICES: Final[tuple[type[Service], ...]] = (
    Listen,
    Receive,
    Tunnel,
    TunnelListen,
    Kme,
    KmeLink,
    WgPsk,
    Chat,
)
"""The commands that run until they receive a signal."""
