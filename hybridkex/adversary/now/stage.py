"""The parties: a client and a server, their KMEs where they have any, and the taps between them.

Everything is the library's own code over real TCP. What is added: instrumented key exchanges (see
``escrow.py``), a copy of the ticket key, copies of the KMEs' databases, and a key log for those who
want to compare with Wireshark. None of that reaches the adversary but what a trial gives it.
"""

import json
import os
import secrets
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio

from hybridkex.adversary.capture.tcpip import Address
from hybridkex.adversary.matrix import Configuration, Delivery
from hybridkex.adversary.now.escrow import Escrow
from hybridkex.adversary.now.tap import wire_tap
from hybridkex.auth import DevCa, Identity, TrustStore
from hybridkex.auth.dev_ca import write_identity
from hybridkex.crypto.kex import X25519, X25519MLKEM768, Group
from hybridkex.qkd.etsi014.client import Etsi014Source, KmeAccess, KmeClient
from hybridkex.qkd.etsi014.config import Address as KmeAddress
from hybridkex.qkd.etsi014.config import KmeConfig, PeerConfig, ServeConfig
from hybridkex.qkd.etsi014.hop import Hop
from hybridkex.qkd.etsi014.kme import SCRUB_EVERY, KmeLimits
from hybridkex.qkd.etsi014.serve import KmeServer, Serving
from hybridkex.qkd.in_process import in_process_pair
from hybridkex.qkd.source import KeySource
from hybridkex.qkd.store import write_key_file
from hybridkex.streams import QkdKeys, SecureStream, open_secure_tcp_stream, serve_secure_tcp
from hybridkex.tls.config import ClientConfig, Policy, Requirement, ServerConfig
from hybridkex.tls.session import MemorySessionStore
from hybridkex.tls.tickets import TicketIssuer, _SealingKey

__all__ = ["Stage", "Talk"]

_SITES: Final = (("alice", "kme-a"), ("bob", "kme-b"))
_LOOPBACK: Final = "127.0.0.1"
_KEYS: Final = 64
"""Keys that a KME holds ready; every session takes one."""
_THIEF_COMES: Final = 2 * SCRUB_EVERY
"""Seconds after the last delivery."""
_CLASSICAL_TOO: Final = Policy(post_quantum=Requirement.PREFER)


@dataclass(frozen=True, kw_only=True)
class Talk:
    """What was really said in one connection; the adversary never sees this."""

    to_server: bytes
    to_client: bytes
    resumed: bool
    session: dict[str, object]


