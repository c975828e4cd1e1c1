"""In memory against OpenSSL (the one in the `cryptography` wheel), in both roles."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from OpenSSL import SSL, crypto
from tls_glue import ANY_GROUP, data_of, drain

from hybridkex.auth import Identity, TrustStore
from hybridkex.constants import GroupCode
from hybridkex.crypto.kex import ALL_GROUPS, X25519, Group
from hybridkex.crypto.psk import ExternalPsk
from hybridkex.crypto.suites import ALL_SUITES, TLS_AES_128_GCM_SHA256, CipherSuite
from hybridkex.errors import AlertReceived, CertificateRejected
from hybridkex.secret import Secret
from hybridkex.tls.config import ClientConfig, ServerConfig
from hybridkex.tls.connection import ClientConnection, Connection, ServerConnection
from hybridkex.tls.events import CloseReceived, Event, KeyUpdated, TicketReceived
from hybridkex.tls.session import MemoryTicketStore

FIVE_LABELS = {
    "CLIENT_HANDSHAKE_TRAFFIC_SECRET",
    "SERVER_HANDSHAKE_TRAFFIC_SECRET",
    "CLIENT_TRAFFIC_SECRET_0",
    "SERVER_TRAFFIC_SECRET_0",
    "EXPORTER_SECRET",
}
ALGORITHMS = (
    "ecdsa",
    "ecdsa-p384",
    "ecdsa-p521",
    "rsa",
    "ed25519",
    "mldsa44",
    "mldsa65",
    "mldsa87",
)
OPENSSL_GROUPS = tuple(group for group in ALL_GROUPS if group.code in set(GroupCode))
"""Those of the registry; nobody else knows a private code point."""
EVERYTHING = ":".join(group.name for group in OPENSSL_GROUPS)


def context(
    *,
    leaf: Identity | None = None,
    trust: TrustStore | None = None,
    groups: str | None = None,
    suites: str | None = None,
    schemes: str | None = None,
    key_log: list[str] | None = None,
) -> SSL.Context:
    """OpenSSL's side of a configuration."""
    made = SSL.Context(SSL.TLS_METHOD)
    made.set_min_proto_version(SSL.TLS1_3_VERSION)
    if leaf is not None:
        # Through PEM, since use_privatekey does not take the key objects of ML-DSA.
        pem = leaf.private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            made.use_privatekey(crypto.load_privatekey(crypto.FILETYPE_PEM, pem))
        made.use_certificate(leaf.leaf)
        for other in leaf.chain[1:]:
            made.add_extra_chain_cert(x509.load_der_x509_certificate(other))
    if trust is not None:
        store = made.get_cert_store()
        for authority in trust.authorities:
            store.add_cert(SSL.X509.from_cryptography(authority))
        made.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT)
    if suites is not None:
        made.set_tls13_ciphersuites(suites.encode())
    # pyOpenSSL has no method for these two; its binding has the functions.
    if groups is not None:
        assert SSL._lib.SSL_CTX_set1_curves_list(made._context, groups.encode()) == 1
    if schemes is not None:
        assert SSL._lib.SSL_CTX_set1_sigalgs_list(made._context, schemes.encode()) == 1
    if key_log is not None:
        made.set_keylog_callback(lambda _, line: key_log.append(line.decode()))
    return made


