"""The fuzz targets: functions of bytes that must not raise.

They catch the typed errors that the code under test promises for such input; any other exception is
a bug.
"""

import contextlib
import json
import tempfile
from base64 import b64encode
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Final
from urllib.parse import parse_qs

import numpy as np
import trio
from trio.testing import memory_stream_pair

from examples.chat import protocol as chat_protocol
from hybridkex.apps.transfer import messages as transfer_messages
from hybridkex.apps.transfer.names import UnsafeName, check_path
from hybridkex.auth import (
    DevCa,
    Identity,
    KnownPeers,
    PeerCertificate,
    RawIdentity,
    TrustStore,
    parse_peer_name,
)
from hybridkex.auth.certificates import read_chain
from hybridkex.cli.actions.tunnel import load_file
from hybridkex.combiner import ExchangeConfig, PskAuthentication, exchange
from hybridkex.constants import ContentType
from hybridkex.crypto.kex import SECP256R1, X25519
from hybridkex.crypto.private_keys import load_private_key
from hybridkex.crypto.psk import ExternalPsk
from hybridkex.crypto.suites import TLS_AES_128_GCM_SHA256
from hybridkex.errors import (
    AlertReceived,
    CertificateRejected,
    ConfigError,
    DecodeError,
    HybridkexError,
    LinkError,
    LocalStateError,
    PeerError,
)
from hybridkex.kme.config import load_config
from hybridkex.kme.peering import ExtKeys, ids_from_json
from hybridkex.link import wire
from hybridkex.link.cascade import Cascade
from hybridkex.link.finite_key import Security
from hybridkex.link.ledger import LANE_RESERVE, Ledger
from hybridkex.link.party import Alice, Block, Bob
from hybridkex.link.physics import Transmitter
from hybridkex.link.presets import preset
from hybridkex.link.quantum import Detections, PulseRecord, Sent, sample
from hybridkex.link.randomness import Randomness
from hybridkex.link.reconciliation import ReconciliationError
from hybridkex.link.settings import LinkSettings
from hybridkex.net.http import (
    ANY,
    HttpLimits,
    Request,
    Response,
    Route,
    find_route,
    parse_json,
    serve_connection,
)
from hybridkex.qkd.etsi014.models import KeyContainer, KeyIds, KeyRequest, ModelError, Status
from hybridkex.qkd.psk import identity_of, name_of
from hybridkex.qkd.store import read_key_file
from hybridkex.secret import Secret
from hybridkex.shell.ticket_file import FileTicketStore
from hybridkex.tls.config import ClientConfig, ServerConfig
from hybridkex.tls.connection import ClientConnection, Connection, ServerConnection
from hybridkex.tls.events import SessionProposed
from hybridkex.tls.policy import Policy, Requirement
from hybridkex.tls.tickets import CookieProtector, CookieState, TicketIssuer, TicketState
from hybridkex.wire.messages import ImportedIdentity, decode, encode
from hybridkex.wire.records import RecordBuffer

__all__ = ["TARGETS"]

ANY_GROUP: Final = Policy(post_quantum=Requirement.PREFER)


def messages(data: bytes) -> None:
    """Parse a handshake message; a parsed message must encode to the same bytes."""
    if len(data) < 4:
        return  # The channel hands over whole messages, header and all.
    try:
        message = decode(data)
    except PeerError:
        return
    again = decode(encode(message))
    assert again == message, "the message is another one after encoding"


def records(data: bytes) -> None:
    """Split a stream into records; the data determine where the stream is cut."""
    buffer, position = RecordBuffer(), 0
    try:
        while position < len(data):
            step = 1 + data[position] % 64
            buffer.feed(data[position : position + step])
            position += step
            while (record := buffer.take()) is not None:
                assert len(record.header) == 5
    except PeerError:
        pass


