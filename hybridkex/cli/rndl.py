"""``hybridkex rndl``: record now, decrypt later, live.

Records channels of every configuration on loopback, lets future adversaries try to decrypt them,
each in its own process, and prints which of them succeeded. ``docs/record-now-decrypt-later.md``
says what is modelled, what is real and what it does not prove.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hybridkex.cli.arguments import Action, Command, option
from hybridkex.cli.values import folder_path


@dataclass(frozen=True, kw_only=True)
class RndlOptions:
    html: Path | None = option("write the report as one HTML page")
    json: Path | None = option("write the report as JSON")
    keep: Path | None = option(
        "keep the recordings (pcapng), key logs for Wireshark, and each adversary's files in a new "
        "folder",
        type=folder_path,
        metavar="DIR",
    )


COMMAND: Final = Command(
    "Record handshakes and data of seven configurations, then let future adversaries try to "
    "decrypt them: they break ECDH, ML-KEM or signatures, or steal keys, key stores, ticket "
    "keys or the secrets of a session. A table shows what each adversary could read and "
    "compares it with the prediction.",
    examples=["rndl", "rndl --html report.html", "rndl --keep recordings"],
    status="0 if each adversary read what was predicted and nothing else, 1 otherwise",
    notes="See docs/record-now-decrypt-later.md.",
    action=Action("rndl", RndlOptions, extra="apps,kme,link"),
)
