# SPDX-License-Identifier: Apache-2.0
"""Tests of `mmser.stream`: the events of a stream are what the pipeline says of the recording, however it comes.

The model is tiny, and its every weight matters. "Speech" is noise that is much louder than what is around it.
"""

import pickle
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies
from tiny import fit_openmax_by_chance, tiny_model
from tiny_corpus import tiny_processor
from transformers import AudioClassificationPipeline, Wav2Vec2Config, Wav2Vec2ForSequenceClassification

import mmser
from mmser.stream import MMSERStream, StreamEvent
from processing_mmser import MMSERPipeline

CHUNKS = {"chunk_length_s": 1.0, "stride_length_s": (0.1, 0.2)}  # pieces of 0.7 s, the first of 0.8 s
SAME = 1e-5  # between scores of the stream and of the pipeline
RATES = (8000, 16000, 44100)


@pytest.fixture(scope="module")
def classifier():
    model = tiny_model()
    fit_openmax_by_chance(model)
    return MMSERPipeline(model=model, processor=tiny_processor(), device="cpu", task="audio-classification")


def recording(rate, seconds=4.3, loud=((0.9, 1.3), (3.2, 3.4))):
    """Faint noise, with loud noise at some times. (time,), float32"""
    samples = 3e-4 * np.random.default_rng(0).standard_normal(round(seconds * rate))
    for start, stop in loud:
        samples[round(start * rate) : round(stop * rate)] *= 500
    return samples.astype(np.float32)


def run(stream, blocks):
    return [event for block in blocks for event in stream.push(block)] + stream.flush()


# ---- the same as the pipeline


@pytest.mark.parametrize("rate", RATES)
def test_events_have_the_times_and_scores_of_the_pipeline(classifier, rate):
    samples = recording(rate)
    whole = classifier({"raw": samples, "sampling_rate": rate}, return_uncertainty=True, **CHUNKS)["chunks"]
    stream = MMSERStream(classifier, sampling_rate=rate, skip_silence=False, **CHUNKS)
    events = run(stream, np.array_split(samples, 50))
    assert [(event.start, event.end) for event in events] == [chunk["timestamp"] for chunk in whole]
    assert len(events) == 6
    for event, chunk in zip(events, whole, strict=True):
        assert event.scores == pytest.approx({one["label"]: one["score"] for one in chunk["scores"]}, abs=SAME)
        assert list(event.scores.values()) == sorted(event.scores.values(), reverse=True)
        assert event.label == chunk["scores"][0]["label"]
        for name in ("uncertainty", "unknown_probability", "is_unknown"):
            assert getattr(event, name) == pytest.approx(chunk["scores"][0][name], abs=SAME)
    assert max(max(event.scores.values()) for event in events) - min(event.scores["sad"] for event in events) > 0.1


def test_pieces_without_speech_are_not_classified_and_the_others_are_the_same(classifier):
    rate, samples = 16000, recording(16000)
    every = run(MMSERStream(classifier, sampling_rate=rate, skip_silence=False, **CHUNKS), [samples])
    events = run(MMSERStream(classifier, sampling_rate=rate, **CHUNKS), [samples])
    # It is loud at 0.9 to 1.3 s and at 3.2 to 3.4 s; 0.1 s before and 0.3 s after that count too
    assert [event.has_speech for event in events] == [False, True, True, False, True, True]
    for event, other in zip(events, every, strict=True):
        if event.has_speech:
            assert event == other and event.scores
        else:
            assert event == StreamEvent(other.start, other.end, 0.0)
            assert (event.label, event.is_unknown, event.scores) == (None, None, {})
    assert sum(event.speech for event in events) == pytest.approx(0.6 + 2 * 0.4, abs=0.09)
    assert all(0 <= event.speech <= event.end - event.start + 1e-9 for event in events)


def test_a_stream_starts_from_a_model_and_its_processor(classifier, tmp_path):
    samples = recording(16000)
    expected = run(MMSERStream(classifier, sampling_rate=16000, **CHUNKS), [samples])
    stream = MMSERStream(classifier.model, classifier.processor, sampling_rate=16000, **CHUNKS)
    assert run(stream, [samples]) == expected
    classifier.save_pretrained(tmp_path)
    saved = type(classifier.model).from_pretrained(tmp_path)
    beside = run(MMSERStream(saved, sampling_rate=16000, **CHUNKS), [samples])
    for event, other in zip(beside, expected, strict=True):
        assert event.scores == pytest.approx(other.scores, abs=SAME)


# ---- however it comes


