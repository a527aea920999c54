# SPDX-License-Identifier: Apache-2.0
"""The pictures of a report. Each function writes one PNG (and makes its folder) and returns its path.

Needs matplotlib (`pip install .[report]`); pyplot and the global settings stay untouched. Colours are those of Okabe &
Ito (2008), which people with any common form of colour blindness can tell apart. Line styles, hatches and numbers
repeat what the colours say, for grey print.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmser.calibration import expected_calibration_error, reliability_bins, risk_coverage_curve
from mmser.checks import check_floats, check_label_names
from mmser.files import whole_file
from mmser.groups import FEW_CLIPS
from mmser.open_set import auroc, fpr_at_95_tpr, oscr, oscr_curve, roc_curve
from mmser.timed_files import clock

BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
LINE_STYLES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1)), (0, (3, 1)))
HATCHES = ("", "///", "...", "\\\\\\", "---", "+++", "ooo")
GREY, PALE = "#666666", "#CCCCCC"
# A grey dotted line that a curve is compared with
REFERENCE = {"color": GREY, "linestyle": ":", "linewidth": 1}


def check_matplotlib() -> None:
    """Raise an ImportError that says how to install matplotlib, where it is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError("Plots need matplotlib: `pip install .[report]`.") from error


def _new_figure(width: float, height: float) -> Any:
    """Empty matplotlib figure (inches), unknown to pyplot: its state and the global backend stay untouched."""
    check_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _new_axes(width: float, height: float, title: str, x_label: str, y_label: str) -> tuple[Any, Any]:
    figure = _new_figure(width, height)
    axes = figure.add_subplot()
    _label(axes, title, x_label, y_label)
    return figure, axes


def _new_square(num_entries: int, title: str, x_label: str, y_label: str) -> tuple[Any, Any]:
    """Axes of the unit square, with room for a legend of `num_entries` lines below."""
    figure, axes = _new_axes(5.2, 5.5 + 0.22 * num_entries, title, x_label, y_label)
    ticks = np.linspace(0, 1, 6)
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.02), box_aspect=1, xticks=ticks, yticks=ticks)
    return figure, axes


def _label(axes: Any, title: str, x_label: str, y_label: str) -> None:
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.set_title(title, loc="left", fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Any, path: str | Path, legend_columns: int = 1) -> Path:
    """Write the picture, with a legend below the axes if something in them has a label."""
    if any(axes.get_legend_handles_labels()[0] for axes in figure.axes):
        figure.legend(loc="outside lower center", frameon=False, ncols=legend_columns)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Cut to what is drawn: the layout engine alone leaves labels outside where the axes have a fixed shape
    with whole_file(path) as hidden:
        figure.savefig(hidden, format="png", bbox_inches="tight", pad_inches=0.12)
    return path


def _value(number: float) -> str:
    return "undefined" if math.isnan(number) else f"{number:.3f}"


def _with_lines(methods: Mapping[str, Any]) -> list[tuple[tuple[str, Any], dict[str, Any]]]:
    """Each method with its colour and line style."""
    if not isinstance(methods, Mapping) or not 1 <= len(methods) <= len(COLOURS):
        raise ValueError(f"`methods` must map 1 to {len(COLOURS)} names to their arrays, got {methods!r}.")
    lines = zip(COLOURS, LINE_STYLES, strict=True)
    styles = ({"color": colour, "linestyle": style, "linewidth": 1.8} for colour, style in lines)
    return list(zip(methods.items(), styles, strict=False))


