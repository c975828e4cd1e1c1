"""Which configurations are attacked by which adversaries, and the predicted outcomes.

The prediction is this library's claim in one line: a connection can be decrypted if and only if
*every* leg, that is, every secret that its keys are derived from, is known.
:meth:`Adversary.defeats` states it; the trial measures it.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Final

from hybridkex.crypto.kex import X25519, X25519MLKEM768, Group, Property
from hybridkex.demos.rndl.now.escrow import ECDH, ML_KEM, SIGNATURE
from hybridkex.demos.rndl.toy_curve import TOY_GROUP


class Delivery(Enum):
    """The way in which the QKD keys of a session reach the two parties."""

    IN_PROCESS = "in-process"
    """No network: each party and its end of the key source are in one process."""
    CLASSICAL_HOP = "classical-hop"
    """From a KME (ETSI GS QKD 014) over TLS 1.3 with X25519; this connection is tapped too."""
    HYBRID_HOP = "hybrid-hop"
    """From a KME over this library's TLS with X25519MLKEM768; this connection is tapped too."""
    LINK = "link"
    """From a simulated QKD link between the two, whose classical channel is tapped too."""


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """A configuration of the channel between two parties."""

    id: str
    title: str
    group: Group
    qkd: bool = False
    certificates: bool = True
    fresh: bool = False
    """Whether its keys change by Extended Key Update, and not by KeyUpdate: a new key exchange, and
    with ``qkd`` a new QKD key. There are no tickets then, and no second connection."""
    escrowed: bool = True
    """Whether an oracle models the break of its key exchange."""

    @property
    def primitives(self) -> frozenset[str]:
        return frozenset(
            ECDH if part.properties is Property.CLASSICAL else ML_KEM
            for part in self.group.exchange.parts
        )


CONFIGURATIONS: Final = (
    Configuration(id="x25519", title="X25519", group=X25519),
    Configuration(id="x25519mlkem768", title="X25519MLKEM768", group=X25519MLKEM768),
    Configuration(id="x25519-qkd", title="X25519 + QKD", group=X25519, qkd=True),
    Configuration(
        id="x25519mlkem768-qkd",
        title="X25519MLKEM768 + QKD",
        group=X25519MLKEM768,
        qkd=True,
    ),
    Configuration(
        id="x25519mlkem768-qkd-psk",
        title="X25519MLKEM768 + QKD, PSK",
        group=X25519MLKEM768,
        qkd=True,
        certificates=False,
    ),
    Configuration(
        id="x25519mlkem768-fresh",
        title="X25519MLKEM768, fresh",
        group=X25519MLKEM768,
        fresh=True,
    ),
    Configuration(
        id="x25519mlkem768-qkd-fresh",
        title="X25519MLKEM768 + QKD, fresh",
        group=X25519MLKEM768,
        qkd=True,
        fresh=True,
    ),
)


TOY: Final = Configuration(id="toy36", title="toy curve", group=TOY_GROUP, escrowed=False)
"""Outside the matrix: broken by computing a discrete logarithm, without an oracle."""


@dataclass(frozen=True)
class Row:
    """A connection of a configuration: the first one, or the one that resumes it."""

    configuration: Configuration
    resumed: bool

    @property
    def id(self) -> str:
        return self.configuration.id + ("-resumed" if self.resumed else "")

    @property
    def title(self) -> str:
        return self.configuration.title + (", resumed" if self.resumed else "")


def rows() -> tuple[Row, ...]:
    return tuple(
        Row(configuration, resumed)
        for configuration in CONFIGURATIONS
        for resumed in (False, True)
        if not (resumed and configuration.fresh)
    )


@dataclass(frozen=True, kw_only=True)
class Adversary:
    """A kind of adversary: what it breaks, what it has recorded, what it has stolen.

    The session itself is always recorded. ``delivery`` says how the QKD keys were delivered in the
    sessions that this adversary attacks, and ``taps_delivery`` whether it recorded the delivery
    too.
    """

    id: str
    title: str
    note: str
    oracles: frozenset[str] = frozenset()
    delivery: Delivery = Delivery.IN_PROCESS
    taps_delivery: bool = False
    steals_certificate_key: bool = False
    steals_key_store: str | None = None
    """``before`` or ``after`` the delivery of the keys."""
    steals_ticket_key: bool = False
    steals_session: bool = False
    """All secrets of each connection, at one moment before its keys change."""

    @property
    def theme(self) -> str:
        """Its group in reports."""
        stolen = self.steals_certificate_key or self.steals_ticket_key or self.steals_session
        if stolen or self.steals_key_store:
            return "stolen, alone or besides"
        if self.taps_delivery:
            return "broken, and the way of the QKD key recorded too"
        return "what is broken"

    @property
    def knows_qkd_key(self) -> bool:
        if self.steals_key_store == "before":
            return True
        guards = _GUARDS.get(self.delivery)
        return self.taps_delivery and guards is not None and self.oracles >= guards

    def defeats(self, row: Row) -> bool:
        """Whether it must be able to decrypt the row: every leg is known.

        A leg of a handshake is one of its key update too, if that runs the same exchange and takes
        a QKD key in the same way; so what a thief of the session needs is what all others need.
        """
        configuration = row.configuration
        if self.steals_session and not configuration.fresh:
            return True  # KeyUpdate adds nothing that was not stolen
        exchange = self.oracles >= configuration.primitives
        psk = self.knows_qkd_key or not configuration.qkd
        # Decrypting the first connection or opening the ticket yields the ticket's PSK.
        if row.resumed and self.steals_ticket_key:
            psk = True
        return exchange and psk


