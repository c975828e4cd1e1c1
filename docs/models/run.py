# ruff: noqa: E501  (claims and queries read better on one line)
"""Runs the models beside this file and writes the table of results into README.md.

``python docs/models/run.py`` runs everything; ``--list`` shows the runs, ``--only WORD`` takes those
whose name contains a word and leaves the times of the others as they are, ``--show NAME`` prints the model of one run, ready for ProVerif. A run is
one model with some switches on and one query, and says what the tool must answer: "true" for a
proof, "false" for an attack that the tool must find.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
LEGS = ("ECDH", "MLKEM", "QKD", "SIGNATURES")
NEVER, AFTER, BEFORE = range(3)
"""When the attacker breaks a leg: never, after the session, before it begins."""

HOW_TO_GET = {
    "proverif": "build ProVerif 2.05 from https://proverif.inria.fr with Debian's ocaml-nox and "
    "ocaml-findlib, and put `proverif` on the PATH",
    "spin": "install Debian's package spin, and gcc",
}


def expand(source: str, switches: Iterable[str], query: str = "") -> str:
    """The model with these switches on: ``#if A B`` means A or B."""
    on = set(switches)
    out: list[str] = []
    taken: list[tuple[bool, bool]] = []  # this branch is on; one of its branches was
    for line in source.splitlines():
        word, *names = line.split() or [""]
        holds = bool(on & set(names))
        if word in ("#if", "#ifnot"):
            taken.append((holds == (word == "#if"),) * 2)
        elif word == "#elif":
            before = taken.pop()[1]
            taken.append((holds and not before, holds or before))
        elif word == "#else":
            taken.append((not taken.pop()[1], True))
        elif word == "#endif":
            taken.pop()
        elif all(branch for branch, _ in taken):
            out.append(query if line.startswith("(* QUERIES *)") else line)
    if taken:
        raise ValueError("an #if without its #endif")
    return "\n".join(out) + "\n"


@dataclass(frozen=True)
class Run:
    """One run of ProVerif: what must come out, for each fact of the query."""

    claim: str
    model: str
    switches: tuple[str, ...]
    query: str
    expected: Mapping[str, bool]
    slow: bool = False

    @property
    def name(self) -> str:
        return " ".join((self.claim, *self.switches))

    @property
    def control(self) -> bool:
        """Whether the tool must find an attack."""
        return not all(self.expected.values())

    def text(self) -> str:
        return expand((HERE / self.model).read_text(), self.switches, self.query)


@dataclass(frozen=True)
class Claim:
    name: str
    says: str
    runs: tuple[Run, ...]


# --- secrecy: every leg, broken never, later or before --------------------------------------------

Times = Mapping[str, int]
Readable = Callable[[Times], bool]


def all_times(legs: Iterable[str]) -> Iterator[dict[str, int]]:
    """Each leg broken never, after or before: 3 to the number of legs."""
    names = tuple(legs)
    for times in itertools.product((NEVER, AFTER, BEFORE), repeat=len(names)):
        yield dict(zip(names, times, strict=True))


def _at_most(a: Times, b: Times) -> bool:
    return all(a[leg] <= b[leg] for leg in a)


def deciding(legs: Iterable[str], readable: Readable) -> list[dict[str, int]]:
    """The few cases that decide all: the strongest attackers who must read nothing, and the weakest
    who must read. A stronger attacker can do whatever a weaker one can."""
    cases = list(all_times(legs))
    safe = [case for case in cases if not readable(case)]
    lost = [case for case in cases if readable(case)]
    strongest = [c for c in safe if not any(c != d and _at_most(c, d) for d in safe)]
    weakest = [c for c in lost if not any(c != d and _at_most(d, c) for d in lost)]
    return strongest + weakest


def switches_of(times: Times) -> tuple[str, ...]:
    prefix = {AFTER: "AFTER_", BEFORE: "BEFORE_"}
    return tuple(prefix[when] + leg for leg, when in times.items() if when != NEVER)


