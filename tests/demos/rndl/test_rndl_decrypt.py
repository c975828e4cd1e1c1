"""The decryptor on single recordings: every suite, group and handshake; and what must not help."""

import json
import random
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from rndl_glue import attack

from hybridkex.crypto.kex import ALL_GROUPS, Group
from hybridkex.crypto.psk import ExternalPsk
from hybridkex.crypto.suites import ALL_SUITES, CipherSuite
from hybridkex.demos.rndl.capture.pcapng import PcapngWriter, read_pcapng
from hybridkex.demos.rndl.capture.tcpip import ConnectionWriter
from hybridkex.demos.rndl.later.decrypt import Adversary, Verdict, _open
from hybridkex.demos.rndl.later.knowledge import Knowledge
from hybridkex.demos.rndl.later.reading import read_capture
from hybridkex.demos.rndl.matrix import CONFIGURATIONS, TOY, Configuration, Delivery
from hybridkex.demos.rndl.now.stage import Plaintext, Stage
from hybridkex.errors import RecordingError
from hybridkex.secret import Secret
from hybridkex.tls.config import ClientConfig, ServerConfig
from hybridkex.tls.connection import ClientConnection, ServerConnection
from hybridkex.tls.events import SessionProposed

X25519_ONLY, HYBRID, X25519_QKD, ALL_LEGS, PSK_ALONE, FRESH, FRESH_QKD = CONFIGURATIONS


def recorded(
    folder: Path, configuration: Configuration, **client_options: Any
) -> tuple[Stage, Path, list[Plaintext]]:
    stage = Stage(folder / "stage")
    plaintexts = trio.run(partial(stage.record, configuration, **client_options))
    return stage, stage.recording(configuration, Delivery.IN_PROCESS), plaintexts


def read_as_said(verdicts: list[Verdict], plaintexts: list[Plaintext]) -> None:
    for verdict, plaintext in zip(verdicts, plaintexts, strict=True):
        assert verdict.missing == ()
        assert verdict.decrypted
        assert (verdict.to_server, verdict.to_client) == (plaintext.to_server, plaintext.to_client)
        assert verdict.resumed == plaintext.resumed
        assert verdict.connection.suite.name == plaintext.session["cipher_suite"]


@pytest.mark.parametrize("suite", ALL_SUITES, ids=str)
def test_every_suite(suite: CipherSuite, tmp_path: Path) -> None:
    stage, capture, plaintexts = recorded(tmp_path, HYBRID, suites=(suite,))
    read_as_said(attack(capture, stage, "ecdh", "ml-kem"), plaintexts)


@pytest.mark.parametrize("group", ALL_GROUPS, ids=str)
def test_every_group(group: Group, tmp_path: Path) -> None:
    configuration = Configuration(id="any", title=group.name, group=group)
    stage, capture, plaintexts = recorded(tmp_path, configuration)
    read_as_said(attack(capture, stage, *configuration.primitives), plaintexts)
    for primitive in configuration.primitives:
        others = configuration.primitives - {primitive}
        assert not any(verdict.decrypted for verdict in attack(capture, stage, *others))


@pytest.mark.parametrize("suite", ALL_SUITES, ids=str)
def test_every_secret_of_a_key_update_is_that_of_the_parties(
    suite: CipherSuite, tmp_path: Path
) -> None:
    """Two programs derive the same: the adversary from the wire, the parties' into a key log."""
    stage, capture, plaintexts = recorded(tmp_path, FRESH, suites=(suite,))
    verdicts = attack(capture, stage, "ecdh", "ml-kem")
    read_as_said(verdicts, plaintexts)
    [connection] = connections(capture)
    adversary = Adversary(Knowledge.from_folder(stage.folder))
    [start] = list(adversary._starts(connection, verdicts[0].legs[:2], None))
    opened = _open(connection, start)
    assert opened is not None
    assert opened._chain is not None
    log = (stage.folder / "keylog" / f"{capture.name}.txt").read_text().splitlines()
    logged = {line.split()[0]: bytes.fromhex(line.split()[2]) for line in log}
    (client,), (server,) = opened.keys[True], opened.keys[False]
    assert client.secret == logged["CLIENT_TRAFFIC_SECRET_1"]
    assert server.secret == logged["SERVER_TRAFFIC_SECRET_1"]
    assert opened._chain.exporter == logged["EXPORTER_SECRET_1"]


def test_a_qkd_key_of_a_key_update_cannot_be_left_out(tmp_path: Path) -> None:
    """Everything else is known: the exchange of both, and the QKD key of the handshake."""
    stage, capture, _ = recorded(tmp_path, FRESH_QKD)
    folder = tmp_path / "adversary"
    shutil.copytree(stage.folder / "oracle", folder / "oracle")
    shutil.copytree(stage.folder / "stolen", folder / "stolen")
    [verdict] = Adversary(Knowledge.from_folder(folder)).attack(connections(capture))
    assert not verdict.decrypted
    (missing,) = verdict.missing
    assert missing.startswith("QKD key ")
    assert missing.endswith("of the key update")
    assert b"with new keys?" not in verdict.to_server


