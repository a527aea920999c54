# SPDX-License-Identifier: Apache-2.0
"""The answers of the page as HTML: words, tables and a picture, which screen readers and narrow screens can do with.

All that comes from a user or a model is escaped by `_escaped`.
"""

import base64
import html
from collections.abc import Sequence

from mmser.prediction_files import SILENCE, UNKNOWN, answer
from mmser.prediction_run import Prediction
from mmser.prediction_screen import counts_of, in_words, shares_of_time
from mmser.timed_files import clock

STYLE = """
.mmser h2 { font-size: 1.4rem; font-weight: 600; margin: 0 0 .75rem; overflow-wrap: anywhere; }
.mmser p { margin: .6rem 0; }
.mmser table { border-collapse: collapse; border: 0; width: 100%; margin: .75rem 0; }
.mmser caption { text-align: left; font-weight: 600; padding: .25rem 0; }
.mmser th, .mmser td { text-align: left; padding: .3rem .6rem .3rem 0; vertical-align: top; border: 0;
    font-weight: inherit; }
.mmser .lines th, .mmser .lines td { border-bottom: 1px solid var(--border-color-primary); }
.mmser thead th { font-weight: 600; }
.mmser .number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.mmser .bar { width: 60%; }
.mmser .bar div { background: #0072B2; height: 1rem; margin-top: .25rem; min-width: 1px; }
.mmser .note, .mmser .error { border-left: .3rem solid #D55E00; padding-left: .75rem; }
.mmser .scroll { overflow-x: auto; }
.mmser .scroll img { min-width: 34rem; width: 100%; max-width: none; background: white; }
.mmser .scroll table { width: auto; min-width: 100%; }
.mmser .more { display: none; }
@media (max-width: 640px) {
    .mmser .more { display: block; font-size: .85rem; margin: .25rem 0 0; }
}
@media (max-width: 480px) {
    .mmser .lines { font-size: .85rem; }
    .mmser .lines th, .mmser .lines td { padding-right: .4rem; }
}
.mmser a { text-decoration: underline; }
.mmser a:focus-visible, .mmser .scroll:focus-visible { outline: 3px solid #0072B2; outline-offset: 2px; }
"""


def _escaped(text: str) -> str:
    return html.escape(text).replace("{", "&#123;").replace("$", "&#36;")  # no template of the page either


def _inside(*parts: str) -> str:
    return f'<div class="mmser">{"".join(parts)}</div>'


def error(sentence: str) -> str:
    """What is wrong, where the answer would be."""
    return _inside(f'<p class="error" role="alert">{_escaped(_ended(sentence))}</p>')


def _ended(sentence: str) -> str:
    return sentence if sentence.endswith((".", "?", "!")) else f"{sentence}."


def answer_to_one(prediction: Prediction, rejects: bool, notes: Sequence[str] = ()) -> str:
    """
    The answer to one recording, or to words alone: a title, the scores, and how far to trust them.

    Args:
        rejects: whether the model is set to reject what is none of its classes.
        notes: sentences about the recording.
    """
    one, scores = prediction.input, prediction.scores
    name = one.name or f"“{one.text}”"
    parts = [f"<h2>{_escaped(name)}: {_escaped(in_words(scores))}</h2>"]
    parts += [f'<p class="note">{_escaped(note)}</p>' for note in notes]
    rows = [
        f'<tr><th scope="row">{_escaped(entry["label"])}</th><td class="bar" aria-hidden="true">'
        f'<div style="width: {100 * entry["score"]:.1f}%"></div></td><td class="number">{entry["score"]:.3f}</td></tr>'
        for entry in scores
    ]
    what = "Mean scores over time" if prediction.segments else "Scores"
    parts.append(f"<table><caption>{what}</caption><tbody>{''.join(rows)}</tbody></table>")
    parts += [f"<p>{_escaped(words)}</p>" for words in (about_uncertainty(scores), about_unknown(scores, rejects))]
    return _inside(*parts)


