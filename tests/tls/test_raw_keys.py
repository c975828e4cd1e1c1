"""Raw public keys (RFC 7250) in both roles, with each way to trust them."""

import logging
import shutil
import subprocess
import time as clock
from dataclasses import replace
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from tls_glue import ANY_GROUP, Pair
from waiting import until

from hybridkex.auth import (
    DevCa,
    KnownPeers,
    PeerRawKey,
    Pins,
    RawIdentity,
    TrustStore,
    WebOfTrust,
    endorsement,
)
from hybridkex.auth.raw_keys import read_raw_key
from hybridkex.constants import Alert
from hybridkex.crypto.kex import X25519
from hybridkex.crypto.psk import ExternalPsk
from hybridkex.errors import AlertReceived, CertificateRejected, ConfigError, PeerError
from hybridkex.secret import Secret
from hybridkex.tls.config import ClientConfig, ServerConfig
from hybridkex.tls.session import AuthenticatedBy, MemoryTicketStore

SERVER = RawIdentity.generate(names=("localhost",))
CLIENT = RawIdentity.generate()


def client(verifier: object, **more: object) -> ClientConfig:
    return ClientConfig(verifier=verifier, groups=(X25519,), policy=ANY_GROUP, **more)  # type: ignore[arg-type]


def server(*identities: object, **more: object) -> ServerConfig:
    return ServerConfig(identities=identities, groups=(X25519,), policy=ANY_GROUP, **more)  # type: ignore[arg-type]


def pins(*identities: RawIdentity) -> Pins:
    return Pins(frozenset(one.pin for one in identities))


def refused(one: ClientConfig, other: ServerConfig, victim: str, alert: Alert) -> str:
    """How a handshake failed, at the side that refused it."""
    pair = Pair.make(one, other)
    pair.client.start()
    pair.fight()
    error = pair.errors[victim]
    assert isinstance(error, PeerError)
    assert error.alert is alert
    heard = pair.errors["client" if victim == "server" else "server"]
    assert isinstance(heard, AlertReceived)
    assert heard.alert == alert
    return str(error)


# --- handshakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "identity",
    [
        SERVER,
        RawIdentity(ec.generate_private_key(ec.SECP256R1())),
        RawIdentity(ec.generate_private_key(ec.SECP521R1())),
        RawIdentity(rsa.generate_private_key(65537, 2048)),
    ],
    ids=["ed25519", "p256", "p521", "rsa"],
)
def test_a_pinned_server(identity: RawIdentity) -> None:
    pair = Pair.make(client(pins(identity)), server(identity)).connect()
    pair.exchange(b"ping", b"pong")
    session = pair.client.session
    assert session.authenticated_by is AuthenticatedBy.CERTIFICATE
    assert isinstance(session.peer_credential, PeerRawKey)
    assert session.peer_credential.pin == identity.pin
    assert session.peer_subject == f"raw public key {identity.pin}"


def test_both_sides() -> None:
    pair = Pair.make(
        client(pins(SERVER), identity=CLIENT),
        server(SERVER, client_verifier=pins(CLIENT), require_client_certificate=True),
    ).connect()
    assert pair.server.session.peer_credential is not None
    assert pair.server.session.peer_credential.pin == CLIENT.pin


def test_beside_certificates(tmp_path: Path) -> None:
    """A server with both shows what the client can check; so does each side by itself."""
    ca = DevCa.create()
    trust = TrustStore((ca.certificate,))
    both = server(ca.issue("localhost"), SERVER)
    for verifier, raw in ((KnownPeers(tmp_path / "known"), True), (trust, False)):
        session = Pair.make(client(verifier), both).connect().client.session
        assert isinstance(session.peer_credential, PeerRawKey) == raw
    mixed = server(SERVER, client_verifier=trust, require_client_certificate=True)
    pair = Pair.make(client(pins(SERVER), identity=ca.issue("alice")), mixed).connect()
    assert pair.server.session.peer_subject == "CN=alice"


def test_with_an_external_psk() -> None:
    """RFC 9973 with a raw key where the certificate would be."""
    psk = ExternalPsk(identity=b"qkd-1", key=Secret(bytes(range(32))), context=b"")
    pair = Pair.make(client(pins(SERVER), psks=(psk,)), server(SERVER, psks=(psk,))).connect()
    assert pair.client.session.authenticated_by is AuthenticatedBy.BOTH


