"""``hybridkex doctor``: what works, what is missing, and how to get it."""

from dataclasses import dataclass
from typing import Final

from hybridkex.cli.arguments import Action, Command, Group, nested, option
from hybridkex.cli.qkd_options import KmeOptions

_KME: Final = Group("a KME to query for its status")


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    json: bool = option("one JSON object on standard output")
    access: KmeOptions = nested(_KME)
    peer_sae: str | None = option(
        "the peer's SAE ID to query the status for", metavar="ID", group=_KME
    )


COMMAND: Final = Command(
    "Check this installation: published test vectors, every group and signature scheme, a "
    "handshake with ECDH, ML-KEM and a QKD key, the trust store, liboqs, the optional packages; "
    "and a KME, if --kme names one. No key is drawn from the KME.",
    examples=[
        "doctor",
        "doctor --json",
        "doctor --kme https://localhost:8443 --kme-ca ca.pem --kme-cert a.pem --kme-key a.key",
    ],
    status="0 if everything required works, 1 otherwise",
    action=Action("doctor", DoctorOptions),
)
