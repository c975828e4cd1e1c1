"""A Secret does not show itself in any of the places where secrets are found later."""

import copy
import gc
import io
import json
import logging
import multiprocessing.reduction
import pickle
import pprint
import reprlib
import string
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from leaks import leaks

from hybridkex.secret import Secret

VALUE = b"correct horse battery staple \xf0\xca\x5e"
SECRET = Secret(VALUE)


@dataclass
class Holder:
    name: str
    secret: Secret


@pytest.mark.parametrize(
    "show",
    [
        repr,
        str,
        ascii,
        format,
        reprlib.repr,
        pprint.pformat,
        lambda secret: f"{secret} {secret!r} {secret!s} {secret!a} {secret:}",
        lambda secret: "%s %r" % (secret, secret),  # noqa: UP031
        lambda secret: "{} {!r}".format(secret, secret),  # noqa: UP032
        lambda secret: string.Template("$x").substitute(x=secret),
        lambda secret: repr([secret]) + repr({"key": secret}) + repr((secret,)) + repr({1: secret}),
        lambda secret: repr(Holder("x", secret)),
        lambda secret: str(ValueError(secret)) + repr(ValueError("x", secret)),
        lambda secret: str(dir(secret)) + str(secret.__doc__),
    ],
)
def test_no_text_shows_it(show: Callable[[Secret], str]) -> None:
    shown = show(SECRET)
    assert not leaks(shown, VALUE)


def test_what_it_says_instead() -> None:
    assert repr(SECRET) == str(SECRET) == "Secret(32 bytes)"
    assert repr(Secret(b"")) == "Secret(0 bytes)"
    assert repr(Holder("x", SECRET)) == "Holder(name='x', secret=Secret(32 bytes))"


def test_a_format_specification_does_not_bring_it_out() -> None:
    for specification in ("x", "s", "40", ">100", "b"):
        with pytest.raises(TypeError) as caught:
            format(SECRET, specification)
        assert not leaks(str(caught.value), VALUE)


@pytest.mark.parametrize(
    "write",
    [
        *(lambda secret, p=p: pickle.dumps(secret, p) for p in range(pickle.HIGHEST_PROTOCOL + 1)),
        lambda secret: pickle.dumps(Holder("x", secret)),
        multiprocessing.reduction.ForkingPickler.dumps,
        copy.copy,
        copy.deepcopy,
        lambda secret: copy.deepcopy(Holder("x", secret)),
        lambda secret: asdict(Holder("x", secret)),
        lambda secret: json.dumps({"key": secret}),
        hash,
        lambda secret: {secret},
        lambda secret: {secret: 1},
        bytes,
        memoryview,
        list,
        lambda secret: secret[0],
        lambda secret: b"" + secret,
        lambda secret: io.BytesIO().write(secret),
        vars,
        lambda secret: secret.__dict__,
    ],
)
def test_no_way_of_copying_it_takes_it(write: Callable[[Any], object]) -> None:
    with pytest.raises((TypeError, AttributeError)) as caught:
        write(SECRET)
    assert not leaks(str(caught.value), VALUE)


def test_a_dataclass_can_hold_it_and_be_replaced() -> None:
    """What needs no copy of the secret works: the same object is handed on."""
    holder = replace(Holder("x", SECRET), name="y")
    assert holder.secret is SECRET


def test_tracebacks() -> None:
    """Not even in one that prints the local variables."""

    def fail(secret: Secret) -> None:
        holder = Holder("x", secret)
        several = [secret] * 3
        raise ValueError(holder, several)

    try:
        fail(Secret(bytes(VALUE)))
    except ValueError as error:
        with_locals = traceback.TracebackException.from_exception(error, capture_locals=True)
    shown = "".join(with_locals.format())
    assert "holder = Holder(name='x', secret=Secret(32 bytes))" in shown
    assert not leaks(shown, VALUE)


def test_logs(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("hybridkex.test")
    with caplog.at_level(logging.DEBUG):
        logger.debug("key %s of %r", SECRET, Holder("x", SECRET))
        logger.error("failed with %s", SECRET, exc_info=ValueError(SECRET))
    assert caplog.text.count("Secret(32 bytes)") >= 3
    assert not leaks(caplog.text, VALUE)


def test_a_failed_assertion_does_not_show_it() -> None:
    """pytest and unittest print both sides of a comparison."""
    other = Secret(VALUE[:-1])
    with pytest.raises(AssertionError, match="Secret") as caught:
        assert other == SECRET
    assert not leaks(str(caught.value), VALUE)


def test_reveal() -> None:
    assert SECRET.reveal() == VALUE
    assert type(SECRET.reveal()) is bytes
    assert len(SECRET) == 32


@pytest.mark.parametrize("kind", [bytes, bytearray, lambda value: memoryview(bytearray(value))])
def test_it_keeps_its_own_bytes(kind: Callable[[bytes], Any]) -> None:
    """What it was made from may change or be erased afterwards."""
    original = kind(VALUE)
    secret = Secret(original)
    if not isinstance(original, bytes):
        original[:] = bytes(len(VALUE))
    assert secret.reveal() == VALUE


@given(st.binary(max_size=40), st.binary(max_size=40))
def test_equality(first: bytes, second: bytes) -> None:
    assert (Secret(first) == Secret(second)) == (first == second)
    assert (Secret(first) != Secret(second)) == (first != second)
    assert Secret(first) == Secret(bytes(first))


def test_it_equals_nothing_but_a_secret() -> None:
    """A comparison with bare bytes would not be in constant time."""
    for other in (VALUE, bytearray(VALUE), str(SECRET), None, 0):
        assert other != SECRET
        assert not other == SECRET  # noqa: SIM201
        assert Secret.__eq__(SECRET, other) is NotImplemented


def test_equality_is_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes through hmac.compare_digest."""
    seen = []

    def compare(first: bytes, second: bytes) -> bool:
        seen.append((first, second))
        return first == second

    monkeypatch.setattr("hybridkex.secret.hmac.compare_digest", compare)
    assert Secret(b"a") == Secret(b"a")
    assert Secret(b"a") != Secret(b"b")
    assert seen == [(b"a", b"a"), (b"a", b"b")]


def test_it_has_no_room_for_more() -> None:
    with pytest.raises(AttributeError):
        SECRET.copy = 1  # type: ignore[attr-defined]
    assert gc.get_referents(SECRET)[0] == VALUE, "only the garbage collector's view finds it"
    assert sys.getsizeof(SECRET) < 64


@pytest.mark.parametrize("value", [32, 0, True, None, "abc", [1, 2], range(3), 1.5, {}, SECRET])
def test_a_secret_is_made_of_bytes_only(value: Any) -> None:
    """``bytes(32)`` is 32 zeros, which a peer can guess."""
    with pytest.raises(TypeError, match="a Secret is made of bytes, not of"):
        Secret(value)
    assert all(Secret(kind(b"abc")) == Secret(b"abc") for kind in (bytes, bytearray, memoryview))
