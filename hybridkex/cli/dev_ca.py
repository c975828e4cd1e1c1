"""``hybridkex dev-ca``: a certificate authority and a certificate, for tests and first steps."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hybridkex.cli.arguments import Action, Command, argument, option
from hybridkex.cli.choices import DEV_CA_ALGORITHMS
from hybridkex.cli.values import folder_path


@dataclass(frozen=True, kw_only=True)
class DevCaOptions:
    directory: Path = argument(
        "the folder to write to; created if missing", type=folder_path, metavar="DIR"
    )
    name: list[str] | None = option(
        "a host name or an IP address for the certificate; may be repeated (default: localhost, "
        "with 127.0.0.1 and ::1)",
        metavar="NAME",
    )
    alg: str = option(
        f"the kind of keys: {', '.join(DEV_CA_ALGORITHMS)} (default: ecdsa); with ed25519 the "
        "authority's is ecdsa; with rsa and rsa-pss the authority signs by PKCS #1 v1.5 and by PSS",
        choices=DEV_CA_ALGORITHMS,
        metavar="ALG",
        default="ecdsa",
    )
    force: bool = option("replace existing files")


COMMAND: Final = Command(
    "Write ca.pem, cert.pem and key.pem: a certificate authority, a certificate that it "
    "issued, and the certificate's private key, for tests and first steps. The authority's "
    "private key is not kept.",
    examples=[
        "dev-ca keys",
        "dev-ca keys --name db.example.org --name 192.0.2.1 --alg mldsa65",
    ],
    notes="See docs/certificates.md.",
    action=Action("dev_ca", DevCaOptions),
)
