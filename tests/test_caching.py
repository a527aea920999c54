# SPDX-License-Identifier: Apache-2.0
"""Tests of mmser.caching: cached and uncached runs agree, and what changed, was damaged or cut short is encoded anew.

The reference is always the run without a cache, and `safetensors` for the files.
"""

import json
import logging as python_logging
import multiprocessing
import pickle
import re
import shutil
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors
import soundfile
import torch
from tiny_corpus import AUDIO, RATE, tiny_model, tiny_processor, write_corpus
from torch.utils.data import DataLoader
from transformers.utils import logging

from mmser.augmentation import Augmenter
from mmser.batches import MMSERDataCollator
from mmser.caching import CachedStatesDataset, EncoderStateCache, StateStore
from mmser.examples import EmotionDataset, TestTimeAugmentation
from mmser.loading import load_emotion_dataset
from mmser.trainer import MMSERTrainer
from mmser.training_arguments import MMSERTrainingArguments

pytestmark = pytest.mark.usefixtures("seeded")
NOISY = {"training": True, "augmenter": Augmenter(), "max_seconds": 0.3, "text_dropout": 0.2, "audio_dropout": 0.2}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def splits(corpus):
    return load_emotion_dataset(corpus)[0]


@pytest.fixture
def log(caplog):
    logging.enable_propagation()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_info()
    with caplog.at_level(python_logging.INFO):
        yield caplog
    logging.set_verbosity(verbosity)
    logging.disable_propagation()


def frozen_model(kinds=("audio", "text"), **options):
    """Always with the same weights."""
    torch.manual_seed(0)
    model = tiny_model(dropout=False, **options).eval()
    for kind in kinds:
        getattr(model, f"freeze_{kind}_encoder")()
    return model


def make_cache(folder, model=None, **options):
    model = frozen_model() if model is None else model
    processor = tiny_processor(whisper=model.config.uses_log_mel)
    return EncoderStateCache(folder, model, processor, **{"dtype": "float32", **options})


@torch.no_grad()
def logits(model, dataset, **loader):
    collate = MMSERDataCollator(tiny_processor(whisper=model.config.uses_log_mel))
    batches = DataLoader(dataset, batch_size=5, collate_fn=collate, **loader)
    return torch.cat([model(**batch).logits for batch in batches])


def count_encoded(monkeypatch, fail_after=None):
    """The clips that any encoder sees from now on, as a list of batch sizes; `fail_after` batches it breaks off."""
    seen = []
    encode = EncoderStateCache.encode

    def count(self, kind, contents):
        if len(seen) == fail_after:
            raise KeyboardInterrupt
        seen.append(len(contents))
        return encode(self, kind, contents)

    monkeypatch.setattr(EncoderStateCache, "encode", count)
    return seen


# --- equal results ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whisper", [False, True], ids=["wav2vec2", "whisper"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 5e-3)])
def test_logits_are_those_of_the_uncached_model(splits, tmp_path, whisper, weighted, dtype, tolerance):
    model = frozen_model(whisper=whisper, use_weighted_layer_sum=weighted)
    dataset = EmotionDataset(splits["test"])
    cached = CachedStatesDataset(dataset, make_cache(tmp_path, model, dtype=dtype))
    expected = logits(model, dataset)
    torch.testing.assert_close(logits(model, cached), expected, atol=tolerance, rtol=tolerance)
    assert cached[0]["audio_states"].dtype == cached[0]["text_states"].dtype == dtype
    assert cached[0]["audio_states"].shape[1:] == ((2 if weighted else 1), 16)
    assert [cached[i]["length"] for i in range(len(cached))] == [len(row["audio"]) for row in dataset]
    assert cached.lengths == dataset.lengths and len(cached) == len(dataset)
    assert logits(model, TestTimeAugmentation(cached, 2, Augmenter())).shape == (2 * len(dataset), 4)  # from the files


