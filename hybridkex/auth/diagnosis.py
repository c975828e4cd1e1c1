"""Explanation of a rejected chain.

The verifier of `cryptography` has rejected the chain. This module walks the chain again and looks
for the first flaw, in the order in which a user would fix them: the chain itself, the dates, the
authorities, the end entity's certificate. It never accepts a chain. Where it finds no flaw, it
passes on the verifier's message, without its internal details.
"""

import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import partial
from typing import Any, Final, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ed448, ed25519, padding
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID

from hybridkex.auth.certificates import (
    bounded,
    is_signed_by,
    issuer_of,
    key_cost,
    key_of,
    key_weakness,
    names_of,
    not_valid_today,
    spki_sha256,
    subject_of,
)
from hybridkex.auth.names import DnsName, PeerName, covers
from hybridkex.constants import Alert
from hybridkex.crypto.x509_failure import extension_name, parse_extensions, parse_failure
from hybridkex.errors import CertificateRejected
from hybridkex.text import printable
from hybridkex.values import value

E = TypeVar("E", bound=x509.ExtensionType)

_BROKEN_HASHES: Final = frozenset({"md5", "sha1"})


@value
class Roots:
    """The trusted authorities and their source."""

    certificates: tuple[x509.Certificate, ...]
    source: str

    def __str__(self) -> str:
        count = len(self.certificates)
        many = f"any of the {count} trusted certificates" if count > 1 else "the trusted one"
        return many + (f" in {self.source}" if self.source else "")


@value
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


def _unsupported(certificate: x509.Certificate, reason: str) -> Finding:
    return Finding(certificate, reason, Alert.UNSUPPORTED_CERTIFICATE)


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
        roots: the authorities that we trust.
        name: the server's; ``None`` for a client's chain.
        at: the time of the check, aware.
        refusal: what the verifier said.
    """
    try:
        found = _first_finding(certificates, roots, name, at, str(refusal))
    except Exception as error:
        # Issuers are parsed only here, and their bytes come from the peer, too.
        found = _malformed(certificates, roots) or Finding(
            certificates[0],
            f"comes with the certificate of an issuer that does not parse: {parse_failure(error)}",
        )
    if found is None:
        found = Finding(
            certificates[0], f"was not accepted: {_words(refusal)}", Alert.CERTIFICATE_UNKNOWN
        )
    return found.rejection()


def _malformed(certificates: Sequence[x509.Certificate], roots: Roots) -> Finding | None:
    """The issuer whose extensions do not parse."""
    for certificate in (*certificates[1:], *roots.certificates):
        try:
            if all(certificate.subject != child.issuer for child in certificates):
                continue
        except ValueError:  # a name that does not parse cannot be displayed
            continue
        try:
            parse_extensions(certificate)
        except Exception as error:
            return Finding(certificate, f"does not parse: {parse_failure(error)}")
    return None


def _words(refusal: Exception) -> str:
    """The verifier's message, without its internal details."""
    text = str(refusal).partition(" (encountered")[0].partition("{")[0]
    text = re.sub(_INTERNAL, "", text)
    text = re.sub(
        r"invalid extension: ([\d.]+): ", lambda found: f"{extension_name(found[1])}: ", text
    )
    return text.strip() or "the verifier gives no reason"


_INTERNAL: Final = (
    r"validation failed: |candidates exhausted: |fatal error: |"
    r"Python extension validator failed: (ValueError: )?"
)


def _first_finding(
    certificates: Sequence[x509.Certificate],
    roots: Roots,
    name: PeerName | None,
    at: datetime,
    refusal: str,
) -> Finding | None:
    path = [certificates[0]]
    checks = iter(range(_CHECKS))
    while path[-1] not in roots.certificates:
        issuer = _issuer_of(path[-1], (*roots.certificates, *certificates[1:]), path, roots, checks)
        if isinstance(issuer, Finding):
            return issuer
        path.append(issuer)
    return next(_findings(path, name, at, refusal), None)


