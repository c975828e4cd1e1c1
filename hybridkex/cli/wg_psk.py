"""``hybridkex wg-psk``: rotates the pre-shared key of a WireGuard tunnel."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from hybridkex.cli.arguments import Action
from hybridkex.cli.choices import REKEY_AFTER
from hybridkex.cli.help_text import describe
from hybridkex.cli.logs import add_log_options
from hybridkex.cli.qkd_options import QkdOptions, add_exchange_qkd_options
from hybridkex.cli.values import file_path, number
from hybridkex.tls.policy import Requirement

__all__ = ["DEFAULT_PORT", "WgPskOptions", "configure"]


@dataclass(frozen=True, kw_only=True)
class WgPskOptions:
    """The options, parsed."""

    connect: str | None
    listen: str | None
    interface: str
    peer_key: str
    wg: str
    local: str
    peer: str
    key: Path | None
    pin: list[str]
    psk_file: Path | None
    interval: float
    max_age: float | None
    fresh_psk: str
    initial_psk: Literal["random", "keep"] | None
    once: bool
    port_file: Path | None
    json: bool
    log_level: str
    qkd: QkdOptions


DEFAULT_PORT: Final = 4436


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    describe(
        parser,
        "Agree on a fresh pre-shared key with the other end of a WireGuard tunnel, and install it "
        "on both sides with 'wg set'. One side listens; the other connects every --interval "
        "seconds. The tunnel carries traffic only under a fresh key: a random key blocks it until "
        "the first rotation, and again once the agreed key is older than --max-age. A failed "
        "rotation is logged with its reason and the key in force, and is retried.",
        examples=[
            "wg-psk --listen 4436 --interface wg0 --peer-key KEY --local b --peer a \\\n"
            "      --key b.pem --pin PIN_OF_A",
            "wg-psk --connect b.example.org --interface wg0 --peer-key KEY --local a --peer b \\\n"
            "      --key a.pem --pin PIN_OF_B --key-pool a.pool",
        ],
        status="0 after SIGTERM or a successful --once, 1 if the rotation of --once failed or the "
        "options are invalid",
        notes="See docs/combiner.md.",
    )
    role = parser.add_mutually_exclusive_group(required=True)
    role.add_argument(
        "--connect",
        metavar="HOST[:PORT]",
        help=f"the address where the peer listens (default port: {DEFAULT_PORT})",
    )
    role.add_argument(
        "--listen", metavar="[ADDR:]PORT", help="wait for the other end; port 0 picks a free one"
    )
    tunnel = parser.add_argument_group("the tunnel")
    tunnel.add_argument(
        "--interface",
        required=True,
        metavar="NAME",
        help="the WireGuard interface, for example wg0",
    )
    tunnel.add_argument(
        "--peer-key", required=True, metavar="BASE64", help="the peer's WireGuard public key"
    )
    tunnel.add_argument(
        "--wg",
        default="wg",
        metavar="COMMAND",
        help="the wg command, for example 'sudo wg' (default: %(default)s)",
    )
    names = parser.add_argument_group("the two ends")
    names.add_argument("--local", required=True, metavar="NAME", help="our name")
    names.add_argument("--peer", required=True, metavar="NAME", help="the other end's --local")
    names.add_argument("--key", type=file_path, metavar="FILE", help="our private key (PEM)")
    names.add_argument(
        "--pin",
        action="append",
        default=[],
        metavar="HEX",
        help="SHA-256 of the peer's public key (SPKI); requires --key",
    )
    names.add_argument(
        "--psk-file",
        type=file_path,
        metavar="FILE",
        help="instead of --key and --pin: a file with 32 bytes in hex that both ends share "
        "(mode 600)",
    )
    when = parser.add_argument_group("when")
    when.add_argument(
        "--interval",
        type=number,
        default=REKEY_AFTER,
        metavar="SECONDS",
        help=f"time between rotations (default: {REKEY_AFTER:g}, as often as WireGuard rekeys); "
        "the connecting side decides",
    )
    when.add_argument(
        "--max-age",
        type=number,
        metavar="SECONDS",
        help="age at which a key is no longer fresh (default: three intervals)",
    )
    when.add_argument(
        "--fresh-psk",
        choices=[Requirement.REQUIRE.value, Requirement.PREFER.value],
        default=Requirement.REQUIRE.value,
        help="without a fresh key, stop the tunnel with a random one (require, the default), or "
        "log a warning and go on (prefer)",
    )
    when.add_argument(
        "--initial-psk",
        choices=["random", "keep"],
        help="before the first rotation: block the tunnel with a random key (default with "
        "--fresh-psk require), or keep the key that is installed, if any (default with prefer "
        "and with --once)",
    )
    when.add_argument("--once", action="store_true", help="rotate once, then exit")
    when.add_argument(
        "--port-file",
        type=file_path,
        metavar="FILE",
        help="write the listening port to FILE",
    )
    when.add_argument(
        "--json", action="store_true", help="one JSON line on standard output for each rotation"
    )
    add_exchange_qkd_options(parser)
    add_log_options(parser)
    parser.set_defaults(action=Action("wg_psk", WgPskOptions))
