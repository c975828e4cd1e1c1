"""The corpus of chains: our verdict, OpenSSL's, and the page that explains the differences."""

import base64
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from hybridkex.auth import TrustStore, parse_peer_name
from hybridkex.auth.certificates import read_chain
from hybridkex.errors import CertificateRejected
from tests.auth.corpus import CASES, Case

PAGE = Path(__file__).parents[2] / "docs" / "certificates-compared.md"
NOT_WORDS = re.compile(
    r"candidates exhausted|ParseError|AlgorithmIdentifier|[{}]|fatal error|validation failed|<|>|"
    r"Error|b'|_subtrees|path_length|full_name|X509 version|None"
)


def pem(*certificates: bytes) -> bytes:
    begin, end = b"-----BEGIN CERTIFICATE-----\n", b"-----END CERTIFICATE-----\n"
    return b"".join(begin + base64.encodebytes(one) + end for one in certificates)


def verify(case: Case) -> None:
    store = TrustStore.from_pem(pem(*case.roots))
    if case.client:
        store.verify_client(case.chain, at=case.at)
    else:
        store.verify_server(case.chain, parse_peer_name(case.host), at=case.at)


@pytest.mark.parametrize("title", CASES)
def test_our_verdict(title: str) -> None:
    case = CASES[title]()
    if case.refused is None:
        verify(case)
        return
    with pytest.raises(CertificateRejected) as caught:
        verify(case)
    text = str(caught.value)
    assert case.refused in text
    assert caught.value.alert is case.alert, text
    assert not NOT_WORDS.search(text), text
    assert re.match(r"certificate |the peer sent ", text), text
    assert "Unknown OID" not in text


def test_the_verdicts_of_openssl(openssl: str, tmp_path: Path) -> None:
    cases = [make() for make in CASES.values()]
    script = []
    for number, case in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "leaf.pem").write_bytes(pem(case.chain[0]))
        (folder / "roots.pem").write_bytes(pem(*case.roots))
        (folder / "sent.pem").write_bytes(pem(*case.chain[1:]))
        command = [openssl, "verify", "-no-CApath", "-no-CAstore", "-CAfile", "roots.pem"]
        command += ["-attime", str(int(case.at.timestamp()))]
        command += ["-purpose", "sslclient" if case.client else "sslserver"]
        if len(case.chain) > 1:
            command += ["-untrusted", "sent.pem"]
        if not case.client:
            command += ["-verify_ip" if case.host[-1].isdigit() else "-verify_hostname", case.host]
        script += [f"cd {folder}", f"{shlex.join([*command, 'leaf.pem'])} > said 2>&1", "echo $?"]
    # One shell starts them all, which costs less than a process of ours for each.
    done = subprocess.run("sh", input="\n".join(script), capture_output=True, text=True, check=True)
    found = [status == "0" for status in done.stdout.split()]
    wrong = [
        f"{case.title}: {(tmp_path / str(number) / 'said').read_text()}"
        for number, (case, verdict) in enumerate(zip(cases, found, strict=True))
        if verdict != case.openssl
    ]
    assert wrong == []


def table() -> str:
    """The differences, as the page shows them."""
    lines = ["| chain | here | OpenSSL | why |", "|---|---|---|---|"]
    for make in CASES.values():
        case = make()
        if case.why:
            ours, theirs = ("yes" if one else "no" for one in (case.refused is None, case.openssl))
            lines.append(f"| {case.title} | {ours} | {theirs} | {case.why} |")
    return "\n".join(lines)


def test_each_difference_is_explained() -> None:
    for make in CASES.values():
        case = make()
        assert bool(case.why) == ((case.refused is None) != case.openssl), case.title
    page = PAGE.read_text(encoding="utf-8")
    assert table() in page
    assert f"{len(CASES)} chains" in page


def test_a_chain_in_a_loop_costs_little() -> None:
    """Fifteen authorities that could each have issued each other: the search is bounded."""
    from tests.auth.corpus import authority, leaf

    chain = [leaf(issuer="Loop", issuer_kind="p256/loop")]
    chain += [authority("Loop", "p256/loop") for _ in range(15)]
    read_chain(chain)
    with pytest.raises(CertificateRejected):
        TrustStore.from_pem(pem(authority())).verify_client(chain)
