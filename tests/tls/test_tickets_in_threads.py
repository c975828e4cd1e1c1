"""Event loops in several threads may share a configuration, and with it its tickets."""

from pathlib import Path
from threading import Thread

import pytest
from tls_glue import Pair

from hybridkex import (
    ClientConfig,
    Identity,
    MemoryTicketStore,
    ServerConfig,
    TrustStore,
)
from hybridkex.shell.ticket_file import FileTicketStore
from hybridkex.tls.session import SessionTicket


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_a_ticket_is_given_to_one_thread(
    trust: TrustStore,
    identity: Identity,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """Another thread takes one while the first thread is choosing."""
    memory = kind == "memory"
    store = MemoryTicketStore() if memory else FileTicketStore(tmp_path / "tickets.json")
    client = ClientConfig(verifier=trust, ticket_store=store)
    pair = Pair.make(client, ServerConfig(identities=(identity,), tickets_per_connection=1))
    pair.connect().server.send_data(b"behind the ticket")
    pair.pump()
    taken: list[SessionTicket | None] = []
    other = Thread(target=lambda: taken.append(store.take("localhost")))
    usable = SessionTicket.usable

    def slowly_usable(ticket: SessionTicket, now: float) -> bool:
        if other.ident is None:
            other.start()
            other.join(0.05)
        return usable(ticket, now)

    monkeypatch.setattr(SessionTicket, "usable", slowly_usable)
    taken.append(store.take("localhost"))
    other.join()
    assert len([one for one in taken if one is not None]) == 1
