"""``hybridkex doctor``: what is there and works, what is missing, and how to get it."""

import argparse

from hybridkex.cli.checks import Finding, examine, examine_kme
from hybridkex.cli.key_sources import add_kme_options, kme_access
from hybridkex.cli.manual import describe
from hybridkex.cli.running import run_trio
from hybridkex.errors import ConfigError
from hybridkex.text import json_line

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    describe(
        parser,
        "Try what this library rests on, on this machine: published vectors, every group and "
        "signature scheme, a handshake with all three legs, the trust store, liboqs, the optional "
        "packages; and a KME, if one is named. No key is drawn from it.",
        examples=[
            "doctor",
            "doctor --json",
            "doctor --kme https://localhost:8443 --kme-ca ca.pem --kme-cert a.pem --kme-key a.key",
        ],
        status="0 when everything required works, 1 otherwise",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    group = parser.add_argument_group("a KME to ask for its status")
    add_kme_options(group, required=False)
    group.add_argument("--peer-sae", metavar="ID", help="for keys with this SAE")


def run(args: argparse.Namespace) -> int:
    """Examine and report."""
    if args.kme is not None and args.peer_sae is None:
        raise ConfigError("--kme goes with --peer-sae")
    access = kme_access(args) if args.kme is not None else None

    async def main() -> list[Finding]:
        findings = await examine()
        if access is not None:
            findings.append(await examine_kme(access, args.peer_sae))
        return findings

    findings = run_trio(main)
    healthy = all(one.works for one in findings if one.required)
    if args.json:
        report = {"healthy": healthy, "checks": [one.as_json() for one in findings]}
        print(json_line(report, indent=2))
        return 0 if healthy else 1
    for one in findings:
        word = "ok" if one.works else "FAILED" if one.required else "missing"
        print(f"{word:<8}{one.name}: {one.detail}")
        if one.advice:
            print(f"{'':8}  -> {one.advice}")
    print("everything required works" if healthy else "something required does not work")
    return 0 if healthy else 1
