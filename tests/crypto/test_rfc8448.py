"""The traces of RFC 8448 through the key exchange, the key schedule, the signatures, the record
layer and the message codec.

:class:`Replay` walks through a trace step by step. What it feeds to our code are the RFC's private
keys, the messages as bytes and nothing else; every other value that the RFC prints is compared with
what our code makes of them. A step that it does not know ends the test, and so does a value of a
step that nothing has looked at.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, x25519

from hybridkex.constants import HELLO_RETRY_RANDOM, ContentType, HandshakeType, Label
from hybridkex.crypto import kex
from hybridkex.crypto.kex import SECP256R1, X25519, Started
from hybridkex.crypto.schedule import (
    EarlySecret,
    HandshakeSecret,
    MainSecret,
    ResumptionSecret,
    TrafficSecret,
    hkdf_expand_label,
)
from hybridkex.crypto.signatures import ALL_SCHEMES
from hybridkex.crypto.suites import SHA256, TLS_AES_128_GCM_SHA256
from hybridkex.secret import Secret
from hybridkex.tls.protection import ReadProtection, WriteProtection, plaintext_records
from hybridkex.wire import messages
from hybridkex.wire.records import RecordBuffer

VECTORS = Path(__file__).parents[1] / "vectors" / "rfc8448"
TRACES = (
    "simple_1rtt",
    "resumed_0rtt",
    "hello_retry_request",
    "client_authentication",
    "compatibility_mode",
)
SUITE = TLS_AES_128_GCM_SHA256
EMPTY_HASH = hashlib.sha256(b"").digest()
PEER = {"client": "server", "server": "client"}


class Step:
    """One step of a trace; it knows which of its values have been asked for."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.by: str = data.pop("by")
        self.action: str = data.pop("action")
        self.same_as: str | None = data.pop("same_as", None)
        self._values = {name: bytes.fromhex(value) for name, value in data.items()}
        self.unread = set(self._values)

    def __getitem__(self, name: str) -> bytes:
        self.unread.discard(name)
        return self._values[name]


def load(name: str) -> list[Step]:
    trace = json.loads((VECTORS / f"{name}.json").read_text(encoding="ascii"))
    return [Step(data) for data in trace["steps"]]


