"""Why a chain was refused, as a person would say it.

The verifier of `cryptography` has said no already, in words about candidates and policies. What is
here walks the chain again and looks for the first thing that is wrong, in the order in which one
would mend it: the chain itself, the dates, the authorities, the end entity's own certificate. It
never turns a no into a yes; where it finds nothing, the verifier's own words are passed on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from typing import Final, TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ed448, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID

from hybridkex.auth.certificates import issuer_of, key_weakness, names_of, spki_sha256, subject_of
from hybridkex.auth.names import DnsName, PeerName, covers
from hybridkex.constants import Alert
from hybridkex.errors import CertificateRejected

__all__ = ["Roots", "explain"]

E = TypeVar("E", bound=x509.ExtensionType)

_BROKEN_HASHES: Final = frozenset({"md5", "sha1"})


@dataclass(frozen=True)
class Roots:
    """The authorities that were asked, and where they came from."""

    certificates: tuple[x509.Certificate, ...]
    source: str

    def __str__(self) -> str:
        count = len(self.certificates)
        many = f"any of the {count} trusted certificates" if count > 1 else "the trusted one"
        return many + (f" in {self.source}" if self.source else "")


@dataclass(frozen=True)
class Finding:
    """Something wrong with one certificate."""

    certificate: x509.Certificate
    reason: str
    alert: Alert = Alert.BAD_CERTIFICATE

    def rejection(self) -> CertificateRejected:
        subject = subject_of(self.certificate)
        return CertificateRejected(
            f"certificate {subject} {self.reason}", alert=self.alert, subject=subject
        )


def explain(
    certificates: Sequence[x509.Certificate],
    *,
    roots: Roots,
    name: PeerName | None,
    at: datetime,
    refusal: Exception,
) -> CertificateRejected:
    """The error for a chain that the verifier refused.

    Args:
        certificates: what the peer sent, leaf first.
        roots: whom we trust.
        name: the server's; ``None`` for a client's chain.
        at: the time of the check, aware.
        refusal: what the verifier said.
    """
    try:
        found = _first_finding(certificates, roots, name, at)
    except Exception as error:
        # Issuers are parsed only now, and they are bytes of the peer's as well.
        found = Finding(certificates[0], f"comes with a chain that does not parse: {error}")
    if found is None:
        # The certificate is named already; the library's note of which one it was adds nothing.
        words = str(refusal).removeprefix("validation failed: ").partition(" (encountered")[0]
        found = Finding(certificates[0], f"was not accepted: {words}", Alert.CERTIFICATE_UNKNOWN)
    return found.rejection()


def _first_finding(
    certificates: Sequence[x509.Certificate], roots: Roots, name: PeerName | None, at: datetime
) -> Finding | None:
    path = [certificates[0]]
    while path[-1] not in roots.certificates:
        issuer = _issuer_of(path[-1], (*roots.certificates, *certificates[1:]), path, roots)
        if isinstance(issuer, Finding):
            return issuer
        path.append(issuer)
    checks = chain(
        (_dates(certificate, at) for certificate in path),
        (_authority(issuer, path[: place + 1]) for place, issuer in enumerate(path[1:])),
    )
    for found in checks:
        if found is not None:
            return found
    return _leaf(path[0], server=name is not None) or (
        None if name is None else _name(path[0], name)
    )


def _issuer_of(
    child: x509.Certificate,
    candidates: Sequence[x509.Certificate],
    path: Sequence[x509.Certificate],
    roots: Roots,
) -> x509.Certificate | Finding:
    """The certificate that signed ``child``, or what is wrong where there is none."""
    digest = child.signature_hash_algorithm
    if digest is not None and digest.name in _BROKEN_HASHES:
        return Finding(
            child,
            f"is signed with {digest.name.upper()}, which is broken",
            Alert.UNSUPPORTED_CERTIFICATE,
        )
    named = [one for one in candidates if one.subject == child.issuer and one not in path]
    for one in named:
        try:
            child.verify_directly_issued_by(one)
        except (InvalidSignature, UnsupportedAlgorithm, TypeError, ValueError):
            continue
        return one
    issuer = issuer_of(child)
    if named and not any(_names_key_of(child, one) for one in named):
        return Finding(
            child,
            f"was issued by {issuer}, and the {issuer} known here is another one: same name, "
            "other key. Was the authority made anew?",
            Alert.UNKNOWN_CA,
        )
    if named:
        return Finding(child, f"has a signature that is not {issuer}'s")
    if child.subject != child.issuer:
        return Finding(
            child,
            f"was issued by {issuer}, which is not {roots} and which the peer did not send",
            Alert.UNKNOWN_CA,
        )
    if child is path[0]:
        return Finding(
            child,
            f"is self-signed and is not {roots}; to trust just its key, pin {spki_sha256(child)}",
            Alert.UNKNOWN_CA,
        )
    return Finding(child, f"ends the chain and is not {roots}", Alert.UNKNOWN_CA)


def _names_key_of(child: x509.Certificate, issuer: x509.Certificate) -> bool:
    """Whether the child's authority key identifier is the issuer's, as far as they say."""
    wanted = _extension(child, x509.AuthorityKeyIdentifier)
    own = _extension(issuer, x509.SubjectKeyIdentifier)
    return wanted is None or own is None or wanted.key_identifier in (None, own.digest)


def _dates(certificate: x509.Certificate, at: datetime) -> Finding | None:
    # RFC 8446 section 6.2: certificate_expired is "has expired or is not currently valid".
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if start <= at <= end:
        return None
    when = f"expired on {_minute(end)}" if at > end else f"is not valid before {_minute(start)}"
    return Finding(certificate, f"{when} (the clock says {_minute(at)})", Alert.CERTIFICATE_EXPIRED)


def _minute(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M} UTC"


def _authority(issuer: x509.Certificate, below: Sequence[x509.Certificate]) -> Finding | None:
    """What keeps a certificate from issuing (RFC 5280 section 6.1.4 (k) to (n))."""
    signed = f"and yet it signed {subject_of(below[-1])}"
    constraints = _extension(issuer, x509.BasicConstraints)
    if constraints is None:
        return Finding(issuer, f"has no basicConstraints, so it is no authority, {signed}")
    if not constraints.ca:
        return Finding(issuer, f"is not an authority's (basicConstraints CA:FALSE), {signed}")
    usage = _extension(issuer, x509.KeyUsage)
    if usage is not None and not usage.key_cert_sign:
        return Finding(issuer, f"may not sign certificates (keyUsage), {signed}")
    # Self-issued certificates do not count (section 4.2.1.9), nor does the leaf.
    between = sum(one.subject != one.issuer for one in below[1:])
    if constraints.path_length is not None and between > constraints.path_length:
        return Finding(
            issuer,
            f"allows {constraints.path_length} authorities below itself, and there are {between}",
        )
    key = issuer.public_key()
    weakness = f"has {weak}" if (weak := key_weakness(key)) is not None else None
    if isinstance(key, ed25519.Ed25519PublicKey | ed448.Ed448PublicKey):
        weakness = (
            "signs with EdDSA, which the verifier accepts for end entities only; an authority "
            "needs an ECDSA, RSA or ML-DSA key"
        )
    if weakness is None:
        return None
    return Finding(issuer, weakness, Alert.UNSUPPORTED_CERTIFICATE)


def _leaf(leaf: x509.Certificate, *, server: bool) -> Finding | None:
    """What keeps a certificate from being an end entity's of this role."""
    unsupported = Alert.UNSUPPORTED_CERTIFICATE
    if leaf.version is not x509.Version.v3:
        return Finding(
            leaf, "is of X.509 version 1, which has no extensions; it needs version 3", unsupported
        )
    side = "server" if server else "client"
    wanted = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
    usages = _extension(leaf, x509.ExtendedKeyUsage)
    if usages is not None and wanted not in usages:
        return Finding(
            leaf, f"is not for a {side} (extendedKeyUsage lacks {side}Auth)", unsupported
        )
    constraints = _extension(leaf, x509.BasicConstraints)
    if constraints is not None and constraints.ca:
        return Finding(leaf, f"is an authority's, and a {side} needs one of its own")
    usage = _extension(leaf, x509.KeyUsage)
    if usage is not None and usage.key_cert_sign:
        return Finding(leaf, f"is for signing certificates (keyUsage), not for a {side}")
    for extension in leaf.extensions:
        if extension.critical and isinstance(extension.value, x509.UnrecognizedExtension):
            oid = extension.oid.dotted_string
            return Finding(
                leaf, f"has a critical extension that is not known here ({oid})", unsupported
            )
    return None


def _name(leaf: x509.Certificate, name: PeerName) -> Finding | None:
    if isinstance(name, DnsName) and "_" in name.a_label:
        return Finding(
            leaf,
            f"cannot be checked for {name}: a name with an underscore is no host name (RFC 5280 "
            "section 4.2.1.6). Check it for another name, or pin its key",
        )
    names = names_of(leaf)
    if not names:
        return Finding(
            leaf,
            f"has no subjectAltName, so it is not for {name}; a common name does not count "
            "(RFC 9525 section 2)",
        )
    if not any(covers(one, name) for one in names):
        return Finding(leaf, f"is for {', '.join(names)}, not for {name}")
    return None


def _extension(certificate: x509.Certificate, kind: type[E]) -> E | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None