def _draw_curves(axes: Any, methods: Mapping[str, Any], curve: Callable[..., tuple]) -> list[np.ndarray]:
    """Draw a curve for each method. `curve` turns its arrays into x, y and a note for the legend. Returns: all y."""
    curves = []
    for (name, arrays), style in _with_lines(methods):
        x, y, note = curve(*arrays)
        axes.plot(x, y, **style, marker="o" if len(x) == 1 else None, clip_on=False, label=f"{name} ({note})")
        if np.isnan(x).any() or np.isnan(y).any():
            box = {"facecolor": "white", "edgecolor": "none"}
            reason = "undefined: it takes\nknown and unknown clips"
            axes.text(0.5, 0.5, reason, ha="center", va="center", color=GREY, bbox=box)
        curves.append(y)
    return curves


def plot_confusion_matrix(matrix: Any, label_names: Sequence[str], path: str | Path) -> Path:
    """Heat map of `confusion_matrix` counts [C, C]; colour and percentage are shares of the true class (recall)."""
    names = check_label_names(label_names)
    counts = check_floats(matrix, "matrix", num_dimensions=2)
    if counts.shape != (len(names), len(names)) or (counts < 0).any():
        raise ValueError(f"`matrix` must hold counts >= 0 in shape {(len(names),) * 2}, got shape {counts.shape}.")
    support = counts.sum(axis=1)
    # Cells of a class without clips are left white: there is no share to show
    shares = np.where(support[:, None] > 0, counts / np.maximum(support, 1)[:, None], np.nan)
    size = max(3.4, 0.85 * len(names))
    figure, axes = _new_axes(size + 2.0, size + 0.9, "Confusion matrix", "predicted class", "true class")
    image = axes.imshow(shares, cmap="cividis", vmin=0, vmax=1)
    is_wide = len(names) > 4 or max(map(len, names)) > 9
    turned = {"rotation": 35 if is_wide else 0, "ha": "right" if is_wide else "center", "rotation_mode": "anchor"}
    rows = [f"{name}\n({total:.0f} clips)" for name, total in zip(names, support, strict=True)]
    axes.set_xticks(range(len(names)), names, **turned)
    axes.set_yticks(range(len(names)), rows)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for row, column in np.ndindex(counts.shape):
        share, count = shares[row, column], counts[row, column]
        colour = GREY if support[row] == 0 else "black" if share > 0.45 else "white"
        text = f"{share:.0%}\n{count:.0f}" if support[row] else "-"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=9, linespacing=1.1)
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.85)
    return _save(figure, path)


def plot_reliability(methods: Mapping[str, Any], labels: Any, path: str | Path) -> Path:
    """Reliability diagram, with the share of clips in each confidence bin below; bins as in `reliability_bins`.

    Args:
        methods: name -> probabilities [N, C], for example before and after temperature scaling; at most 3.
        labels: int [N] true class indices.
    """
    figure = _new_figure(5.2, 6.4)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3.2, 1])
    top.plot([0, 1], [0, 1], **REFERENCE, label="perfect: the score is the share of right answers")
    series = zip(_with_lines(methods), "osD", strict=False)
    for position, (((name, probabilities), style), marker) in enumerate(series):
        bins = reliability_bins(probabilities, labels)
        error = expected_calibration_error(probabilities, labels)
        filled = bins.count > 0
        share = bins.count / bins.count.sum()
        confidence, accuracy = bins.confidence[filled], bins.accuracy[filled]
        top.plot(confidence, accuracy, **{**style, "linewidth": 1}, alpha=0.5)
        sizes = 12 + 160 * share[filled]  # the size of a point says how many clips are behind it
        top.scatter(confidence, accuracy, s=sizes, color=style["color"], marker=marker, zorder=3, clip_on=False)
        top.plot([], [], **style, marker=marker, label=f"{name} (ECE {error:.3f})")
        bin_width = bins.edges[1]
        width = 0.8 * bin_width / len(methods)
        left = bins.edges[:-1] + 0.1 * bin_width + position * width
        bottom.bar(left, share, width=width, align="edge", color=style["color"])
    top.set(xlim=(0, 1.02), ylim=(-0.02, 1.04))
    _label(top, "Reliability", "", "share of right answers")
    _label(bottom, "", "score of the answer (probability of its class)", "share of clips")
    return _save(figure, path)


