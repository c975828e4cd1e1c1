"""An exception of code of the configuration ends its connection at once: who waits for the
connection gets it, and the peer the alert internal_error. The rule is the same on every loop."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from hybridkex import (
    ClientConfig,
    DevCa,
    MemoryTicketStore,
    Policy,
    QkdPskSource,
    Requirement,
    SecureStream,
    ServerConfig,
    TrustStore,
)
from hybridkex.constants import Alert
from hybridkex.errors import (
    CertificateRejected,
    ConfigError,
    HybridkexError,
    InternalError,
    KeySourceUnavailable,
    KeyUnknown,
    LocalStateError,
    PeerError,
    PolicyRefused,
    UnknownPskIdentity,
)
from hybridkex.machine import leaves
from hybridkex.net.event_loop import time_limit
from hybridkex.qkd.in_process import in_process_pair
from hybridkex.shell.answers import CODE_FAILED
from hybridkex.tls.connection import Connection
from hybridkex.tls.record_layer import WritingHalf

CA = DevCa.create()
CLIENT = ClientConfig(verifier=TrustStore((CA.certificate,)))
SERVER = ServerConfig(identities=(CA.issue("localhost"),))


class Full(Exception):
    """What the code raises."""


class Panic(BaseException):
    """No Exception, as what code in Rust raises (pyo3)."""


def with_functions(one: Any, **functions: Any) -> Any:
    """This object, with other functions."""
    made = type("Other", (type(one),), {name: staticmethod(it) for name, it in functions.items()})
    return made(*(((CA.certificate,),) if isinstance(one, TrustStore) else ()))


def config(code: str, error: BaseException) -> ClientConfig:
    """That of a client whose ``code`` raises this exception."""

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    async def later(*_: Any) -> Any:
        raise error

    async def none(*_: Any) -> Any:
        raise KeySourceUnavailable("no key today")

    options: dict[str, Any] = {
        "entropy": {"entropy": fail},
        "key_log": {"key_log": fail},
        "verify": {"verifier": with_functions(CLIENT.verifier, verify_server=fail)},
        "refresh": {"verifier": with_functions(CLIENT.verifier, refresh=fail)},
        "take": {"ticket_store": with_functions(MemoryTicketStore(), take=fail)},
        "put": {"ticket_store": with_functions(MemoryTicketStore(), put=fail)},
        "flush": {"ticket_store": with_functions(MemoryTicketStore(), flush=fail)},
        "offer": {"psk_source": SimpleNamespace(offer=later, look_up=later, authorize=fail)},
        "authorize": {"psk_source": SimpleNamespace(offer=none, look_up=none, authorize=fail)},
    }
    return replace(CLIENT, **options[code])


@pytest.mark.parametrize(
    "code", ["entropy", "key_log", "verify", "refresh", "take", "flush", "offer"]
)
@pytest.mark.parametrize("error", [Full("the disk is full"), StopIteration(), Panic("")], ids=repr)
def test_in_the_handshake(
    shell: Any, code: str, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with time_limit(20):
            with pytest.raises((type(error), RuntimeError, BaseExceptionGroup)) as caught:
                async with shell.pair(config(code, error), SERVER):
                    pass
        found = list(leaves(caught.value))
        # Python puts a RuntimeError in the place of the other one, which no Future takes (PEP 479).
        assert error in found or any(
            isinstance(one, RuntimeError) and one.__cause__ is error for one in found
        )

    shell.run(main)
    assert [
        one for one in caplog.records if one.name == "asyncio" and one.levelname == "ERROR"
    ] == []


OUR_ERRORS = (
    *(ConfigError, LocalStateError, HybridkexError, InternalError, PolicyRefused),
    *(UnknownPskIdentity, CertificateRejected, KeyUnknown, KeySourceUnavailable),
)


@pytest.mark.parametrize("code", ["entropy", "key_log", "verify", "take", "offer", "authorize"])
@pytest.mark.parametrize("kind", OUR_ERRORS)
def test_the_peer_gets_an_alert_for_our_errors(
    shell: Any, code: str, kind: type[HybridkexError], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our own classes, also where the engine or the shell does not expect them: the alert of a
    ``PeerError``, and internal_error for the others."""
    error = kind("it failed")
    needs = {"offer": Requirement.REQUIRE, "authorize": Requirement.PREFER}
    policy = Policy(psk=needs.get(code, Requirement.OFF))
    client = replace(config(code, error), policy=policy)
    queued: list[Alert] = []
    sent: list[Alert] = []
    send_alert, data_to_send = WritingHalf.send_alert, Connection.data_to_send

    def queue(writer: WritingHalf, alert: Alert) -> None:
        queued.append(alert)
        send_alert(writer, alert)

    def send(connection: Connection) -> bytes | bytearray:
        output = data_to_send(connection)
        if output:
            sent.extend(queued)
            queued.clear()
        return output

    async def main() -> None:
        async with time_limit(20):
            with pytest.raises(Exception) as caught:
                async with shell.pair(client, SERVER):
                    pass
        assert any("it failed" in str(one) for one in leaves(caught.value))

    monkeypatch.setattr(WritingHalf, "send_alert", queue)
    monkeypatch.setattr(Connection, "data_to_send", send)
    shell.run(main)
    alert = error.alert if isinstance(error, PeerError) else Alert.INTERNAL_ERROR
    if code == "offer" and isinstance(error, KeyUnknown):
        alert = Alert.UNKNOWN_PSK_IDENTITY
    assert sent[:1] == [alert]


