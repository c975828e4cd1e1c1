"""What looks for secrets in texts finds them in each notation."""

import base64
import random
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st
from leaks import leaks, notations

QUOTES = st.sampled_from(b"\"'\\\n\0a")
SECRETS = st.lists(QUOTES | st.integers(0, 255), min_size=12, max_size=64).map(bytes)


WRITERS: tuple[tuple[str, Callable[[bytes], object]], ...] = (
    ("hex", bytes.hex),
    ("hex", lambda secret: secret.hex(" ").upper()),
    ("base64", lambda secret: base64.b64encode(secret).decode()),
    ("repr", repr),
    ("repr", bytearray),
    ("repr", lambda secret: repr(repr(secret))),
    ("bytes", lambda secret: secret.decode("latin-1")),
    ("list", lambda secret: str((*secret,))),
)


@given(before=SECRETS, secret=SECRETS, after=SECRETS)
def test_each_notation_is_found(before: bytes, secret: bytes, after: bytes) -> None:
    for notation, write in WRITERS:
        assert notation in notations(f"a line: {write(secret)}, or so", secret)
        if notation != "base64":
            assert notation in notations(f"{write(before + secret + after)}", secret)
            assert leaks(f"{write(secret[-8:])}", b"another secret", secret)


def test_another_secret_is_not_found() -> None:
    secret, other = random.randbytes(32), random.randbytes(4096)
    for text in (other.hex(), other.hex(" "), repr(other), base64.b64encode(other), str([*other])):
        assert leaks(text, other)
        assert not leaks(text, secret)
    assert not leaks("Secret(32 bytes)", secret)