def plot_risk_coverage(methods: Mapping[str, tuple[Any, Any]], path: str | Path) -> Path:
    """Risk-coverage curves of `methods`: name -> (uncertainty [N], is_wrong [N]), as in `risk_coverage_curve`."""

    def curve(uncertainty, is_wrong):
        coverage, risk = risk_coverage_curve(uncertainty, is_wrong)
        return coverage, risk, f"mean {_value(float(risk.mean()))}"

    kept, errors = "share of clips kept, the surest first", "error rate of the kept clips"
    figure, axes = _new_axes(5.6, 4.6, "Risk and coverage", kept, errors)
    risks = _draw_curves(axes, methods, curve)
    for risk in risks:
        axes.axhline(risk[-1], **REFERENCE)
    axes.plot([], [], **REFERENCE, label="all clips kept")
    axes.set(xlim=(0, 1.01), ylim=(0, max(1.1 * max(risk.max() for risk in risks), 0.05)))
    return _save(figure, path)


def plot_open_set_roc(
    methods: Mapping[str, tuple[Any, Any]], path: str | Path, title: str = "Detection of unknown clips"
) -> Path:
    """ROC curves of `methods`: name -> (scores [N], is_unknown [N]), higher = more unknown, as in `roc_curve`."""

    def curve(scores, is_unknown):
        false_positive_rate, true_positive_rate, _ = roc_curve(scores, is_unknown)
        area, at_95 = auroc(scores, is_unknown), fpr_at_95_tpr(scores, is_unknown)
        return false_positive_rate, true_positive_rate, f"AUROC {_value(area)}, FPR95 {_value(at_95)}"

    labels = "known clips flagged as unknown", "unknown clips flagged as unknown"
    figure, axes = _new_square(len(methods) + 1, title, *labels)
    _draw_curves(axes, methods, curve)
    axes.plot([0, 1], [0, 1], **REFERENCE, label="chance")
    axes.axhline(0.95, color=GREY, linewidth=0.8, zorder=0)
    axes.text(1.02, 0.95, "95%", color=GREY, va="center")
    return _save(figure, path)


def plot_oscr(
    methods: Mapping[str, tuple[Any, Any, Any]], path: str | Path, title: str = "Right and accepted, against unknown"
) -> Path:
    """OSCR curves of `methods`: name -> arrays of `oscr_curve`, where a higher score = more known."""

    def curve(*arrays):
        false_positive_rate, correct_rate, _ = oscr_curve(*arrays)
        return false_positive_rate, correct_rate, f"OSCR {_value(oscr(*arrays))}"

    figure, axes = _new_square(len(methods), title, "unknown clips accepted", "known clips accepted and right")
    _draw_curves(axes, methods, curve)
    return _save(figure, path)


def plot_score_histograms(
    known_scores: Any,
    unknown_scores: Any,
    path: str | Path,
    score_name: str = "unknown probability",
    title: str = "Known and unknown clips",
) -> Path:
    """Histograms of one score [K] for known and [U] for unknown clips, each as shares of its group."""
    groups = [
        ("known", check_floats(known_scores, "known_scores", allow_empty=True), BLUE, ""),
        ("unknown", check_floats(unknown_scores, "unknown_scores", allow_empty=True), VERMILLION, "///"),
    ]
    both = np.concatenate([scores for _, scores, _, _ in groups])
    if len(both) == 0:
        raise ValueError("`known_scores` and `unknown_scores` are both empty; at least one example is needed.")
    edges = np.histogram_bin_edges(both, bins=30)
    figure, axes = _new_axes(5.6, 4.2, title, score_name, "share of the group")
    for name, scores, colour, hatch in groups:
        shares = np.histogram(scores, edges)[0] / max(len(scores), 1)
        style = {"facecolor": (colour, 0.25), "edgecolor": colour, "linewidth": 1.5, "hatch": hatch}
        axes.stairs(shares, edges, fill=True, label=f"{name} ({len(scores)} clips)", **style)
    axes.set_ylim(bottom=0)
    return _save(figure, path, legend_columns=2)


