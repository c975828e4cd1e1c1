"""What the adversary's tests have in common."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

ADVERSARIES = (
    "none",
    "ecdh",
    "ml-kem",
    "both",
    "signatures",
    "hop-classical",
    "hop-classical-both",
    "hop-hybrid",
    "hop-hybrid-both",
    "certificate-key",
    "key-store-after",
    "key-store-before",
    "ticket-key",
    "ticket-key-both",
)

# Written down by hand, not computed: R is read, a dot is safe; the columns are ADVERSARIES.
_EXPECTED = {
    "x25519":                         ". R . R . R R R R . R R . R",
    "x25519-resumed":                 ". R . R . R R R R . R R . R",
    "x25519mlkem768":                 ". . . R . . R . R . R R . R",
    "x25519mlkem768-resumed":         ". . . R . . R . R . R R . R",
    "x25519-qkd":                     ". . . . . R R . R . . R . .",
    "x25519-qkd-resumed":             ". . . . . R R . R . . R . R",
    "x25519mlkem768-qkd":             ". . . . . . R . R . . R . .",
    "x25519mlkem768-qkd-resumed":     ". . . . . . R . R . . R . R",
    "x25519mlkem768-qkd-psk":         ". . . . . . R . R . . R . .",
    "x25519mlkem768-qkd-psk-resumed": ". . . . . . R . R . . R . R",
}  # fmt: skip

EXPECTED = {
    (row, adversary): mark == "R"
    for row, marks in _EXPECTED.items()
    for adversary, mark in zip(ADVERSARIES, marks.split(), strict=True)
}
"""Whether an adversary reads a connection."""


@dataclass(frozen=True)
class Report:
    """What ``hybridkex rndl`` left behind."""

    status: int
    output: str
    seconds: float
    html: Path
    json: dict[str, Any]
    kept: Path

    def verdicts(self, configuration: str, adversary: str) -> list[dict[str, Any]]:
        """What one adversary's process said about one configuration's connections."""
        for one in self.json["recordings"]:
            if (one["configuration"], one["adversary"]) == (configuration, adversary):
                verdicts: list[dict[str, Any]] = one["verdicts"]
                return verdicts
        raise KeyError((configuration, adversary))