def kex_known(t: Times) -> bool:
    return t["ECDH"] >= AFTER and t["MLKEM"] >= AFTER


def all_known(t: Times) -> bool:
    return kex_known(t) and t["QKD"] >= AFTER


def secrecy(
    claim: str,
    model: str,
    base: tuple[str, ...],
    legs: tuple[str, ...],
    data: Mapping[str, Readable],
    controls: Iterable[tuple[str, ...]] = (),
) -> tuple[Run, ...]:
    """Runs for terms that the attacker must not learn, unless these predicates hold."""
    cases: list[dict[str, int]] = []
    for readable in data.values():
        cases += [case for case in deciding(legs, readable) if case not in cases]
    query = "query " + "; ".join(f"attacker({term})" for term in data) + "."
    runs = [
        Run(claim, model, (*base, *switches_of(case)), query,
            {term: not readable(case) for term, readable in data.items()})
        for case in cases
    ]  # fmt: skip
    runs += [
        Run(claim, model, (*base, *switches), query, dict.fromkeys(data, False))
        for switches in controls
    ]
    return tuple(runs)


# --- correspondences ------------------------------------------------------------------------------


def holds(
    claim: str,
    model: str,
    query: str,
    proofs: Iterable[tuple[str, ...]],
    controls: Iterable[tuple[str, ...]],
    *,
    slow: bool = False,
) -> tuple[Run, ...]:
    """Runs for one query: true with these switches, false with those."""
    return tuple(
        [Run(claim, model, switches, query, {"": True}, slow) for switches in proofs]
        + [Run(claim, model, switches, query, {"": False}, slow) for switches in controls]
    )


CLIENT_AGREES = """query a: host, b: bitstring, v: bitstring, k: key;
  inj-event(ClientAccepts(a, good(b), v, k)) ==> inj-event(ServerRuns(a, good(b), v, k))."""
SERVER_AGREES = """query a: bitstring, b: host, v: bitstring, k: key;
  inj-event(ServerAccepts(good(a), b, v, k)) ==> inj-event(ClientRuns(good(a), b, v, k))."""
_BOTH_VIEW = "(o, pBoth, g1, g2, g, i, m, before)"
_BOTH_TYPES = """query a: host, b: host, o: bitstring, g1: group, g2: group, g: group, i: bitstring,
  m: bitstring, before: bitstring, n: bitstring, k: key;"""
CLIENT_AGREES_BOTH = f"""{_BOTH_TYPES}
  inj-event(ClientAccepts(a, good(n), {_BOTH_VIEW}, k))
  ==> inj-event(ServerRuns(a, good(n), {_BOTH_VIEW}, k))."""
SERVER_AGREES_BOTH = f"""{_BOTH_TYPES}
  inj-event(ServerAccepts(good(n), b, {_BOTH_VIEW}, k))
  ==> inj-event(ClientRuns(good(n), b, {_BOTH_VIEW}, k))."""
SAME_KEY_SAME_VIEW = """query a: host, b: host, v: bitstring, a2: host, b2: host, v2: bitstring, k: key;
  event(ClientAccepts(a, b, v, k)) && event(ServerAccepts(a2, b2, v2, k)) ==> b = b2 && v = v2."""
NO_REFLECTION = """query a: host, b: host, v: bitstring, a2: host, b2: host, v2: bitstring, k: key;
  event(ClientAccepts(a, b, v, k)) && event(ServerRuns(a2, b2, v2, k)) ==> a = a2 && b = b2."""
ONE_NAME = """query k: key, i: bitstring, a: host, b: host, i2: bitstring, a2: host, b2: host;
  event(Imports(k, i, a, b)) && event(Imports(k, i2, a2, b2)) ==> i = i2 && a = a2 && b = b2."""
KCI_CLIENT = """query b: bitstring, v: bitstring, k: key;
  event(ClientAccepts(good(victim), good(b), v, k))
  ==> event(ServerRuns(good(victim), good(b), v, k)) || b = victim."""
