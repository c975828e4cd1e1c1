"""What takes configuration refuses a wrong value when it is called, and names the parameter."""

import inspect
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from datetime import datetime
from enum import Enum
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import pytest
import trio

import hybridkex as h
from hybridkex import aio, auth, combiner
from hybridkex.constants import GroupCode
from hybridkex.errors import ConfigError
from hybridkex.link import presets, settings, simulated
from hybridkex.qkd import composite, in_process, pool, prefetch, producer, source
from hybridkex.qkd.etsi014 import client
from hybridkex.tls import events
from tests.test_public_api import MODULES, names

NAN, INF = float("nan"), float("inf")
ODD = (None, True, NAN, INF, -1, -0.5, 10**30, "no", b"x", "\ud800", [3], ["a"], (3,), {"a": 1})
ODD += (object(), int, {3}, (None,), [b"x"], bytearray(b"x"))

CA = h.DevCa.create()
ISSUED = CA.issue("localhost")
RAW = h.RawIdentity.generate()
SECRET = h.Secret(bytes(range(32)))
ALICE, BOB = in_process.in_process_pair("alice", "bob")
OTHER, _ = in_process.in_process_pair("alice", "bob", kmes=("a", "b"))
FILE = Path(__file__)
ACCESS = {"url": "https://localhost:1", "ca": FILE, "certificate": FILE, "key": FILE}
LEG: dict[str, Any] = {"name": "a", "secret": SECRET, "offer": b"x"}
EXCHANGE = combiner.PskAuthentication(SECRET)
KDF = {"message_a": b"", "message_b": b"", "label": b"l", "info": b"", "length": 32}
PEM = RAW.to_pem()
PSK = h.ExternalPsk(identity=b"x", key=SECRET)
SIDES = {"role": "initiator", "local": "a", "peer": "b", "authentication": EXCHANGE, "label": b"l"}
PRESET = presets.preset("lim2014")


async def _handshake(*_: object) -> Any:
    raise AssertionError


KME = client.KmeClient(client.KmeAccess(**ACCESS), handshake=_handshake)

CALLS: dict[Callable[..., Any], dict[str, Any]] = {
    h.ClientConfig: {"psks": (PSK,)},
    h.ServerConfig: {"identities": (ISSUED,)},
    h.ClientConnection: {"config": h.ClientConfig(psks=(PSK,))},
    h.ServerConnection: {"config": h.ServerConfig(identities=(ISSUED,))},
    h.Policy: {},
    h.FreshKeys: {},
    h.OneTimePad: {},
    h.Limits: {},
    h.PadToMultiple: {"size": 5},
    h.TrustStore: {"authorities": (CA.certificate,)},
    h.TrustStore.from_pem: {"data": CA.pem},
    h.TrustStore.from_file: {"path": FILE},
    h.TrustStore.system: {},
    h.Pins: {"pins": ("ab" * 32,)},
    h.RawIdentity: {"private_key": RAW.private_key},
    h.RawIdentity.generate: {},
    h.RawIdentity.from_pem: {"pem": PEM},
    h.RawIdentity.from_file: {"path": FILE},
    h.Identity: {"chain": ISSUED.chain, "private_key": ISSUED.private_key},
    h.Identity.from_pem: {"certificates": b"", "key": PEM},
    h.Identity.from_files: {"certificates": FILE, "key": FILE},
    h.WebOfTrust: {"people": (), "statements": ()},
    h.WebOfTrust.from_files: {"people": (), "statements": ()},
    h.KnownPeers: {"path": Path("/nonexistent")},
    h.DevCa: {"certificate": CA.certificate, "private_key": CA.private_key},
    h.DevCa.create: {},
    CA.intermediate: {},
    CA.issue: {},
    h.QkdPeer: {"source": ALICE},
    h.QkdLimits: {},
    h.QkdPskSource: {"peers": (ALICE,)},
    h.ExternalPsk: {"identity": b"x", "key": SECRET},
    h.TicketIssuer: {},
    h.MemoryTicketStore: {},
    h.CookieProtector: {},
    h.combine: {"legs": (h.Leg(**LEG),), "label": b"l", "context": b""},
    h.Leg: LEG,
    h.Group: {"code": 0xFEC0, "name": "m", "exchange": h.X25519.exchange},
    h.Concat: {"parts": (h.X25519.exchange, h.MLKEM768.exchange)},
    h.canonical_peer_name: {"text": "x"},
    auth.parse_peer_name: {"text": "x"},
    auth.endorsement: {"name": "x", "pin": "ab" * 32, "until": datetime.now().date()},
    combiner.ExchangeConfig: SIDES,
    combiner.PskAuthentication: {"key": SECRET},
    combiner.SignatureAuthentication: {"identity": RAW, "verifier": h.Pins(pins=(RAW.pin,))},
    combiner.cas_kdf: {"previous": SECRET, "secret": SECRET, **KDF},
    combiner.cat_kdf: {"secrets": (SECRET,), **KDF},
    composite.CombinedSource: {"sources": (ALICE, OTHER)},
    composite.FailoverSource: {"sources": (ALICE, OTHER)},
    client.Etsi014Source: {"client": KME, "sae": "a", "peer_sae": "b"},
    client.KmeAccess: ACCESS,
    client.KmeClient: {"access": client.KmeAccess(**ACCESS), "handshake": _handshake},
    in_process.InProcessSource: {
        "sae": "a", "kme": "b", "peer_sae": "c", "peer_kme": "d", "capacity": 1
    },
    in_process.in_process_pair: {"alice_sae": "a", "bob_sae": "b"},
    pool.PoolNames: {"sae": "a", "kme": "b", "peer_sae": "c", "peer_kme": "d"},
    pool.FilePool.open: {"path": Path("/nonexistent"), "key_file": FILE},
    prefetch.PrefetchConfig: {},
    prefetch.PrefetchSource: {"source": ALICE},
    producer.RandomEnd: {"key_bits": 256},
    producer.RandomProducer: {},
    producer.random_link: {},
    source.canonical_key_id: {"text": "x"},
    settings.LinkSettings: {},
    presets.Preset: {one.name: getattr(PRESET, one.name) for one in fields(PRESET)},
    presets.preset: {"name": "lim2014"},
    simulated.SimulatedLink: {"settings": settings.LinkSettings()},
}  # fmt: skip

