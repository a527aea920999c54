# SPDX-License-Identifier: Apache-2.0
"""Tests of test-time augmentation: which clip and which pass an example is, and that it depends on nothing else."""

import pickle

import datasets
import numpy as np
import pytest
import soundfile
from torch.utils.data import DataLoader

from mmser.augmentation import Augmenter
from mmser.examples import EmotionDataset, TestTimeAugmentation

RATE = 16_000
FREQUENCIES = (300.0, 600.0, 1200.0, 2400.0, 4800.0)  # an octave apart: no speed turns one into another
PASSES = 4
ALWAYS = Augmenter(probability=1.0)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Five clips, each a sine of its own frequency, of 0.2, 0.25, ... s, and a row without audio."""
    folder = tmp_path_factory.mktemp("sines")
    rows: dict = {"audio": [], "text": [], "labels": [], "row": []}
    for index, frequency in enumerate(FREQUENCIES):
        time = np.arange(round((0.2 + 0.05 * index) * RATE)) / RATE
        path = folder / f"{index}.wav"
        soundfile.write(path, (0.5 * np.sin(2 * np.pi * frequency * time)).astype(np.float32), RATE, subtype="FLOAT")
        rows["audio"].append(str(path))
        rows["text"].append(f"text {index}")
        rows["labels"].append(index % 4)
    rows["audio"].append("")
    rows["text"].append("only text")
    rows["labels"].append(3)
    rows["row"] = [f"row {index}" for index in range(6)]
    return datasets.Dataset.from_dict(rows)


def identity(examples):
    return examples


def load(dataset, batch_size, num_workers=0, order=None):
    loader = DataLoader(dataset, batch_size, sampler=order, num_workers=num_workers, collate_fn=identity)
    return [example for batch in loader for example in batch]


def assert_same(examples, expected):
    assert len(examples) == len(expected)
    for example, other in zip(examples, expected, strict=True):
        np.testing.assert_equal(example, other)


def dominant_frequency(waveform):
    power = np.abs(np.fft.rfft(waveform * np.hanning(len(waveform)), 2**16))
    return power.argmax() * RATE / 2**16


@pytest.mark.parametrize("max_seconds", [None, 0.21])
def test_pass_0_is_the_clip_itself(table, max_seconds):
    plain = EmotionDataset(table, max_seconds=max_seconds)
    passes = TestTimeAugmentation(plain, PASSES, ALWAYS)
    assert len(passes) == len(table) * PASSES
    assert_same([passes[clip * PASSES] for clip in range(len(table))], [plain[clip] for clip in range(len(table))])
    assert_same(load(TestTimeAugmentation(plain, 1, ALWAYS), 4), load(plain, 4))


def test_all_passes_of_a_clip_are_of_that_clip_and_differ(table):
    examples = load(TestTimeAugmentation(EmotionDataset(table), PASSES, ALWAYS), 8)
    low, high = ALWAYS.speed_range
    speeds = []
    for clip, frequency in enumerate(FREQUENCIES):
        passes = examples[clip * PASSES : (clip + 1) * PASSES]
        assert {(example["labels"], example["text"]) for example in passes} == {(clip % 4, f"text {clip}")}
        assert len({example["audio"].tobytes() for example in passes}) == PASSES
        for example in passes:
            audio = example["audio"]
            speed = dominant_frequency(audio) / frequency
            assert audio.dtype == np.float32 and example["length"] == len(audio)
            assert low - 0.01 < speed < high + 0.01
            assert len(audio) == pytest.approx(len(passes[0]["audio"]) / speed, rel=0.02)  # it is the whole clip
            speeds.append(speed)
        assert speeds[clip * PASSES] == pytest.approx(1, abs=0.01)
    assert max(speeds) > 1.03 and min(speeds) < 0.97
    assert len({round(speed, 4) for speed in speeds}) > 0.7 * len(speeds)  # neither clips nor passes share a draw


def test_long_clips_are_cropped_before_and_after(table):
    slow = Augmenter(speed_range=(0.8, 0.8), probability=1.0)
    examples = load(TestTimeAugmentation(EmotionDataset(table, max_seconds=0.22), 3, slow), 6)
    # the first clip itself is shorter; slowed down, none may be longer
    assert [example["length"] for example in examples[:15]] == [3200, *[3520] * 14]
    assert all(example["length"] == len(example["audio"]) for example in examples[:15])


def test_examples_do_not_depend_on_order_workers_or_batches(table):
    passes = TestTimeAugmentation(EmotionDataset(table), PASSES, ALWAYS)
    expected = [passes[index] for index in range(len(passes))]
    assert_same(load(passes, 5), expected)
    assert_same(load(passes, 7, num_workers=2), expected)
    assert_same(load(pickle.loads(pickle.dumps(passes)), 24), expected)
    order = np.random.default_rng(0).permutation(len(passes)).tolist()
    assert_same(load(passes, 3, order=order), [expected[index] for index in order])
    np.testing.assert_equal(passes[-3], expected[-3])
    with pytest.raises(IndexError):
        passes[len(passes)]


def test_a_seed_repeats_and_another_differs(table):
    first, again, other = (
        load(TestTimeAugmentation(EmotionDataset(table), PASSES, ALWAYS, seed=seed), 8) for seed in (1, 1, 2)
    )
    assert_same(first, again)
    audio = [(a["audio"], b["audio"]) for a, b in zip(first, other, strict=True) if a["audio"] is not None]
    equal = [np.array_equal(a, b) for a, b in audio]
    assert equal == [index % PASSES == 0 for index in range(len(audio))]


def test_rows_without_audio_are_equal_in_all_passes(table):
    text_only = EmotionDataset(table, use_audio=False)
    passes = TestTimeAugmentation(text_only, 3, ALWAYS)
    assert_same([passes[index] for index in range(len(passes))], [text_only[i // 3] for i in range(len(passes))])
    assert passes.lengths == [0] * len(passes)
    mixed = TestTimeAugmentation(EmotionDataset(table), 3, ALWAYS)
    assert_same(load(mixed, 3)[15:], [{"labels": 3, "length": 0, "audio": None, "text": "only text"}] * 3)
    no_audio_column = TestTimeAugmentation(EmotionDataset(table.remove_columns("audio")), 2, ALWAYS)
    assert_same(load(no_audio_column, 4)[2:4], [{"labels": 1, "length": 0, "text": "text 1"}] * 2)


def test_lengths_repeat_those_of_the_clips(table):
    seconds = np.array([0.2, 0.25, 0.3, 0.35, 0.4, 0])
    passes = TestTimeAugmentation(EmotionDataset(table), 3, ALWAYS)
    assert passes.lengths == np.repeat(np.round(seconds * RATE), 3).tolist()


def test_each_clip_of_a_batch_is_decoded_once(table, monkeypatch):
    passes = TestTimeAugmentation(EmotionDataset(table), PASSES, ALWAYS)
    expected = load(passes, 1)
    decoded = []
    read = type(passes.dataset.reader)._waveform
    monkeypatch.setattr(
        type(passes.dataset.reader), "_waveform", lambda self, *rest: decoded.append(rest[0]) or read(self, *rest)
    )
    assert_same(load(passes, 8), expected)
    assert decoded == table["audio"][:5]


def test_average_over_the_passes_of_a_linear_model(table):
    """Scores of a fake model, in batches, equal those from augmenting each clip by hand."""
    weights = np.random.default_rng(3).standard_normal((2, 4))

    def logits(audio):
        return (
            np.array([np.sqrt(np.mean(np.square(audio, dtype=np.float64))), dominant_frequency(audio) / 1e3]) @ weights
        )

    table = table.select(range(5))
    examples = load(TestTimeAugmentation(EmotionDataset(table), PASSES, ALWAYS, seed=7), 6)
    averages = np.stack([logits(example["audio"]) for example in examples]).reshape(5, PASSES, 4).mean(axis=1)
    for clip, path in enumerate(table["audio"]):
        audio = soundfile.read(path, dtype="float32")[0]
        versions = [audio]
        for number in range(1, PASSES):
            versions.append(ALWAYS(audio, np.random.default_rng([7, number, clip])))
        np.testing.assert_allclose(averages[clip], sum(map(logits, versions)) / PASSES, rtol=1e-12)


def test_what_is_refused(table, tmp_path):
    clips = EmotionDataset(table)
    for bad in (0, -1, 2.0, "3"):
        with pytest.raises(ValueError, match=f"num_passes must be an integer of at least 1, got {bad!r}"):
            TestTimeAugmentation(clips, bad, ALWAYS)
    with pytest.raises(ValueError, match="training=True"):
        TestTimeAugmentation(EmotionDataset(table, training=True), 2, ALWAYS)
    with pytest.raises(TypeError, match="needs an EmotionDataset, got Dataset"):
        TestTimeAugmentation(table, 2, ALWAYS)
    (tmp_path / "bad.wav").write_bytes(b"this is not audio")
    broken = datasets.Dataset.from_dict({"audio": [str(tmp_path / "bad.wav")], "labels": [0], "row": ["row 1"]})
    for on_bad_example in ("error", "skip"):  # a clip left out would move all that follow
        passes = TestTimeAugmentation(EmotionDataset(broken, on_bad_example=on_bad_example), 2, ALWAYS)
        with pytest.raises(ValueError, match=r"row 1: audio '\S*bad.wav': cannot be read"):
            load(passes, 2)