@settings(max_examples=10, deadline=None)
@given(
    cuts=strategies.lists(strategies.floats(0, 1), max_size=30),
    rate=strategies.sampled_from(RATES),
    dtype=strategies.sampled_from(["float32", "float64", "int16"]),
)
def test_any_partition_gives_the_same_events(classifier, cuts, rate, dtype):
    samples = recording(rate, seconds=2.9)
    samples = np.round(samples * 32768).astype(dtype) if dtype == "int16" else samples.astype(dtype)
    expected = run(MMSERStream(classifier, sampling_rate=rate, **CHUNKS), [samples])
    blocks = np.split(samples, sorted(int(cut * len(samples)) for cut in cuts))
    assert run(MMSERStream(classifier, sampling_rate=rate, **CHUNKS), blocks) == expected


def test_sample_by_sample(classifier):
    samples = recording(8000, seconds=0.5, loud=[(0.2, 0.4)])
    stream = MMSERStream(classifier, sampling_rate=8000, chunk_length_s=0.3)
    events = run(stream, samples.reshape(-1, 1))
    stream.reset()
    assert run(stream, [samples]) == events and [event.has_speech for event in events] == [True, True]


def test_integers_channels_and_tensors_are_what_the_pipeline_takes(classifier):
    def events_of(blocks):
        return run(MMSERStream(classifier, sampling_rate=16000, **CHUNKS), blocks)

    samples = np.clip(recording(16000), -0.6, 0.6)
    expected, integers = events_of([samples]), np.round(samples * 32768).astype(np.int16)
    assert events_of(np.array_split(integers, 9)) == events_of([integers / np.float32(32768)])
    stereo = np.stack([0.5 * samples, 1.5 * samples], axis=1)
    for channels in (stereo, stereo[:, [1, 0]], samples[:, None]):
        for event, other in zip(events_of(np.array_split(channels, 9)), expected, strict=True):
            assert event.scores == pytest.approx(other.scores, abs=1e-4)
    tensors = list(torch.from_numpy(samples).split(1000))
    assert events_of(tensors) == expected


def test_an_event_comes_when_its_context_has_been_heard(classifier):
    samples = recording(16000)
    stream = MMSERStream(classifier, sampling_rate=16000, **CHUNKS)
    assert stream.push(samples[:16000]) == []  # a chunk, but it could be the last
    (event,) = stream.push(samples[16000:16001])
    assert (event.start, event.end) == (0.0, 0.8)
    assert stream.push(samples[:0]) == []


# ---- an end, a new start, several at a time


def test_reset_starts_at_zero_and_streams_do_not_meet(classifier):
    samples, other = recording(16000), recording(44100, seconds=2.0, loud=[(0.2, 1.5)])
    first = MMSERStream(classifier, sampling_rate=16000, **CHUNKS)
    second = MMSERStream(classifier, sampling_rate=44100, **CHUNKS)
    alone = run(first, [samples]), run(second, [other])
    first.reset()
    first.push(samples[:9000])  # half a stream, forgotten
    with pytest.raises(ValueError, match="ended with `flush`: call `reset`"):
        second.push(other)
    first.reset()
    second.reset()
    events = [[], []]
    for one, two in zip(np.array_split(samples, 20), np.array_split(other, 20), strict=True):
        events[0] += first.push(one)
        events[1] += second.push(two)
    assert (events[0] + first.flush(), events[1] + second.flush()) == alone
    assert first.flush() == []


def test_short_streams(classifier):
    for skip_silence in (True, False):
        stream = MMSERStream(classifier, sampling_rate=16000, skip_silence=skip_silence, **CHUNKS)
        assert stream.flush() == []
        stream.reset()
        (event,) = run(stream, [recording(16000)[:300]])  # less than a model takes
        assert event == StreamEvent(0.0, 300 / 16000, 0.0)


