"""Which of the certificates that a peer sent lead to an authority that we trust.

A verifier that searches for a path among certificates that sign each other may try very many: the
verifier of `cryptography` checks more than a hundred signatures, with keys that the peer chose, for
a forged chain of two kilobytes. So the certificates are first followed from the authorities
downwards: a signature is checked only with the key of an authority or of a certificate that an
authority signed, directly or indirectly.
"""

from collections.abc import Iterable, Sequence
from typing import Final

from cryptography import x509

from hybridkex.auth.certificates import is_signed_by


class Authorities:
    """The authorities of a trust store."""

    def __init__(self, certificates: Iterable[x509.Certificate]) -> None:
        self._by_name: Final = _by_name(certificates)

    def connected(self, sent: Sequence[x509.Certificate]) -> list[x509.Certificate]:
        """The issuers sent by a peer whose signatures lead to an authority."""
        if len(sent) == 1 and not _is_self_issued(sent[0]):
            return list(sent)  # only one possible path
        left = list(dict.fromkeys(sent))
        found: list[x509.Certificate] = []
        issuers = self._by_name
        while issuers:
            reached = [one for one in left if _comes_from(one, issuers)]
            found += reached
            left = [one for one in left if one not in reached]
            issuers = _by_name(reached)
        return found


_Names = dict[bytes, list[x509.Certificate]]


def _by_name(certificates: Iterable[x509.Certificate]) -> _Names:
    found: _Names = {}
    for one in certificates:
        try:
            found.setdefault(one.subject.public_bytes(), []).append(one)
        except ValueError:  # a name that does not parse
            continue
    return found


def _is_self_issued(certificate: x509.Certificate) -> bool:
    try:
        return certificate.subject == certificate.issuer
    except ValueError:
        return False


def _comes_from(certificate: x509.Certificate, issuers: _Names) -> bool:
    try:
        named = issuers.get(certificate.issuer.public_bytes(), ())
    except ValueError:
        return False
    return any(is_signed_by(certificate, issuer) for issuer in named)