_BOTH: Final = frozenset((ECDH, ML_KEM))
_GUARDS: Final = {Delivery.CLASSICAL_HOP: frozenset((ECDH,)), Delivery.HYBRID_HOP: _BOTH}
"""The primitives that protect a QKD key in transit; other deliveries cross no wire."""
_ALL: Final = frozenset((ECDH, ML_KEM, SIGNATURE))

ADVERSARIES: Final = (
    Adversary(id="none", title="nothing", note="The recording alone."),
    Adversary(id="ecdh", title="ECDH", note="X25519 is broken.", oracles=frozenset((ECDH,))),
    Adversary(
        id="ml-kem",
        title="ML-KEM",
        note="ML-KEM-768 is broken.",
        oracles=frozenset((ML_KEM,)),
    ),
    Adversary(id="both", title="ECDH + ML-KEM", note="Both are broken.", oracles=_BOTH),
    Adversary(
        id="signatures",
        title="signatures",
        note="The private key of every certificate can be computed.",
        oracles=frozenset((SIGNATURE,)),
    ),
    Adversary(
        id="hop-classical",
        title="ECDH; KME over classical TLS",
        note="X25519 is broken, and the connection on which the KME delivered the QKD key, TLS "
        "1.3 with X25519, was recorded too.",
        oracles=frozenset((ECDH,)),
        delivery=Delivery.CLASSICAL_HOP,
        taps_delivery=True,
    ),
    Adversary(
        id="hop-classical-both",
        title="ECDH + ML-KEM; KME over classical TLS",
        note="Both are broken, and the connection to the KME over classical TLS was recorded.",
        oracles=_BOTH,
        delivery=Delivery.CLASSICAL_HOP,
        taps_delivery=True,
    ),
    Adversary(
        id="hop-hybrid",
        title="ECDH; KME over hybrid TLS",
        note="X25519 is broken, and the connection to the KME, this library's TLS with "
        "X25519MLKEM768, was recorded.",
        oracles=frozenset((ECDH,)),
        delivery=Delivery.HYBRID_HOP,
        taps_delivery=True,
    ),
    Adversary(
        id="hop-hybrid-both",
        title="ECDH + ML-KEM; KME over hybrid TLS",
        note="Both are broken, and the connection to the KME over hybrid TLS was recorded. It is "
        "no stronger than its own key exchange: keep it inside the secure site.",
        oracles=_BOTH,
        delivery=Delivery.HYBRID_HOP,
        taps_delivery=True,
    ),
    Adversary(
        id="qkd-channel",
        title="all broken; QKD link's classical channel",
        note="ECDH, ML-KEM and signatures are broken, and all that the two ends of the QKD link "
        "said to each other was recorded: bases, parities, hashes, seeds, and how they signed.",
        oracles=_ALL,
        delivery=Delivery.LINK,
        taps_delivery=True,
    ),
    Adversary(
        id="certificate-key",
        title="certificate key",
        note="The server's long-term private key is stolen after the session.",
        steals_certificate_key=True,
    ),
    Adversary(
        id="key-store-after",
        title="all broken; KME stores, after delivery",
        note="ECDH, ML-KEM and signatures are broken; both KMEs' databases are stolen with the "
        "keys that seal them, after the QKD keys were delivered.",
        oracles=_ALL,
        delivery=Delivery.HYBRID_HOP,
        steals_key_store="after",
    ),
    Adversary(
        id="key-store-before",
        title="ECDH + ML-KEM; KME stores, before delivery",
        note="Both are broken, and the databases were stolen while the keys still lay in them: "
        "the control that shows that the thief can read them.",
        oracles=_BOTH,
        delivery=Delivery.HYBRID_HOP,
        steals_key_store="before",
    ),
    Adversary(
        id="ticket-key",
        title="ticket key",
        note="The key that seals the server's session tickets is stolen.",
        steals_ticket_key=True,
    ),
    Adversary(
        id="ticket-key-both",
        title="ECDH + ML-KEM; ticket key",
        note="Both are broken, and the ticket key is stolen: the ticket gives the PSK of the "
        "resumed session, past the QKD key that it was derived from.",
        oracles=_BOTH,
        steals_ticket_key=True,
    ),
    Adversary(
        id="session",
        title="session secrets",
        note="All secrets of a session are stolen at one moment: traffic secrets, exporter, "
        "resumption, and what key updates start from. What follows is read, unless the keys have "
        "been renewed by a new key exchange.",
        steals_session=True,
    ),
    Adversary(
        id="session-both",
        title="ECDH + ML-KEM; session secrets",
        note="Both are broken, and all secrets of a session are stolen at one moment: only a new "
        "QKD key stands between the thief and what follows.",
        oracles=_BOTH,
        steals_session=True,
    ),
)
