"""What a failure says: the cause in words, whose side it is, once; and what a KME's owner sees."""

import logging
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, mldsa, rsa, x25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from test_kme_server import as_sae, filled

from hybridkex.auth import certificates
from hybridkex.auth.dev_ca import DevCa, write_identity
from hybridkex.crypto import expiry
from hybridkex.errors import Alert, ConfigError, KeySourceError
from hybridkex.kme.config import PeerConfig, ServeConfig
from hybridkex.kme.serve import KmeServer
from hybridkex.kme.settings import KmeLimits
from hybridkex.net.address import TcpAddress
from hybridkex.qkd.etsi014.client import KmeClient
from hybridkex.qkd.etsi014.models import KeyRequest
from hybridkex.qkd.etsi014.mutual_tls import TLS_KINDS, client_tls, server_tls
from hybridkex.shell import expiry_watch
from interop.ports import free_port

Site = Any  # of conftest.py

RAW = ("[SSL", "_ssl.c", "Error:", "Errno", "Traceback", "ConnectError", "ReadError")
"""Words of a library that no message has."""


def closed_port() -> TcpAddress:
    return TcpAddress("127.0.0.1", free_port())


@asynccontextmanager
async def answering(answer: bytes) -> AsyncIterator[TcpAddress]:
    """A server that says one thing and hangs up."""

    async def handle(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(answer)

    async with trio.open_nursery() as nursery:
        [listener] = await nursery.start(partial(trio.serve_tcp, handle, 0, host="127.0.0.1"))
        yield TcpAddress("127.0.0.1", listener.socket.getsockname()[1])
        nursery.cancel_scope.cancel()


async def complaint(site: Site, address: TcpAddress, holder: str = "alice", **changes: Any) -> str:
    """What the client says about a KME."""
    async with KmeClient(site.access(holder, address, **changes)) as client:
        with pytest.raises(KeySourceError) as caught:
            await client.enc_keys("bob", KeyRequest(size=257))
    return str(caught.value)


@pytest.mark.parametrize("tls", ["stdlib", "hybridkex"])
async def test_what_the_client_says(site: Site, serve: Any, tmp_path: Path, tls: str) -> None:
    config = site.pair(tls=tls)
    other_ca = DevCa.create("another authority")
    stranger = tmp_path / "stranger"
    write_identity(stranger, other_ca, other_ca.issue("127.0.0.1", common_name="alice"))
    said: dict[str, str] = {}
    async with serve(config) as where:
        address = where.kmes["kme-a"]
        said["answered 400: size shall be a multiple of 8"] = await complaint(
            site, address, tls=tls
        )
        said["answered 401: Unauthorized"] = await complaint(site, address, "mallory", tls=tls)
        said["our certificate"] = await complaint(
            site, address, tls=tls, certificate=stranger / "cert.pem", key=stranger / "key.pem"
        )
        said["certificate"] = await complaint(site, address, tls=tls, ca=stranger / "ca.pem")
        said["The KME is kme-a, not kme-z".replace("The", "the")] = await complaint(
            site, address, tls=tls, kme_id="kme-z"
        )
    said[
        "cannot be reached: Connection refused; check that it runs, and its address"
    ] = await complaint(site, closed_port(), tls=tls)
    async with answering(b"HTTP/1.1 400 Bad Request\r\n\r\n") as plain:
        said["cannot be used"] = await complaint(site, plain, tls=tls)
    for expected, text in said.items():
        assert expected in text
        assert "\n" not in text
        assert not [word for word in RAW if word in text], text


async def test_both_ends_say_that_their_configurations_do_not_fit(
    site: Site, serve: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for known, saes, why in (
        ("kme-x", ("alice",), "no peer KME has that ID here"),
        ("kme-a", ("alicia",), "it draws for an SAE that is not among its saes here"),
    ):
        caplog.clear()
        there = PeerConfig(id=known, saes=saes, url="https://127.0.0.1:1")
        async with serve(ServeConfig(kme=(site.kme("kme-b", saes=("bob",), peer=(there,)),))) as b:
            url = f"https://{b.kmes['kme-b']}"
            here = PeerConfig(id="kme-b", saes=("bob",), url=url)
            kme_a = site.kme("kme-a", saes=("alice",), peer=(here,))
            async with serve(ServeConfig(kme=(kme_a,))) as a:
                await filled(a, site)
                async with as_sae(site, "alice", a.kmes["kme-a"]) as alice:
                    assert (await alice.get("/bob/enc_keys")).status_code == 503
        said = [one for one in caplog.messages if "401" in one]
        assert sorted(said) == [
            "kme-a: the KME kme-b: it answered 401: no peer has our ID there, or not our saes; "
            "compare both files. Requests for its SAEs get 503 until it answers",
            f"kme-b: a certificate of our authority names kme-a, and {why}: it got 401",
        ]


OF_OUR_CERTIFICATE = (
    *(Alert.BAD_CERTIFICATE, Alert.UNSUPPORTED_CERTIFICATE, Alert.CERTIFICATE_REVOKED),
    *(Alert.CERTIFICATE_EXPIRED, Alert.CERTIFICATE_UNKNOWN, Alert.UNKNOWN_CA),
    *(Alert.ACCESS_DENIED, Alert.CERTIFICATE_REQUIRED),
)
NOTHING_IN_COMMON = (
    Alert.HANDSHAKE_FAILURE,
    Alert.PROTOCOL_VERSION,
    Alert.INSUFFICIENT_SECURITY,
)


@pytest.mark.parametrize("tls", TLS_KINDS)
@pytest.mark.parametrize("alert", sorted({*Alert} - {Alert.CLOSE_NOTIFY, Alert.USER_CANCELED}))
async def test_an_alert_of_the_kme(site: Site, alert: Alert, tls: str) -> None:
    """Only the alerts that speak of our certificate are taken for a refusal of it."""
    async with answering(bytes([21, 3, 3, 0, 2, 2, alert])) as address:
        said = await complaint(site, address, tls=tls)
    assert ("refused our certificate" in said) == (alert in OF_OUR_CERTIFICATE), said
    assert ("--kme-tls" in said) == (alert in NOTHING_IN_COMMON), said
    assert not [word for word in RAW if word in said], said


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("shown", ["no certificate", "a foreign one"])
async def test_a_client_that_is_refused_learns_why(
    site: Site, serve: Any, tmp_path: Path, shown: str, version: ssl.TLSVersion
) -> None:
    """By an alert, and not only by the end of the connection."""
    other_ca = DevCa.create("another authority")
    write_identity(tmp_path / "own", other_ca, other_ca.issue("127.0.0.1", common_name="alice"))
    context = ssl.create_default_context(cafile=str(site.access("alice", closed_port()).ca))
    context.maximum_version = version
    if shown != "no certificate":
        context.load_cert_chain(tmp_path / "own" / "cert.pem", tmp_path / "own" / "key.pem")
    async with serve(site.pair()) as where:
        address = where.kmes["kme-a"]
        tcp = await trio.open_tcp_stream(address.host, address.port)
        stream = trio.SSLStream(tcp, context, server_hostname="127.0.0.1")
        with pytest.raises(trio.BrokenResourceError) as caught:
            await stream.receive_some()
        await trio.aclose_forcefully(stream)
    assert "ALERT" in str(caught.value.__cause__)


@pytest.mark.parametrize("tls", TLS_KINDS)
def test_a_key_that_is_not_that_of_the_certificate(site: Site, tmp_path: Path, tls: str) -> None:
    """As while they are renewed, one after the other."""
    ours, other = tmp_path / "ours", tmp_path / "other"
    for place in (ours, other):
        ca = DevCa.create("an authority")
        write_identity(place, ca, ca.issue("127.0.0.1", common_name="alice"))
    for make in (client_tls, server_tls):
        with pytest.raises(ConfigError, match="private key is not that of the certificate") as said:
            make(tls, ca=ours / "ca.pem", certificate=ours / "cert.pem", key=other / "key.pem")
        assert str(ours / "cert.pem") in str(said.value)
        assert not [word for word in RAW if word in str(said.value)]


@pytest.mark.parametrize("tls", TLS_KINDS)
@pytest.mark.parametrize(
    "make_key",
    [
        lambda: ec.generate_private_key(ec.SECP384R1()),
        lambda: ec.generate_private_key(ec.SECP224R1()),
        lambda: rsa.generate_private_key(65537, 2048),
        ed25519.Ed25519PrivateKey.generate,
        x25519.X25519PrivateKey.generate,
        mldsa.MLDSA65PrivateKey.generate,
    ],
    ids=["P-384", "P-224", "RSA", "Ed25519", "X25519", "ML-DSA-65"],
)
def test_a_key_of_another_kind_than_the_certificate(
    site: Site, make_key: Callable[[], Any], tls: str
) -> None:
    """OpenSSL calls each of them by another name: no certificate assigned, unknown type."""
    folder = site.holder("alice")
    (folder / "key.pem").write_bytes(
        make_key().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    files = {"certificate": folder / "cert.pem", "key": folder / "key.pem"}
    for make in (client_tls, server_tls):
        with pytest.raises(ConfigError, match="private key is not that of the certificate") as said:
            make(tls, ca=folder / "ca.pem", **files)
        assert not [word for word in RAW if word in str(said.value)]


@pytest.mark.parametrize("tls", TLS_KINDS)
@pytest.mark.parametrize("which", ["ca", "certificate", "key"])
def test_a_file_that_cannot_be_read(site: Site, which: str, tls: str) -> None:
    """Its name has characters that a library's words do not have."""
    folder = site.holder("alice")
    missing = folder / "our_own [1] <é>.pem"
    files = {name: folder / f"{name[:4].rstrip('i')}.pem" for name in ("ca", "certificate", "key")}
    files[which] = missing
    for make in (client_tls, server_tls):
        with pytest.raises(ConfigError) as said:
            make(tls, **files)
        assert str(said.value) == f"cannot read {missing}: No such file or directory"


async def test_what_a_kme_says_about_keys(
    site: Site, serve: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "hybridkex.kme")
    async with serve(site.pair(limits=KmeLimits(max_key_count=128))) as where:
        await filled(where, site, 128)
        async with (
            as_sae(site, "alice", where.kmes["kme-a"]) as alice,
            as_sae(site, "bob", where.kmes["kme-b"]) as bob,
            as_sae(site, "mal lory", where.kmes["kme-b"]) as mallory,
        ):
            [key] = (await alice.get("/bob/enc_keys")).json()["keys"]
            await bob.get("/alice/dec_keys", params={"key_ID": key["key_ID"]})
            await bob.get("/alice/dec_keys", params={"key_ID": key["key_ID"]})
            for _ in range(20):
                answer = await alice.get("/bob/enc_keys?number=128&size=512")
                assert answer.status_code == 503
            for _ in range(200):
                await mallory.get("/alice/status")
    lines = [(record.levelname, record.getMessage()) for record in caplog.records]
    key_id = key["key_ID"]
    assert ("INFO", f"kme-a: alice drew 1 keys for bob: {key_id}") in lines
    assert ("INFO", f"kme-b: bob collected 1 keys of alice: {key_id}") in lines
    assert ("INFO", "kme-a: the KME kme-b answers") in lines
    [again] = [text for _, text in lines if "dec_keys of bob: 400" in text]
    assert "not found" in again
    short = [text for level, text in lines if level == "WARNING" and "is short of keys" in text]
    assert 1 <= len(short) <= 6, "at a bounded rate"
    strangers = [text for level, text in lines if level == "WARNING" and "mal lory" in text]
    assert 1 <= len(strangers) <= 25, "at a bounded rate"
    assert not [text for _, text in lines if key["key"] in text or "\n" in text]


async def test_what_a_kme_says_about_its_peer(
    site: Site, serve: Any, caplog: pytest.LogCaptureFixture
) -> None:
    address = closed_port()
    here = site.kme(
        "kme-a",
        saes=("alice",),
        peer=(PeerConfig(id="kme-b", saes=("bob",), url=f"https://{address}"),),
    )
    there = site.kme(
        "kme-b",
        saes=("bob",),
        listen=address,
        peer=(PeerConfig(id="kme-a", saes=("alice",), url="https://127.0.0.1:1"),),
    )
    async with serve(ServeConfig(kme=(here,))) as a:
        await filled(a, site)
        async with as_sae(site, "alice", a.kmes["kme-a"]) as alice:
            for _ in range(3):
                assert (await alice.get("/bob/enc_keys")).status_code == 503
            async with serve(ServeConfig(kme=(there,))):
                assert (await alice.get("/bob/enc_keys")).status_code == 200
    told = [record.getMessage() for record in caplog.records if "the KME kme-b" in record.message]
    assert told == [
        "kme-a: the KME kme-b: it cannot be reached: Connection refused; check that it runs, and "
        "its address. Requests for its SAEs get 503 until it answers",
        "kme-a: the KME kme-b answers again",
    ]


async def test_what_a_kme_says_about_an_expired_certificate_of_an_sae(
    site: Site, serve: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It expired while the SAE ran: at the start the SAE would have been refused."""
    monkeypatch.setattr(certificates, "not_valid_today", lambda *_: None)
    past = datetime.now(UTC) - timedelta(days=30)
    folder = site.folder / "late"
    write_identity(
        folder,
        site.ca,
        site.ca.issue(
            "127.0.0.1", common_name="alice", not_before=past, not_after=past + timedelta(days=1)
        ),
    )
    async with serve(site.pair()) as where:
        access = replace(
            site.access("alice", where.kmes["kme-a"]),
            certificate=folder / "cert.pem",
            key=folder / "key.pem",
        )
        async with KmeClient(access) as client:
            with pytest.raises(KeySourceError, match="our certificate"):
                await client.status("bob")
    [line] = [record for record in caplog.records if "expired" in record.getMessage()]
    assert line.levelname == "WARNING"
    assert "its certificate is not accepted: certificate has expired" in line.getMessage()


@pytest.mark.parametrize("tls", TLS_KINDS)
def test_an_expired_certificate_of_our_own(site: Site, tls: str) -> None:
    past = datetime.now(UTC) - timedelta(days=30)
    folder = site.folder / "late"
    identity = site.ca.issue("127.0.0.1", not_before=past, not_after=past + timedelta(days=1))
    write_identity(folder, site.ca, identity)
    files = {"certificate": folder / "cert.pem", "key": folder / "key.pem"}
    for make in (client_tls, server_tls):
        with pytest.raises(ConfigError, match=r"our own certificate .* expired on .*cert\.pem"):
            make(tls, ca=folder / "ca.pem", **files)


@pytest.mark.parametrize(
    ("name", "days", "words"),
    [
        ("localhost", 365, ["names localhost by the rule cn, not us"]),
        ("kme-a", 3, ["expires on"]),
        ("localhost", 3, ["not us", "expires on"]),
        ("kme-a", 365, []),
    ],
)
def test_what_a_kme_says_about_its_own_certificate(
    site: Site, caplog: pytest.LogCaptureFixture, name: str, days: int, words: list[str]
) -> None:
    config = site.kme("kme-a", saes=("alice",), self_pairs=True)
    folder = site.folder / "own"
    ends = datetime.now(UTC) + timedelta(days=days)
    identity = site.ca.issue(
        "127.0.0.1", common_name=name, not_before=ends - timedelta(days=400), not_after=ends
    )
    write_identity(folder, site.ca, identity)
    server = KmeServer(
        ServeConfig(kme=(replace(config, certificate=folder / "cert.pem", key=folder / "key.pem"),))
    )
    for store in server._stores.values():
        store.close()
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == len(words)
    for text, word in zip(told, words, strict=True):
        assert text.startswith("kme-a: our own certificate")
        assert word in text


@pytest.mark.parametrize("tls", TLS_KINDS)
async def test_a_running_kme_warns_before_certificates_expire(
    site: Site,
    serve: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tls: str,
) -> None:
    """Its own, and those that its SAEs and the other KME show, at either end of a connection."""
    now = datetime.now(UTC)
    for name, days in (("kme-b", 50), ("kme-a", 100), ("alice", 200), ("carol", 3)):
        begins, ends = now - timedelta(days=100), now + timedelta(days=days)
        dates = {"not_before": begins, "not_after": ends}
        identity = site.ca.issue("127.0.0.1", "localhost", common_name=name, **dates)
        write_identity(site.folder / name, site.ca, identity)
    today = 0

    class Clock(datetime):
        @classmethod
        def now(cls, tz: object = None) -> "Clock":
            return now + timedelta(days=today)  # type: ignore[return-value]

    monkeypatch.setattr(expiry, "datetime", Clock)
    monkeypatch.setattr(expiry_watch, "CHECK_EVERY", 0.01)
    told: list[tuple[int, list[str]]] = []
    ports = closed_port(), closed_port()
    # Bob's KME reaches nobody: it sees the certificate of the other as a server.
    urls = f"https://{ports[1]}", "https://127.0.0.1:1"
    peers = [
        PeerConfig(id=one, saes=(sae,), url=url)
        for one, sae, url in zip(("kme-b", "kme-a"), ("bob", "alice"), urls, strict=True)
    ]
    here, there = (
        site.kme(kme, saes=(sae,), listen=port, peer=(peer,), tls=tls)
        for kme, sae, port, peer in zip(
            ("kme-a", "kme-b"), ("alice", "bob"), ports, peers, strict=True
        )
    )
    caplog.set_level("WARNING", "hybridkex.kme.serve")
    async with serve(ServeConfig(kme=(there,))), serve(ServeConfig(kme=(here,))) as where:
        as_alice, as_carol = (
            replace(site.access(sae, where.kmes["kme-a"]), tls=tls) for sae in ("alice", "carol")
        )
        async with KmeClient(as_carol) as carol:
            with pytest.raises(KeySourceError):  # not attached: her certificate is not watched
                await carol.status("bob")
        async with KmeClient(as_alice) as alice:
            with trio.fail_after(20):
                while not (await alice.status("bob")).stored_key_count:  # noqa: ASYNC110
                    await trio.sleep(0.01)
            await alice.enc_keys("bob")
        for today in (0, 35, 37, 51, 80, 87, 101, 180, 187, 201, 500):
            await trio.sleep(0.1)
            lines = [record.getMessage() for record in caplog.records]
            told.append((today, [one for one in lines if " expire" in one]))
            caplog.clear()
    own = "our own certificate " + str(site.folder)
    remedy = "its owner must renew it, since it is refused from then on"
    dates = {
        name: f"{now + timedelta(days=days):%Y-%m-%d}"
        for name, days in (("kme-b", 50), ("kme-a", 100), ("alice", 200))
    }

    def lines_of(kme: str, other: str, verb: str) -> list[str]:
        return [
            f"{other}: the certificate of the KME {kme} {verb} on {dates[kme]}: {remedy}",
            f"{kme}: {own}/{kme}/cert.pem {verb} on {dates[kme]}: renew it",
        ]

    of_alice = f"kme-a: the certificate of the SAE alice %s on {dates['alice']}: {remedy}"
    assert [(day, sorted(lines)) for day, lines in told if lines] == [
        (37, sorted(lines_of("kme-b", "kme-a", "expires"))),
        (51, sorted(lines_of("kme-b", "kme-a", "expired"))),
        (87, sorted(lines_of("kme-a", "kme-b", "expires"))),
        (101, sorted(lines_of("kme-a", "kme-b", "expired"))),
        (187, [of_alice % "expires"]),
        (201, [of_alice % "expired"]),
    ]
