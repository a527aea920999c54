# SPDX-License-Identifier: Apache-2.0
"""Tests of mmser.distillation: cached logits are what the live teacher answers to the same batch."""

import numpy as np
import pytest
import torch
from tiny_corpus import tiny_model, tiny_processor

from mmser.augmentation import Augmenter
from mmser.batches import MMSERDataCollator
from mmser.caching import EncoderStateCache
from mmser.distillation import DistilledDataset, TeacherLogits
from mmser.examples import EmotionDataset
from mmser.loading import load_emotion_dataset

pytestmark = pytest.mark.usefixtures("quiet", "seeded")


@pytest.fixture(scope="module")
def clips(corpus):
    """Eight clips, one of them without its text, under the reader's names."""
    table = load_emotion_dataset(corpus)[0]["train"].select(range(8))
    texts = [text if index != 3 else "" for index, text in enumerate(table["text"])]
    return table.remove_columns("text").add_column("text", texts)


def frozen_model():
    model = tiny_model(dropout=False).eval()
    model.freeze_audio_encoder()
    model.freeze_text_encoder()
    return model


@pytest.fixture
def student():
    return frozen_model()


@pytest.fixture
def teacher(student):
    """Another model, whose calibration counts too."""
    teacher = frozen_model()
    teacher.temperature.fill_(1.7)
    return teacher


@torch.no_grad()
def live_logits(teacher, dataset, epoch):
    """What the teacher answers to the audio and the text themselves, one clip at a time."""
    dataset.set_epoch(epoch)
    collate = MMSERDataCollator(tiny_processor())
    batches = [collate([dataset[index]]) for index in range(len(dataset))]
    inputs = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
    return torch.cat([teacher(**each).logits for each in inputs]).numpy()


@pytest.mark.parametrize("augmented", [False, True])
def test_cached_logits_are_those_of_a_live_teacher(clips, student, teacher, tmp_path, augmented):
    """With the same augmentation and the same modality dropped, in each epoch of as many as there are copies."""
    options = {"training": True, "text_dropout": 0.4, "audio_dropout": 0.3}
    plain = EmotionDataset(clips, augmenter=Augmenter() if augmented else None, **options)
    states = EncoderStateCache(tmp_path, student, tiny_processor())
    dataset = DistilledDataset(plain, states, 2 * augmented, TeacherLogits(tmp_path, teacher, tiny_processor()))
    seen = []
    for epoch in range(2):
        expected = live_logits(teacher, plain, epoch)
        dataset.set_epoch(epoch)
        batch = MMSERDataCollator(tiny_processor())([dataset[index] for index in range(8)])
        np.testing.assert_allclose(batch["teacher_logits"].numpy(), expected, atol=2e-3)  # states in float16
        seen.append(expected)
        assert student(**batch).logits.shape == (8, 4)
    assert abs(seen[0] - seen[1]).max() > 0.01  # what is dropped and augmented differs


def test_logits_are_computed_once_and_for_each_teacher(clips, student, teacher, tmp_path, monkeypatch):
    plain = EmotionDataset(clips, training=True, text_dropout=0.5)

    def make(model):
        cache = EncoderStateCache(tmp_path, student, tiny_processor())
        return DistilledDataset(plain, cache, 0, TeacherLogits(tmp_path, model, tiny_processor()))._logits

    answers = []
    monkeypatch.setattr(TeacherLogits, "_answer", lambda *args, do=TeacherLogits._answer: answers.append(do(*args)))
    first = make(teacher)
    count = len(answers)
    np.testing.assert_array_equal(make(teacher), first)
    assert count and len(answers) == count
    with torch.no_grad():
        teacher.classifier.output.bias.add_(1.0)
    other = make(teacher)
    assert len(answers) > count
    np.testing.assert_allclose(other, first + 1 / 1.7, atol=1e-5)  # nan where a clip is never shown so


def test_states_of_the_teacher_that_are_there_are_used(clips, student, tmp_path, monkeypatch):
    """A teacher with the student's encoders needs no encoder at all; its logits are the same."""
    plain = EmotionDataset(clips)
    apart = TeacherLogits(tmp_path / "b", student, tiny_processor())
    expected = DistilledDataset(plain, EncoderStateCache(tmp_path / "a", student, tiny_processor()), 0, apart)._logits
    cache = EncoderStateCache(tmp_path / "a", student, tiny_processor())
    monkeypatch.setattr(EncoderStateCache, "encode", None)
    shared = TeacherLogits(tmp_path / "a", student, tiny_processor())
    np.testing.assert_array_equal(DistilledDataset(plain, cache, 0, shared)._logits, expected)
    assert not list((tmp_path / "b").glob("[at][ue][dx]*/*.safetensors"))  # no states are added


def test_a_clip_that_cannot_be_read_is_left_out(clips, student, teacher, tmp_path):
    paths = [path if index != 2 else __file__ for index, path in enumerate(clips["audio"])]
    broken = clips.remove_columns("audio").add_column("audio", paths)
    plain = EmotionDataset(broken, on_bad_example="skip")
    cache = EncoderStateCache(tmp_path, student, tiny_processor())
    dataset = DistilledDataset(plain, cache, 0, TeacherLogits(tmp_path, teacher, tiny_processor()))
    assert dataset[2] is None and dataset.num_skipped == 1
    assert np.isfinite(dataset[1]["teacher_logits"]).all()


def test_a_teacher_must_take_what_the_student_takes(clips, student, tmp_path):
    teacher = tiny_model(dropout=False)
    logits = TeacherLogits(tmp_path, teacher, tiny_processor())
    del logits.states.stores["text"]
    cache = EncoderStateCache(tmp_path, student, tiny_processor())
    with pytest.raises(ValueError, match="The teacher takes no text, but the model does"):
        DistilledDataset(EmotionDataset(clips), cache, 0, logits)
