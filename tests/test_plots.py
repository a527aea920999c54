# SPDX-License-Identifier: Apache-2.0
"""Tests of the plots: every function writes a picture, also of undefined scores, one clip or many groups.

What is drawn is read back from the figure; what matplotlib makes of it is only checked to be a picture with ink.
"""

import math
import sys

import numpy as np
import pytest
from tiny import random_predictions

from mmser.calibration import expected_calibration_error, reliability_bins
from mmser.groups import grouped_metrics
from mmser.metrics import confusion_matrix, softmax
from mmser.plots import (
    _save,
    plot_confusion_matrix,
    plot_group_bars,
    plot_open_set_roc,
    plot_oscr,
    plot_reliability,
    plot_risk_coverage,
    plot_score_histograms,
    plot_timeline,
)

matplotlib = pytest.importorskip("matplotlib")
DRAWS = True  # see the fixture `pictures`
LABEL_NAMES = ["neutral", "happy", "sad", "angry"]


def read_png(path):
    image = pytest.importorskip("PIL.Image")
    with image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"))


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures, save = [], _save

    def remember(figure, path, **options):
        figures.append(figure)
        return save(figure, path, **options)

    monkeypatch.setattr("mmser.plots._save", remember)
    return figures


def texts(figure):
    """Everything that is written in a figure: titles, labels, legends, numbers."""
    return " ".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


def test_plots_are_pictures_and_leave_matplotlib_alone(tmp_path):
    logits, labels = random_predictions(6)
    before, after = softmax(logits), softmax(logits / 3)
    predictions = logits.argmax(1)
    is_wrong = predictions != labels
    known, unknown = after.max(1), softmax(random_predictions(7)[0] / 5).max(1)
    scores, is_unknown = -np.concatenate([known, unknown]), np.repeat([0, 1], [len(known), len(unknown)])
    groups = grouped_metrics(predictions, labels, np.arange(len(labels)) % 3, LABEL_NAMES)
    matrix = confusion_matrix(predictions, labels, 4)
    folder = tmp_path / "new" / "folder"
    settings_before, pyplot_before = matplotlib.rcParams.copy(), "matplotlib.pyplot" in sys.modules
    paths = [
        plot_confusion_matrix(matrix, LABEL_NAMES, folder / "matrix.png"),
        plot_reliability({"before": before, "after": after}, labels, folder / "reliability.png"),
        plot_risk_coverage({"max softmax": (-known, is_wrong)}, str(folder / "risk_coverage.png")),
        plot_open_set_roc({"max softmax": (scores, is_unknown)}, folder / "roc.png"),
        plot_oscr({"max softmax": (known, ~is_wrong, unknown)}, folder / "oscr.png"),
        plot_score_histograms(-known, -unknown, folder / "histograms.png"),
        plot_group_bars(groups, folder / "groups.png", overall=0.6),
    ]
    assert matplotlib.rcParams.copy() == settings_before
    assert ("matplotlib.pyplot" in sys.modules) == pyplot_before
    assert len({path.name for path in paths}) == 7
    for path in paths:
        pixels = read_png(path)
        assert min(pixels.shape[:2]) >= 250, path.name
        # ink, and more than one colour: neither blank nor only axes
        colours = np.unique(pixels[::2, ::2].reshape(-1, 3), axis=0)
        saturated = (colours.max(1).astype(int) - colours.min(1)) > 60
        assert pixels.std() > 10 and saturated.any(), path.name


def test_plots_of_undefined_curves_say_so(tmp_path, drawn):
    scores, right = [0.1, 0.4, 0.4], [1, 0, 1]
    plot_oscr({"OpenMax": (scores, right, [])}, tmp_path / "oscr.png")
    plot_open_set_roc({"OpenMax": (scores, [0, 0, 0])}, tmp_path / "roc.png")
    assert all("takes\nknown and unknown clips" in texts(figure) for figure in drawn)
    assert "AUROC undefined" in texts(drawn[1]) and "OSCR undefined" in texts(drawn[0])
    paths = [
        plot_score_histograms(scores, [], tmp_path / "histograms.png"),
        plot_risk_coverage({"uncertainty": ([0.5], [0])}, tmp_path / "risk.png"),
        plot_confusion_matrix([[0, 0], [1, 2]], ["a", "b"], tmp_path / "matrix.png"),
        plot_reliability({"all": [[0.9, 0.1]]}, [0], tmp_path / "reliability.png"),
    ]
    for path in paths:
        assert read_png(path).std() > 5