@pytest.mark.parametrize("kind", ["audio", "text"])
def test_only_one_frozen_encoder(splits, tmp_path, kind):
    model = frozen_model([kind])
    cache = make_cache(tmp_path, model)
    other = {"audio": "text", "text": "audio"}[kind]
    for options in ({}, {**NOISY, "augmenter": None, "max_seconds": None}):
        dataset = EmotionDataset(splits["train"], **options)
        cached = CachedStatesDataset(dataset, cache)
        for epoch in range(2):
            for examples in (dataset, cached):
                examples.set_epoch(epoch)
            torch.testing.assert_close(logits(model, cached), logits(model, dataset), atol=1e-5, rtol=1e-5)
    assert set(cached[0]) == {f"{kind}_states", other, "labels", "length"}


def test_raw_audio_beside_text_states_is_augmented_as_ever(splits, tmp_path):
    dataset = EmotionDataset(splits["train"], **NOISY)
    cached = CachedStatesDataset(dataset, make_cache(tmp_path, frozen_model(["text"])))
    for epoch in (0, 3):
        for examples in (dataset, cached):
            examples.set_epoch(epoch)
        for plain, example in zip(dataset, cached, strict=True):
            np.testing.assert_array_equal(plain["audio"], example["audio"])
            assert (plain["text"] is None) == (len(example["text_states"]) == 0)
            assert plain["length"] == example["length"]


def test_modalities_are_dropped_as_in_the_uncached_data_set(splits, tmp_path):
    options = {"training": True, "text_dropout": 0.3, "audio_dropout": 0.3, "seed": 7}
    dataset = EmotionDataset(splits["train"], **options)
    cached = CachedStatesDataset(dataset, make_cache(tmp_path))
    dropped = []
    for epoch in range(4):
        for examples in (dataset, cached):
            examples.set_epoch(epoch)
        for plain, example in zip(dataset, cached, strict=True):
            assert (plain["audio"] is None) == (len(example["audio_states"]) == 0)
            assert (plain["text"] is None) == (len(example["text_states"]) == 0)
            assert plain["length"] == example["length"]
            dropped.append(plain["audio"] is None)
    assert 0.1 < np.mean(dropped) < 0.5


@pytest.mark.parametrize("copies", [0, 3])
def test_training_is_that_of_the_uncached_data_set(splits, tmp_path, copies):
    options = {**NOISY, **({} if copies else {"augmenter": None, "max_seconds": None})}
    dataset = EmotionDataset(splits["train"].select(range(24)), **options)
    curves = []
    for use_cache in (False, True):
        model = frozen_model()
        examples = dataset
        if use_cache:
            examples = CachedStatesDataset(dataset, make_cache(tmp_path / "cache", model), copies)
        arguments = MMSERTrainingArguments(
            output_dir=str(tmp_path / "run"),
            use_cpu=True,
            disable_tqdm=True,
            dataloader_num_workers=2 if use_cache else 0,
            dataloader_persistent_workers=use_cache,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            logging_steps=1,
            num_train_epochs=3,
            save_strategy="no",
            eval_strategy="no",
        )
        collator = MMSERDataCollator(tiny_processor())
        trainer = MMSERTrainer(model=model, args=arguments, train_dataset=examples, data_collator=collator)
        trainer.train()
        curves.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert len(curves[0]) == 9 and len(set(curves[0])) == 9
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-3)


def test_copies_are_used_in_turn_and_differ(splits, tmp_path):
    options = {**NOISY, "augmenter": Augmenter(probability=1.0), "text_dropout": 0.0, "audio_dropout": 0.0}
    cached = CachedStatesDataset(EmotionDataset(splits["validation"], **options), make_cache(tmp_path), 2)
    epochs = []
    for epoch in range(4):
        cached.set_epoch(epoch)
        epochs.append(cached[0]["audio_states"])
    np.testing.assert_array_equal(epochs[0], epochs[2])
    np.testing.assert_array_equal(epochs[1], epochs[3])
    assert epochs[0].shape != epochs[1].shape or not np.array_equal(epochs[0], epochs[1])


