"""``hybridkex dev-ca``: a small authority and a certificate, for tests and first steps."""

import argparse
import shlex
from pathlib import Path

from hybridkex.auth import spki_sha256
from hybridkex.auth.dev_ca import ALGORITHMS, DevCa, write_identity
from hybridkex.cli.manual import describe
from hybridkex.cli.values import folder_path

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    describe(
        parser,
        "Make ca.pem, cert.pem and key.pem: a small certificate authority and a certificate that "
        "it issued, for tests and first steps. The authority's own key is thrown away.",
        examples=[
            "dev-ca keys",
            "dev-ca keys --name db.example.org --name 192.0.2.1 --alg mldsa65",
        ],
        notes="See docs/certificates.md.",
    )
    parser.add_argument(
        "directory", type=folder_path, metavar="DIR", help="made if it is not there"
    )
    parser.add_argument(
        "--name",
        action="append",
        metavar="NAME",
        help="a host name or an IP address for the certificate; may be repeated "
        "(default: localhost, which brings 127.0.0.1 and ::1)",
    )
    parser.add_argument(
        "--alg",
        choices=ALGORITHMS,
        metavar="ALG",
        default="ecdsa",
        help=f"the kind of keys: {', '.join(ALGORITHMS)} (default: ecdsa); with "
        "ed25519 the authority's is ecdsa; with rsa "
        "and rsa-pss the authority signs by PKCS #1 v1.5 and by PSS",
    )
    parser.add_argument("--force", action="store_true", help="replace files that are there")


def run(args: argparse.Namespace) -> int:
    """Write ca.pem, cert.pem and key.pem."""
    names = list(args.name or ["localhost"])
    if "localhost" in names:
        names += [address for address in ("127.0.0.1", "::1") if address not in names]
    authority = DevCa.create(algorithm=args.alg)
    identity = authority.issue(*names, algorithm=args.alg)
    ca, cert, key = write_identity(args.directory, authority, identity, overwrite=args.force)
    pin = spki_sha256(identity.leaf)
    print(f"{ca}: a new authority ({authority.algorithm}); its key is forgotten after this")
    print(f"{cert}: for {', '.join(identity.names)}, until {identity.leaf.not_valid_after_utc:%F}")
    print(f"{key}: its key ({args.alg}), readable by you alone")
    print(f"pin of this key: {pin}")
    host = next((name for name in names if not name.startswith("*")), "localhost")
    print("\nnow try, in two terminals:")
    print(f"  hybridkex listen 4433 --cert {_shell(cert)} --key {_shell(key)}")
    print(f"  hybridkex connect {_shell(host)} 4433 --ca {_shell(ca)}")
    return 0


def _shell(text: str | Path) -> str:
    return shlex.quote(str(text))