def test_the_confusion_matrix_shows_shares_and_counts(tmp_path, drawn):
    plot_confusion_matrix([[3, 1], [0, 0]], ["calm", "excited"], tmp_path / "matrix.png")
    written = texts(drawn[0])
    assert "75%\n3" in written and "25%\n1" in written and "calm\n(4 clips)" in written
    assert "0%" not in written  # a class without clips has no shares
    assert drawn[0].axes[0].images[0].get_array().mask[1].all()


def test_error_bars_are_the_intervals(tmp_path, drawn):
    groups = {
        "en": {"count": 40, "weighted_f1": 0.5, "weighted_f1_interval": (0.4, 0.65)},
        "de": {"count": 3, "weighted_f1": 1.0, "weighted_f1_interval": (1.0, 1.0)},
        "none": {"count": 0, "weighted_f1": math.nan, "weighted_f1_interval": (math.nan, math.nan)},
        "fr": {"count": 50, "weighted_f1": 0.75},
    }
    plot_group_bars(groups, tmp_path / "bars.png", title="By language", overall=0.6)
    axes = drawn[0].axes[0]
    bars = [line.get_xdata().tolist() for line in axes.lines if line.get_marker() == "|"]
    assert bars == [[0.4, 0.65], [1.0, 1.0]]
    colours = [patch.get_facecolor() for patch in axes.patches]
    assert colours[0] == colours[3] != colours[1]  # a group of few clips is pale
    written = texts(drawn[0])
    for said in ("en (n = 40)", "0.50", "n/a", "By language", "all clips (0.60)", "weighted F1"):
        assert said in written, said


@pytest.mark.parametrize("number", [1, 2, 12])
def test_nothing_overlaps_in_the_bars(number, tmp_path, drawn):
    groups = {f"a group with a long name {i}": {"count": 10**i % 977, "weighted_f1": i / 12} for i in range(number)}
    plot_group_bars(groups, tmp_path / "bars.png", overall=0.5)
    figure = drawn[0]
    boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    boxes += [text.get_window_extent() for text in figure.axes[0].texts]
    boxes += [legend.get_window_extent() for legend in figure.legends] + [
        figure.axes[0].xaxis.label.get_window_extent()
    ]
    assert len(boxes) == 2 * number + 2
    for position, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:position])


@pytest.mark.parametrize("number", [1, 6])
def test_legends_are_outside_the_curves(number, tmp_path, drawn):
    scores, flags = np.linspace(0, 1, 20), np.arange(20) > 9
    names = [f"a method with quite a long name {i}" for i in range(number)]
    plot_open_set_roc({name: (scores, flags) for name in names}, tmp_path / "roc.png")
    plot_oscr({name: (scores, flags, scores) for name in names}, tmp_path / "oscr.png")
    plot_risk_coverage({name: (scores, flags) for name in names}, tmp_path / "risk.png")
    for figure in drawn:
        legend, axes = figure.legends[0].get_window_extent(), figure.axes[0]
        assert not legend.overlaps(axes.get_window_extent())
        assert not legend.overlaps(axes.xaxis.label.get_window_extent())
        styles = {(line.get_color(), str(line.get_linestyle())) for line in figure.legends[0].get_lines()[:number]}
        assert len(styles) == number