def _findings(
    path: Sequence[x509.Certificate], name: PeerName | None, at: datetime, refusal: str
) -> Iterator[Finding]:
    """All flaws of a path from the leaf to a trusted certificate, worst first."""
    steps = (
        *(_form(certificate) for certificate in path),
        *(_dates(certificate, at) for certificate in path),
        *(_authority(issuer, path[: place + 1]) for place, issuer in enumerate(path[1:])),
        *(_usable_by_role(issuer, server=name is not None) for issuer in path[1:]),
        *(_extensions(certificate) for certificate in path),
        _leaf(path[0], server=name is not None),
        None if name is None else _name(path[0], name),
        *(_constraints(path[: place + 1], refusal) for place in range(len(path))),
        *(_signature_form(certificate) for certificate in path if "algorithm" in refusal),
    )
    yield from (found for found in steps if found is not None)


_CHECKS: Final = 32
"""The maximum number of signatures that are checked to explain a rejection; honest chains have
fewer."""


def _issuer_of(
    child: x509.Certificate,
    candidates: Sequence[x509.Certificate],
    path: Sequence[x509.Certificate],
    roots: Roots,
    checks: Iterator[object],
) -> x509.Certificate | Finding:
    """The certificate that signed ``child``, or the reason why none did.

    ``checks`` has one item for each signature check that is left.
    """
    flaw = _signature(child)
    if flaw is not None:
        return flaw
    named = [one for one in candidates if one.subject == child.issuer]
    for one, _ in zip((one for one in named if one not in path), checks, strict=False):
        if (cost := key_cost(key_of(one))) is not None:
            return _unsupported(one, f"has {cost}")
        if is_signed_by(child, one):
            return one
    issuer = issuer_of(child)
    if child.subject != child.issuer and named and all(one in path for one in named):
        return Finding(
            child,
            f"was issued by {issuer}, which it issued itself: the chain is a loop and ends at no "
            "trusted certificate",
            Alert.UNKNOWN_CA,
        )
    named = [one for one in named if one not in path]
    for one in named:
        if one.subject.public_bytes() != child.issuer.public_bytes():
            return _unsupported(
                child,
                f"writes the name of its issuer {issuer} in other string types than the issuer's "
                "own certificate does, which is not supported",
            )
    if named and not any(_names_key_of(child, one) for one in named):
        return Finding(
            child,
            f"was issued by {issuer}, and the {issuer} known here has the same name and another "
            "key. Was the authority created again?",
            Alert.UNKNOWN_CA,
        )
    if named:
        return Finding(child, f"has a signature that is not {issuer}'s")
    if child.subject != child.issuer:
        return Finding(
            child,
            f"was issued by {issuer}, which is not {roots} and was not sent by the peer",
            Alert.UNKNOWN_CA,
        )
    if child is path[0]:
        return Finding(
            child,
            f"is self-signed and is not {roots}; to trust just its key, pin {spki_sha256(child)}",
            Alert.UNKNOWN_CA,
        )
    return Finding(child, f"ends the chain and is not {roots}", Alert.UNKNOWN_CA)


def _signature(child: x509.Certificate) -> Finding | None:
    """A flaw that prevents verification of its signature, whatever the issuer."""
    digest = child.signature_hash_algorithm
    if digest is not None and digest.name in _BROKEN_HASHES:
        return _unsupported(child, f"is signed with {digest.name.upper()}, which is broken")
    return None


def _signature_form(certificate: x509.Certificate) -> Finding | None:
    """A signature algorithm that the verifier does not support."""
    parameters = certificate.signature_algorithm_parameters
    if isinstance(parameters, padding.PSS):
        return _unsupported(
            certificate,
            "is signed with RSASSA-PSS in a form that is not supported: the salt must be as long "
            "as the digest",
        )
    if isinstance(parameters, padding.PKCS1v15) and _PKCS1_WITHOUT_NULL.search(
        certificate.tbs_certificate_bytes
    ):
        return _unsupported(
            certificate,
            "names its RSA signature algorithm without the NULL that RFC 4055 section 5 requires",
        )
    return None