class Mixed:
    """Our engine on one side, OpenSSL on the other."""

    def __init__(self, ours: Connection, theirs: SSL.Connection) -> None:
        self.ours = ours
        self.theirs = theirs
        self.events: list[Event] = []
        self.received = b""
        self.done = False

    def pump(self) -> None:
        """Carry bytes until both are silent."""
        moved = True
        while moved:
            moved = False
            if data := bytes(self.ours.data_to_send()):
                self.theirs.bio_write(data)
                moved = True
            self._let_openssl_work()
            try:
                data = self.theirs.bio_read(1 << 20)
            except SSL.WantReadError:
                continue
            self.ours.receive_data(data)
            self.events += drain(self.ours)
            moved = True

    def _let_openssl_work(self) -> None:
        try:
            if not self.done:
                self.theirs.do_handshake()
                self.done = True
            while True:
                self.received += self.theirs.recv(1 << 16)
        except (SSL.WantReadError, SSL.ZeroReturnError):
            pass

    def exchange(self, out: bytes, back: bytes) -> None:
        """Data both ways, checked."""
        self.received, before = b"", len(self.events)
        self.ours.send_data(out)
        self.theirs.sendall(back)
        self.pump()
        assert self.received == out
        assert data_of(self.events[before:]) == back

    def finish(self) -> "Mixed":
        self.pump()
        assert self.done
        assert self.ours.handshake_complete
        self.exchange(b"from us" * 3000, b"from OpenSSL" * 3000)
        for label, extra, length in ((b"EXPORTER-a", b"", 32), (b"EXPORTER-b", b"context", 99)):
            ours = self.ours.export(label, extra, length).reveal()
            assert ours == self.theirs.export_keying_material(label, length, extra)
        assert self.theirs.get_cipher_name() == self.ours.session.cipher_suite
        return self


def we_connect(config: ClientConfig, server: SSL.Context) -> Mixed:
    theirs = SSL.Connection(server)
    theirs.set_accept_state()
    ours = ClientConnection(config, "localhost")
    ours.start()
    return Mixed(ours, theirs)


def they_connect(
    config: ServerConfig, client: SSL.Context, session: SSL.Session | None = None
) -> Mixed:
    theirs = SSL.Connection(client)
    theirs.set_connect_state()
    theirs.set_tlsext_host_name(b"localhost")
    if session is not None:
        theirs.set_session(session)
    return Mixed(ServerConnection(config), theirs)


def same_secrets(ours: list[str], theirs: list[str], labels: set[str] = FIVE_LABELS) -> None:
    """Label by label; OpenSSL's log has lines of its own beside those."""

    def by_label(lines: list[str]) -> dict[str, str]:
        return {line.split()[0]: line for line in lines if line.split()[0] in labels}

    assert set(by_label(ours)) == labels
    assert by_label(ours) == by_label(theirs)


@pytest.mark.parametrize("suite", ALL_SUITES, ids=str)
@pytest.mark.parametrize("group", OPENSSL_GROUPS, ids=str)
def test_we_connect(
    group: Group, suite: CipherSuite, trust: TrustStore, identity: Identity
) -> None:
    ours: list[str] = []
    theirs: list[str] = []
    pair = we_connect(
        ClientConfig(
            verifier=trust, groups=(group,), suites=(suite,), policy=ANY_GROUP, key_log=ours.append
        ),
        context(leaf=identity, groups=EVERYTHING, key_log=theirs),
    ).finish()
    assert pair.ours.session.group == group.name
    assert (pair.theirs.get_group_name() or "").lower() == group.name.lower()
    same_secrets(ours, theirs)


@pytest.mark.parametrize("suite", ALL_SUITES, ids=str)
@pytest.mark.parametrize("group", OPENSSL_GROUPS, ids=str)
def test_they_connect(
    group: Group, suite: CipherSuite, trust: TrustStore, identity: Identity
) -> None:
    ours: list[str] = []
    theirs: list[str] = []
    pair = they_connect(
        ServerConfig(
            identities=(identity,), groups=OPENSSL_GROUPS, policy=ANY_GROUP, key_log=ours.append
        ),
        context(trust=trust, groups=group.name, suites=suite.name, key_log=theirs),
    ).finish()
    assert pair.ours.session.group == group.name
    assert pair.ours.session.cipher_suite == suite.name
    assert pair.ours.session.server_name == "localhost"
    same_secrets(ours, theirs)


