# SPDX-License-Identifier: Apache-2.0
"""Tests of `demo/synthesize_non_speech.py`: what the sounds are, measured, and what is written and refused."""

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
from scipy.signal import periodogram, welch

from mmser.examples import EmotionDataset
from mmser.loading import load_emotion_split

SCRIPT = Path(__file__).resolve().parents[1] / "demo" / "synthesize_non_speech.py"
KINDS = ["noise", "tones", "music"]
RATE = 16_000


@pytest.fixture(scope="module")
def corpus(script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("non_speech") / "new" / "folder"
    script.synthesize(folder, clips_per_kind=3, seed=5)
    return folder


def level(audio):
    return 10 * np.log10(np.mean(np.square(audio, dtype=np.float64)))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def power_near(audio, frequencies, width):
    """The share of the power that is within `width` Hz of any of the frequencies."""
    bins, power = periodogram(audio, RATE, window="hann")
    return power[np.abs(bins[:, None] - np.asarray(frequencies)).min(axis=1) <= width].sum() / power.sum()


# ---- every clip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seconds", [0.1, 1.2345, 6.0])
def test_clips_are_finite_float32_in_range_and_at_a_level_in_range(script, kind, seconds):
    for seed in range(12):
        audio = getattr(script, kind)(np.random.default_rng(seed), seconds)
        assert audio.dtype == np.float32 and audio.shape == (round(seconds * RATE),)
        assert np.isfinite(audio).all()
        assert np.abs(audio).max() < 1.0
        assert -45.01 <= level(audio) <= -11.99


@pytest.mark.parametrize("kind", KINDS)
def test_clips_differ_in_level_and_spectrum(script, kind):
    levels, centroids = [], []
    for seed in range(30):
        audio = getattr(script, kind)(np.random.default_rng(seed), 1.0)
        frequencies, power = welch(audio, RATE, nperseg=1024)
        levels.append(level(audio))
        centroids.append(np.log2(power @ frequencies / power.sum()))
    assert np.ptp(levels) > 10.0  # dB
    assert np.ptp(centroids) > 1.5  # octaves


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_generator_decides(script, kind):
    make = getattr(script, kind)
    first, again, other = (make(np.random.default_rng(seed), 1.0) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seconds", [0, -1.0, 0.01, float("nan"), float("inf")])
def test_impossible_durations_are_refused(script, kind, seconds):
    with pytest.raises(ValueError, match="seconds"):
        getattr(script, kind)(np.random.default_rng(0), seconds)


def test_every_sound_has_sound_throughout(script):
    for name, make in {**script.NOISES, **script.TONES}.items():
        for seed in range(3):
            audio = make(np.random.default_rng(seed), 3 * RATE)
            assert audio.shape == (3 * RATE,) and np.isfinite(audio).all(), name
            assert all(np.any(second) for second in audio.reshape(3, RATE)), name  # pauses are below 0.6 s


# ---- noise


@pytest.mark.parametrize(("colour", "slope"), [("white", 0.0), ("pink", -1.0), ("brown", -2.0)])
def test_power_of_coloured_noise_falls_as_its_colour_says(script, colour, slope):
    audio = script.NOISES[colour](np.random.default_rng(0), 6 * RATE)
    frequencies, power = welch(audio, RATE, nperseg=4096)
    used = (frequencies > 50) & (frequencies < 7000)
    fitted, _ = np.polyfit(np.log(frequencies[used]), np.log(power[used]), 1)
    assert fitted == pytest.approx(slope, abs=0.1)


def test_band_noise_stays_in_its_band(script):
    for seed in range(10):
        audio = script.NOISES["band"](np.random.default_rng(seed), 2 * RATE)
        frequencies, power = welch(audio, RATE, nperseg=4096)
        share = np.cumsum(power) / power.sum()
        low, high = frequencies[np.searchsorted(share, (0.05, 0.95))]
        assert high <= 2**2.8 * (low + 5.0)  # at most 2.5 octaves, and the slopes of the filter


def test_hum_is_on_multiples_of_the_mains_frequency(script):
    for seed in range(4):
        audio = script.NOISES["hum"](np.random.default_rng(seed), 4 * RATE)
        near = [power_near(audio, mains * np.arange(1, 41), 0.003 * mains * 40) for mains in (50, 60)]
        strongest = periodogram(audio, RATE)[1].argmax() / 4
        assert max(near) > 0.9
        assert min(abs(strongest / mains - round(strongest / mains)) for mains in (50, 60)) < 0.1


def test_wind_changes_its_loudness_more_than_steady_noise(script):
    def swing(name):
        audio = script.NOISES[name](np.random.default_rng(3), 6 * RATE)
        return np.std([level(part) for part in np.split(audio, 30)])

    assert swing("wind") > 4 * swing("pink")


def test_clicks_are_from_sparse_to_dense(script):
    crests = []
    for seed in range(20):
        audio = script.NOISES["clicks"](np.random.default_rng(seed), 3 * RATE)
        crests.append(20 * np.log10(np.abs(audio).max()) - level(audio))
    assert max(crests) > 20.0 and min(crests) < 16.0  # dB; a sine has 3, white noise about 13


# ---- tones


def test_energy_of_a_steady_sine_is_at_one_frequency(script):
    for seed in range(4):
        audio = script._finish(
            np.random.default_rng(seed), script.TONES["sine"](np.random.default_rng(seed), 2 * RATE)
        )
        frequencies, power = periodogram(audio, RATE, window="hann")
        assert power_near(audio, [frequencies[power.argmax()]], 3.0) > 0.99


def test_dial_tones_are_pairs_of_the_standard_frequencies(script):
    rows, columns = np.array([697, 770, 852, 941]), np.array([1209, 1336, 1477, 1633])
    for seed in range(5):
        audio = script.TONES["dial"](np.random.default_rng(seed), 4 * RATE)
        key = audio[160 : 160 + 800]  # inside the first key, which lasts at least 60 ms
        for frequencies in (rows, columns):
            basis = np.exp(-2j * np.pi * np.outer(frequencies, np.arange(800) / RATE)) * np.hanning(800)
            strength = np.sort(np.abs(basis @ key))
            assert strength[-1] > 3 * strength[-2]
        assert power_near(audio, [*rows, *columns], 40.0) > 0.95


def test_sweeps_move_and_beeps_pause(script):
    moved, paused = [], []
    for seed in range(6):
        sweep = script.TONES["sweep"](np.random.default_rng(seed), 2 * RATE).reshape(-1, 1600)
        peaks = np.abs(np.fft.rfft(sweep * np.hanning(1600))).argmax(axis=1)
        moved.append(len(set(peaks.tolist())))
        beeps = script.TONES["beeps"](np.random.default_rng(seed), 2 * RATE).reshape(-1, 160)
        paused.append(np.mean(np.abs(beeps).max(axis=1) < 1e-9))
    assert min(moved) >= 4
    assert all(0 < pause < 1 for pause in paused)


# ---- music


def test_a_plucked_string_fades_as_the_loop_of_karplus_and_strong(script):
    frequency, rounds, size = 250.0, 40, 64
    audio = script._plucked(np.random.default_rng(0), frequency, rounds * size)
    loop = np.concatenate((np.zeros(1), np.random.default_rng(0).standard_normal(size), np.zeros(rounds * size)))
    loop[1 : size + 1] -= loop[1 : size + 1].mean()
    for position in range(size + 1, len(loop)):
        loop[position] = 0.998 * 0.5 * (loop[position - size] + loop[position - size - 1])
    window = np.hanning(8 * size)

    def fading(sound, frequency):
        wave = window * np.exp(-2j * np.pi * frequency * np.arange(8 * size))
        first, last = (abs(sound[start : start + 8 * size] @ wave) for start in (0, 30 * size))
        return last / first

    for harmonic in (1, 2, 4, 6):  # half a sample of delay in the loop makes it flat by less than 1 %
        expected = fading(loop[1:], harmonic / (size + 0.5))
        assert fading(audio, harmonic / size) == pytest.approx(expected, rel=0.05)


def test_every_instrument_sounds_at_its_pitch(script):
    for instrument in script.INSTRUMENTS:
        for frequency in (125.0, 250.0, 500.0):
            audio = instrument(np.random.default_rng(1), frequency, RATE)
            assert audio.shape == (RATE,) and np.isfinite(audio).all()
            if instrument is not script._bell:  # whose partials are no multiples
                assert power_near(audio, frequency * np.arange(1, 64), 6.0) > 0.95
                assert power_near(audio, [frequency], 6.0) > 0.01


def test_notes_of_a_piece_are_of_one_scale_in_equal_temperament(script, monkeypatch):
    played = []

    def listen(rng, frequency, count):
        played.append(frequency)
        return np.sin(2 * np.pi * frequency * np.arange(count) / RATE)

    monkeypatch.setattr(script, "INSTRUMENTS", (listen,))
    melodies = set()
    for seed in range(10):
        played.clear()
        script.music(np.random.default_rng(seed), 6.0)
        numbers = 69 + 12 * np.log2(np.array(played) / 440)
        np.testing.assert_allclose(numbers, np.round(numbers), atol=1e-6)
        assert len({round(number) % 12 for number in numbers}) <= 7
        assert numbers.min() >= 24 and numbers.max() <= 100
        melodies.add(tuple(np.round(numbers)))
    assert len(melodies) == 10


def test_drums_keep_the_beat(script):
    step = 4000
    audio = script._drums(np.random.default_rng(0), step, 6 * RATE)
    starts = np.array([np.abs(audio[start : start + 400]).max() for start in range(0, 6 * RATE, step)])
    assert starts[::2].min() > np.median(starts[1::2])  # kick and snare on the beats, little between them


# ---- files


def test_the_folder_loads_as_open_set_data(corpus):
    table = load_emotion_split(corpus)
    assert table["labels"] == [-1] * 9
    assert Counter(table["corpus"]) == {kind: 3 for kind in KINDS}
    example = EmotionDataset(table)[0]
    assert example["labels"] == -1 and len(example["audio"]) >= RATE
    assert not example.get("text")


def test_metadata_and_files_agree(corpus):
    with (corpus / "metadata.csv").open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert list(rows[0]) == ["file_name", "label", "emotion", "transcription", "speaker", "corpus", "language"]
    assert {path.name for path in corpus.iterdir()} == {"metadata.csv", *(row["file_name"] for row in rows)}
    for row in rows:
        assert row["emotion"] == row["corpus"] and row["corpus"] in row["file_name"]
        assert row["transcription"] == row["speaker"] == row["language"] == ""
        info = soundfile.info(corpus / row["file_name"])
        assert (info.samplerate, info.channels, info.subtype) == (RATE, 1, "PCM_16")
        assert 1.0 <= info.duration <= 6.0
        audio, _ = soundfile.read(corpus / row["file_name"], dtype="int16")
        assert -45.1 <= level(audio / 32768) <= -11.9
        assert np.abs(audio.astype(int)).max() < 32767


def test_more_clips_keep_the_earlier_ones_and_another_seed_none(script, corpus, tmp_path):
    script.synthesize(tmp_path / "fewer", clips_per_kind=2, seed=5)
    script.synthesize(tmp_path / "other", clips_per_kind=2, seed=6)
    all_of, fewer, other = contents(corpus), contents(tmp_path / "fewer"), contents(tmp_path / "other")
    assert len(fewer) == len(other) == 7
    for name in fewer.keys() - {"metadata.csv"}:
        assert fewer[name] == all_of[name]
        assert other[name] != all_of[name]
    assert len({all_of[name] for name in all_of}) == len(all_of)


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError])
def test_an_interrupted_run_leaves_nothing(script, tmp_path, monkeypatch, interruption, existing):
    folder, write, written = tmp_path / "folder", soundfile.write, []
    if existing:
        folder.mkdir()

    def write_four(path, *arguments, **options):
        if len(written) == 4:
            raise interruption("stop")
        written.append(path)
        write(path, *arguments, **options)
        assert not list(tmp_path.rglob("metadata.csv"))  # so that a killed run does not look complete either

    monkeypatch.setattr(script.soundfile, "write", write_four)
    with pytest.raises(interruption):
        script.synthesize(folder, clips_per_kind=3)
    assert len(written) == 4
    assert list(tmp_path.rglob("*")) == ([folder] if existing else [])
    monkeypatch.undo()
    script.synthesize(folder, clips_per_kind=1)
    assert len(contents(folder)) == 4
    assert list(tmp_path.iterdir()) == [folder]


def test_other_files_are_never_replaced(script, corpus, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    before = contents(corpus)
    for folder in (tmp_path / "file", tmp_path / "folder", corpus):
        with pytest.raises(FileExistsError, match="new or empty"):
            script.synthesize(folder, clips_per_kind=1)
        assert script.main([str(folder), "--clips_per_kind", "1"]) == 1
        assert str(folder) in capsys.readouterr().err
    assert contents(corpus) == before
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder", "notes.txt"]
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("arguments", [{"clips_per_kind": 0}, {"clips_per_kind": -3}, {"seed": -1}])
def test_numbers_out_of_range_are_refused_before_anything_is_written(script, tmp_path, arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        script.synthesize(tmp_path / "folder", **arguments)
    assert not any(tmp_path.iterdir())


def test_the_command_line_writes_the_same_folder(script, corpus, tmp_path, capsys):
    assert script.main([str(tmp_path), "--clips_per_kind", "3", "--seed", "5"]) == 0
    assert contents(tmp_path) == contents(corpus)
    assert capsys.readouterr().out.startswith("9 clips")
