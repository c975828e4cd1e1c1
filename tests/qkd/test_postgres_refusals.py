"""What a database says when it refuses a KME, with the next step."""

import pytest

psycopg = pytest.importorskip("psycopg")

from hybridkex.errors import ConfigError  # noqa: E402  # after the check for the extra
from hybridkex.qkd.postgres_connection import reason  # noqa: E402
from hybridkex.qkd.postgres_store import check_store  # noqa: E402
from hybridkex.qkd.store import Seal  # noqa: E402
from hybridkex.secret import Secret  # noqa: E402


@pytest.mark.parametrize(
    ("refusal", "step"),
    [
        ("fe_sendauth: no password supplied", "add ?passfile=FILE to the URL"),
        ('FATAL:  password authentication failed for user "kme"', "compare the password"),
        ('FATAL:  Peer authentication failed for user "kme"', "run as the system user"),
        ("FATAL:  unsupported startup parameter: options", "not through a pooler"),
    ],
)
def test_a_refusal_names_the_next_step(refusal: str, step: str) -> None:
    said = reason(psycopg.OperationalError(f"connection to server failed: {refusal}\nmore"))
    assert step in said
    assert "\n" not in said


def test_other_errors_are_as_they_were() -> None:
    assert reason(psycopg.OperationalError("Connection refused")) == "Connection refused"


@pytest.mark.parametrize(
    "rest",
    [
        "hunter2@localhost/kme?hunter2",
        "hunter2@localhost/kme?hunter2=hunter2",
        "hun ter2@localhost/kme",
        "x@hunter2@localhost/kme",
        "x/hunter2@localhost/kme",
        "hunter2/x@localhost/kme",
        "%hunter2@localhost/kme",
        "x:hunter2@localhost:hunter2/kme",
    ],
)
def test_no_part_of_a_wrong_url_is_told(rest: str) -> None:
    url = Secret(f"postgresql://kme:{rest}".encode())
    with pytest.raises(ConfigError, match="not one of PostgreSQL") as caught:
        check_store(url, Seal(Secret(bytes(32))), owner="kme-a")
    assert "ter2" not in str(caught.value)


def test_a_database_that_cannot_be_reached_is_named() -> None:
    url = Secret(b"postgresql://kme@localhost:1/stock")
    with pytest.raises(ConfigError, match="the key store stock at localhost"):
        check_store(url, Seal(Secret(bytes(32))), owner="kme-a")
