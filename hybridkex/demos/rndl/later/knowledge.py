"""An adversary's knowledge besides the recordings: answers of oracles, and stolen secrets.

Everything is in one folder::

    oracle/ecdh.jsonl, ml-kem.jsonl, signature.jsonl    broken primitives, see Knowledge.solve
    stolen/certificate/*.pem                            a party's long-term private key
    stolen/kme/NAME/keys.db, store.key                  a KME's key store, with its sealing key
    stolen/ticket-keys.jsonl                            the keys that seal session tickets
    stolen/sessions.jsonl                               all secrets of sessions, at one moment
    CASE/*.pcapng                                       recordings that belong together
"""

import json
import shutil
import sqlite3
from base64 import b64decode
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric import ec, x25519
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_private_key,
    load_pem_private_key,
)

from hybridkex.errors import DecodeError, RecordingError
from hybridkex.text import said
from hybridkex.wire.codec import Reader

_NONCE: Final = 12
_TICKET_KEY_NAME: Final = 8


@dataclass(frozen=True)
class Known:
    """A secret, and how the adversary obtained it."""

    secret: bytes
    how: str


@dataclass
class Knowledge:
    """Everything known so far; it grows as recordings are decrypted."""

    private_keys: dict[bytes, tuple[Any, str]] = field(default_factory=dict)
    """Private keys by public share."""
    qkd_keys: list[Known] = field(default_factory=list)
    tickets: dict[bytes, Known] = field(default_factory=dict)
    """The PSKs of session tickets, by ticket."""
    ticket_keys: dict[bytes, AESGCM] = field(default_factory=dict)
    sessions: dict[bytes, dict[str, bytes]] = field(default_factory=dict)
    """The secrets of sessions at one moment, by name, under ``ClientHello.random``."""
    overheard: list[bytes] = field(default_factory=list)
    """Byte streams in the clear, such as the classical channel of a QKD link."""

    @classmethod
    def from_folder(cls, folder: Path) -> "Knowledge":
        """Read ``oracle`` and ``stolen``; either may be missing.

        Raises:
            RecordingError: a file does not have the content that its name says.
        """
        known = cls()
        try:
            for path in sorted(folder.glob("oracle/*.jsonl")):
                for item in _lines(path):
                    key = load_der_private_key(bytes.fromhex(item["private"]), None)
                    how = f"its private key is the answer of the {path.stem} oracle"
                    known.private_keys[bytes.fromhex(item["public"])] = (key, how)
            for path in sorted(folder.glob("stolen/certificate/*.pem")):
                stolen = load_pem_private_key(path.read_bytes(), None)
                how = "its private key is that of the stolen certificate"
                known.private_keys[_share(stolen.public_key())] = (stolen, how)
            for path in sorted(folder.glob("stolen/kme/*/keys.db")):
                known.qkd_keys.extend(_key_store(path, path.with_name("store.key")))
            for path in folder.glob("stolen/ticket-keys.jsonl"):
                for item in _lines(path):
                    known.ticket_keys[bytes.fromhex(item["name"])] = AESGCM(
                        bytes.fromhex(item["key"])
                    )
            for path in folder.glob("stolen/sessions.jsonl"):
                for item in _lines(path):
                    loot = {name: bytes.fromhex(value) for name, value in item.items()}
                    known.sessions[loot.pop("random")] = loot
        except (OSError, ValueError, KeyError, sqlite3.Error) as error:
            raise RecordingError(f"cannot use what was stolen: {said(error)}") from error
        return known

    def copy(self) -> "Knowledge":
        """Return the same knowledge, which may grow by itself."""
        return Knowledge(**{one.name: getattr(self, one.name).copy() for one in fields(self)})

    def solve(self, offer: bytes, answer: bytes) -> Known | None:
        """The shared secret of a key exchange, if one of its private keys is known.

        The oracle is queried only with the public share on the wire.
        """
        for share, other in ((offer, answer), (answer, offer)):
            if share in self.private_keys:
                key, how = self.private_keys[share]
                return Known(_agree(key, other), how)
        return None

    def ticket(self, identity: bytes) -> Known | None:
        found = self.tickets.get(identity)
        if found is not None:
            return found
        name = identity[:_TICKET_KEY_NAME]
        if name not in self.ticket_keys:
            return None
        start = _TICKET_KEY_NAME + _NONCE
        try:
            state = self.ticket_keys[name].decrypt(
                identity[_TICKET_KEY_NAME:start], identity[start:], name
            )
            reader = Reader(state)
            reader.take(4)  # version and cipher suite
            return Known(reader.opaque(1), "the ticket opens under the stolen ticket key")
        except (InvalidTag, DecodeError):
            return None

    def harvest(self, plaintext: bytes, where: str) -> None:
        """Extract the QKD keys from decrypted answers of a KME (ETSI GS QKD 014 clause 6.3)."""
        text = plaintext.decode("latin-1")
        decoder, position = json.JSONDecoder(), text.find("{")
        while position >= 0:
            with suppress(ValueError, TypeError, KeyError, RecursionError):  # not such an answer
                value, _ = decoder.raw_decode(text, position)
                for item in value["keys"]:
                    how = f"read in the recording {where}"
                    self.qkd_keys.append(Known(b64decode(item["key"]), how))
            position = text.find("{", position + 1)


