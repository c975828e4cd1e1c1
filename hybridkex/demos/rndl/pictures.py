"""SVG pictures: the key schedule with the missing secrets, and a timeline of the wire.

Colours are CSS variables, so that a page can adapt them to a dark theme; nothing is conveyed by
colour alone.
"""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, Final

STYLE: Final = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
"""Styles for the embedding page; :func:`standalone` includes them in a picture."""

_MARK_WIDTHS: Final = {"missing": 56, "sealed": 70}
_MARKS: Final = {"known": "known", "missing": "MISSING", "sealed": "out of reach", "public": ""}


def standalone(svg: str) -> str:
    return svg.replace(">", f"><style>{STYLE}</style>", 1)


def _open_svg(width: int, height: int, title: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img"><title>{escape(title)}</title>'
    )


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    named = f' class="{kind}"' if kind else ""
    at = f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'<text x="{x:g}" y="{y:g}"{named}{at}>{escape(text)}</text>'


def _lock(x: float, y: float) -> str:
    """A padlock of 10 by 13 units with its upper left corner at x, y."""
    return (
        f'<g class="lock"><path d="M{x + 2:g} {y + 6:g}v-2a3 3 0 0 1 6 0v2"/>'
        f'<rect x="{x:g}" y="{y + 6:g}" width="10" height="7" rx="1.5"/></g>'
    )


# --- the key schedule -------------------------------------------------------------------------

_INPUT_X, _CHAIN_X, _OUTPUT_X = 4, 300, 520
_INPUT_WIDTH, _CHAIN_WIDTH, _OUTPUT_WIDTH = 236, 150, 196
_BOX: Final = 46


def _box(x: float, y: float, width: float, state: str, title: str, detail: str = "") -> str:
    mark = _MARKS[state]
    out = f'<rect class="{state}" x="{x:g}" y="{y:g}" width="{width:g}" height="{_BOX}" rx="7"/>'
    out += _text(x + 10, y + 19, title)
    if detail:
        out += _text(x + 10, y + 36, detail, "mono" if len(detail) == 36 else "small")
    if mark:
        right = x + width - 8
        out += _text(right, y + 19, mark, f"mark {state}", "end")
        if state != "known":
            out += _lock(right - _MARK_WIDTHS[state] - 14, y + 8)
    return out


def _arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    """A straight arrow along one of the axes."""
    step = 6
    if y1 == y2:
        tip = f"M{x2:g} {y2:g}l-{step} -3.5v7z"
        end = f"H{x2 - step:g}"
    else:
        tip = f"M{x2:g} {y2:g}l-3.5 -{step}h7z"
        end = f"V{y2 - step:g}"
    line = f'<path class="flow" d="M{x1:g} {y1:g}{end}"/>'
    return f'{line}<path class="head" d="{tip}"/>'


def key_schedule(verdict: dict[str, Any]) -> str:
    """The derivation of a connection's keys from its legs (RFC 9846 section 7.1), and what is
    known.

    Args:
        verdict: on one connection, as the adversary's process gives it.
    """
    psks = [leg for leg in verdict["legs"] if leg["kind"] in ("qkd", "psk", "ticket")]
    exchange = [leg for leg in verdict["legs"] if leg["kind"] == "exchange"]
    early = all(leg["how"] for leg in psks)
    rest = "known" if verdict["decrypted"] else "sealed"
    gap = 12
    y1 = 4
    y2 = y1 + _BOX + 40
    exchange_height = len(exchange) * (_BOX + gap) - gap
    center2 = y2 + (exchange_height - _BOX) / 2
    y3 = y2 + exchange_height + 40
    missing = ", ".join(verdict["missing"]) or "nothing"
    out = _open_svg(720, int(y3 + 2 * _BOX + gap + 6), f"Key schedule; missing: {missing}")

    def arrows(y: float) -> str:
        middle = y + _BOX / 2
        return _arrow(_INPUT_X + _INPUT_WIDTH, middle, _CHAIN_X, middle) + _arrow(
            _CHAIN_X + _CHAIN_WIDTH, middle, _OUTPUT_X, middle
        )

    if psks:
        out += _leg_box(y1, psks[0])
    else:
        out += _box(_INPUT_X, y1, _INPUT_WIDTH, "public", "no PSK", "zeros in its place")
    out += _chain(y1, "known" if early else "sealed", "Early Secret") + arrows(y1)
    out += _box(_OUTPUT_X, y1, _OUTPUT_WIDTH, "public", "PSK binder", "in the ClientHello")
    for index, leg in enumerate(exchange):
        y = y2 + index * (_BOX + gap)
        out += _leg_box(y, leg)
        if len(exchange) > 1:
            out += f'<path class="flow" d="M{_INPUT_X + _INPUT_WIDTH} {y + _BOX / 2:g}h24"/>'
    if len(exchange) > 1:
        x, top = _INPUT_X + _INPUT_WIDTH + 24, y2 + _BOX / 2
        out += f'<path class="flow" d="M{x} {top:g}V{top + exchange_height - _BOX:g}"/>'
        out += _arrow(x, center2 + _BOX / 2, _CHAIN_X, center2 + _BOX / 2)
        out += _arrow(_CHAIN_X + _CHAIN_WIDTH, center2 + _BOX / 2, _OUTPUT_X, center2 + _BOX / 2)
    else:
        out += arrows(center2)
    out += _chain(center2, rest, "Handshake Secret")
    out += _box(_OUTPUT_X, center2, _OUTPUT_WIDTH, rest, "handshake", "certificates, Finished")
    out += _chain(y3, rest, "Main Secret")
    out += _arrow(_CHAIN_X + _CHAIN_WIDTH, y3 + _BOX / 2, _OUTPUT_X, y3 + _BOX / 2)
    out += _box(_OUTPUT_X, y3, _OUTPUT_WIDTH, rest, "application", "data")
    y4 = y3 + _BOX + gap
    x = _CHAIN_X + _CHAIN_WIDTH + 35
    out += f'<path class="flow" d="M{x} {y3 + _BOX / 2:g}V{y4 + _BOX / 2:g}"/>'
    out += _arrow(x, y4 + _BOX / 2, _OUTPUT_X, y4 + _BOX / 2)
    out += _box(_OUTPUT_X, y4, _OUTPUT_WIDTH, rest, "tickets", "PSKs of later sessions")
    middle = _CHAIN_X + _CHAIN_WIDTH / 2
    for top, bottom in ((y1, center2), (center2, y3)):
        out += _arrow(middle, top + _BOX, middle, bottom)
        out += _text(middle + 8, (top + _BOX + bottom) / 2 + 4, "HKDF-Extract", "small")
    return out + "</svg>"


