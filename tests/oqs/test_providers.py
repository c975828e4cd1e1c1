"""ML-KEM of liboqs and of `cryptography`: the same bytes, against each other and Wycheproof."""

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import mlkem

from hybridkex.crypto.kex import MLKEM768, MLKEM1024, X25519, X25519MLKEM768
from hybridkex.crypto.kex_oqs import OqsKem, via_oqs
from hybridkex.crypto.oqs import load, oqs_status
from hybridkex.errors import ConfigError, IllegalParameter
from hybridkex.secret import Secret

STATUS = oqs_status()
pytestmark = pytest.mark.skipif(not STATUS.available, reason=f"needs liboqs: {STATUS.problem}")
VECTORS = Path(__file__).parents[1] / "vectors" / "wycheproof"
OURS = {768: mlkem.MLKEM768PrivateKey, 1024: mlkem.MLKEM1024PrivateKey}


def rows(name: str) -> list[list[str]]:
    found: list[list[str]] = json.loads((VECTORS / name).read_text(encoding="ascii"))["rows"]
    assert len(found) > 10
    return found


@pytest.mark.parametrize("size", [768, 1024])
def test_key_pairs_and_decapsulation(size: int) -> None:
    """From a seed both make the same key pair, and take the same secret out of a ciphertext."""
    kem = OqsKem(f"ML-KEM-{size}")
    taken = 0
    for number, result, seed, ciphertext, secret in rows(f"mlkem_{size}.json"):
        native = load().KeyEncapsulation(kem.name)
        public = native.generate_keypair_seed(bytes.fromhex(seed))
        private = Secret(native.export_secret_key())
        native.free()
        other = OURS[size].from_seed_bytes(bytes.fromhex(seed))
        assert other.public_key().public_bytes_raw() == public, number
        share = bytes.fromhex(ciphertext)
        if result == "valid":
            assert kem.open(private, share).reveal().hex() == secret, number
            assert other.decapsulate(share).hex() == secret
            taken += 1
        else:
            with pytest.raises(IllegalParameter):
                kem.open(private, share)
    assert taken > 5


@pytest.mark.parametrize("size", [768, 1024])
def test_encapsulation_keys_are_checked_alike(size: int) -> None:
    """The length and the modulus check of FIPS 203 section 7.2."""
    group = {768: MLKEM768, 1024: MLKEM1024}[size]
    refused = 0
    for number, result, key in rows(f"mlkem_{size}_encaps.json"):
        for exchange in (group.exchange, via_oqs(group).exchange):
            if result == "valid":
                exchange.respond(bytes.fromhex(key))
                continue
            refused += 1
            with pytest.raises(IllegalParameter):
                exchange.respond(bytes.fromhex(key))
            assert number
    assert refused > 5


def test_only_what_was_asked_for_changes() -> None:
    group = via_oqs(X25519MLKEM768)
    assert (group.code, group.name, group.part_names) == (
        X25519MLKEM768.code,
        X25519MLKEM768.name,
        X25519MLKEM768.part_names,
    )
    kinds = [isinstance(part, OqsKem) for part in group.exchange.parts]
    assert kinds == [True, False]
    with pytest.raises(ConfigError, match="no part"):
        via_oqs(X25519)
