"""Trust on first use: a file of names and their keys, like SSH's ``known_hosts``.

A line is a name, a space, and the key (SubjectPublicKeyInfo in DER, in base64); ``#`` at the start
of a line or after a space begins a comment. A name may have several keys. The first connection to a
name is trusted without verification; every later one must present a key from the file. An attacker
must therefore intercept the first connection and every later one.

Names are compared in one canonical form (:func:`canonical_peer_name`): ``Server.Example``,
``server.example.`` and ``server.example`` are one name, and so are all spellings of an IPv6
address. If any line lacks a canonical name or a key, no peer is trusted.
"""

import base64
import binascii
import contextlib
import fcntl
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Final

from hybridkex.auth.names import PIN, PeerName, canonical_peer_name
from hybridkex.auth.raw_keys import PeerRawKey, read_raw_key
from hybridkex.auth.verified import PROOF, VerifiedPeer
from hybridkex.constants import Alert
from hybridkex.errors import CertificateRejected, ConfigError
from hybridkex.fields import check_fields
from hybridkex.files import open_private, read_utf8, write_file
from hybridkex.machine import writing
from hybridkex.text import get_logger

LOG: Final = get_logger(__name__)

_COMMENT: Final = re.compile(r"(?:^|[ \t])#.*")
_LINE: Final = re.compile(r"(?P<name>[^ \t]+)[ \t]+(?P<key>[A-Za-z0-9+/]+=*)")


@dataclass(frozen=True)
class KnownPeers:
    """Verifies servers by the key that they presented first, and clients by the keys in the file.

    The file is read when this object is made and by :meth:`refresh`; verification does no I/O. The
    file is replaced atomically, under a lock, and only after the session with a new peer has been
    authorized.

    Args:
        path: the file; it need not exist yet.
        accept_new: whether a name that is not in the file is trusted and remembered.

    Raises:
        ConfigError: a field has the wrong type, or the file cannot be read or has an invalid line.
    """

    path: Path
    accept_new: bool = True
    _snapshot: "_Snapshot" = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "path", Path(self.path))
        object.__setattr__(self, "_snapshot", _Snapshot(_read(self.path)))

    def refresh(self) -> None:
        """Read the file again. If that is not possible, no key is accepted from then on.

        A shell calls this, in a worker thread, before each handshake.
        """
        try:
            self._snapshot.entries = _read(self.path)
        except ConfigError as error:
            self._snapshot.entries = error

    def verify_server_key(
        self, spki: bytes, name: PeerName | None, *, at: datetime | None = None
    ) -> VerifiedPeer:
        """Accept a key that the file has for this name, or any key if the name is new.

        Raises:
            CertificateRejected: the file has another key for the name, or none and new ones are not
                accepted.
        """
        if name is None:
            raise CertificateRejected(
                "server keys are looked up by host name; pass server_hostname"
            )
        peer = read_raw_key(spki, (str(name),))
        known = [key for entry, key in self._entries() if entry == str(name)]
        if spki in known:
            return VerifiedPeer(PROOF, peer, "known")
        if known:
            raise self._another_key(str(name), peer)
        if not self.accept_new:
            raise CertificateRejected(
                f"{name} is not in {self.path}; it presented the key {peer.pin}",
                alert=Alert.CERTIFICATE_UNKNOWN,
                subject=peer.subject,
            )
        return VerifiedPeer(PROOF, peer, "first use", partial(self._remember, str(name), peer))

    def verify_client_key(self, spki: bytes, *, at: datetime | None = None) -> VerifiedPeer:
        """Accept a key that is in the file. A client sends no name, so a new client is refused.

        Raises:
            CertificateRejected: the key is not in the file, or is too weak.
        """
        names = tuple(name for name, key in self._entries() if key == spki)
        peer = read_raw_key(spki, names)
        if not names:
            raise CertificateRejected(
                f"the client's key {peer.pin} is not in {self.path}",
                alert=Alert.CERTIFICATE_UNKNOWN,
                subject=peer.subject,
            )
        return VerifiedPeer(PROOF, peer, "known")

    def add(self, name: str, spki: bytes) -> None:
        """Add a key to the file, in addition to those that the name may already have.

        Args:
            name: a host name, an IP address or a URI, in any spelling.
            spki: the key, as SubjectPublicKeyInfo in DER.

        Raises:
            ConfigError: the name or the key is invalid, or the file cannot be read or written.
        """
        name = _entry_name(name)
        try:
            read_raw_key(spki)
        except CertificateRejected as error:
            raise ConfigError(f"cannot add a key for {name}: {error}") from None
        with _locked(self.path):
            self._add(name, spki)
        self.refresh()

    def _add(self, name: str, spki: bytes) -> None:
        if (name, spki) in _read(self.path):
            return
        text = read_utf8(self.path, missing=b"", own=True)
        if text and not text.endswith("\n"):
            text += "\n"
        _replace(self.path, f"{text}{name} {base64.b64encode(spki).decode('ascii')}\n")

    def _remember(self, name: str, peer: PeerRawKey) -> None:
        """Write the key of a new peer. If the file cannot be written, the session continues."""
        try:
            with _locked(self.path):
                known = [key for entry, key in _read(self.path) if entry == name]
                if not known:
                    self._add(name, peer.spki)
        except ConfigError as error:
            LOG.warning("the key of %s is not remembered: %s", name, error)
            return
        finally:
            self.refresh()
        if known and peer.spki not in known:
            # Another connection or process stored another key for the name in the meantime.
            raise self._another_key(name, peer)

    def _another_key(self, name: str, peer: PeerRawKey) -> CertificateRejected:
        return CertificateRejected(
            f"{name} has another key than the one in {self.path}: an attacker may be intercepting "
            f"the connection, or the server has a new key; it presented {peer.pin}",
            alert=Alert.CERTIFICATE_UNKNOWN,
            subject=peer.subject,
        )

    def _entries(self) -> "_Entries":
        entries = self._snapshot.entries
        if isinstance(entries, ConfigError):
            # A partly read file may lack the key that matters.
            raise CertificateRejected(str(entries), alert=Alert.INTERNAL_ERROR)
        return entries