INITIATOR_AGREES = """query a: host, b: host, v: bitstring, k: key;
  inj-event(InitiatorReports(a, b, v, k)) ==> inj-event(ResponderRuns(a, b, v, k))."""
RESPONDER_AGREES = """query a: host, b: host, v: bitstring, k: key;
  inj-event(ResponderReports(a, b, v, k)) ==> inj-event(InitiatorRuns(a, b, v, k))."""
INITIATOR_AGREES_USED = """query a: host, b: host, r: bitstring, e: epoch, i: bitstring, k: key;
  inj-event(InitiatorReports(a, b, (r, e, i, used), k))
  ==> inj-event(ResponderRuns(a, b, (r, e, i, used), k))."""
RESPONDER_AGREES_USED = """query a: host, b: host, r: bitstring, e: epoch, i: bitstring, k: key;
  inj-event(ResponderReports(a, b, (r, e, i, used), k))
  ==> inj-event(InitiatorRuns(a, b, (r, e, i, used), k))."""
SAME_EPOCH = """query a: host, b: host, r: bitstring, e: epoch, i: bitstring, a2: host, b2: host,
  r2: bitstring, e2: epoch, i2: bitstring, k: key;
  event(InitiatorReports(a, b, (r, e, i, used), k))
  && event(ResponderReports(a2, b2, (r2, e2, i2, used), k)) ==> e = e2."""
ONE_EPOCH = """query k: key, i: bitstring, r: bitstring, e: epoch, a: host, b: host, i2: bitstring,
  r2: bitstring, e2: epoch, a2: host, b2: host;
  event(Imports(k, i, r, e, a, b)) && event(Imports(k, i2, r2, e2, a2, b2))
  ==> i = i2 && r = r2 && e = e2 && a = a2 && b = b2."""

H, U = "handshake.pv", "update.pv"


def claim(name: str, says: str, *runs: tuple[Run, ...]) -> Claim:
    return Claim(name, says, tuple(itertools.chain(*runs)))


