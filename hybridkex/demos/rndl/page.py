"""The trial as one HTML page: no scripts, no external resources, light and dark themes.

Every cell of the matrix is a link to what that adversary saw; CSS (``:target``) shows the one that
was chosen.
"""

import time
from collections import Counter
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any, Final

from hybridkex.demos.rndl.matrix import (
    ADVERSARIES,
    CONFIGURATIONS,
    TOY,
    Adversary,
    Configuration,
    rows,
)
from hybridkex.demos.rndl.pictures import STYLE, key_schedule, legend, timeline
from hybridkex.demos.rndl.toy_curve import ORDER
from hybridkex.demos.rndl.trial import Cell, Trial

_CSS: Final = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")

_FEATURED: Final = "both"
"""The adversary of the side-by-side comparison: every key exchange of TLS is broken."""


def render(trial: Trial, version: str) -> str:
    """The page, as HTML; ``version`` is this library's."""
    parts = [
        _head(trial, version),
        "<h2>The matrix</h2>",
        "<p>A row is a recorded connection, a column an adversary. <b>read</b>: the adversary "
        "decrypted all data in both directions correctly. <b>safe</b>: it could not, and "
        "the cell names the secret that it lacked. Choose a cell to see what it saw.</p>",
        _matrix(trial),
        *_cases(trial),
        "<h2>Side by side: ECDH and ML-KEM are broken</h2>",
        "<p>The same adversary and the same wire, without and with a QKD key in the key "
        "schedule.</p>",
        _side_by_side(trial),
        _toy(trial),
        _model(),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'\">"
        f"<title>Record now, decrypt later</title><style>{_CSS}{STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _head(trial: Trial, version: str) -> str:
    at = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(trial.at))
    cells, wrong = len(trial.cells), trial.wrong
    outcome = (
        f"{cells} of {cells} cells as predicted"
        if not wrong
        else f"{len(wrong)} cells contradict the prediction"
    )
    read = sum(cell.decrypted for cell in trial.cells)
    complaint = "".join(f"<li>{escape(text)}</li>" for text in wrong)
    return (
        "<h1>Record now, decrypt later</h1>"
        f'<p class="soft">hybridkex {escape(version)}, {at}, {trial.seconds:.1f} s</p>'
        f'<p><span class="outcome{" bad" if wrong else ""}">{outcome}</span></p>'
        f"{f'<ul>{complaint}</ul>' if wrong else ''}<p>Connections between two parties were "
        f"recorded on the wire. Then {len(ADVERSARIES)} adversaries of the future tried to read "
        "them, each in a process of its own, with copies of the recordings and nothing else but "
        f"what is named. {read} of {cells} connections were read. The claim under test: <b>a "
        "connection can be decrypted if and only if every secret that its keys are derived from "
        "is known.</b></p>"
    )


# --- the matrix -------------------------------------------------------------------------------


def _matrix(trial: Trial) -> str:
    out = ['<div class="scroll"><table id="matrix"><thead><tr><th rowspan="2">recorded</th>']
    themes = dict.fromkeys(one.theme for one in ADVERSARIES)
    order = [one for theme in themes for one in ADVERSARIES if one.theme == theme]
    for theme, columns in Counter(one.theme for one in order).items():
        out.append(f'<th colspan="{columns}">{escape(theme)}</th>')
    out.append("</tr><tr>")
    out += [f'<th scope="col" title="{escape(one.note)}">{escape(one.title)}</th>' for one in order]
    out.append("</tr></thead><tbody>")
    for row in rows():
        kind = ' class="resumed"' if row.resumed else ""
        title = "resumed" if row.resumed else row.title
        out.append(f'<tr{kind}><th scope="row">{escape(title)}</th>')
        out += [_cell(trial.cell(row, one)) for one in order]
        out.append("</tr>")
    out.append("</tbody></table></div>")
    return "".join(out)


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return '<td class="wrong">not tried</td>'
    why = "" if cell.decrypted else f"lacks {', '.join(_short(name) for name in cell.missing)}"
    verdict = "read" if cell.decrypted else "safe"
    wrong = " wrong" if cell.wrong else ""
    return (
        f'<td class="{cell.verdict}{wrong}" data-row="{cell.row.id}" '
        f'data-adversary="{cell.adversary.id}">'
        f'<a href="#{_anchor(cell.row.configuration, cell.adversary)}">'
        f'<span class="verdict">{verdict}</span><span class="why">{escape(why)}</span></a></td>'
    )


def _short(missing: str) -> str:
    """A missing secret in a word or two, without whether it belongs to a key update."""
    missing = missing.removesuffix(" of the key update")
    for start, word in (("QKD key", "QKD key"), ("PSK of the ticket", "ticket")):
        if missing.startswith(start):
            return word
    return missing.replace("-", "\N{NON-BREAKING HYPHEN}")


# --- what one adversary saw -------------------------------------------------------------------


def _anchor(configuration: Configuration, adversary: Adversary) -> str:
    return f"{configuration.id}--{adversary.id}"