OTHERS = [
    # connections: tests of the shells
    *(h.SecureListener, h.SecureStream, h.open_secure_tcp_listeners, h.open_secure_tcp_stream),
    *(h.serve_secure_tcp, combiner.exchange, *(getattr(aio, name) for name in aio.__all__)),
    # without arguments, or with any
    *(h.InsecureNoVerification, h.ApplicationExtension, h.Secret, simulated.stream_pair),
    simulated.Observer,
    # what a call, a peer or a key source returns
    *(h.Epoch, h.PadBudget, h.Session, h.UpdateKey, auth.PeerCertificate, auth.PeerRawKey),
    *(auth.DnsName, auth.IpAddress, auth.VerifiedPeer, auth.spki_sha256, combiner.Exchanged),
    *(composite.combine_keys, client.classify, producer.ProducedKey, source.KeyPart),
    *(source.KeyReference, source.QkdKey, source.SourceStatus, *vars(events).values()),
    # made by FilePool.open
    pool.FilePool,
]
"""Public classes and functions that take no configuration, and where theirs is checked."""
SAID = {
    "needed": "people must agree",
    "text": "a name",
    "config": "a connection",
    "server_hostname": "a name",
    "uris": "URI",
}
"""The words of a message where a function has one argument that matters."""


def wrong(value: object, hint: Any) -> bool:
    """Whether a value is of another kind than the annotation says. Containers may be of any kind
    that iterates, and a file may be named by a ``str``."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind is typing.Annotated:
        return wrong(value, inner[0])
    if kind in (typing.Union, UnionType):
        return all(wrong(value, one) for one in inner)
    if kind is typing.Literal:
        return value not in inner
    if kind in (Any, object):
        return False
    if kind is Path:
        return not isinstance(value, str | bytes | Path)
    if kind in (int, float):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return not number or value != value or value < 0 or (kind is int and value % 1 != 0)
    if isinstance(kind, type) and issubclass(kind, Iterable) and inner:
        whole = isinstance(value, str | bytes | bytearray | dict) or not isinstance(value, Iterable)
        return whole or any(wrong(one, inner[0]) for one in value)
    if kind is Callable or "__call__" in vars(kind):
        return not callable(value) or isinstance(value, type)
    if getattr(kind, "_is_protocol", False):
        return True
    return not isinstance(value, kind)


def hints(call: Callable[..., Any]) -> dict[str, Any]:
    function = call.__init__ if isinstance(call, type) else call
    return typing.get_type_hints(inspect.unwrap(function), include_extras=True)


def parameters() -> Iterator[tuple[Callable[..., Any], str]]:
    for call in CALLS:
        yield from ((call, name) for name in inspect.signature(call).parameters)


def called(call: Callable[..., Any], **changed: Any) -> None:
    given = {**CALLS[call], **changed}
    several = [
        one.name
        for one in inspect.signature(call).parameters.values()
        if one.kind is inspect.Parameter.VAR_POSITIONAL
    ]
    call(*[one for name in several for one in given.pop(name, ())], **given)


@pytest.mark.parametrize(
    ("call", "name"),
    [pytest.param(*one, id=f"{one[0].__qualname__}-{one[1]}") for one in parameters()],
)
def test_a_wrong_value_is_refused_with_the_name_of_what_it_is_for(
    call: Callable[..., Any], name: str
) -> None:
    several = inspect.signature(call).parameters[name].kind is inspect.Parameter.VAR_POSITIONAL
    hint = hints(call)[name]
    bad = [one for one in ODD if wrong(one, hint) and not (name == "seed" and one == -1)]
    said = [name, call.__qualname__.partition(".")[0], SAID.get(name, name)]
    faults = []
    for value in bad:
        try:
            called(call, **{name: (*CALLS[call].get(name, ()), value) if several else value})
        except (ConfigError, TypeError) as error:
            if not any(one in str(error) for one in said):
                faults.append(f"{value!r}: {error!r}")
        except Exception as error:
            faults.append(f"{value!r}: {error!r}")
        else:
            faults.append(f"{value!r}: accepted")
    assert not faults, "\n".join(faults)


def test_every_public_class_and_function_is_one_of_these() -> None:
    link = (one.__name__ for one in (presets, settings, simulated))
    # Those that adapt the connections to other libraries have tests of their own.
    shells = ("hybridkex.adapters.", "hybridkex.anyio")
    modules = [one for one in (*MODULES, *link) if not one.startswith(shells)]
    found = [one for module in modules for one in names(module)]
    missing = [
        name
        for name, one in found
        if callable(one)
        and not (isinstance(one, type) and issubclass(one, Enum | Exception))
        and not getattr(one, "_is_protocol", False)
        and one not in CALLS
        and not any(one is other for other in OTHERS)
    ]
    assert missing == []


def test_right_values_of_other_classes_are_accepted(tmp_path: Path) -> None:
    """Paths as text, subclasses of int, lists, iterators, and any kind of async function."""
    known = h.KnownPeers(str(tmp_path / "known"))  # type: ignore[arg-type]
    assert known.path == tmp_path / "known"
    path: Any = trio.Path(tmp_path / "ca.pem")  # a path that is no pathlib.Path
    Path(path).write_bytes(CA.pem)
    assert h.TrustStore.from_file(path).authorities == (CA.certificate,)
    access = client.KmeAccess(**{**ACCESS, "ca": str(FILE)}, kme_id_rule=client.IdRule.SAN_URI)
    for handshake in (_handshake, lambda *_: _handshake(), partial(_handshake, 1)):
        client.KmeClient(access, handshake=handshake)
    assert h.Group(code=GroupCode.X25519, name="x", exchange=h.X25519.exchange) != h.X25519
    assert h.TrustStore.from_pem(CA.pem, pins=iter(["ab" * 32])).pins == {"ab" * 32}
    assert CA.issue("a.example", uris=(one for one in ["urn:a"])).names == ("a.example", "urn:a")
    assert composite.CombinedSource([ALICE, OTHER]).local_sae == "alice"
    names = pool.PoolNames(sae="a", kme="b", peer_sae="c", peer_kme="d")
    key_file = tmp_path / "key"
    key_file.touch(0o600)
    key_file.write_text("ab" * 32)
    path: Any = str(tmp_path / "pool")
    pool.FilePool.open(path, key_file=key_file, names=names)._store.close()
    with pytest.raises(ConfigError, match="there is no key pool"):
        pool.FilePool.open(tmp_path / "none", key_file=key_file)


def test_a_call_without_an_argument_is_refused_in_the_words_of_python() -> None:
    with pytest.raises(TypeError, match=r"random_link.* takes from 0 to 1 positional arguments"):
        producer.random_link(256, 256)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'source'"):
        prefetch.PrefetchSource()  # type: ignore[call-arg]
