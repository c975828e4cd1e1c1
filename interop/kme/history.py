"""The history of the calls of SAEs, and the properties that it must have whatever happened.

Each call is one line of JSON: who called, when it began and ended, what it asked for, and how it
ended: with ``keys``; ``refused``, that is, the KME says that there is no such key for this SAE;
``unknown``, when no answer came or an answer that says nothing about the keys (503), so that the
call may have been carried out or not; or ``unsent``.
"""

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Call", "Verdict", "check", "from_json"]


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call and how it ended."""

    kind: str
    """``draw`` (enc_keys) or ``collect`` (dec_keys)."""
    sae: str
    """Who called."""
    other: str
    """The slave of a draw, the master of a collection."""
    began: float
    ended: float
    """Seconds of one clock."""
    outcome: str
    ids: tuple[str, ...] = ()
    """What was asked for by ID."""
    keys: dict[str, str] = field(default_factory=dict)
    """What was given: the digest of each key by its ID."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def from_json(line: str) -> Call:
    """The call of a line."""
    fields: dict[str, Any] = json.loads(line)
    return Call(**fields | {"ids": tuple(fields["ids"])})


@dataclass
class Verdict:
    """The outcome of a check."""

    calls: int = 0
    drawn: int = 0
    """Keys given to masters."""
    collected: int = 0
    """Keys given to slaves."""
    lost: int = 0
    """Keys that a master has and its slave cannot get: the answer to a collection did not arrive,
    or said nothing about the keys."""
    open: int = 0
    """Keys that a master has and nobody has asked for with a definite answer."""
    unanswered: int = 0
    """Draws of which the master does not know whether they were carried out."""
    violations: list[str] = field(default_factory=list)

    @property
    def lost_share(self) -> float:
        return self.lost / self.drawn if self.drawn else 0.0


def check(history: Iterable[Call]) -> Verdict:
    """Check a history.

    A violation is: a key given to a second SAE on the same side, or twice to one; a key given to
    an SAE that its master did not name; two keys that differ under one ID, or are equal under two;
    a key given to a slave although no master can have drawn it; a key refused to its slave although
    no earlier call for it may have taken it.
    """
    calls = sorted(history, key=lambda call: call.ended)
    verdict = Verdict(calls=len(calls))
    draws = [call for call in calls if call.kind == "draw"]
    collections = [call for call in calls if call.kind == "collect"]
    found = verdict.violations
    drawn: dict[str, Call] = {}
    ids_of: dict[str, str] = {}
    for call in draws:
        for key_id, key in call.keys.items():
            if key_id in drawn:
                found.append(f"{key_id} was given to {drawn[key_id].sae} and again to {call.sae}")
            if ids_of.setdefault(key, key_id) != key_id:
                found.append(f"{key_id} and {ids_of[key]} are the same key")
            drawn[key_id] = call
        verdict.unanswered += call.outcome == "unknown"
    given: dict[tuple[str, str], Call] = {}
    doubtful: dict[tuple[str, str], list[Call]] = defaultdict(list)
    for call in collections:
        if call.outcome == "unknown":
            for key_id in call.ids:
                doubtful[call.sae, key_id].append(call)
        for key_id, key in call.keys.items():
            verdict.collected += 1
            if (call.sae, key_id) in given:
                found.append(f"{key_id} was given to {call.sae} twice")
            given[call.sae, key_id] = call
            draw = drawn.get(key_id)
            if draw is None:
                if not any(_may_have_drawn(one, call) for one in draws):
                    found.append(f"{key_id} was given to {call.sae}, and nobody drew it")
            elif (draw.sae, draw.other) != (call.other, call.sae):
                found.append(f"{key_id}, drawn for {draw.other}, was given to {call.sae}")
            elif draw.keys[key_id] != key:
                found.append(f"{key_id} differs between {draw.sae} and {call.sae}")
    refused: set[str] = set()
    for call in collections:
        if call.outcome != "refused":
            continue
        # All or none of a call's keys are given: one that cannot be had explains the refusal.
        own = [one for one in call.ids if one in drawn and drawn[one].other == call.sae]
        explained = len(own) < len(call.ids) or any(
            _before(given.get((call.sae, one)), call)
            or any(_before(other, call) for other in doubtful[call.sae, one])
            for one in own
        )
        if not explained:
            found.append(f"{', '.join(own)}: refused to {call.sae}, whose master has the keys")
        refused.update(own)
    for key_id, draw in drawn.items():
        verdict.drawn += 1
        if (draw.other, key_id) not in given:
            if key_id in refused:
                verdict.lost += 1
            else:
                verdict.open += 1
    return verdict


def _may_have_drawn(draw: Call, call: Call) -> bool:
    """Whether the keys of a collection may come from a draw whose answer was lost."""
    same = (draw.sae, draw.other) == (call.other, call.sae)
    return same and draw.outcome == "unknown" and draw.began < call.ended


def _before(earlier: Call | None, call: Call) -> bool:
    return earlier is not None and earlier is not call and earlier.began < call.ended