def plot_group_bars(
    groups: Mapping[str, Mapping[str, Any]],
    path: str | Path,
    title: str = "Weighted F1 per group",
    overall: float | None = None,
) -> Path:
    """Horizontal bars of the weighted F1 per group, as `grouped_metrics` gives it.

    Args:
        groups: name -> `count`, `weighted_f1` and, for error bars, `weighted_f1_interval` (low, high). A group of
            fewer than `FEW_CLIPS` clips is drawn pale.
        title: of the picture.
        overall: the weighted F1 over all clips, drawn as a line.
    """
    if not groups or any("weighted_f1" not in values for values in groups.values()):
        raise ValueError("`groups` must be a non-empty result of `grouped_metrics` that holds `weighted_f1`.")
    names = [f"{name} (n = {values['count']})" for name, values in groups.items()]
    height = 1.35 + 0.36 * len(names) + (0.25 if overall is not None else 0)
    figure, axes = _new_axes(6.0, height, title, "weighted F1", "")
    for position, values in enumerate(groups.values()):
        value, (low, high) = values["weighted_f1"], values.get("weighted_f1_interval", (math.nan, math.nan))
        axes.barh(position, value, color=PALE if values["count"] < FEW_CLIPS else SKY, height=0.66)
        if not (math.isnan(value) or math.isnan(low)):
            axes.plot([low, high], [position] * 2, color="black", linewidth=1.4, marker="|", markersize=6)
        axes.text(1.03, position, "n/a" if math.isnan(value) else f"{value:.2f}", va="center")
    if overall is not None and not math.isnan(overall):
        axes.axvline(overall, color=VERMILLION, linestyle="--", linewidth=1.4, label=f"all clips ({overall:.2f})")
    axes.set_yticks(range(len(names)), names)
    axes.set(ylim=(len(names) - 0.4, -0.6), xlim=(0, 1), xticks=np.linspace(0, 1, 6))
    axes.tick_params(axis="y", length=0)
    return _save(figure, path)


def plot_training_curves(history: Sequence[Mapping[str, Any]], path: str | Path) -> Path | None:
    """The loss, its parts and what was measured on the validation clips, by epoch.

    Args:
        history: `log_history` of a Trainer's state.
        path: of the picture.
    Returns: the path; None, and no picture, with fewer than two reports of the loss.
    """
    losses = [line for line in history if "loss" in line]
    if len(losses) < 2:
        return None
    scores = [line for line in history if "eval_weighted_f1" in line]
    figure = _new_figure(6.0, 6.0 if scores else 3.8)
    panels = figure.subplots(2 if scores else 1, 1, sharex=True, squeeze=False)[:, 0]
    _label(panels[0], "Training", "" if scores else "epoch", "loss")
    parts = sorted({name for line in losses for name in line if name.startswith("loss_")})
    look = itertools.cycle(zip(COLOURS, LINE_STYLES, strict=True))
    for name, (colour, style) in zip(("loss", *parts), look, strict=False):
        points = [(line["epoch"], line[name]) for line in losses if name in line]
        title = name.removeprefix("loss_").replace("_", " ")
        panels[0].plot(*zip(*points, strict=True), color=colour, linestyle=style, label=title)
    if held_out := [(line["epoch"], line["eval_loss"]) for line in history if "eval_loss" in line]:
        panels[0].plot(*zip(*held_out, strict=True), color="black", marker="o", markersize=4, label="validation clips")
    if scores:
        _label(panels[1], "Validation clips", "epoch", "weighted F1")
        points = [(line["epoch"], line["eval_weighted_f1"]) for line in scores]
        panels[1].plot(*zip(*points, strict=True), color=BLUE, marker="o", markersize=4)
        panels[1].set(ylim=(0, 1))
    return _save(figure, path, legend_columns=3)