_PKCS1_WITHOUT_NULL: Final = re.compile(
    rb"\x30\x0b\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01[\x0b-\x0d]"
)
"""An AlgorithmIdentifier of one OID alone."""


def _form(certificate: x509.Certificate) -> Finding | None:
    """A field for which the verifier refuses any certificate (RFC 5280 section 4.1)."""
    if certificate.version is not x509.Version.v3:
        return _unsupported(
            certificate, "is of X.509 version 1, which has no extensions; it needs version 3"
        )
    if certificate.serial_number < 0:
        return Finding(certificate, "has a negative serial number (RFC 5280 section 4.1.2.2)")
    if certificate.serial_number.bit_length() > 160:
        return Finding(
            certificate, "has a serial number of more than 20 octets (RFC 5280 section 4.1.2.2)"
        )
    if not certificate.issuer.rdns:
        return Finding(certificate, "has no issuer name (RFC 5280 section 4.1.2.4)")
    for moment in (certificate.not_valid_before_utc, certificate.not_valid_after_utc):
        if moment.year < 2050 and f"{moment:%Y%m%d%H%M%SZ}".encode() in _head(certificate):
            return Finding(
                certificate,
                "has a date before 2050 as GeneralizedTime, where RFC 5280 section 4.1.2.5 "
                "requires UTCTime",
            )
    return None


def _head(certificate: x509.Certificate) -> bytes:
    """The part of the encoding that has the dates."""
    data = certificate.tbs_certificate_bytes
    return data[: data.index(certificate.subject.public_bytes())]


def _names_key_of(child: x509.Certificate, issuer: x509.Certificate) -> bool:
    """Whether the child's authority key identifier matches the issuer; true if either is absent."""
    wanted = _extension(child, x509.AuthorityKeyIdentifier)
    own = _extension(issuer, x509.SubjectKeyIdentifier)
    return wanted is None or own is None or wanted.key_identifier in (None, own.digest)


def _dates(certificate: x509.Certificate, at: datetime) -> Finding | None:
    # RFC 9846 section 6.2: certificate_expired is "has expired or is not currently valid".
    flaw = not_valid_today(certificate, at)
    return None if flaw is None else Finding(certificate, flaw, Alert.CERTIFICATE_EXPIRED)


def _authority(issuer: x509.Certificate, below: Sequence[x509.Certificate]) -> Finding | None:
    """The reason why a certificate may not issue others (RFC 5280 section 6.1.4 (k) to (n))."""
    signed = f"and yet it signed {subject_of(below[-1])}"
    constraints = _extension(issuer, x509.BasicConstraints)
    if constraints is None:
        return Finding(issuer, f"has no basicConstraints, so it is not a CA, {signed}")
    if not constraints.ca:
        return Finding(issuer, f"is not a CA (basicConstraints CA:FALSE), {signed}")
    usage = _extension(issuer, x509.KeyUsage)
    if usage is not None and not usage.key_cert_sign:
        return Finding(issuer, f"may not sign certificates (keyUsage lacks keyCertSign), {signed}")
    # The verifier counts self-issued certificates, which section 6.1.4 (l) would not; the leaf does
    # not count.
    between = len(below) - 1
    if constraints.path_length is not None and between > constraints.path_length:
        return Finding(
            issuer,
            f"allows {constraints.path_length} authorities below itself (pathLenConstraint), and "
            f"there are {between}",
        )
    key = key_of(issuer)
    weakness = f"has {weak}" if (weak := key_weakness(key)) is not None else None
    if isinstance(key, ed25519.Ed25519PublicKey | ed448.Ed448PublicKey):
        weakness = (
            "signs with EdDSA, which the verifier accepts for end entities only; an authority "
            "needs an ECDSA, RSA or ML-DSA key"
        )
    if weakness is None:
        return None
    return _unsupported(issuer, weakness)


