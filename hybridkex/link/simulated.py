"""Both parties in one process, with a fibre between them: the whole link as one object."""

import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final, TypeAlias

import trio
from cryptography.hazmat.primitives.asymmetric import ec, mldsa

from hybridkex.errors import BlockAborted, ConfigError, LinkError
from hybridkex.link.authentication import Signatures
from hybridkex.link.eavesdroppers import EAVESDROPPERS, NoEve, eavesdropper
from hybridkex.link.interference import TamperedStream
from hybridkex.link.ledger import LANE_RESERVE, Ledger
from hybridkex.link.party import Alice, Block, Bob, cause
from hybridkex.link.physics import Channel, Source
from hybridkex.link.quantum import Fading, OpticalLink
from hybridkex.link.randomness import Randomness
from hybridkex.link.ranges import instance, one_of
from hybridkex.link.settings import LinkSettings
from hybridkex.secret import Secret

__all__ = ["BOOTSTRAPS", "Observer", "SimulatedLink", "stream_pair"]

Observer: TypeAlias = Callable[[Block | BlockAborted], None]
"""Called with each block: Bob's :class:`Block`, which has all numbers, or why it was aborted."""

BOOTSTRAPS: Final = ("psk", "ecdsa", "ml-dsa")


def _bootstraps(kind: str, shared: bytes) -> tuple[Ledger | Signatures, Ledger | Signatures]:
    """Alice's and Bob's authentication of the first block."""
    if kind == "psk":
        return Ledger(Secret(shared)), Ledger(Secret(shared))
    if kind == "ecdsa":
        curve = ec.SECP256R1()
        a, b = ec.generate_private_key(curve), ec.generate_private_key(curve)
        return Signatures(a, b.public_key()), Signatures(b, a.public_key())
    c, d = mldsa.MLDSA65PrivateKey.generate(), mldsa.MLDSA65PrivateKey.generate()
    return Signatures(c, d.public_key()), Signatures(d, c.public_key())


def attack(
    eve: str | None, channel: Channel, transmitter: Source
) -> tuple[NoEve | None, int | None]:
    """The attack of an Eve: on the light, and the number of the byte for Alice that Eve changes.

    Raises ``ConfigError`` for an Eve that does not exist, or cannot attack this source.
    """
    if eve is None or instance("eve", eve, str) in ("none", "mitm"):
        return None, None
    name, _, detail = eve.partition(":")
    if name == "tamper":
        if not (detail.isdecimal() and len(detail) <= 18):
            raise ConfigError(
                "tamper:BYTE needs the number of a byte that Alice receives, counted from 0"
            )
        return None, int(detail)
    if name not in EAVESDROPPERS:
        raise ConfigError(
            f"no eavesdropper {eve!r}: use intercept:SHARE, split:SHARE, pns, mitm, tamper:BYTE "
            "or none"
        )
    return eavesdropper(eve, channel, transmitter), None


