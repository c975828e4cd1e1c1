"""The fuzzer's seed inputs, made from real handshakes: ``python -m interop.fuzz.seeds``.

Writes ``corpus/TARGET/NAME`` beside this file. Inputs that a fuzzer has found may be there, too;
the tests replay all of them.
"""

import base64
import json
from pathlib import Path
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from examples.chat import protocol as chat
from hybridkex.apps.transfer import messages as transfer
from hybridkex.auth import DevCa, RawIdentity
from hybridkex.constants import TLS13
from hybridkex.link import wire
from hybridkex.link.ledger import Direction, Position
from hybridkex.qkd.psk import context_of, identity_of
from hybridkex.qkd.source import KeyPart
from hybridkex.tls.connection import ClientConnection, Connection, ServerConnection
from hybridkex.wire.messages import ImportedIdentity
from interop.fuzz import targets

CORPUS: Final = Path(__file__).parent / "corpus"

NAME: Final = (KeyPart("kme-a", "kme-b", "994f95df-037c-40e9-8b79-79f79bb8eaa0"),)


def seeds() -> dict[str, dict[str, bytes]]:
    """Return the seeds by target and name."""
    messages: dict[str, bytes] = {}
    flights: dict[str, bytes] = {}
    for number, (client_config, server_config) in enumerate(targets._scenarios()):
        client = ClientConnection(client_config, "localhost")
        server = ServerConnection(server_config)
        for who, one in (("client", client), ("server", server)):
            _record(one, f"{number}-{who}", messages)
        client.start()
        for turn in range(4):
            flights[f"{number}-client-{turn}"] = _carry(client, server)
            if turn == 0 and number == 0:
                server_first = (
                    bytes(server._records.writer._outgoing[0]) if server.has_data_to_send else b""
                )
                flights["server-first"] = server_first
            flights[f"{number}-server-{turn}"] = _carry(server, client)
            if server.handshake_complete and turn:
                break
        server.send_data(b"hello")
        _carry(server, client)
    identity = identity_of(NAME)
    context = context_of(NAME, master_sae="alice", slave_sae="bob")
    key = {"key_ID": str(NAME[0].key_id), "key": "AAECAwQFBgcICQoLDA0ODw=="}
    leaf = DevCa.create().issue("localhost")
    chain = b"".join(len(one).to_bytes(2, "big") + one for one in leaf.chain)
    return {
        "messages": messages,
        "records": {name: data for name, data in flights.items() if data and name[0] == "0"},
        "raw-server": {
            "hello": b"\0" + flights["0-client-0"],
            "psk": b"\3" + flights["3-client-0"],
        },
        "raw-client": {
            "hello": b"\0" + flights["0-server-0"],
            "retry": b"\1" + flights["1-server-0"],
        },
        "cuts": {
            "hello": b"\0\2\4\0\x20" + flights["0-client-0"],
            "skipped": b"\3\1\4\0" + flights["3-client-0"] + b"\x14\3\3\0\1\1\x17\3\3\0\1x",
            "alert": b"\0\1\0\1\x15\3\3\0\2\2\x28",
        },
        "private-keys": {
            "mldsa-seed": bytes.fromhex("3034020100300b06096086480165030403110422 8020")
            + bytes(32),
            "mldsa-both": bytes.fromhex("3045020100300b0609608648016503040311 0433 3031 0420")
            + bytes(32)
            + b"\4\x0d"
            + bytes(13),
        },
        "psk-identities": {
            "name": identity,
            "imported": ImportedIdentity(identity, context, TLS13, 1).encode(),
        },
        "certificates": {"chain": chain},
        "names": {"dns": b"xn--bcher-kva.example", "address": b"2001:db8::1"},
        "etsi014": {
            "keys": json.dumps({"keys": [key, key]}).encode(),
            "ids": json.dumps({"key_IDs": [{"key_ID": key["key_ID"]}]}).encode(),
            "request": b'{"number": 2, "size": 256, "additional_slave_SAE_IDs": ["c"]}',
            "query": b"number=3&size=1024",
        },
        "http": {
            "get": b"GET /x/%74?y HTTP/1.1\r\nHost: a\r\n\r\n" * 2,
            "post": b'POST /x/y HTTP/1.1\r\nHost: a\r\nContent-Length: 7\r\n\r\n{"a":1}',
            "chunks": b"POST /x/y HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"1;a=b\r\n1\r\n0\r\nX: y\r\n\r\n",
            "head": b"HEAD http://a/x/y HTTP/1.0\r\n\r\n",
            "both": b"POST /x/y HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n"
            b"Transfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n0\r\n\r\n",
        },
        "ticket-store": {"empty": b"{}", "bad": b'{"localhost": [{"ticket": "AAAA"}]}'},
        "handshake": {
            str(number): bytes((number % 4, number, 1, *range(60))) for number in range(12)
        },
        "traffic": {
            "update": bytes((0, 0, 5, 24, 0, 0, 1, 1)),
            "ticket": bytes((255, 0, 16, 4, 0, 0, 12, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 1, 65)),
            "close": bytes((0, 1, 2, 1, 0)),
            "data": bytes((255, 2, 3)) + b"abc",
        },
        "tickets": {"zeros": bytes(64)},
        "operator-files": _operator_files(),
        "known-peers": {"line": b"localhost " + base64.b64encode(bytes(44)) + b"\n"},
        "transfer": _transfer_messages(),
        "chat": _chat_messages(),
        "combined-exchange": _exchanges(),
        "link-messages": _link_messages(),
        "link-parties": {
            "unchanged": b"",
            **{f"flip-{n}": bytes((0, n, 5, 0, n, 1)) for n in range(0, 48, 3)},
            **{f"cut-{n}": bytes((0, n, 2, 0, 4, 9)) for n in range(1, 48, 6)},
            **{f"body-{n}": bytes((1, n, 3, 0, 0, 2, 1, 1)) for n in range(2, 48, 6)},
        },
    }