def tickets(data: bytes) -> None:
    """Open tickets and cookies, and parse their sealed content."""
    for parse in (TicketState.decode, CookieState.decode):
        # Under a seal of our own; the opener decides, below.
        with contextlib.suppress(DecodeError, ValueError):
            parse(data)
    assert _issuer().open(data) is None
    assert _cookies().open(data) is None


@cache
def _issuer() -> TicketIssuer:
    return TicketIssuer()


@cache
def _cookies() -> CookieProtector:
    return CookieProtector()


def psk_identities(data: bytes) -> None:
    """Encode and decode the names of QKD keys in imported identities."""
    name = name_of(data)
    if name is not None:
        assert identity_of(name) == data, "two encodings of one name"
    imported = ImportedIdentity.decode(data)
    if imported is not None:
        assert imported.encode() == data
        name_of(imported.external_identity)


def certificates(data: bytes) -> None:
    """Verify chains as a peer sends them; each certificate follows its two-byte length."""
    chain, rest = [], data
    while rest:
        length = int.from_bytes(rest[:2], "big")
        chain.append(rest[2 : 2 + length])
        rest = rest[2 + length :]
    try:
        peer, _ = read_chain(chain)
    except PeerError:
        return
    assert isinstance(peer, PeerCertificate)
    assert peer.subject is not None
    _ = (peer.names, peer.common_name)


def names(data: bytes) -> None:
    """Parse host names and addresses."""
    with contextlib.suppress(ConfigError):
        parse_peer_name(data.decode("utf-8", "replace"))


def etsi014(data: bytes) -> None:
    """Parse the bodies and queries of ETSI GS QKD 014 and of the protocol between KMEs."""
    text = data.decode("utf-8", "replace")
    query = parse_qs(text, keep_blank_values=True)
    for of_query in (KeyRequest.from_query, KeyIds.from_query):
        with contextlib.suppress(ModelError):
            of_query(query)
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return
    for of_json in (
        Status.from_json,
        KeyRequest.from_json,
        KeyContainer.from_json,
        KeyIds.from_json,
        ExtKeys.from_json,
        ids_from_json,
    ):
        with contextlib.suppress(ModelError):
            of_json(body)


def ticket_store(data: bytes) -> None:
    """Read the file of ``connect --resume``."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        with contextlib.suppress(ConfigError):
            FileTicketStore(Path(file.name)).take("localhost")


def operator_files(data: bytes) -> None:
    """Read files that an operator may confuse: certificates, keys, key files, configurations.

    The first byte says as which of them the rest is read.
    """
    if not data:
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(data[1:])
        readers: tuple[Callable[[Path], object], ...] = (
            TrustStore.from_file,
            lambda file: Identity.from_files(file, file),
            RawIdentity.from_file,
            read_key_file,
            load_config,
            load_file,
        )
        with contextlib.suppress(ConfigError):
            readers[data[0] % len(readers)](path)


@cache
def _some_key() -> bytes:
    return RawIdentity.generate().peer_view.spki


def known_peers(data: bytes) -> None:
    """Read and write the file of ``--known-peers``."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "known"
        path.write_bytes(data)
        with contextlib.suppress(ConfigError, CertificateRejected):
            known = KnownPeers(path)
            known.add("localhost", _some_key())
            known.verify_server_key(_some_key(), parse_peer_name("localhost"))


def transfer(data: bytes) -> None:
    """Parse a frame of the file transfer and the names in it."""
    try:
        kind, _ = transfer_messages.split_header(data[:5].ljust(5, b"\0"))
        if kind == transfer_messages.DATA:
            return
        message = transfer_messages.decode(kind, data[5:])
    except transfer_messages.ProtocolError:
        return
    frame = transfer_messages.encode(message)
    assert transfer_messages.decode(frame[0], frame[5:]) == message
    if isinstance(message, transfer_messages.Offers):
        for offer in message.each():
            with contextlib.suppress(UnsafeName):
                check_path(offer.path)
                assert not Path(*offer.path).is_absolute()
                assert ".." not in offer.path


