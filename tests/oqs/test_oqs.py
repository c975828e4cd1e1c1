"""liboqs's KEMs and signatures in handshakes, and what happens without liboqs."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
from leaks import leaks
from tls_glue import ANY_GROUP, Pair

from hybridkex.auth import DevCa, Pins, RawIdentity, TrustStore
from hybridkex.combiner import ExchangeConfig, Exchanged, PskAuthentication, exchange
from hybridkex.crypto.kex import (
    MLKEM768,
    MLKEM1024,
    X25519,
    X25519MLKEM768,
    Concat,
    Group,
    Property,
)
from hybridkex.crypto.kex_oqs import CODES, OqsKem, oqs_group, via_oqs
from hybridkex.crypto.oqs import oqs_status
from hybridkex.crypto.sig_oqs import (
    ALGORITHMS,
    OqsPrivateKey,
    OqsPublicKey,
    oqs_scheme,
)
from hybridkex.errors import (
    CertificateRejected,
    ConfigError,
    DecryptError,
    IllegalParameter,
    LocalStateError,
)
from hybridkex.secret import Secret
from hybridkex.streams import SecureStream
from hybridkex.tls.config import ClientConfig, Limits, ServerConfig

STATUS = oqs_status()
needs_liboqs = pytest.mark.skipif(not STATUS.available, reason=f"needs liboqs: {STATUS.problem}")
KEMS = [name for name in STATUS.kems if name in CODES] or ["FrodoKEM-976-SHAKE"]
SIGNATURES = [name for name in STATUS.signatures if name in ALGORITHMS] or ["Falcon-512"]


@pytest.fixture(scope="module")
def ca() -> DevCa:
    return DevCa.create()


def connected(ca: DevCa, ours: Group, theirs: Group) -> Pair:
    client = ClientConfig(verifier=TrustStore((ca.certificate,)), groups=(ours,))
    server = ServerConfig(identities=(ca.issue("localhost"),), groups=(theirs,))
    pair = Pair.make(client, server).connect()
    pair.exchange(b"to the server", b"to the client")
    return pair


@needs_liboqs
@pytest.mark.parametrize("name", KEMS)
def test_every_kem_in_a_handshake(ca: DevCa, name: str) -> None:
    """Shares of FrodoKEM-1344 are larger than a record: the ClientHello takes several."""
    group = oqs_group(name)
    pair = connected(ca, group, group)
    assert pair.client.session.parts == (name,)
    assert pair.client.session.post_quantum


@needs_liboqs
@pytest.mark.parametrize("name", KEMS)
def test_shares_that_do_not_fit(name: str) -> None:
    kem = OqsKem(name)
    started = kem.start()
    answer, secret = kem.respond(started.share)
    assert (len(started.share), len(answer)) == (kem.offer_length, kem.answer_length)
    assert started.finish(answer).reveal() == secret.reveal()
    for share in (b"", started.share[:-1], started.share + b"\0"):
        with pytest.raises(IllegalParameter):
            kem.respond(share)
    for wrong in (b"", answer[:-1], answer + b"\0"):
        with pytest.raises(IllegalParameter):
            started.finish(wrong)
    # A share of somebody else: an error, or another secret.
    other, _ = kem.respond(kem.start().share)
    try:
        mismatched = started.finish(other)
    except IllegalParameter:
        return
    assert mismatched.reveal() != secret.reveal()


@needs_liboqs
@pytest.mark.parametrize("group", [MLKEM768, MLKEM1024, X25519MLKEM768], ids=str)
def test_either_provider_on_either_side(ca: DevCa, group: Group) -> None:
    other = via_oqs(group)
    assert (other.code, other.part_names) == (group.code, group.part_names)
    for ours, theirs in ((other, group), (group, other), (other, other)):
        connected(ca, ours, theirs)


@needs_liboqs
@pytest.mark.parametrize("third", ["FrodoKEM-976-SHAKE", "FrodoKEM-1344-AES", "HQC-3"])
def test_three_legs_in_one_group(ca: DevCa, third: str) -> None:
    if third not in STATUS.kems:
        pytest.skip(f"this liboqs was built without {third}")
    # A hybrid and one part more: the same as of its parts.
    exchange = Concat(X25519MLKEM768.exchange, OqsKem(third))
    group = Group(code=0xFEC0, name=f"X25519MLKEM768{third}", exchange=exchange)
    pair = connected(ca, group, group)
    assert pair.client.session.parts == ("ML-KEM-768", "X25519", third)
    assert group.properties == Property.CLASSICAL | Property.POST_QUANTUM
    # Who computes the parts is still each side's choice.
    connected(ca, group, via_oqs(group))


@needs_liboqs
async def test_shares_beyond_16_kib_over_a_stream_and_after_a_retry(ca: DevCa) -> None:
    """FrodoKEM-1344, which the server wants and the client did not offer a share for."""
    large = oqs_group("FrodoKEM-1344-SHAKE")
    assert large.exchange.offer_length > 1 << 14
    trust = TrustStore((ca.certificate,))
    ends = trio.testing.lockstep_stream_pair()
    client = SecureStream(
        ends[0],
        ClientConfig(verifier=trust, groups=(X25519MLKEM768, large)),
        server_hostname="localhost",
    )
    server = SecureStream(
        ends[1], ServerConfig(identities=(ca.issue("localhost"),), groups=(large,))
    )
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.do_handshake)
            await client.do_handshake()
    assert client.session.parts == server.session.parts == ("FrodoKEM-1344-SHAKE",)


@needs_liboqs
def test_a_key_that_no_share_can_hold() -> None:
    mceliece = [name for name in STATUS.kems if name.startswith("Classic-McEliece")]
    if not mceliece:
        pytest.skip("this liboqs was built without Classic McEliece")
    for name in mceliece:
        for refused in (
            lambda name=name: oqs_group(name),
            lambda name=name: oqs_group(name, code=0xFEC1),
            lambda name=name: Group(
                code=0xFEC1, name="hybrid", exchange=Concat(X25519.exchange, OqsKem(name))
            ),
        ):
            with pytest.raises(ConfigError, match="at most 65535"):
                refused()


@needs_liboqs
async def test_what_no_share_can_hold_goes_into_an_exchange_of_ones_own() -> None:
    mceliece = "Classic-McEliece-348864f"
    if mceliece not in STATUS.kems:
        pytest.skip(f"this liboqs was built without {mceliece}")
    ends = trio.testing.memory_stream_pair()
    results: dict[str, Exchanged] = {}

    async def side(role: Any, stream: Any, local: str, peer: str) -> None:
        config = ExchangeConfig(
            role=role, local=local, peer=peer, label=b"test",
            authentication=PskAuthentication(Secret(bytes(32))),
            exchanges=(X25519.exchange, OqsKem(mceliece)), time_limit=30,
        )  # fmt: skip
        results[role] = await exchange(stream, config)

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(side, "initiator", ends[0], "a", "b")
            nursery.start_soon(side, "responder", ends[1], "b", "a")
    assert results["initiator"].key == results["responder"].key
    assert results["initiator"].parts == ("X25519", mceliece)


@needs_liboqs
def test_keys_of_other_lengths() -> None:
    kem = OqsKem("ML-KEM-768")
    _, private = kem.key_pair()
    answer, _ = kem.respond(kem.start().share)
    for wrong in (b"", private.reveal()[:-1], private.reveal() + b"\0"):
        with pytest.raises(ConfigError, match="private key of"):
            kem.open(Secret(wrong), answer)
    good = OqsPrivateKey.generate("Falcon-512")
    for public, secret in (
        (good.public.key[:-1], good.private.reveal()),
        (good.public.key, good.private.reveal()[:-1]),
        (good.public.key, good.private.reveal() + b"\0"),
    ):
        pem = OqsPrivateKey(OqsPublicKey("Falcon-512", public), Secret(secret)).to_pem()
        with pytest.raises(ConfigError, match="other lengths") as caught:
            RawIdentity.from_pem(pem)
        assert not leaks(str(caught.value), secret)
    spoiled = OqsPrivateKey(good.public, Secret(bytes(len(good.private))))
    with pytest.raises(LocalStateError, match="cannot sign"):
        spoiled.sign(b"content")
    for one in (good, kem, RawIdentity(good)):
        assert not leaks(repr(one), good.private.reveal())


@needs_liboqs
def test_every_group_has_its_own_code_point() -> None:
    codes = [oqs_group(name).code for name in STATUS.kems if name in CODES]
    assert len(set(codes)) == len(codes) >= 10
    assert len(set(CODES.values())) == len(CODES)


@needs_liboqs
@pytest.mark.parametrize("name", SIGNATURES)
def test_every_signature_in_a_handshake(name: str) -> None:
    scheme = oqs_scheme(name)
    identity = RawIdentity(OqsPrivateKey.generate(name))
    again = RawIdentity.from_pem(identity.to_pem())
    assert again.pin == identity.pin
    common = {"signature_schemes": (scheme,), "groups": (X25519,), "policy": ANY_GROUP}
    # Oil-and-vinegar keys are larger than what is held unasked, some than what is held at all.
    client = ClientConfig(
        verifier=Pins(frozenset((identity.pin,))),
        limits=Limits(certificate_message=4 << 20),
        **common,
    )
    pair = Pair.make(client, ServerConfig(identities=(again,), **common))
    pair.client.start()
    pair.fight()
    if len(identity.chain[0]) > 1 << 20:
        assert isinstance(pair.errors["client"], CertificateRejected)
        return
    assert pair.errors == {}
    assert pair.client.session.signature_scheme == name
    signature = scheme.sign(identity.private_key, b"content")
    public = identity.peer_view.public_key
    for bad in (signature[:-1] + bytes((signature[-1] ^ 1,)), b"", signature * 2):
        with pytest.raises(DecryptError):
            scheme.verify(public, bad, b"content")
    with pytest.raises(DecryptError):
        scheme.verify(public, signature, b"another")


@needs_liboqs
def test_unknown_names() -> None:
    with pytest.raises(ConfigError, match="has no KEM"):
        OqsKem("ML-KEM-9000")
    with pytest.raises(ConfigError, match="no signature algorithm"):
        oqs_scheme("Rainbow")
    with pytest.raises(ConfigError, match="no part"):
        via_oqs(X25519)
    assert {oqs_scheme(name).name for name in STATUS.signatures if name in ALGORITHMS} == set(
        SIGNATURES
    )
    # What a release adds is refused by name until it has a code point here, and changes nothing.
    for name in set(STATUS.signatures) - set(ALGORITHMS):
        with pytest.raises(ConfigError, match="no signature algorithm"):
            oqs_scheme(name)


@needs_liboqs
def test_nothing_is_printed_with_liboqs_either() -> None:
    program = """
