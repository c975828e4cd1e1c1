"""The name of a peer: a DNS name or an IP address, in the form that certificates use."""

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import idna

from hybridkex.errors import ConfigError
from hybridkex.fields import described

PIN: Final = "sha256:"
"""The prefix of a key's SHA-256 in a list of names."""

# Letters, digits, hyphens (RFC 1123 section 2.1). Names with underscores are not host names, but
# container networks use them; only pins can be verified for them, not certificates.
_LABEL: Final = r"(?!-)[a-z0-9_-]{1,63}(?<!-)"
_LABELS: Final = re.compile(rf"{_LABEL}(\.{_LABEL})*")
_MAX_NAME: Final = 253
_REMEMBERED: Final = 256
"""The number of parsed names in the cache: client and server each parse the name in every
handshake."""


@dataclass(frozen=True)
class DnsName:
    """A host name as A-labels in lower case, without the trailing dot (RFC 6066 section 3)."""

    a_label: str
    """The name, for example ``xn--bcher-kva.example``."""

    def __str__(self) -> str:
        return self.a_label


@dataclass(frozen=True)
class IpAddress:
    """An IPv4 or IPv6 address; it is never sent as a server name (RFC 6066 section 3)."""

    address: ipaddress.IPv4Address | ipaddress.IPv6Address
    """Without a scope."""

    def __str__(self) -> str:
        return str(self.address)


PeerName = DnsName | IpAddress


def parse_peer_name(text: str) -> PeerName:
    """Parse a text as people write a name: ``example.org``, ``bücher.example``, ``127.0.0.1`` or
    ``[::1]``.

    Names beyond ASCII become A-labels by IDNA 2008 with the mapping of UTS #46 (RFC 5891, RFC 9525
    section 6.3). A trailing dot is removed, and so is the scope of an IPv6 address: it names an
    interface of this machine and is never in a certificate.

    Raises:
        ConfigError: it is neither a host name nor an address.
    """
    _check_text(text)
    return _parsed(text)


@lru_cache(maxsize=_REMEMBERED)
def _parsed(text: str) -> PeerName:
    bracketed = text.startswith("[") and text.endswith("]")
    bare = text[1:-1] if bracketed else text
    # Every IPv4 address ends in a digit, so most host names need no attempt.
    if bracketed or ":" in bare or bare[-1:].isdigit():
        try:
            return IpAddress(ipaddress.ip_address(bare.partition("%")[0] if ":" in bare else bare))
        except ValueError:
            if bracketed:
                raise ConfigError(f"{text!r} is not an IPv6 address in brackets") from None
    name = text.removesuffix(".")
    if not name:
        raise ConfigError("a host name must not be empty")
    try:
        label = name.lower() if name.isascii() else idna.encode(name, uts46=True).decode("ascii")
        label = label.removesuffix(".")  # UTS #46 maps other full stops to this one.
    except (idna.IDNAError, UnicodeError) as error:
        raise ConfigError(f"{text!r} is not a host name: {error}") from None
    if len(label) > _MAX_NAME or not _LABELS.fullmatch(label):
        raise ConfigError(f"{text!r} is not a host name")
    if label.rpartition(".")[2].isdigit():
        # Resolvers read "127.1" as an address, so it must not be compared with certificates as a
        # name.
        raise ConfigError(f"{text!r} is neither a host name nor a complete IP address")
    return DnsName(label)


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise ConfigError(f"a name must be a str, not {described(text)}")


_URI: Final = re.compile(r"[a-z][a-z0-9+.-]*:[!-~]+", re.IGNORECASE)
"""A scheme and something after it, without spaces and control characters (RFC 3986)."""


def canonical_peer_name(text: str) -> str:
    """The canonical form of a peer's name, for lists of names.

    Host names and IP addresses become what :func:`parse_peer_name` makes of them; a wildcard
    (``*.example.org``) keeps its asterisk. A URI is unchanged. ``sha256:`` and 64 hexadecimal
    digits stand for a key (see :func:`~hybridkex.auth.spki_sha256`) and become lower case.

    Two names are the same if and only if this function returns the same text for both: DNS names
    contain no colon, URIs and keys contain one and are never IP addresses.

    Raises:
        ConfigError: it is not a name of any of these kinds.
    """
    _check_text(text)
    if text.lower().startswith(PIN):
        digest = text[len(PIN) :].lower()
        if re.fullmatch(r"[0-9a-f]{64}", digest) is None:
            raise ConfigError(f"{text!r} does not have 64 hexadecimal digits after {PIN}")
        return PIN + digest
    if text.startswith("*."):
        name = parse_peer_name(text[2:])
        if isinstance(name, IpAddress):
            raise ConfigError(f"{text!r} has a wildcard before an IP address")
        return f"*.{name}"
    try:
        return str(parse_peer_name(text))
    except ConfigError:
        if _URI.fullmatch(text) is None:
            raise
        return text


def covers(presented: str, name: PeerName) -> bool:
    """Whether a name of a certificate matches ``name`` (RFC 9525 section 6.3).

    A wildcard is the whole leftmost label and matches one label. This function chooses between our
    own certificates and is used for error messages; `cryptography`'s verifier decides about a
    peer's certificate.
    """
    if isinstance(name, IpAddress):
        return presented == str(name)
    presented = presented.lower()
    if presented.startswith("*."):
        return name.a_label.partition(".")[2] == presented[2:]
    return presented == name.a_label


def any_covers(presented: Iterable[str], name: str | PeerName) -> bool:
    """Whether one of our own names matches the name that a client asks for."""
    if isinstance(name, str):
        try:
            name = parse_peer_name(name)
        except ConfigError:
            return False  # A client may send any bytes; no identity matches these.
    return any(covers(one, name) for one in presented)