def _chain(y: float, state: str, title: str) -> str:
    """A stage of the schedule, with its state on the second line."""
    out = (
        f'<rect class="{state}" x="{_CHAIN_X}" y="{y:g}" width="{_CHAIN_WIDTH}" '
        f'height="{_BOX}" rx="7"/>'
    )
    middle = _CHAIN_X + _CHAIN_WIDTH / 2
    out += _text(middle, y + 19, title, anchor="middle")
    return out + _text(middle, y + 36, _MARKS[state], f"mark {state}", "middle")


def _leg_box(y: float, leg: dict[str, Any]) -> str:
    title, detail = leg["name"], ""
    if leg["kind"] == "qkd":
        title, _, detail = "QKD key", "", leg["name"].removeprefix("QKD key ")
    elif leg["kind"] == "ticket":
        detail = "from the connection that it resumes"
    elif leg["kind"] == "exchange":
        detail = "shared secret"
    return _box(_INPUT_X, y, _INPUT_WIDTH, "known" if leg["how"] else "missing", title, detail)


# --- the timeline -----------------------------------------------------------------------------

_LEFT, _RIGHT, _STEP = 70, 470, 34
_LONGEST: Final = 58


def timeline(verdict: dict[str, Any]) -> str:
    """The records on the wire as the adversary sees them."""
    events: Sequence[dict[str, Any]] = verdict["events"]
    height = 44 + _STEP * len(events) + 10
    out = _open_svg(540, height, "Records on the wire, as the adversary sees them")
    for x, name in ((_LEFT, "client"), (_RIGHT, "server")):
        out += _text(x, 14, name, anchor="middle")
        out += f'<path class="life" d="M{x} 22V{height - 4}"/>'
    for index, event in enumerate(events):
        out += _event(44 + _STEP * index, event)
    return out + "</svg>"


def _event(y: float, event: dict[str, Any]) -> str:
    from_client = event["from"] == "client"
    source, target = (_LEFT, _RIGHT) if from_client else (_RIGHT, _LEFT)
    toward = 1 if from_client else -1
    tip = f"M{target} {y:g}l{-8 * toward} -4v8z"
    out = f'<path class="arrow {event["state"]}" d="M{source} {y:g}H{target - 8 * toward}"/>'
    out += f'<path class="head" d="{tip}"/>'
    out += _text(_LEFT - 8, y + 4, f"{event['ms']:.1f} ms", "small", "end")
    out += _text(_RIGHT + 8, y + 4, f"{event['size']} B", "small")
    middle = (_LEFT + _RIGHT) / 2
    if event["state"] == "protected":
        out += _text(middle, y - 6, "protected record", "small", "middle")
        out += _lock(middle - 62, y - 17)
    elif event["text"]:
        out += _text(middle, y - 6, _shortened(event["text"].strip()), "said", "middle")
    else:
        out += _text(middle, y - 6, _shortened(event["what"]), "small", "middle")
    return out


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def legend() -> Iterable[tuple[str, str]]:
    """The states and their meanings, for a caption."""
    return (
        ("known", "the adversary has it"),
        ("missing", "the adversary lacks it"),
        ("sealed", "follows from something that is missing"),
    )
