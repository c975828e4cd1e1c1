"""No leg can be left out: with one secret missing, whichever it is, nothing is read.

The adversary also tries what forgetful parties would have done (see ``later/decrypt.py``), so these
tests fail when the code's key schedule forgets a leg; ``test_rndl_mutation.py`` shows that they do.
"""

from functools import partial
from pathlib import Path

import pytest
import trio
from rndl_glue import attack

from hybridkex.demos.rndl.matrix import CONFIGURATIONS, Configuration, Delivery
from hybridkex.demos.rndl.now.stage import Stage

X25519_ONLY, HYBRID, X25519_QKD, ALL_LEGS, PSK_ALONE, _, _ = CONFIGURATIONS


def decrypted(folder: Path, configuration: Configuration, *oracles: str) -> list[bool]:
    stage = Stage(folder / "stage")
    trio.run(partial(stage.record, configuration))
    case = stage.recording(configuration, Delivery.IN_PROCESS)
    verdicts = attack(case, stage, *oracles)
    return [verdict.decrypted for verdict in verdicts]


@pytest.mark.parametrize("configuration", [X25519_QKD, ALL_LEGS, PSK_ALONE], ids=lambda one: one.id)
def test_the_qkd_key_cannot_be_left_out(configuration: Configuration, tmp_path: Path) -> None:
    assert decrypted(tmp_path, configuration, "ecdh", "ml-kem") == [False, False]


def test_ml_kem_cannot_be_left_out(tmp_path: Path) -> None:
    assert decrypted(tmp_path, HYBRID, "ecdh") == [False, False]


def test_ecdh_cannot_be_left_out(tmp_path: Path) -> None:
    assert decrypted(tmp_path, HYBRID, "ml-kem") == [False, False]


def test_the_key_exchange_cannot_be_left_out(tmp_path: Path) -> None:
    assert decrypted(tmp_path, X25519_ONLY) == [False, False]


def test_with_every_secret_it_is_read(tmp_path: Path) -> None:
    """The control: what keeps the others closed is the secret that is missing."""
    assert decrypted(tmp_path, HYBRID, "ecdh", "ml-kem") == [True, True]
