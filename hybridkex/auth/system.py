"""The certificate authorities that this machine trusts."""

import os
import ssl
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

from cryptography import x509

from hybridkex.crypto.x509_parsing import UNREADABLE, certificates_from_pem, pem_certificates
from hybridkex.errors import ConfigError
from hybridkex.files import read_file

_FILES: Final = (
    "/etc/ssl/certs/ca-certificates.crt",  # Debian, Alpine, Gentoo, Arch
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",  # Fedora, RHEL
    "/etc/pki/tls/certs/ca-bundle.crt",  # older Fedora, RHEL
    "/etc/ssl/ca-bundle.pem",  # SUSE
    "/etc/ssl/cert.pem",  # macOS, the BSDs
)
_DIRECTORIES: Final = ("/etc/ssl/certs", "/etc/pki/tls/certs")
"""The paths used by distributions; a Python built elsewhere may not know them."""


def system_roots() -> tuple[list[x509.Certificate], str]:
    """The trusted authorities and their source.

    ``SSL_CERT_FILE`` (a PEM file) and ``SSL_CERT_DIR`` (directories of them, separated as in
    ``PATH``) replace the system's, if one of them is set.

    Raises:
        ConfigError: there are none, or a path in the environment variables does not exist.
    """
    file, directories = os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
    if file or directories:
        places = [Path(file)] if file else []
        places += [Path(one) for one in (directories or "").split(os.pathsep) if one]
        for place in places:
            if not place.exists():
                raise ConfigError(
                    f"{place}, named by SSL_CERT_FILE or SSL_CERT_DIR, does not exist"
                )
        roots = _load(places)
        source = " and ".join(map(str, places))
        if not roots:
            raise ConfigError(f"{source} (SSL_CERT_FILE, SSL_CERT_DIR) has no certificate")
        return roots, source
    known = ssl.get_default_verify_paths()
    for usual in (known.cafile, *_FILES, known.capath, *_DIRECTORIES):
        if usual and (roots := _load([Path(usual)])):
            return roots, usual
    raise ConfigError(
        "this machine has no system trust store: install ca-certificates, set SSL_CERT_FILE, or "
        "name the authorities in a file"
    )


def _load(places: Iterable[Path]) -> list[x509.Certificate]:
    """Each certificate once. Files that cannot be read and blocks that do not parse are skipped."""
    blocks: dict[bytes, None] = {}
    for place in places:
        for file in sorted(place.iterdir()) if place.is_dir() else [place]:
            try:
                blocks.update(dict.fromkeys(pem_certificates(read_file(file))))
            except ConfigError:
                continue
    found = []
    for block in blocks:
        with suppress(*UNREADABLE):
            found += certificates_from_pem(block)
    return found
