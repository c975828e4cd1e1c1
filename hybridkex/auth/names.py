"""The name of a peer: a DNS name or an IP address, in the form that certificates use."""

import ipaddress
from dataclasses import dataclass

import idna

from hybridkex.errors import ConfigError

__all__ = ["DnsName", "IpAddress", "PeerName", "parse_peer_name"]


@dataclass(frozen=True)
class DnsName:
    """A host name as A-labels in lower case, without the trailing dot (RFC 6066 section 3)."""

    a_label: str

    def __str__(self) -> str:
        return self.a_label


@dataclass(frozen=True)
class IpAddress:
    """An IPv4 or IPv6 address; it is never sent as a server name (RFC 6066 section 3)."""

    address: ipaddress.IPv4Address | ipaddress.IPv6Address

    def __str__(self) -> str:
        return str(self.address)


PeerName = DnsName | IpAddress


def parse_peer_name(text: str) -> PeerName:
    """A name as a person writes it: ``example.org``, ``bücher.example``, ``127.0.0.1``, ``[::1]``.

    Raises:
        ConfigError: it is neither a host name nor an address.
    """
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    # A scope says through which interface; it is not part of what a certificate names.
    try:
        return IpAddress(ipaddress.ip_address(bare.partition("%")[0] if ":" in bare else bare))
    except ValueError:
        pass
    name = text.removesuffix(".")
    if not name:
        raise ConfigError("an empty host name")
    try:
        label = name.lower() if name.isascii() else idna.encode(name, uts46=True).decode("ascii")
    except idna.IDNAError as error:
        raise ConfigError(f"{text!r} is not a host name: {error}") from None
    labels = label.split(".")
    if len(label) > 253 or not all(_is_label(one) for one in labels):
        raise ConfigError(f"{text!r} is not a host name")
    return DnsName(label)


def _is_label(label: str) -> bool:
    # Underscores are no host names by RFC 1123, and are used in them all the same.
    return (
        0 < len(label) <= 63
        and not label.startswith("-")
        and not label.endswith("-")
        and all(char.isalnum() or char in "-_" for char in label)
    )