@pytest.mark.parametrize("configuration", [X25519_ONLY, HYBRID], ids=lambda one: one.id)
def test_hello_retry_request(configuration: Configuration, tmp_path: Path) -> None:
    stage, capture, plaintexts = recorded(tmp_path, configuration, key_shares=0)
    verdicts = attack(capture, stage, "ecdh", "ml-kem")
    read_as_said(verdicts, plaintexts)
    for verdict in verdicts:
        assert verdict.connection.retried
        assert "HelloRetryRequest" in [event.what for event in verdict.events]


def test_hello_retry_request_with_a_qkd_key(tmp_path: Path) -> None:
    """The binder of the second ClientHello covers the first, too."""
    stage, capture, plaintexts = recorded(tmp_path, ALL_LEGS, key_shares=0, connections=1)
    (verdict,) = attack(capture, stage, "ecdh", "ml-kem")
    assert verdict.connection.retried
    assert not verdict.decrypted
    (missing,) = verdict.missing
    assert missing == f"QKD key {plaintexts[0].session['qkd_key_ids'][0]}"  # type: ignore[index]


def test_an_oracle_answers_to_the_share_on_the_wire_and_to_nothing_else(tmp_path: Path) -> None:
    stage, capture, _ = recorded(tmp_path, X25519_ONLY, connections=1)
    lines = stage.escrow.file("ecdh").read_text().splitlines()
    assert len(lines) == 2, "the client's key pair and the server's"
    for kept in lines:  # either private key is enough
        knowledge = Knowledge.from_folder(oracle(tmp_path / kept[-20:-2], [kept]))
        assert Adversary(knowledge).attack(connections(capture))[0].decrypted
    changed = [json.loads(line) for line in lines]
    for item in changed:
        item["public"] = item["public"][:-2] + f"{int(item['public'][-2:], 16) ^ 1:02x}"
    folder = oracle(tmp_path / "changed", [json.dumps(item) for item in changed])
    (verdict,) = Adversary(Knowledge.from_folder(folder)).attack(connections(capture))
    assert verdict.missing == ("X25519",)