def chat(data: bytes) -> None:
    """Parse a frame of the chat and display it on a terminal."""
    try:
        message = chat_protocol.decode(data)
        frame = chat_protocol.encode(message)
    except chat_protocol.ProtocolError:
        return
    assert chat_protocol.decode(frame[4:]) == message
    text = getattr(message, "text", "")
    assert "\x1b" not in chat_protocol.printable(text)


class _AnyProof(PskAuthentication):
    """Accepts every proof, so that the fuzzer reaches the steps after it."""

    def check(self, role: object, digest: bytes, proof: bytes, peer: str) -> None:
        pass


def combined_exchange(data: bytes) -> None:
    """Any bytes at either side of the exchange outside TLS end it with a typed error.

    Bit 0 of the first byte chooses the side, bit 1 whether proofs are verified.
    """
    if not data:
        return
    config = ExchangeConfig(
        role="initiator" if data[0] & 1 else "responder",
        local="a.example",
        peer="b.example",
        authentication=(_AnyProof if data[0] & 2 else PskAuthentication)(Secret(bytes(32))),
        label=b"fuzz",
        exchanges=(X25519.exchange,),
    )

    async def play() -> None:
        near, far = memory_stream_pair()
        await far.send_all(data[1:])
        await far.send_eof()
        with contextlib.suppress(HybridkexError):
            await exchange(near, config)
            raise AssertionError("an exchange with rubbish was completed")

    trio.run(play)


# --- engines --------------------------------------------------------------------------------------


@cache
def _scenarios() -> tuple[tuple[ClientConfig, ServerConfig], ...]:
    ca = DevCa.create()
    trust = TrustStore((ca.certificate,))
    psk = ExternalPsk(identity=b"qkd-1", key=Secret(bytes(range(32))), context=b"A to B")
    client = ClientConfig(
        verifier=trust,
        groups=(X25519,),
        suites=(TLS_AES_128_GCM_SHA256,),
        policy=ANY_GROUP,
        alpn=("h2",),
        identity=ca.issue("bob"),
    )
    server = ServerConfig(
        identities=(ca.issue("localhost"),), groups=(X25519,), policy=ANY_GROUP, alpn=("h2",)
    )
    return (
        (client, replace(server, client_verifier=trust, require_client_certificate=True)),
        (replace(client, groups=(SECP256R1, X25519)), server),
        (replace(client, psks=(psk,)), replace(server, psks=(psk,))),
        (
            ClientConfig(psks=(psk,), groups=(X25519,), policy=ANY_GROUP),
            ServerConfig(psks=(psk,), groups=(X25519,), policy=ANY_GROUP),
        ),
    )


def _drain(connection: Connection) -> bool:
    """Handle all events; returns whether the connection is still usable."""
    try:
        while (event := connection.next_event()) is not None:
            if isinstance(event, SessionProposed):
                connection.accept()
    except PeerError:
        assert connection.has_data_to_send, "no alert for the peer"
        return False
    except HybridkexError:
        return False
    return True


def raw_server(data: bytes) -> None:
    """Send any bytes to a server."""
    server = ServerConnection(_scenarios()[data[0] % 4][1] if data else _scenarios()[0][1])
    if data[1:]:
        server.receive_data(data[1:])
        _drain(server)
    assert not server.handshake_complete


def cuts(data: bytes) -> None:
    """Send bytes to a server, in one read and in pieces: the result must be the same.

    A byte for the configuration, a byte for the number of pieces, their lengths, and the stream. A
    ClientHello that is taken makes fresh keys, so only what goes before its answer is compared.
    """
    reader = _Reader(data)
    config = _scenarios()[reader.byte() % 4][1]
    lengths = [reader.byte() + 1 for _ in range(reader.byte() % 16 + 1)]
    stream, at, turn = reader.data, 0, 0
    if not stream:
        return
    pieces = []
    while at < len(stream):
        pieces.append(stream[at : at + lengths[turn % len(lengths)]])
        at, turn = at + len(pieces[-1]), turn + 1
    assert _told(config, [stream]) == _told(config, pieces)


