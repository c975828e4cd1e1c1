"""Key updates of two engines: what they agree on, what they derive, and what they refuse."""

import contextlib
import gc
import hashlib
import hmac
import itertools
import random
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from tls_glue import Pair
from update_glue import (
    OFF,
    PREFER,
    REQUIRE,
    both,
    configs,
    connected,
    events_of,
    fresh_key,
    policy,
    settle,
    update,
)

from hybridkex import (
    TLS_AES_128_GCM_SHA256,
    TLS_AES_256_GCM_SHA384,
    TLS_CHACHA20_POLY1305_SHA256,
    X25519,
    X25519MLKEM768,
    ClientConfig,
    FreshKeys,
    KeyUpdates,
    Limits,
    MemoryTicketStore,
    Requirement,
    ServerConfig,
    TicketIssuer,
    UpdateKey,
)
from hybridkex.constants import Alert, HandshakeType
from hybridkex.errors import (
    BadRecordMac,
    ConfigError,
    DecryptError,
    IllegalParameter,
    LocalStateError,
    PeerError,
    PolicyRefused,
    UnexpectedMessage,
)
from hybridkex.reasons import Reason
from hybridkex.secret import Secret
from hybridkex.tls import fresh_negotiation
from hybridkex.tls.events import (
    ApplicationData,
    EpochBegan,
    KeyUpdated,
    TicketReceived,
    UpdateDeclined,
    UpdateWanted,
)
from hybridkex.tls.protection import WriteProtection
from hybridkex.wire import extensions as ext
from hybridkex.wire.extensions import KeyShareEntry
from hybridkex.wire.layout import Message
from hybridkex.wire.messages import KeyUpdate, NewSessionTicket, encode
from hybridkex.wire.update_messages import (
    DeclineReason,
    Demand,
    FreshConfirm,
    FreshDecline,
    FreshRequest,
    FreshResponse,
    SlotAnswer,
    UpdateFinish,
    UpdateRequest,
    UpdateResponse,
)

SIDES = ["client", "server"]
STANDING = partial(float, time.time())
"""A clock that stands still."""