def test_a_client_hello_whose_ticket_is_still_stored_is_not_sent() -> None:
    """Neither with an alert behind it: a ticket is used once."""

    async def main(error: BaseException) -> None:
        below, far = trio.testing.memory_stream_pair()
        stream = SecureStream(below, config("flush", error), server_hostname="localhost")
        with pytest.raises((type(error), trio.BrokenResourceError)):
            await stream.do_handshake()
        await stream.aclose()
        assert await far.receive_some() == b""

    for error in (Full("the disk is full"), ConfigError("the disk is full"), OSError(28, "full")):
        trio.run(main, error)


class Forgetful(QkdPskSource):
    """A source whose ``authorize`` returns no session."""

    result: Any = None

    def authorize(self, *_: Any) -> Any:
        return self.result


def qkd_configs(forgetful: str) -> tuple[ClientConfig, ServerConfig]:
    kinds = {"client": QkdPskSource, "server": QkdPskSource, forgetful: Forgetful}
    ours, theirs = in_process_pair("a", "b")
    client, server = kinds["client"](ours), kinds["server"](theirs)
    return ClientConfig(psk_source=client), ServerConfig(psk_source=server)


@pytest.mark.parametrize("result", [None, True, b"", "session"])
def test_a_client_whose_source_returns_no_session(
    shell: Any, result: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forgotten return accepts nobody."""
    monkeypatch.setattr(Forgetful, "result", result)

    async def main() -> None:
        async with time_limit(20):
            with pytest.raises(Exception) as caught:
                async with shell.pair(*qkd_configs("client")):
                    pass
        found = [str(one) for one in leaves(caught.value)]
        assert any("authorize of Forgetful returned" in one for one in found)

    shell.run(main)


@pytest.mark.parametrize("result", [None, True, b"", "session"])
async def test_a_server_whose_source_returns_no_session(
    result: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Forgetful, "result", result)
    configs = qkd_configs("server")
    below = trio.testing.memory_stream_pair()
    client, server = (SecureStream(one, made) for one, made in zip(below, configs, strict=True))

    async def receive() -> None:
        with pytest.raises(trio.BrokenResourceError) as caught:
            await client.receive_some()
        assert "internal_error" in str(caught.value.__cause__ or caught.value)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        with pytest.raises(TypeError, match="authorize of Forgetful returned"):
            await server.do_handshake()


@pytest.mark.parametrize("error", [Full("the disk is full"), StopIteration(), Panic("")], ids=repr)
def test_after_the_handshake(
    shell: Any, run: Any, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    """A ticket that its store refuses."""
    if shell.name == "piped":
        pytest.skip("the tunnel has stores of its own")

    async def conversation(client: Any, server: Any) -> None:
        await server.send(b"data")  # its tickets go ahead of it
        with pytest.raises((Full, RuntimeError)) as caught:
            await client.receive()
        assert error in (caught.value, caught.value.__cause__)
        with pytest.raises(Exception, match="internal_error"):
            await server.receive()

    run(SimpleNamespace(client=config("put", error), server=SERVER), conversation)
    if shell.name in ("asyncio", "uvloop"):
        [told] = [one.message for one in caplog.records if one.levelname == "ERROR"]
        assert told.startswith(CODE_FAILED)


def test_at_a_server(shell: Any) -> None:
    """The client learns that the fault is not its own."""
    error = Full("the disk is full")

    def fail(_: str) -> None:
        raise error

    async def main() -> None:
        async with time_limit(20):
            with pytest.raises(Exception) as caught:
                async with shell.pair(CLIENT, replace(SERVER, key_log=fail)):
                    pass
        assert any("internal_error" in str(one) for one in leaves(caught.value))

    shell.run(main)
