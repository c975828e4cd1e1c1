"""Certificates are made once: RSA and ML-DSA keys cost time."""

from collections.abc import Callable
from functools import cache

import pytest

from hybridkex.auth import DevCa, Identity, TrustStore

Issue = Callable[[str], tuple[TrustStore, Identity]]


@pytest.fixture(scope="session")
def ca() -> DevCa:
    return DevCa.create()


@pytest.fixture(scope="session")
def trust(ca: DevCa) -> TrustStore:
    return TrustStore((ca.certificate,))


@pytest.fixture(scope="session")
def identity(ca: DevCa) -> Identity:
    return ca.issue("localhost", "127.0.0.1")


@pytest.fixture(scope="session")
def client_identity(ca: DevCa) -> Identity:
    return ca.issue("bob")


@pytest.fixture(scope="session")
def issue() -> Issue:
    """A trust store and an identity for localhost, by algorithm."""

    @cache
    def make(algorithm: str) -> tuple[TrustStore, Identity]:
        authority = DevCa.create(algorithm=algorithm)
        leaf = authority.issue("localhost", algorithm=algorithm)
        return TrustStore((authority.certificate,)), leaf

    return make