def test_resumption() -> None:
    store = MemoryTicketStore()
    one = client(pins(SERVER), ticket_store=store, identity=CLIENT)
    other = server(SERVER, client_verifier=pins(CLIENT), require_client_certificate=True)
    first = Pair.make(one, other).connect()
    first.exchange(b"ping", b"a ticket")
    again = Pair.make(one, other).connect()
    assert again.client.session.resumed
    for session in (again.client.session, again.server.session):
        assert isinstance(session.peer_credential, PeerRawKey)
    # A key that is not trusted any more is not resumed.
    again.exchange(b"ping", b"a ticket")
    other_pins = replace(one, verifier=pins(CLIENT))
    pair = Pair.make(other_pins, other)
    pair.client.start()
    pair.fight()
    assert isinstance(pair.errors["client"], CertificateRejected)


def test_the_wrong_key() -> None:
    text = refused(client(pins(CLIENT)), server(SERVER), "client", Alert.CERTIFICATE_UNKNOWN)
    assert SERVER.pin in text


def test_a_client_with_the_wrong_key() -> None:
    other = server(SERVER, client_verifier=pins(SERVER), require_client_certificate=True)
    refused(client(pins(SERVER), identity=CLIENT), other, "server", Alert.CERTIFICATE_UNKNOWN)


def test_nothing_in_common() -> None:
    """A client that can check certificates only, and a server that has a raw key only."""
    ca = DevCa.create()
    alert = Alert.UNSUPPORTED_CERTIFICATE
    refused(client(TrustStore((ca.certificate,))), server(SERVER), "server", alert)
    demanding = server(
        ca.issue("localhost"),
        client_verifier=KnownPeersOfNobody,
        require_client_certificate=True,
    )
    trusting = client(TrustStore((ca.certificate,)), identity=ca.issue("alice"))
    refused(trusting, demanding, "server", alert)


class _OnlyKeys:
    """Decides about raw keys and about nothing else."""

    def verify_client_key(self, spki: bytes, *, at: datetime | None = None) -> None:
        raise CertificateRejected("nobody is known")


KnownPeersOfNobody = _OnlyKeys()


@pytest.mark.parametrize("index", range(0, 44, 3))
def test_a_key_that_was_changed_on_the_way(index: int) -> None:
    spki = bytearray(SERVER.chain[0])
    spki[index] ^= 1
    with pytest.raises(CertificateRejected):
        pins(SERVER).verify_server_key(bytes(spki), None)


# --- keys -----------------------------------------------------------------------------------------


def test_what_is_no_key() -> None:
    weak = rsa.generate_private_key(65537, 1024)
    with pytest.raises(ConfigError, match="1024 bits"):
        RawIdentity(weak)
    for bad in (b"", b"\x30\x00", bytes(100), b"\x30" * 2_000_000):
        with pytest.raises(CertificateRejected):
            read_raw_key(bad)
    with pytest.raises(ConfigError):
        RawIdentity("a text")


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    path.write_bytes(SERVER.to_pem())
    again = RawIdentity.from_file(path, names=("localhost",))
    assert again.pin == SERVER.pin
    assert again.matches("localhost")
    assert not again.matches("example.org")
    assert "PRIVATE" not in repr(again)
    path.write_text("nonsense")
    with pytest.raises(ConfigError, match=str(path)):
        RawIdentity.from_file(path)
    with pytest.raises(ConfigError, match="cannot read"):
        RawIdentity.from_file(tmp_path / "none")


# --- trust on first use ---------------------------------------------------------------------------


def test_first_use_is_remembered(tmp_path: Path) -> None:
    known = KnownPeers(tmp_path / "known")
    session = Pair.make(client(known), server(SERVER)).connect().client.session
    assert isinstance(session.peer_credential, PeerRawKey)
    assert (tmp_path / "known").read_text().split()[0] == "localhost"
    assert (tmp_path / "known").stat().st_mode & 0o077 == 0
    Pair.make(client(KnownPeers(tmp_path / "known")), server(SERVER)).connect()
    text = refused(client(known), server(CLIENT), "client", Alert.CERTIFICATE_UNKNOWN)
    assert "another key" in text


