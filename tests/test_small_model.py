# SPDX-License-Identifier: Apache-2.0
"""Tests of `benchmarks/small_model.py`: who trains and who tests, and the scores of its table."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, roc_auc_score
from tiny_corpus import NAMES, tiny_model, tiny_processor, write_corpus, write_table

from benchmarks import small_model
from mmser.loading import load_emotion_dataset
from processing_mmser import MMSERPipeline

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Sixteen speakers to train on, one to test on; each speaks both corpora."""
    return write_corpus(tmp_path_factory.mktemp("wide"), train=range(10, 22))


@pytest.fixture
def options(wide, tmp_path, monkeypatch):
    monkeypatch.setattr(small_model, "SPEECH", "sine")
    texts = tmp_path / "texts"
    texts.mkdir()
    write_table(texts / "test.csv", [{"transcription": f"word {n}", "label": NAMES[n % 4]} for n in range(8)])
    data = SimpleNamespace(wide_dir=str(wide), text_dir=str(texts), data_dir=str(wide), splits=["test"])
    return SimpleNamespace(**vars(data), work_dir=tmp_path / "work")


def test_one_corpus_is_divided_by_speaker(options, wide):
    splits = load_emotion_dataset(small_model.write_speech(options.wide_dir, options.work_dir / "speech"))[0]
    given = load_emotion_dataset(str(wide))[0]
    speakers = {name: set(split["speaker"]) for name, split in splits.items()}
    assert speakers["test"] == set(given["validation"]["speaker"])
    assert len(speakers["validation"]) == 2 and len(speakers["train"]) == 14  # every tenth of sixteen
    assert not speakers["train"] & speakers["validation"]
    clips = sorted(clip for split in splits.values() for clip in split["audio"])
    sine = [row for name in ("train", "validation") for row in given[name] if row["corpus"] == "sine"]
    assert clips == sorted(row["audio"] for row in sine)


def test_the_table_has_the_scores_of_the_pipeline(options, tmp_path):
    small_model.write_speech(options.wide_dir, options.work_dir / "speech")
    sets = small_model.test_sets(options)
    assert list(sets) == [small_model.NEW_SPEAKERS, small_model.BOTH, "sine", "tone", small_model.WORDS]
    assert all(clip.keys() == {"path", "text", "labels"} for clip in sets[small_model.BOTH])
    torch.manual_seed(0)
    model, processor = tiny_model(dropout=False, use_openmax=False), tiny_processor()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    places = small_model.clips_of_a_place(options.data_dir)
    assert places.keys() == {"sine", "tone"}
    assert not {path for own in places.values() for path in own} & {clip.get("path") for clip in sets["tone"]}
    rows = {row["tested on"]: row for row in small_model.judge(tmp_path / "model", sets, {"tone": places["tone"]})}
    classify, uncertainty = MMSERPipeline(model, processor=processor, device="cpu"), {}
    for name, clips in sets.items():
        inputs = [{key: clip[key] for key in clip if key != "labels"} for clip in clips]
        answers = classify(inputs, top_k=1, return_uncertainty=True)
        found, true = [NAMES.index(own[0]["label"]) for own in answers], [clip["labels"] for clip in clips]
        assert rows[name]["weighted F1"] == pytest.approx(f1_score(true, found, average="weighted", zero_division=0))
        uncertainty[name] = [own[0]["uncertainty"] for own in answers]
        assert rows[name]["uncertainty"] == pytest.approx(np.mean(uncertainty[name]), abs=1e-6)
    assert list(rows)[-2:] == ["mean of 2 corpora never heard", small_model.WORDS]
    known = uncertainty[small_model.NEW_SPEAKERS]
    is_new = [False] * len(known) + [True] * len(uncertainty["tone"])
    expected = roc_auc_score(is_new, known + uncertainty["tone"])
    assert rows["tone"]["more uncertain (AUROC)"] == pytest.approx(expected, abs=0.02)  # batches round differently
    mean = rows["mean of 2 corpora never heard"]
    assert mean["ECE"] == pytest.approx((rows["sine"]["ECE"] + rows["tone"]["ECE"]) / 2)
    adapted = MMSERPipeline(copy.deepcopy(model), processor=processor, device="cpu")
    adapted.adapt_to(places["tone"])
    found = [NAMES.index(own[0]["label"]) for own in adapted([clip["path"] for clip in sets["tone"]], top_k=1)]
    expected = f1_score([clip["labels"] for clip in sets["tone"]], found, average="weighted", zero_division=0)
    assert rows["tone"]["adapted: weighted F1"] == pytest.approx(expected)
    assert "adapted: weighted F1" not in rows["sine"]
    assert all(clip["text"].startswith("word") and "path" not in clip for clip in sets[small_model.WORDS])
