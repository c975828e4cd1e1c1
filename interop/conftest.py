"""Makes the package ``interop`` importable in the tests here, whatever directory pytest starts
in."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))


@pytest.fixture(scope="session")
def thorough(request: pytest.FixtureRequest) -> bool:
    """Whether a test tries every member of its kind, an option of ``tests/conftest.py``."""
    return bool(request.config.getoption("--thorough", False))