def _cases(trial: Trial) -> Iterator[str]:
    for configuration in CONFIGURATIONS:
        for adversary in ADVERSARIES:
            verdicts = trial.verdicts[configuration.id, adversary.id]
            anchor = _anchor(configuration, adversary)
            yield (
                f'<section class="case" id="{anchor}"><h2>{escape(configuration.title)}, against: '
                f"{escape(adversary.title)}</h2><p>{escape(adversary.note)}</p>"
                f"{_kme_connections(verdicts)}"
            )
            sessions = (one for one in verdicts if one["capture"] == "session.pcapng")
            yield '<div class="pair">'
            for verdict in sessions:
                name = "the resumed connection" if verdict["resumed"] else "the first connection"
                yield _figure(name, verdict)
            yield "</div></section>"
    yield '<p id="choose" class="soft">No cell is chosen.</p>'


def _kme_connections(verdicts: list[dict[str, Any]]) -> str:
    """The outcome of the attacks on the recorded connections to the KMEs, if any."""
    connections = [one for one in verdicts if one["capture"] != "session.pcapng"]
    if not connections:
        return ""
    items = "".join(
        f"<li>{escape(one['capture'])}, {escape(one['group'])}: {_state(one)}"
        + (f" (lacks {escape(', '.join(one['missing']))})" if one["missing"] else "")
        + "</li>"
        for one in connections
    )
    return f"<p>The connections on which the KMEs delivered the QKD key:</p><ul>{items}</ul>"


def _state(verdict: dict[str, Any]) -> str:
    kind, word = ("decrypted", "read") if verdict["decrypted"] else ("safe", "safe")
    return f'<span class="state {kind}">{word}</span>'


def _figure(name: str, verdict: dict[str, Any]) -> str:
    said = ""
    if verdict["decrypted"]:
        said = f"<blockquote>{escape(verdict['to_server'] + verdict['to_client'])}</blockquote>"
    legs = "".join(
        f"<tr><td>{escape(leg['name'])}</td><td>{escape(leg['how'] or 'missing')}</td></tr>"
        for leg in verdict["legs"]
    )
    return (
        f"<figure><h3>{escape(name)} {_state(verdict)}</h3>"
        f"{key_schedule(verdict)}{_key()}"
        f'<table class="legs"><tr><th>leg</th><th>how the adversary has it</th></tr>{legs}</table>'
        f"{said}<h3>On the wire</h3>{timeline(verdict)}"
        f"<figcaption>{escape(verdict['group'])}, {escape(verdict['cipher_suite'])}; red: "
        "decrypted, dashed: protected records that stay closed, grey: in the clear for "
        "everybody.</figcaption></figure>"
    )


def _key() -> str:
    items = "".join(
        f'<span><i class="{kind}"></i>{escape(meaning)}</span>' for kind, meaning in legend()
    )
    return f'<p class="key soft">{items}</p>'


def _side_by_side(trial: Trial) -> str:
    figures = []
    for wanted in ("x25519mlkem768", "x25519mlkem768-qkd"):
        configuration = next(one for one in CONFIGURATIONS if one.id == wanted)
        verdict = trial.verdicts[wanted, _FEATURED][0]
        figures.append(_figure(configuration.title, verdict))
    return f'<div class="pair">{"".join(figures)}</div>'


# --- the rest ---------------------------------------------------------------------------------


def _toy(trial: Trial) -> str:
    toy = trial.toy
    if toy is None:
        return ""
    steps = "".join(f"{escape(step)}\n" for step in toy.steps)
    return (
        "<h2>Once without an oracle</h2>"
        f"<p>A connection over a <b>toy</b> curve of {ORDER.bit_length()} bits. Nothing was kept "
        "aside: the adversary's process took the client's key share out of the recording and "
        f"computed its discrete logarithm (baby steps, giant steps) in {toy.seconds:.1f} s, its "
        "start included. From there on it did what it does everywhere else.</p>"
        f'<div class="pair"><div class="card"><pre>{steps}</pre></div>'
        f"{_figure(TOY.title, toy.verdict)}</div>"
    )


def _model() -> str:
    return (
        "<h2>What is modelled, what is real, what this does not prove</h2><ul><li><b>Modelled:</b> "
        "the break itself. A private key is set aside when it is made; the oracle returns it for "
        "the public share from the recording, and for nothing else. That is what a quantum "
        "computer would give for X25519, and what nobody knows how to get for "
        "ML-KEM.</li><li><b>Real:</b> the parties (this library over TCP, KMEs included), the "
        "recording (pcapng, made by a proxy that frames what it saw), the parsing, the key "
        "schedule, which the adversary has in code of its own, the decryption, the thefts. Where a "
        "secret is missing the adversary also tries without it and with zeros, so that a key "
        "schedule which forgets a leg is found out.</li><li><b>Not proven:</b> that X25519 or "
        "ML-KEM withstand anything; that a QKD link is secure (its light is simulated here, and "
        "nobody attacks it); anything about an adversary who is active on the wire, sits inside a "
        "site, or reads memory. It shows that this implementation puts every leg into the keys, "
        "and which recordings matter.</li></ul>"
    )
