"""What a handshake costs in calls, which does not depend on the machine.

The bounds are a tenth above what was counted; a handshake that does something twice passes them.
"""

import sys
from types import FrameType
from typing import Any

import pytest
from tls_glue import Pair

from hybridkex.auth import Identity, TrustStore, verify
from hybridkex.tls.config import ClientConfig, ServerConfig
from hybridkex.tls.session import MemoryTicketStore


def calls(client: ClientConfig, server: ServerConfig) -> int:
    """Calls of functions, Python's and C's, for one handshake of both ends."""
    count = 0

    def counted(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    pair = Pair.make(client, server)
    sys.setprofile(counted)
    try:
        pair.connect()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize(("resumed", "bound"), [(False, 1710), (True, 1935)])
def test_calls_of_a_handshake(
    trust: TrustStore, identity: Identity, resumed: bool, bound: int
) -> None:
    store = MemoryTicketStore() if resumed else None
    client = ClientConfig(verifier=trust, ticket_store=store)
    server = ServerConfig(identities=(identity,))
    Pair.make(client, server).connect().exchange(b"for", b"tickets")
    counted = calls(client, server)
    assert counted < bound, counted


def test_a_resumption_verifies_the_stored_chain_once(
    identity: Identity, trust: TrustStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the client, and at a server that asks for certificates."""
    client = ClientConfig(verifier=trust, identity=identity, ticket_store=MemoryTicketStore())
    server = ServerConfig(identities=(identity,), client_verifier=trust)
    Pair.make(client, server).connect().exchange(b"for", b"tickets")
    asked = []
    real = TrustStore._verify

    def watched(store: TrustStore, chain: Any, name: Any, at: Any) -> Any:
        asked.append(name)
        return real(store, chain, name, at)

    monkeypatch.setattr(verify.TrustStore, "_verify", watched)
    pair = Pair.make(client, server).connect()
    assert pair.client.session.resumed
    assert pair.client.session.peer_credential is not None
    assert pair.server.session.peer_credential is not None
    assert sorted(map(str, asked)) == ["None", "localhost"]
