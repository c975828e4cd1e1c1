"""The matrix: one test for each peer and role. All cells run concurrently in one event loop.

Each case runs at each peer on one of our shells, in turn; with ``--thorough``, and by
``python -m interop``, on every one.

The cells of peers that PyPI serves run wherever the ``test`` extra is installed. Chromium, curl and
``openssl`` come from the distribution, liboqs from npm.
"""

import fnmatch
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from shared import made_once

from interop.matrix import liboqs, runner
from interop.matrix.cases import CASES, other_end
from interop.matrix.material import Materials
from interop.matrix.peer import Missing, Peer
from interop.matrix.peers import PEERS
from interop.matrix.report import as_json, as_markdown, from_json
from interop.matrix.runner import SHELLS, Cell, Outcome, Result, cells, missing_from, run_all
from interop.matrix.task import Report, Role, digest, text
from interop.page import DOCS, part_of

ROLES: tuple[Role, ...] = ("client", "server")


def todo(peers: tuple[Peer, ...] = PEERS) -> list[Cell]:
    return cells(peers, CASES)


def shell_in_turn(cell: Cell) -> str:
    """The shell for a case, which is another one in the other role and at the next peer."""
    places = CASES.index(cell.case), PEERS.index(cell.peer), ROLES.index(cell.ours)
    return SHELLS[sum(places) % len(SHELLS)]


SEATS = [
    pytest.param(peer, role, id=f"{peer.name}, hybridkex as {role}")
    for peer in PEERS
    for role in ROLES
    if any(missing_from(cell) is None for cell in todo((peer,)) if cell.ours == role)
]


@pytest.fixture(scope="session")
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, thorough: bool
) -> list[Result]:
    """The results for the peers whose tests were selected."""

    def run(folder: Path) -> dict[str, Any]:
        return as_json(*trio.run(run_all, wanted, Materials(folder)))

    chosen = {
        item.callspec.params["peer"]
        for item in request.session.items
        if isinstance(item, pytest.Function)
        and hasattr(item, "callspec")
        and "peer" in item.callspec.params
    }
    wanted = todo(tuple(peer for peer in PEERS if peer in chosen))
    if not thorough:
        wanted = [cell for cell in wanted if cell.shell == shell_in_turn(cell)]
    return from_json(made_once(tmp_path_factory, "matrix", run)[1], wanted)[1]


@pytest.mark.slow  # the first one runs all cells
@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(("peer", "role"), SEATS)
def test_peer(peer: Peer, role: Role, shell: str, results: list[Result], thorough: bool) -> None:
    mine = [
        one
        for one in results
        if one.cell.peer is peer and one.cell.ours == role and one.cell.shell == shell
    ]
    if any(one.outcome is Outcome.MISSING for one in mine):
        pytest.skip(f"{peer.name}: {mine[0].reason}")
    assert [f"{one.cell}: {one.reason}" for one in mine if one.outcome is Outcome.FAILED] == []
    assert sum(one.outcome is Outcome.PASSED for one in mine) > (10 if thorough else 5)


@pytest.fixture(scope="module")
def wasm() -> Iterator[liboqs.Liboqs]:
    try:
        with liboqs.opened() as running:
            yield running
    except Missing as missing:
        pytest.skip(f"liboqs in WebAssembly: {missing}")


@pytest.mark.parametrize("direction", liboqs.DIRECTIONS)
@pytest.mark.parametrize("name", liboqs.PARAMETER_SETS)
def test_liboqs(name: str, direction: str, wasm: liboqs.Liboqs) -> None:
    try:
        assert liboqs.agrees(wasm, name, direction)
    except Missing as missing:
        pytest.skip(str(missing))


def test_the_page_is_of_these_cases_and_has_no_red_cell() -> None:
    values = json.loads((DOCS / "interop.json").read_text(encoding="utf-8"))
    versions, results = from_json(values, todo())
    assert set(versions) == {peer.name for peer in PEERS}
    assert {one.outcome for one in results} == {Outcome.PASSED, Outcome.NOT_SUPPORTED}
    assert all(one.reason for one in results if one.outcome is Outcome.NOT_SUPPORTED)
    kems = liboqs.Kems.from_json(values["liboqs"])
    assert set(kems.agree) == {
        (name, way) for name in liboqs.PARAMETER_SETS for way in liboqs.DIRECTIONS
    }
    assert all(kems.agree.values())
    page = as_markdown(versions, results) + "\n" + kems.as_markdown()
    assert part_of(DOCS / "interop.md", "matrix") == page.strip()


def test_what_a_peer_lacks_is_asked_of_it() -> None:
    """A pattern that matches no case is misspelt or names a removed case."""
    for peer in PEERS:
        wanted = {f"{other_end(cell.ours)} {need}" for cell in todo() for need in cell.case.needs}
        idle = [pattern for pattern in peer.lacks if not fnmatch.filter(wanted, pattern)]
        assert idle == [], peer.name


def test_a_difference_is_seen(tmp_path: Path) -> None:
    """The comparison can fail: a cell fails if one end reports something else."""
    peer = next(one for one in PEERS if one.name == "pyOpenSSL")
    cell = next(one for one in todo((peer,)) if one.case.name == "exporter")
    ours, theirs = cell.case.tasks(cell.ours, Materials(tmp_path))
    lines = tuple(f"{label} 00 11" for label in sorted(runner._SECRETS))
    said = digest(text("server", ours.size))
    back = digest(text("client", ours.size))
    assert ours.expected is not None
    good = Report(
        group="X25519MLKEM768",
        suite="TLS_AES_128_GCM_SHA256",
        alpn="",
        resumed=False,
        peer=ours.expected.fingerprint,
        exporter="aa",
        key_log=lines,
        received=said,
        retried=False,
        updates=0,
    )
    told = replace(good, peer=None, received=back)

    def judge(we: Report, they: Report) -> list[str]:
        return list(runner._judge(cell.case, ours, theirs, [we], [they]))

    assert judge(good, told) == []
    for they in (
        replace(told, exporter="bb"),
        replace(told, exporter=None),
        replace(told, group="x25519"),
        replace(told, suite="TLS_AES_256_GCM_SHA384"),
        replace(told, resumed=True),
        replace(told, received=said),
        replace(told, key_log=lines[1:]),
        replace(told, key_log=(f"{lines[0][:-1]}2", *lines[1:])),
    ):
        assert len(judge(good, they)) == 1, they
    for we in (replace(good, peer="00"), replace(good, resumed=True), replace(good, received=back)):
        assert judge(we, told)
    assert judge(good, told) == []
    assert runner._judge(cell.case, ours, theirs, [], [told])
