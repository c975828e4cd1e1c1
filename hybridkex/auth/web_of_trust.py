"""A web of trust: raw public keys endorsed by OpenPGP signatures of people whom the user trusts.

An endorsement is four lines of text that a person signs with their own tool (``gpg --clearsign``,
``sq sign``)::

    hybridkex endorsement v1
    name: server.example
    key: sha256:<64 hexadecimal digits: the pin of the key>
    until: 2027-12-31

Sequoia (the package ``pysequoia``) verifies the signatures. Trust is one step deep: the people whom
the user trusts endorse keys, and cannot introduce other people. The user chooses how many of them
must agree. Nothing is fetched from a network: endorsements are files that people send each other.

A text is accepted exactly as :func:`endorsement` writes it (lines may end with CRLF, and the last
line end may be missing). Dates are checked when a key is verified, not when the files are read: the
last day of the endorsement, the expiry of the person's certificate and the expiry of the signature.
The caller gives the time for the first two; Sequoia checks the third by the clock of the system.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Final

from hybridkex.auth.names import PeerName, parse_peer_name
from hybridkex.auth.raw_keys import PeerRawKey, read_raw_key
from hybridkex.auth.verified import PROOF, VerifiedPeer
from hybridkex.constants import Alert
from hybridkex.errors import CertificateRejected, ConfigError, ProviderMissing
from hybridkex.fields import check_fields, checked
from hybridkex.files import read_file

_FORM: Final = re.compile(
    r"hybridkex endorsement v1\n"
    r"name: (?P<name>[^\s]+)\n"
    r"key: sha256:(?P<pin>[0-9a-f]{64})\n"
    r"until: (?P<until>\d{4}-\d\d-\d\d)\n"
)


def endorsement(name: str, pin: str, until: date) -> bytes:
    """The text that a person signs to endorse a key.

    Args:
        name: the server's host name or IP address, or the name for a client.
        pin: SHA-256 of the key, in lower-case hex (``RawIdentity.pin``).
        until: the last day on which the endorsement counts (UTC).

    Raises:
        ConfigError: the name, the pin or the day is not valid.
    """
    if not isinstance(until, date) or isinstance(until, datetime):
        raise ConfigError("an endorsement ends with a day: until must be a datetime.date")
    text = f"hybridkex endorsement v1\nname: {parse_peer_name(name)}\nkey: sha256:{pin}\n"
    text += f"until: {until.isoformat()}\n"
    if _FORM.fullmatch(text) is None:
        raise ConfigError("the pin of a key must be 64 hexadecimal digits in lower case")
    return text.encode("ascii")


@dataclass(frozen=True)
class Endorsement:
    """One person's endorsement of one key."""

    name: str
    pin: str
    until: date
    """The last day on which it counts (UTC)."""
    by: str
    """The fingerprint of the person's OpenPGP certificate."""
    statement: bytes = field(repr=False)
    """The signed text."""


