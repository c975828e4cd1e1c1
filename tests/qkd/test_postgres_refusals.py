"""What a database says when it refuses a KME, with the next step."""

from pathlib import Path

import pytest

psycopg = pytest.importorskip("psycopg")

from hybridkex.errors import ConfigError  # noqa: E402  # after the check for the extra
from hybridkex.qkd.postgres_connection import prepared, reason  # noqa: E402
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


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("passfil=/x", "did you mean passfile?"),
        ("passfile=/x&sslmod=require", "did you mean sslmode?"),
        ("colour=blue", "an option after the ? in the URL of the store is not one of PostgreSQL"),
    ],
)
def test_a_misspelt_option_is_told_apart(options: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        prepared(f"postgresql://kme:hunter2@localhost/kme?{options}")
    assert said in str(caught.value)
    assert "password" not in str(caught.value)
    assert "ter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("mode", "said"),
    [(None, "No such file"), (0o644, "chmod 600"), (0o600, "has no line for")],
)
def test_a_password_file_without_the_password_is_named(
    mode: int | None, said: str, tmp_path: Path
) -> None:
    file = tmp_path / "pgpass"
    if mode is not None:
        file.write_text("elsewhere:*:*:*:hunter2\n")
        file.chmod(mode)
    text = reason(no_password(f"?passfile={file}"))
    assert f"password file {file}" in text
    assert said in text
    assert "hunter2" not in text


def no_password(options: str) -> Exception:
    """What psycopg raises where the server asks for a password, and libpq has none."""
    with pytest.raises(psycopg.OperationalError) as caught:
        psycopg.connect(prepared(f"postgresql://kme@127.0.0.1:1/kme{options}")[0])
    return psycopg.OperationalError("fe_sendauth: no password supplied", pgconn=caught.value.pgconn)


def test_without_a_password_file_the_message_says_how_to_make_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "add ?passfile=FILE to the URL" in reason(no_password(""))


def test_a_password_is_not_taken_for_a_password_file() -> None:
    """Its "/" ends the address, so that the rest of it is in the options."""
    with pytest.raises(psycopg.OperationalError) as caught:
        psycopg.connect(prepared("postgresql://127.0.0.1:1/x?passfile=hunter2@localhost/kme")[0])
    error = psycopg.OperationalError("no password supplied", pgconn=caught.value.pgconn)
    assert "hunter2" not in reason(error)


def test_a_database_that_cannot_be_reached_is_named() -> None:
    url = Secret(b"postgresql://kme@localhost:1/stock")
    with pytest.raises(ConfigError, match="the key store stock at localhost"):
        check_store(url, Seal(Secret(bytes(32))), owner="kme-a")
