"""The promises of the demonstration, and mutants of it that each break one of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rndl_rules as rules

from hybridkex.cli.actions import rndl
from hybridkex.demos.rndl import matrix, trial
from hybridkex.demos.rndl.matrix import Adversary

CHECKS = (
    rules.check_predictions,
    rules.check_contradictions,
    rules.check_cells,
    rules.check_reports,
    rules.check_exit_status,
)
"""The one that takes longest is the last."""


@pytest.mark.parametrize("check", CHECKS, ids=lambda one: one.__name__)
def test_the_promises_hold(check: Callable[[], None]) -> None:
    check()


def test_each_adversary_has_what_its_kind_has(tmp_path: Path) -> None:
    rules.check_belongings(tmp_path)


def test_no_adversary_opens_the_folder_of_another(tmp_path: Path) -> None:
    rules.check_that_siblings_are_left_alone(tmp_path)


# --- mutants --------------------------------------------------------------------------------------

JUDGE = trial.contradiction
WRONG: Any = trial.Trial.wrong
DEFEATS = Adversary.defeats
EQUIP = trial.equip


def one_direction(verdict: dict[str, Any], plaintext: Any, *, predicted: bool, other: str) -> Any:
    """A reader that compares one direction only."""
    return JUDGE(
        {**verdict, other: getattr(plaintext, other).decode()}, plaintext, predicted=predicted
    )


def without(reason: str) -> Callable[..., str | None]:
    """A judge that overlooks one kind of contradiction."""

    def judge(verdict: dict[str, Any], plaintext: Any, *, predicted: bool) -> str | None:
        found = JUDGE(verdict, plaintext, predicted=predicted)
        return None if found is not None and reason in found else found

    return judge


def measured(verdict: dict[str, Any], plaintext: Any, *, predicted: bool) -> str | None:
    """The prediction is taken from the measurement."""
    return JUDGE(verdict, plaintext, predicted=verdict["decrypted"])


def zipped(configuration: Any, adversary: Any, verdicts: Any, plaintexts: Any) -> Any:
    """Connections that do not have a partner are dropped."""
    fewest = min(len(verdicts), len(plaintexts))
    return CELLS(configuration, adversary, verdicts[:fewest], plaintexts[:fewest])


CELLS = trial._cells


def always(value: object) -> Any:
    return lambda *_, **__: value


MUTANTS: dict[str, tuple[object, str, Any]] = {
    "the command always exits 0": (rndl, "run", always(0)),
    "the command always exits 1": (rndl, "run", always(1)),
    "nothing is ever wrong": (trial.Trial, "wrong", property(lambda self: [])),
    "the first cell alone counts": (trial.Trial, "wrong", property(lambda self: WRONG.fget(self)[:0]
        if self.cells and self.cells[0].wrong is None else WRONG.fget(self))),
    "cells that were not tried do not count": (trial.Trial, "wrong", property(
        lambda self: [one for one in WRONG.fget(self) if "not tried" not in one])),
    "the toy curve does not count": (trial.Trial, "wrong", property(
        lambda self: [one for one in WRONG.fget(self) if not one.startswith("toy")])),
    "the prediction is taken from the measurement": (trial, "contradiction", measured),
    "everything is as predicted": (trial, "contradiction", always(None)),
    "only what the client said is compared": (trial, "contradiction",
        lambda *a, **k: one_direction(*a, **k, other="to_client")),
    "only what the server said is compared": (trial, "contradiction",
        lambda *a, **k: one_direction(*a, **k, other="to_server")),
    "a read of a safe recording is overlooked": (trial, "contradiction", without("be safe")),
    "a read without a secret is overlooked": (trial, "contradiction", without("WITHOUT")),
    "a recording that should fall and does not is overlooked": (
        trial, "contradiction", without("should have been")),
    "another text is overlooked": (trial, "contradiction", without("the decrypted text differs")),
    "an adversary that lacks nothing and fails is overlooked": (
        trial, "contradiction", without("no secret was missing")),
    "a mistaken resumption is overlooked": (trial, "contradiction", without("resumed")),
    "silence is overlooked": (trial, "contradiction", without("carried no data")),
    "connections without a verdict are dropped": (trial, "_cells", zipped),
    "every recording is predicted to be safe": (Adversary, "defeats", always(False)),
    "every recording is predicted to fall": (Adversary, "defeats", always(True)),
    "QKD keys are left out of the prediction": (
        Adversary, "knows_qkd_key", property(lambda self: True)),
    "QKD keys never fall in the prediction": (
        Adversary, "knows_qkd_key", property(lambda self: False)),
    "ticket keys are left out of the prediction": (Adversary, "defeats",
        lambda self, row: DEFEATS(self, matrix.Row(row.configuration, False))),
    "one broken primitive is predicted to be enough": (matrix.Configuration, "primitives",
        property(lambda self: frozenset(("ecdh",)))),
    "a contradiction is shown as safe": (rndl, "_mark", lambda cell: rndl._SAFE),
    "a read is shown as safe": (rndl, "_mark",
        lambda cell: rndl._WRONG if cell is None or cell.wrong else rndl._SAFE),
}  # fmt: skip
"""What is broken, where, and by what."""


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_noticed(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, replacement = MUTANTS[mutant]
    monkeypatch.setattr(owner, name, replacement)
    assert any(map(fails, CHECKS)), f"no check notices that {mutant}"


def fails(check: Callable[[], None]) -> bool:
    try:
        check()
    except (AssertionError, pytest.fail.Exception):
        return True
    return False


def give(extra: str) -> Callable[[Any, Adversary], Path]:
    """An adversary that is given something of another."""

    def equip(stage: Any, adversary: Adversary) -> Path:
        folder = EQUIP(stage, adversary)
        target = folder / "oracle" / Path(extra).name
        target.write_text((stage.folder / extra).read_text())
        return folder

    return equip


@pytest.mark.parametrize(
    "extra", ["oracle/ecdh.jsonl", "oracle/ml-kem.jsonl", "stolen/ticket-keys.jsonl"]
)
def test_an_adversary_that_is_given_more_is_noticed(
    extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "equip", give(extra))
    with pytest.raises(AssertionError):
        rules.check_belongings(tmp_path)


PRELUDES = {
    "reads a sibling's oracle": """
from pathlib import Path
own = adversary.Knowledge.from_folder
def from_folder(folder):
    for path in Path(folder).parent.glob("*/oracle/*.jsonl"):
        path.read_bytes()
    return own(folder)
adversary.Knowledge.from_folder = staticmethod(from_folder)
""",
    "lists the folder above": """
own = adversary.read_capture
def read_capture(path):
    list((path.parent.parent.parent / "one").iterdir())
    return own(path)
adversary.read_capture = read_capture
""",
    "attacks all in one process": """
adversary._in_a_copy = adversary._attack_folder
""",
}


@pytest.mark.parametrize("prelude", PRELUDES)
def test_an_adversary_that_looks_elsewhere_is_noticed(prelude: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        rules.check_that_siblings_are_left_alone(tmp_path, PRELUDES[prelude])
