"""QKD keys for key updates: whose they are, and every field that binds one."""

from dataclasses import replace
from typing import Any

import pytest
import trio
import trio.testing

from hybridkex import (
    ClientConfig,
    DevCa,
    FreshKeys,
    Policy,
    QkdPeer,
    QkdPskSource,
    Requirement,
    SecureStream,
    ServerConfig,
    Session,
    TrustStore,
    UpdateKey,
    UpdateKeySource,
)
from hybridkex.errors import KeyConsumed, KeySourceUnavailable, KeyUnknown
from hybridkex.qkd.in_process import InProcessSource, in_process_pair
from hybridkex.qkd.psk import name_of, update_context_of
from hybridkex.qkd.source import KeyPart, KeyReference, QkdKey
from hybridkex.wire.messages import ImportedIdentity

CA = DevCa.create(algorithm="ed25519")
TRUST, IDENTITY = TrustStore((CA.certificate,)), CA.issue("localhost", algorithm="ed25519")
REQUIRE, PREFER = Requirement.REQUIRE, Requirement.PREFER


def on_wire(key: UpdateKey) -> ImportedIdentity:
    assert key.psk.context is not None
    return ImportedIdentity(key.psk.identity, key.psk.context, 0x0304, 1)


async def session_of(keys: Any, *, source: Any, client_name: str | None = None) -> Session:
    """A session at a server with these keys, whose client uses ``source``."""
    more: dict[str, Any] = {}
    if client_name is not None:
        more["identity"] = CA.issue(client_name, algorithm="ed25519")
    one, other = trio.testing.memory_stream_pair()
    policy = Policy(psk=PREFER)
    client = SecureStream(
        one,
        ClientConfig(
            verifier=TRUST,
            psk_source=QkdPskSource(source) if source else None,
            policy=policy if source else Policy(),
            **more,
        ),
        server_hostname="localhost",
    )
    server = SecureStream(
        other,
        ServerConfig(
            identities=(IDENTITY,),
            client_verifier=TRUST if client_name else None,
            psk_source=keys if isinstance(keys, QkdPskSource) else QkdPskSource(keys),
            policy=policy,
        ),
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.do_handshake)
        nursery.start_soon(server.do_handshake)
    session: Session = server.session
    await trio.aclose_forcefully(client)
    await trio.aclose_forcefully(server)
    return session


async def test_a_key_is_the_same_at_both_ends() -> None:
    alice, bob = in_process_pair("alice", "bob")
    ours, theirs = QkdPskSource(alice), QkdPskSource(bob)
    assert isinstance(ours, UpdateKeySource)
    session = await session_of(bob, source=alice)
    for client in (True, False):
        key = await ours.draw_for_update(session, client=client, epoch=3)
        found = await theirs.look_up_for_update(
            on_wire(key).encode(), session, client=not client, epoch=3
        )
        assert found == key
        with pytest.raises(KeyConsumed):
            await theirs.look_up_for_update(
                on_wire(key).encode(), session, client=not client, epoch=3
            )
    assert ours.counters.update_keys == theirs.counters.update_keys == 2


@pytest.mark.parametrize("field", ["epoch", "role", "saes", "kmes", "key", "label", "plain"])
async def test_a_name_that_differs_in_one_field_is_not_looked_up(field: str) -> None:
    alice, bob = in_process_pair("alice", "bob")
    ours, theirs = QkdPskSource(alice), QkdPskSource(bob)
    session = await session_of(bob, source=alice)
    key = await ours.draw_for_update(session, client=True, epoch=3)
    identity = on_wire(key)
    name = name_of(identity.external_identity)
    assert name is not None
    right: dict[str, Any] = {
        "master_sae": "alice",
        "slave_sae": "bob",
        "by_client": True,
        "epoch": 3,
    }
    assert identity.context == update_context_of(name, **right)
    (part,) = name
    others = {
        "epoch": update_context_of(name, **{**right, "epoch": 4}),
        "role": update_context_of(name, **{**right, "by_client": False}),
        "saes": update_context_of(name, **{**right, "master_sae": "bob", "slave_sae": "alice"}),
        "kmes": update_context_of((KeyPart(part.slave_kme, part.master_kme, "x"),), **right),
        "key": identity.context,
        "label": b"hkx-qkd ctx" + identity.context[11:],
        "plain": identity.context,
    }
    wrong = replace(identity, context=others[field])
    raw = wrong.encode()
    if field == "key":
        raw = replace(identity, external_identity=b"another").encode()
    elif field == "plain":
        raw = b"site-a"
    with pytest.raises(KeyUnknown):
        await theirs.look_up_for_update(raw, session, client=False, epoch=3)
    assert theirs.counters.looked_up == 0
    # It was not taken: under its right name it is still there.
    found = await theirs.look_up_for_update(identity.encode(), session, client=False, epoch=3)
    assert found.psk == key.psk