@pytest.fixture
def no_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers that know the draft alone."""
    offer = fresh_negotiation.offer

    def alone(config: ClientConfig) -> list[ext.Extension]:
        return [one for one in offer(config) if not isinstance(one, ext.FreshQkdKeysOffer)]

    monkeypatch.setattr(fresh_negotiation, "offer", alone)


# --- what is agreed on ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs"), [(a, b) for a in Requirement for b in Requirement], ids=str
)
def test_the_policies_of_both_sides(ours: Requirement, theirs: Requirement) -> None:
    pair = Pair.make(*configs(policy(fresh_keys=ours), policy(fresh_keys=theirs)))
    pair.client.start()
    pair.fight()
    agreed = OFF not in (ours, theirs)
    if not agreed and REQUIRE in (ours, theirs):
        errors = [one for one in pair.errors.values() if isinstance(one, PolicyRefused)]
        assert [one.reason for one in errors] == [Reason.FRESH_KEYS_REQUIRED]
        assert not (pair.client.handshake_complete and pair.server.handshake_complete)
        return
    kind = KeyUpdates.FRESH if agreed else KeyUpdates.STANDARD
    assert pair.client.session.key_updates is pair.server.session.key_updates is kind
    pair.client.update_keys()
    pair.pump()
    pair.exchange(b"to server", b"to client")
    assert pair.client.session.epoch == pair.server.session.epoch == int(agreed)
    assert bool(events_of(pair, KeyUpdated, "server")) is not agreed
    if ours is PREFER and not agreed:
        assert "NO FRESH KEYS" in str(pair.client.session)


@pytest.mark.usefixtures("no_slot")
def test_a_peer_that_knows_the_draft_alone() -> None:
    pair = connected()
    assert pair.client.session.key_updates is KeyUpdates.EXTENDED
    assert pair.server.session.key_updates is KeyUpdates.EXTENDED
    for who in SIDES:
        update(pair, who)
        pair.exchange(b"a", b"b")
    assert pair.client.session.epoch == 2
    assert not pair.client.session.epochs[0].confirmed
    with pytest.raises(LocalStateError, match="take no QKD key"):
        pair.client.start_update(fresh_key())


@pytest.mark.usefixtures("no_slot")
@pytest.mark.parametrize("who", SIDES)
def test_a_slot_that_is_required_and_not_there(who: str) -> None:
    strict, loose = policy(fresh_qkd=REQUIRE), policy()
    ours, theirs = (strict, loose) if who == "client" else (loose, strict)
    pair = Pair.make(*configs(ours, theirs))
    pair.client.start()
    pair.fight()
    error = pair.errors[who]
    assert isinstance(error, PolicyRefused)
    assert error.reason is Reason.FRESH_KEYS_REQUIRED


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ([ext.TlsFlags(frozenset((63, 64)))], Reason.FLAG_NOT_OFFERED),
        ([ext.FreshQkdKeysAnswer(1)], Reason.FRESH_KEYS_ANSWER),
        (
            [ext.TlsFlags(frozenset((64,))), ext.FreshQkdKeysAnswer(2)],
            Reason.FRESH_KEYS_ANSWER,
        ),
    ],
)
def test_answers_that_do_not_fit_the_offer(
    answers: list[ext.Extension], reason: Reason, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fresh_negotiation, "answer", lambda kind: answers)
    pair = Pair.make(*configs())
    pair.client.start()
    pair.fight()
    error = pair.errors["client"]
    assert isinstance(error, IllegalParameter)
    assert error.reason is reason


@pytest.mark.parametrize("data", [b"", b"\0", b"\1\0", bytes(9)])
def test_flags_in_another_form_than_the_shortest(data: bytes) -> None:
    body = bytes((len(data),)) + data
    raw = b"\xff\x3e" + len(body).to_bytes(2, "big") + body
    reader = ext.Reader(len(raw).to_bytes(2, "big") + raw)
    with pytest.raises(IllegalParameter) as caught:
        ext.parse(ext.MessageKind.CLIENT_HELLO, reader)
    assert caught.value.reason is Reason.FLAGS_MALFORMED


def test_flags_are_counted_from_the_least_significant_bit() -> None:
    """The examples of draft-ietf-tls-tlsflags section 2."""
    for flags, data in (
        ({0}, "00000001"),
        ({1, 5}, "00100010"),
        ({3, 5, 23}, "00101000 00000000 10000000"),
    ):
        octets = bytes(int(one, 2) for one in data.split())
        assert ext.TlsFlags(frozenset(flags)).body() == bytes((len(octets),)) + octets


def test_fresh_keys_and_tickets_exclude_each_other() -> None:
    ours, theirs = configs()
    assert theirs.tickets is None
    for wanted in ({"policy": policy()}, {"fresh_keys": FreshKeys()}):
        with pytest.raises(ConfigError, match="not resumed"):
            ClientConfig(verifier=ours.verifier, ticket_store=MemoryTicketStore(), **wanted)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="not resumed"):
            ServerConfig(identities=theirs.identities, tickets=TicketIssuer(), **wanted)  # type: ignore[arg-type]
    assert ServerConfig(identities=theirs.identities).tickets is not None
    assert ServerConfig(identities=theirs.identities, tickets=None).tickets is None


def test_a_schedule_requires_fresh_keys() -> None:
    ours, theirs = configs()
    scheduled = ClientConfig(verifier=ours.verifier, fresh_keys=FreshKeys())
    assert scheduled.policy_in_force.fresh_keys is REQUIRE
    assert scheduled.policy_in_force.fresh_qkd is OFF
    with_keys = ClientConfig(
        verifier=ours.verifier, psk_source=ours.psk_source, fresh_keys=FreshKeys()
    )
    assert with_keys.policy_in_force.fresh_qkd is REQUIRE
    with pytest.raises(ConfigError, match="the policy turns"):
        ClientConfig(verifier=ours.verifier, fresh_keys=FreshKeys(), policy=policy(fresh_keys=OFF))
    with pytest.raises(ConfigError, match="need a source"):
        ServerConfig(identities=theirs.identities, policy=policy(psk=None, fresh_qkd=REQUIRE))


# --- what is derived, a second time with hmac and hashlib alone -----------------------------------


def extract(name: str, salt: bytes, secret: bytes) -> bytes:
    return hmac.new(salt, secret, name).digest()


def expand(name: str, secret: bytes, label: bytes, context: bytes) -> bytes:
    size = hashlib.new(name).digest_size
    full = b"tls13 " + label
    info = size.to_bytes(2, "big") + bytes((len(full),)) + full
    return hmac.new(secret, info + bytes((len(context),)) + context + b"\1", name).digest()


class Overheard:
    """The messages and the exchange secrets of a pair, and its key log."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: dict[str, str] = {}
        self.sent: list[bytes] = []
        self.shared: list[bytes] = []
        respond = type(X25519.exchange).respond

        def responding(exchange: Any, share: bytes) -> tuple[bytes, Secret]:
            answer, secret = respond(exchange, share)
            self.shared.append(secret.reveal())
            return answer, secret

        monkeypatch.setattr(type(X25519.exchange), "respond", responding)

    def note(self, line: str) -> None:
        label, _, secret = line.split()
        assert self.log.setdefault(label, secret) == secret  # both ends log
        self.log[label] = secret

    def listen(self, pair: Pair) -> None:
        for end in (pair.client, pair.server):
            writer = end._records.writer

            def send_raw(raw: bytes, inner: Any = writer.send_raw) -> None:
                self.sent.append(raw)
                inner(raw)

            writer.send_raw = send_raw  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "suite", [TLS_AES_128_GCM_SHA256, TLS_AES_256_GCM_SHA384, TLS_CHACHA20_POLY1305_SHA256]
)
@pytest.mark.parametrize("slot", [True, False], ids=["slot", "draft"])
def test_every_secret_is_derived_again(
    suite: Any, slot: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if not slot:
        request.getfixturevalue("no_slot")
    heard = Overheard(monkeypatch)
    loose = policy(fresh_qkd=PREFER if slot else OFF)
    pair = Pair.make(*configs(loose, loose, suites=(suite,), key_log=heard.note))
    heard.listen(pair)
    pair.connect()
    name = suite.hash.name.replace("-", "").lower()
    size = hashlib.new(name).digest_size
    zeros, empty = bytes(size), hashlib.new(name, b"").digest()

    handshake = b"".join(heard.sent)
    salt = expand(name, extract(name, zeros, zeros), b"derived", empty)
    secret = extract(name, salt, heard.shared[0])
    main = extract(name, expand(name, secret, b"derived", empty), zeros)
    server_finished = hashlib.new(name, handshake[: -4 - size]).digest()
    exporter = expand(name, main, b"exporter eku", server_finished)
    transcript = hashlib.new(name, handshake).digest()
    for number in range(1, 6):
        base = expand(name, exporter, b"label", empty)
        exported = expand(name, base, b"exporter", hashlib.new(name, b"context").digest())
        for end in (pair.client, pair.server):
            assert end.export_fresh(b"label", b"context", size).reveal() == exported

        heard.sent.clear()
        heard.shared.clear()
        key = fresh_key() if slot and number % 2 else None
        found = key if number < 5 else None
        update(pair, SIDES[number % 2], key, lambda _, found=found: found)
        asked, answered, *rest = heard.sent
        salt = expand(name, main, b"derived", empty)
        if slot:
            imported = zeros
            if found is not None:
                identity = found.psk.identity
                whole = len(identity).to_bytes(2, "big") + identity + b"\x00\x05epoch\x03\x04"
                whole += suite.hash.kdf.to_bytes(2, "big")
                assert whole in asked
                early = extract("sha256", bytes(32), found.psk.key.reveal())
                digest = hashlib.sha256(whole).digest()
                label = b"tls13 derived psk"
                info = size.to_bytes(2, "big") + bytes((len(label),)) + label + b"\x20" + digest
                imported = hkdf_expand(early, info, size)
            salt = expand(name, extract(name, salt, imported), b"derived", empty)
        main = extract(name, salt, heard.shared[0])
        transcript = hashlib.new(name, transcript + asked + answered).digest()
        exporter = expand(name, main, b"exp master", transcript)
        traffic = {}
        for side, label in (("CLIENT", b"c ap traffic"), ("SERVER", b"s ap traffic")):
            traffic[side] = expand(name, main, label, transcript)
            assert heard.log[f"{side}_TRAFFIC_SECRET_{number}"] == traffic[side].hex()
        assert heard.log[f"EXPORTER_SECRET_{number}"] == exporter.hex()
        confirmations = {one[5:] for one in rest if one[4] == 227}
        assert confirmations == (
            {
                hmac.new(expand(name, one, b"finished", b""), transcript, name).digest()
                for one in traffic.values()
            }
            if slot
            else set()
        )
    assert [bool(one.qkd_key_ids) for one in pair.client.session.epochs] == (
        [True, False, True, False, False] if slot else [False] * 5
    )


def hkdf_expand(key: bytes, info: bytes, size: int) -> bytes:
    output, block, count = b"", b"", 1
    while len(output) < size:
        block = hmac.new(key, block + info + bytes((count,)), "sha256").digest()
        output, count = output + block, count + 1
    return output[:size]


def test_the_ordinary_exporter_stays_and_the_other_changes() -> None:
    pair = connected()
    before = pair.client.export(b"x", b"", 32)
    fresh = {pair.client.export_fresh(b"x", b"", 32).reveal()}
    for who in SIDES:
        update(pair, who)
        assert pair.client.export(b"x", b"", 32) == pair.server.export(b"x", b"", 32) == before
        one, other = (end.export_fresh(b"x", b"", 32) for end in (pair.client, pair.server))
        assert one == other
        fresh.add(one.reveal())
    assert len(fresh) == 3
    plain = connected(policy(fresh_keys=OFF), policy(fresh_keys=OFF))
    with pytest.raises(LocalStateError, match="not negotiated"):
        plain.client.export_fresh(b"x", b"", 32)


def test_no_secret_of_an_old_epoch_is_kept() -> None:
    log: list[str] = []
    pair = connected(key_log=log.append)
    chains: set[bytes] = set()
    for who in ("client", "server", "client"):
        for end in (pair.client, pair.server):
            updates = end._updates("")
            chains |= {updates._generation.salt.reveal(), updates._generation.transcript}
        update(pair, who)
    last = {f"{side}_TRAFFIC_SECRET_3" for side in ("CLIENT", "SERVER")} | {"EXPORTER_SECRET_3"}
    labels = {line.split()[0]: bytes.fromhex(line.split()[2]) for line in log}
    old = {
        secret
        for label, secret in labels.items()
        if "TRAFFIC_SECRET" in label and label not in last
    } | chains
    kept = {bytes(one) for end in (pair.client, pair.server) for one in reachable(end)}
    assert not old & kept
    assert {labels[label] for label in last} <= kept  # the search finds what is there


def reachable(root: object) -> Iterator[bytes]:
    """All bytes that hang on an engine, in its own objects."""
    seen: set[int] = set()
    todo = [root]
    while todo:
        one = todo.pop()
        if id(one) in seen or isinstance(one, type):
            continue
        seen.add(id(one))
        if isinstance(one, bytes):
            yield one
            continue
        module = getattr(type(one), "__module__", "")
        if isinstance(one, dict | list | tuple | set) or module.startswith("hybridkex"):
            todo += gc.get_referents(one)


# --- order, and what is out of it -----------------------------------------------------------------


@pytest.mark.parametrize("who", SIDES)
def test_data_under_every_key_of_an_update(who: str) -> None:
    """Data before, between and behind each message of an update, both ways."""
    pair = connected()
    starter, other = both(pair, who)
    sent: dict[int, bytes] = {id(starter): b"", id(other): b""}
    heard: dict[int, bytes] = {id(starter): b"", id(other): b""}

    def say() -> None:
        for end in (starter, other):
            piece = bytes((len(sent[id(end)]),))
            end.send_data(piece)
            sent[id(end)] += piece

    def carry(source: Any, target: Any) -> None:
        for byte in bytes(source.data_to_send()):  # in the smallest pieces
            target.receive_data(bytes((byte,)))
            while (event := target.next_event()) is not None:
                if isinstance(event, ApplicationData):
                    heard[id(target)] += event.data

    say()
    starter.start_update()
    for _ in range(4):
        say()
        carry(starter, other)
        say()
        carry(other, starter)
    carry(starter, other)
    assert heard[id(other)] == sent[id(starter)]
    assert heard[id(starter)] == sent[id(other)]
    assert starter.session.epoch == other.session.epoch == 1
    assert not starter.update_under_way
    assert not other.update_under_way


@pytest.mark.parametrize("slot", [True, False], ids=["slot", "draft"])
@pytest.mark.parametrize("seed", range(8))
def test_requests_that_cross(slot: bool, seed: int, request: pytest.FixtureRequest) -> None:
    """One of the two is ignored, by both ends alike: one epoch, of one pair of shares."""
    if not slot:
        request.getfixturevalue("no_slot")
    pair = connected()
    chance = random.Random(seed)
    for number in range(1, 6):
        ends = [pair.client, pair.server]
        chance.shuffle(ends)
        for end in ends:
            end.start_update()
            with pytest.raises(LocalStateError, match="under way"):
                end.start_update()
        shares = {id(end): end._updates("")._state.started.share for end in ends}  # type: ignore[union-attr]
        settle(pair)
        pair.exchange(b"x" * number, b"y")
        whys = {id(end): end.session.epochs[-1].why for end in ends}
        winner = max(ends, key=lambda end: shares[id(end)])
        assert [whys[id(end)] for end in ends] == [
            "asked" if end is winner else "peer" for end in ends
        ]
        assert pair.client.session.epoch == pair.server.session.epoch == number


def test_requests_that_cross_with_qkd_keys() -> None:
    loose = policy(fresh_qkd=REQUIRE)
    pair = connected(loose, loose)
    for _ in range(4):
        keys = {}
        for end in (pair.client, pair.server):
            key = fresh_key()
            keys[key.psk.identity] = key
            end.start_update(key)
        settle(pair, lambda identity, keys=keys: keys[identity[2:-11]])
        pair.exchange(b"a", b"b")
    assert pair.client.session.epoch == 4
    assert [one.qkd_key_ids for one in pair.client.session.epochs] == [
        one.qkd_key_ids for one in pair.server.session.epochs
    ]


def test_the_same_key_share_from_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = connected()
    started = X25519.exchange.start()
    monkeypatch.setattr(type(X25519.exchange), "start", lambda self: started)
    pair.client.start_update()
    pair.server.start_update()
    pair.fight()
    errors = [one for one in pair.errors.values() if isinstance(one, UnexpectedMessage)]
    assert errors
    assert {one.reason for one in errors} == {Reason.UPDATES_IDENTICAL}


SHARE = KeyShareEntry(X25519.code, X25519.exchange.start().share)
OTHER_GROUP = KeyShareEntry(X25519MLKEM768.code, bytes(1216))
FORMS: dict[str, Message] = {
    "request": UpdateRequest(SHARE),
    "response": UpdateResponse(SHARE),
    "finish": UpdateFinish(),
    "fresh request": FreshRequest(SHARE, Demand.OPTIONAL, b""),
    "fresh response": FreshResponse(SHARE, SlotAnswer.EMPTY),
    "fresh decline": FreshDecline(DeclineReason.KEY_REQUIRED),
    "fresh confirm": FreshConfirm(bytes(32)),
    "key update": KeyUpdate(False),
}
RIGHT_FORM = {  # in which states of the victim a message may come
    True: {"idle": {"fresh request"}, "asked": {"fresh response", "fresh decline"},
           "answered": {"finish"}},
    False: {"idle": {"request"}, "asked": {"response"}, "answered": {"finish"}},
}  # fmt: skip


@pytest.mark.parametrize("slot", [True, False], ids=["slot", "draft"])
@pytest.mark.parametrize("victim", SIDES)
@pytest.mark.parametrize("state", ["idle", "asked", "answered"])
@pytest.mark.parametrize("name", FORMS)
def test_every_message_in_every_state(
    name: str, state: str, victim: str, slot: bool, request: pytest.FixtureRequest
) -> None:
    if not slot:
        request.getfixturevalue("no_slot")
    pair = connected()
    target, source = both(pair, victim)
    if state == "asked":
        target.start_update()
        target.data_to_send()
    elif state == "answered":
        source.start_update()
        target.receive_data(source.data_to_send())
        assert target.next_event() is None
        target.data_to_send()
    crossed = state == "asked" and name == ("fresh request" if slot else "request")
    source._records.writer.send(FORMS[name])
    target.receive_data(source.data_to_send())
    if name in RIGHT_FORM[slot][state] or crossed:
        target.next_event()
        return
    with pytest.raises(UnexpectedMessage) as caught:
        target.next_event()
    assert caught.value.reason in (
        Reason.UPDATE_OUT_OF_ORDER,
        Reason.STANDARD_KEY_UPDATE,
    )
    source.receive_data(target.data_to_send())


@pytest.mark.parametrize("name", ["finish", "fresh confirm", "fresh request"])
def test_an_update_that_was_not_negotiated(name: str) -> None:
    pair = connected(policy(fresh_keys=OFF), policy(fresh_keys=OFF))
    pair.client._records.writer.send(FORMS[name])
    pair.fight()
    assert isinstance(pair.errors["server"], UnexpectedMessage)


def test_a_second_request_before_the_answer() -> None:
    pair = connected(policy(fresh_qkd=PREFER), policy(fresh_qkd=PREFER))
    pair.client.start_update(fresh_key())
    pair.client._records.writer.send(FORMS["fresh request"])
    pair.fight()
    error = pair.errors["server"]
    assert isinstance(error, UnexpectedMessage)
    assert error.reason is Reason.UPDATE_OUT_OF_ORDER


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (FreshRequest(OTHER_GROUP, Demand.OPTIONAL, b""), Reason.UPDATE_GROUP),
        (FreshRequest(SHARE, Demand.REQUIRED, b""), Reason.UPDATE_MALFORMED),
        (
            FreshRequest(KeyShareEntry(X25519.code, bytes(31)), Demand.OPTIONAL, b""),
            Reason.KEY_SHARE_MALFORMED,
        ),
        (
            FreshRequest(KeyShareEntry(X25519.code, bytes(32)), Demand.OPTIONAL, b""),
            Reason.KEY_SHARE_MALFORMED,
        ),
    ],
)
def test_requests_that_cannot_be(message: Message, reason: Reason) -> None:
    pair = connected()
    pair.client._records.writer.send(message)
    pair.fight()
    error = pair.errors["server"]
    assert isinstance(error, IllegalParameter)
    assert error.reason is reason


