"""The cases: one table for all peers and both roles."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Final, Literal

from interop.matrix.material import Materials
from interop.matrix.task import Psk, Role, Task

__all__ = ["CASES", "Case", "other_end"]

End = Literal["us", "peer"]

SIZE: Final = 4 << 10
LARGE: Final = 4 << 20
EXPORTER: Final = "EXPORTER-interop"
PSK: Final = Psk(identity="interop-psk", key=bytes(range(32)).hex())
CONTEXT: Final = b"interop"
"""The context of the imported PSK (RFC 9258)."""

_ids = count(1)


@dataclass(frozen=True, kw_only=True)
class Case:
    """What the two ends of a case do; either of them can be hybridkex.

    Args:
        name: for people.
        area: the heading it stands under.
        ours: the roles of hybridkex in which it makes sense.
        group: what they must agree on; ``None`` leaves it to them.
        retry_from: the group that the client sends a share of and the server does not take.
        no_share: our client sends no share at all (RFC 9846 section 4.3.8).
        suite: what they must agree on.
        certificate: the kind of the server's certificate.
        mutual: the client shows a certificate too.
        alpn: the client also offers h2, and the server has http/1.1 alone.
        sni: the server has two certificates, and the client wants the second.
        resume: a second connection resumes the session of the first.
        update: who sends KeyUpdate and asks for one.
        half_close: who ends its direction before the other speaks.
        fresh_keys: hybridkex offers Extended Key Update, which no peer knows.
        size: bytes each way.
        psk: an external PSK, plain or imported by RFC 9258.
        must_tell: what the peer's report must have, to be compared with ours.
    """

    name: str
    area: str
    ours: tuple[Role, ...] = ("client", "server")
    group: str | None = None
    retry_from: str | None = None
    no_share: bool = False
    suite: str | None = None
    certificate: str = "ecdsa"
    mutual: bool = False
    alpn: bool = False
    sni: bool = False
    resume: bool = False
    update: End | None = None
    half_close: End | None = None
    fresh_keys: bool = False
    size: int = SIZE
    psk: Literal["plain", "imported"] | None = None
    must_tell: tuple[Literal["exporter", "key_log"], ...] = ()

    @property
    def needs(self) -> tuple[str, ...]:
        """What a peer must be able to do, in the words of its ``lacks``."""
        return tuple(self._needs())

    def _needs(self) -> Iterator[str]:
        if self.psk is not None:
            yield f"{self.psk} PSK"
        if self.retry_from is not None:
            yield f"retry from {self.retry_from} to {self.group}"
        if self.group is not None:
            yield f"group {self.group}"
        if self.suite is not None:
            yield f"suite {self.suite}"
        yield f"certificate {self.certificate}"
        for wanted, need in (
            (self.mutual, "client certificate"),
            (self.alpn, "ALPN"),
            (self.sni, "SNI"),
            (self.resume, "resumption"),
            (self.resume and self.mutual, "resumption with certificates of both"),
            (self.update == "us", "KeyUpdate answer"),
            (self.update == "peer", "KeyUpdate request"),
            (self.half_close == "peer", "half-close"),
            (self.half_close == "us", "speaking after our close_notify"),
            (self.size == LARGE, "large transfer"),
        ):
            if wanted:
                yield need
        yield from self.must_tell

    def tasks(self, ours: Role, materials: Materials) -> tuple[Task, Task]:
        """The tasks of our end and of the peer, with hybridkex in the role ``ours``."""
        return self._task(ours, "us", materials), self._task(other_end(ours), "peer", materials)

    def _task(self, role: Role, end: End, materials: Materials) -> Task:
        client = role == "client"
        first: Role | None = None
        if speaker := self.update or self.half_close:
            first = role if speaker == end else other_end(role)
        groups = [name for name in (client and self.retry_from, self.group) if name]
        certified = self.psk is None
        authority = materials.of(self.certificate)
        shows = certified and (not client or self.mutual)
        verifies = certified and (client or self.mutual)
        server = authority.other if self.sni else authority.server
        return Task(
            id=next(_ids),
            role=role,
            connections=2 if self.resume else 1,
            groups=tuple(groups),
            shares=0 if self.no_share and end == "us" else 1,
            suites=(self.suite,) if self.suite else (),
            own=(authority.client if client else authority.server) if shows else None,
            expected=(server if client else authority.client) if verifies else None,
            other=authority.other if self.sni and not client else None,
            ca=authority.ca if verifies else None,
            server_name=server.name if client else None,
            alpn=(("h2", "http/1.1") if client else ("http/1.1",)) if self.alpn else (),
            psk=PSK if self.psk else None,
            context=CONTEXT.hex() if self.psk == "imported" else None,
            size=self.size,
            first=first,
            half_close=self.half_close is not None,
            update=self.update == end,
            exporter=EXPORTER,
            fresh_keys=self.fresh_keys and end == "us",
        )


def other_end(role: Role) -> Role:
    """The role of the other end."""
    return "server" if role == "client" else "client"


_GROUPS: Final = (
    "X25519MLKEM768",
    "SecP256r1MLKEM768",
    "SecP384r1MLKEM1024",
    "MLKEM768",
    "MLKEM1024",
    "x25519",
    "secp256r1",
    "secp384r1",
)
_SUITES: Final = (
    "TLS_AES_128_GCM_SHA256",
    "TLS_AES_256_GCM_SHA384",
    "TLS_CHACHA20_POLY1305_SHA256",
)
_CERTIFICATES: Final = {
    "ecdsa": "ECDSA P-256",
    "ecdsa-p384": "ECDSA P-384",
    "ed25519": "Ed25519",
    "rsa": "RSA, signing with PSS",
    "mldsa44": "ML-DSA-44",
    "mldsa65": "ML-DSA-65",
    "mldsa87": "ML-DSA-87",
}
_RETRIES: Final = (
    ("X25519MLKEM768", "secp384r1"),
    ("x25519", "secp384r1"),
    ("x25519", "X25519MLKEM768"),
)

CASES: Final = (
    *(Case(name=name, area="Group", group=name) for name in _GROUPS),
    *(
        Case(
            name=f"{first} to {second}",
            area="HelloRetryRequest",
            retry_from=first,
            group=second,
        )
        for first, second in _RETRIES
    ),
    Case(name="no share to begin with", area="HelloRetryRequest", ours=("client",), no_share=True),
    *(Case(name=name, area="Cipher suite", suite=name) for name in _SUITES),
    *(
        Case(name=text, area="Certificate", certificate=kind)
        for kind, text in _CERTIFICATES.items()
    ),
    Case(name="mutual, ECDSA P-256", area="Certificate", mutual=True),
    Case(name="mutual, ML-DSA-65", area="Certificate", mutual=True, certificate="mldsa65"),
    Case(name="ALPN", area="Negotiation", alpn=True),
    Case(name="SNI picks the certificate", area="Negotiation", sni=True),
    Case(name="resumption", area="Session", resume=True),
    Case(name="resumption after mutual TLS", area="Session", resume=True, mutual=True),
    Case(name="KeyUpdate asked for by hybridkex", area="Traffic", update="us"),
    Case(name="KeyUpdate asked for by the peer", area="Traffic", update="peer"),
    Case(name="half-close by hybridkex", area="Traffic", half_close="us"),
    Case(name="half-close by the peer", area="Traffic", half_close="peer"),
    Case(name="fresh keys offered, KeyUpdate used", area="Traffic", fresh_keys=True, update="us"),
    Case(
        name="fresh keys offered, after HelloRetryRequest",
        area="Traffic",
        ours=("client",),
        group="secp384r1",
        retry_from="x25519",
        fresh_keys=True,
    ),
    Case(name="4 MiB each way, both at once", area="Traffic", size=LARGE),
    Case(name="plain (RFC 9846)", area="External PSK", psk="plain"),
    Case(name="imported (RFC 9258)", area="External PSK", psk="imported"),
    Case(name="key log", area="Secrets", must_tell=("key_log",)),
    Case(name="exporter", area="Secrets", must_tell=("exporter",)),
)