def test_a_failed_handshake_is_not_remembered(tmp_path: Path) -> None:
    """Somebody who shows a key that he does not have must not get into the file."""
    known = KnownPeers(tmp_path / "known")
    pair = Pair.make(client(known), server(SERVER))
    spoil = pair.server._records.writer.send_raw

    def spoiled(raw: bytes) -> None:
        spoil(raw[:-1] + bytes((raw[-1] ^ 1,)) if raw[0] == 15 else raw)

    pair.server._records.writer.send_raw = spoiled  # type: ignore[method-assign]
    pair.client.start()
    pair.fight()
    assert "client" in pair.errors
    assert not (tmp_path / "known").exists()


def test_no_new_ones(tmp_path: Path) -> None:
    known = KnownPeers(tmp_path / "known", accept_new=False)
    refused(client(known), server(SERVER), "client", Alert.CERTIFICATE_UNKNOWN)
    known.add("localhost", SERVER.chain[0])
    known.add("localhost", SERVER.chain[0])
    assert len((tmp_path / "known").read_text().splitlines()) == 1
    Pair.make(client(known), server(SERVER)).connect()


def test_known_clients(tmp_path: Path) -> None:
    known = KnownPeers(tmp_path / "known")
    other = server(SERVER, client_verifier=known, require_client_certificate=True)
    one = client(pins(SERVER), identity=CLIENT)
    refused(one, other, "server", Alert.CERTIFICATE_UNKNOWN)
    known.add("alice", CLIENT.chain[0])
    peer = Pair.make(one, other).connect().server.session.peer_credential
    assert peer is not None
    assert peer.names[0] == "alice"