def oracle(folder: Path, lines: list[str]) -> Path:
    (folder / "oracle").mkdir(parents=True)
    (folder / "oracle/ecdh.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def connections(capture: Path) -> list[Any]:
    return read_capture(capture / "session.pcapng")[0]


def test_a_capture_that_ends_early_is_read_to_its_end(tmp_path: Path) -> None:
    stage, capture, plaintexts = recorded(tmp_path, HYBRID, connections=1)
    packets = list(read_pcapng(capture / "session.pcapng"))
    lengths = set()
    for count in range(len(packets) + 1):
        cut = tmp_path / "cut"
        shutil.rmtree(cut, ignore_errors=True)
        cut.mkdir()
        with (cut / "session.pcapng").open("wb") as file:
            writer = PcapngWriter(file)
            for packet in packets[:count]:
                writer.packet(int(packet.time * 1e9), packet.data)
        for verdict in attack(cut, stage, "ecdh", "ml-kem"):
            assert plaintexts[0].to_server.startswith(verdict.to_server)
            assert plaintexts[0].to_client.startswith(verdict.to_client)
            lengths.add(len(verdict.to_server + verdict.to_client))
    assert len(lengths) == 5, "nothing, and then one line more at a time"


def test_a_resumed_connection_alone(tmp_path: Path) -> None:
    """Without the recording of the first one there is no ticket, unless its key was stolen."""
    stage, capture, plaintexts = recorded(tmp_path, HYBRID)
    second = connections(capture)[1]
    thief = tmp_path / "thief"
    shutil.copytree(stage.folder / "oracle", thief / "oracle")
    (verdict,) = Adversary(Knowledge.from_folder(thief)).attack([second])
    assert verdict.missing == ("PSK of the ticket",)
    assert not verdict.decrypted
    (thief / "stolen").mkdir()
    shutil.copy(stage.folder / "stolen/ticket-keys.jsonl", thief / "stolen")
    (verdict,) = Adversary(Knowledge.from_folder(thief)).attack([second])
    read_as_said([verdict], plaintexts[1:])


def test_the_toy_curve_needs_no_oracle(tmp_path: Path) -> None:
    stage, capture, plaintexts = recorded(tmp_path, TOY, connections=1)
    assert not any(
        path.read_text() for path in (stage.folder / "oracle").iterdir() if "ecdh" in path.name
    )
    read_as_said(attack(capture, stage), plaintexts)


# --- external PSKs, and keys that cross a wire in the clear ---------------------------------------

PLAIN = ExternalPsk(identity=b"site-to-site", key=Secret(bytes(range(100, 132))))


@pytest.mark.parametrize(
    "psk", [PLAIN, replace(PLAIN, context=b"imported")], ids=["plain", "imported"]
)
@pytest.mark.parametrize("overheard", [True, False])
def test_a_key_in_the_clear_is_found(psk: ExternalPsk, overheard: bool, tmp_path: Path) -> None:
    """The control of the search: a PSK that crosses a recorded wire in the clear does not help."""
    stage = Stage(tmp_path / "stage")
    group = stage.escrow.instrumented(ALL_LEGS.group)
    client = ClientConnection(ClientConfig(psks=(psk,), groups=(group,)), "localhost")
    server = ServerConnection(ServerConfig(psks=(psk,), groups=(group,)))
    folder = tmp_path / "case"
    folder.mkdir()
    with (folder / "session.pcapng").open("wb") as file:
        writer = PcapngWriter(file)
        record = ConnectionWriter(writer, ("127.0.0.1", 1), ("127.0.0.1", 2), 0)
        client.start()
        for turn in range(6):
            if turn == 3:
                client.send_data(b"the vault opens with 4711")
            for side, other in ((client, server), (server, client)):
                data = bytes(side.data_to_send())
                if data:
                    record.data(turn, data, from_client=side is client)
                    other.receive_data(data)
                    while (event := other.next_event()) is not None:
                        if isinstance(event, SessionProposed):
                            other.accept()
        key = psk.key.reveal() if overheard else bytes(32)
        other_wire = ConnectionWriter(writer, ("127.0.0.1", 3), ("127.0.0.1", 4), 0)
        other_wire.data(1, b"a courier's note: " + key + b" end", from_client=True)
    (verdict,) = attack(folder, stage, "ecdh", "ml-kem")
    assert verdict.decrypted is overheard
    assert verdict.to_server == (b"the vault opens with 4711" if overheard else b"")
    if not overheard:
        assert verdict.missing == ("external PSK",)


# --- what cannot be read --------------------------------------------------------------------------


def test_stolen_goods_that_are_not(tmp_path: Path) -> None:
    for path, content in (
        ("oracle/ecdh.jsonl", "{"),
        ("oracle/ecdh.jsonl", '{"public": "00"}'),
        ("oracle/ecdh.jsonl", '{"public": "00", "private": "00"}'),
        ("stolen/certificate/a.pem", "not PEM"),
        ("stolen/ticket-keys.jsonl", '{"name": "00", "key": "00"}'),
        ("stolen/kme/a/keys.db", "not a database"),
    ):
        folder = tmp_path / path.replace("/", "-") / content[:20].replace("/", "")
        file = folder / path
        file.parent.mkdir(parents=True)
        file.write_text(content)
        (file.parent / "store.key").write_text("00" * 32)
        with pytest.raises(RecordingError, match="cannot use what was stolen"):
            Knowledge.from_folder(folder)


def test_other_traffic_is_no_connection(tmp_path: Path) -> None:
    """HTTP, rubbish, half a handshake: kept as overheard, no crash."""
    _, capture, _ = recorded(tmp_path, X25519_ONLY, connections=1)
    hello = next(p for p in read_pcapng(capture / "session.pcapng") if b"\x16\x03" in p.data).data[
        54:
    ]
    for number, data in enumerate(
        (b"GET / HTTP/1.1\r\n\r\n", bytes(100), hello, b"\x16\x03\x03\0\0")
    ):
        path = tmp_path / f"{number}.pcapng"
        with path.open("wb") as file:
            record = ConnectionWriter(PcapngWriter(file), ("127.0.0.1", 1), ("127.0.0.1", 2), 0)
            record.data(1, data, from_client=True)
            record.data(2, data, from_client=False)
        found, others = read_capture(path)
        assert found == []
        assert [flow.stream(from_client=True) for flow in others] == [data]


def test_damaged_recordings_break_nothing(tmp_path: Path) -> None:
    """Bytes changed anywhere above TCP: less is read, or nothing; never another error."""
    stage, capture, plaintexts = recorded(tmp_path, HYBRID, key_shares=0)
    said = [(plaintext.to_server, plaintext.to_client) for plaintext in plaintexts]
    packets = list(read_pcapng(capture / "session.pcapng"))
    rng, outcomes = random.Random(1), set()
    (tmp_path / "damaged").mkdir()
    for _ in range(60):
        damaged = rng.choices(range(len(packets)), k=rng.randint(1, 3))
        with (tmp_path / "damaged/session.pcapng").open("wb") as file:
            writer = PcapngWriter(file)
            for number, packet in enumerate(packets):
                data = bytearray(packet.data)
                if number in damaged and len(data) > 54:
                    data[rng.randrange(54, len(data))] ^= 1 << rng.randrange(8)
                writer.packet(int(packet.time * 1e9), bytes(data))
        for verdict in attack(tmp_path / "damaged", stage, "ecdh", "ml-kem"):
            read = (verdict.to_server, verdict.to_client)
            assert any(a.startswith(read[0]) and b.startswith(read[1]) for a, b in said)
            outcomes.add("all" if read in said else "some" if any(read) else "nothing")
    assert outcomes == {"all", "some", "nothing"}
