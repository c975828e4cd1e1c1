"""Our client against a KME that is not ours: the standard library's HTTP server, written from the
tables of ETSI GS QKD 014 alone, strict, and with a switch for everything met in the field."""

import base64
import json
import logging
import ssl
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import trio
from leaks import leaks

from hybridkex.auth.dev_ca import DevCa, write_identity
from hybridkex.errors import (
    ConfigError,
    KeyConsumed,
    KeyExpired,
    KeyNotYetAvailable,
    KeySourceError,
    KeySourceExhausted,
    KeySourceUnavailable,
    KeyUnauthorized,
    KeyUnknown,
)
from hybridkex.qkd.etsi014.client import Etsi014Source, KmeAccess, KmeClient, classify
from hybridkex.qkd.etsi014.models import KeyRequest, message_of
from hybridkex.qkd.etsi014.naming import IdRule
from hybridkex.qkd.source import KeyPart

Answer = tuple[int, Any]


class StrictFake:
    """Clauses 5 and 6 of the standard, word by word. ``twist`` changes what is answered."""

    def __init__(self) -> None:
        self.keys: dict[str, tuple[str, str, list[str]]] = {}
        self.requests: list[tuple[str, str]] = []
        self.connections = 0
        self.twist: Callable[[str, Answer], Any] = lambda call, answer: answer
        self.before: Callable[[str, str], Any] = lambda method, url: None
        self.target = "KME/B"

    def serve(self, method: str, url: str, body: bytes, caller: str) -> Any:
        parts = urlsplit(url)
        self.requests.append((method, url))
        segments = parts.path.split("/")
        assert segments[:4] == ["", "api", "v1", "keys"]
        assert segments[6:] in ([], [""])
        sae, call = unquote(segments[4]), segments[5]
        early = self.before(method, url)
        if early is not None:
            return early
        query = parse_qs(parts.query)
        if method == "POST" and body:
            assert "/json" in self.content_type
        return self.twist(call, getattr(self, call)(method, sae, query, body, caller))

    content_type = "application/json"

    def status(self, method: str, slave: str, query: Any, body: bytes, caller: str) -> Answer:
        assert method == "GET"
        return 200, {
            "source_KME_ID": "KME/A", "target_KME_ID": self.target, "master_SAE_ID": caller,
            "slave_SAE_ID": slave, "key_size": 256, "stored_key_count": 25, "max_key_count": 100,
            "max_key_per_request": 4, "max_key_size": 1024, "min_key_size": 64,
            "max_SAE_ID_count": 2,
        }  # fmt: skip

    def enc_keys(self, method: str, slave: str, query: Any, body: bytes, caller: str) -> Answer:
        if method == "GET":
            assert query.keys() <= {"number", "size"}
            request = {name: int(value[0]) for name, value in query.items()}
        else:
            request = json.loads(body) if body else {}
        number, size = request.get("number", 1), request.get("size", 256)
        if size % 8:
            return 400, {"message": "size shall be a multiple of 8"}
        if request.get("extension_mandatory"):
            return 400, {
                "message": "not all extension_mandatory parameters are supported",
                "details": [{"extension_mandatory_unsupported": "abc_route_type is not supported"}],
            }
        slaves = [slave, *request.get("additional_slave_SAE_IDs", [])]
        keys = []
        for _ in range(number):
            name = str(uuid.uuid4())
            key = base64.b64encode(uuid.uuid4().bytes * (size // 128)).decode()
            self.keys[name] = (key, caller, slaves)
            keys.append({"key_ID": name, "key": key})
        return 200, {"keys": keys}

    def dec_keys(self, method: str, master: str, query: Any, body: bytes, caller: str) -> Answer:
        if method == "GET":
            [name] = query["key_ID"]
            names = [name]
        else:
            names = [item["key_ID"] for item in json.loads(body)["key_IDs"]]
        if any(name not in self.keys for name in names):
            return 400, {"message": "one or more keys specified are not found on KME"}
        if any(caller not in self.keys[name][2] for name in names):
            return 401, None
        return 200, {"keys": [{"key_ID": n, "key": self.keys.pop(n)[0]} for n in reversed(names)]}


@contextmanager
def running(fake: StrictFake, folder: Path, **context: Any) -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            fake.connections += 1

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            subject = dict(rdn[0] for rdn in self.connection.getpeercert()["subject"])
            fake.content_type = self.headers.get("Content-Type", "")
            result = fake.serve(self.command, self.path, body, subject["commonName"])
            if result is None:  # the answer is lost on its way
                self.close_connection = True
                return
            status, value, *more = result
            headers = "".join(f"{name}: {text}\r\n" for name, text in more[0]) if more else ""
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            data = b"" if value is None else data
            self.wfile.write(
                f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n{headers}"
                f"Content-Length: {len(data)}\r\n\r\n".encode()
                + data
            )

        do_GET = do_POST = answer

        def log_message(self, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = False

        def handle_error(self, *args: Any) -> None:
            pass  # a client that refuses our certificate is what some tests want

    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(folder / "ca.pem"))
    tls.verify_mode = ssl.CERT_REQUIRED
    tls.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    with Server(("127.0.0.1", 0), Handler) as server:
        server.socket = tls.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    ca = DevCa.create()
    holders = {"KME/A": "kme", "sae a/ü": "alice", "bob": "bob", "KME/X": "other"}
    for name, place in holders.items():
        identity = ca.issue("127.0.0.1", common_name=name, uris=[f"urn:{place}"])
        write_identity(folder / place, ca, identity)
    foreign = DevCa.create("foreign")
    write_identity(folder / "foreign", foreign, foreign.issue("127.0.0.1", common_name="KME/A"))
    return folder


@pytest.fixture
def fake(certificates: Path) -> Iterator[StrictFake]:
    fake = StrictFake()
    with running(fake, certificates / "kme") as port:
        fake.port = port  # type: ignore[attr-defined]
        yield fake


def access(certificates: Path, port: int, sae: str = "alice", **changes: Any) -> KmeAccess:
    folder = certificates / sae
    settings: dict[str, Any] = {
        "url": f"https://127.0.0.1:{port}", "ca": certificates / "kme" / "ca.pem",
        "certificate": folder / "cert.pem", "key": folder / "key.pem", "timeout": 2.0,
    }  # fmt: skip
    return KmeAccess(**(settings | changes))


@pytest.fixture
def client_for(certificates: Path, fake: StrictFake) -> Callable[..., KmeClient]:
    def make(sae: str = "alice", **changes: Any) -> KmeClient:
        return KmeClient(access(certificates, fake.port, sae, **changes))  # type: ignore[attr-defined]

    return make


async def test_three_calls(fake: StrictFake, client_for: Any) -> None:
    async with client_for() as alice, client_for("bob") as bob:
        status = await alice.status("bob")
        assert (status.source_kme_id, status.target_kme_id) == ("KME/A", "KME/B")
        assert (status.key_size, status.max_key_per_request) == (256, 4)
        found = await alice.enc_keys("bob", KeyRequest(number=3, size=512))
        assert [len(item.key) for item in found.keys] == [64] * 3
        ids = [item.key_id for item in found.keys]
        # The fake answers in another order than it was asked in.
        assert (await bob.dec_keys("sae a/ü", ids)).keys == found.keys
        with pytest.raises(KeyUnknown):
            await bob.dec_keys("sae a/ü", ids)
    assert fake.connections == 2, "connections are reused"
    assert "/api/v1/keys/sae%20a%2F%C3%BC/dec_keys" in fake.requests[-1][1]


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "socks5://127.0.0.1:9", "junk://[::"])
async def test_proxies_of_the_environment_are_not_used(
    fake: StrictFake, client_for: Any, proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.setenv(name, proxy)
        monkeypatch.setenv(name.lower(), proxy)
    async with client_for() as alice:
        assert (await alice.status("bob")).source_kme_id == "KME/A"
    assert fake.connections == 1


async def test_get_and_post_forms(fake: StrictFake, client_for: Any) -> None:
    async with client_for() as alice, client_for("bob", always_post=True) as bob:
        default = await alice.enc_keys("bob")
        assert fake.requests[-1] == ("GET", "/api/v1/keys/bob/enc_keys?number=1")
        await alice.enc_keys("bob", KeyRequest(number=2, size=1024))
        assert fake.requests[-1] == ("GET", "/api/v1/keys/bob/enc_keys?number=2&size=1024")
        await alice.enc_keys("bob", KeyRequest(extension_optional=({"abc_x": 1},)))
        assert fake.requests[-1][0] == "POST"
        await bob.dec_keys("sae a/ü", [default.keys[0].key_id])
        assert fake.requests[-1] == ("POST", "/api/v1/keys/sae%20a%2F%C3%BC/dec_keys")
    async with client_for("bob") as bob:
        with pytest.raises(KeyUnknown):
            await bob.dec_keys("x", [default.keys[0].key_id])
        assert fake.requests[-1][0] == "GET"


async def test_multicast_and_unauthorized(client_for: Any) -> None:
    async with client_for() as alice, client_for("bob") as bob:
        request = KeyRequest(additional_slave_sae_ids=("bob",))
        [key] = (await alice.enc_keys("carol", request)).keys
        assert (await bob.dec_keys("sae a/ü", [key.key_id])).keys == (key,)
        [key] = (await alice.enc_keys("carol")).keys
        with pytest.raises(KeyUnauthorized):
            await bob.dec_keys("sae a/ü", [key.key_id])


async def test_refused_requests(client_for: Any) -> None:
    async with client_for() as alice:
        with pytest.raises(KeySourceUnavailable, match="size shall be a multiple of 8"):
            await alice.enc_keys("bob", KeyRequest(size=257))
        with pytest.raises(KeySourceUnavailable, match="extension_mandatory parameters"):
            await alice.enc_keys("bob", KeyRequest(extension_mandatory=({"abc_route_type": 1},)))


DEVIATIONS = [
    # (looking up a key, status, body, what it means)
    (False, 503, {"message": "key exhausted"}, KeySourceExhausted),
    (False, 400, {"message": "Not enough keys available"}, KeySourceExhausted),
    (False, 400, {"message": "no keys left"}, KeySourceExhausted),
    (False, 503, {"message": "Error on server side"}, KeySourceUnavailable),
    (False, 504, None, KeySourceUnavailable),
    (False, 500, b"<html>oops</html>", KeySourceUnavailable),
    (False, 401, None, KeyUnauthorized),
    (False, 403, {"message": "forbidden"}, KeyUnauthorized),
    (False, 302, None, KeySourceUnavailable),
    (True, 400, {"message": "one or more keys specified are not found on KME"}, KeyUnknown),
    (True, 404, {"message": "gone"}, KeyUnknown),
    (True, 404, b"not even JSON", KeyUnknown),
    (True, 400, {"message": "key was already delivered"}, KeyConsumed),
    (True, 410, None, KeyConsumed),
    (True, 403, {"message": "the key has expired"}, KeyExpired),
    (True, 409, {"message": "conflict"}, KeyNotYetAvailable),
    (True, 503, {"message": "key not yet synchronized"}, KeyNotYetAvailable),
    (True, 401, None, KeyUnauthorized),
    (True, 401, {"message": "Unauthorized"}, KeyUnauthorized),
    (True, 503, {"message": "Error on server side"}, KeySourceUnavailable),
    (True, 504, {"message": "remote KME down"}, KeySourceUnavailable),
    (True, 400, {"message": 5}, KeySourceUnavailable),
    (True, 400, ["not", "an", "object"], KeySourceUnavailable),
]


@pytest.mark.parametrize(("looking_up", "status", "body", "kind"), DEVIATIONS)
async def test_answers_of_the_field(
    fake: StrictFake, client_for: Any, looking_up: bool, status: int, body: Any, kind: type
) -> None:
    fake.twist = lambda call, answer: (status, body)
    async with client_for() as alice:
        call = (
            partial(alice.dec_keys, "bob", [str(uuid.uuid4())])
            if looking_up
            else partial(alice.enc_keys, "bob")
        )
        with pytest.raises(KeySourceError) as caught:
            await call()
    assert type(caught.value) is kind
    assert len(fake.requests) == 1, "no request is repeated"


def change(**members: Any) -> Callable[[str, Answer], Any]:
    """A twist that changes members of the one key that is delivered."""

    def twist(call: str, answer: Answer) -> Answer:
        if call == "status":
            return answer
        item = answer[1]["keys"][0] | members
        return 200, {"keys": [{k: v for k, v in item.items() if v is not None}]}

    return twist


SECRET = base64.b64encode(b"this key must not be in any log!").decode()

LIES = {
    "wrong length": change(key=base64.b64encode(b"short key").decode()),
    "empty": change(key=""),
    "bad base64": change(key=SECRET[:-1] + "*"),
    "no padding": change(key=SECRET.rstrip("=")),
    "key not a string": change(key=5),
    "key missing": change(key=None),
    "an ID that is no text": change(key_ID=[42]),
    "an ID with a control character": change(key_ID="4\n2"),
    "ID missing": change(key_ID=None),
    "no keys": lambda call, answer: (200, {"keys": []}) if call != "status" else answer,
    "too many": lambda call, answer: (
        (200, {"keys": answer[1]["keys"] * 2}) if call != "status" else answer
    ),
    "not an object": lambda call, answer: (200, [SECRET]) if call != "status" else answer,
    "not JSON": lambda call, answer: (200, f'{{"keys": [{SECRET}'.encode()),
    "deep JSON": lambda call, answer: (200, b"[" * 100_000),
    "huge": lambda call, answer: (200, b'{"x": "' + SECRET.encode() * 50_000 + b'"}'),
    "lost": lambda call, answer: None,
}


@pytest.mark.parametrize("lie", LIES)
async def test_a_lying_kme(
    fake: StrictFake, client_for: Any, caplog: pytest.LogCaptureFixture, lie: str
) -> None:
    caplog.set_level(logging.DEBUG)
    fake.twist = LIES[lie]
    async with client_for() as alice:
        with pytest.raises(KeySourceUnavailable) as caught:
            await alice.enc_keys("bob", KeyRequest(size=256))
    assert len(fake.requests) == 1, "enc_keys is never repeated"
    seen = caplog.text + repr(caught.value) + repr(caught.value.__cause__)
    for key, _, _ in fake.keys.values():
        assert key not in seen
    assert SECRET not in seen


async def test_nothing_of_a_good_key_is_logged(
    fake: StrictFake, client_for: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with client_for() as alice:
        found = await alice.enc_keys("bob")
    assert "receive_response" in caplog.text  # httpcore does log, so this can fail
    [(key, _, _)] = fake.keys.values()
    assert not leaks(caplog.text + repr(found), base64.b64decode(key))


async def test_a_key_with_another_id(fake: StrictFake, client_for: Any) -> None:
    async with client_for() as alice, client_for("bob") as bob:
        [key] = (await alice.enc_keys("bob")).keys
        fake.twist = change(key_ID=str(uuid.uuid4()))
        with pytest.raises(KeySourceUnavailable, match="different keys"):
            await bob.dec_keys("sae a/ü", [key.key_id])


async def test_a_slow_and_a_dead_kme(fake: StrictFake, certificates: Path, client_for: Any) -> None:
    def slow(call: str, answer: Answer) -> Answer:
        time.sleep(0.6)
        return answer

    fake.twist = slow
    async with client_for(timeout=0.2) as alice:
        began = trio.current_time()
        with pytest.raises(KeySourceUnavailable, match="did not answer within"):
            await alice.status("bob")
        assert trio.current_time() - began < 0.5
    async with KmeClient(access(certificates, 1)) as nobody:
        with pytest.raises(KeySourceUnavailable, match="cannot be reached"):
            await nobody.status("bob")
    # One that accepts and then says nothing at all.
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with (
        listener,
        KmeClient(access(certificates, listener.socket.getsockname()[1], timeout=0.2)) as mute,
    ):
        with pytest.raises(KeySourceUnavailable, match="did not answer within"):
            await mute.status("bob")


async def test_the_kme_id_is_confirmed_before_any_request(
    fake: StrictFake, client_for: Any
) -> None:
    async with client_for(kme_id="KME/Z") as alice:
        with pytest.raises(KeySourceUnavailable, match="the KME is KME/A, not KME/Z"):
            await alice.enc_keys("bob")
    assert fake.requests == []
    async with client_for(kme_id_rule=IdRule.SAN_URI) as alice:
        await alice.enc_keys("bob")
        with pytest.raises(KeySourceUnavailable, match="status has the ID"):
            await alice.status("bob")
    async with client_for(kme_id="urn:kme", kme_id_rule=IdRule.SAN_URI) as alice:
        assert (await alice.status("bob")).source_kme_id == "KME/A"


async def test_unauthenticated(certificates: Path, fake: StrictFake, client_for: Any) -> None:
    # Its certificate is of another CA than ours.
    async with client_for(ca=certificates / "foreign" / "ca.pem") as alice:
        with pytest.raises(KeySourceUnavailable, match="certificate is not accepted: self-signed"):
            await alice.status("bob")
    assert fake.requests == []
    # Our certificate is of another CA than it trusts.
    async with client_for("foreign") as stranger:
        # The alert comes in place of an answer, or is lost in the reset that follows it.
        with pytest.raises((KeyUnauthorized, KeySourceUnavailable), match=r"our certificate"):
            await stranger.status("bob")
    assert fake.requests == []


async def test_source(fake: StrictFake, client_for: Any) -> None:
    async with client_for() as a, client_for("bob") as b:
        alice = Etsi014Source(a, sae="sae a/ü", peer_sae="bob")
        key = await alice.get_key()
        assert (key.master_sae, key.slave_sae) == ("sae a/ü", "bob")
        assert key.kmes == (("KME/A", "KME/B"),)
        assert (await alice.status()).stored == 25
        # The other side: its KME calls itself KME/A here too, so only the names are turned.
        fake.target = "KME/B"
        bob = Etsi014Source(b, sae="bob", peer_sae="sae a/ü")
        name = (KeyPart("KME/B", "KME/A", key.key_ids[0]),)
        assert (await bob.get_key_with_id(name)).key == key.key
        assert bob.knows(name)
        assert not bob.knows(key.name)
        with pytest.raises(KeyUnknown):
            await bob.get_key_with_id(key.name)
        impostor = Etsi014Source(a, sae="someone", peer_sae="bob")
        with pytest.raises(KeyUnauthorized, match="identifies us as"):
            await impostor.get_key()


def test_classify_cleans_and_cuts_the_message() -> None:
    error = classify(503, "a\x1b[31m\n" + "x" * 1000, looking_up=False)
    assert "\x1b" not in str(error)
    assert "\n" not in str(error)
    assert len(str(error)) < 300


@pytest.mark.parametrize(
    "changes",
    [
        {"url": "http://kme:1"},
        {"url": "https://kme/path"},
        {"url": "https://"},
        {"url": "https://kme:99999"},
        {"timeout": 0.0},
        {"max_answer": 10},
        {"tls": "none"},
        {"certificate": Path("missing.pem")},
    ],
)
def test_configuration(certificates: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        KmeClient(access(certificates, 1, **changes))


# -- what servers in the field do that the standard does not say


def through(change: Callable[[str, Any], Any]) -> Callable[[str, Answer], Answer]:
    """A twist of the bodies of good answers."""
    return lambda call, answer: (200, change(call, answer[1])) if answer[0] == 200 else answer


def easy_kme(call: str, body: Any) -> Any:
    if call == "status":
        return body | {"status_extension": None, "key_metadata": {"a": 1}}
    more = {"key_size": 256, "created_at": "2026-11-01T00:00:00Z", "expires_at": None,
            "source_kme_id": "KME/A", "key_metadata": None, "key_extension": None,
            "key_ID_extension": None}  # fmt: skip
    return {"keys": [key | more for key in body["keys"]], "key_container_extension": None}


def numbered(call: str, body: Any) -> Any:
    return body | {"target_KME_ID": 2} if call == "status" else body


def tiny(call: str, body: Any) -> Any:
    return body | {"key_size": 32, "max_key_count": 1} if call == "status" else body


def odd_ids(make: Callable[[str], Any]) -> Callable[[str, Any], Any]:
    """Key IDs that are no UUIDs, and what the peer asks with."""

    def change(call: str, body: Any) -> Any:
        if call == "status":
            return body
        return {"keys": [key | {"key_ID": make(key["key_ID"])} for key in body["keys"]]}

    return change


ODD_BUT_GOOD: dict[str, Callable[[str, Any], Any]] = {
    "extension fields null, extra fields": easy_kme,
    "integer KME IDs": numbered,
    "default size of 32 bits, one key at a time": tiny,
    "key IDs of 24 bytes in hexadecimal": odd_ids(lambda text: text.replace("-", "") + "0" * 16),
    "upper-case UUIDs": odd_ids(str.upper),
}


@pytest.mark.parametrize("name", ODD_BUT_GOOD)
async def test_odd_but_good_answers(fake: Any, client_for: Any, name: str) -> None:
    fake.twist = through(ODD_BUT_GOOD[name])
    real: dict[str, str] = {}
    enc, dec = fake.enc_keys, fake.dec_keys

    def enc_keys(*arguments: Any) -> Answer:
        status, body = enc(*arguments)
        real.update(
            {fake.twist("enc_keys", (200, {"keys": [key]}))[1]["keys"][0]["key_ID"]: key["key_ID"]
             for key in body["keys"]}
        )  # fmt: skip
        return status, body

    def dec_keys(method: str, master: str, query: Any, body: bytes, caller: str) -> Answer:
        known = {shown.lower(): key_id for shown, key_id in real.items()}
        return dec(method, master, {"key_ID": [known[query["key_ID"][0].lower()]]}, body, caller)

    fake.enc_keys, fake.dec_keys = enc_keys, dec_keys
    async with client_for() as alice, client_for("bob") as bob:
        source = Etsi014Source(alice, sae="sae a/ü", peer_sae="bob", peer_kme="KME/B")
        key = await source.get_key()
        assert len(key.key) == 32
        [got] = (await bob.dec_keys("sae a/ü", list(key.key_ids))).keys
        assert got.key == key.key


async def test_a_kme_that_hides_its_names(fake: Any, client_for: Any) -> None:
    fake.twist = through(
        lambda call, body: (
            body | {"source_KME_ID": "hsm:0", "target_KME_ID": "hidden"}
            if call == "status"
            else body
        )
    )
    async with client_for() as alice:
        with pytest.raises(KeySourceUnavailable, match="--kme-id KME/A"):
            await alice.status("bob")
    async with client_for(kme_id="KME/A") as alice:
        source = Etsi014Source(alice, sae="sae a/ü", peer_sae="bob", peer_kme="KME/B")
        assert (await source.status()).stored == 25
        assert (await source.get_key()).kmes == (("KME/A", "KME/B"),)


async def test_a_kme_with_post_only(fake: Any, client_for: Any) -> None:
    fake.before = lambda method, url: (
        (405, b"", [("Allow", "POST")]) if method == "GET" and "status" not in url else None
    )
    async with client_for() as alice, client_for("bob") as bob:
        [key] = (await alice.enc_keys("bob")).keys
        [again] = (await alice.enc_keys("bob")).keys
        assert (await bob.dec_keys("sae a/ü", [key.key_id])).keys == (key,)
    assert again.key_id != key.key_id
    assert [method for method, _ in fake.requests] == ["GET", "POST", "POST", "GET", "POST"]


@pytest.mark.parametrize("status", [301, 302, 307, 308])
@pytest.mark.parametrize("absolute", [False, True])
async def test_a_proxy_that_wants_a_slash(
    fake: Any, client_for: Any, status: int, absolute: bool
) -> None:
    def redirect(method: str, url: str) -> Any:
        path, _, query = url.partition("?")
        if path.endswith("/"):
            return None
        origin = f"https://127.0.0.1:{fake.port}" if absolute else ""
        where = f"{origin}{path}/" + (f"?{query}" if query else "")
        return status, b"<html>Moved</html>", [("Location", where)]

    fake.before = redirect
    async with client_for() as alice, client_for("bob") as bob:
        assert (await alice.status("bob")).target_kme_id == "KME/B"
        keys = (await alice.enc_keys("bob", KeyRequest(number=2))).keys
        assert (await bob.dec_keys("sae a/ü", [key.key_id for key in keys])).keys == keys
    assert len(fake.requests) == 5, "each client learns it once"


@pytest.mark.parametrize(
    "where",
    [
        "https://evil.example{path}/",
        "http://127.0.0.1:{port}{path}/",
        "{path}/x",
        "{path}",
        "",
        "//x",
    ],
)
async def test_redirects_that_are_not_followed(fake: Any, client_for: Any, where: str) -> None:
    def redirect(method: str, url: str) -> Any:
        path = url.partition("?")[0]
        return 307, b"", [("Location", where.format(path=path, port=fake.port))]

    fake.before = redirect
    async with client_for() as alice:
        with pytest.raises(KeySourceUnavailable, match="307"):
            await alice.enc_keys("bob")
    assert len(fake.requests) == 1


@pytest.mark.parametrize("status", [400, 403, 404, 409, 412, 429, 500, 502, 503, 504])
@pytest.mark.parametrize(
    ("told", "seconds"),
    [("7", 7), ("999999999999", 3600), ("Wed, 21 Oct 2015 07:28:00 GMT", 0), ("soon", None)],
)
async def test_errors_of_a_proxy(
    fake: Any, client_for: Any, status: int, told: str, seconds: float | None
) -> None:
    page = b"<html><body><h1>Not available</h1><p>key=c2VjcmV0</p></body></html>"
    fake.before = lambda method, url: (status, page, [("Retry-After", told)])
    async with client_for() as alice:
        for call in (alice.enc_keys("bob"), alice.dec_keys("bob", [str(uuid.uuid4())])):
            with pytest.raises(KeySourceError) as caught:
                await call
            assert caught.value.retry_after == seconds
            assert str(status) in str(caught.value)
            assert "html" not in str(caught.value)
    assert len(fake.requests) == 2, "nothing is sent twice"


@pytest.mark.parametrize(
    "body",
    [
        {"message": "no more keys"},
        {"detail": "no more keys"},  # FastAPI
        {"detail": [{"loc": ["body", "size"], "msg": "no more keys"}]},  # pydantic
        {"type": "about:blank", "title": "Sorry", "detail": "no more keys"},  # RFC 9457
        {"title": "no more keys"},
        {"error": "no more keys"},
        {"error": {"code": 7, "message": "no more keys"}},
        {"message": None, "error": "no more keys"},
        {"message": {"detail": "no more keys"}},
        "no more keys",
        ["no more keys"],
    ],
)
async def test_messages_of_frameworks(fake: Any, client_for: Any, body: Any) -> None:
    """The reason reaches the reader, and its kind is recognised, whatever the member is called."""
    fake.before = lambda method, url: (422, json.dumps(body).encode(), [])
    async with client_for() as alice:
        with pytest.raises(KeySourceExhausted, match="the KME answered 422: no more keys"):
            await alice.enc_keys("bob")


@pytest.mark.parametrize("body", [{}, [], None, 7, {"message": 7}, {"detail": [{}, [], 3]}])
def test_bodies_without_a_message(body: object) -> None:
    assert message_of(body) == ""


async def test_a_whole_number_may_have_a_fraction_of_zero(fake: Any, client_for: Any) -> None:
    def as_floats(call: str, answer: Any) -> Any:
        members = answer[1] if isinstance(answer, tuple) else answer
        return 200, {k: float(v) if type(v) is int else v for k, v in members.items()}

    fake.twist = as_floats
    async with client_for() as alice:
        status = await alice.status("bob")
    assert type(status.key_size) is int


@pytest.mark.parametrize(
    ("status", "message", "looking_up", "kind"),
    [
        (403, "Key has expired", True, KeyExpired),  # QuKayDee
        (404, "Key not found", True, KeyUnknown),
        (400, "Key pool exhausted", False, KeySourceExhausted),
        (400, "key was already consumed", True, KeyConsumed),  # guardian
        (409, "", True, KeyNotYetAvailable),  # qkd_kme_server
        (412, "", False, KeySourceUnavailable),
        (504, "remote KME timeout", False, KeySourceUnavailable),
        (401, "wrong SAE", True, KeyUnauthorized),
        (503, "slave SAE unknown", False, KeySourceUnavailable),  # QKDLite
    ],
)
def test_errors_by_server(
    status: int, message: str, looking_up: bool, kind: type[KeySourceError]
) -> None:
    assert type(classify(status, message, looking_up=looking_up)) is kind


async def test_an_answer_that_would_be_too_long_is_not_asked_for(
    fake: Any, client_for: Any
) -> None:
    async with client_for(max_answer=10_000) as alice:
        with pytest.raises(ConfigError, match="max_answer"):
            await alice.enc_keys("bob", KeyRequest(number=100))
    assert not fake.requests