def _usable_by_role(issuer: x509.Certificate, *, server: bool) -> Finding | None:
    """The extendedKeyUsage of an authority narrows what may be below it."""
    side, wanted = _role(server)
    usages = _extension(issuer, x509.ExtendedKeyUsage)
    if usages is None or wanted in usages or ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE in usages:
        return None
    return _unsupported(
        issuer, f"may not issue certificates for {side}s (extendedKeyUsage lacks {side}Auth)"
    )


def _role(server: bool) -> tuple[str, x509.ObjectIdentifier]:
    if server:
        return "server", ExtendedKeyUsageOID.SERVER_AUTH
    return "client", ExtendedKeyUsageOID.CLIENT_AUTH


_PROCESSED: Final = frozenset(
    (
        ExtensionOID.AUTHORITY_KEY_IDENTIFIER,
        ExtensionOID.BASIC_CONSTRAINTS,
        ExtensionOID.CERTIFICATE_POLICIES,
        ExtensionOID.CRL_DISTRIBUTION_POINTS,
        ExtensionOID.EXTENDED_KEY_USAGE,
        ExtensionOID.INHIBIT_ANY_POLICY,
        ExtensionOID.KEY_USAGE,
        ExtensionOID.NAME_CONSTRAINTS,
        ExtensionOID.POLICY_CONSTRAINTS,
        ExtensionOID.POLICY_MAPPINGS,
        ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
        ExtensionOID.SUBJECT_KEY_IDENTIFIER,
    )
)
"""Extensions that may be critical."""


def _extensions(certificate: x509.Certificate) -> Finding | None:
    policies = _extension(certificate, x509.PolicyConstraints)
    if policies is not None and policies.require_explicit_policy is not None:
        return _unsupported(
            certificate,
            "requires certificate policies to be processed (policyConstraints, "
            "requireExplicitPolicy), which is not supported",
        )
    if _extension(certificate, x509.PrecertPoison) is not None:
        return _unsupported(
            certificate,
            "is a precertificate, made for a Certificate Transparency log (RFC 6962); its critical "
            "extension forbids its use",
        )
    for extension in certificate.extensions:
        if extension.critical and extension.oid not in _PROCESSED:
            what = extension_name(extension.oid.dotted_string)
            return _unsupported(
                certificate, f"has a critical extension that is not supported: {what}"
            )
    return None


def _leaf(leaf: x509.Certificate, *, server: bool) -> Finding | None:
    """Why a certificate cannot be an end-entity certificate in this role."""
    side, wanted = _role(server)
    usages = _extension(leaf, x509.ExtendedKeyUsage)
    if usages is not None and wanted not in usages:
        return _unsupported(leaf, f"is not for a {side} (extendedKeyUsage lacks {side}Auth)")
    return None