def test_a_file_that_makes_no_sense(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "known"
    path.write_text("# fine\n\nlocalhost notbase64!\n")
    with pytest.raises(ConfigError, match="line 3"):
        KnownPeers(path)
    path.unlink()
    known = KnownPeers(path)
    path.write_text("one two three\n")
    refused(client(known), server(SERVER), "client", Alert.INTERNAL_ERROR)
    gone = KnownPeers(tmp_path / "no-folder" / "known")
    with caplog.at_level(logging.WARNING):
        Pair.make(client(gone), server(SERVER)).connect()
    assert "not remembered" in caplog.text


# --- web of trust ---------------------------------------------------------------------------------

pysequoia = pytest.importorskip("pysequoia", reason="needs pysequoia: pip install pysequoia")
TOMORROW = datetime.now(UTC).date() + timedelta(days=1)


class Person:
    def __init__(self, name: str) -> None:
        self.key = pysequoia.Tsk.generate(f"{name} <{name}@example.org>")

    @property
    def public(self) -> bytes:
        return bytes(str(self.key.extract_certificate()), "ascii")

    def endorses(self, name: str, pin: str, until: date = TOMORROW) -> bytes:
        return self.signs(endorsement(name, pin, until))

    def signs(self, text: bytes) -> bytes:
        signed = pysequoia.sign(self.key.signer(), text)
        return bytes(signed)


@pytest.fixture(scope="module")
def people() -> list[Person]:
    return [Person(name) for name in ("ann", "ben", "cat")]


def test_an_endorsed_server(people: list[Person], tmp_path: Path) -> None:
    ann, ben, cat = people
    statements = [one.endorses("localhost", SERVER.pin) for one in (ann, ben)]
    for number, data in enumerate((*statements, cat.endorses("localhost", CLIENT.pin))):
        (tmp_path / str(number)).write_bytes(data)
    trusted = tmp_path.parent / f"{tmp_path.name}-people"
    trusted.write_bytes(ann.public + ben.public)
    web = WebOfTrust.from_files([trusted], tmp_path, needed=2)
    assert len(web.endorsements) == 2  # cat is nobody whom we trust
    session = Pair.make(client(web), server(SERVER)).connect().client.session
    assert session.peer_credential is not None
    assert "localhost" in session.peer_credential.names


def test_not_endorsed_enough(people: list[Person]) -> None:
    ann, ben, _ = people
    alert = Alert.CERTIFICATE_UNKNOWN
    one = ann.endorses("localhost", SERVER.pin)
    yesterday = datetime.now(UTC).date() - timedelta(days=1)
    cases = [
        WebOfTrust((ann.public, ben.public), (one, one), needed=2),  # one person twice
        WebOfTrust((ann.public,), (ann.endorses("example.org", SERVER.pin),)),
        WebOfTrust((ann.public,), (ann.endorses("localhost", CLIENT.pin),)),
        WebOfTrust((ann.public,), (ann.endorses("localhost", SERVER.pin, yesterday),)),
        WebOfTrust((ben.public,), (one,)),  # signed by somebody else
    ]
    for web in cases:
        refused(client(web), server(SERVER), "client", alert)


def test_an_endorsed_client(people: list[Person]) -> None:
    ann = people[0]
    web = WebOfTrust((ann.public,), (ann.endorses("alice.example", CLIENT.pin),))
    other = server(SERVER, client_verifier=web, require_client_certificate=True)
    pair = Pair.make(client(pins(SERVER), identity=CLIENT), other).connect()
    assert pair.server.session.peer_credential is not None
    assert "alice.example" in pair.server.session.peer_credential.names
    nobody = replace(other, client_verifier=WebOfTrust((ann.public,), ()))
    one = client(pins(SERVER), identity=CLIENT)
    refused(one, nobody, "server", Alert.CERTIFICATE_UNKNOWN)


def test_statements_that_are_none(people: list[Person], tmp_path: Path) -> None:
    ann = people[0]
    with pytest.raises(ConfigError, match="not a signed endorsement"):
        WebOfTrust((ann.public,), (b"not OpenPGP",))
    with pytest.raises(ConfigError, match="not an endorsement of a key"):
        WebOfTrust((ann.public,), (ann.signs(b"I like this key"),))
    with pytest.raises(ConfigError, match="not an OpenPGP certificate"):
        WebOfTrust((b"nonsense",), ())
    with pytest.raises(ConfigError, match="must agree"):
        WebOfTrust((ann.public,), (), needed=2)
    with pytest.raises(ConfigError, match="64 hexadecimal"):
        endorsement("localhost", "abc", TOMORROW)
    with pytest.raises(ConfigError, match="cannot read"):
        WebOfTrust.from_files([tmp_path / "none"], [])
    spoiled = bytearray(ann.endorses("localhost", SERVER.pin))
    spoiled[len(spoiled) // 2] ^= 1
    try:
        web = WebOfTrust((ann.public,), (bytes(spoiled),))
    except ConfigError:
        return
    assert web.endorsements == ()


@pytest.mark.parametrize(
    "name",
    [
        *("Server.Example", "server.example.", "*.example", "bücher.example", "a b", "-", "a..b"),
        *("sha256:" + "7a" * 32, "https://server.example", "[::1]", "::0001", "127.1", "a" * 64),
        *("server.example\nkey: sha256:" + "0" * 64, "server.example\t", "", "xn--", "fe80::1%lo"),
    ],
)
def test_reading_refuses_what_writing_refuses(name: str, people: list[Person]) -> None:
    """Whatever stands in a signed text is a name that endorsement() writes, in this spelling."""
    ann = people[0]
    text = f"hybridkex endorsement v1\nname: {name}\nkey: sha256:{SERVER.pin}\n"
    text += f"until: {TOMORROW.isoformat()}\n"
    try:
        written = endorsement(name, SERVER.pin, TOMORROW)
    except ConfigError:
        written = b""
    assert written != text.encode()
    with pytest.raises(ConfigError, match="endorsement"):
        WebOfTrust((ann.public,), (ann.signs(text.encode()),))


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace(b"v1", b"v2"),
        lambda text: text + b"\n",
        lambda text: b"\n" + text,
        lambda text: text.replace(b"name: ", b"name:  "),
        lambda text: text + text,
        lambda text: text.replace(SERVER.pin.encode(), SERVER.pin.upper().encode()),
        lambda text: text.replace(b"until: 2", b"until: x"),
        lambda text: text[:-6] + b"02-30\n",
    ],
)
def test_other_texts_are_refused(change: Any, people: list[Person]) -> None:
    ann = people[0]
    good = endorsement("localhost", SERVER.pin, TOMORROW)
    with pytest.raises(ConfigError, match="endorsement"):
        WebOfTrust((ann.public,), (ann.signs(change(good)),))