def test_both_default_to_the_hybrid(trust: TrustStore, identity: Identity) -> None:
    for pair in (
        we_connect(ClientConfig(verifier=trust), context(leaf=identity)),
        they_connect(ServerConfig(identities=(identity,)), context(trust=trust)),
    ):
        assert pair.finish().theirs.get_group_name() == "X25519MLKEM768"


def test_openssl_asks_us_for_another_share(trust: TrustStore, identity: Identity) -> None:
    for last in OPENSSL_GROUPS[1:]:
        ours: list[str] = []
        theirs: list[str] = []
        pair = we_connect(
            ClientConfig(
                verifier=trust,
                groups=(OPENSSL_GROUPS[0], last),
                policy=ANY_GROUP,
                key_log=ours.append,
            ),
            context(leaf=identity, groups=last.name, key_log=theirs),
        ).finish()
        assert pair.ours.session.group == last.name
        same_secrets(ours, theirs)


def test_we_ask_openssl_for_another_share(trust: TrustStore, identity: Identity) -> None:
    for last in OPENSSL_GROUPS[1:]:
        ours: list[str] = []
        theirs: list[str] = []
        pair = they_connect(
            ServerConfig(
                identities=(identity,), groups=(last,), policy=ANY_GROUP, key_log=ours.append
            ),
            # Its list in this order sends one share, of the first group.
            context(trust=trust, groups=f"X25519MLKEM768:{last.name}", key_log=theirs),
        ).finish()
        assert pair.ours.session.group == last.name
        same_secrets(ours, theirs)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_certificates_of_openssl(algorithm: str, issue: Any, client_identity: Identity) -> None:
    trust, leaf = issue(algorithm)
    pair = we_connect(ClientConfig(verifier=trust), context(leaf=leaf)).finish()
    assert pair.ours.session.peer_subject == "CN=localhost"
    server = ServerConfig(
        identities=(leaf,), client_verifier=trust, require_client_certificate=True
    )
    pair = they_connect(server, context(leaf=leaf, trust=trust)).finish()
    assert pair.ours.session.peer_subject == "CN=localhost"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_certificates_of_ours(algorithm: str, issue: Any) -> None:
    trust, leaf = issue(algorithm)
    pair = they_connect(ServerConfig(identities=(leaf,)), context(trust=trust)).finish()
    peer = pair.theirs.get_peer_certificate(as_cryptography=True)
    assert peer == leaf.leaf
    pair = we_connect(
        ClientConfig(verifier=trust, identity=leaf), context(leaf=leaf, trust=trust)
    ).finish()
    assert pair.theirs.get_peer_certificate(as_cryptography=True) == leaf.leaf


def test_openssl_has_no_certificate_for_us(trust: TrustStore, identity: Identity) -> None:
    server = ServerConfig(identities=(identity,), client_verifier=trust)
    pair = they_connect(server, context(trust=trust)).finish()
    assert pair.ours.session.peer_credential is None
    strict = ServerConfig(
        identities=(identity,), client_verifier=trust, require_client_certificate=True
    )
    pair = they_connect(strict, context(trust=trust))
    with pytest.raises(CertificateRejected):
        pair.pump()
    pair.theirs.bio_write(bytes(pair.ours.data_to_send()))
    with pytest.raises(SSL.Error, match="certificate required"):
        pair.theirs.recv(1)


def test_we_have_no_certificate_for_openssl(trust: TrustStore, identity: Identity) -> None:
    pair = we_connect(ClientConfig(verifier=trust), context(leaf=identity, trust=trust))
    with pytest.raises(SSL.Error, match="peer did not return a certificate"):
        pair.pump()
    pair.ours.receive_data(pair.theirs.bio_read(1 << 16))
    with pytest.raises(AlertReceived, match="certificate_required"):
        drain(pair.ours)


