"""A web of trust: raw public keys endorsed by OpenPGP signatures of people whom the user trusts.

An endorsement is four lines of text, signed by a person with their own tool (``gpg --clearsign``,
``sq sign``)::

    hybridkex endorsement v1
    name: server.example
    key: sha256:<64 hexadecimal digits: the pin of the key>
    until: 2027-12-31

Sequoia (the package ``pysequoia``) checks the signatures. Trust is one step deep: whom the user
trusts endorses keys, and cannot make the user trust others. How many of them must agree is the
user's choice. Nothing is fetched: endorsements are files that people send each other.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from hybridkex.auth.names import PeerName, parse_peer_name
from hybridkex.auth.raw_keys import PeerRawKey, read_raw_key
from hybridkex.auth.verified import PROOF, VerifiedPeer
from hybridkex.constants import Alert
from hybridkex.errors import CertificateRejected, ConfigError, ProviderMissing

__all__ = ["Endorsement", "WebOfTrust", "endorsement"]

_FORM: Final = re.compile(
    r"hybridkex endorsement v1\n"
    r"name: (?P<name>[^\s]+)\n"
    r"key: sha256:(?P<pin>[0-9a-f]{64})\n"
    r"until: (?P<until>\d{4}-\d\d-\d\d)\n?"
)


def endorsement(name: str, pin: str, until: date) -> bytes:
    """The text that a person signs to endorse a key.

    Args:
        name: the server's name, or the name by which a client shall be known.
        pin: SHA-256 of the key, in hex (``RawIdentity.pin``).
        until: the last day on which it counts (UTC).

    Raises:
        ConfigError: the name or the pin is none.
    """
    text = f"hybridkex endorsement v1\nname: {parse_peer_name(name)}\nkey: sha256:{pin}\n"
    text += f"until: {until.isoformat()}\n"
    if _FORM.fullmatch(text) is None:
        raise ConfigError("the pin of a key is 64 hexadecimal digits in lower case")
    return text.encode("ascii")


@dataclass(frozen=True)
class Endorsement:
    """One person's word for one key, its signature verified."""

    name: str
    pin: str
    until: datetime
    """The first moment at which it does not count any more."""
    by: str
    """The fingerprint of the person's OpenPGP certificate."""


@dataclass(frozen=True)
class WebOfTrust:
    """Keys that enough of the trusted people endorse for a name.

    Args:
        people: OpenPGP certificates, binary or armored, each file one or several.
        statements: signed endorsements; one that no trusted person signed is passed over.
        needed: how many different people must endorse a key.

    Raises:
        ConfigError: a certificate that is none or cannot be trusted now, a statement that is no
            OpenPGP message, or a signed text that is no endorsement.
        ProviderMissing: the package ``pysequoia`` is not installed.
    """

    people: tuple[bytes, ...] = field(repr=False)
    statements: tuple[bytes, ...] = field(repr=False)
    needed: int = 1
    endorsements: tuple[Endorsement, ...] = field(init=False)
    """What the statements came to."""

    def __post_init__(self) -> None:
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
                f"{self.needed} people must agree, and there are {len(certificates)} to trust"
            )
        found = [one for statement in self.statements for one in _check(statement, certificates)]
        object.__setattr__(self, "endorsements", tuple(found))

    @classmethod
    def from_files(
        cls,
        people: Iterable[str | Path],
        statements: str | Path | Iterable[str | Path],
        *,
        needed: int = 1,
    ) -> "WebOfTrust":
        """From files with certificates, and files with endorsements or a folder of them.

        Raises:
            ConfigError: as above, or a file cannot be read.
        """
        if isinstance(statements, str | Path):
            try:
                statements = sorted(one for one in Path(statements).iterdir() if one.is_file())
            except OSError as error:
                raise ConfigError(f"cannot read {statements}: {error.strerror}") from None
        return cls(tuple(map(_bytes_of, people)), tuple(map(_bytes_of, statements)), needed)

    def verify_server_key(self, spki: bytes, name: PeerName | None) -> VerifiedPeer:
        """Endorsed for this name by enough people."""
        if name is None:
            raise CertificateRejected(
                "a server's key is endorsed for the server's name; pass server_hostname"
            )
        peer = read_raw_key(spki, (str(name),))
        if str(name) not in self._names(peer):
            raise self._refusal(peer, f"as {name}")
        return VerifiedPeer(PROOF, peer, "openpgp")

    def verify_client_key(self, spki: bytes) -> VerifiedPeer:
        """Endorsed by enough people for some name; the session gives the names."""
        peer = read_raw_key(spki)
        names = self._names(peer)
        if not names:
            raise self._refusal(peer, "by any name")
        return VerifiedPeer(PROOF, PeerRawKey(spki, names), "openpgp")

    def _names(self, peer: PeerRawKey) -> tuple[str, ...]:
        """The names for which enough people endorse the key now."""
        now = datetime.now(UTC)
        by: dict[str, set[str]] = {}
        for one in self.endorsements:
            if one.pin == peer.pin and now < one.until:
                by.setdefault(one.name, set()).add(one.by)
        return tuple(name for name, people in by.items() if len(people) >= self.needed)

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
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None


def _check(statement: bytes, certificates: dict[str, Any]) -> list[Endorsement]:
    """The endorsements in a signed text: one for each trusted person whose signature is good."""
    pysequoia = _load()
    asked = False

    def store(_key_ids: object) -> list[Any]:
        nonlocal asked
        asked = True
        return list(certificates.values())

    try:
        signed = pysequoia.verify(bytes=statement, store=store)
    except Exception as error:
        if asked:
            return []  # Signed by others, or not by anyone whose key is good now.
        raise ConfigError(f"a file is no endorsement: {_line(error)}") from None
    match = _FORM.fullmatch((signed.bytes or b"").decode("ascii", "replace").replace("\r\n", "\n"))
    if match is None:
        raise ConfigError("a signed text is no endorsement of a key")
    try:
        last_day = date.fromisoformat(match["until"])
    except ValueError:
        raise ConfigError(f"an endorsement until {match['until']}, which is no day") from None
    until = datetime(last_day.year, last_day.month, last_day.day, tzinfo=UTC) + timedelta(days=1)
    return [
        Endorsement(match["name"], match["pin"], _earlier(until, certificates[one]), one)
        for one in {signature.certificate for signature in signed.valid_sigs}
    ]


def _earlier(until: datetime, certificate: Any) -> datetime:
    """An endorsement counts no longer than the certificate of whoever gave it."""
    expiration: datetime | None = certificate.expiration
    if expiration is None:
        return until
    return min(until, expiration if expiration.tzinfo else expiration.replace(tzinfo=UTC))


def _line(error: Exception) -> str:
    """What went wrong, without the backtrace that may follow."""
    return str(error).partition("\n")[0]