def test_texts_as_tools_sign_them(people: list[Person]) -> None:
    ann = people[0]
    good = endorsement("LocalHost.", SERVER.pin, date.max)
    for text in (good, good[:-1], good.replace(b"\n", b"\r\n")):
        web = WebOfTrust((ann.public,), (ann.signs(text),))
        assert [one.name for one in web.endorsements] == ["localhost"]
        web.verify_client_key(SERVER.chain[0])
    for day in (datetime.now(UTC), "2027-12-31", None):
        with pytest.raises(ConfigError, match=r"datetime\.date"):
            endorsement("localhost", SERVER.pin, day)  # type: ignore[arg-type]


def test_the_last_day_counts_when_a_key_is_verified(people: list[Person]) -> None:
    ann = people[0]
    web = WebOfTrust((ann.public,), (ann.endorses("localhost", SERVER.pin, TOMORROW),))
    web.verify_client_key(SERVER.chain[0])
    last = datetime.combine(TOMORROW, time(23, 59), UTC)
    web.verify_client_key(SERVER.chain[0], at=last)
    with pytest.raises(CertificateRejected):
        web.verify_client_key(SERVER.chain[0], at=last + timedelta(minutes=1))


@pytest.mark.parametrize("days", [0, 2])
def test_the_clock_of_the_configuration_reaches_the_verifiers_of_keys(
    people: list[Person], days: int
) -> None:
    """At the client and at the server, as it reaches those of certificates."""
    ann = people[0]
    texts = [ann.endorses("localhost", one.pin, TOMORROW) for one in (SERVER, CLIENT)]
    web = WebOfTrust((ann.public,), tuple(texts))
    moved = clock.time() + days * 24 * 3600
    pairs = (
        (replace(client(web), clock=lambda: moved), server(SERVER)),
        (
            client(pins(SERVER), identity=CLIENT),
            replace(server(SERVER, client_verifier=web), clock=lambda: moved),
        ),
    )
    for near, far in pairs:
        if days:
            with pytest.raises(CertificateRejected, match="not endorsed"):
                Pair.make(near, far).connect()
        else:
            Pair.make(near, far).connect()


@pytest.mark.slow
def test_a_signature_and_a_certificate_that_expire_while_they_are_in_use(tmp_path: Path) -> None:
    """Both are valid when the files are read, and have expired when the key is verified."""
    gpg = shutil.which("gpg")
    if gpg is None:
        pytest.skip("signatures that expire need gpg")
    home = tmp_path / "gnupg"
    home.mkdir(mode=0o700)
    options = (gpg, "--homedir", str(home), "--batch", "--quiet", "--passphrase", "")

    def run(*words: str, stdin: bytes = b"") -> bytes:
        done = subprocess.run((*options, *words), input=stdin, capture_output=True, check=True)
        return done.stdout

    text = endorsement("localhost", SERVER.pin, TOMORROW)
    try:
        for who in ("ann", "ben"):
            run("--quick-gen-key", f"{who}@example.org", "ed25519", "sign", "never")
        lasting = run("--local-user", "ann", "--clearsign", stdin=text)
        brief = ("--default-sig-expire", "seconds=4", "--local-user", "ann", "--clearsign")
        fingerprint = run("--list-keys", "--with-colons", "ben").decode()
        fingerprint = next(
            line.split(":")[9] for line in fingerprint.splitlines() if line.startswith("fpr")
        )
        run("--quick-set-expire", fingerprint, "seconds=4")
        of_ben = run("--local-user", "ben", "--clearsign", stdin=text)
        of_ann = run(*brief, stdin=text)
        ann, ben = (run("--export", who) for who in ("ann", "ben"))
        webs = [WebOfTrust((ann,), (of_ann,)), WebOfTrust((ben,), (of_ben,))]
        stays = WebOfTrust((ann,), (lasting,))
        for web in (*webs, stays):
            web.verify_client_key(SERVER.chain[0])

        def is_refused(web: WebOfTrust) -> bool:
            try:
                web.verify_client_key(SERVER.chain[0])
            except CertificateRejected:
                return True
            return False

        until(lambda: all(map(is_refused, webs)))
        stays.verify_client_key(SERVER.chain[0])
    finally:
        subprocess.run(("gpgconf", "--homedir", str(home), "--kill", "all"), check=False)
