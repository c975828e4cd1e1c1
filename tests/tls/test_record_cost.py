"""What a record costs in memory, which does not depend on the machine: no copy of the data."""

import tracemalloc
from collections.abc import Callable

import pytest
from tls_glue import Pair

from hybridkex.auth import Identity, TrustStore
from hybridkex.tls.config import ClientConfig, ServerConfig
from hybridkex.tls.connection import Connection
from hybridkex.tls.events import ApplicationData

FIXED = 3000
"""Bytes for the objects of a call, whatever the data: half of it was counted."""


def allocated(act: Callable[[], object]) -> int:
    """Bytes that a call allocates at most at once, beside what was there."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        act()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def received(end: Connection, records: bytes | bytearray) -> int:
    """Take records; how many bytes of data were in them."""
    end.receive_data(records)
    count = 0
    while (event := end.next_event()) is not None:
        if isinstance(event, ApplicationData):
            count += len(event.data)
    return count


@pytest.mark.parametrize("size", [1, 100, 1 << 14, 1 << 20])
def test_bytes_allocated_for_a_record(trust: TrustStore, identity: Identity, size: int) -> None:
    """At each end one buffer for all records of a call, and nothing else that grows with the
    data; a second copy would double the figure."""
    pair = Pair.make(ClientConfig(verifier=trust), ServerConfig(identities=(identity,))).connect()
    data, made = bytes(size), []

    def send() -> None:
        pair.client.send_data(data)
        made.append(pair.client.data_to_send())

    for _ in range(3):  # what is made at first use
        send()
        assert received(pair.server, made.pop()) == size
    limit = size * 1.02 + FIXED
    assert allocated(send) < limit
    [records] = made
    assert allocated(lambda: received(pair.server, records)) < limit