@pytest.mark.parametrize("answer", SlotAnswer)
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("wanted", [PREFER, REQUIRE])
def test_what_a_response_may_say_of_the_slot(
    answer: SlotAnswer, full: bool, wanted: Requirement
) -> None:
    if wanted is REQUIRE and not full:
        return  # such a request is not sent
    pair = connected(policy(fresh_qkd=wanted))
    pair.client.start_update(fresh_key() if full else None)
    pair.client.data_to_send()
    pair.server._records.writer.send(FreshResponse(SHARE, answer))
    pair.client.receive_data(pair.server.data_to_send())
    fits = answer is SlotAnswer.USED or (answer is SlotAnswer.NOT_FOUND and wanted is PREFER)
    if fits if full else answer is SlotAnswer.EMPTY:
        assert pair.client.next_event() is None
        return
    with pytest.raises(IllegalParameter) as caught:
        pair.client.next_event()
    assert caught.value.reason is Reason.UPDATE_ANSWER


def test_bytes_behind_the_message_at_which_a_key_changes() -> None:
    """A response and whatever follows it in one record (RFC 9846 section 5.1)."""
    for behind in (b"\0", encode(UpdateFinish())):
        pair = connected()
        pair.client.start_update()
        pair.client.data_to_send()
        response = encode(FreshResponse(SHARE, SlotAnswer.EMPTY))
        pair.server._records.writer.send_raw(response + behind)
        pair.client.receive_data(pair.server.data_to_send())
        with pytest.raises(UnexpectedMessage) as caught:
            pair.client.next_event()
        assert caught.value.reason is Reason.KEY_CHANGE_WITHIN_RECORD