def plot_timeline(
    times: Any,
    scores: Any,
    label_names: Sequence[str],
    answers: Sequence[str],
    path: str | Path,
    speakers: Sequence[str] = (),
    title: str = "",
    waveform: Any = None,
    seconds: float | None = None,
) -> Path:
    """A recording over time: the scores as stacked bars, the answers as a strip above; for each speaker, if known.
    A waveform is drawn above them, in the colours of the answers.

    Args:
        times: [S, 2], start and end of each segment in seconds.
        scores: [S, C] in [0, 1].
        label_names: of the C classes.
        answers: of each segment one of the classes; any other name stands for none of them.
        path: of the picture.
        speakers: of each segment.
        title: of the picture.
        waveform: [N, 2], the lowest and the highest sample of N equal times, from 0 to the end of the picture.
        seconds: where the picture ends; by default at the end of the last segment.
    """
    names = check_label_names(label_names)
    spans = check_floats(times, "times", num_dimensions=2)
    heights = check_floats(scores, "scores", num_dimensions=2)
    who = np.array(list(speakers) or [""] * len(spans))
    if not len(spans) == len(heights) == len(answers) == len(who):
        raise ValueError("`times`, `scores`, `answers` and `speakers` must have a row for each segment.")
    end = spans[:, 1].max() if seconds is None else seconds
    rows = list(dict.fromkeys(who.tolist()))
    num_extra = int(waveform is not None)
    figure = _new_figure(9.0, 1.3 + 1.5 * len(rows) + 0.9 * num_extra)
    heights_of_panels = [0.6] * num_extra + [1.0] * len(rows)
    every_panel = figure.subplots(
        len(heights_of_panels), 1, sharex=True, squeeze=False, height_ratios=heights_of_panels
    )
    top, panels = every_panel[0, 0], every_panel[num_extra:, 0]
    styles = [
        {"facecolor": COLOURS[index % len(COLOURS)], "edgecolor": "white", "linewidth": 0, "hatch": hatch}
        for index, hatch in zip(range(len(names)), itertools.cycle(HATCHES), strict=False)
    ]
    rejected = {"facecolor": "white", "edgecolor": GREY, "linewidth": 0, "hatch": "xxxxx"}
    for axes, row in zip(panels, rows, strict=True):
        own = who == row
        starts, widths = spans[own, 0], spans[own, 1] - spans[own, 0]
        floor = np.zeros(len(starts))
        for index, style in enumerate(styles):
            axes.bar(starts, heights[own, index], widths, bottom=floor, align="edge", **style)
            floor += heights[own, index]
        said = [answer for answer, is_own in zip(answers, own, strict=True) if is_own]
        for start, width, answer in zip(starts, widths, said, strict=True):
            style = styles[names.index(answer)] if answer in names else rejected
            axes.bar(start, 0.2, width, 1.08, align="edge", **style)
        _label(axes, "", "", row or "score")
        axes.set(xlim=(0, end), ylim=(0, 1.3), yticks=[0, 0.5, 1, 1.18])
        axes.set_yticklabels(["0", ".5", "1", "answer"])
        axes.spines["left"].set_bounds(0, 1)
        axes.tick_params(axis="y", length=0)
    panels[-1].set_xlabel("time (minutes:seconds)" if end < 3600 else "time (hours:minutes:seconds)")
    panels[-1].xaxis.set_major_locator(_time_ticks(end))
    panels[-1].xaxis.set_major_formatter(lambda value, _: clock(value))
    if waveform is not None:
        colours = [styles[names.index(one)]["facecolor"] if one in names else GREY for one in answers]
        _draw_waveform(top, check_floats(waveform, "waveform", num_dimensions=2), spans, colours, end)
    top.set_title(title, loc="left", fontweight="bold")
    for name, style in zip(names, styles, strict=True):
        panels[0].bar(0, 0, 0, **style, label=name)
    if any(answer not in names for answer in answers):
        panels[0].bar(0, 0, 0, **rejected, label="none of these")
    return _save(figure, path, legend_columns=len(names) + 1)


