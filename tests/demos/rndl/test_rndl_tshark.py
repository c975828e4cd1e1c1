"""Wireshark's opinion: the captures open, and its own TLS reads with the key log what ours read."""

import shutil
import subprocess
from pathlib import Path

import pytest
from rndl_glue import Report

pytestmark = pytest.mark.skipif(
    shutil.which("tshark") is None, reason="needs tshark (Debian's package tshark)"
)


def tshark(*options: str | Path) -> str:
    # Any port is one of TLS: some of those that the system gives belong to another protocol.
    command = ["tshark", "-d", "tcp.port==1-65535,tls", *map(str, options)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert process.returncode == 0, process.stderr
    return process.stdout


def captures(report: Report) -> list[Path]:
    return sorted((report.kept / "recordings").rglob("*.pcapng"))


def test_every_capture_opens_without_complaint(report: Report, tmp_path: Path) -> None:
    found = captures(report)
    assert len(found) == 8 + 4 * 2 * 3 + 4 + 1
    # The link's channel is no protocol of Wireshark's: it must open, no more.
    link = found.pop([path.name for path in found].index("link.pcapng"))
    assert len(tshark("-r", link, "-c", "100").splitlines()) == 100
    # One file of all others: mergecap reads each, and tshark starts but once.
    merged = tmp_path / "merged.pcapng"
    subprocess.run(["mergecap", "-a", "-w", merged, *found], check=True, timeout=60)
    lines = tshark(
        # Checksums, sequence numbers and TLS, as strictly as Wireshark knows.
        *("-o", "tcp.check_checksum:TRUE", "-o", "ip.check_checksum:TRUE"),
        *("-r", merged, "-T", "fields", "-E", "separator=|"),
        *("-e", "tls.handshake.type", "-e", "tcp.stream", "-e", "_ws.expert.severity"),
        *("-e", "_ws.malformed", "-e", "_ws.col.Protocol"),
    ).splitlines()
    rows = [line.split("|") for line in lines]
    hellos: dict[str, set[str]] = {}
    for types, stream, *_ in rows:
        hellos.setdefault(stream, set()).update(types.split(","))
    # Two connections a session, but one for the toy and where the keys are renewed, and two hops
    # where there are hops.
    assert len(hellos) == 2 * (5 + 3 + 3 + 3) + 1 + (1 + 4) + 4 * 2 * 2
    assert all({"1", "2"} <= seen for seen in hellos.values())
    assert "TLSv1.3" in {row[4] for row in rows}
    severities = {int(number) for row in rows for number in row[2].split(",") if number}
    assert all(number < WARNING for number in severities)
    assert not any(row[3] for row in rows)


WARNING = 0x600000  # epan/proto.h: PI_WARN; below are notes and chats


@pytest.mark.parametrize(
    ("configuration", "adversary"),
    [
        ("x25519", "ecdh"),
        ("x25519mlkem768", "both"),
        # Nobody in this trial reads these without being given the QKD key by a KME.
        ("x25519-qkd", "hop-classical"),
        ("x25519mlkem768-qkd", "hop-hybrid-both"),
        ("x25519mlkem768-qkd-psk", "hop-hybrid-both"),
    ],
)
def test_wireshark_reads_what_the_adversary_read(
    report: Report, configuration: str, adversary: str
) -> None:
    """From the parties' key log, where the adversary had none."""
    name = configuration
    if configuration.endswith(("qkd", "psk")):
        name += "-hybrid-hop" if "hybrid" in adversary else "-classical-hop"
    verdicts = report.verdicts(configuration, adversary)
    sessions = [one for one in verdicts if one["capture"] == "session.pcapng"]
    assert [one["decrypted"] for one in sessions] == [True, True]
    for stream, verdict in enumerate(sessions):
        output = tshark(
            *("-o", f"tls.keylog_file:{report.kept / 'keylog' / name}.txt"),
            *("-r", report.kept / "recordings" / name / "session.pcapng"),
            *("-q", "-z", f"follow,tls,raw,{stream}"),
        )
        # One side's lines are indented; which side that is depends on the version.
        lines = [line for line in output.splitlines() if set(line) <= set("\t0123456789abcdef")]
        said = [
            b"".join(bytes.fromhex(line) for line in lines if line.startswith("\t") is indented)
            for indented in (True, False)
        ]
        expected = [verdict["to_server"].encode(), verdict["to_client"].encode()]
        assert sorted(said) == sorted(expected)


def test_without_the_key_log_wireshark_reads_nothing(report: Report) -> None:
    """The control: what it prints comes out of the records."""
    capture = report.kept / "recordings/x25519/session.pcapng"
    output = tshark("-r", capture, "-q", "-z", "follow,tls,raw,0")
    assert b"Alice".hex() not in output
