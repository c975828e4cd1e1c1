"""Every refusal of the engine has a reason: a value with the alert and the section."""

import ast
import re
from pathlib import Path

import pytest

import hybridkex
from hybridkex import errors
from hybridkex.constants import Alert
from hybridkex.errors import PeerError, UnknownPskIdentity
from hybridkex.reasons import Reason

PACKAGE = Path(hybridkex.__file__).parent
ROOMS = ("tls", "wire", "crypto", "shell")
KINDS = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, PeerError) and kind is not PeerError
}
ONE_MEANING = {  # The class says it all.
    "BadRecordMac",
    "DecodeError",
    "EncodeError",
    "HandshakeTimeout",
    "InternalError",
    "MissingExtension",
    "NoApplicationProtocol",
    "PadExhausted",
    "RecordOverflow",
    "UnrecognizedName",
    "UnsupportedCertificateType",
    "UnsupportedExtension",
}


def refusals() -> list[tuple[str, str, str | None]]:
    """Place, class and reason of every refusal in the source of the engine."""
    found = []
    for room in ROOMS:
        for path in sorted((PACKAGE / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
                    continue
                if node.func.id not in KINDS:
                    continue
                reasons = [
                    one.attr
                    for one in ast.walk(node)
                    if isinstance(one, ast.Attribute)
                    and isinstance(one.value, ast.Name)
                    and one.value.id == "Reason"
                ]
                place = f"{path.relative_to(PACKAGE)}:{node.lineno}"
                found.append((place, node.func.id, reasons[0] if reasons else None))
    return found


def test_every_refusal_has_a_reason() -> None:
    found = refusals()
    assert len(found) > 90
    silent = [
        (place, kind)
        for place, kind, reason in found
        if reason is None and kind not in ONE_MEANING | {"CertificateRejected"}
    ]
    assert silent == []


def test_a_reason_has_the_alert_of_its_class() -> None:
    free = {"CertificateRejected", "UnknownPskIdentity"}  # the reason decides
    wrong = [
        (place, kind, reason)
        for place, kind, reason in refusals()
        if reason is not None and kind not in free and Reason[reason].alert != KINDS[kind].alert
    ]
    assert wrong == []


def test_every_reason_is_in_use() -> None:
    used = {reason for _, _, reason in refusals()} | {kind.reason.name for kind in KINDS.values()}
    assert {one.name for one in Reason} - used == set()


@pytest.mark.parametrize("reason", Reason, ids=str)
def test_a_reason(reason: Reason) -> None:
    assert str(reason) == reason.name.lower()
    assert re.fullmatch(
        r"(RFC \d+|draft-[a-z0-9-]+) section [\d.]+|policy|docs/[a-z-]+\.md", reason.source
    )
    assert PeerError("text", reason).alert is reason.alert
    assert PeerError("text", reason).reason is reason


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_a_class_has_a_reason_of_its_own(kind: type[PeerError]) -> None:
    error = kind("text")
    assert error.reason is kind.reason
    assert error.alert is kind.alert is kind.reason.alert


def test_the_optional_alert_is_chosen_by_the_reason() -> None:
    assert UnknownPskIdentity("text").alert is Alert.UNKNOWN_PSK_IDENTITY
    quiet = UnknownPskIdentity("text", Reason.PSK_NONE_IN_COMMON)
    assert quiet.alert is Alert.HANDSHAKE_FAILURE
    assert UnknownPskIdentity.alert is Alert.UNKNOWN_PSK_IDENTITY