from hybridkex.crypto.oqs import load, oqs_status
from hybridkex.crypto.kex_oqs import OqsKem
assert oqs_status().available
OqsKem("ML-KEM-768").start()
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


WITHOUT = """
import ctypes, ctypes.util, subprocess, sys
{setting}
real = subprocess.Popen.__init__
def refused(self, command, *more, **options):
    assert "git" not in command and "cmake" not in command, command
    real(self, command, *more, **options)
subprocess.Popen.__init__ = refused
import hybridkex
from hybridkex.crypto.kex_oqs import *
from hybridkex.crypto.sig_oqs import *
from hybridkex.crypto.kex import MLKEM768
from hybridkex.crypto.oqs import oqs_status
from hybridkex.errors import ProviderMissing
assert sys.modules.get("oqs") is None
assert not oqs_status().available
for call in (
    lambda: OqsKem("ML-KEM-768"), lambda: via_oqs(MLKEM768),
    lambda: OqsPrivateKey.generate("Falcon-512"), lambda: oqs_group("HQC-3"),
):
    try:
        call()
    except ProviderMissing as error:
        assert "OQS_INSTALL_PATH" in str(error) and "hybridkex[oqs]" in str(error)
        assert {reason!r} in str(error), error
    else:
        raise AssertionError("it was found")
"""
NOWHERE = "ctypes.util.find_library = lambda name: None"


@pytest.mark.parametrize(
    ("setting", "where", "reason"),
    [
        (NOWHERE, "here", "was not found"),
        # liboqs-python takes an empty name for the working directory: then so do we.
        (NOWHERE, "", "was not found"),
        # Something is there under the name, and it is another library.
        ("ctypes.util.find_library = lambda name: 'libc.so.6'", "here", "is not a liboqs"),
        # The library without the package.
        ("ctypes.util.find_library = lambda name: 'libc.so.6'; sys.modules['oqs'] = None", "here",
         "liboqs-python is not installed"),
    ],
    ids=["nowhere", "empty", "foreign", "no-package"],
)  # fmt: skip
def test_without_liboqs(setting: str, where: str, reason: str, tmp_path: Path) -> None:
    """Nothing is cloned, built or printed, and the process goes on: one error says what to do."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(setting=setting, reason=reason)],
        env={
            **os.environ,
            "OQS_INSTALL_PATH": str(tmp_path) if where else "",
            "HOME": str(tmp_path),
            "PYTHONPATH": str(Path(__file__).parents[2]),
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