class Replay:
    """Our side of a trace."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps = load(name)
        self.monkeypatch = monkeypatch
        self.messages: list[bytes] = []
        self.sent: dict[str, list[bytes]] = {"client": [], "server": []}
        self.started: dict[str, Started] = {}
        self.traffic: dict[tuple[str, str], TrafficSecret] = {}
        self.early: EarlySecret
        self.handshake: HandshakeSecret
        self.main: MainSecret
        self.resumption: ResumptionSecret
        self.ticket_psk = Secret(b"")
        self.psk: Secret | None = None
        self.certificates: dict[str, x509.Certificate] = {}
        self.signatures_checked = 0

    def run(self) -> "Replay":
        for step in self.steps:
            if step.same_as is not None:
                # The other side has the same value; the RFC prints none.
                assert not step.unread
                continue
            self.take(step)
            assert not step.unread, f"{step.action}: nothing checks {step.unread}"
        return self

    def digest(self) -> bytes:
        return hashlib.sha256(b"".join(self.messages)).digest()

    def take(self, step: Step) -> None:
        """Check one step."""
        action, _, label = step.action.partition(' "')
        label = label.rstrip('"').removeprefix("tls13 ")
        if match := re.fullmatch(r"create an ephemeral (\S+) key pair", action):
            self.create_key_pair(step, match[1])
        elif match := re.fullmatch(r"construct an? (\w+) handshake message", action):
            self.construct(step, match[1])
        elif match := re.fullmatch(r"derive (read|write) traffic keys for (.+) data", action):
            self.traffic_keys(step, step.by if match[1] == "write" else PEER[step.by], match[2])
        elif re.fullmatch(
            r"send (handshake|application_data|alert|change_cipher_spec) record", action
        ):
            self.send(step)
        else:
            {
                "extract secret": self.extract,
                "derive secret": self.derive,
                "derive secret for handshake": self.derive,
                "derive secret for master": self.derive,
                "calculate finished": self.finished,
                "calculate PSK binder": self.binder,
                "generate resumption secret": self.generate_resumption,
            }[action](step, label)

    def create_key_pair(self, step: Step, kind: str) -> None:
        """``start`` with the RFC's private key in place of a random one."""
        with self.monkeypatch.context() as patch:
            if kind == "x25519":
                group = X25519
                private = x25519.X25519PrivateKey.from_private_bytes(step["private key"])
                patch.setattr(
                    kex,
                    "x25519",
                    SimpleNamespace(
                        X25519PrivateKey=SimpleNamespace(generate=lambda: private),
                        X25519PublicKey=x25519.X25519PublicKey,
                    ),
                )
            else:
                assert kind == "P-256"
                group = SECP256R1
                number = int.from_bytes(step["private key"], "big")
                ec_private = ec.derive_private_key(number, ec.SECP256R1())
                patch.setattr(ec, "generate_private_key", lambda _curve: ec_private)
            self.started[step.by] = group.exchange.start()
        assert self.started[step.by].share == step["public key"]

    def construct(self, step: Step, kind: str) -> None:
        message = step[kind]
        self.sent[step.by].append(message)
        if kind == "NewSessionTicket":
            ticket = messages.decode(message)
            assert isinstance(ticket, messages.NewSessionTicket)
            assert self.resumption.psk(ticket.nonce) == self.ticket_psk
            return  # comes after the handshake, so the transcript does not cover it
        if kind == "Certificate":
            decoded = messages.decode(message)
            assert isinstance(decoded, messages.Certificate)
            self.certificates[step.by] = x509.load_der_x509_certificate(decoded.chain[0])
        if kind == "CertificateVerify":
            self.verify_signature(step.by, message)
        if kind == "ServerHello" and HELLO_RETRY_RANDOM in message:
            # RFC 9846 section 4.1.
            self.messages = [bytes((254, 0, 0, 32)) + self.digest()]
        self.messages.append(message)

    def verify_signature(self, by: str, message: bytes) -> None:
        """Section 4.5.2, with the transcript before this message."""
        decoded = messages.decode(message)
        assert isinstance(decoded, messages.CertificateVerify)
        (scheme,) = (scheme for scheme in ALL_SCHEMES if scheme.code == decoded.scheme)
        context = (
            Label.SERVER_CERTIFICATE_VERIFY if by == "server" else Label.CLIENT_CERTIFICATE_VERIFY
        )
        content = b" " * 64 + context + b"\0" + self.digest()
        scheme.verify(self.certificates[by].public_key(), decoded.signature, content)
        self.signatures_checked += 1

    def check_expand(self, step: Step, secret: Secret, label: bytes, context: bytes) -> None:
        """The inputs and the output of one HKDF-Expand-Label; ``info`` is the HkdfLabel."""
        expanded = step["expanded"]
        full = b"tls13 " + label
        assert step["PRK"] == secret.reveal()
        assert step["hash"] == context
        assert step["info"] == (
            len(expanded).to_bytes(2, "big") + bytes((len(full),)) + full
            + bytes((len(context),)) + context
        )  # fmt: skip
        assert hkdf_expand_label(SHA256, secret, label, context, len(expanded)) == expanded

    def extract(self, step: Step, stage: str) -> None:
        secret = step["secret"]
        if stage == "early":
            # Its salt is printed as "0" where no value goes before it; RFC 5869 makes that zeros.
            assert step["salt"] == b""
            self.psk = Secret(step["IKM"])
            without_psk = step["IKM"] == bytes(32)
            self.early = EarlySecret.start(SHA256, None if without_psk else self.psk)
            assert self.early.secret.reveal() == secret
        elif stage == "handshake":
            client, server = self.started["client"], self.started["server"]
            shared = client.finish(server.share)
            assert shared == server.finish(client.share)
            assert shared.reveal() == step["IKM"]
            assert step["salt"] == self.derived(self.early.secret)
            self.handshake = self.early.handshake_secret(shared)
            assert self.handshake.secret.reveal() == secret
        else:
            assert stage == "master"
            assert step["IKM"] == bytes(32)
            assert step["salt"] == self.derived(self.handshake.secret)
            self.main = self.handshake.main_secret()
            assert self.main.secret.reveal() == secret

    def derived(self, secret: Secret) -> bytes:
        return hkdf_expand_label(SHA256, secret, Label.DERIVED, EMPTY_HASH, 32)

    def derive(self, step: Step, label: str) -> None:
        digest = self.digest()
        match label:
            case "derived":
                at_handshake = step.action.startswith("derive secret for handshake")
                stage = self.early if at_handshake else self.handshake
                self.check_expand(step, stage.secret, Label.DERIVED, EMPTY_HASH)
                return
            case "c e traffic" | "e exp master":
                # We send no early data: these exist in the trace, not in our schedule. The first
                # one is needed to read the trace's early records.
                self.check_expand(step, self.early.secret, label.encode(), digest)
                if label == "c e traffic":
                    ours = TrafficSecret(SUITE, Secret(step["expanded"]))
                    self.traffic["client", "early application"] = ours
                return
            case "c hs traffic":
                ours = self.handshake.client_handshake_traffic(SUITE, digest)
                self.traffic["client", "handshake"] = ours
                secret = ours.secret
            case "s hs traffic":
                ours = self.handshake.server_handshake_traffic(SUITE, digest)
                self.traffic["server", "handshake"] = ours
                secret = ours.secret
            case "c ap traffic":
                ours = self.main.client_application_traffic(SUITE, digest)
                self.traffic["client", "application"] = ours
                secret = ours.secret
            case "s ap traffic":
                ours = self.main.server_application_traffic(SUITE, digest)
                self.traffic["server", "application"] = ours
                secret = ours.secret
            case "exp master":
                secret = self.main.exporter_secret(digest).secret
            case "res master":
                self.resumption = self.main.resumption_secret(digest)
                secret = self.resumption.secret
            case _:
                raise AssertionError(label)
        assert secret.reveal() == step["expanded"]
        base = self.handshake.secret if " hs " in label else self.main.secret
        self.check_expand(step, base, label.encode(), digest)

    def traffic_keys(self, step: Step, owner: str, epoch: str) -> None:
        traffic = self.traffic[owner, epoch]
        assert step["PRK"] == traffic.secret.reveal()
        assert traffic.key_and_iv() == (step["key expanded"], step["iv expanded"])
        assert step["key info"] == b"\x00\x10\x09tls13 key\x00"
        assert step["iv info"] == b"\x00\x0c\x08tls13 iv\x00"

    def finished(self, step: Step, _label: str) -> None:
        traffic = self.traffic[step.by, "handshake"]
        self.check_expand(step, traffic.secret, Label.FINISHED, b"")
        assert traffic.finished(self.digest()) == step["finished"]

    def binder(self, step: Step, _label: str) -> None:
        """The binder, with which the ClientHello is whole."""
        prefix = step["ClientHello prefix"]
        assert [prefix] == self.messages
        digest = hashlib.sha256(prefix).digest()
        assert digest == step["binder hash"]
        key = hkdf_expand_label(SHA256, self.early.secret, Label.RESUMPTION_BINDER, EMPTY_HASH, 32)
        self.check_expand(step, Secret(key), Label.FINISHED, b"")
        binder = self.early.binder(Label.RESUMPTION_BINDER, digest)
        assert binder == step["finished"]
        self.messages = [prefix + bytes((0, 33, 32)) + binder]
        self.sent[step.by] = self.messages.copy()

    def generate_resumption(self, step: Step, _label: str) -> None:
        self.ticket_psk = self.resumption.psk(step["hash"])
        assert self.ticket_psk.reveal() == step["expanded"]
        self.check_expand(step, self.resumption.secret, Label.RESUMPTION, step["hash"])

    def send(self, step: Step) -> None:
        """Payloads are the messages constructed before; the records have their own test below."""
        record = step["complete record"]
        if "handshake" in step.action:
            assert step["payload"] == b"".join(self.sent[step.by])
            self.sent[step.by].clear()
        assert len(step["payload"]) < len(record)


