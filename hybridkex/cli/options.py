"""The options that the commands with a channel share.

Programs outside this package can use them, too: ``examples/chat`` does.
"""

from pathlib import Path
from typing import Any, Final

from hybridkex.cli.arguments import Group, add_options, from_namespace, nested, option
from hybridkex.cli.choices import GROUPS, SUITES
from hybridkex.cli.qkd_options import CHANNEL_KEYS, QkdOptions
from hybridkex.cli.values import comma_list, renewal
from hybridkex.values import value

__all__ = ["ChannelOptions", "add_options", "from_namespace", "port_file"]

_TRUST: Final = Group("trust")
_OWN: Final = Group("our identity")
_PSK: Final = Group("pre-shared key")
_TLS: Final = Group("parameters to offer or accept")
_FRESH: Final = Group(
    "fresh keys (experimental)",
    "A live session runs the key exchange again, with a new QKD key where there is a source. "
    "Both ends need the option; it excludes session tickets. See docs/fresh-keys.md.",
)
_OUTPUT: Final = Group("output")


@value(kw_only=True)
class ChannelOptions:
    """Everything but the address. A command that speaks one protocol sets ``alpn`` itself."""

    ca: Path | None = option(
        "certificate authorities for the peer (PEM; a client's default: the system's)", group=_TRUST
    )
    pin: list[str] = option(
        "SHA-256 of the peer's public key (SPKI); with --ca, both must match",
        metavar="HEX",
        group=_TRUST,
    )
    known_peers: Path | None = option(
        "raw public keys by name, like known_hosts; a new server is trusted and remembered",
        group=_TRUST,
    )
    insecure: bool = option("do not check the peer's certificate at all", group=_TRUST)
    cert: Path | None = option("our certificate chain (PEM, leaf first)", group=_OWN)
    key: Path | None = option(
        "our private key (PEM); without --cert, used as a raw public key", group=_OWN
    )
    psk: str | None = option(
        "an external PSK; combined with certificates by RFC 9973 if there are any. Other users of "
        "this machine can see it in the process list",
        metavar="IDENTITY:HEX",
        group=_PSK,
    )
    psk_hash: str | None = option(
        "the PSK's hash, which limits the cipher suites (default: sha256)",
        choices=("sha256", "sha384"),
        group=_PSK,
    )
    psk_import: str | None = option(
        "import the PSK (RFC 9258) with this context, in hexadecimal; the same at both ends",
        metavar="HEX",
        group=_PSK,
    )
    groups: list[str] | None = option(
        f"key exchange groups in order of preference, from {', '.join(GROUPS)} "
        "(default: the post-quantum ones)",
        type=comma_list,
        metavar="LIST",
        group=_TLS,
    )
    suites: list[str] | None = option(
        f"cipher suites in order of preference, from {', '.join(SUITES)} (default: all)",
        type=comma_list,
        metavar="LIST",
        group=_TLS,
    )
    alpn: list[str] | None = option(
        "application protocols in order of preference", type=comma_list, metavar="LIST", group=_TLS
    )
    fresh_keys: float | None = option(
        "renew the keys at this interval (60s, 5m, 2h), or when the peer does (peer)",
        type=renewal,
        metavar="TIME",
        group=_FRESH,
    )
    fresh_keys_policy: str | None = option(
        "refuse a peer without support for this (require, the default), or fall back to KeyUpdate "
        "of TLS 1.3 (prefer)",
        choices=("require", "prefer"),
        group=_FRESH,
    )
    one_time_pad: bool = option(
        "protect all data by a one-time pad of QKD keys, for channels that carry little data; see "
        "docs/one-time-pad.md",
        group=_FRESH,
    )
    json: bool = option("print the session as one JSON line on standard error", group=_OUTPUT)
    keylog: Path | None = option(
        "append the session's secrets to FILE, for Wireshark; anyone who has FILE can decrypt the "
        "traffic",
        group=_OUTPUT,
    )
    qkd: QkdOptions = nested(CHANNEL_KEYS)
    bind: str | None = option("the local IP address (default: any)", metavar="ADDR")

    @property
    def names_trust(self) -> bool:
        """Whether they say whom to trust."""
        return bool(self.ca or self.pin or self.known_peers or self.insecure)


def port_file() -> Any:
    return option("write the port number to FILE once it is open")