def _constraints(below: Sequence[x509.Certificate], refusal: str) -> Finding | None:
    """The violation that the verifier found in nameConstraints of the last of these certificates,
    which it applies to all of them."""
    leaf, certificate = below[0], below[-1]
    constraints = _extension(certificate, x509.NameConstraints)
    if constraints is None:
        return None
    if bounded(certificate, constraints):
        return _unsupported(
            certificate,
            "has nameConstraints with a minimum or a maximum, which RFC 5280 section 4.2.1.10 does "
            "not use and which is not supported",
        )
    if "constraint" not in refusal:
        return None
    trees = [*(constraints.permitted_subtrees or ()), *(constraints.excluded_subtrees or ())]
    for tree in trees:
        if isinstance(tree, x509.DNSName) and (tree.value.startswith(".") or not tree.value):
            form = "a leading dot" if tree.value else "an empty DNS name"
            return _unsupported(
                certificate,
                f"has nameConstraints with {form}, which RFC 5280 section 4.2.1.10 does not define "
                "for DNS names and which is not supported",
            )
        if isinstance(tree, x509.DNSName) and not _DNS_CONSTRAINT.fullmatch(tree.value):
            return _unsupported(
                certificate,
                f"has nameConstraints with {printable(tree.value, most=255)}, which is not a DNS "
                "name",
            )
    if "unsupported" in refusal:
        kinds = sorted(
            {
                _CONSTRAINED[type(tree)]
                for tree in trees
                if not isinstance(tree, x509.DNSName | x509.IPAddress | x509.RFC822Name)
            }
        )
        return _unsupported(
            certificate,
            f"has nameConstraints on {' and '.join(kinds) or 'names'} that apply to "
            f"{subject_of(leaf)}, which is not supported",
        )
    bound = next((one for one in below if _is_outside(one, constraints)), leaf)
    if bound is certificate is not leaf:
        return _unsupported(
            certificate,
            f"is for {_some(names_of(certificate))}, which its own nameConstraints do not allow; "
            "that is not supported in an authority's certificate",
        )
    return Finding(
        bound,
        f"is for {_some(names_of(bound))}, which nameConstraints in the certificate "
        f"{subject_of(certificate)} do not allow",
    )


def _is_outside(certificate: x509.Certificate, constraints: x509.NameConstraints) -> bool:
    """Whether a DNS name or an IP address in a certificate is not allowed by constraints."""
    names = _extension(certificate, x509.SubjectAlternativeName)
    for name in names or ():
        permitted, excluded = (
            [one.value for one in trees or () if type(one) is type(name)]
            for trees in (constraints.permitted_subtrees, constraints.excluded_subtrees)
        )
        if not isinstance(name, x509.DNSName | x509.IPAddress):
            continue
        within = partial(_is_within, name.value)
        if any(map(within, excluded)) or (permitted and not any(map(within, permitted))):
            return True
    return False


def _is_within(value: Any, tree: Any) -> bool:
    if isinstance(value, str):
        return f".{value.lower().removeprefix('*.')}".endswith(f".{tree.lower()}")
    return value in tree


_DNS_CONSTRAINT: Final = re.compile(r"[A-Za-z0-9.-]+")

_CONSTRAINED: Final[dict[type[x509.GeneralName], str]] = {
    x509.DirectoryName: "directory names",
    x509.UniformResourceIdentifier: "URIs",
    x509.OtherName: "other names",
    x509.RegisteredID: "registered IDs",
}


def _name(leaf: x509.Certificate, name: PeerName) -> Finding | None:
    if isinstance(name, DnsName) and "_" in name.a_label:
        return Finding(
            leaf,
            f"cannot be checked for {name}: a name with an underscore is not a host name (RFC 5280 "
            "section 4.2.1.6). Check it for another name, or pin its key",
        )
    names, alternatives = names_of(leaf), _extension(leaf, x509.SubjectAlternativeName)
    if not names or alternatives is None:
        return Finding(
            leaf,
            f"has no subjectAltName, so it is not for {name}; the common name is not used (RFC "
            "9525 section 2)",
        )
    if isinstance(name, DnsName):
        covered = any(covers(one, name) for one in names)
    else:
        covered = name.address in alternatives.get_values_for_type(x509.IPAddress)
        if not covered and str(name) in names:
            return Finding(leaf, f"has {name} as a DNS name, not as an IP address")
    if not covered:
        return Finding(leaf, f"is for {_some(names)}, not for {name}")
    return None


def _some(names: Sequence[str]) -> str:
    """The names of a certificate; of many, the first: a certificate may have thousands."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


_SHOWN: Final = 16
"""Names in a message."""


def _extension(certificate: x509.Certificate, kind: type[E]) -> E | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None
