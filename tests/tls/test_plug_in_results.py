"""What a method of an object of the caller returns is checked where it is used.

A forgotten ``return`` is the commonest fault of such code, and a coroutine in place of ``True`` is
true as well. Each ends in a ``TypeError`` that names the method and the class, and accepts nobody.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing
from tls_glue import Pair

from hybridkex import (
    ApplicationExtension,
    ClientConfig,
    DevCa,
    Policy,
    QkdPskSource,
    Requirement,
    SecureStream,
    ServerConfig,
    TrustStore,
)
from hybridkex.qkd.composite import CombinedSource, FailoverSource
from hybridkex.qkd.in_process import InProcessSource, in_process_pair
from hybridkex.qkd.prefetch import PrefetchSource
from hybridkex.wire.codec import Reader

CA = DevCa.create()
CLIENT = ClientConfig(verifier=TrustStore((CA.certificate,)))
SERVER = ServerConfig(identities=(CA.issue("localhost"),))
REQUIRED = Policy(psk=Requirement.REQUIRE)
WRONG = (None, True, "text", b"bytes", 1.5, object())


class Faulty(InProcessSource):
    """A key source one of whose methods returns something else."""

    method = ""
    result: Any = None

    @classmethod
    def instead_of(cls, source: InProcessSource, method: str, result: Any) -> "Faulty":
        faulty = cls.__new__(cls)
        faulty.__dict__.update(source.__dict__)
        faulty.method, faulty.result = method, result
        return faulty

    async def get_key(self) -> Any:
        return self.result if self.method == "get_key" else await super().get_key()

    async def get_key_with_id(self, name: Any) -> Any:
        key = await super().get_key_with_id(name)
        if self.method != "get_key_with_id":
            return key
        return (
            replace(key, name=(replace(key.name[0], key_id="another"),))
            if (self.result == "another")
            else self.result
        )

    def knows(self, name: Any) -> Any:
        return self.result if self.method == "knows" else super().knows(name)


async def handshake(client: ClientConfig, server: ServerConfig) -> list[Exception]:
    """The failures of the client and the server."""
    found: list[Exception] = []

    async def shake(stream: SecureStream[Any]) -> None:
        try:
            async with stream:
                await stream.do_handshake()
        except Exception as error:
            found.append(error)

    ours, theirs = trio.testing.memory_stream_pair()
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(shake, SecureStream(ours, client, server_hostname="localhost"))
            nursery.start_soon(shake, SecureStream(theirs, server))
    return found


WRAPPERS = (
    lambda source, _: source,
    lambda source, _: PrefetchSource(source),
    lambda source, more: FailoverSource([source, more]),
    lambda source, more: CombinedSource([source, more]),
)


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize(
    ("method", "result"),
    [
        *(("get_key", result) for result in WRONG),
        *(("get_key_with_id", result) for result in (*WRONG, "another")),
        *(("knows", result) for result in (None, 1, "yes", object())),
    ],
)
async def test_a_key_source(wrap: Any, method: str, result: Any) -> None:
    """By itself, and behind those of ours that ask another one."""
    alice, bob = in_process_pair("alice", "bob")
    more = in_process_pair("alice", "bob", kmes=("kme-c", "kme-d"))
    faulty = partial(Faulty.instead_of, method=method, result=result)
    ours, theirs = (faulty(alice), bob) if method == "get_key" else (alice, faulty(bob))
    errors = await handshake(
        replace(CLIENT, policy=REQUIRED, psk_source=QkdPskSource(wrap(ours, more[0]))),
        replace(SERVER, policy=REQUIRED, psk_source=QkdPskSource(wrap(theirs, more[1]))),
    )
    assert len(errors) == 2
    [told] = [error for error in errors if isinstance(error, TypeError)]
    assert f"{method} of Faulty returned" in str(told)
    [other] = [error for error in errors if error is not told]
    assert "internal_error" in str(other)


@pytest.mark.parametrize("result", WRONG)
@pytest.mark.parametrize("method", ["offer", "look_up", "authorize"])
async def test_a_psk_source(method: str, result: Any) -> None:
    async def later(*_: Any) -> Any:
        return result

    alice, bob = map(QkdPskSource, in_process_pair("alice", "bob"))
    other = later if method != "authorize" else lambda *_: result
    faulty = bob if method == "look_up" else alice
    faulty.__class__ = type("Faulty", (QkdPskSource,), {method: staticmethod(other)})
    errors = await handshake(
        replace(CLIENT, policy=REQUIRED, psk_source=alice),
        replace(SERVER, policy=REQUIRED, psk_source=bob),
    )
    [told] = [error for error in errors if isinstance(error, TypeError)]
    assert f"{method} of Faulty returned" in str(told)
    assert any("internal_error" in str(error) for error in errors)


class Whole(ApplicationExtension):
    type = 0xFF77

    @classmethod
    def read(cls, reader: Reader) -> "Whole":
        reader.opaque(1)
        return cls()

    def body(self) -> bytes:
        return b"\1a"

    def answer(self, offered: "Whole") -> Any:
        return self


class Another(Whole):
    type = 0xFF78


@pytest.mark.parametrize("result", [*WRONG, Another()])
@pytest.mark.parametrize(("method", "at"), [
    ("read", "server"), ("read", "client"), ("read_answer", "client"), ("answer", "server"),
])  # fmt: skip
def test_an_extension(method: str, at: str, result: Any) -> None:
    if method == "answer" and result is None:
        return  # leaves the offer without an answer
    functions = {"answer": lambda *_: result}

    def read(_: Any, reader: Reader) -> Any:
        reader.opaque(1)
        return result

    own = classmethod(read) if method != "answer" else functions["answer"]
    faulty = type("Faulty", (Whole,), {method: own})()
    configs = {"client": CLIENT, "server": SERVER}
    client, server = (
        replace(config, extensions=(faulty if at == name else Whole(),))
        for name, config in configs.items()
    )
    pair = Pair.make(client, server)  # type: ignore[arg-type]
    pair.client.start()
    with pytest.raises(TypeError, match=f"{method.partition('_')[0]} of Faulty returned"):
        pair.pump()