@dataclass(frozen=True)
class WebOfTrust:
    """Keys that enough of the trusted people endorse for a name.

    Args:
        people: OpenPGP certificates, binary or armored; each file holds one or several.
        statements: signed endorsements; those that no trusted person signed are ignored.
        needed: how many different people must endorse a key.

    Raises:
        ConfigError: a file is not an OpenPGP certificate, a certificate is revoked, a statement is
            not an OpenPGP message, or the signed text is not an endorsement.
        ProviderMissing: the package ``pysequoia`` is not installed.
    """

    people: tuple[bytes, ...] = field(repr=False)
    statements: tuple[bytes, ...] = field(repr=False)
    needed: int = 1
    endorsements: tuple[Endorsement, ...] = field(init=False)
    """The endorsements by trusted people, including expired ones."""
    _certificates: dict[str, Any] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_fields(self)
        pysequoia = _load()
        certificates: dict[str, Any] = {}
        for data in self.people:
            try:
                found = pysequoia.Cert.split_bytes(data)
            except Exception as error:
                raise ConfigError(f"not an OpenPGP certificate: {_line(error)}") from None
            for certificate in found:
                if certificate.is_revoked:
                    raise ConfigError(f"the OpenPGP key {certificate.fingerprint} is revoked")
                certificates[certificate.fingerprint] = certificate
        if not 1 <= self.needed <= len(certificates):
            raise ConfigError(
                f"{self.needed} people must agree, but {len(certificates)} are trusted"
            )
        found = [one for statement in self.statements for one in _read(statement, certificates)]
        object.__setattr__(self, "endorsements", tuple(found))
        object.__setattr__(self, "_certificates", certificates)

    @classmethod
    @checked
    def from_files(
        cls,
        people: Iterable[str | Path],
        statements: str | Path | Iterable[str | Path],
        *,
        needed: int = 1,
    ) -> "WebOfTrust":
        """Read certificates from files, and endorsements from files or from a folder of them.

        Raises:
            ConfigError: as above, or a file cannot be read.
        """
        if isinstance(statements, str | Path):
            try:
                statements = sorted(one for one in Path(statements).iterdir() if one.is_file())
            except OSError as error:
                raise ConfigError(f"cannot read {statements}: {error.strerror}") from None
        return cls(tuple(map(_bytes_of, people)), tuple(map(_bytes_of, statements)), needed)

    def verify_server_key(
        self, spki: bytes, name: PeerName | None, *, at: datetime | None = None
    ) -> VerifiedPeer:
        """Accept a key that enough people endorse for this name at the time ``at``.

        Raises:
            CertificateRejected: fewer endorse it, or ``name`` is ``None``.
        """
        if name is None:
            raise CertificateRejected("an endorsement names the server; pass server_hostname")
        peer = read_raw_key(spki, (str(name),))
        if str(name) not in self._names(peer, at):
            raise self._refusal(peer, f"as {name}")
        return VerifiedPeer(PROOF, peer, "openpgp")

    def verify_client_key(self, spki: bytes, *, at: datetime | None = None) -> VerifiedPeer:
        """Accept a key that enough people endorse for some name at the time ``at``; the peer has
        these names."""
        peer = read_raw_key(spki)
        names = self._names(peer, at)
        if not names:
            raise self._refusal(peer, "by any name")
        return VerifiedPeer(PROOF, PeerRawKey(spki, names), "openpgp")

    def _names(self, peer: PeerRawKey, at: datetime | None) -> tuple[str, ...]:
        """The names for which enough people endorse the key at a time."""
        now = datetime.now(UTC) if at is None else at.astimezone(UTC)
        by: dict[str, set[str]] = {}
        for one in self.endorsements:
            if one.pin == peer.pin and self._counts(one, now):
                by.setdefault(one.name, set()).add(one.by)
        return tuple(name for name, people in by.items() if len(people) >= self.needed)

    def _counts(self, one: Endorsement, now: datetime) -> bool:
        """Whether its last day has not passed, the certificate has not expired, and the signature
        is still valid."""
        certificate = self._certificates[one.by]
        expiration: datetime | None = certificate.expiration
        if expiration is not None and expiration.tzinfo is None:
            expiration = expiration.replace(tzinfo=UTC)
        if now.date() > one.until or (expiration is not None and now >= expiration):
            return False
        _, signers = _verify(one.statement, self._certificates)
        return one.by in signers

    def _refusal(self, peer: PeerRawKey, how: str) -> CertificateRejected:
        return CertificateRejected(
            f"the key {peer.pin} is not endorsed {how} by {self.needed} of the people you trust",
            alert=Alert.CERTIFICATE_UNKNOWN,
            subject=peer.subject,
        )


def _load() -> Any:
    try:
        import pysequoia  # noqa: PLC0415 - an extra
    except ModuleNotFoundError:
        raise ProviderMissing(
            "OpenPGP signatures need the package pysequoia: pip install 'hybridkex[openpgp]'"
        ) from None
    return pysequoia


def _bytes_of(path: str | Path) -> bytes:
    return read_file(path)


def _verify(statement: bytes, certificates: dict[str, Any]) -> tuple[str, set[str]]:
    """The signed text, and the fingerprints of the trusted people whose signature is valid now.

    Raises:
        ConfigError: it is not an OpenPGP message.
    """
    asked = False

    def store(_key_ids: object) -> list[Any]:
        nonlocal asked
        asked = True
        return list(certificates.values())

    try:
        signed = _load().verify(bytes=statement, store=store)
    except Exception as error:
        if asked:
            return "", set()  # Signed by others, or no signature is valid now.
        raise ConfigError(f"a file is not a signed endorsement: {_line(error)}") from None
    text = (signed.bytes or b"").decode("ascii", "replace")
    signers = {signature.certificate for signature in signed.valid_sigs}
    return text, signers & certificates.keys()


def _read(statement: bytes, certificates: dict[str, Any]) -> list[Endorsement]:
    """The endorsements in a signed text: one for each trusted person who signed it."""
    text, signers = _verify(statement, certificates)
    if not signers:
        return []
    text = text.replace("\r\n", "\n").removesuffix("\n") + "\n"
    match = _FORM.fullmatch(text)
    if match is None:
        raise ConfigError("a signed text is not an endorsement of a key")
    try:
        until = date.fromisoformat(match["until"])
    except ValueError:
        raise ConfigError(f"an endorsement ends on {match['until']}, which is not a day") from None
    try:
        written = endorsement(match["name"], match["pin"], until)
    except ConfigError as error:
        raise ConfigError(f"an endorsement cannot be used: {error}") from None
    if written != text.encode("ascii"):
        written_name = str(parse_peer_name(match["name"]))
        raise ConfigError(f"an endorsement names {match['name']!r}; write {written_name!r}")
    return [
        Endorsement(match["name"], match["pin"], until, signer, statement)
        for signer in sorted(signers)
    ]


def _line(error: Exception) -> str:
    """The error's first line, without the backtrace that may follow."""
    return str(error).partition("\n")[0]