class Stage:
    """A folder with everything that the parties, the taps and the thieves leave behind::

    oracle/        escrowed private keys
    recordings/    NAME/session.pcapng, hop-alice.pcapng, hop-bob.pcapng
    stolen/        certificate/, ticket-keys.jsonl, WHEN/KME/keys.db and store.key
    keylog/        NAME.txt, for Wireshark
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

    def recording(self, configuration: Configuration, delivery: Delivery) -> Path:
        """Where the captures of a run are."""
        name = f"{configuration.id}-{delivery.value}" if configuration.qkd else configuration.id
        return self.folder / "recordings" / name

    # --- the channel ---------------------------------------------------------------------------

    async def talk(
        self,
        configuration: Configuration,
        delivery: Delivery = Delivery.IN_PROCESS,
        sources: tuple[KeySource, KeySource] | None = None,
        *,
        connections: int = 2,
        **client_options: Any,
    ) -> list[Talk]:
        """Record connections, of which each resumes the one before it."""
        folder = self.recording(configuration, delivery)
        folder.mkdir(exist_ok=True)
        if configuration.qkd and sources is None:
            sources = in_process_pair("alice", "bob")
        alice, bob = sources or (None, None)
        shared: dict[str, Any] = {
            "groups": (self._group(configuration),),
            "policy": _CLASSICAL_TOO,
        }
        server = ServerConfig(
            **shared,
            identities=(self._identity,) if configuration.certificates else (),
            psk_source=QkdKeys(bob) if bob is not None else None,
            tickets=self._tickets(),
        )
        trust = TrustStore((self._ca.certificate,))
        with (self.folder / "keylog" / f"{folder.name}.txt").open("w") as key_log:
            client = ClientConfig(
                **shared,
                verifier=trust if configuration.certificates else None,
                psk_source=QkdKeys(alice) if alice is not None else None,
                session_store=MemorySessionStore(),
                key_log=lambda line: print(line, file=key_log),
                **client_options,
            )
            return await self._talk(configuration, folder, client, server, connections)

    def _group(self, configuration: Configuration) -> Group:
        group = configuration.group
        return self.escrow.instrumented(group) if configuration.escrowed else group

    async def _talk(
        self,
        configuration: Configuration,
        folder: Path,
        client: ClientConfig,
        server: ServerConfig,
        connections: int,
    ) -> list[Talk]:
        talks = []
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
                    talks.append(await _converse(stream, secret))
            nursery.cancel_scope.cancel()
        return talks

    def _tickets(self) -> TicketIssuer:
        """A ticket issuer, with a copy of its key for the thief."""
        issuer, key, name = TicketIssuer(), os.urandom(32), os.urandom(8)
        issuer._keys.append(_SealingKey(key, name, time.time()))
        with (self.folder / "stolen/ticket-keys.jsonl").open("a", encoding="ascii") as file:
            file.write(json.dumps({"name": name.hex(), "key": key.hex()}) + "\n")
        return issuer

    # --- KMEs ----------------------------------------------------------------------------------

    @asynccontextmanager
    async def kmes(self, delivery: Delivery) -> AsyncIterator[Serving]:
        """Two KMEs of one link, which serve SAEs as the delivery says.

        Their databases are stolen before the block, and a while after all of its deliveries.
        """
        server = KmeServer(self._kme_config(delivery))
        async with trio.open_nursery() as nursery:
            where: Serving = await nursery.start(server.serve)
            await self._wait_for_keys(where, delivery)
            self._steal_stores(delivery, "before")
            yield where
            await trio.sleep(_THIEF_COMES)
            self._steal_stores(delivery, "after")
            server.close()

    def _kme_config(self, delivery: Delivery) -> ServeConfig:
        configs = []
        for (sae, kme), (peer_sae, peer_kme) in (_SITES, _SITES[::-1]):
            folder = self._kme_folder(delivery, kme)
            for holder in (kme, sae):
                identity = self._ca.issue(_LOOPBACK, common_name=holder)
                write_identity(folder.with_name(holder), self._ca, identity)
            write_key_file(folder / "store.key")
            configs.append(
                KmeConfig(
                    id=kme,
                    listen=KmeAddress(_LOOPBACK, 0),
                    saes=(sae,),
                    ca=folder / "ca.pem",
                    certificate=folder / "cert.pem",
                    key=folder / "key.pem",
                    store=folder / "keys.db",
                    key_file=folder / "store.key",
                    tls="stdlib" if delivery is Delivery.CLASSICAL_HOP else "hybridkex",
                    peer=(PeerConfig(id=peer_kme, saes=(peer_sae,)),),
                    limits=KmeLimits(max_key_count=_KEYS),
                )
            )
        return ServeConfig(kme=tuple(configs), grace=1.0)

    def _kme_folder(self, delivery: Delivery, holder: str) -> Path:
        return self.folder / f"site-{delivery.value}" / holder

    def _steal_stores(self, delivery: Delivery, when: str) -> None:
        for _, kme in _SITES:
            loot = self.folder / "stolen" / f"{when}-{delivery.value}" / kme
            loot.mkdir(parents=True)
            for path in self._kme_folder(delivery, kme).glob("keys.db*"):
                shutil.copy(path, loot)
            shutil.copy(self._kme_folder(delivery, kme) / "store.key", loot)

    async def _wait_for_keys(self, where: Serving, delivery: Delivery) -> None:
        async with AsyncExitStack() as stack:
            for sae, kme in _SITES:
                source = await self._source(stack, delivery, sae, str(where.kmes[kme]))
                with trio.fail_after(10):
                    # A KME cannot tell when it is ready.
                    while (await source.status()).stored < _KEYS:  # noqa: ASYNC110
                        await trio.sleep(0.02)

    @asynccontextmanager
    async def tapped_sources(
        self, configuration: Configuration, delivery: Delivery, where: Serving
    ) -> AsyncIterator[tuple[KeySource, KeySource]]:
        """Key sources of both parties at their KMEs, with a tap on either hop."""
        folder = self.recording(configuration, delivery)
        folder.mkdir()
        async with AsyncExitStack() as stack:
            sources = []
            for sae, kme in _SITES:
                address = where.kmes[kme]
                tap = wire_tap(folder / f"hop-{sae}.pcapng", (address.host, address.port))
                host, port = await stack.enter_async_context(tap)
                sources.append(await self._source(stack, delivery, sae, f"{host}:{port}"))
            yield sources[0], sources[1]

    async def _source(
        self, stack: AsyncExitStack, delivery: Delivery, sae: str, address: str
    ) -> Etsi014Source:
        folder = self._kme_folder(delivery, sae)
        access = KmeAccess(
            url=f"https://{address}",
            ca=folder / "ca.pem",
            certificate=folder / "cert.pem",
            key=folder / "key.pem",
        )
        client = KmeClient(access, hop=self._hop(delivery, folder))
        await stack.enter_async_context(client)
        (peer,) = (other for other, _ in _SITES if other != sae)
        return Etsi014Source(client, sae=sae, peer_sae=peer)

    def _hop(self, delivery: Delivery, folder: Path) -> Hop:
        """The SAE's side of the hop, instrumented: one side's private key breaks an exchange."""
        group = X25519 if delivery is Delivery.CLASSICAL_HOP else X25519MLKEM768
        config = ClientConfig(
            groups=(self.escrow.instrumented(group),),
            policy=_CLASSICAL_TOO,
            verifier=TrustStore((self._ca.certificate,)),
            identity=Identity.from_files(folder / "cert.pem", folder / "key.pem"),
        )

        async def hop(stream: trio.abc.Stream, host: str) -> tuple[trio.abc.Stream, bytes]:
            secure = SecureStream(stream, config, server_hostname=host, https_compatible=True)
            await secure.do_handshake()
            peer = secure.session.peer_certificate
            assert peer is not None
            return secure, peer.chain[0]

        return hop


# --- what is said -----------------------------------------------------------------------------


async def _converse(stream: SecureStream[trio.SocketStream], secret: str) -> Talk:
    """The client's part: two questions, with new keys for both directions between them."""
    said, heard = bytearray(), bytearray()
    async with stream:
        for line in (f"Alice to Bob: {secret}", "Alice to Bob: still there with new keys?"):
            if said:
                await stream.update_keys(request_peer=True)
            data = line.encode() + b"\n"
            await stream.send_all(data)
            said += data
            heard += await _line(stream)
        await stream.send_eof()
        if await stream.receive_some():
            raise trio.BrokenResourceError("the server said more than it should")
        session = stream.session
    return Talk(
        to_server=bytes(said),
        to_client=bytes(heard),
        resumed=session.resumed,
        session=session.as_json(),
    )


async def _answer(stream: SecureStream[trio.SocketStream]) -> None:
    """The server's part: an answer to each question."""
    async with stream:
        while question := await _line(stream):
            answer = f"Bob to Alice: {len(question)} bytes received, {secrets.token_hex(8)}\n"
            await stream.send_all(answer.encode())


async def _line(stream: SecureStream[trio.SocketStream]) -> bytes:
    """Up to the end of the line, or of the stream."""
    line = bytearray()
    while not line.endswith(b"\n") and (data := await stream.receive_some()):
        line += data
    return bytes(line)