CLAIMS = (
    claim(
        "secrecy-certificates",
        "Certificates alone: application data is secret unless ECDH and ML-KEM are both broken, ever, "
        "or the signatures are broken before the handshake",
        secrecy("secrecy-certificates", H, ("ONLY_CERT",), ("ECDH", "MLKEM", "SIGNATURES"), {
            term: lambda t: kex_known(t) or t["SIGNATURES"] == BEFORE
            for term in ("client_data(pCert,off)", "client_data(pCert,on)", "server_data(pCert,on)")
        }),
    ),
    claim(
        "secrecy-qkd",
        "QKD key alone: application data is secret unless ECDH, ML-KEM and the QKD key are all known, "
        "ever, or the QKD key before the handshake",
        secrecy("secrecy-qkd", H, ("ONLY_PSK",), LEGS, {
            term: lambda t: all_known(t) or t["QKD"] == BEFORE
            for term in ("client_data(pPsk,off)", "server_data(pPsk,off)")
        }),
    ),
    claim(
        "secrecy-both",
        "QKD key and certificates (RFC 9973), both ends with a certificate: application data is secret "
        "unless ECDH, ML-KEM and the QKD key are all known, ever, or the QKD key and a signing key "
        "before the handshake; what the server sends to a client without a certificate, unless all "
        "three are known, ever, or the QKD key before",
        secrecy("secrecy-both", H, ("ONLY_BOTH",), LEGS, {
            **{
                term: lambda t: all_known(t) or (t["QKD"] == t["SIGNATURES"] == BEFORE)
                for term in ("client_data(pBoth,off)", "client_data(pBoth,on)", "server_data(pBoth,on)")
            },
            "server_data(pBoth,off)": lambda t: all_known(t) or t["QKD"] == BEFORE,
        }),
    ),
    claim(
        "later-theft",
        "The later theft of a signature key does not affect earlier sessions",
        secrecy("later-theft", H, ("ONLY_CERT", "AFTER_SIGNATURES"), (), {
            "client_data(pCert,off)": lambda t: False, "server_data(pCert,on)": lambda t: False,
        }, [("DROP_FRESH_EXCHANGE",)]),
    ),
    claim(
        "client-agrees",
        "A client that accepts agrees with a server, one to one, on the peer, groups, policy, key ID "
        "and keys",
        holds("client-agrees", H, CLIENT_AGREES,
              [("ONLY_CERT",), ("ONLY_PSK",), ("ONLY_BOTH",)],
              [("ONLY_CERT", "DROP_SERVER_NAME"), ("ONLY_PSK", "DROP_GROUPS_IN_TRANSCRIPT"),
               ("ONLY_PSK", "DROP_SAES_IN_IMPORT", "DEPENDENT_KEYS"), ("ONLY_CERT", "BEFORE_SIGNATURES"),
               ("ONLY_PSK", "BEFORE_QKD")]),
    ),
    claim(
        "server-agrees",
        "The same for a server that accepts a client whom it authenticates",
        holds("server-agrees", H, SERVER_AGREES,
              [("ONLY_CERT",), ("ONLY_PSK",), ("ONLY_BOTH",)],
              [("ONLY_PSK", "DROP_GROUPS_IN_TRANSCRIPT"), ("ONLY_PSK", "BEFORE_QKD"),
               ("ONLY_CERT", "BEFORE_SIGNATURES")]),
    ),
    claim(
        "no-downgrade",
        "Both agreements hold where all policies are offered at once, with a fall-back to certificates",
        holds("no-downgrade", H, CLIENT_AGREES, [()], [("DROP_POLICY_IN_TRANSCRIPT",)], slow=True),
        holds("no-downgrade server", H, SERVER_AGREES, [()], [("DROP_POLICY_IN_TRANSCRIPT",)], slow=True),
    ),
    claim(
        "both-legs-authenticate",
        "With RFC 9973, both agreements hold while the QKD key or the signatures stand; under "
        "`prefer` a session without the key depends on the signatures alone",
        holds("both-legs-authenticate", H, CLIENT_AGREES_BOTH,
              [("ONLY_BOTH", "BEFORE_SIGNATURES")],
              [("ONLY_BOTH", "BEFORE_SIGNATURES", "BEFORE_QKD")], slow=True),
        holds("both-legs-authenticate server", H, SERVER_AGREES_BOTH,
              [("ONLY_BOTH", "BEFORE_SIGNATURES")],
              [("ONLY_BOTH", "BEFORE_SIGNATURES", "BEFORE_QKD")], slow=True),
        holds("both-legs-authenticate key", H, CLIENT_AGREES,
              [("ONLY_BOTH", "BEFORE_QKD")], [("ONLY_BOTH", "BEFORE_QKD", "DROP_SIGNATURE_BESIDE_PSK")],
              slow=True),
        holds("both-legs-authenticate prefer", H, CLIENT_AGREES,
              [], [("ONLY_BOTH", "BEFORE_SIGNATURES")], slow=True),
    ),
    claim(
        "no-reflection",
        "No host is made to talk to itself (Selfie), and no message is reflected to its sender",
        holds("no-reflection", H, NO_REFLECTION, [("ONLY_PSK",)], [("ONLY_PSK", "DROP_ROLES")]),
    ),
    claim(
        "no-substitution",
        "No key ID is put in the place of another, even where a KME gives the same bits under many IDs "
        "(dependent keys, arXiv:2509.12478)",
        holds("no-substitution", H, SAME_KEY_SAME_VIEW, [("ONLY_PSK", "DEPENDENT_KEYS")],
              [("ONLY_PSK", "DEPENDENT_KEYS", "DROP_ID_IN_IMPORT", "DROP_ID_IN_TRANSCRIPT")]),
    ),
    claim(
        "one-name",
        "One imported PSK has one key ID, one client and one server",
        holds("one-name", H, ONE_NAME, [("ONLY_PSK", "DEPENDENT_KEYS")],
              [("ONLY_PSK", "DEPENDENT_KEYS", "DROP_ID_IN_IMPORT"), ("ONLY_PSK", "DROP_ROLES"),
               ("ONLY_PSK", "DEPENDENT_KEYS", "DROP_ID_IN_IMPORT", "DROP_SAES_IN_IMPORT")]),
    ),
    claim(
        "no-impersonation",
        "An attacker who has a client's signature key and all its QKD keys cannot pose as a server to it (key "
        "compromise impersonation)",
        holds("no-impersonation", H, KCI_CLIENT, [("ONLY_BOTH", "VICTIM", "BEFORE_QKD")],
              [("ONLY_BOTH", "VICTIM", "BEFORE_QKD", "DROP_SIGNATURE_BESIDE_PSK")], slow=True),
    ),
    claim(
        "retry",
        "Both agreements hold after HelloRetryRequest, on the first ClientHello too",
        holds("retry", H, CLIENT_AGREES, [("ONLY_PSK", "RETRY")],
              [("ONLY_PSK", "RETRY", "DROP_FIRST_HELLO")], slow=True),
        holds("retry server", H, SERVER_AGREES, [("ONLY_PSK", "RETRY")],
              [("ONLY_PSK", "RETRY", "DROP_FIRST_HELLO")], slow=True),
    ),
    claim(
        "resumption-agrees",
        "Both agreements hold for a resumption, on the first session's peers and policy",
        holds("resumption-agrees", H, CLIENT_AGREES, [("ONLY_TICKET",)],
              [("ONLY_TICKET", "DROP_GROUPS_IN_TRANSCRIPT")]),
        holds("resumption-agrees server", H, SERVER_AGREES, [("ONLY_TICKET",)],
              [("ONLY_TICKET", "DROP_PEER_IN_TICKET")]),
    ),
    claim(
        "secrecy-resumption",
        "Data of a resumption is secret unless ECDH, ML-KEM and the ticket key are all known, ever, or "
        "the ticket key before",
        secrecy("secrecy-resumption", H, ("ONLY_TICKET",), ("ECDH", "MLKEM", "TICKETS"), {
            term: lambda t: (kex_known(t) and t["TICKETS"] >= AFTER) or t["TICKETS"] == BEFORE
            for term in ("client_data(pTicket,on)", "server_data(pTicket,on)")
        }),
        secrecy("secrecy-resumption", H, ("ONLY_TICKET", "AFTER_TICKETS"), (), {
            "client_data(pTicket,on)": lambda t: False,
        }, [("DROP_KEX_IN_RESUMPTION",)]),
    ),
    claim(
        "tickets-tell-nothing",
        "Stolen ticket keys do not open the session that the ticket is from, even where ECDH and ML-KEM "
        "are broken too",
        secrecy("tickets-tell-nothing", H,
                ("ONLY_PSK", "TICKETS", "AFTER_TICKETS", "AFTER_ECDH", "AFTER_MLKEM"), ("QKD",),
                {"client_data(pPsk,off)": lambda t: t["QKD"] >= AFTER}),
    ),
    claim(
        "update-recovers",
        "After all secrets of both ends were stolen, and the thief listens: an update makes new data "
        "secret unless ECDH, ML-KEM and the QKD key of the update are all known, ever; without a QKD "
        "key, unless ECDH and ML-KEM are",
        secrecy("update-recovers", U, ("THIEF_LISTENS",), ("ECDH", "MLKEM", "QKD"), {
            "new_data(used)": all_known, "new_data(vacant)": kex_known,
        }, [("DROP_EXCHANGE",), ("DROP_KEX", "AFTER_QKD")]),
        secrecy("update-recovers key", U, ("THIEF_LISTENS", "AFTER_ECDH", "AFTER_MLKEM"), (), {
            "new_data(used)": lambda t: False,
        }, [("DROP_QKD_IN_CHAIN",)]),
    ),
    claim(
        "update-recovers-from-meddler",
        "The same where the thief changes messages of the update: new data is secret if the update has "
        "a QKD key that the thief does not know, and not secret without one",
        holds("update-recovers-from-meddler", U, "query attacker(new_data(used)).", [("THIEF_ACTS",)],
              [("THIEF_ACTS", "BEFORE_QKD"), ("THIEF_ACTS", "DROP_QKD_IN_CHAIN")], slow=True),
        holds("update-recovers-from-meddler without", U, "query attacker(new_data(vacant)).", [],
              [("THIEF_ACTS",)], slow=True),
    ),
    claim(
        "update-rests-on-session",
        "Where nothing was stolen, new data is secret even if every leg of the update is broken",
        secrecy("update-rests-on-session", U, (), ("ECDH", "MLKEM", "QKD"),
                {"new_data(used)": lambda t: False, "new_data(vacant)": lambda t: False},
                [("THIEF_LISTENS", "BEFORE_ECDH", "BEFORE_MLKEM", "BEFORE_QKD")]),
    ),
    claim(
        "old-epoch",
        "The secrets of a new epoch do not open an old one, even if every leg is broken",
        holds("old-epoch", U, "query h: host; attacker(old_data(h)).",
              [("THIEF_AFTER", "AFTER_ECDH", "AFTER_MLKEM", "AFTER_QKD")],
              [("THIEF_AFTER", "DROP_ONE_WAY")]),
    ),
    claim(
        "update-agrees",
        "An end that reports an epoch agrees with the other, one to one, on the roles, the epoch, the "
        "slot, the answer and the keys",
        holds("update-agrees", U, INITIATOR_AGREES, [()], [("THIEF_ACTS",)]),
        holds("update-agrees responder", U, RESPONDER_AGREES, [()], [("THIEF_ACTS",)]),
    ),
    claim(
        "update-agrees-with-key",
        "With a QKD key in the update this also holds against a thief who changes messages",
        holds("update-agrees-with-key", U, INITIATOR_AGREES_USED, [("THIEF_ACTS",)],
              [("THIEF_ACTS", "DROP_CONFIRM"), ("THIEF_ACTS", "DROP_ROLES"), ("THIEF_ACTS", "BEFORE_QKD"),
               ("THIEF_ACTS", "DEPENDENT_KEYS", "DROP_ID_IN_IMPORT", "DROP_SLOT_IN_TRANSCRIPT")]),
        holds("update-agrees-with-key responder", U, RESPONDER_AGREES_USED, [("THIEF_ACTS",)],
              [("THIEF_ACTS", "DROP_CONFIRM"), ("THIEF_ACTS", "BEFORE_QKD")]),
    ),
    claim(
        "same-epoch",
        "Ends that share a key are in the same epoch, whatever state the thief gave them",
        holds("same-epoch", U, SAME_EPOCH, [("THIEF_ACTS",)], [("THIEF_ACTS", "DROP_EPOCH_IN_IMPORT")]),
    ),
    claim(
        "one-epoch",
        "A PSK that was imported for an update has one key ID, one epoch and one initiator",
        holds("one-epoch", U, ONE_EPOCH, [("THIEF_ACTS", "DEPENDENT_KEYS")],
              [("THIEF_ACTS", "DROP_EPOCH_IN_IMPORT"), ("THIEF_ACTS", "DROP_ROLES"),
               ("THIEF_ACTS", "DEPENDENT_KEYS", "DROP_ID_IN_IMPORT")]),
    ),
)  # fmt: skip