@pytest.mark.parametrize("victim", ["initiator", "responder"])
@pytest.mark.parametrize(
    "instead",
    ["data", "ticket", "another request", "wrong", "short", "close_notify", "user_canceled"],
)
def test_a_new_key_that_is_not_confirmed(
    victim: str, instead: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = connected()
    attacker = pair.server if victim == "initiator" else pair.client
    writer = attacker._records.writer
    inner = writer.send

    def send(message: Message) -> bytes:
        if not isinstance(message, FreshConfirm):
            return inner(message)
        if instead == "data":
            writer.send_data(memoryview(b"data"))
        elif instead in ("close_notify", "user_canceled"):
            writer.send_alert(Alert[instead.upper()])
        elif instead == "ticket":
            return inner(NewSessionTicket(1, 1, b"", b"ticket", ext.Extensions()))
        elif instead == "another request":
            return inner(FORMS["fresh request"])
        else:
            size = len(message.verify_data)
            wrong = bytes(size) if instead == "wrong" else message.verify_data[:-1]
            return inner(FreshConfirm(wrong))
        return b""

    monkeypatch.setattr(writer, "send", send)
    pair.client.start_update()
    pair.fight()
    error = pair.errors["client" if victim == "initiator" else "server"]
    if victim == "responder" and instead == "ticket":
        assert isinstance(error, UnexpectedMessage)  # a client gives no tickets
        return
    wrong_value = instead in ("wrong", "short")
    assert isinstance(error, DecryptError if wrong_value else UnexpectedMessage)
    assert error.reason is (
        Reason.UPDATE_CONFIRMATION if wrong_value else Reason.UPDATE_NOT_CONFIRMED
    )


# --- the slot -------------------------------------------------------------------------------------

OUTCOMES = {
    # (initiator, has a key, responder, finds it): used, not found, empty, or why it is declined
    (REQUIRE, True, REQUIRE, True): "used",
    (REQUIRE, True, PREFER, True): "used",
    (PREFER, True, REQUIRE, True): "used",
    (PREFER, True, PREFER, True): "used",
    (REQUIRE, True, REQUIRE, False): "key_not_found",
    (REQUIRE, True, PREFER, False): "key_not_found",
    (PREFER, True, REQUIRE, False): "key_not_found",
    (PREFER, True, PREFER, False): "not found",
    (PREFER, False, REQUIRE, False): "key_required",
    (PREFER, False, PREFER, False): "empty",
    (PREFER, False, OFF, False): "empty",
    (PREFER, True, OFF, False): "not found",
    (REQUIRE, True, OFF, False): "key_not_found",
    (OFF, False, REQUIRE, False): "key_required",
    (OFF, False, PREFER, False): "empty",
    (OFF, False, OFF, False): "empty",
}


@pytest.mark.parametrize("who", SIDES)
@pytest.mark.parametrize("case", OUTCOMES, ids=str)
def test_the_table_of_the_slot(case: tuple[Requirement, bool, Requirement, bool], who: str) -> None:
    """The table in docs/fresh-keys.md."""
    initiator, has, responder, finds = case
    ours, theirs = policy(fresh_qkd=initiator), policy(fresh_qkd=responder)
    pair = connected(*((ours, theirs) if who == "client" else (theirs, ours)))
    starter, other = both(pair, who)
    key = fresh_key() if has else None
    update(pair, who, key, lambda _: key if finds else None)
    expected = OUTCOMES[case]
    declined = [one.reason for one in events_of(pair, UpdateDeclined, who)]
    if expected.startswith("key_"):
        assert declined == [expected]
        assert starter.session.epoch == other.session.epoch == 0
        assert not starter.update_under_way
        assert not other.update_under_way
    else:
        assert declined == []
        for end, wanted in ((starter, initiator), (other, responder)):
            (epoch,) = end.session.epochs
            assert bool(epoch.qkd_key_ids) is (expected == "used")
            missing = expected != "used" and wanted is not OFF
            assert (epoch.qkd_missing is not None) is missing
    pair.exchange(b"data", b"goes on")


def test_a_request_without_the_key_that_our_policy_requires() -> None:
    pair = connected(policy(fresh_qkd=REQUIRE), policy(fresh_qkd=REQUIRE))
    for start in (pair.client.start_update, pair.client.update_keys):
        with pytest.raises(LocalStateError, match="requires a QKD key"):
            start()
    assert not pair.client.has_data_to_send


@pytest.mark.parametrize("wrong", ["key", "identity", "context"])
def test_another_key_at_the_other_end(wrong: str) -> None:
    """Another key of the same name: no confirmation. Another name: not ours to give."""
    loose = policy(fresh_qkd=REQUIRE)
    pair = connected(loose, loose)
    key = fresh_key()
    pair.client.start_update(key)
    pair.pump()
    psk = key.psk
    other = {
        "key": type(psk)(identity=psk.identity, key=Secret(bytes(32)), context=psk.context),
        "identity": type(psk)(identity=b"other", key=psk.key, context=psk.context),
        "context": type(psk)(identity=psk.identity, key=psk.key, context=b"other"),
    }[wrong]
    if wrong != "key":
        with pytest.raises(LocalStateError, match="not the key"):
            pair.server.provide_update_key(UpdateKey(psk=other))
        return
    pair.server.provide_update_key(UpdateKey(psk=other))
    pair.fight()
    error = pair.errors["client"]
    assert isinstance(error, BadRecordMac)
    assert "the two ends have different keys" in str(error)
    assert pair.client.session.epoch == 0


# --- limits and the end ---------------------------------------------------------------------------


def test_requests_without_end() -> None:
    loose = policy(fresh_qkd=REQUIRE)
    limits = Limits(key_updates=5)
    pair = connected(
        policy(fresh_qkd=PREFER), loose, limits=limits, clock=partial(float, time.time())
    )
    for _ in range(5):
        update(pair, "client")  # declined each time
    pair.client.start_update()
    pair.fight()
    error = pair.errors["server"]
    assert isinstance(error, UnexpectedMessage)
    assert error.reason is Reason.UPDATES_TOO_MANY


def test_a_session_that_is_silent_for_days() -> None:
    """An update a minute and no data: no storm."""
    now = [time.time()]
    pair = connected(clock=lambda: now[0])
    for number in range(100):
        update(pair, SIDES[number % 2])
        now[0] += 60
    assert pair.client.session.epoch == 100
    now[0] -= 3600  # a clock that is set back gives nothing
    for _ in range(31):
        update(pair, "client")
    pair.client.start_update()
    pair.fight()
    error = pair.errors["server"]
    assert isinstance(error, UnexpectedMessage)
    assert error.reason is Reason.UPDATES_TOO_MANY


def limit_records(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    init = WriteProtection.__init__

    def limited(self: WriteProtection, *arguments: Any) -> None:
        init(self, *arguments)
        self._last = self._update_at = most

    monkeypatch.setattr(WriteProtection, "__init__", limited)


def test_an_update_before_the_key_may_protect_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    limit_records(monkeypatch, 40)
    pair = connected()
    for number in range(200):
        pair.exchange(b"%d" % number, b"x")
    assert pair.client.session.epoch == pair.server.session.epoch >= 6
    assert {one.why for one in pair.client.session.epochs} <= {"key limit", "peer"}
    for _ in range(40):
        pair.client.send_data(b"nobody answers")
        if pair.client._records.writer.protection.remaining <= 0:  # type: ignore[union-attr]
            break
    with pytest.raises(LocalStateError, match="no key update was completed"):
        pair.client.send_data(b"one more")


def test_a_key_is_wanted_before_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    limit_records(monkeypatch, 40)
    loose = policy(fresh_qkd=REQUIRE)
    pair = connected(loose, loose)
    for _ in range(22):
        pair.exchange(b"x", b"y")
    for who in SIDES:
        end, _ = both(pair, who)
        wanted = [one for one in iter(end.next_event, None) if isinstance(one, UpdateWanted)]
        assert len(wanted + events_of(pair, UpdateWanted, who)) == 1


@pytest.mark.parametrize("closed", ["initiator", "responder", "both"])
@pytest.mark.parametrize("when", ["before", "between"])
def test_an_update_and_close_notify(closed: str, when: str) -> None:
    """Nothing is sent behind close_notify, and what the other side sends is still read."""
    pair = connected()
    if when == "between":
        pair.client.start_update()
    if closed in ("responder", "both"):
        pair.server.send_close()
    if closed in ("initiator", "both"):
        pair.client.send_close()
    if when == "before":
        if closed == "responder":
            pair.pump()
        with pytest.raises(LocalStateError):
            pair.client.start_update()
    pair.pump()
    if closed == "initiator":
        pair.server.send_data(b"the rest")
        before = len(pair.client_events)
        pair.pump()
        assert [
            one.data for one in pair.client_events[before:] if isinstance(one, ApplicationData)
        ] == [b"the rest"]
    elif closed == "responder":
        pair.client.send_data(b"the rest")
        pair.pump()
        assert events_of(pair, ApplicationData, "server")[-1].data == b"the rest"


def test_a_session_remembers_the_last_epochs() -> None:
    pair = connected()
    for number in range(70):
        update(pair, SIDES[number % 2])
        pair.exchange(b"x", b"y")
    assert pair.client.session.epoch == 70
    assert [one.number for one in pair.client.session.epochs] == list(range(7, 71))
    assert len(events_of(pair, EpochBegan, "client")) == 70
    assert not events_of(pair, TicketReceived, "client")
    shown = pair.client.session.as_json()
    assert shown["key_updates"] == "fresh"
    assert shown["epoch"] == 70
    assert "epoch 70, x25519" in str(pair.client.session)


# --- damage ---------------------------------------------------------------------------------------


def transcript_of_an_update() -> list[bytes]:
    """The messages of an update with a QKD key, as the writers send them."""
    sent: list[bytes] = []
    damage_messages(sent, None)
    return sent


def damage_messages(sent: list[bytes], damage: Any) -> tuple[Pair, UpdateKey]:
    """An update in which ``damage(number, raw)`` replaces each message as it is sent."""
    loose = policy(fresh_qkd=PREFER)
    pair = connected(loose, loose)
    key = fresh_key()
    counter = itertools.count()
    for end in (pair.client, pair.server):
        writer = end._records.writer

        def send_raw(raw: bytes, inner: Any = writer.send_raw) -> None:
            sent.append(raw)
            inner(raw if damage is None else damage(next(counter), raw))

        writer.send_raw = send_raw  # type: ignore[method-assign]
    pair.client.start_update(key)
    for _ in range(6):
        pair.fight()
        for events, end in ((pair.server_events, pair.server), (pair.client_events, pair.client)):
            for one in [one for one in events if hasattr(one, "identity")]:
                events.remove(one)
                if "server" not in pair.errors:
                    found = key if key.psk.identity in one.identity else None
                    if found is not None and end._updates("")._identity(key) != one.identity:
                        found = None
                    end.provide_update_key(found, "unknown")
    return pair, key


MESSAGES = transcript_of_an_update()
POSITIONS = [
    (number, position) for number, raw in enumerate(MESSAGES) for position in range(len(raw))
]


@pytest.mark.parametrize("way", ["flip", "drop", "double"])
def test_each_byte_of_each_message_damaged(way: str, thorough: bool) -> None:
    """An alert and an end, or no update: never two ends that believe in different keys. Without
    ``--thorough``, each byte is flipped, and each third one dropped or doubled."""
    assert [raw[4] for raw in MESSAGES] == [224, 225, 227, 2, 227]
    for number, position in POSITIONS[:: 1 if thorough or way == "flip" else 3]:

        def damage(count: int, raw: bytes, at: int = position, which: int = number) -> bytes:
            if count != which:
                return raw
            if way == "flip":
                return raw[:at] + bytes((raw[at] ^ 1,)) + raw[at + 1 :]
            if way == "drop":
                return raw[:at] + raw[at + 1 :]
            return raw[: at + 1] + raw[at:]

        pair, _ = damage_messages([], damage)
        check_that_it_ends(pair, f"{way} {number} {position}")


def check_that_it_ends(pair: Pair, what: str) -> None:
    """Data both ways behind a damaged update: an alert, and never data that was not sent."""
    for end in (pair.client, pair.server):
        with contextlib.suppress(LocalStateError):  # it is dead already
            end.send_data(b"more")
    pair.fight()
    heard = [
        one.data
        for one in pair.client_events + pair.server_events
        if isinstance(one, ApplicationData)
    ]
    assert set(heard) <= {b"more"}, what
    assert len(heard) < 2, what
    errors = [one for one in pair.errors.values() if isinstance(one, PeerError)]
    assert errors, what
    assert all(isinstance(one.alert, Alert) for one in errors), what


@pytest.mark.parametrize("number", range(len(MESSAGES)))
@pytest.mark.parametrize("way", ["drop", "double"])
def test_a_whole_message_lost_or_doubled(number: int, way: str) -> None:
    def damage(count: int, raw: bytes) -> bytes:
        if count != number:
            return raw
        return b"" if way == "drop" else raw + raw

    pair, _ = damage_messages([], damage)
    if way == "drop" and number == 0:
        # Nothing came, so the other end has nothing to object to: it waits, in epoch 0.
        assert pair.server.session.epoch == 0
        assert not pair.errors
        return
    check_that_it_ends(pair, f"{way} {number}")


def on_the_wire(way: str, place: int) -> tuple[Pair, int]:
    """An update in which one byte of its records is damaged; and how many bytes it has."""
    pair = connected()
    seen = 0

    def damage(target: Any, data: bytes) -> bytes:
        nonlocal seen
        at, seen = place - seen, seen + len(data)
        if not 0 <= at < len(data):
            return data
        return {
            "flip": data[:at] + bytes((data[at] ^ 1,)) + data[at + 1 :],
            "drop": data[:at] + data[at + 1 :],
            "double": data[: at + 1] + data[at:],
        }[way]

    pair.on_wire = damage
    pair.client.start_update()
    pair.fight()
    return pair, seen


@pytest.mark.parametrize("way", ["flip", "drop", "double"])
def test_each_byte_on_the_wire_damaged(way: str, thorough: bool) -> None:
    """Without ``--thorough``, each byte is flipped, and each third one dropped or doubled."""
    _, size = on_the_wire(way, 1 << 30)
    for place in range(0, size, 1 if thorough or way == "flip" else 3):
        pair, _ = on_the_wire(way, place)
        for end in (pair.client, pair.server):
            with contextlib.suppress(LocalStateError):  # it is dead already
                end.send_data(b"more")
        pair.fight()
        pair.cut()  # a length that was made longer leaves an end waiting
        heard = [one for one in pair.client_events + pair.server_events
                 if isinstance(one, ApplicationData)]  # fmt: skip
        assert {one.data for one in heard} <= {b"more"}, place
        assert pair.errors, place


# --- many -----------------------------------------------------------------------------------------


def many_updates(count: int, seed: int, group: Any = X25519) -> None:
    """Updates under load in both directions, started by either side or by both at once, declined
    and cut into pieces at random: no byte lost or out of order."""
    chance = random.Random(seed)
    loose = policy(fresh_qkd=PREFER)
    pair = connected(loose, loose, groups=(group,))
    ends = [pair.client, pair.server]
    sent = {id(end): bytearray() for end in ends}
    heard = {id(end): bytearray() for end in ends}
    keys: dict[bytes, UpdateKey] = {}
    pending: list[tuple[Any, bytes]] = []
    wire = {id(end): bytearray() for end in ends}
    while min(end.session.epoch for end in ends) < count:
        for end in ends:
            if chance.random() < 0.5:
                piece = chance.randbytes(chance.choice((1, 20, 3000)))
                end.send_data(piece)
                sent[id(end)] += piece
            if chance.random() < 0.3 and not end.update_under_way:
                key = fresh_key() if chance.random() < 0.5 else None
                if key is not None:
                    keys[end._updates("")._identity(key)] = key
                end.start_update(key)
        for one, identity in [item for item in pending if chance.random() < 0.5]:
            pending.remove((one, identity))
            found = keys[identity] if chance.random() < 0.8 else None
            one.provide_update_key(found, "lost")
        for source, target in ((ends[0], ends[1]), (ends[1], ends[0])):
            wire[id(target)] += source.data_to_send()
            size = chance.choice((1, 7, 500, 5000, 20000))
            piece = bytes(wire[id(target)][:size])
            del wire[id(target)][:size]
            if piece:
                target.receive_data(piece)
            while (event := target.next_event()) is not None:
                if isinstance(event, ApplicationData):
                    heard[id(target)] += event.data
                elif hasattr(event, "identity"):
                    pending.append((target, event.identity))
        for end, other in ((ends[0], ends[1]), (ends[1], ends[0])):
            size = len(heard[id(other)])
            assert heard[id(other)] == sent[id(end)][:size]
            if size > 1 << 16:
                del heard[id(other)][:], sent[id(end)][:size]
    for one, identity in pending:
        one.provide_update_key(keys[identity])
    for target in ends:
        if wire[id(target)]:
            target.receive_data(bytes(wire[id(target)]))
    for _ in range(10):
        for source, target in ((ends[0], ends[1]), (ends[1], ends[0])):
            while (event := target.next_event()) is not None:
                if isinstance(event, ApplicationData):
                    heard[id(target)] += event.data
                elif hasattr(event, "identity"):
                    target.provide_update_key(keys[event.identity])
            if source.has_data_to_send:
                target.receive_data(source.data_to_send())
    assert [heard[id(ends[1])], heard[id(ends[0])]] == [sent[id(ends[0])], sent[id(ends[1])]]
    shared = min(end.session.epoch for end in ends)
    one, other = ({epoch.number: epoch for epoch in end.session.epochs} for end in ends)
    assert all(one[n].qkd_key_ids == other[n].qkd_key_ids for n in one.keys() & other.keys())
    assert shared >= count


@pytest.mark.parametrize("seed", range(3))
def test_updates_under_load(seed: int) -> None:
    many_updates(60, seed)


@pytest.mark.slow
def test_a_thousand_updates_under_load(thorough: bool) -> None:
    """Ten thousand with ``--thorough``."""
    many_updates(10_000 if thorough else 1_000, 0)


def test_the_first_byte_says_what_the_message_is() -> None:
    assert encode(UpdateFinish()) == bytes((HandshakeType.EXTENDED_KEY_UPDATE, 0, 0, 1, 2))
