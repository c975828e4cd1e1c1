"""The program that BoGo's runner tests: one process per test; flags describe its connections.

It speaks through the public engine alone (:mod:`hybridkex.tls`), over a blocking socket. Failures
go to standard error as ``:NAME:``, the class of the error; ``config.json`` maps BoringSSL's names
to these. Exit code 89 means that a flag requires something that hybridkex does not have.
"""

import re
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from hybridkex.auth import (
    Identity,
    InsecureNoVerification,
    PeerName,
    Pins,
    RawIdentity,
    VerifiedPeer,
)
from hybridkex.constants import Alert, CertificateType
from hybridkex.crypto.kex import ALL_GROUPS, CLASSICAL_GROUPS, X25519MLKEM768, Group, Property
from hybridkex.crypto.psk import ExternalPsk
from hybridkex.crypto.signatures import ALL_SCHEMES, SignatureScheme
from hybridkex.crypto.suites import ALL_SUITES, SHA256, SHA384
from hybridkex.errors import (
    AlertReceived,
    CertificateRejected,
    ConfigError,
    HybridkexError,
    TruncationError,
)
from hybridkex.secret import Secret
from hybridkex.tls.config import ClientConfig, Limits, ServerConfig
from hybridkex.tls.connection import ClientConnection, Connection, ServerConnection
from hybridkex.tls.events import (
    ApplicationData,
    CloseReceived,
    SessionProposed,
    TicketReceived,
)
from hybridkex.tls.policy import Authentication, Policy, Requirement
from hybridkex.tls.session import MemoryTicketStore, Session
from hybridkex.tls.tickets import TicketIssuer
from interop.bogo.flags import Credential, Flags, Unimplemented, parse

UNIMPLEMENTED = 89
FAILED = 1

TLS13 = 0x0304
DEFAULT_GROUPS = (X25519MLKEM768, *CLASSICAL_GROUPS)
# What BoringSSL verifies by default; tests called VerifyDefault hold to it.
DEFAULT_VERIFY = (0x0403, 0x0804, 0x0503, 0x0805, 0x0806)


class Mismatch(Exception):
    """The connection works but differs from what the runner expects."""


class Refusing:
    """Refuses every certificate (``-verify-fail``).

    The alert is BoringSSL's for its own and for a custom callback.
    """

    def __init__(self, *, custom: bool) -> None:
        self.alert = Alert.CERTIFICATE_UNKNOWN if custom else Alert.HANDSHAKE_FAILURE

    def verify_server(self, chain: Sequence[bytes], name: object, **_: object) -> VerifiedPeer:
        """Refuse every certificate."""
        raise CertificateRejected("refused", alert=self.alert)

    def verify_client(self, chain: Sequence[bytes], **_: object) -> VerifiedPeer:
        """Refuse every certificate."""
        raise CertificateRejected("refused", alert=self.alert)


class OneKey:
    """One raw public key, and no certificate."""

    def __init__(self, pins: Pins) -> None:
        self.pins = pins

    def verify_server_key(
        self, spki: bytes, name: PeerName | None, *, at: datetime | None = None
    ) -> VerifiedPeer:
        """Accept the key that the runner named."""
        return self.pins.verify_server_key(spki, name)

    def verify_client_key(self, spki: bytes, *, at: datetime | None = None) -> VerifiedPeer:
        """Accept the key that the runner named."""
        return self.pins.verify_client_key(spki)


class AnyKind(OneKey, InsecureNoVerification):
    """Any certificate, and one raw public key."""


class AnyName(Identity):
    """BoringSSL's shim answers to every name, whatever its certificate says."""

    def matches(self, name: object) -> bool:
        """Match every name."""
        return True


class AnyRawName(RawIdentity):
    """A raw key for every name."""

    def matches(self, name: object) -> bool:
        """Match every name."""
        return True


class Shim:
    """All the connections of one test, and what they share."""

    def __init__(self, initial: Flags, resume: Flags) -> None:
        self.initial = initial
        self.resume = resume
        self.now = float(int(time.time()))
        # BoringSSL's shim has such a clock too: the runner compares the age of a ticket to the
        # millisecond.
        self.store = MemoryTicketStore(clock=self.clock)
        self.tickets = TicketIssuer(clock=self.clock)

    def clock(self) -> float:
        """Seconds since the epoch, which pass when the runner says so."""
        return self.now

    def run(self) -> None:
        """Run the connections one after the other."""
        for count in range(self.initial.number("resume-count") + 1):
            flags = self.resume if count else self.initial
            if count:
                self.now += flags.number("resumption-delay")
            ShimConnection(self, flags, resume=count > 0).run()


