"""The transcript is a value: what a state holds does not change when the handshake goes on."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass

import pytest
from tls_glue import Pair

from hybridkex.auth import Identity, TrustStore
from hybridkex.crypto.suites import SHA256, SHA384, HashFunction
from hybridkex.tls.config import ClientConfig, ServerConfig
from hybridkex.tls.connection import Connection
from hybridkex.tls.transcript import Transcript

MESSAGES = (b"\1\0\0\1a", b"\2\0\0\2bc", b"", bytes(range(256)) * 10)


@pytest.mark.parametrize("function", [SHA256, SHA384], ids=str)
def test_adding_a_message_gives_another_transcript(function: HashFunction) -> None:
    empty = Transcript(function)
    values = [empty]
    for message in MESSAGES:
        values.append(values[-1].add(message))
    branch = values[2].add(b"another")
    for count, value in enumerate(values):
        assert value.digest() == function.digest(b"".join(MESSAGES[:count]))
        assert value.digest() == Transcript(function, *MESSAGES[:count]).digest()
    assert branch.digest() == function.digest(b"".join(MESSAGES[:2]) + b"another")


def transcripts(value: object) -> Iterator[Transcript]:
    """All that a state holds, itself or in what it owns."""
    if isinstance(value, Transcript):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from transcripts(getattr(value, field.name))


def test_no_state_of_a_handshake_changes_after_it_has_ended(
    trust: TrustStore, identity: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[tuple[Transcript, bytes]] = []
    enter = Connection._enter

    def watched(connection: Connection, state: object) -> None:
        held.extend((one, one.digest()) for one in transcripts(state))
        enter(connection, state)  # type: ignore[arg-type]

    monkeypatch.setattr(Connection, "_enter", watched)
    Pair.make(
        ClientConfig(verifier=trust, identity=identity),
        ServerConfig(identities=(identity,), client_verifier=trust),
    ).connect()
    assert len({digest for _, digest in held}) > 8
    for transcript, digest in held:
        assert transcript._hash.digest() == transcript.digest() == digest
