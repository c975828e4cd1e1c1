"""The runner's flags for the shim: for the first connection and for resumptions."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Credential", "Flags", "Unimplemented", "parse"]

BOOLEAN = frozenset(
    [
        "async",
        "check-close-notify",
        "decline-alpn",
        "expect-extended-master-secret",
        "expect-hrr",
        "expect-no-hrr",
        "expect-no-peer-cert",
        "expect-no-server-name",
        "expect-no-session",
        "expect-no-session-id",
        "expect-verify-result",
        "expect-session-miss",
        "export-traffic-secrets",
        "handshake-twice",
        "implicit-handshake",
        "ipv6",
        "is-handshaker-supported",
        "key-update",
        "key-update-before-read",
        "no-key-shares",
        "no-legacy-server-connect",
        "no-op-extra-handshake",
        "no-ticket",
        "no-tls1",
        "no-tls11",
        "no-tls12",
        "partial-write",
        "reject-alpn",
        "renegotiate-freely",
        "renegotiate-ignore",
        "renegotiate-once",
        "require-any-client-certificate",
        "reverify-on-resume",
        "server",
        "server-preference",
        "shim-shuts-down",
        "shim-writes-first",
        "use-custom-verify-callback",
        "use-early-callback",
        "use-export-context",
        "use-exporter-between-reads",
        "use-old-client-cert-callback",
        "verify-fail",
        "verify-peer",
        "write-different-record-sizes",
    ]
)
VALUE = frozenset(
    [
        "accepted-peer-cert-types",
        "advertise-alpn",
        "available-client-cert-types",
        "curves",
        "expect-alpn",
        "expect-advertised-alpn",
        "expect-cipher",
        "expect-curve-id",
        "expect-early-data-reason",
        "expect-peer-cert-file",
        "expect-peer-certificate-type",
        "expect-peer-rpk-sha256",
        "expect-peer-signature-algorithm",
        "expect-selected-credential",
        "expect-server-name",
        "expect-total-renegotiations",
        "expect-version",
        "export-context",
        "export-keying-material",
        "export-label",
        "host-name",
        "key-shares",
        "max-cert-list",
        "max-version",
        "min-version",
        "port",
        "read-size",
        "repeat-shim-initial-write",
        "resume-count",
        "resumption-delay",
        "select-alpn",
        "shim-id",
        "shim-initial-write",
        "trust-cert",
        "use-client-ca-list",
        "verify-prefs",
    ]
)
IGNORED_VALUE = frozenset(["expect-cipher-aes", "expect-cipher-no-aes"])
"""Hints, and expectations about the choice among equals."""
CREDENTIAL_VALUE = frozenset(
    [
        "cert-file",
        "key-file",
        "psk-importer-context",
        "psk-importer-identity",
        "psk-importer-key",
        "signing-prefs",
    ]
)
CREDENTIAL_BOOLEAN = frozenset(("psk-importer-sha256", "psk-importer-sha384"))
NEW_CREDENTIAL = {
    "new-psk-credential": "psk",
    "new-rpk-credential": "rpk",
    "new-x509-credential": "x509",
}


class Unimplemented(Exception):
    """The runner requests a feature that this library does not have."""


class _Options:
    def __init__(self) -> None:
        self.values: dict[str, list[str]] = {}

    def on(self, name: str) -> bool:
        """Whether the flag was given."""
        return name in self.values

    def text(self, name: str, default: str = "") -> str:
        """The flag's value."""
        return self.values[name][-1] if name in self.values else default

    def number(self, name: str, default: int = 0) -> int:
        """The flag's value as a number."""
        return int(self.text(name, str(default)))

    def numbers(self, name: str) -> list[int]:
        """The numbers of a flag that is given once for each."""
        return [int(one) for one in self.values.get(name, [])]

    def decoded(self, name: str) -> bytes:
        """The flag's value, in base64 on the command line."""
        return base64.b64decode(self.text(name))


class Credential(_Options):
    """A certificate and its key, or a PSK."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind


@dataclass
class Flags(_Options):
    """The flags of one connection."""

    values: dict[str, list[str]] = field(default_factory=dict)
    default: Credential = field(default_factory=lambda: Credential("x509"))
    more: list[Credential] = field(default_factory=list)

    def credentials(self) -> list[Credential]:
        """In the order of the command line; the default one only where it is filled in."""
        return [*self.more, *([self.default] if self.default.values else [])]


def parse(arguments: Sequence[str]) -> tuple[Flags, Flags]:
    """Flags for the first connection and for the later ones.

    Raises:
        Unimplemented: a flag that we do not know.
    """
    initial, resume = Flags(), Flags()
    rest = iter(arguments)
    for argument in rest:
        name = argument.removeprefix("-on-shim")
        targets = [initial, resume]
        if name.startswith("-on-handshaker-") or name.startswith("-on-retry-"):
            raise Unimplemented(name)
        if name.startswith("-on-initial-"):
            name, targets = name.removeprefix("-on-initial"), [initial]
        elif name.startswith("-on-resume-"):
            name, targets = name.removeprefix("-on-resume"), [resume]
        name = name.removeprefix("-")
        if name in NEW_CREDENTIAL:
            for target in targets:
                target.more.append(Credential(NEW_CREDENTIAL[name]))
        elif name in BOOLEAN:
            for target in targets:
                target.values[name] = [""]
        elif name in CREDENTIAL_BOOLEAN:
            for target in targets:
                target.more[-1].values[name] = [""]
        elif name in VALUE:
            value = next(rest)
            for target in targets:
                target.values.setdefault(name, []).append(value)
        elif name in CREDENTIAL_VALUE:
            value = next(rest)
            for target in targets:
                credential = target.more[-1] if target.more else target.default
                credential.values.setdefault(name, []).append(value)
        elif name in IGNORED_VALUE:
            next(rest)
        else:
            raise Unimplemented(name)
    return initial, resume
