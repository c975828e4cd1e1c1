"""``hybridkex doctor``: what works, what is missing, and how to get it."""

from hybridkex.cli.checks import Finding, examine, examine_kme
from hybridkex.cli.doctor import DoctorOptions
from hybridkex.cli.key_sources import kme_access
from hybridkex.cli.qkd_requirement import check_kme_options
from hybridkex.cli.running import run_trio
from hybridkex.errors import ConfigError
from hybridkex.text import json_line


def run(options: DoctorOptions) -> int:
    peer = options.peer_sae
    check_kme_options(options.access)
    if options.access.kme is None and peer is not None:
        raise ConfigError("--peer-sae requires --kme, the URL of the KME")
    if options.access.kme is not None and peer is None:
        raise ConfigError("--kme requires --peer-sae")
    access = kme_access(options.access) if options.access.kme is not None else None

    async def main() -> list[Finding]:
        findings = await examine()
        if access is not None and peer is not None:
            findings.append(await examine_kme(access, peer))
        return findings

    findings = run_trio(main)
    healthy = all(one.works for one in findings if one.required)
    if options.json:
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