_Entries = list[tuple[str, bytes]]
"""Names and keys, in the order of the file."""


@dataclass
class _Snapshot:
    """The content of the file when it was last read, or the error of reading it."""

    entries: _Entries | ConfigError


def _read(path: Path) -> _Entries:
    entries = []
    for number, raw in enumerate(read_utf8(path, missing=b"", own=True).split("\n"), start=1):
        line = _COMMENT.sub("", raw).strip(" \t\r")
        if not line:
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise ConfigError(
                f"{path}, line {number}: it must have a name, a space and a key in base64"
            )
        try:
            entries.append((_entry_name(match["name"]), base64.b64decode(match["key"])))
        except binascii.Error:
            raise ConfigError(f"{path}, line {number}: the key is not valid base64") from None
        except ConfigError as error:
            raise ConfigError(f"{path}, line {number}: {error}") from None
    return entries


def _entry_name(text: str) -> str:
    """The canonical form in which names are written, read and compared."""
    name = canonical_peer_name(text)
    if name.startswith((PIN, "*.")):
        raise ConfigError(f"{text!r} is not the name of a single peer")
    return name


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time changes the file; the lock is a separate file, since the file itself is
    replaced."""
    lock = path.with_name(f".{path.name}.lock")
    with contextlib.ExitStack() as stack:
        with writing(lock):
            fcntl.flock(stack.enter_context(open_private(lock, append=True)), fcntl.LOCK_EX)
        yield


def _replace(path: Path, text: str) -> None:
    with writing(path):
        write_file(path, text.encode("utf-8"))
