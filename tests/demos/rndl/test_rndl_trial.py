"""The outcome of a whole trial: the matrix, what each adversary had, what it read."""

import re
from pathlib import Path

import pytest
from rndl_glue import ADVERSARIES, EXPECTED, Report

from hybridkex.cli import main
from hybridkex.demos.rndl.now.stage import Plaintext
from hybridkex.demos.rndl.trial import contradiction


def test_the_matrix(report: Report) -> None:
    found = {
        (cell["row"], cell["adversary"]): cell["verdict"] == "decrypted"
        for cell in report.json["cells"]
    }
    assert found == EXPECTED
    assert tuple(one["id"] for one in report.json["adversaries"]) == ADVERSARIES
    assert [cell["wrong"] for cell in report.json["cells"] if cell["wrong"]] == []
    assert report.json["as_predicted"] is True
    assert report.status == 0


def test_it_is_done_in_under_a_minute(report: Report) -> None:
    """By CPU time, which does not count what else the machine does; it uses two cores."""
    assert report.cpu_seconds < 60


def test_the_matrix_in_the_terminal(report: Report) -> None:
    rows = [line.split()[-len(ADVERSARIES) :] for line in report.output.splitlines()]
    marks = [row for row in rows if row and set(row) <= {"R", "·"}]
    expected = iter(EXPECTED.values())
    assert marks == [
        ["R" if next(expected) else "·" for _ in ADVERSARIES]
        for _ in range(len(EXPECTED) // len(ADVERSARIES))
    ]


def test_a_safe_cell_says_what_was_missing(report: Report) -> None:
    missing = {(cell["row"], cell["adversary"]): cell["missing"] for cell in report.json["cells"]}
    for key, decrypted in EXPECTED.items():
        assert bool(missing[key]) is not decrypted
    assert missing["x25519", "none"] == ["X25519"]
    assert missing["x25519mlkem768", "ecdh"] == ["ML-KEM-768"]
    assert missing["x25519mlkem768", "ml-kem"] == ["X25519"]
    for key in (("x25519-qkd", "ecdh"), ("x25519mlkem768-qkd", "key-store-after")):
        (name,) = missing[key]
        assert re.fullmatch(r"QKD key [0-9a-f-]{36}", name)
    (name,) = missing["x25519mlkem768-qkd-resumed", "both"]
    assert name.startswith("PSK of the ticket, which takes: QKD key ")


def test_what_was_read_differs_from_cell_to_cell(report: Report) -> None:
    """The plaintext has a random part, so nobody can have it but from the recording."""
    lines = [cell["plaintext"] for cell in report.json["cells"] if cell["verdict"] == "decrypted"]
    assert all(re.fullmatch(r"Alice to Bob: .*: [0-9a-f]{16}", line) for line in lines)
    # Adversaries of one delivery share a recording: rows by themselves, and QKD rows by delivery.
    # Then: resumed ones by their tickets, first ones by theft, and those that renew their keys.
    assert len(set(lines)) == 2 * (2 + 3 * 2) + 3 + 3 + (1 + 2)


def test_key_updates_and_tickets_were_passed_through(report: Report) -> None:
    for resumed, verdict in enumerate(report.verdicts("x25519mlkem768", "both")):
        seen = [(event["from"], event["what"]) for event in verdict["events"]]
        for side in ("client", "server"):
            after = seen[seen.index((side, "KeyUpdate")) :]
            assert (side, "application data") in after
            assert (side, "close_notify") in after
        assert ("server", "NewSessionTicket, NewSessionTicket") in seen
        assert verdict["resumed"] == bool(resumed)
        assert all(event["state"] != "protected" for event in verdict["events"])


def test_the_hops_fall_with_their_own_key_exchange(report: Report) -> None:
    def fell(adversary: str) -> list[bool]:
        verdicts = report.verdicts("x25519mlkem768-qkd", adversary)
        hops = [one for one in verdicts if one["capture"].startswith("hop-")]
        assert len(hops) == 2
        assert {one["group"] for one in hops} == {
            "x25519" if "classical" in adversary else "X25519MLKEM768"
        }
        return [one["decrypted"] for one in hops]

    assert fell("hop-classical") == [True, True]
    assert fell("hop-hybrid") == [False, False]
    assert fell("hop-hybrid-both") == [True, True]


def test_the_links_channel_was_recorded_and_is_no_help(report: Report) -> None:
    """A megabyte of what QKD modules say to each other; the keys that came of it stay closed."""
    recording = report.kept / "recordings/link.pcapng"
    assert recording.stat().st_size > 1_000_000
    ids = set()
    for configuration in WITH_QKD:
        had = report.kept / "adversaries/qkd-channel" / configuration / "link.pcapng"
        assert had.read_bytes() == recording.read_bytes()
        first = report.verdicts(configuration, "qkd-channel")[0]
        assert [leg["kind"] for leg in first["legs"] if leg["how"] is None] == ["qkd"]
        ids |= set(first["missing"])
    assert len(ids) == 4


@pytest.mark.parametrize(
    ("configuration", "adversary", "missing"),
    [
        ("x25519mlkem768-fresh", "session", ["ML-KEM-768", "X25519"]),
        ("x25519mlkem768-qkd-fresh", "session", ["ML-KEM-768", "X25519", "QKD key"]),
        ("x25519mlkem768-qkd-fresh", "session-both", ["QKD key"]),
    ],
)
def test_a_thief_reads_up_to_the_new_keys(
    report: Report, configuration: str, adversary: str, missing: list[str]
) -> None:
    """The control within a safe cell: what was sent before the theft is read, what follows not."""
    [verdict] = report.verdicts(configuration, adversary)
    assert not verdict["decrypted"]
    assert len(verdict["missing"]) == len(missing)
    for name, start in zip(verdict["missing"], missing, strict=True):
        assert name.startswith(start)
        assert name.endswith("of the key update")
    assert verdict["to_server"].startswith("Alice to Bob: X25519MLKEM768")
    assert "still there with new keys?" not in verdict["to_server"]
    states = {event["state"] for event in verdict["events"]}
    assert states == {"clear", "decrypted", "protected"}


def test_a_key_update_is_followed_with_every_leg(report: Report) -> None:
    for configuration, adversary in (
        ("x25519mlkem768-fresh", "both"),
        ("x25519mlkem768-fresh", "session-both"),
        ("x25519mlkem768-qkd-fresh", "hop-hybrid-both"),
    ):
        [verdict] = [
            one
            for one in report.verdicts(configuration, adversary)
            if one["capture"] == "session.pcapng"
        ]
        assert "still there with new keys?" in verdict["to_server"]
        whats = " ".join(event["what"] for event in verdict["events"])
        assert whats.count("ExtendedKeyUpdate") == 5
        kinds = {leg["kind"] for leg in verdict["legs"] if leg["how"]}
        assert "update-exchange" in kinds
        assert ("update-qkd" in kinds) is ("qkd" in configuration)


def test_the_toy_curve_fell_without_an_oracle(report: Report) -> None:
    toy = report.json["toy"]
    assert toy["wrong"] is None
    assert toy["verdict"]["decrypted"]
    assert "discrete logarithm" in toy["verdict"]["legs"][0]["how"]
    assert toy["steps"][0].startswith("baby steps")
    assert toy["steps"][-1].startswith("giant steps")
    had = {path.name for path in (report.kept / "adversaries/toy36").rglob("*") if path.is_file()}
    assert had == {"session.pcapng"}


SESSIONS = frozenset(
    f"{configuration}/session.pcapng"
    for configuration in (
        "x25519",
        "x25519mlkem768",
        "x25519-qkd",
        "x25519mlkem768-qkd",
        "x25519mlkem768-qkd-psk",
        "x25519mlkem768-fresh",
        "x25519mlkem768-qkd-fresh",
    )
)
WITH_QKD = (
    "x25519-qkd",
    "x25519mlkem768-qkd",
    "x25519mlkem768-qkd-psk",
    "x25519mlkem768-qkd-fresh",
)
HOPS = frozenset(
    f"{configuration}/hop-{who}.pcapng" for configuration in WITH_QKD for who in ("alice", "bob")
)
LINKS = frozenset(hop.replace("hop-alice", "link").replace("hop-bob", "link") for hop in HOPS)
ECDH, ML_KEM, SIGNATURE = "oracle/ecdh.jsonl", "oracle/ml-kem.jsonl", "oracle/signature.jsonl"
STORES = frozenset(
    f"stolen/kme/{kme}/{file}" for kme in ("kme-a", "kme-b") for file in ("keys.db", "store.key")
)
TICKET_KEYS, SECRETS = "stolen/ticket-keys.jsonl", "stolen/sessions.jsonl"
BELONGINGS = {
    "none": SESSIONS,
    "ecdh": SESSIONS | {ECDH},
    "ml-kem": SESSIONS | {ML_KEM},
    "both": SESSIONS | {ECDH, ML_KEM},
    "signatures": SESSIONS | {SIGNATURE},
    "hop-classical": SESSIONS | HOPS | {ECDH},
    "hop-classical-both": SESSIONS | HOPS | {ECDH, ML_KEM},
    "hop-hybrid": SESSIONS | HOPS | {ECDH},
    "hop-hybrid-both": SESSIONS | HOPS | {ECDH, ML_KEM},
    "qkd-channel": SESSIONS | LINKS | {ECDH, ML_KEM, SIGNATURE},
    "certificate-key": SESSIONS | {"stolen/certificate/server.pem"},
    "key-store-after": SESSIONS | STORES | {ECDH, ML_KEM, SIGNATURE},
    "key-store-before": SESSIONS | STORES | {ECDH, ML_KEM},
    "ticket-key": SESSIONS | {TICKET_KEYS},
    "ticket-key-both": SESSIONS | {TICKET_KEYS, ECDH, ML_KEM},
    "session": SESSIONS | {SECRETS},
    "session-both": SESSIONS | {SECRETS, ECDH, ML_KEM},
}


@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_an_adversary_had_what_its_name_says(report: Report, adversary: str) -> None:
    folder = report.kept / "adversaries" / adversary
    had = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        # The log and the index of a database that was in use belong to it.
        if path.is_file() and not path.name.endswith(("-wal", "-shm"))
    }
    assert had == BELONGINGS[adversary]