RUNS = tuple(run for c in CLAIMS for run in c.runs)


def verify(run: Run, *, proverif: str = "proverif", limit: float = 1800) -> dict[str, str]:
    """What ProVerif says of each fact of the query: "true", "false" or "cannot be proved"."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "model.pv")
        path.write_text(run.text())
        done = subprocess.run(
            [proverif, str(path)], capture_output=True, text=True, timeout=limit, check=False
        )
    results = [
        line.replace(" ", "")
        for line in done.stdout.splitlines()
        if line.startswith("RESULT") and not line.startswith("RESULT (")
    ]
    if not results:
        raise RuntimeError(f"{run.name}: {(done.stdout + done.stderr)[-400:]}")
    said = {}
    for term in run.expected:
        (line,) = [line for line in results if f"({term})" in line or not term]
        said[term] = next(
            word
            for word, ending in (
                ("true", "istrue."),
                ("false", "isfalse."),
                ("cannot be proved", "cannotbeproved."),
            )
            if line.endswith(ending)
        )
    return said


def as_expected(run: Run, said: Mapping[str, str]) -> bool:
    return all(said[term] == ("true" if value else "false") for term, value in run.expected.items())


# --- Spin -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Search:
    """One run of the verifier of update.pml."""

    name: str
    says: str
    settings: Mapping[str, int]
    finds: str = ""
    """What a negative control must find in the output; nothing for a proof."""
    ltl: str = ""


_SAFE = (
    "Both ends are always in step: every record opens, no message comes where it is not allowed, "
)
SEARCHES = (
    Search("in-step", _SAFE + "both report the same epochs, and nothing gets stuck",
           {"UPDATES": 2}),
    Search("in-step-closing", "The same where either end may close at any time",
           {"UPDATES": 2, "CLOSES": 1}),
    Search("answered", "Every request is answered in the end, or gives way to another one",
           {"UPDATES": 1}, ltl="answered"),
    Search("completed", "Every change of keys is completed in the end", {"UPDATES": 1}, ltl="completed"),
    *(
        Search(f"control-{number}", says, {"UPDATES": 1, "DROP": number, **more}, finds)
        for number, says, finds, more in (
            (1, "requests that cross are both answered", "assertion violated", {}),
            (2, "the initiator changes its sending key before its finish", "assertion violated", {}),
            (3, "the responder changes its receiving key before the finish", "assertion violated", {}),
            (4, "data comes before the confirmation", "assertion violated", {}),
            (5, "an update is started while one is under way", "assertion violated", {}),
            (6, "a cancelled update leaves a request behind", "assertion violated", {}),
            (7, "a finish is sent after close_notify", "assertion violated", {"CLOSES": 1}),
            (8, "both ends use one key_exchange value", "invalid end state", {}),
        )
    ),
    Search("control-9", "a request is never answered", {"UPDATES": 1, "DROP": 9}, "acceptance cycle",
           "answered"),
    Search("control-10", "a finish is never sent", {"UPDATES": 1, "DROP": 10}, "acceptance cycle",
           "completed"),
)  # fmt: skip


def build_verifiers(directory: Path) -> None:
    """``safety`` and ``liveness`` in this directory, from update.pml."""
    shutil.copy(HERE / "update.pml", directory)
    for command in (
        ["spin", "-a", "update.pml"],
        ["gcc", "-O1", "-w", "-DSAFETY", "-DNOCLAIM", "-o", "safety", "pan.c"],
        ["gcc", "-O1", "-w", "-DNFAIR=3", "-o", "liveness", "pan.c"],
    ):
        subprocess.run(command, cwd=directory, check=True, capture_output=True)


def search(directory: Path, wanted: Search) -> bool:
    """Whether the verifier says what it must."""
    command = [str(directory / ("liveness" if wanted.ltl else "safety")), "-m100000", "-w20"]
    if wanted.ltl:
        command += ["-a", "-f", "-A", "-N", wanted.ltl]
    settings = {name: str(value) for name, value in wanted.settings.items()}
    done = subprocess.run(
        command,
        cwd=directory,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=True,
    )
    if wanted.finds:
        return wanted.finds in done.stdout and "errors: 1" in done.stdout
    return "errors: 0" in done.stdout and "max search depth too small" not in done.stdout


# --- the table ------------------------------------------------------------------------------------

_MARKS = "<!-- results -->", "<!-- end of results -->"


def measured() -> dict[str, float]:
    """Seconds of the runs that gave what they must, by name."""
    names = {run.name for run in RUNS} | {s.name for s in SEARCHES}
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return {name: took for name, took in found.items() if name in names}


def _took(names: Sequence[str], seconds: Mapping[str, float]) -> str:
    missing = sum(name not in seconds for name in names)
    if missing:
        return f"{missing} of {len(names)} not run yet"
    return f"{sum(seconds[name] for name in names):.1f} s"


def table(seconds: Mapping[str, float]) -> str:
    """In Markdown."""
    lines = [
        "| claim | query | proofs | attacks found, by what was taken out or given away | time |",
        "|---|---|---|---|---|",
    ]
    for c in CLAIMS:
        proofs = [run for run in c.runs if not run.control]
        controls = [run for run in c.runs if run.control]
        lines.append(
            f"| {c.says} | `{c.name}` ({c.runs[0].model}) | {len(proofs)} | {len(controls)}: "
            + "; ".join(dict.fromkeys(_in_words(run) for run in controls))
            + f" | {_took([run.name for run in c.runs], seconds)} |"
        )
    for s in SEARCHES:
        if not s.finds:
            lines.append(
                f"| {s.says} | `{s.name}` (update.pml) | 1 | | {_took([s.name], seconds)} |"
            )
    attacks = [s for s in SEARCHES if s.finds]
    lines.append(
        f"| Controls of update.pml | `control-1` to `control-{len(attacks)}` | | {len(attacks)}: "
        + "; ".join(s.says for s in attacks)
        + f" | {_took([s.name for s in attacks], seconds)} |"
    )
    return "\n".join(lines)


def _in_words(run: Run) -> str:
    dropped = [s for s in run.switches if s.startswith("DROP_")]
    given = [s for s in run.switches if s.startswith(("BEFORE_", "AFTER_", "THIEF_"))]
    return " ".join(f"`{s}`" for s in dropped or given)


def write_table(text: str) -> None:
    readme = HERE / "README.md"
    head, tail = readme.read_text().split(_MARKS[0])
    readme.write_text(head + f"{_MARKS[0]}\n{text}\n{_MARKS[1]}" + tail.split(_MARKS[1])[1])


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the models and write the table of README.md.")
    parser.add_argument("--list", action="store_true", help="show the runs")
    parser.add_argument("--only", default="", metavar="WORD", help="runs whose name contains this")
    parser.add_argument("--missing", action="store_true", help="runs that have no result yet")
    parser.add_argument("--show", metavar="NAME", help="print the model of this run")
    arguments = parser.parse_args()
    if arguments.show:
        print(next(run for run in RUNS if run.name == arguments.show).text(), end="")
        return 0
    done = measured() if arguments.missing else {}
    runs = [run for run in RUNS if arguments.only in run.name and run.name not in done]
    searches = [s for s in SEARCHES if arguments.only in s.name and s.name not in done]
    if arguments.list:
        for run in runs:
            print(f"{'attack' if run.control else 'proof ':7}{run.name}")
        for s in searches:
            print(f"{'attack' if s.finds else 'proof ':7}{s.name}")
        return 0
    for tool, how in HOW_TO_GET.items():
        if shutil.which(tool) is None:
            print(f"{tool} is not there: {how}", file=sys.stderr)
            return 1
    wrong = 0

    def note(name: str, began: float, right: bool, said: object = "") -> None:
        nonlocal wrong
        took = time.monotonic() - began
        print(f"{'ok   ' if right else 'WRONG'} {took:7.1f} s  {name} {said}".rstrip(), flush=True)
        wrong += not right
        results = measured() | {name: round(took, 1)}
        if not right:
            del results[name]
        RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")

    for run in runs:
        began = time.monotonic()
        said = verify(run)
        right = as_expected(run, said)
        note(run.name, began, right, "" if right else said)
    with tempfile.TemporaryDirectory() as directory:
        if searches:
            build_verifiers(Path(directory))
        for s in searches:
            began = time.monotonic()
            note(s.name, began, search(Path(directory), s))
    write_table(table(measured()))
    return min(wrong, 1)


if __name__ == "__main__":
    raise SystemExit(main())
