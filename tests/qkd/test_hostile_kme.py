"""A KME that answers whatever it likes, to an SAE and to the KME at the other end of a link."""

import base64
import gzip
import json
import tracemalloc
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

from hybridkex.errors import KeySourceError
from hybridkex.kme.peering import ExtKeys, HttpPeer
from hybridkex.qkd.etsi014.client import KmeAccess, KmeClient
from hybridkex.qkd.etsi014.pool_filling import draw_into_pool
from hybridkex.qkd.etsi014.transport import KmeTransport
from hybridkex.qkd.pool import FilePool, PoolNames
from hybridkex.qkd.store import BlocksRefused, write_key_file

ID = "00000000-0000-0000-0000-000000000000"
NONE = Path("none")


def answer(status: str = "200 OK", *fields: bytes, body: bytes = b"{}") -> bytes:
    head = [f"HTTP/1.1 {status}".encode(), b"Content-Length: %d" % len(body), *fields]
    return b"\r\n".join(head) + b"\r\n\r\n" + body


DEEP = (
    b"[" * 200_000,
    b'{"a":' * 200_000,
    b'{"key_ids":' + b"[" * 100_000,
    b"[" * 3000 + b"]" * 3000,
)
STATUSES = ("200 OK", "400 No", "409 No", "503 No")
LOCATIONS = (
    b"//[", b"http://[::1", b"http://xn--/", b"https://xn--a/", b"http://a:99999999/", b"http://a:b/",
    b"\xff\xfe", b"//\xef\xbc\x8f/", b"http://" + b"a" * 300, b"http://[v1.x]/", b"?", b"", b"/%zz",
    b"http://\xe2\x84\x80/x", b"/api/v1/keys/b/status//[",
)  # fmt: skip
RETRIES = (
    b"Mon, 01 Jan 99999999999999999999 00:00:00 GMT",
    b"Mon, 99999999999999999999 Jan 2026 00:00:00 GMT",
    b"Mon, 01 Jan 2026 99999999999999999999:00:00 GMT",
    b"Mon, 01 Jan 2026 00:00:00 +9999999999999999999999",
    b"Mon, 01 Jan 2026 00:00:00 +99999999",
    b"Mon, 01 Jan 2026 00:00:00 -0000",
    b"Fri, 31 Dec 9999 23:59:59 -2359",
    b"9" * 5000, b"-1", b"\xb2", b",", b", , ,", b"a,b", b"Mon, 01 Jan", b"0 0 0 0 0 0",
)  # fmt: skip
CASES = [
    *(answer(status, body=deep) for deep in DEEP for status in STATUSES),
    *(answer("301 Moved", b"Location: " + where) for where in LOCATIONS),
    *(answer("503 No", b"Retry-After: " + when, body=b'{"message":"no"}') for when in RETRIES),
    *(answer(status, body=b"[9" + b"9" * 5000 + b"]") for status in ("200 OK", "409 No")),
    *(answer(body=body) for body in (b"\xff", b"null", b"[]", b'"x"', b"1e999", b"[[]]")),
    *(answer("409 No", body=b'{"refused":' + body + b"}") for body in (b"[]", b'{"a":1}', b"1")),
    b"HTTP/1.1 100 Continue\r\n\r\n" * 1000,
    b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nxx",
    b"HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\n{}",
    b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 100_000,
    b"{}",
    b"",
]  # fmt: skip


async def plain(stream: trio.abc.Stream, name: str) -> tuple[trio.abc.Stream, bytes]:
    """In the place of TLS."""
    return stream, b""


class Kme:
    """Answers every request with ``self.answer``, or what ``self.answers`` says; keeps what it was
    asked."""

    answer = b""

    def __init__(self) -> None:
        self.requests: list[bytes] = []
        self.answers: Callable[[bytes], bytes] = lambda _: self.answer

    async def serve(self, stream: trio.SocketStream) -> None:
        request = b""
        try:
            async with stream:
                while b"\r\n\r\n" not in request:
                    part = await stream.receive_some()
                    if not part:
                        return
                    request += bytes(part)
                self.requests.append(request)
                await stream.send_all(self.answers(request))
                await stream.send_eof()
                with trio.move_on_after(2):
                    while await stream.receive_some():
                        pass
        except trio.BrokenResourceError:
            pass


def calls(port: int) -> list[Callable[[], Awaitable[Any]]]:
    url = f"https://127.0.0.1:{port}"
    access = KmeAccess(url=url, ca=NONE, certificate=NONE, key=NONE)

    async def ask(call: Callable[[KmeClient], Awaitable[Any]]) -> Any:
        async with KmeClient(access, handshake=plain) as client:
            return await call(client)

    async def tell(call: Callable[[HttpPeer], Awaitable[Any]]) -> Any:
        peer = HttpPeer(KmeTransport(url, plain, lambda _: None), 5.0)
        try:
            return await call(peer)
        finally:
            await peer.aclose()

    keys = ExtKeys(allotments=(), master="a", slaves=("b",))
    return [
        lambda: ask(lambda client: client.status("b")),
        lambda: ask(lambda client: client.enc_keys("b")),
        lambda: ask(lambda client: client.dec_keys("b", [ID])),
        lambda: tell(lambda peer: peer.ext_keys(keys)),
        lambda: tell(lambda peer: peer.void([ID])),
        lambda: tell(lambda peer: peer.check([ID])),
    ]