def _lines(path: Path) -> Iterator[Any]:
    return map(json.loads, path.read_text(encoding="ascii").splitlines())


def _share(public: Any) -> bytes:
    """A public key in the encoding of a key share."""
    if isinstance(public, ec.EllipticCurvePublicKey):
        return public.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    return public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)  # type: ignore[no-any-return]


def _agree(key: Any, other: bytes) -> bytes:
    """The shared secret of a private key and the other side's share."""
    if isinstance(key, x25519.X25519PrivateKey):
        return key.exchange(x25519.X25519PublicKey.from_public_bytes(other))
    if isinstance(key, ec.EllipticCurvePrivateKey):
        peer = ec.EllipticCurvePublicKey.from_encoded_point(key.curve, other)
        return key.exchange(ec.ECDH(), peer)
    secret: bytes = key.decapsulate(other)
    return secret


def _key_store(path: Path, key_file: Path) -> Iterator[Known]:
    """Every key in a KME's database that decrypts under its sealing key.

    Searches the rows, then the raw bytes of all files for rows that were erased from the tables but
    may remain in free pages or in the write-ahead log.
    """
    seal = AESGCM(bytes.fromhex(key_file.read_text(encoding="ascii").strip()))
    how = f"found in the stolen key store of {path.parent.name}"
    raw = b"".join(one.read_bytes() for one in sorted(path.parent.glob("keys.db*")))
    with TemporaryDirectory() as copy, closing(_opened_copy(path.parent, Path(copy))) as db:
        links, grantees, key_ids = set[str](), set[tuple[str, str]](), set[str]()
        for table in ("material", "grants", "spent"):
            for link, key_id in db.execute(f"SELECT link, key_id FROM {table}"):
                links.add(link)
                key_ids.add(key_id)
        grantees.update(db.execute("SELECT master, slave FROM grants"))
    for key_id in key_ids:
        places = [_place("material", link, key_id) for link in links]
        places += [_place("grant", link, key_id, *names) for link in links for names in grantees]
        for window in _near(raw, key_id.encode()):
            for place in places:
                try:
                    key = seal.decrypt(window[:_NONCE], window[_NONCE:], place)
                except InvalidTag:
                    continue
                yield Known(key, how)


def _place(table: str, *columns: str) -> bytes:
    """The associated data of a sealed key, as the key store writes it."""
    fields = (column.encode() for column in columns)
    return table.encode() + b"".join(len(field).to_bytes(4) + field for field in fields)


def _opened_copy(source: Path, folder: Path) -> sqlite3.Connection:
    """A copy of the database, opened: closing the original would clear its write-ahead log."""
    for file in source.glob("keys.db*"):
        shutil.copy(file, folder)
    return sqlite3.connect(folder / "keys.db")


def _near(raw: bytes, key_id: bytes) -> Iterator[bytes]:
    """Sealed 256-bit keys that may be next to a key ID, wherever it occurs."""
    size, reach = _NONCE + 32 + 16, 512
    position = raw.find(key_id)
    while position >= 0:
        for start in range(position, min(position + reach, len(raw) - size + 1)):
            yield raw[start : start + size]
        position = raw.find(key_id, position + 1)
