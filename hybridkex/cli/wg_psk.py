"""``hybridkex wg-psk``: rotates the pre-shared key of a WireGuard tunnel."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from hybridkex.cli.arguments import Action, Command, Exclusive, Group, nested, option
from hybridkex.cli.choices import REKEY_AFTER
from hybridkex.cli.logs import log_level
from hybridkex.cli.qkd_options import EXCHANGE_KEYS, ExchangeQkdOptions
from hybridkex.tls.policy import Requirement

DEFAULT_PORT: Final = 4436

_ROLE: Final = Exclusive(required=True)
_TUNNEL: Final = Group("the tunnel")
_ENDS: Final = Group("the two ends")
_WHEN: Final = Group("when")


@dataclass(frozen=True, kw_only=True)
class WgPskOptions:
    connect: str | None = option(
        f"the address where the peer listens (default port: {DEFAULT_PORT})",
        metavar="HOST[:PORT]",
        group=_ROLE,
    )
    listen: str | None = option(
        "wait for the other end; port 0 picks a free one", metavar="[ADDR:]PORT", group=_ROLE
    )
    interface: str = option(
        "the WireGuard interface, for example wg0", metavar="NAME", group=_TUNNEL
    )
    peer_key: str = option("the peer's WireGuard public key", metavar="BASE64", group=_TUNNEL)
    wg: str = option(
        "the wg command, for example 'sudo wg' (default: %(default)s)",
        metavar="COMMAND",
        default="wg",
        group=_TUNNEL,
    )
    local: str = option("our name", metavar="NAME", group=_ENDS)
    peer: str = option("the other end's --local", metavar="NAME", group=_ENDS)
    key: Path | None = option("our private key (PEM)", group=_ENDS)
    pin: list[str] = option(
        "SHA-256 of the peer's public key (SPKI); requires --key", metavar="HEX", group=_ENDS
    )
    psk_file: Path | None = option(
        "instead of --key and --pin: a file with 32 bytes in hex that both ends share (mode 600)",
        group=_ENDS,
    )
    interval: float = option(
        f"time between rotations (default: {REKEY_AFTER:g}, as often as WireGuard rekeys); the "
        "connecting side decides",
        metavar="SECONDS",
        default=REKEY_AFTER,
        group=_WHEN,
    )
    max_age: float | None = option(
        "age at which a key is no longer fresh (default: three intervals)",
        metavar="SECONDS",
        group=_WHEN,
    )
    fresh_psk: str = option(
        "without a fresh key, stop the tunnel with a random one (require, the default), or log a "
        "warning and continue (prefer)",
        choices=[Requirement.REQUIRE.value, Requirement.PREFER.value],
        default=Requirement.REQUIRE.value,
        group=_WHEN,
    )
    initial_psk: Literal["random", "keep"] | None = option(
        "before the first rotation: block the tunnel with a random key (default with --fresh-psk "
        "require), or keep the key that is installed, if any (default with prefer and with --once)",
        choices=["random", "keep"],
        group=_WHEN,
    )
    once: bool = option("rotate once, then exit", group=_WHEN)
    port_file: Path | None = option("write the listening port to FILE", group=_WHEN)
    json: bool = option("one JSON line on standard output for each rotation", group=_WHEN)
    qkd: ExchangeQkdOptions = nested(EXCHANGE_KEYS)
    log_level: str = log_level()


COMMAND: Final = Command(
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
    action=Action("wg_psk", WgPskOptions),
    preset={"requirement": None},
)