@pytest.fixture
def kme(monkeypatch: pytest.MonkeyPatch) -> Kme:
    monkeypatch.setattr(KmeClient, "_confirm", lambda *_: None)
    return Kme()


async def _with(kme: Kme, body: Callable[[int], Awaitable[None]]) -> None:
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, kme.serve, [listener])
        await body(listener.socket.getsockname()[1])
        nursery.cancel_scope.cancel()


async def test_a_pool_takes_no_key_twice(kme: Kme, tmp_path: Path) -> None:
    """Nor are its IDs announced: neither from two answers, nor on another day."""
    write_key_file(tmp_path / "key")
    names = PoolNames(sae="a", kme="A", peer_sae="b", peer_kme="B")
    files = dict.fromkeys(("ca", "certificate", "key"), NONE)
    status = dict.fromkeys(("source_KME_ID", "target_KME_ID"), "A")
    status |= dict.fromkeys(("master_SAE_ID", "slave_SAE_ID"), "a")
    numbers = ("key_size", "stored_key_count", "max_key_count", "max_key_per_request")
    numbers += ("max_key_size", "min_key_size", "max_SAE_ID_count")
    keys = {"keys": [{"key_ID": ID, "key": base64.b64encode(bytes(32)).decode()}]}
    announced: list[Sequence[str]] = []

    async def body(port: int) -> None:
        async with (
            KmeClient(
                KmeAccess(url=f"https://127.0.0.1:{port}", kme_id="A", **files), handshake=plain
            ) as client,
            FilePool.open(tmp_path / "pool", key_file=tmp_path / "key", names=names) as pool,
        ):
            for _ in range(2):
                with pytest.raises(KeySourceError, match="an ID that it had returned before"):
                    await draw_into_pool(
                        pool, client, 2, announce=lambda ids: announced.append(list(ids))
                    )
            assert (await pool.status()).stored == 1

    def answers(request: bytes) -> bytes:
        is_status = request.split()[1].endswith(b"/status")
        found = {**status, **dict.fromkeys(numbers, 1)} if is_status else keys
        return answer(body=json.dumps(found).encode())

    kme.answers = answers
    await _with(kme, body)
    assert announced == [[ID]]


async def test_no_answer_of_a_kme_is_an_error_of_ours(kme: Kme) -> None:
    async def body(port: int) -> None:
        for kme.answer in CASES:
            for call in calls(port):
                with pytest.raises((KeySourceError, BlocksRefused)) as caught:
                    await call()
                assert str(caught.value).isprintable()

    await _with(kme, body)


async def test_a_compressed_answer_is_not_unpacked(kme: Kme) -> None:
    packed = gzip.compress(bytes(60 << 20))
    kme.answer = answer("200 OK", b"Content-Encoding: gzip", body=packed)

    async def body(port: int) -> None:
        tracemalloc.start()  # the peak of the process has seen more: this test compresses 60 MB
        try:
            for call in calls(port):
                with pytest.raises(KeySourceError, match="compressed"):
                    await call()
            assert tracemalloc.get_traced_memory()[1] < 10 << 20
        finally:
            tracemalloc.stop()
        assert all(b"accept-encoding: identity" in one.lower() for one in kme.requests)

    del packed
    await _with(kme, body)


async def test_a_kme_keeps_no_cookie_with_us(kme: Kme) -> None:
    kme.answer = answer("503 No", b"Set-Cookie: a=b; Path=/")

    async def body(port: int) -> None:
        async with KmeClient(
            KmeAccess(url=f"https://127.0.0.1:{port}", ca=NONE, certificate=NONE, key=NONE),
            handshake=plain,
        ) as client:
            for _ in range(2):
                with pytest.raises(KeySourceError):
                    await client.status("b")
        assert not any(b"cookie" in one.lower() for one in kme.requests)

    await _with(kme, body)


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (answer("301 Moved", b"Location: https://b.example/sae"),
         "301, a redirect to https://b.example/sae, which is not followed; configure the URL"),
        (answer("307 Moved", b"Location: /login\x1b[2J"), r"a redirect to /login\x1b[2J,"),
        (answer(body=bytes(50))[:-9], "ended the connection before its response was complete"),
        (CHUNKED + b"5\r\n{", "ended the connection before its response was complete"),
        (CHUNKED + b"2 ;a\r\n{}\r\n0\r\n\r\n", "did not answer in HTTP: illegal chunk header"),
        (answer("502 Bad Gateway", body=b"<html>"), "502, as a proxy does whose KME is down"),
        (answer("503 No", body=b'{"message":"Error"}'), "Error; no key may be ready: try again"),
    ],
)  # fmt: skip
async def test_an_answer_that_is_no_key_says_what_to_do(kme: Kme, given: bytes, words: str) -> None:
    kme.answer = given

    async def body(port: int) -> None:
        with pytest.raises(KeySourceError) as caught:
            await calls(port)[1]()
        assert words in str(caught.value)
        assert "bytearray" not in str(caught.value)

    await _with(kme, body)