def test_the_folder_is_for_its_owner_alone(report: Report) -> None:
    assert report.kept.stat().st_mode & 0o077 == 0


def test_bad_options_end_at_once_with_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for option, path, complaint in (
        ("--html", tmp_path / "no/such/report.html", "there is no folder"),
        ("--keep", tmp_path, "cannot write"),
    ):
        assert main(["rndl", option, str(path)]) == 1
        printed = capsys.readouterr()
        assert complaint in printed.err
        assert printed.err.count("\n") == 1
        assert printed.out == ""


def test_a_contradiction_is_said() -> None:
    """The command fails on a leg that does not count, on a lie, and on a cell that differs."""
    plaintext = Plaintext(to_server=b"question", to_client=b"answer", resumed=False, session={})
    read = {
        "decrypted": True,
        "missing": [],
        "resumed": False,
        "to_server": "question",
        "to_client": "answer",
    }
    safe = {**read, "decrypted": False, "missing": ["X25519"], "to_server": "", "to_client": ""}
    assert contradiction(read, plaintext, predicted=True) is None
    assert contradiction(safe, plaintext, predicted=False) is None
    for verdict, predicted, complaint in (
        ({**read, "missing": ["QKD key"]}, False, "decrypted WITHOUT QKD key"),
        ({**read, "missing": ["QKD key"]}, True, "decrypted WITHOUT QKD key"),
        (read, False, "decrypted, but should be safe"),
        (safe, True, "not decrypted, but should have been"),
        ({**read, "to_client": "another"}, True, "the decrypted text differs"),
        ({**safe, "missing": []}, False, "no secret was missing"),
        ({**read, "resumed": True}, True, "misidentified the resumed connection"),
    ):
        assert complaint in (contradiction(verdict, plaintext, predicted=predicted) or "")