@pytest.mark.parametrize("suite", ALL_SUITES, ids=str)
def test_openssl_resumes_our_session(
    suite: CipherSuite, trust: TrustStore, identity: Identity
) -> None:
    ours: list[str] = []
    theirs: list[str] = []
    server = ServerConfig(identities=(identity,), suites=(suite,), key_log=ours.append)
    client = context(trust=trust, key_log=theirs)
    first = they_connect(server, client).finish()
    session = first.theirs.get_session()
    ours.clear()
    theirs.clear()
    second = they_connect(server, client, session).finish()
    assert second.ours.session.resumed
    assert second.ours.session.signature_scheme is None
    same_secrets(ours, theirs)


@pytest.mark.parametrize("suite", ALL_SUITES, ids=str)
def test_we_resume_a_session_of_openssl(
    suite: CipherSuite, trust: TrustStore, identity: Identity
) -> None:
    ours: list[str] = []
    theirs: list[str] = []
    config = ClientConfig(
        verifier=trust, suites=(suite,), ticket_store=MemoryTicketStore(), key_log=ours.append
    )
    server = context(leaf=identity, key_log=theirs)
    first = we_connect(config, server).finish()
    assert any(isinstance(event, TicketReceived) for event in first.events)
    ours.clear()
    theirs.clear()
    second = we_connect(config, server).finish()
    assert second.ours.session.resumed
    same_secrets(ours, theirs)
    # Another server knows nothing of the ticket, and the handshake is a full one.
    assert not we_connect(config, context(leaf=identity)).finish().ours.session.resumed


def test_resumption_with_hello_retry_request(trust: TrustStore, identity: Identity) -> None:
    config = ClientConfig(
        verifier=trust,
        groups=(OPENSSL_GROUPS[0], X25519),
        policy=ANY_GROUP,
        ticket_store=MemoryTicketStore(),
    )
    server = context(leaf=identity, groups="x25519")
    we_connect(config, server).finish()
    assert we_connect(config, server).finish().ours.session.resumed

    ours = ServerConfig(identities=(identity,), groups=(X25519,), policy=ANY_GROUP)
    client = context(trust=trust, groups="X25519MLKEM768:x25519")
    # OpenSSL spoils the session of a connection that is freed before its close: keep it.
    first = they_connect(ours, client).finish()
    session = first.theirs.get_session()
    assert they_connect(ours, client, session).finish().ours.session.resumed


def test_key_update(trust: TrustStore, identity: Identity) -> None:
    for pair in (
        we_connect(ClientConfig(verifier=trust), context(leaf=identity)),
        they_connect(ServerConfig(identities=(identity,)), context(trust=trust)),
    ):
        pair.finish()
        for request in (False, True, True):
            pair.ours.update_keys(request_peer=request)
            pair.exchange(b"under the next key", b"and back" * 5000)
            pair.exchange(b"once more", b"the answer to a request comes before this")
        answered = [event.generation for event in pair.events if isinstance(event, KeyUpdated)]
        assert answered == [1, 2]  # OpenSSL does what it is asked


def test_alpn(trust: TrustStore, identity: Identity) -> None:
    server = context(leaf=identity)
    server.set_alpn_select_callback(lambda _, offered: offered[-1])
    pair = we_connect(ClientConfig(verifier=trust, alpn=("h2", "http/1.1")), server).finish()
    assert pair.ours.session.alpn == "http/1.1"

    client = context(trust=trust)
    client.set_alpn_protos([b"h2", b"http/1.1"])
    pair = they_connect(ServerConfig(identities=(identity,), alpn=("http/1.1",)), client).finish()
    assert pair.theirs.get_alpn_proto_negotiated() == b"http/1.1"


def test_record_size_limit_is_optional(trust: TrustStore, identity: Identity) -> None:
    """OpenSSL does not know the extension: it ignores ours and sends none."""
    we_connect(ClientConfig(verifier=trust, record_size_limit=100), context(leaf=identity)).finish()
    they_connect(
        ServerConfig(identities=(identity,), record_size_limit=100), context(trust=trust)
    ).finish()