def test_without_copies_training_reads_the_middle_of_the_clips(splits, tmp_path, monkeypatch):
    cache = make_cache(tmp_path)
    plain = CachedStatesDataset(EmotionDataset(splits["validation"], max_seconds=0.25), cache)
    seen = count_encoded(monkeypatch)
    cached = CachedStatesDataset(EmotionDataset(splits["validation"], **{**NOISY, "max_seconds": 0.25}), cache)
    assert not seen
    cached.set_epoch(2)
    example = next(example for example in cached if len(example["audio_states"]) and example["length"] == 4000)
    assert any(np.array_equal(example["audio_states"], other["audio_states"]) for other in plain)


# --- missing and hidden modalities, bad clips ------------------------------------------------------------------------


def test_missing_modalities(corpus, splits, tmp_path):
    folder = tmp_path / "corpus"
    shutil.copytree(corpus, folder)
    rows = (folder / "test" / "metadata.csv").read_text(encoding="utf-8").splitlines()
    for line in (1, 2):
        name, label, text, *rest = rows[line].split(",")
        rows[line] = ",".join([name, label, "", *rest] if line == 1 else ["", label, text, *rest])
    (folder / "test" / "metadata.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    model = frozen_model()
    cache = make_cache(tmp_path / "cache", model)
    dataset = EmotionDataset(load_emotion_dataset(folder)[0]["test"])
    cached = CachedStatesDataset(dataset, cache)
    torch.testing.assert_close(logits(model, cached), logits(model, dataset), atol=1e-5, rtol=1e-5)
    assert [len(cached[0]["text_states"]), len(cached[1]["audio_states"])] == [0, 0]
    collator = MMSERDataCollator(tiny_processor())
    batches = [collator([cached[index]]) for index in (0, 1, 2)]
    assert {frozenset(batch) for batch in batches} == {
        frozenset(["audio_states", "attention_mask", "text_states", "text_attention_mask", "labels"])
    }
    assert batches[0]["text_states"].shape == (1, 1, 16) and not batches[0]["text_attention_mask"].any()
    assert batches[1]["audio_states"].shape == (1, 1, 2, 16) and not batches[1]["attention_mask"].any()


def test_no_clips(splits, tmp_path):
    assert len(CachedStatesDataset(EmotionDataset(splits["test"].select([])), make_cache(tmp_path))) == 0


@pytest.mark.parametrize("hidden", ["use_audio", "use_text"])
def test_hidden_modality_needs_no_new_states(splits, tmp_path, hidden, monkeypatch):
    model = frozen_model()
    cache = make_cache(tmp_path, model)
    CachedStatesDataset(EmotionDataset(splits["test"]), cache)
    seen = count_encoded(monkeypatch)
    dataset = EmotionDataset(splits["test"], **{hidden: False})
    cached = CachedStatesDataset(dataset, cache)
    assert not seen
    torch.testing.assert_close(logits(model, cached), logits(model, dataset), atol=1e-5, rtol=1e-5)
    assert len(cached[0]["audio_states" if hidden == "use_audio" else "text_states"]) == 0
    both = CachedStatesDataset(EmotionDataset(splits["test"], use_audio=False, use_text=False), cache)
    with pytest.raises(ValueError, match=r"test/metadata.csv row 2 has neither audio nor text"):
        both[0]


def test_audio_or_text_alone(splits, tmp_path):
    model = frozen_model()
    for column in ("audio", "text"):
        split = splits["test"].remove_columns(column)
        dataset = EmotionDataset(split)
        cached = CachedStatesDataset(dataset, make_cache(tmp_path, model))
        assert f"{column}_states" not in cached[0] and column not in cached[0]
        torch.testing.assert_close(logits(model, cached), logits(model, dataset), atol=1e-5, rtol=1e-5)


def test_unreadable_clips_are_skipped_or_named(corpus, tmp_path, log):
    folder = tmp_path / "corpus"
    shutil.copytree(corpus, folder)
    (folder / "test" / "5_1.wav").write_bytes(b"nothing")
    soundfile.write(folder / "test" / "5_3.wav", np.zeros(10), RATE)
    split = load_emotion_dataset(folder)[0]["test"]
    model = frozen_model()
    cache = make_cache(tmp_path / "cache", model)
    with pytest.raises(ValueError, match=r"test/metadata.csv row 3: audio '\S*5_1.wav': cannot be read"):
        CachedStatesDataset(EmotionDataset(split), cache)
    dataset = EmotionDataset(split, on_bad_example="skip")
    cached = CachedStatesDataset(dataset, cache)
    assert cached[1] is None and cached[3] is None
    assert cached.num_skipped == 2 and cached.skipped.nonzero()[0].tolist() == [1, 3]
    assert len(cached.__getitems__([0, 1, 2, 3])) == 2
    assert len(cached.__getitems__([1])) == 1  # the next good one
    torch.testing.assert_close(logits(model, cached), logits(model, dataset), atol=1e-5, rtol=1e-5)
    assert "5_3.wav is too short" in log.text


# --- reuse and what prevents it --------------------------------------------------------------------------------------


def test_second_run_encodes_nothing_and_says_so(splits, tmp_path, monkeypatch, log):
    first = CachedStatesDataset(EmotionDataset(splits["test"]), make_cache(tmp_path))
    assert "16 of audio encoded, 0 reused" in log.text and "4 of text encoded, 0 reused" in log.text
    log.clear()
    seen = count_encoded(monkeypatch)
    model = frozen_model()
    with torch.no_grad():  # what comes after the encoders does not matter
        for parameter in (*model.classifier.parameters(), *model.mmser.fusion.parameters()):
            parameter.add_(1)
    second = CachedStatesDataset(EmotionDataset(splits["test"]), make_cache(tmp_path, model))
    assert not seen and "0 of audio encoded, 16 reused" in log.text
    log.clear()
    cache = make_cache(tmp_path, model)
    for _ in range(3):
        CachedStatesDataset(EmotionDataset(splits["test"]), cache)
    assert log.text.count("16 reused") == 1, "a run looks at its clips several times, and says so once"
    np.testing.assert_array_equal(first[3]["audio_states"], second[3]["audio_states"])


def test_a_changed_file_is_encoded_anew(corpus, tmp_path, monkeypatch):
    folder = tmp_path / "corpus"
    shutil.copytree(corpus, folder)
    dataset = EmotionDataset(load_emotion_dataset(folder)[0]["test"])
    model = frozen_model()
    cache = make_cache(tmp_path / "cache", model)
    before = CachedStatesDataset(dataset, cache)[2]["audio_states"].copy()
    samples, _ = soundfile.read(folder / "test" / "5_2.wav")
    soundfile.write(folder / "test" / "5_2.wav", samples[::-1], RATE)
    seen = count_encoded(monkeypatch)
    cached = CachedStatesDataset(dataset, cache)
    assert seen == [1] and not np.allclose(before, cached[2]["audio_states"])
    torch.testing.assert_close(logits(model, cached), logits(model, dataset), atol=1e-5, rtol=1e-5)


def test_another_encoder_has_another_folder(tmp_path):
    def folders(change=None, processor_change=None, **options):
        model = frozen_model()
        processor = tiny_processor()
        if change:
            change(model.mmser)
        if processor_change:
            processor_change(processor)
        cache = EncoderStateCache(tmp_path, model, processor, **options)
        return [store.folder.name for store in cache.stores.values()]

    def nudge(tensor):
        with torch.no_grad():
            tensor.flatten()[-1] += 1e-3

    audio, text = folders()
    assert folders() == [audio, text]
    used = tiny_processor()
    used(text=["what a joy", "stop"], max_length=3)  # leaves its settings in the tokenizer
    assert folders(processor_change=lambda processor: setattr(processor, "tokenizer", used.tokenizer)) == [audio, text]
    changed = folders(lambda model: nudge(model.audio_encoder.encoder.layers[0].final_layer_norm.bias))
    assert changed[0] != audio and changed[1] == text
    changed = folders(lambda model: nudge(model.text_encoder.embeddings.word_embeddings.weight))
    assert changed[0] == audio and changed[1] != text
    buffer = folders(lambda model: model.text_encoder.register_buffer("extra", torch.ones(1)))
    assert buffer[1] != text
    config = folders(lambda model: setattr(model.audio_encoder.config, "layer_norm_eps", 1e-3))
    assert config[0] != audio
    extractor = folders(processor_change=lambda processor: setattr(processor.feature_extractor, "do_normalize", False))
    assert extractor[0] != audio and extractor[1] == text
    tokenizer = folders(processor_change=lambda processor: processor.tokenizer.add_tokens(["joyful"]))
    assert tokenizer[0] == audio and tokenizer[1] != text
    shorter = folders(processor_change=lambda processor: setattr(processor.tokenizer, "model_max_length", 5))
    assert shorter[1] != text
    for options in ({"dtype": "float32"}, {"autocast": torch.bfloat16}):
        assert not {audio, text} & set(folders(**options))


def test_another_augmentation_is_another_copy(splits, tmp_path, monkeypatch):
    cache = make_cache(tmp_path)
    split = splits["validation"]

    def encoded(copies=1, **options):
        seen = count_encoded(monkeypatch)
        options = {"seed": 0, **NOISY, **options}
        CachedStatesDataset(EmotionDataset(split, **options), cache, copies)
        monkeypatch.undo()
        return sum(seen)

    num_texts = 4
    assert encoded() == len(split) + num_texts
    assert encoded() == 0
    assert encoded(copies=2) == len(split)  # the first copy is there
    assert encoded(text_dropout=0.5) == 0  # drawn on reading
    assert encoded(augmenter=Augmenter(probability=0.4)) == len(split)
    assert encoded(seed=1) == len(split)
    assert encoded(max_seconds=0.28) == len(split)
    assert encoded(augmenter=None) == len(split)  # cropped at random, but not augmented


def test_what_cannot_be_kept_is_refused(splits, tmp_path):
    with pytest.raises(ValueError, match="freeze one or both"):
        make_cache(tmp_path, tiny_model())
    with pytest.raises(ValueError, match='must be "float16" or "float32", got \'int8\''):
        make_cache(tmp_path, dtype="int8")
    cache = make_cache(tmp_path)
    with pytest.raises(ValueError, match="augmented_copies must be at least 0, got -1"):
        CachedStatesDataset(EmotionDataset(splits["test"]), cache, -1)
    with pytest.raises(ValueError, match="16000 Hz, the data set has 8000 Hz"):
        CachedStatesDataset(EmotionDataset(splits["test"], sampling_rate=8000), cache)
    with pytest.raises(TypeError, match="EmotionDataset, got list"):
        CachedStatesDataset([], cache)


@pytest.mark.parametrize(("value", "message"), [(1e5, r'float16 ends at 65504: use dtype="float32"'), (np.nan, "NaN")])
def test_states_that_do_not_fit_name_the_clip(splits, tmp_path, value, message):
    model = frozen_model()
    with torch.no_grad():
        model.mmser.audio_encoder.encoder.layer_norm.bias[0] = value
    cache = make_cache(tmp_path, model, dtype="float16")
    with pytest.raises(ValueError, match=rf"^test/metadata.csv row \d+: .*{message}"):
        CachedStatesDataset(EmotionDataset(splits["test"]), cache)
    if np.isfinite(value):
        cached = CachedStatesDataset(EmotionDataset(splits["test"]), make_cache(tmp_path, model))
        assert cached[0]["audio_states"].max() > 9e4


# --- files -----------------------------------------------------------------------------------------------------------


def shards(folder, kind="audio"):
    return sorted(folder.glob(f"{kind}-*/*.safetensors"))


def test_the_size_is_told_and_the_disk_looked_at_before_anything_is_written(splits, tmp_path, log, monkeypatch):
    def encode(folder):
        cache = EncoderStateCache(tmp_path / folder, frozen_model(["audio"]), tiny_processor(), batch_seconds=2)
        CachedStatesDataset(EmotionDataset(splits["train"], **NOISY), cache, augmented_copies=3)
        return cache.stores["audio"].num_bytes()

    size = encode("enough")
    assert re.search(r"The states of 96 audio clips take about \d+ MB in .*enough", log.text)
    monkeypatch.setattr("mmser.caching.shutil.disk_usage", lambda _: SimpleNamespace(free=1.25 * size))
    assert encode("just_enough") == size
    monkeypatch.setattr("mmser.caching.shutil.disk_usage", lambda _: SimpleNamespace(free=0.75 * size))
    with pytest.raises(ValueError, match=r"of 96 audio clips take about .* GB, .*audio-.* has only .* left.*copies"):
        encode("too_small")
    assert not list((tmp_path / "too_small").rglob("*.safetensors"))


def test_files_are_small_and_readable_by_safetensors(splits, tmp_path):
    cached = CachedStatesDataset(EmotionDataset(splits["test"]), make_cache(tmp_path, shard_bytes=4000))
    assert len(shards(tmp_path)) > 3
    total = 0
    for path in shards(tmp_path):
        with safetensors.safe_open(path, "np") as file:
            states, index = file.get_tensor("states"), json.loads(file.metadata()["index"])
        assert states.nbytes <= 4000 or len(index) == 1
        assert sum(rows for _, rows, _ in index.values()) == len(states)
        total += len(states)
    assert total == sum(len(example["audio_states"]) for example in cached)
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("damage", ["flip", "header", "cut", "empty", "zeros"])
def test_damaged_file_is_found_out_and_replaced(splits, tmp_path, monkeypatch, log, damage):
    model = frozen_model()
    dataset = EmotionDataset(splits["test"])
    CachedStatesDataset(dataset, make_cache(tmp_path, model, shard_bytes=4000))
    before = shards(tmp_path)
    victim = before[1]
    content = bytearray(victim.read_bytes())
    if damage == "flip":
        content[-7] ^= 1
    elif damage == "header":
        content[20] ^= 1
    elif damage == "zeros":
        content = bytearray(len(content))
    victim.write_bytes(content[: {"cut": len(content) // 2, "empty": 0}.get(damage, len(content))])
    seen = count_encoded(monkeypatch)
    cached = CachedStatesDataset(dataset, make_cache(tmp_path, model, shard_bytes=4000))
    assert f"{victim.name} is damaged" in log.text
    assert 0 < sum(seen) < 16
    torch.testing.assert_close(logits(model, cached), logits(model, dataset), atol=1e-5, rtol=1e-5)
    log.clear()
    CachedStatesDataset(dataset, make_cache(tmp_path, model, shard_bytes=4000))
    assert "damaged" not in log.text and "16 reused" in log.text


def test_interrupted_build_goes_on_where_it_was(splits, tmp_path, monkeypatch):
    model = frozen_model()
    dataset = EmotionDataset(splits["test"])
    options = {"batch_seconds": 1.0, "shard_bytes": 4000}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        done = count_encoded(patch, fail_after=3)
        CachedStatesDataset(dataset, make_cache(tmp_path, model, **options))
    next(tmp_path.glob("audio-*")).joinpath("killed.tmp").write_bytes(b"half a file")
    seen = count_encoded(monkeypatch)
    cached = CachedStatesDataset(dataset, make_cache(tmp_path, model, **options))
    assert len(done) == 3 and sum(done) + sum(seen) == 16 + 4
    torch.testing.assert_close(logits(model, cached), logits(model, dataset), atol=1e-5, rtol=1e-5)


def write_until_killed(folder):
    import resource

    store = StateStore(folder, (2,), "float32", 10**6)
    store.add("key", np.zeros((1000, 2)), 1, "a clip")
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    store.flush()


@pytest.mark.skipif(sys.platform == "win32", reason="there is no limit on files that kills")
def test_nothing_is_left_of_a_process_that_was_killed_while_it_wrote(tmp_path):
    """Nor what safetensors writes under a name of its own."""
    killed = multiprocessing.get_context("fork").Process(target=write_until_killed, args=(tmp_path,))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGXFSZ and list(tmp_path.iterdir())
    store = StateStore(tmp_path, (2,), "float32", 10**6)
    assert not list(tmp_path.iterdir())
    store.add("key", np.zeros((1000, 2)), 1, "a clip")
    store.flush()
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"] and store.find(["key"])


def test_two_at_once(splits, tmp_path, monkeypatch):
    models = [frozen_model(), frozen_model()]
    dataset = EmotionDataset(splits["test"])
    results = {}

    def build(number):
        cache = make_cache(tmp_path, models[number], shard_bytes=4000, batch_seconds=(1.0, 0.7)[number])
        results[number] = CachedStatesDataset(dataset, cache)

    threads = [threading.Thread(target=build, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen = count_encoded(monkeypatch)
    results[2] = CachedStatesDataset(dataset, make_cache(tmp_path, models[0]))
    assert not seen
    expected = logits(models[0], dataset)
    for cached in results.values():
        torch.testing.assert_close(logits(models[0], cached), expected, atol=1e-5, rtol=1e-5)


def test_batches_are_bounded_and_of_similar_length(splits, tmp_path, monkeypatch):
    lengths = []
    encode = EncoderStateCache.encode

    def record(self, kind, contents):
        if kind == "audio":
            lengths.append([len(content) for content in contents])
        return encode(self, kind, contents)

    monkeypatch.setattr(EncoderStateCache, "encode", record)
    CachedStatesDataset(EmotionDataset(splits["train"]), make_cache(tmp_path, batch_seconds=1.5))
    assert all(len(batch) * max(batch) <= 1.5 * RATE for batch in lengths)
    together = [length for batch in lengths for length in batch]
    assert together == sorted(together, reverse=True) and len(together) == 32


def test_workers_map_the_files_themselves(splits, tmp_path):
    model = frozen_model()
    cached = CachedStatesDataset(EmotionDataset(splits["train"]), make_cache(tmp_path, model))
    expected = logits(model, cached)  # the files are mapped now
    torch.testing.assert_close(logits(model, cached, num_workers=2), expected, atol=0, rtol=0)
    sent = pickle.dumps(cached.stores)
    assert len(sent) < 2000 < sum(path.stat().st_size for path in shards(tmp_path))
    cached.stores = pickle.loads(sent)  # as a spawned worker gets it
    torch.testing.assert_close(logits(model, cached), expected, atol=0, rtol=0)
    assert not cached[0]["audio_states"].flags.writeable
    maps = Path("/proc/self/maps")
    assert not maps.exists() or all(str(path) in maps.read_text(encoding="utf-8") for path in shards(tmp_path))


def test_files_are_verified_once(splits, tmp_path, monkeypatch):
    CachedStatesDataset(EmotionDataset(splits["test"]), make_cache(tmp_path))
    verified = []
    checksum = StateStore._checksum_of
    monkeypatch.setattr(
        StateStore, "_checksum_of", lambda self, shard: verified.append(shard) or checksum(self, shard)
    )
    cache = make_cache(tmp_path)
    for _ in range(3):
        CachedStatesDataset(EmotionDataset(splits["test"]), cache)
    assert len(verified) == len(shards(tmp_path)) + len(shards(tmp_path, "text")) == 2


@pytest.mark.parametrize("whisper", [False, True], ids=["wav2vec2", "whisper"])
def test_mixed_precision_is_that_of_the_encoders_not_of_the_features(splits, tmp_path, whisper, monkeypatch):
    # torch 2.13 computes a bf16 convolution of a clip alone wrongly on processors with AMX, below 32 channels
    monkeypatch.setitem(AUDIO, "conv_dim", [32, 32])
    model = frozen_model(whisper=whisper)
    dataset = EmotionDataset(splits["test"])
    cached = CachedStatesDataset(dataset, make_cache(tmp_path, model, autocast=torch.bfloat16))
    collate = MMSERDataCollator(tiny_processor(whisper=whisper))  # as in training: outside of autocast
    batches = list(DataLoader(dataset, batch_size=5, collate_fn=collate))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = torch.cat([model(**batch).logits for batch in batches])
    torch.testing.assert_close(logits(model, cached), expected.float(), atol=0.05, rtol=0.05)