def _draw_waveform(axes: Any, outline: np.ndarray, spans: np.ndarray, colours: Sequence[Any], seconds: float) -> None:
    """The lowest and highest samples [N, 2] over time, each segment [S, 2] in its colour."""
    edges = np.linspace(0, seconds, len(outline) + 1)
    times, values, middles = np.repeat(edges, 2)[1:-1], np.repeat(outline, 2, axis=0), (edges[1:] + edges[:-1]) / 2
    for (start, end), colour in zip(spans, colours, strict=True):
        is_inside = np.repeat((start <= middles) & (middles < end), 2)
        axes.fill_between(times, *values.T, where=is_inside, color=colour, linewidth=0.5)
    _label(axes, "", "", "wave")
    axes.set(yticks=[])
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(axis="x", length=0)


def plot_explanation(
    sound: Sequence[tuple[float, float, float]],
    words: Sequence[tuple[str, float]],
    path: str | Path,
    waveform: Any = None,
    sampling_rate: int = 16_000,
    title: str = "",
) -> Path:
    """What each piece of a clip adds to the score of an answer: under the waveform, and for each word.

    Args:
        sound: start and end in seconds, and the change, of each piece of the sound.
        words: each word and its change.
        path: of the picture.
        waveform: [T], drawn above the pieces.
        sampling_rate: of the waveform, in Hz.
        title: of the picture.
    """
    if not sound and not words:
        raise ValueError("`sound` and `words` are both empty: there is nothing to draw.")
    heights = [*([1.4, 1.4] if sound else []), *([0.5 + 0.3 * len(words)] if words else [])]
    figure = _new_figure(8.0, 0.9 + sum(heights))
    panels = list(figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    limit = 1.1 * max([abs(change) for *_, change in sound] + [abs(change) for _, change in words] + [0.01])

    def colours(changes: Any) -> list[str]:
        return [BLUE if change >= 0 else VERMILLION for change in changes]

    if sound:
        wave, bars = panels[:2]
        samples = check_floats(np.zeros(1) if waveform is None else waveform, "waveform")
        # No more points than the picture has columns: the peaks of each stretch
        edges = np.unique(np.linspace(0, len(samples), 1001, dtype=int)[:-1])
        times = edges / sampling_rate
        wave.fill_between(times, np.minimum.reduceat(samples, edges), np.maximum.reduceat(samples, edges), color=GREY)
        _label(wave, "", "", "sound")
        wave.set(xlim=(sound[0][0], sound[-1][1]), yticks=[], xticklabels=[])
        starts, ends, changes = (np.array(column) for column in zip(*sound, strict=True))
        bars.bar(starts, changes, ends - starts, align="edge", color=colours(changes), edgecolor="white")
        bars.axhline(0, color="black", linewidth=0.8)
        _label(bars, "", "time (s)", "change")
        bars.set(xlim=(sound[0][0], sound[-1][1]), ylim=(-limit, limit))
    if words:
        axes = panels[-1]
        by_word = [change for _, change in words]
        axes.barh(range(len(words)), by_word, color=colours(by_word), height=0.66)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(words)), [word for word, _ in words])
        axes.set(ylim=(len(words) - 0.4, -0.6), xlim=(-limit, limit))
        _label(axes, "", "change of the score by the word", "")
    return _save(figure, path)


def _time_ticks(end: float) -> Any:
    """Ticks at times that people count in: at most eleven."""
    from matplotlib.ticker import MultipleLocator

    steps = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600)
    return MultipleLocator(next((step for step in steps if end / step <= 10), 3600 * math.ceil(end / 36_000)))
