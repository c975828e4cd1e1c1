"""``hybridkex dev-ca``: a certificate authority and a certificate, for tests and first steps."""

import shlex
from pathlib import Path

from hybridkex.auth import spki_sha256
from hybridkex.auth.dev_ca import DevCa, write_identity
from hybridkex.cli.dev_ca import DevCaOptions


def run(options: DevCaOptions) -> int:
    """Write ca.pem, cert.pem and key.pem."""
    names = list(options.name or ["localhost"])
    if "localhost" in names:
        names += [address for address in ("127.0.0.1", "::1") if address not in names]
    authority = DevCa.create(algorithm=options.alg)
    identity = authority.issue(*names, algorithm=options.alg)
    ca, cert, key = write_identity(options.directory, authority, identity, overwrite=options.force)
    pin = spki_sha256(identity.leaf)
    print(f"{ca}: a new authority ({authority.algorithm}); its private key is not kept")
    print(f"{cert}: for {', '.join(identity.names)}, until {identity.leaf.not_valid_after_utc:%F}")
    print(f"{key}: its private key ({options.alg}), readable only by you")
    print(f"pin of this key: {pin}")
    host = next((name for name in names if not name.startswith("*")), "localhost")
    print("\nTry, in two terminals:")
    print(f"  hybridkex listen 4433 --cert {_shell(cert)} --key {_shell(key)}")
    print(f"  hybridkex connect {_shell(host)} 4433 --ca {_shell(ca)}")
    return 0


def _shell(text: str | Path) -> str:
    return shlex.quote(str(text))
