"""Two KMEs of one link, for the sites of Alice and Bob, and taps on the connections to them."""

import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Final

import trio

from hybridkex.auth import DevCa, Identity, TrustStore
from hybridkex.auth.dev_ca import write_identity
from hybridkex.crypto.kex import X25519, X25519MLKEM768
from hybridkex.demos.rndl.matrix import Delivery
from hybridkex.demos.rndl.now.escrow import Escrow
from hybridkex.demos.rndl.now.tap import wire_tap
from hybridkex.kme.config import KmeConfig, PeerConfig, ServeConfig
from hybridkex.kme.entity import TIDY_EVERY
from hybridkex.kme.serve import KmeServer, Serving
from hybridkex.kme.settings import KmeLimits
from hybridkex.net.address import TcpAddress
from hybridkex.qkd.etsi014.client import Etsi014Source, KmeAccess, KmeClient
from hybridkex.qkd.etsi014.mutual_tls import TlsHandshake
from hybridkex.qkd.source import KeySource
from hybridkex.qkd.store import write_key_file
from hybridkex.streams import SecureStream
from hybridkex.tls.config import ClientConfig
from hybridkex.tls.policy import Policy, Requirement

_SITES: Final = (("alice", "kme-a"), ("bob", "kme-b"))
_LOOPBACK: Final = "127.0.0.1"
_KEYS: Final = 64
"""Keys that a KME has in stock; every session takes one."""
_THIEF_COMES: Final = 4 * TIDY_EVERY
"""Seconds between the last delivery and the theft."""


class Sites:
    """The KMEs of both sites, which serve SAEs by the given kind of delivery.

    Args:
        folder: a new one, for keys, certificates and databases.
        loot: the folder for stolen databases: ``before`` and ``after``, each with a folder per KME.
        ca: the authority that all parties trust.
        escrow: records the private keys of the connections to the KMEs.
        delivery: the kind of connection to the KMEs.
    """

    def __init__(
        self, folder: Path, loot: Path, ca: DevCa, escrow: Escrow, delivery: Delivery
    ) -> None:
        self._folder = folder
        self._loot = loot
        self._ca = ca
        self._escrow = escrow
        self._classical = delivery is Delivery.CLASSICAL_HOP
        self._serving: Serving | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Sites"]:
        """Serve during the block.

        The databases are stolen before the block, and a while after its last delivery.
        """
        server = KmeServer(self._config())
        async with trio.open_nursery() as nursery:
            self._serving = await nursery.start(server.serve)
            await self._wait_for_keys()
            self._steal("before")
            yield self
            await trio.sleep(_THIEF_COMES)
            self._steal("after")
            server.close()

    def _config(self) -> ServeConfig:
        configs = []
        for (sae, kme), (peer_sae, peer_kme) in (_SITES, _SITES[::-1]):
            folder = self._folder / kme
            for holder in (kme, sae):
                identity = self._ca.issue(_LOOPBACK, common_name=holder)
                write_identity(folder.with_name(holder), self._ca, identity)
            write_key_file(folder / "store.key")
            configs.append(
                KmeConfig(
                    id=kme,
                    listen=TcpAddress(_LOOPBACK, 0),
                    saes=(sae,),
                    ca=folder / "ca.pem",
                    certificate=folder / "cert.pem",
                    key=folder / "key.pem",
                    store=folder / "keys.db",
                    key_file=folder / "store.key",
                    tls="stdlib" if self._classical else "hybridkex",
                    peer=(PeerConfig(id=peer_kme, saes=(peer_sae,)),),
                    limits=KmeLimits(max_key_count=_KEYS),
                )
            )
        return ServeConfig(kme=tuple(configs), grace=1.0)

    def _steal(self, when: str) -> None:
        for _, kme in _SITES:
            loot = self._loot / when / kme
            loot.mkdir(parents=True)
            for path in (self._folder / kme).glob("keys.db*"):
                shutil.copy(path, loot)
            shutil.copy(self._folder / kme / "store.key", loot)

    def _address(self, kme: str) -> TcpAddress:
        assert self._serving is not None, "within running() only"
        return self._serving.kmes[kme]

    async def _wait_for_keys(self) -> None:
        async with AsyncExitStack() as stack:
            for sae, kme in _SITES:
                source = await self._source(stack, sae, str(self._address(kme)))
                with trio.fail_after(10):
                    # A KME does not report when it has keys.
                    while (await source.status()).stored < _KEYS:  # noqa: ASYNC110
                        await trio.sleep(0.02)

    @asynccontextmanager
    async def tapped_sources(self, recording: Path) -> AsyncIterator[tuple[KeySource, KeySource]]:
        """Key sources of both parties at their KMEs, with a tap on each connection."""
        async with AsyncExitStack() as stack:
            sources = []
            for sae, kme in _SITES:
                address = self._address(kme)
                tap = wire_tap(recording / f"hop-{sae}.pcapng", (address.host, address.port))
                host, port = await stack.enter_async_context(tap)
                sources.append(await self._source(stack, sae, f"{host}:{port}"))
            yield sources[0], sources[1]

    async def _source(self, stack: AsyncExitStack, sae: str, address: str) -> Etsi014Source:
        folder = self._folder / sae
        access = KmeAccess(
            url=f"https://{address}",
            ca=folder / "ca.pem",
            certificate=folder / "cert.pem",
            key=folder / "key.pem",
        )
        client = KmeClient(access, handshake=self._kme_tls(folder))
        await stack.enter_async_context(client)
        (peer,) = (other for other, _ in _SITES if other != sae)
        return Etsi014Source(client, sae=sae, peer_sae=peer)

    def _kme_tls(self, folder: Path) -> TlsHandshake:
        """The SAE's TLS to its KME, instrumented: one side's private key breaks an exchange."""
        group = X25519 if self._classical else X25519MLKEM768
        config = ClientConfig(
            groups=(self._escrow.instrumented(group),),
            policy=Policy(post_quantum=Requirement.PREFER),
            verifier=TrustStore((self._ca.certificate,)),
            identity=Identity.from_files(folder / "cert.pem", folder / "key.pem"),
        )

        async def handshake(stream: trio.abc.Stream, host: str) -> tuple[trio.abc.Stream, bytes]:
            secure = SecureStream(stream, config, server_hostname=host, https_compatible=True)
            await secure.do_handshake()
            peer = secure.session.peer_credential
            assert peer is not None
            return secure, peer.chain[0]

        return handshake
