"""``hybridkex dev-ca``: a small authority and a certificate, for tests and first steps."""

import argparse
from pathlib import Path

from hybridkex.auth.dev_ca import ALGORITHMS, DevCa, write_identity

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("directory", metavar="DIR", type=Path)
    parser.add_argument(
        "--name",
        action="append",
        metavar="NAME",
        help="a DNS name or an IP address for the certificate; may be repeated "
        "(default: localhost, which brings 127.0.0.1 and ::1)",
    )
    parser.add_argument("--alg", choices=ALGORITHMS, default="ecdsa", help="the kind of keys")
    parser.add_argument("--force", action="store_true", help="replace files that are there")


def run(args: argparse.Namespace) -> int:
    """Write ca.pem, cert.pem and key.pem."""
    names = list(args.name or ["localhost"])
    if "localhost" in names:
        names += [address for address in ("127.0.0.1", "::1") if address not in names]
    authority = DevCa.create(algorithm=args.alg)
    identity = authority.issue(*names, algorithm=args.alg)
    for path in write_identity(args.directory, authority, identity, overwrite=args.force):
        print(path)
    folder = args.directory
    print("\nnow try, in two terminals:")
    print(f"  hybridkex listen 4433 --cert {folder}/cert.pem --key {folder}/key.pem")
    print(f"  hybridkex connect {names[0]} 4433 --ca {folder}/ca.pem")
    return 0