async def test_whose_keys_a_session_uses() -> None:
    """Of several peers: that of the handshake's key, or that of the names; else none."""
    pairs = {name: in_process_pair(name, "bob", kmes=(f"kme-{name}", "kme-b")) for name in "ac"}
    peers = [pairs["a"][1], pairs["c"][1]]
    source = QkdPskSource(*peers)
    for name, (theirs, ours) in pairs.items():
        session = await session_of(source, source=theirs)
        key = await source.draw_for_update(session, client=False, epoch=1)
        assert key.sources == (f"kme-b > kme-{name}",)
        assert ours.peer_sae == name
    nobody = await session_of(source, source=None)
    with pytest.raises(KeyUnknown, match="no QKD keys are shared"):
        await source.draw_for_update(nobody, client=False, epoch=1)


async def test_the_names_of_a_certificate_say_whose_keys() -> None:
    _, with_a = in_process_pair("a", "bob", kmes=("kme-a", "kme-b"))
    _, with_c = in_process_pair("c", "bob", kmes=("kme-c", "kme-b"))
    source = QkdPskSource(
        QkdPeer(source=with_a, names=("a.example",)), QkdPeer(source=with_c, names=("c.example",))
    )
    # The sessions are without a QKD key: the server of these has another peer alone.
    other, _ = in_process_pair("x", "y")
    for name, kmes in (("a.example", "kme-b > kme-a"), ("c.example", "kme-b > kme-c")):
        session = await session_of(other, source=None, client_name=name)
        key = await source.draw_for_update(session, client=False, epoch=1)
        assert key.sources == (kmes,)
    stranger = await session_of(other, source=None, client_name="mallory.example")
    with pytest.raises(KeyUnknown):
        await source.draw_for_update(stranger, client=False, epoch=1)


class Late:
    """A key source whose KME is reached only after a while."""

    def __init__(self, source: InProcessSource) -> None:
        self._source = source
        self.local_sae, self.peer_sae = source.local_sae, source.peer_sae
        self.knows, self.status = source.knows, source.status
        self.there = False

    async def get_key(self) -> QkdKey:
        if not self.there:
            raise KeySourceUnavailable("not yet")
        return await self._source.get_key()

    async def get_key_with_id(self, name: KeyReference) -> QkdKey:
        return await self._source.get_key_with_id(name)


async def test_a_session_that_began_without_a_qkd_key_gets_one(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Under ``prefer``: the first update after the KME is there again brings it in."""
    alice, bob = in_process_pair("alice", "bob")
    late = Late(alice)
    policy = Policy(psk=PREFER, fresh_keys=REQUIRE)
    one, other = trio.testing.memory_stream_pair()
    client = SecureStream(
        one,
        ClientConfig(
            verifier=TRUST,
            psk_source=QkdPskSource(late),
            fresh_keys=FreshKeys(every=10, jitter=0.0),
            policy=policy,
        ),
        server_hostname="localhost",
    )
    server = SecureStream(
        other,
        ServerConfig(identities=(IDENTITY,), psk_source=QkdPskSource(bob), policy=policy),
    )

    async def read(end: Any) -> None:
        while await end.receive_some():
            pass

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, client)
        nursery.start_soon(read, server)
        await trio.sleep(15)
        late.there = True
        await trio.sleep(10)
        nursery.cancel_scope.cancel()
    assert client.session.qkd_fallback == "not yet"
    first, second = client.session.epochs
    assert first.qkd_missing == "not yet"
    assert second.qkd_key_ids
    assert second.qkd_key_ids == server.session.epochs[1].qkd_key_ids
    await trio.aclose_forcefully(client)
    await trio.aclose_forcefully(server)
