"""The parties: a client and a server, and the tap between them.

Everything is the library's own code over real TCP, plus instrumented key exchanges (see
``escrow.py``), a copy of the ticket key, and a key log for comparison with Wireshark. The adversary
gets none of these unless the trial provides them.
"""

import os
import secrets
import shutil
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio

from hybridkex.auth import DevCa, TrustStore
from hybridkex.auth.dev_ca import write_identity
from hybridkex.crypto.kex import Group
from hybridkex.demos.rndl.capture.tcpip import Address
from hybridkex.demos.rndl.matrix import Configuration, Delivery
from hybridkex.demos.rndl.now.escrow import Escrow, append_line
from hybridkex.demos.rndl.now.link import link_sources
from hybridkex.demos.rndl.now.sites import Sites
from hybridkex.demos.rndl.now.tap import wire_tap
from hybridkex.files import open_private
from hybridkex.qkd.in_process import in_process_pair
from hybridkex.qkd.source import KeySource
from hybridkex.secret import Secret
from hybridkex.shell.qkd_keys import QkdPskSource
from hybridkex.streams import SecureStream, open_secure_tcp_stream, serve_secure_tcp
from hybridkex.tls.config import ClientConfig, ServerConfig
from hybridkex.tls.epochs import KeyUpdates
from hybridkex.tls.policy import Policy, Requirement
from hybridkex.tls.session import MemoryTicketStore
from hybridkex.tls.tickets import TicketIssuer

_LOOPBACK: Final = "127.0.0.1"
_CLASSICAL_TOO: Final = Policy(post_quantum=Requirement.PREFER)
_FRESH: Final = Policy(post_quantum=Requirement.PREFER, fresh_keys=Requirement.REQUIRE)


@dataclass(frozen=True, kw_only=True)
class Plaintext:
    """The actual plaintext of one connection; the adversary never sees this."""

    to_server: bytes
    to_client: bytes
    resumed: bool
    session: dict[str, object]


