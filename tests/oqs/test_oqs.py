"""liboqs's KEMs and signatures in handshakes, and what happens without liboqs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tls_glue import ANY_GROUP, Pair

from hybridkex.auth import DevCa, Pins, RawIdentity, TrustStore
from hybridkex.crypto.kex import (
    MLKEM768,
    MLKEM1024,
    X25519,
    X25519MLKEM768,
    Concat,
    Group,
    Property,
)
from hybridkex.crypto.kex_oqs import CODES, OqsKem, oqs_group, oqs_groups, via_oqs
from hybridkex.crypto.oqs import oqs_status
from hybridkex.crypto.sig_oqs import ALGORITHMS, OqsPrivateKey, oqs_scheme
from hybridkex.errors import CertificateRejected, ConfigError, DecryptError, IllegalParameter
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
    exchange = Concat(*X25519MLKEM768.exchange.parts, OqsKem(third))
    group = Group(code=0xFEC0, name=f"X25519MLKEM768{third}", exchange=exchange)
    pair = connected(ca, group, group)
    assert pair.client.session.parts == ("ML-KEM-768", "X25519", third)
    assert group.properties == Property.CLASSICAL | Property.POST_QUANTUM


@needs_liboqs
def test_a_key_that_no_share_can_hold() -> None:
    mceliece = [name for name in STATUS.kems if name.startswith("Classic-McEliece")]
    if not mceliece:
        pytest.skip("this liboqs was built without Classic McEliece")
    for name in mceliece:
        with pytest.raises(ConfigError, match="at most 65535"):
            oqs_group(name, code=0xFEC1)


@needs_liboqs
def test_every_group_has_its_own_code_point() -> None:
    codes = [group.code for group in oqs_groups()]
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


@pytest.mark.parametrize("call", ["OqsKem('ML-KEM-768')", "oqs_groups()", "via_oqs(MLKEM768)"])
def test_without_liboqs(call: str, tmp_path: Path) -> None:
    """Nothing is cloned, built or printed, and the process goes on: one error says what to do."""
    program = f"""
import ctypes.util
ctypes.util.find_library = lambda name: None
from hybridkex.crypto.kex_oqs import *
from hybridkex.crypto.kex import MLKEM768
from hybridkex.crypto.oqs import oqs_status
from hybridkex.errors import ProviderMissing
assert not oqs_status().available
try:
    {call}
except ProviderMissing as error:
    assert "OQS_INSTALL_PATH" in str(error) and "hybridkex[oqs]" in str(error)
else:
    raise AssertionError("it was found")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "OQS_INSTALL_PATH": str(tmp_path), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
