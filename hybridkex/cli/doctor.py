"""``hybridkex doctor``: what works, what is missing, and how to get it."""

import argparse
from dataclasses import dataclass

from hybridkex.cli.arguments import Action
from hybridkex.cli.help_text import describe
from hybridkex.cli.qkd_options import KmeOptions, add_kme_options

__all__ = ["DoctorOptions", "configure"]


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """The options, parsed."""

    json: bool
    access: KmeOptions
    peer_sae: str | None


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    describe(
        parser,
        "Check this installation: published test vectors, every group and signature scheme, a "
        "handshake with all three legs, the trust store, liboqs, the optional packages; and a KME, "
        "if --kme names one. No key is drawn from the KME.",
        examples=[
            "doctor",
            "doctor --json",
            "doctor --kme https://localhost:8443 --kme-ca ca.pem --kme-cert a.pem --kme-key a.key",
        ],
        status="0 if everything required works, 1 otherwise",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    group = parser.add_argument_group("a KME to query for its status")
    add_kme_options(group, required=False)
    group.add_argument("--peer-sae", metavar="ID", help="the peer's SAE ID to query the status for")
    parser.set_defaults(action=Action("doctor", DoctorOptions))