def test_nothing_is_lost_when_the_model_fails(classifier, monkeypatch):
    samples = recording(16000)
    stream = MMSERStream(classifier, sampling_rate=16000, **CHUNKS)
    expected = run(stream, [samples])
    stream.reset()
    forward, calls = classifier.forward, []

    def fail_once(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(classifier, "forward", fail_once)
    with pytest.raises(KeyboardInterrupt):
        stream.push(samples)
    assert stream.flush() == expected


# ---- memory


def pushed_minutes(stream, minutes):
    """A number of minutes, in pushes of 5 s; every tenth has five loud seconds. After each, the events so far."""
    quiet, loud = recording(16000, seconds=60, loud=[]), recording(16000, seconds=60, loud=[(20, 25)])
    events = []
    for number in range(minutes):
        for block in np.array_split(loud if number % 10 == 3 else quiet, 12):
            events += stream.push(block)
        yield events


def test_what_is_held_does_not_grow_over_an_hour(classifier):
    stream, sizes, events = MMSERStream(classifier, sampling_rate=16000), [], []
    for so_far in pushed_minutes(stream, 60):
        events = so_far
        sizes.append(len(pickle.dumps({name: held for name, held in vars(stream).items() if name != "_classifier"})))
    assert len(events) == 1349 and 6 * 2 <= sum(event.has_speech for event in events) <= 6 * 4
    assert max(sizes) < 4 * 16000 * 2.2 * 4  # bytes of little more than two chunks of 4 s; an hour has 230 MB


def test_the_memory_of_what_is_done_is_free(classifier):
    stream, peaks = MMSERStream(classifier, sampling_rate=16000), []
    tracemalloc.start()
    for _ in pushed_minutes(stream, 5):
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.reset_peak()
    tracemalloc.stop()
    assert peaks[-1] < 1.1 * peaks[1] < 12e6  # the samples are 19 MB


def test_a_long_push_is_given_back(classifier):
    stream = MMSERStream(classifier, sampling_rate=16000, **CHUNKS)
    stream.push(recording(16000, seconds=300, loud=[]))
    held = [stream._chunker._buffer, stream._chunker._previous, stream._activity._rest]
    assert sum((array if array.base is None else array.base).nbytes for array in held) < 4 * 3 * 16000


# ---- what is refused


@pytest.mark.parametrize(
    ("samples", "reason"),
    [
        (np.array([0.0, np.nan, 0.1]), r"samples after 0\.50 s: 1 of 3 samples are NaN or infinite, the first at 1"),
        (np.array([0.0, np.inf]), "NaN or infinite"),
        (np.zeros((2, 3, 4)), r"takes \(time,\) or \(time, channels\), got an array of shape \(2, 3, 4\)"),
        (np.zeros((2, 1600)), r"\(time, channels\), got an array of shape \(2, 1600\)"),
        (np.zeros((5, 0)), r"\(time, channels\)"),
        (np.float32(0), "expected an array or a tensor"),
        (np.zeros((10, 2)), r"2 channel\(s\) in shape \(10, 2\), but there were 1 before"),
        (np.zeros(5, dtype=complex), "dtype complex128 are not audio"),
        ([0.0, 0.1], "expected an array or a tensor, got list"),
        ("clip.wav", "expected an array or a tensor, got str"),
    ],
)
def test_bad_samples_are_refused_and_leave_no_trace(classifier, samples, reason):
    good = recording(16000, seconds=1.5)
    stream = MMSERStream(classifier, sampling_rate=16000, **CHUNKS)
    expected = run(stream, [good])
    stream.reset()
    stream.push(good[:8000])
    with pytest.raises((ValueError, TypeError), match=reason):
        stream.push(samples)
    assert stream.push(good[8000:]) + stream.flush() == expected


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "`sampling_rate` is required"),
        ({"sampling_rate": 16}, "stream: `sampling_rate` is in Hz, at least 1000"),
        ({"sampling_rate": 16000, "chunk_length_s": 0}, "`chunk_length_s` must be a number from"),
        ({"sampling_rate": 16000, "stride_length_s": 2}, "together less than `chunk_length_s`"),
    ],
)
def test_options_that_make_no_stream(classifier, options, reason):
    with pytest.raises(ValueError, match=reason):
        MMSERStream(classifier, **options)


def test_models_that_hear_nothing():
    with pytest.raises(ValueError, match=r"never trained with audio .*, so there is nothing that it could hear"):
        MMSERStream(tiny_model(untrained_modalities=["audio"]), tiny_processor(), sampling_rate=16000)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    stock = Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**sizes, conv_dim=[8] * 7, num_conv_pos_embeddings=4))
    with pytest.raises(ValueError, match="one of MMSER, got 'wav2vec2'"):
        MMSERStream(stock, sampling_rate=16000)
    with pytest.raises(ValueError, match="`processor` is needed"):
        MMSERStream(tiny_model(), sampling_rate=16000)
    with pytest.raises(TypeError, match="a pipeline or a model of MMSER, got str"):
        MMSERStream("runs/mine", sampling_rate=16000)
    pipeline = AudioClassificationPipeline(
        model=tiny_model(), feature_extractor=tiny_processor().feature_extractor, device="cpu"
    )
    with pytest.raises(ValueError, match="the one of Transformers has no processor"):
        MMSERStream(pipeline, sampling_rate=16000)


# ---- how it reads


def test_an_event_is_one_line():
    scores = {"happy": 0.87, "sad": 0.13}
    assert str(StreamEvent(2.66, 5.33, 0.0)) == "   0:02.7 - 0:05.3  silence"
    assert str(StreamEvent(0, 62.7, 1.2, scores, 0.1)) == "   0:00.0 - 1:02.7  happy 0.87, uncertainty 0.10"
    unknown = StreamEvent(0, 2.7, 1.2, scores, 0.1, 0.9, True)
    assert str(unknown).endswith("  none of these (nearest: happy) 0.87, uncertainty 0.10")
    assert mmser.MMSERStream is MMSERStream and mmser.StreamEvent is StreamEvent