def _operator_files() -> dict[str, bytes]:
    """Seeds that start with the byte that selects the parser."""
    identity = RawIdentity.generate()
    certificate = DevCa.create().certificate.public_bytes(Encoding.PEM)
    named = DevCa.create().issue("localhost")
    key = named.private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    # What the fuzzer found: the library says this late, and by an error that is no ValueError.
    extension_twice = named.chain[0].replace(b"\x06\x03\x55\x1d\x23", b"\x06\x03\x55\x1d\x0e")
    kme = (
        "[[kme]]\nid = 'a'\nlisten = '127.0.0.1:0'\nstore = 's'\nkey_file = 'k'\n"
        "certificate = 'c'\nprivate_key = 'p'\nca = 'ca'\nsaes = ['x']\n"
    )
    tunnels = "[[connect]]\nlocal = '127.0.0.1:1'\nremote = 'b:2'\ninsecure = true\n"
    return {
        "authority": b"\0" + certificate,
        "identity": b"\1" + named.leaf.public_bytes(Encoding.PEM) + key,
        "extension-twice": b"\1" + pem(extension_twice) + key,
        "raw-key": b"\2" + identity.to_pem(),
        "key-file": b"\3" + b"00" * 32 + b"\n",
        "kme": b"\4" + kme.encode(),
        "tunnels": b"\5" + tunnels.encode(),
    }


def pem(certificate: bytes) -> bytes:
    body = base64.encodebytes(certificate)
    return b"-----BEGIN CERTIFICATE-----\n" + body + b"-----END CERTIFICATE-----\n"