class ShimConnection:
    """Run one connection, from its configuration to its close."""

    def __init__(self, shim: Shim, flags: Flags, *, resume: bool) -> None:
        self.shim = shim
        self.flags = flags
        self.resume = resume
        self.is_server = flags.on("server")
        self.signed_with: list[Any] = []
        self.secrets: dict[str, bytes] = {}
        self.hello_retry = False
        self.got_ticket = False
        self.closed = False
        self.pending = bytearray()
        self.credentials = flags.credentials()
        self.keys: list[Any] = [self._load(one) for one in self.credentials]
        self.engine = self._engine()

    # --- configuration ------------------------------------------------------------------------

    def _load(self, credential: Credential) -> Identity | RawIdentity | ExternalPsk:
        if credential.kind == "psk":
            return ExternalPsk(
                identity=credential.decoded("psk-importer-identity"),
                key=Secret(credential.decoded("psk-importer-key")),
                context=credential.decoded("psk-importer-context"),
                hash=SHA384 if credential.on("psk-importer-sha384") else SHA256,
            )
        key_pem = Path(credential.text("key-file")).read_bytes()
        if credential.kind == "rpk":
            return AnyRawName(load_pem_private_key(key_pem, None))
        chain = x509.load_pem_x509_certificates(Path(credential.text("cert-file")).read_bytes())
        key: Any = load_pem_private_key(key_pem, None)
        return AnyName(tuple(one.public_bytes(Encoding.DER) for one in chain), key)

    def _engine(self) -> Connection:
        flags = self.flags
        if flags.text("expect-early-data-reason", "disabled") != "disabled":
            raise Unimplemented("expect-early-data-reason")
        if flags.text("use-client-ca-list", "<NULL>") not in ("<NULL>", "<EMPTY>"):
            raise Unimplemented("use-client-ca-list")
        low, high = flags.number("min-version"), flags.number("max-version", TLS13)
        if not low <= TLS13 <= high:
            raise Unimplemented("versions without TLS 1.3")
        identities = [one for one in self.keys if not isinstance(one, ExternalPsk)]
        psks = tuple(one for one in self.keys if isinstance(one, ExternalPsk))
        shared: dict[str, Any] = {
            "groups": self._groups(),
            "signature_schemes": self._schemes(),
            "psks": psks,
            "key_log": self._log,
            "clock": self.shim.clock,
        }
        if flags.on("max-cert-list"):
            shared["limits"] = Limits(certificate_message=flags.number("max-cert-list"))
        policy: dict[str, Any] = {"post_quantum": Requirement.PREFER}
        if self.is_server:
            if psks:
                both = bool(identities)
                policy["authentication"] = Authentication.EITHER if both else Authentication.PSK
                policy["psk"] = Requirement.PREFER if both else Requirement.REQUIRE
                if flags.on("require-any-client-certificate"):
                    raise Unimplemented("a client's certificate where a PSK is enough")
            by_psk = policy.get("authentication") is Authentication.PSK
            return ServerConnection(
                ServerConfig(
                    **shared,
                    policy=Policy(**policy),
                    identities=tuple(identities),
                    alpn=self._server_alpn(),
                    client_verifier=None if by_psk else self._verifier(asked=True),
                    require_client_certificate=flags.on("require-any-client-certificate"),
                    tickets=None if flags.on("no-ticket") else self.shim.tickets,
                )
            )
        if psks:
            either = flags.on("verify-peer")
            policy["authentication"] = Authentication.EITHER if either else Authentication.PSK
            policy["psk"] = Requirement.PREFER if either else Requirement.REQUIRE
        if len(identities) > 1:
            raise Unimplemented("a choice between a client's certificates")
        config = ClientConfig(
            **shared,
            policy=Policy(**policy),
            identity=identities[0] if identities else None,
            alpn=tuple(_alpn_list(flags.text("advertise-alpn"))),
            verifier=self._verifier(asked=False),
            ticket_store=self.shim.store,
            key_shares=self._key_shares(),
        )
        connection = ClientConnection(config, flags.text("host-name") or None)
        connection.start()
        return connection

    def _log(self, line: str) -> None:
        label, _, secret = line.split(" ")
        self.secrets[label] = bytes.fromhex(secret)

    def _groups(self) -> tuple[Group, ...]:
        wanted = self.flags.numbers("curves")
        if not wanted:
            return DEFAULT_GROUPS
        known = {group.code: group for group in ALL_GROUPS}
        if any(code not in known for code in wanted):
            raise Unimplemented("a group that we do not have")
        return tuple(known[code] for code in wanted)

    def _key_shares(self) -> tuple[Group, ...]:
        if self.flags.on("no-key-shares"):
            return ()
        groups = self._groups()
        wanted = self.flags.numbers("key-shares")
        if wanted:
            return tuple(group for group in groups if group.code in wanted)
        # BoringSSL sends a share of the first classical and of the first post-quantum group.
        first = {Property.POST_QUANTUM in group.properties: group for group in reversed(groups)}
        return tuple(group for group in groups if group in first.values())

    def _schemes(self) -> tuple[SignatureScheme, ...]:
        """The signature schemes to verify and sign with: one list here, two in BoringSSL."""
        known = {scheme.code: scheme for scheme in ALL_SCHEMES}
        verify = self.flags.numbers("verify-prefs")
        offered = [code for code in verify or DEFAULT_VERIFY if code in known]
        preferred = self.flags.default.numbers("signing-prefs")
        for credential in self.credentials:
            preferred += credential.numbers("signing-prefs")
        asks = self.flags.on("verify-peer") or self.flags.on("require-any-client-certificate")
        codes = [code for code in preferred if code in known]
        own = [getattr(one, "private_key", None) for one in self.keys]
        for code, scheme in known.items():
            if (self.is_server and not asks) or any(map(scheme.suits, own)):
                offered.append(code)
        # Where none is left, every use of the unknown ones is to be refused.
        codes = list(dict.fromkeys((*codes, *offered))) or list(DEFAULT_VERIFY)
        return tuple(self._recording(known[code]) for code in codes)

    def _recording(self, scheme: SignatureScheme) -> SignatureScheme:
        """A scheme that remembers whose key signed, and keeps to that credential's schemes."""

        def sign(key: Any, content: bytes) -> bytes:
            self.signed_with.append(key)
            return scheme.sign(key, content)

        def suits(key: Any) -> bool:
            for credential, identity in zip(self.credentials, self.keys, strict=True):
                prefs = credential.numbers("signing-prefs")
                if prefs and getattr(identity, "private_key", None) is key:
                    return scheme.code in prefs and scheme.suits(key)
            return scheme.suits(key)

        return replace(scheme, _sign=sign, suits=suits)

    def _server_alpn(self) -> tuple[str, ...]:
        if self.flags.on("reject-alpn"):
            return ("nothing that a test offers",)
        if self.flags.on("select-alpn") and not self.flags.on("decline-alpn"):
            return (self.flags.text("select-alpn"),)
        return ()

    def _verifier(self, *, asked: bool) -> Any:
        """For a server's certificate, or, where it is ``asked`` for, a client's."""
        flags = self.flags
        if asked and not (flags.on("verify-peer") or flags.on("require-any-client-certificate")):
            return None
        if (
            not asked
            and any(isinstance(one, ExternalPsk) for one in self.keys)
            and not flags.on("verify-peer")
        ):
            return None
        soft = flags.on("expect-verify-result") and not flags.on("verify-peer")
        fail = flags.on("verify-fail") and not soft
        kinds = flags.numbers("accepted-peer-cert-types")
        if CertificateType.RAW_PUBLIC_KEY in kinds:
            wanted = "" if fail else flags.decoded("expect-peer-rpk-sha256").hex()
            pins = Pins(frozenset((wanted or "00" * 32,)))
            return AnyKind(pins) if CertificateType.X509 in kinds else OneKey(pins)
        if fail:
            return Refusing(custom=flags.on("use-custom-verify-callback"))
        return InsecureNoVerification()

    # --- the connection -----------------------------------------------------------------------

    def run(self) -> None:
        """Connect, run the handshake, and do what the flags say."""
        flags = self.flags
        family, host = (
            (socket.AF_INET6, "::1") if flags.on("ipv6") else (socket.AF_INET, "127.0.0.1")
        )
        with socket.socket(family, socket.SOCK_STREAM) as self.socket:
            self.socket.connect((host, flags.number("port")))
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.socket.sendall(flags.number("shim-id").to_bytes(8, "little"))
            try:
                self._exchange()
            finally:
                self._hang_up()

    def _exchange(self) -> None:
        flags, engine = self.flags, self.engine
        while not engine.handshake_complete:
            self._step()
            if self.closed:
                raise TruncationError("closed during the handshake")
        self._flush()
        self._check(engine.session)
        if flags.on("export-keying-material"):
            secret = engine.export(
                flags.text("export-label").encode(),
                flags.text("export-context").encode(),
                flags.number("export-keying-material"),
            )
            self._write(secret.reveal())
        if flags.on("export-traffic-secrets"):
            ours, theirs = "SERVER_TRAFFIC_SECRET_0", "CLIENT_TRAFFIC_SECRET_0"
            if not self.is_server:
                ours, theirs = theirs, ours
            read, write = self.secrets[theirs], self.secrets[ours]
            self._write(len(read).to_bytes(2, "little") + read + write)
        if flags.on("write-different-record-sizes"):
            for length in (0, 1, 255, 256, 257, 16383, 16384, 16385, 32767, 32768, 32769):
                self._write(b"B" * length)
        else:
            if flags.on("shim-writes-first"):
                for _ in range(flags.number("repeat-shim-initial-write", 1)):
                    self._write(flags.text("shim-initial-write", "hello").encode())
            if not flags.on("shim-shuts-down"):
                self._echo()
        if not self.is_server:
            expected = not flags.on("expect-no-session") and not flags.on("shim-shuts-down")
            if self.got_ticket != expected:
                raise Mismatch(f"new session: {self.got_ticket}, expected {expected}")
        if flags.on("check-close-notify"):
            engine.send_close()
            self._flush()
            while not self.closed:
                self._step()
            if not engine.close_received:
                raise TruncationError("no close_notify came")

    def _echo(self) -> None:
        flags = self.flags
        while True:
            if flags.on("key-update-before-read"):
                self.engine.update_keys()
                self._flush()
            while not self.pending and not self.closed:
                self._step()
            if not self.pending:
                return
            piece = bytes(self.pending[: flags.number("read-size", 512)])
            del self.pending[: len(piece)]
            if flags.on("key-update"):
                self.engine.update_keys()
            self._write(bytes(byte ^ 0xFF for byte in piece))

    def _write(self, data: bytes) -> None:
        self.engine.send_data(data)
        self._flush()

    def _flush(self) -> None:
        data = self.engine.data_to_send()
        if data:
            with suppress(ConnectionError):  # what the peer said before is what counts
                self.socket.sendall(data)

    def _step(self) -> None:
        """One event, or one piece from the socket."""
        try:
            event = self.engine.next_event()
        finally:
            self.hello_retry |= type(self.engine._state).__name__.startswith("WaitSecond")
            self._flush()
        if isinstance(event, SessionProposed):
            self.engine.accept()
            self._flush()
        elif isinstance(event, ApplicationData):
            self.pending += event.data
        elif isinstance(event, TicketReceived):
            self.got_ticket = True
        elif isinstance(event, CloseReceived):
            self.closed = True
        elif event is None:
            try:
                data = self.socket.recv(1 << 16)
            except ConnectionError:
                data = b""
            try:
                self.engine.receive_data(data)
            except TruncationError:
                # BoringSSL's shim minds only where it was told to.
                if not self.engine.handshake_complete or self.flags.on("check-close-notify"):
                    raise
                self.closed = True

    def _hang_up(self) -> None:
        """Close our half and read what is left, or the last alert may be lost with a reset."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)
            self.socket.settimeout(5)
            while self.socket.recv(1 << 16):
                pass

    # --- what the runner expects --------------------------------------------------------------

    def _check(self, session: Session) -> None:
        flags = self.flags
        expect_resumed = self.resume and not flags.on("expect-session-miss")
        _same("resumed", session.resumed, expect_resumed)
        if flags.on("expect-version"):
            _same("version", TLS13, flags.number("expect-version"))
        if flags.on("expect-server-name"):
            _same("server name", session.server_name, flags.text("expect-server-name"))
        if flags.on("expect-no-server-name"):
            _same("server name", session.server_name, None)
        alpn = "select-alpn" if self.is_server else "expect-alpn"
        declined = self.is_server and flags.on("decline-alpn")
        _same("ALPN", session.alpn or "", "" if declined else flags.text(alpn))
        if flags.on("expect-hrr") or flags.on("expect-no-hrr"):
            _same("HelloRetryRequest", self.hello_retry, flags.on("expect-hrr"))
        if flags.on("expect-curve-id"):
            codes = {group.name: group.code for group in ALL_GROUPS}
            _same("group", codes[session.group], flags.number("expect-curve-id"))
        if flags.on("expect-cipher"):
            suites = {suite.name: suite.code for suite in ALL_SUITES}
            _same("suite", suites[session.cipher_suite], flags.number("expect-cipher"))
        self._check_peer(session)
        if flags.on("expect-selected-credential"):
            _same("credential", self._selected(session), flags.number("expect-selected-credential"))

    def _check_peer(self, session: Session) -> None:
        flags, peer = self.flags, session.peer_credential
        signed = not self.is_server and not session.resumed
        if signed and flags.on("expect-peer-signature-algorithm"):
            codes = {scheme.name: scheme.code for scheme in ALL_SCHEMES}
            got = codes.get(session.signature_scheme or "")
            _same("signature", got, flags.number("expect-peer-signature-algorithm"))
        psk = any(isinstance(one, ExternalPsk) for one in self.keys) and session.psk_identity
        if flags.on("expect-no-peer-cert") or psk:
            _same("peer certificate", peer, None)
        elif flags.on("require-any-client-certificate") or not self.is_server:
            _same("a peer certificate", peer is not None, True)
        if flags.on("expect-peer-cert-file"):
            pem = Path(flags.text("expect-peer-cert-file")).read_bytes()
            chain = tuple(
                one.public_bytes(Encoding.DER) for one in x509.load_pem_x509_certificates(pem)
            )
            _same("chain", peer.chain if peer is not None else None, chain)
        if flags.on("expect-peer-certificate-type"):
            kind = peer.certificate_type if peer is not None else None
            _same("certificate type", kind, flags.number("expect-peer-certificate-type"))

    def _selected(self, session: Session) -> int | None:
        for number, one in enumerate(self.keys[: len(self.flags.more)]):
            if isinstance(one, ExternalPsk):
                if session.psk_identity == one.identity:
                    return number
            elif one.private_key in self.signed_with:
                return number
        return -1  # the default one


def _same(what: str, got: object, expected: object) -> None:
    if got != expected:
        raise Mismatch(f"{what}: {got!r}, expected {expected!r}")


def _alpn_list(encoded: str) -> list[str]:
    names, rest = [], encoded.encode("latin-1")
    while rest:
        length = rest[0]
        names.append(rest[1 : 1 + length].decode("latin-1"))
        rest = rest[1 + length :]
    return names


def _error_name(error: Exception) -> str:
    """``IllegalParameter`` becomes ``ILLEGAL_PARAMETER``."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__).upper()


def main(arguments: Sequence[str], unsupported: Path | None = None) -> int:
    """Run one test; returns the exit code.

    Args:
        arguments: the runner's flags.
        unsupported: gets a line with what the test asks for where hybridkex does not have it.
    """
    try:
        initial, resume = parse(arguments)
        if initial.on("is-handshaker-supported"):
            print("No")
            return 0
        Shim(initial, resume).run()
    except Unimplemented as missing:
        print(f"unimplemented: {missing}", file=sys.stderr)
        if unsupported is not None:
            with unsupported.open("a") as lines:
                lines.write(f"{missing}\n")
        return UNIMPLEMENTED
    except AlertReceived as error:
        print(f":ALERT_RECEIVED_{error.alert}: {error}", file=sys.stderr)
        return FAILED
    except ConfigError as error:
        print(f":CONFIG_ERROR: {error}", file=sys.stderr)
        return FAILED
    except (HybridkexError, Mismatch) as error:
        print(f":{_error_name(error)}: {error}", file=sys.stderr)
        return FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