@pytest.mark.parametrize("name", TRACES)
def test_key_schedule(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    replay = Replay(name, monkeypatch).run()
    # From the (first) ClientHello to the client's Finished.
    assert (
        len(replay.messages)
        == {
            "simple_1rtt": 7,
            "resumed_0rtt": 6,
            "hello_retry_request": 9,
            "client_authentication": 10,
            "compatibility_mode": 7,
        }[name]
    )
    assert replay.signatures_checked == {"resumed_0rtt": 0, "client_authentication": 2}.get(name, 1)
    assert len(replay.traffic) == (5 if name == "resumed_0rtt" else 4)


def test_the_second_trace_resumes_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    first = Replay("simple_1rtt", monkeypatch).run()
    second = Replay("resumed_0rtt", monkeypatch).run()
    assert len(first.ticket_psk) == 32
    assert second.psk == first.ticket_psk


def records(name: str) -> Iterator[tuple[Step, TrafficSecret | None, int]]:
    """Each record's step, the secret that it is under, and how many were under it before."""
    secrets: dict[tuple[str, str], TrafficSecret] = {}
    current: dict[str, TrafficSecret | None] = {"client": None, "server": None}
    count = {"client": 0, "server": 0}
    for step in load(name):
        if match := re.fullmatch(r"derive (read|write) traffic keys for (.+) data", step.action):
            owner = step.by if match[1] == "write" else PEER[step.by]
            if step.same_as is None:
                secrets[owner, match[2]] = TrafficSecret(SUITE, Secret(step["PRK"]))
            if owner == step.by:
                current[owner] = secrets[owner, match[2]]
                count[owner] = 0
        elif step.action.startswith("send "):
            protected = current[step.by] is not None and "change_cipher_spec" not in step.action
            yield step, current[step.by] if protected else None, count[step.by]
            count[step.by] += protected


CONTENT_TYPES = {
    "send handshake record": ContentType.HANDSHAKE,
    "send application_data record": ContentType.APPLICATION_DATA,
    "send alert record": ContentType.ALERT,
    "send change_cipher_spec record": ContentType.CHANGE_CIPHER_SPEC,
}


@pytest.mark.parametrize("name", TRACES)
def test_records(name: str) -> None:
    """Each record of the trace, protected and opened, is what the RFC prints."""
    writers: dict[tuple[str, bytes], tuple[WriteProtection, ReadProtection]] = {}
    protected = 0
    for step, traffic, sequence in records(name):
        payload, expected = step["payload"], step["complete record"]
        type_ = CONTENT_TYPES[step.action]
        buffer = RecordBuffer()
        buffer.feed(expected)
        record = buffer.take()
        assert record is not None
        assert buffer.pending == 0
        if traffic is None:
            version = int.from_bytes(expected[1:3], "big")
            assert plaintext_records(type_, payload, version) == expected
            assert (record.type, bytes(record.fragment)) == (type_, payload)
            continue
        key = (step.by, traffic.secret.reveal())
        if sequence == 0:
            writers[key] = WriteProtection(traffic), ReadProtection(traffic)
        writer, reader = writers[key]
        assert bytes(writer.seal(type_, memoryview(payload), 1 << 14)) == expected
        out = memoryview(bytearray(len(payload) + 1))
        assert reader.open(record, out) == len(payload) + 1
        assert bytes(out) == payload + bytes((type_,))
        assert reader.opened == sequence + 1
        protected += 1
    assert protected == {"simple_1rtt": 7, "resumed_0rtt": 8}.get(name, 4)


def handshake_messages(name: str) -> Iterator[bytes]:
    """Every whole handshake message that a record of the trace carries."""
    for step, _, _ in records(name):
        payload = step["payload"] if step.action == "send handshake record" else b""
        while payload:
            end = messages.HEADER_LENGTH + int.from_bytes(payload[1:4], "big")
            yield payload[:end]
            payload = payload[end:]


@pytest.mark.parametrize("name", TRACES)
def test_messages(name: str) -> None:
    """Each message is written again as it was read."""
    seen = []
    for raw in handshake_messages(name):
        message = messages.decode(raw)
        assert message.type == raw[0]
        assert messages.encode(message) == raw
        assert isinstance(message, messages.HelloRetryRequest) == (raw[6:38] == HELLO_RETRY_RANDOM)
        seen.append(message.type)
    kind = HandshakeType
    authentication = [kind.CERTIFICATE, kind.CERTIFICATE_VERIFY, kind.FINISHED]
    hellos = [kind.CLIENT_HELLO, kind.SERVER_HELLO]
    assert seen == {
        "simple_1rtt": [
            *hellos, kind.ENCRYPTED_EXTENSIONS, *authentication, kind.FINISHED,
            kind.NEW_SESSION_TICKET,
        ],
        "resumed_0rtt": [
            *hellos, kind.ENCRYPTED_EXTENSIONS, kind.FINISHED, kind.END_OF_EARLY_DATA,
            kind.FINISHED,
        ],
        "hello_retry_request": [
            *hellos, *hellos, kind.ENCRYPTED_EXTENSIONS, *authentication, kind.FINISHED,
        ],
        "client_authentication": [
            *hellos, kind.ENCRYPTED_EXTENSIONS, kind.CERTIFICATE_REQUEST, *authentication,
            *authentication,
        ],
        "compatibility_mode": [
            *hellos, kind.ENCRYPTED_EXTENSIONS, *authentication, kind.FINISHED,
        ],
    }[name]  # fmt: skip