def test_the_points_of_the_reliability_diagram_are_its_bins(tmp_path, drawn):
    logits, labels = random_predictions(8)
    probabilities = softmax(logits)
    plot_reliability({"before": probabilities, "after": softmax(logits / 3)}, labels, tmp_path / "r.png")
    bins = reliability_bins(probabilities, labels)
    filled = bins.count > 0
    points = drawn[0].axes[0].collections[0].get_offsets()
    np.testing.assert_allclose(points, np.stack([bins.confidence[filled], bins.accuracy[filled]], axis=1))
    error = expected_calibration_error(probabilities, labels)
    assert f"before (ECE {error:.3f})" in texts(drawn[0])


def test_errors(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"`matrix` must hold counts"):
        plot_confusion_matrix([[1, 2]], ["a", "b"], tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"`methods` must map 1 to 6 names"):
        plot_oscr([0.1, 0.2], tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"`methods` must map 1 to 6 names"):
        plot_reliability({}, [0], tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"holds `weighted_f1`"):
        plot_group_bars({"en": {"count": 1}}, tmp_path / "x.png")
    with pytest.raises(ValueError, match="both empty"):
        plot_score_histograms([], [], tmp_path / "x.png")
    with pytest.raises(ValueError, match="`scores` must be finite, got nan at index 1"):
        plot_open_set_roc({"OpenMax": ([0.1, math.nan], [0, 1])}, tmp_path / "x.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install \.\[report\]"):
        plot_confusion_matrix([[1]], ["a"], tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_a_recording_is_drawn_over_time(tmp_path, drawn):
    """Each bar is as high as a score and as wide as its segment; above them is the answer."""
    times = [(0, 4), (4, 6), (3, 7.5)]
    scores = np.array([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1], [0.25] * 4])
    speakers = ["anna", "anna", "ben"]
    plot_timeline(times, scores, LABEL_NAMES, ["angry", "neutral", "unknown"], tmp_path / "x.png", speakers, "talk")
    (figure,) = drawn
    for axes, own in zip(figure.axes, ([0, 1], [2]), strict=True):
        bars = [bar for bar in axes.patches if bar.get_width()]
        stacked, answers = bars[: 4 * len(own)], bars[4 * len(own) :]
        assert [bar.get_height() for bar in stacked] == pytest.approx(scores[own].T.ravel().tolist())
        assert [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in answers] == [times[index] for index in own]
        assert min(bar.get_y() for bar in answers) > 1
        for index, answer in zip(own, answers, strict=True):
            label = ["angry", "neutral", None][index]
            same = [bar for bar in stacked if bar.get_facecolor() == answer.get_facecolor()]
            assert len(same) == (len(own) if label else 0)
    said = texts(figure)
    assert all(name in said for name in (*LABEL_NAMES, "none of these", "anna", "ben", "talk", "minutes:seconds"))
    plot_timeline([(0, 3700)], [[0.5, 0.5]], ["a", "b"], ["a"], tmp_path / "y.png")
    assert "hours" in texts(drawn[-1]) and "1:00:00" in texts(drawn[-1]) and "none of these" not in texts(drawn[-1])
    with pytest.raises(ValueError, match="a row for each segment"):
        plot_timeline(times, scores, LABEL_NAMES, ["angry"], tmp_path / "z.png")


def test_a_waveform_is_drawn_above_in_the_colours_of_the_answers(tmp_path, drawn):
    scores, wave = [[0.7, 0.3], [0.2, 0.8]], [(-0.1, 0.2), (-0.3, 0.4), (-0.5, 0.6), (-0.7, 0.8)]
    plot_timeline([(0, 1), (1, 4)], scores, ["a", "b"], ["a", "unknown"], tmp_path / "x.png", waveform=wave)
    top, panel = drawn[0].axes
    outlines = [np.concatenate([path.vertices for path in drawing.get_paths()]) for drawing in top.collections]
    assert [(shape[:, 0].min(), shape[:, 0].max()) for shape in outlines] == [(0, 1), (1, 4)]
    assert [(shape[:, 1].min(), shape[:, 1].max()) for shape in outlines] == [(-0.1, 0.2), (-0.7, 0.8)]
    bar = next(bar for bar in panel.patches if bar.get_width())
    first, second = (drawing.get_facecolor()[0].tolist() for drawing in top.collections)
    assert first == list(bar.get_facecolor()) != second
