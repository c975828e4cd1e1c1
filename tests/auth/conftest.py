"""The machine's own OpenSSL, where it has one."""

import shutil

import pytest


@pytest.fixture
def openssl() -> str:
    found = shutil.which("openssl")
    if found is None:
        pytest.skip("this machine has no openssl command")
    return found