def test_close(trust: TrustStore, identity: Identity) -> None:
    for pair in (
        we_connect(ClientConfig(verifier=trust), context(leaf=identity)),
        they_connect(ServerConfig(identities=(identity,)), context(trust=trust)),
    ):
        pair.finish()
        pair.ours.send_close()
        pair.pump()
        assert pair.theirs.get_shutdown() & SSL.RECEIVED_SHUTDOWN
        pair.theirs.sendall(b"half-closed")
        pair.theirs.shutdown()
        pair.pump()
        assert isinstance(pair.events[-1], CloseReceived)
        assert data_of(pair.events[-2:]) == b"half-closed"


def test_openssl_hears_our_reason(identity: Identity, trust: TrustStore, issue: Any) -> None:
    stranger, _ = issue("ecdsa-p384")
    pair = we_connect(ClientConfig(verifier=stranger), context(leaf=identity))
    with pytest.raises(CertificateRejected):
        pair.pump()
    pair.theirs.bio_write(bytes(pair.ours.data_to_send()))
    with pytest.raises(SSL.Error, match="unknown ca"):
        pair.theirs.do_handshake()


def test_we_hear_openssls_reason(identity: Identity, issue: Any) -> None:
    stranger, _ = issue("ecdsa-p384")
    pair = they_connect(ServerConfig(identities=(identity,)), context(trust=stranger))
    with pytest.raises(SSL.Error, match="verify failed"):
        pair.pump()
    pair.ours.receive_data(pair.theirs.bio_read(1 << 16))
    with pytest.raises(AlertReceived, match="unknown_ca"):
        drain(pair.ours)


# --- external PSKs through the callbacks of the binding ------------------------------------------

PSK = ExternalPsk(identity=b"qkd key 1", key=Secret(bytes(range(32))))
Callback = Callable[..., int]


def psk_client(made: SSL.Context, key: bytes) -> Callback:
    @SSL._ffi.callback(
        "unsigned int(SSL *, const char *, char *, unsigned int, unsigned char *, unsigned int)"
    )
    def give(_: Any, __: Any, identity: Any, ___: int, out: Any, room: int) -> int:
        SSL._ffi.memmove(identity, PSK.identity + b"\0", len(PSK.identity) + 1)
        SSL._ffi.memmove(out, key, len(key))
        return len(key)

    SSL._lib.SSL_CTX_set_psk_client_callback(made._context, give)
    return give  # type: ignore[no-any-return]


def psk_server(made: SSL.Context, key: bytes) -> Callback:
    @SSL._ffi.callback("unsigned int(SSL *, const char *, unsigned char *, unsigned int)")
    def give(_: Any, identity: Any, out: Any, room: int) -> int:
        if SSL._ffi.string(identity) != PSK.identity:
            return 0
        SSL._ffi.memmove(out, key, len(key))
        return len(key)

    SSL._lib.SSL_CTX_set_psk_server_callback(made._context, give)
    return give  # type: ignore[no-any-return]


def test_external_psk_with_openssl_as_the_server() -> None:
    ours: list[str] = []
    theirs: list[str] = []
    server = context(suites=TLS_AES_128_GCM_SHA256.name, key_log=theirs)
    keep = psk_server(server, PSK.key.reveal())
    pair = we_connect(ClientConfig(psks=(PSK,), key_log=ours.append), server).finish()
    assert pair.ours.session.psk_identity == PSK.identity
    same_secrets(ours, theirs)
    assert keep is not None


def test_external_psk_with_openssl_as_the_client() -> None:
    ours: list[str] = []
    theirs: list[str] = []
    client = context(key_log=theirs)
    client.set_verify(SSL.VERIFY_PEER)
    keep = psk_client(client, PSK.key.reveal())
    pair = they_connect(ServerConfig(psks=(PSK,), key_log=ours.append), client).finish()
    assert pair.ours.session.psk_identity == PSK.identity
    same_secrets(ours, theirs)
    assert keep is not None
