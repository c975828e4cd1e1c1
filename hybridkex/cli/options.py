"""The options that the commands with a channel share.

Programs outside this package can use them, too: ``examples/chat`` does.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from hybridkex.cli.arguments import from_namespace
from hybridkex.cli.choices import GROUPS, SUITES
from hybridkex.cli.qkd_options import QkdOptions, add_qkd_options
from hybridkex.cli.values import comma_list, file_path, renewal

__all__ = ["ChannelOptions", "add_channel_options", "channel_options"]


@dataclass(frozen=True, kw_only=True)
class ChannelOptions:
    """Everything but the address, parsed."""

    ca: Path | None
    pin: list[str]
    known_peers: Path | None
    insecure: bool
    cert: Path | None
    key: Path | None
    psk: str | None
    psk_hash: str | None
    psk_import: str | None
    groups: list[str] | None
    suites: list[str] | None
    alpn: list[str] | None
    json: bool
    keylog: Path | None
    bind: str | None
    fresh_keys: float | None
    fresh_keys_policy: str | None
    qkd: QkdOptions


def add_channel_options(parser: argparse.ArgumentParser, *, alpn: str | None = None) -> None:
    """Everything but the address.

    Args:
        alpn: the application protocol of a command that speaks one; without it the user names some.
    """
    trust = parser.add_argument_group("whom to trust")
    trust.add_argument(
        "--ca",
        type=file_path,
        metavar="FILE",
        help="certificate authorities for the peer (PEM; a client's default: the system's)",
    )
    trust.add_argument(
        "--pin",
        metavar="HEX",
        action="append",
        default=[],
        help="SHA-256 of the peer's public key (SPKI); with --ca, both must match",
    )
    trust.add_argument(
        "--known-peers",
        type=file_path,
        metavar="FILE",
        help="raw public keys by name, like known_hosts; a new server is trusted and remembered",
    )
    trust.add_argument(
        "--insecure", action="store_true", help="do not check the peer's certificate at all"
    )
    own = parser.add_argument_group("who we are")
    own.add_argument(
        "--cert", type=file_path, metavar="FILE", help="our certificate chain (PEM, leaf first)"
    )
    own.add_argument(
        "--key",
        type=file_path,
        metavar="FILE",
        help="our private key (PEM); without --cert, used as a raw public key",
    )
    psk = parser.add_argument_group("pre-shared key")
    psk.add_argument(
        "--psk",
        metavar="IDENTITY:HEX",
        help="an external PSK; combined with certificates by RFC 9973 if there are any. Other "
        "users of this machine can see it in the process list",
    )
    psk.add_argument(
        "--psk-hash",
        choices=("sha256", "sha384"),
        help="the PSK's hash, which limits the cipher suites (default: sha256)",
    )
    psk.add_argument(
        "--psk-import",
        metavar="HEX",
        help="import the PSK (RFC 9258) with this context, in hexadecimal; the same at both ends",
    )
    tls = parser.add_argument_group("what to offer or accept")
    tls.add_argument(
        "--groups",
        type=comma_list,
        metavar="LIST",
        help=f"key exchange groups in order of preference, from {', '.join(GROUPS)} "
        "(default: the post-quantum ones)",
    )
    tls.add_argument(
        "--suites",
        type=comma_list,
        metavar="LIST",
        help=f"cipher suites in order of preference, from {', '.join(SUITES)} (default: all)",
    )
    if alpn is not None:
        parser.set_defaults(alpn=[alpn])
    else:
        tls.add_argument(
            "--alpn",
            type=comma_list,
            metavar="LIST",
            help="application protocols in order of preference",
        )
    fresh = parser.add_argument_group(
        "fresh keys (experimental)",
        "A live session runs the key exchange again, with a new QKD key where there is a source. "
        "Both ends need the option; it excludes session tickets. See docs/fresh-keys.md.",
    )
    fresh.add_argument(
        "--fresh-keys",
        type=renewal,
        metavar="TIME",
        help="renew the keys that often (60s, 5m, 2h), or when the peer does (peer)",
    )
    fresh.add_argument(
        "--fresh-keys-policy",
        choices=("require", "prefer"),
        help="refuse a peer that cannot do this (require, the default), or use what TLS 1.3 has "
        "instead (prefer)",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--json", action="store_true", help="print the session as one JSON line on standard error"
    )
    output.add_argument(
        "--keylog",
        type=file_path,
        metavar="FILE",
        help="append the session's secrets to FILE, for Wireshark; anyone who has FILE can decrypt "
        "the traffic",
    )
    add_qkd_options(parser)
    parser.add_argument("--bind", metavar="ADDR", help="the local IP address (default: any)")


def channel_options(namespace: argparse.Namespace) -> ChannelOptions:
    """The parsed options of :func:`add_channel_options`."""
    return from_namespace(ChannelOptions, namespace)