class SimulatedLink:
    """Alice, Bob and the channels between them. Use it inside ``async with link.open():``.

    Args:
        settings: both ends use these.
        bootstrap: what authenticates the first block: one of :data:`BOOTSTRAPS`.
        observer: see :data:`Observer`.
    """

    def __init__(
        self,
        settings: LinkSettings,
        *,
        eve: str | None = None,
        bootstrap: str = "psk",
        seed: int | None = None,
        fading: Fading | None = None,
        observer: Observer | None = None,
    ) -> None:
        """``eve``: ``intercept:SHARE``, ``split:SHARE``, ``pns``, ``mitm``, ``tamper:BYTE``, or
        ``none``.

        ``fading``: more loss in dB at a time in seconds, such as a
        :class:`~hybridkex.link.satellite.SatellitePass`; without an Eve. ``seed`` makes a run
        repeatable, and its keys worthless. Raises ``ConfigError``.
        """
        self.settings: Final = instance("settings", settings, LinkSettings)
        for name, function, what in (
            ("fading", fading, "the time, such as a SatellitePass"),
            ("observer", observer, "a block"),
        ):
            if function is not None and (not callable(function) or isinstance(function, type)):
                raise ConfigError(f"{name} takes a function of {what}")
        self._observer = observer
        self._seed = seed
        self._bootstrap = one_of("bootstrap", bootstrap, BOOTSTRAPS)
        channel, transmitter = settings.preset.channel, settings.preset.transmitter
        light, self._tampered = attack(eve, channel, transmitter)
        self._eve = None if eve == "none" else eve
        if fading is not None and self._eve:
            raise ConfigError("an eavesdropper cannot be combined with a fluctuating channel")
        self._link = OpticalLink(
            channel,
            transmitter,
            light=light,
            fading=fading,
            seed=seed,
            real_time=settings.real_time,
        )
        self._shared = Randomness.seeded(seed, "shared secret").bytes(2 * LANE_RESERVE)
        self._ends = _bootstraps(bootstrap, self._shared)
        self._parties: tuple[Alice | Bob, ...] = ()
        self._streams: tuple[trio.abc.Stream, ...] = ()
        """The streams of the parties, in the order of the parties."""
        self._over = False

    @property
    def seconds(self) -> float:
        """Seconds for which the laser has been on, by its own clock, until the last detection of a
        block; of a block without enough detections nothing is counted."""
        return self._link.seconds

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes from Alice to Bob and from Bob to Alice."""
        return self._parties[0].traffic if self._parties else (0, 0)

    @property
    def untouched(self) -> str | None:
        """The reason why ``tamper:BYTE`` has flipped no bit; ``None`` if it has, or is not used."""
        received = self.traffic[1]
        if self._tampered is None or self._tampered < received:
            return None
        return (
            f"Eve flipped no bit: Alice received {received:,} bytes, and byte {self._tampered:,} "
            f"was to be changed; make more blocks, or name a byte from 0 to {received - 1:,}"
        )

    @asynccontextmanager
    async def open(self) -> AsyncIterator["SimulatedLink"]:
        """Connect the parties, and disconnect them at the end."""
        streams = [*stream_pair()]
        near: trio.abc.Stream = streams[0]
        if self._tampered is not None:
            near = TamperedStream(near, byte=self._tampered)
        alice = Alice(
            near,
            self.settings,
            self._link.record,
            bootstrap=self._ends[0],
            seed=self._seed,
            patient=self.settings.real_time,
        )
        far, detector = streams[1], self._link
        between: list[Alice | Bob] = []
        if self._eve == "mitm":
            # Eve impersonates Bob to Alice and Alice to Bob, without their bootstrap secret.
            hers = _bootstraps(self._bootstrap, os.urandom(len(self._shared)))
            other = OpticalLink(
                self.settings.preset.channel,
                self.settings.preset.transmitter,
                seed=self._seed,
                real_time=self.settings.real_time,
            )
            streams += stream_pair()
            between = [
                Bob(far, self.settings, detector, bootstrap=hers[1]),
                Alice(
                    streams[2],
                    self.settings,
                    other.record,
                    bootstrap=hers[0],
                    patient=self.settings.real_time,
                ),
            ]
            far, detector = streams[3], other
        bob = Bob(far, self.settings, detector, bootstrap=self._ends[1], seed=self._seed)
        self._parties = (alice, bob, *between)
        self._streams = (near, far, *streams[1:3]) if between else (near, far)
        try:
            yield self
        finally:
            self._over = True
            # Shielded, or a cancelled caller would close the first of them only.
            with trio.CancelScope(shield=True):
                for stream in streams:
                    await trio.aclose_forcefully(stream)

    async def block(self) -> tuple[Block, Block]:
        """Make one block: what Alice has and what Bob has.

        Raises :class:`~hybridkex.errors.BlockAborted`, after which the next can be tried, and other
        :class:`~hybridkex.errors.LinkError`, after which the link is over.
        """
        if self._over or not self._parties:
            raise LinkError("the link is not open")
        made: dict[int, Block] = {}
        failures: list[LinkError] = []
        async with trio.open_nursery() as nursery:

            async def play(number: int, party: Alice | Bob) -> None:
                try:
                    made[number] = await party.block()
                except LinkError as error:
                    failures.append(error)
                    if isinstance(error, BlockAborted):
                        return
                    # The other party notices. It is stopped only where its light may last for
                    # hours, since the place of a stop in its block, and so the end of the light,
                    # varies.
                    await trio.aclose_forcefully(self._streams[number])
                    if self.settings.real_time:
                        nursery.cancel_scope.cancel()

            for number, party in enumerate(self._parties):
                nursery.start_soon(play, number, party)
        fatal = [one for one in failures if not isinstance(one, BlockAborted)]
        if fatal:
            self._over = True
            raise cause(fatal)
        if failures:
            if self._observer is not None and isinstance(failures[0], BlockAborted):
                self._observer(failures[0])
            raise failures[0]
        if self._observer is not None:
            self._observer(made[1])
        return made[0], made[1]


def stream_pair() -> tuple[trio.SocketStream, trio.SocketStream]:
    """Two connected streams within this process."""
    left, right = socket.socketpair()
    return (
        trio.SocketStream(trio.socket.from_stdlib_socket(left)),
        trio.SocketStream(trio.socket.from_stdlib_socket(right)),
    )