class Stage:
    """A folder with all files of the parties, the taps and the thieves.

    ``oracle/``: private keys in escrow. ``recordings/NAME/*.pcapng``. ``stolen/certificate/``,
    ``stolen/ticket-keys.jsonl``, ``stolen/sessions.jsonl``, ``stolen/DELIVERY/WHEN/KME/`` with a
    key store and its sealing key. ``keylog/NAME.txt``, for Wireshark.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("oracle", "recordings", "stolen/certificate", "keylog"):
            (folder / name).mkdir(parents=True)
        self.escrow = Escrow(folder / "oracle")
        self._ca = DevCa.create()
        self._identity = self.escrow.keep_identity(self._ca.issue("localhost"))
        write_identity(folder / "server", self._ca, self._identity)
        shutil.copy(folder / "server/key.pem", folder / "stolen/certificate/server.pem")

    def sites(self, delivery: Delivery) -> Sites:
        return Sites(
            self.folder / f"sites-{delivery.value}",
            self.folder / "stolen" / delivery.value,
            self._ca,
            self.escrow,
            delivery,
        )

    def link(self) -> AbstractAsyncContextManager[tuple[KeySource, KeySource]]:
        """Key sources filled by a tapped QKD link."""
        pools = self.folder / "pools"
        pools.mkdir()
        return link_sources(pools, self.link_recording, self.escrow)

    @property
    def link_recording(self) -> Path:
        """The recording of the link's classical channel, shared by all sessions with its keys."""
        return self.folder / "recordings" / "link.pcapng"

    def recording(self, configuration: Configuration, delivery: Delivery) -> Path:
        """The folder for the captures of a run; created if missing."""
        name = f"{configuration.id}-{delivery.value}" if configuration.qkd else configuration.id
        folder = self.folder / "recordings" / name
        folder.mkdir(exist_ok=True)
        return folder

    async def record(
        self,
        configuration: Configuration,
        delivery: Delivery = Delivery.IN_PROCESS,
        sources: tuple[KeySource, KeySource] | None = None,
        *,
        connections: int | None = None,
        **client_options: Any,
    ) -> list[Plaintext]:
        """Record ``connections`` connections, each of which resumes the one before it.

        The default is two, or one if the configuration allows no resumption.
        """
        if connections is None:
            connections = 1 if configuration.fresh or not configuration.escrowed else 2
        folder = self.recording(configuration, delivery)
        if configuration.qkd and sources is None:
            sources = in_process_pair("alice", "bob")
        alice, bob = sources or (None, None)
        shared: dict[str, Any] = {
            "groups": (self._group(configuration),),
            "policy": _FRESH if configuration.fresh else _CLASSICAL_TOO,
        }
        server = ServerConfig(
            **shared,
            identities=(self._identity,) if configuration.certificates else (),
            psk_source=QkdPskSource(bob) if bob is not None else None,
            tickets=None if configuration.fresh else self._tickets(),
        )
        trust = TrustStore((self._ca.certificate,))
        with open_private(self.folder / "keylog" / f"{folder.name}.txt") as key_log:

            def log_key(line: str) -> None:
                key_log.write(line.encode("ascii") + b"\n")

            client = ClientConfig(
                **shared,
                verifier=trust if configuration.certificates else None,
                psk_source=QkdPskSource(alice) if alice is not None else None,
                ticket_store=None if configuration.fresh else MemoryTicketStore(),
                key_log=log_key,
                **client_options,
            )
            return await self._run_connections(configuration, folder, client, server, connections)

    def _group(self, configuration: Configuration) -> Group:
        group = configuration.group
        return self.escrow.instrumented(group) if configuration.escrowed else group

    async def _run_connections(
        self,
        configuration: Configuration,
        folder: Path,
        client: ClientConfig,
        server: ServerConfig,
        connections: int,
    ) -> list[Plaintext]:
        plaintexts = []
        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(
                partial(serve_secure_tcp, _answer, 0, server, host=_LOOPBACK)
            )
            where: Address = listeners[0].transport_listener.socket.getsockname()
            async with wire_tap(folder / "session.pcapng", where) as (host, port):
                for number in range(1, connections + 1):
                    secret = f"{configuration.title}, connection {number}: {secrets.token_hex(8)}"
                    stream = await open_secure_tcp_stream(
                        host, port, client, server_hostname="localhost"
                    )
                    plaintexts.append(await _run_client(stream, secret, self._steal))
            nursery.cancel_scope.cancel()
        return plaintexts

    def _steal(self, stream: SecureStream[trio.SocketStream]) -> None:
        """Copy all secrets of a session, as they are at this moment, for the thief."""
        connection = stream._connection
        records, connected = connection._records, connection._connected()
        assert records.writer.protection is not None
        assert records.reader.protection is not None
        loot = {
            "random": records.client_random,
            "client": records.writer.protection.traffic.secret.reveal(),
            "server": records.reader.protection.traffic.secret.reveal(),
        }
        if connected.resumption is not None:
            loot["resumption"] = connected.resumption.secret.reveal()
        if connected.updates is not None:
            generation = connected.updates._generation
            loot["salt"] = generation.salt.reveal()
            loot["transcript"] = generation.transcript
            loot["exporter"] = generation.exporter.secret.reveal()
        line = {name: value.hex() for name, value in loot.items()}
        append_line(self.folder / "stolen/sessions.jsonl", line)

    def _tickets(self) -> TicketIssuer:
        """A ticket issuer, with a copy of its key for the thief."""
        key, name = os.urandom(32), os.urandom(8)
        append_line(
            self.folder / "stolen/ticket-keys.jsonl", {"name": name.hex(), "key": key.hex()}
        )
        return TicketIssuer(first_key=(Secret(key), name))


# --- the two ends -----------------------------------------------------------------------------


async def _run_client(
    stream: SecureStream[trio.SocketStream],
    secret: str,
    steal: Callable[[SecureStream[trio.SocketStream]], None],
) -> Plaintext:
    """Send two messages as the client; in between, copy the session's secrets and update its
    keys."""
    sent, received = bytearray(), bytearray()

    async def send(line: str) -> None:
        nonlocal received
        data = line.encode() + b"\n"
        await stream.send_all(data)
        sent.extend(data)
        received += await _line(stream)

    async with stream:
        await send(f"Alice to Bob: {secret}")
        steal(stream)
        await stream.update_keys(request_peer=True)
        while stream.session.key_updates is not KeyUpdates.STANDARD and not stream.session.epochs:
            await send("Alice to Bob: are there new keys?")
        await send("Alice to Bob: still there with new keys?")
        await stream.send_eof()
        if await stream.receive_some():
            raise trio.BrokenResourceError("the server sent more than expected")
        session = stream.session
    return Plaintext(
        to_server=bytes(sent),
        to_client=bytes(received),
        resumed=session.resumed,
        session=session.as_json(),
    )


async def _answer(stream: SecureStream[trio.SocketStream]) -> None:
    """Answer each message as the server."""
    async with stream:
        while question := await _line(stream):
            answer = f"Bob to Alice: {len(question)} bytes received, {secrets.token_hex(8)}\n"
            await stream.send_all(answer.encode())


async def _line(stream: SecureStream[trio.SocketStream]) -> bytes:
    """Read to the end of the line or of the stream."""
    line = bytearray()
    while not line.endswith(b"\n") and (data := await stream.receive_some()):
        line += data
    return bytes(line)