def _told(config: ServerConfig, reads: list[bytes]) -> list[str]:
    """Return a server's reaction to these reads: its events, and its error with the alert."""
    server, told = ServerConnection(config), []
    for read in reads:
        try:
            server.receive_data(read)
            while (event := server.next_event()) is not None:
                told.append(type(event).__name__)
        except HybridkexError as error:
            return [*told, f"{type(error).__name__}: {error}", str(server.has_data_to_send)]
    return told


def private_keys(data: bytes) -> None:
    """Load a private key from PEM, or from bytes that are wrapped in PEM."""
    for pem in (data, b"-----BEGIN PRIVATE KEY-----\n" + b64encode(data) + _PEM_END):
        try:
            key = load_private_key(pem, None, "the file")
        except ConfigError:
            continue
        assert key.public_key() is not None


_PEM_END: Final = b"\n-----END PRIVATE KEY-----\n"


def raw_client(data: bytes) -> None:
    """Send any bytes to a client that has sent its ClientHello."""
    client = ClientConnection(
        _scenarios()[data[0] % 4][0] if data else _scenarios()[0][0], "localhost"
    )
    client.start()
    if data[1:]:
        client.receive_data(data[1:])
        _drain(client)
    assert not client.handshake_complete


class _Reader:
    """Small numbers from fuzzed bytes; zeros after the last byte."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def byte(self) -> int:
        first, self.data = self.data[:1], self.data[1:]
        return first[0] if first else 0

    def bytes_(self, length: int) -> bytes:
        taken, self.data = self.data[:length], self.data[length:]
        return taken


def handshake(data: bytes) -> None:
    """A real handshake with messages changed before they are encrypted.

    Nobody may finish unless nothing was changed, and both must end with typed errors: the keys are
    known to the attacker here, so that changes reach every parser and every state.
    """
    reader = _Reader(data)
    client_config, server_config = _scenarios()[reader.byte() % 4]
    client, server = ClientConnection(client_config, "localhost"), ServerConnection(server_config)
    changes = {reader.byte() % 12: _change(reader) for _ in range(1 + reader.byte() % 2)}
    changed = False
    number = 0

    def hook(connection: Connection) -> None:
        channel = connection._records
        send = channel.writer.send_raw

        def altered(raw: bytes) -> None:
            nonlocal changed, number
            new = changes.get(number, lambda same: same)(raw)
            number += 1
            changed |= new != raw
            if new:
                send(new)

        channel.writer.send_raw = altered  # type: ignore[method-assign]

    hook(client)
    hook(server)
    client.start()
    alive = {True: True, False: True}
    for _ in range(8):
        for is_client, source, target in ((True, client, server), (False, server, client)):
            out = bytes(source.data_to_send())
            if out and alive[not is_client]:
                try:
                    target.receive_data(out)
                except (LocalStateError, AlertReceived):
                    alive[not is_client] = False
                    continue
                alive[not is_client] = _drain(target)
    if changed:
        both = client.handshake_complete and server.handshake_complete
        assert not both, "a changed handshake was completed"
    else:
        assert client.handshake_complete


def _change(reader: _Reader) -> Callable[[bytes], bytes]:
    kind, at, length = reader.byte() % 5, reader.byte() << 8 | reader.byte(), reader.byte()
    new = reader.bytes_(length)

    def change(raw: bytes) -> bytes:
        place = 4 + at % max(1, len(raw) - 4)
        if kind == 0:  # overwrite
            body = raw[4:place] + new + raw[place + len(new) :]
        elif kind == 1:  # insert
            body = raw[4:place] + new + raw[place:]
        elif kind == 2:  # delete
            body = raw[4:place] + raw[place + length :]
        elif kind == 3:  # another message altogether
            return new
        else:  # flip one bit, header included
            position = at % len(raw)
            flipped = raw[position] ^ (1 << length % 8)
            return raw[:position] + bytes((flipped,)) + raw[position + 1 :]
        return raw[:1] + len(body).to_bytes(3, "big") + body

    return change


def traffic(data: bytes) -> None:
    """Send handshake messages, alerts and data after the handshake, encrypted under valid keys."""
    client, server = _connected()
    sender, target = (client, server) if data[:1] < b"\x80" else (server, client)
    channel, rest = sender._records, data[1:]
    assert channel.writer.protection is not None
    kinds = (ContentType.HANDSHAKE, ContentType.ALERT, ContentType.APPLICATION_DATA, 77)
    while rest:
        kind, length = kinds[rest[0] % 4], rest[1] if len(rest) > 1 else 0
        content, rest = rest[2 : 2 + length], rest[2 + length :]
        target.receive_data(bytes(channel.writer.protection.seal(kind, memoryview(content), 16384)))
        if not _drain(target):
            return


def _connected() -> tuple[ClientConnection, ServerConnection]:
    client_config, server_config = _scenarios()[3]
    client, server = ClientConnection(client_config, "localhost"), ServerConnection(server_config)
    client.start()
    for _ in range(2):
        server.receive_data(client.data_to_send())
        _drain(server)
        if server.has_data_to_send:
            client.receive_data(server.data_to_send())
            _drain(client)
    assert client.handshake_complete
    assert server.handshake_complete
    return client, server


# --- the simulated QKD link -----------------------------------------------------------------------


def link_messages(data: bytes) -> None:
    """Parse a message of the link's classical channel; it must encode to the same bytes."""
    basis = np.ones(9, dtype=np.uint8)
    decoders: tuple[Callable[[bytes], wire.Message], ...] = (
        wire.Hello.decode,
        wire.Report.decode,
        lambda body: wire.Sift.decode(body, basis=basis, intensities=3),
        lambda body: wire.Corrected.decode(body, most=(5, 5, 5)),
        lambda body: wire.Finish.decode(body, hash_bits=50, seed_bits=99),
        wire.Verdict.decode,
        wire.End.decode,
    )
    for decode_ in decoders:
        try:
            message = decode_(data)
        except LinkError:
            continue
        assert message.encode() == data, "two encodings of one message"
    alice = Cascade().respond(np.ones(1000, dtype=np.uint8), 0.03)
    for request in (b"\x02", data[: len(data) // 2], data[len(data) // 2 :]):
        with contextlib.suppress(ReconciliationError):
            alice.answer(request)


@cache
def _link() -> tuple[LinkSettings, Sent, Detections]:
    """Make a link with the smallest blocks, and the light of its first block."""
    chosen = preset("rusca2018")
    settings = LinkSettings(
        preset=replace(
            chosen,
            channel=replace(chosen.channel, misalignment=0.005),
            transmitter=Transmitter(
                intensities=(0.5, 0.13), probabilities=(0.2, 0.8), key_basis_probability=0.55
            ),
            security=Security(secrecy=0.5, correctness=0.01),
        ),
        block_bits=1500,
        key_bits=64,
        tolerance=0.3,
    )
    sent, clicks = sample(
        settings.preset.channel,
        settings.preset.transmitter,
        settings.preset.channel,
        settings.detections,
        first=0,
        randomness=Randomness.seeded(4, "fuzz"),
    )
    return settings, sent, clicks


class _Detector:
    """Replays the same light for every block."""

    async def detect(self, count: int) -> Detections:
        clicks = _link()[2]
        return replace(clicks, bit=clicks.bit.copy())


def link_parties(data: bytes) -> None:
    """Alice and Bob make a block, with messages changed before they are authenticated.

    As in ``handshake`` the attacker has the keys here, so that changes get past the tags and reach
    every parser and every state. What the parties must do is end, with a typed error or a block;
    unchanged, with the same keys.
    """
    reader = _Reader(data)
    changes = {reader.byte() % 64: _link_change(reader) for _ in range(1 + reader.byte() % 3)}
    settings, sent, clicks = _link()
    record = PulseRecord(settings.preset.transmitter, Randomness.seeded(5, "fuzz"))
    record.keep(clicks.pulse, replace(sent, bit=sent.bit.copy()))
    near, far = memory_stream_pair()
    shared = Secret(bytes(4 * LANE_RESERVE))  # so full that the ledger takes nothing of the block
    alice = Alice(near, settings, record, bootstrap=Ledger(shared), seed=1)
    bob = Bob(far, settings, _Detector(), bootstrap=Ledger(shared), seed=1)
    changed = False
    number = 0

    def hook(party: Alice | Bob) -> None:
        send = party._channel._send

        async def altered(kind: wire.Type, body: bytes) -> None:
            nonlocal changed, number
            new = changes.get(number, lambda *same: same)(kind, body)
            number += 1
            changed |= new != (kind, body)
            await send(*new)

        party._channel._send = altered  # type: ignore[method-assign]

    made: list[Block] = []

    async def play(party: Alice | Bob, stream: trio.abc.Stream) -> None:
        async with stream:
            with contextlib.suppress(LinkError):
                made.append(await party.block())

    async def both() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(play, alice, near)
            nursery.start_soon(play, bob, far)

    hook(alice)
    hook(bob)
    trio.run(both)
    if not changed:
        one, other = made
        assert one.keys
        assert [key.key_id for key in one.keys] == [key.key_id for key in other.keys]
        assert all(a.key == b.key for a, b in zip(one.keys, other.keys, strict=True))


def _link_change(reader: _Reader) -> Callable[[wire.Type, bytes], tuple[wire.Type, bytes]]:
    kind, at, length = reader.byte() % 6, reader.byte() << 8 | reader.byte(), reader.byte()
    new = reader.bytes_(length)

    def change(type_: wire.Type, body: bytes) -> tuple[wire.Type, bytes]:
        place = at % (len(body) + 1)
        if kind == 0:  # overwrite
            return type_, body[:place] + new + body[place + len(new) :]
        if kind == 1:  # insert
            return type_, body[:place] + new + body[place:]
        if kind == 2:  # delete
            return type_, body[:place] + body[place + length :]
        if kind == 3:  # another body altogether
            return type_, new
        if kind == 4:  # another message altogether
            return wire.Type(1 + at % len(wire.Type)), new
        if not body:
            return type_, body
        flipped = body[at % len(body)] ^ (1 << length % 8)
        return type_, body[: at % len(body)] + bytes((flipped,)) + body[at % len(body) + 1 :]

    return change


async def _http_handler(request: Request) -> Response:
    found = find_route([Route(name="x", path=("x", ANY), methods=("GET", "HEAD", "POST"))], request)
    if isinstance(found, Response):
        return found
    with contextlib.suppress(ValueError):
        return Response.json(200, {"got": parse_json(request.body), "path": request.path})
    return Response.json(400, {"query": request.query})


def http(data: bytes) -> None:
    """Send bytes to the HTTP server: the connection must end, and every answer must be HTTP."""
    ours, theirs = memory_stream_pair()

    async def talk() -> bytes:
        await ours.send_all(data)
        await ours.send_eof()
        await serve_connection(theirs, _http_handler, HttpLimits(max_body=2000, max_headers=2000))
        await theirs.aclose()
        return bytes(await ours.receive_some()) if data else b""

    answer = trio.run(talk)
    assert not answer or answer.startswith(b"HTTP/1.1 ")


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    one.__name__.replace("_", "-"): one
    for one in (
        messages,
        records,
        tickets,
        psk_identities,
        certificates,
        names,
        etsi014,
        http,
        ticket_store,
        raw_server,
        raw_client,
        cuts,
        private_keys,
        handshake,
        traffic,
        link_messages,
        link_parties,
        operator_files,
        known_peers,
        transfer,
        chat,
        combined_exchange,
    )
}


def everything(data: bytes) -> None:
    """Run the target that the first byte selects."""
    if data:
        targets = list(TARGETS.values())
        targets[data[0] % len(targets)](data[1:])