def _transfer_messages() -> dict[str, bytes]:
    when = transfer.Nanoseconds(-1)
    file = transfer.Offer(0, ("a", "b"), False, 9, when, 0o640)
    folder = transfer.Offer(1, ("a", "c"), True, 0, when, 0o750)
    messages: tuple[transfer.Message | transfer.Whole, ...] = (
        transfer.Hello(version=transfer.VERSION, transfer="0" * 32),
        *transfer.offers([file, folder]),
        transfer.Have(n=0, size=9),
        transfer.Digest(n=0, sha256="0" * 64),
        transfer.Send(files=((0, 0), (2, 9))),
        transfer.Whole(0, bytes(32), b"content"),
        transfer.Stored(files=(0, 1), how=transfer.How.NEW, lost=""),
        transfer.Failed(n=0, reason="disk full"),
        transfer.Bye(),
    )
    return {type(one).__name__.lower(): transfer.encode(one) for one in messages}


def _chat_messages() -> dict[str, bytes]:
    messages: tuple[chat.Message, ...] = (
        chat.Ask("rooms"),
        chat.Welcome(accepted=1, seen=2, room="lobby", resumed=True),
        chat.Entry(1, 2, "said", "lobby", "ann", "hello"),
        chat.Bye(reason="full", again=True),
    )
    return {type(one).__name__.lower(): chat.encode(one)[4:] for one in messages}


def _exchanges() -> dict[str, bytes]:
    """First messages with a proof of zeros; the first byte says who receives them, and whether
    proofs are verified."""
    head, nonce, proof = b"hybridkex combiner v2 ", bytes(32), _vector(bytes(32))
    offer = _vector(head + b"offer" + nonce + bytes((9, *bytes(31))))
    answer = _vector(head + b"answer" + nonce + bytes((9, *bytes(31))))
    return {
        "offer": b"\0" + _vector(offer + proof),
        "answer": b"\1" + _vector(answer + proof + proof),
        "offer-accepted": b"\2" + _vector(offer + proof) + _vector(bytes(32)),
        "answer-accepted": b"\3" + _vector(answer + proof + proof),
    }


def _vector(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


def _link_messages() -> dict[str, bytes]:
    """Return one short message of each kind."""
    bits = np.array([1, 0, 1, 1, 0, 0, 1, 0, 1], dtype=np.uint8)
    three = bits[:3]
    messages: dict[str, wire.Message] = {
        "hello": wire.Hello(role=1, nonce=bytes(32), settings=bytes(32), positions=None),
        "hello-again": wire.Hello(
            role=0,
            nonce=bytes(32),
            settings=bytes(32),
            positions={lane: Position(48, 304) for lane in Direction},
        ),
        "report": wire.Report(pulse=np.array([3, 9, 2**31]), basis=three, bit=three[:2]),
        "sift": wire.Sift(kept=bits, intensity=bits[:5] * 2, bit=bits[:5]),
        "ask-pass": wire.Request(b"\x01"),
        "ask": wire.Request(b"\x00\x01\x00\x00\x00\x11\x00\x00\x00"),
        "corrected": wire.Corrected(disclosed=9, announced=9, errors=(1, 2, 3)),
        "finish": wire.Finish(
            numbers=(9, 9, 1000, 32),
            hash_seed=bytes(32),
            hash=np.resize(bits, 50),
            name=bytes(16),
            seed=np.resize(bits, 99),
        ),
        "verdict": wire.Verdict(agree=True),
        "end": wire.End(reason=1),
    }
    return {name: message.encode() for name, message in messages.items()}


def _record(connection: Connection, name: str, messages: dict[str, bytes]) -> None:
    channel = connection._records
    send = channel.writer.send_raw

    def kept(raw: bytes) -> None:
        messages[f"{name}-{raw[0]}"] = raw
        send(raw)

    channel.writer.send_raw = kept  # type: ignore[method-assign]


def _carry(source: Connection, target: Connection) -> bytes:
    data = bytes(source.data_to_send())
    if data:
        target.receive_data(data)
        targets._drain(target)
    return data


def main() -> None:
    for target, named in seeds().items():
        folder = CORPUS / target
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in named.items():
            (folder / name).write_bytes(data)


if __name__ == "__main__":
    main()
