"""PEM files: their blocks (RFC 7468), and a description of files that have none.

All certificate and key files are read here, so that one parser decides what is accepted, and
messages describe other content: DER, PKCS #12, PKCS #7, a certificate request, a key instead of a
certificate, a truncated file.
"""

import base64
import binascii
import re
from dataclasses import dataclass
from typing import Final

CERTIFICATES: Final = ("CERTIFICATE", "X509 CERTIFICATE")
"""Labels of a certificate; the second is the older one (RFC 7468 section 5.1)."""


class PemError(ValueError):
    """A file has the wrong content; the text describes it and never quotes it."""


@dataclass(frozen=True)
class PemBlock:
    label: str
    text: bytes
    """The lines between BEGIN and END."""

    @property
    def encrypted(self) -> bool:
        """Whether it is encrypted, by its label (PKCS #8) or its header (RFC 1421)."""
        return "ENCRYPTED" in self.label or b"ENCRYPTED" in self.text

    def der(self) -> bytes:
        """The decoded content.

        Raises:
            PemError: it is not base64.
        """
        try:
            return base64.b64decode(b"".join(self.text.split()), validate=True)
        except binascii.Error:
            raise PemError(f"its {self.label} block is not base64") from None


_EDGE: Final = re.compile(rb"-----(BEGIN|END) ([A-Z0-9 #]*)-----")


def pem_blocks(data: bytes) -> list[PemBlock]:
    """The blocks of a file, in its order; text around them is skipped.

    Raises:
        PemError: a block has no end.
    """
    blocks = []
    begin: re.Match[bytes] | None = None
    for edge in _EDGE.finditer(data):
        if edge[1] == b"BEGIN":
            if begin is not None:
                break
            begin = edge
        elif begin is not None and edge[2] == begin[2]:
            blocks.append(PemBlock(begin[2].decode(), data[begin.end() : edge.start()]))
            begin = None
    if begin is not None:
        raise PemError(
            f"a block that begins with BEGIN {begin[2].decode()} has no END line: the file is "
            "truncated"
        )
    return blocks


_BY_LABEL: Final[tuple[tuple[str, str], ...]] = (
    ("OPENSSH", "an OpenSSH key; 'ssh-keygen -p -m PKCS8 -f FILE' converts a copy of it"),
    (
        "TRUSTED CERTIFICATE",
        "a certificate with OpenSSL's trust settings, which are not supported here; 'openssl x509 "
        "-in FILE -out NEW' removes them",
    ),
    ("CERTIFICATE REQUEST", "a certificate request, which an authority has not signed yet"),
    ("PKCS7", "PKCS #7; 'openssl pkcs7 -in FILE -print_certs -out NEW' converts it"),
    ("CRL", "a revocation list"),
    ("PUBLIC KEY", "a public key"),
    ("PRIVATE KEY", "a private key"),
    ("CERTIFICATE", "a certificate"),
)  # fmt: skip

_PKCS12: Final = b"\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x07"
"""The content type of a PKCS #12 file after its version (RFC 7292 section 4)."""


def contents_of(data: bytes) -> str:
    """A description of a file's content, to complete a sentence that begins with *it is*."""
    if not data.strip():
        return "empty"
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "text in UTF-16; save it as UTF-8"
    try:
        labels = [block.label for block in pem_blocks(data)]
    except PemError:
        return "a truncated PEM file"
    for ending, words in _BY_LABEL:
        if any(ending in label for label in labels):
            return words
    if labels:
        return f"PEM with a block {labels[0]}"
    if data.startswith(b"PuTTY-User-Key-File"):
        return "a PuTTY key; PuTTYgen can export it for OpenSSH"
    if data[:1] == b"\x30":
        return _der(data)
    if data.lstrip()[:1] == b"<":
        return "an HTML or XML document"
    if b"BEGIN" in data:
        return "text with damaged BEGIN and END lines, which need five hyphens on each side"
    return "a file without a PEM block"


def _der(data: bytes) -> str:
    head = data[:64]
    if b"\x02\x01\x03\x30" in head[:10] and _PKCS12 in head:
        return (
            "PKCS #12 (.pfx, .p12); 'openssl pkcs12 -in FILE -nodes -out NEW' makes PEM of its "
            "certificates and its key"
        )
    if b"\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x07\x02" in head[:20]:
        return (
            "PKCS #7 in DER; 'openssl pkcs7 -inform DER -in FILE -print_certs -out NEW' converts it"
        )
    # A certificate begins with another SEQUENCE; a private key with its version, an INTEGER, or,
    # encrypted, with an algorithm of PKCS #5.
    inner = 2 + (data[1] & 0x7F if len(data) > 1 and data[1] & 0x80 else 0)
    if data[inner : inner + 1] == b"\x02" or b"\x2a\x86\x48\x86\xf7\x0d\x01\x05" in head:
        return "a key in DER; 'openssl pkey -inform DER -in FILE -out NEW' makes PEM of it"
    return (
        "DER, not PEM; if it is a certificate, 'openssl x509 -inform DER -in FILE -out NEW' makes "
        "PEM of it"
    )