def about_uncertainty(scores: Sequence[dict]) -> str:
    """The uncertainty in words."""
    best = scores[0]
    wrong = round(100 * best["uncertainty"])
    return (
        f"Uncertainty {best['uncertainty']:.3f}: of 100 answers like “{best['label']}” here, about {wrong} "
        f"{'is' if wrong == 1 else 'are'} wrong. It was fitted on recordings like those that the model learned from; "
        "on others it errs more often."
    )


def about_unknown(scores: Sequence[dict], rejects: bool) -> str:
    """What the model says of "none of these", or that it says nothing of it, in words."""
    best = scores[0]
    labels = sorted(entry["label"] for entry in scores)
    classes = f"{', '.join(labels[:-1])} and {labels[-1]}"
    if best["unknown_probability"] is None:
        why = "it was never fitted to" if rejects else "rejection is switched off"
        return (
            f"None of these: this model does not tell ({why}). Noise, music and any other emotion get one of the "
            f"answers {classes} too."
        )
    probability = f"{best['unknown_probability']:.3f}"
    if answer(scores) == UNKNOWN:
        return (
            f"None of these: yes, with probability {probability}. It is not like the recordings of {classes} that the "
            f"model knows; the nearest class is {best['label']}."
        )
    return f"None of these: no. The probability that it is none of {classes} is {probability}."


def over_time(prediction: Prediction, picture: bytes, table: bytes) -> str:
    """
    A long recording in segments.

    Args:
        picture: a PNG file.
        table: a CSV file.
    """
    shares = shares_of_time(prediction.segments)
    told = _escaped(f"Timeline of {prediction.input.name}. {shares}. The table below has every segment.")
    image = f'<img alt="{told}" src="{_address(picture, "image/png")}" />'
    rows = []
    for one in prediction.segments:
        cells = [SILENCE, "", ""] if one.is_silent else _cells(one.scores, one.error)
        rows.append([clock(one.start, 1), clock(one.end, 1), *cells])
    return _inside(
        f"<p>{_escaped(shares)}.</p>",
        f'<div class="scroll" tabindex="0" role="region" aria-label="Timeline">{image}</div>',
        '<p class="more">Move the picture to the left to see the rest of it.</p>',
        _table("Segments", ["start", "end", "answer", "score", "uncertainty"], rows),
        _link(table, "segments.csv"),
    )


def table_of_many(predictions: Sequence[Prediction], table: bytes) -> str:
    """Several recordings, one a row, and a link to the same as a CSV file, `table`."""
    rows = [[one.input.name, *_cells(one.scores, one.error)] for one in predictions]
    failed = sum(bool(one.error) for one in predictions)
    said = counts_of(predictions) + (f"; {failed} could not be classified" if failed else "")
    return _inside(
        f"<p>{_escaped(said)}.</p>",
        _table("Answers", ["file", "answer", "score", "uncertainty"], rows),
        _link(table, "answers.csv"),
    )


def _cells(scores: Sequence[dict], reason: str) -> list[str]:
    """The answer, its score and its uncertainty; or one cell with the reason why there is none."""
    if not scores:
        return [_ended(f"not classified: {reason}")]
    return [in_words(scores, is_short=True), f"{scores[0]['score']:.3f}", f"{scores[0]['uncertainty']:.3f}"]


def _table(caption: str, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The last cell of a row that is too short takes the place of those that it lacks."""
    head = "".join(f'<th scope="col"{_kind(title)}>{_escaped(title)}</th>' for title in titles)
    body = ""
    for row in rows:
        missing = len(titles) - len(row)
        spans = [""] * (len(row) - 1) + [f' colspan="{missing + 1}"' if missing else ""]
        cells = zip(titles, spans, row, strict=False)
        body += f"<tr>{''.join(f'<td{_kind(title)}{span}>{_escaped(cell)}</td>' for title, span, cell in cells)}</tr>"
    inner = f'<table class="lines"><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody>'
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}">{inner}</table></div>'


def _kind(title: str) -> str:
    return ' class="number"' if title in ("start", "end", "score", "uncertainty") else ""


def _link(table: bytes, name: str) -> str:
    address = _address(table, "text/csv")
    return f'<p><a download="{name}" href="{address}">Download the table with all scores (CSV)</a></p>'


def _address(content: bytes, kind: str) -> str:
    """The content itself as an address: nothing is kept on the machine of the page."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
