# SPDX-License-Identifier: Apache-2.0
"""Writes a small multilingual *synthetic* emotional speech corpus: `python demo/synthesize_corpus.py OUT`.

eSpeak NG acts the emotions by rules (rate, pitch, loudness, timbre), so scores on this corpus say nothing about human
emotion. The corpus shows that training, evaluation and open-set rejection work. Read: voices and prosody (who speaks
and how; `sentences.json` holds the words), `plan_corpus` (the clips), `render_clip` (their audio), `synthesize_corpus`
(the files). The same seed gives the same bytes in a fresh process; eSpeak NG keeps state: one corpus per process.
"""

import argparse
import csv
import ctypes
import hashlib
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import soxr
from numpy.random import Generator
from tqdm.auto import tqdm

SAMPLING_RATE = 16_000  # Hz, of the files
SHORTEST, LONGEST = 0.8, 2.5  # seconds, of every clip
EMOTIONS = ("neutral", "happy", "sad", "angry")
NON_SPEECH = ("white_noise", "pink_noise", "babble", "chords", "melody", "tone", "sweep")
COLUMNS = ("file_name", "label", "transcription", "speaker", "language", "corpus", "license", "emotion")
FINGERPRINT = "\n<!-- sha256 of this corpus: "  # starts the last line of the corpus's README

# Per language: six adverbs, and per emotion openers with {} for any of the adverbs. The emotions share the adverbs, so
# only the opener tells the emotion. A pair of opener and adverb is in one of train, validation and test alone.
SENTENCES = json.loads(Path(__file__).with_name("sentences.json").read_text(encoding="utf-8"))

README = Path(__file__).with_name("corpus_readme.md").read_text(encoding="utf-8")  # of the corpus, with {fields}

# eSpeak NG voice variants. Train, validation and test share no variant, so they share no speaker; variants that differ
# by a detail (belinda and linda) are in one split. Train has many, so that a model learns how voices speak and not who
# speaks. Validation has many: thresholds of rejection that two voices choose accept too few clips of a third.
VOICES = {
    "train": (
        *("f1", "m1", "linda", "Andy", "shelby", "m3", "Andrea", "Gene", "f3", "Jacky", "steph2", "Nguyen"),
        *("Alicia", "m6", "f5", "Lee", "belinda", "Marco", "grandma", "Diogo", "zac", "antonio", "Reed", "benjamin"),
        *("david", "edward", "Mike", "marcelo", "iven3", "robert", "quincy", "victor", "norbert", "kaukovalta", "max"),
        "Henrique",
    ),
    "validation": ("f2", "m2", "anika", "m4", "aunty", "m7", "grandpa", "Denis", "travis", "Alex"),
    "test": ("f4", "Annie", "m8", "ed", "paul", "gustave"),
}
VOICES["ood"] = VOICES["validation"] + VOICES["test"]
SHARES = {"train": 1.0, "validation": 0.2, "test": 0.3, "ood": 0.2}  # clips of a split, as shares of those in train


class Prosody(NamedTuple):
    """How a sentence is spoken. The first four are eSpeak NG parameters, the others shape its waveform."""

    rate: float  # words per minute
    pitch: float  # 0..99
    pitch_range: float  # 0..99
    volume: float  # 0..200; a model that normalises each clip never sees it
    tilt: float  # dB per octave above 500 Hz: below 0 breathy, above 0 pressed
    fade: float  # dB from start to end
    emphasis: float  # exponent on the loudness envelope: below 0 monotonous, above 0 punched out


# Means per emotion, and the standard deviation of every clip around them: wide enough that the emotions overlap. Pitch
# and timbre differ more between voices than between emotions. How loudness moves within a clip is the same in all
# voices: joy swells, sorrow dies away, anger hits its accents.
PROSODY = {
    "neutral": Prosody(162, 44, 32, 60, 0.0, -1.0, 0.0),
    "happy": Prosody(180, 64, 84, 72, 1.5, 9.0, 0.1),
    "sad": Prosody(124, 32, 12, 42, -4.0, -11.0, -0.25),
    "angry": Prosody(200, 54, 52, 80, 4.5, -2.0, 0.65),
    "fear": Prosody(225, 85, 60, 64, 1.5, 0.0, 0.0),
}
JITTER = Prosody(12, 7, 11, 8, 1.0, 2.0, 0.1)
LOWEST = Prosody(80, 0, 0, 20, -np.inf, -np.inf, -np.inf)
HIGHEST = Prosody(440, 99, 99, 100, np.inf, np.inf, np.inf)


@dataclass(frozen=True)
class Clip:
    """One line of a `metadata.csv` before it has a file. `emotion` may also be "fear" or a kind of `NON_SPEECH`."""

    emotion: str
    text: str  # "" when nothing is said
    language: str  # ISO 639 code; "zxx" is no language, "mul" several
    voice: str  # eSpeak NG variant, or the kind of sound

    @property
    def speaker(self) -> str:
        return f"{self.language}+{self.voice}"

    @property
    def label(self) -> str:
        return self.emotion if self.emotion in EMOTIONS else "-1"


class Espeak:
    """eSpeak NG through ctypes.

    Raises:
        ImportError: espeakng-loader, which ships the engine, is not installed.
        RuntimeError: the engine does not start.
    """

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError as error:
            message = "the synthetic corpus needs espeakng-loader (the eSpeak NG engine): pip install .[demo]"
            raise ImportError(message) from error
        self._data = Path(espeakng_loader.get_data_path())
        self._library = ctypes.CDLL(str(espeakng_loader.get_library_path()))
        # 2: synchronous, 0x8000: return an error instead of ending the process
        data = os.fsencode(self._data.parent)
        self.sampling_rate: int = self._library.espeak_Initialize(2, 0, ctypes.c_char_p(data), 0x8000)
        if self.sampling_rate <= 0:
            raise RuntimeError(
                f"eSpeak NG cannot load its data from {self._data}. It takes paths of up to about 200 characters, and "
                f"this one has {len(str(self._data))}: move the environment to a shorter path if that is too long"
            )
        # Breathy voices (f2, f3, f5, ...) draw noise from a generator that the engine seeds with the clock.
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(1))
        self._blocks: list[np.ndarray] = []
        # Ctrl-C is raised in the main thread alone. Inside a callback in that thread, ctypes would swallow it.
        self._thread = ThreadPoolExecutor(max_workers=1)
        function = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self._callback = function(self._receive)  # kept, or it would be collected while C holds it
        self._library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples, count: int, _events) -> int:
        if samples and count > 0:
            self._blocks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0  # go on

    def say(self, text: str, language: str, variant: str, prosody: Prosody) -> np.ndarray:
        """Speaks a sentence with the rate, pitch, pitch range and volume of `prosody`.

        Args:
            text: in the script of the language.
            language: a key of `SENTENCES`, or the name of another eSpeak NG voice.
            variant: an eSpeak NG voice variant.

        Returns:
            float32 [T] at 16 kHz, without the silence around it.

        Raises:
            RuntimeError: the engine has no such voice, or says nothing.
        """
        voice = f"{'pt-br' if language == 'pt' else language}+{variant}"
        # The engine silently replaces an unknown variant by the plain voice.
        known = (self._data / "voices" / "!v" / variant).is_file()
        if not known or self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise RuntimeError(f"this eSpeak NG has no voice {voice!r}")
        for parameter, value in ((1, prosody.rate), (2, prosody.volume), (3, prosody.pitch), (4, prosody.pitch_range)):
            self._library.espeak_SetParameter(parameter, round(value), 0)
        self._blocks.clear()
        encoded = text.encode() + b"\0"
        size = ctypes.c_size_t(len(encoded))
        arguments = (encoded, size, 0, 1, 0, 1, None, None)  # 1: position in characters, 1: text in UTF-8
        status = self._thread.submit(self._library.espeak_Synth, *arguments).result()
        if status != 0 or not self._blocks:
            raise RuntimeError(f"eSpeak NG said nothing for {text!r} with the voice {voice!r} (status {status})")
        audio = np.concatenate(self._blocks).astype(np.float32) / 32768
        audio = soxr.resample(audio, self.sampling_rate, SAMPLING_RATE, quality="HQ")
        loud = np.flatnonzero(np.abs(audio) > 0.01 * np.abs(audio).max())
        return audio[loud[0] : loud[-1] + 1]


def sentences_of(language: str, emotion: str, split: str) -> list[str]:
    """The sentences of one split: of 5 openers x 6 adverbs, 5 pairs are for validation, 5 for test, 20 for train.

    Every opener and every adverb occurs in train, no pair in two of the splits. Fear, in `ood` alone, uses all pairs.
    """
    splits = ["test", "validation", "train", "train", "train", "train"]
    texts = [
        opener.format(adverb)
        for i, opener in enumerate(SENTENCES[language][emotion])
        for j, adverb in enumerate(SENTENCES[language]["adverbs"])
        if split in ("ood", splits[(i + j) % 6])
    ]
    return [text[:1].upper() + text[1:] for text in texts]


def plan_corpus(languages: Sequence[str], clips_per_cell: int, seed: int) -> dict[str, list[Clip]]:
    """Chooses the sentences, their speakers and their emotions.

    Args:
        languages, clips_per_cell: see `synthesize_corpus`.
        seed: of the choice of sentences and of the order of the clips, at least 0.

    Returns:
        The clips of each split in shuffled order, so that a file's number tells nothing about its label.

    Raises:
        ValueError: a language is unknown or repeated, or a number is out of range.
    """
    if not languages or not set(languages) <= SENTENCES.keys() or len(set(languages)) != len(languages):
        raise ValueError(f"languages must be distinct names from {list(SENTENCES)}, got {list(languages)}")
    if clips_per_cell < 1 or seed < 0:
        raise ValueError(f"clips_per_cell must be >= 1 and seed >= 0, got {clips_per_cell} and {seed}")
    rng = np.random.default_rng(seed)
    plan = {}
    for split, share in SHARES.items():
        count = max(1, round(share * clips_per_cell))
        clips = []
        for number, language in enumerate(languages):
            for emotion in ("fear",) if split == "ood" else EMOTIONS:
                texts = rng.permutation(sentences_of(language, emotion, split)).tolist()
                # The start moves with the language alone: when voices are left over, each emotion gets the same ones.
                voices = [VOICES[split][(number + k) % len(VOICES[split])] for k in range(count)]
                clips += [Clip(emotion, texts[k % len(texts)], language, voices[k]) for k in range(count)]
        if split == "ood":
            for kind in NON_SPEECH:
                clips += [Clip(kind, "", "mul" if kind == "babble" else "zxx", kind)] * (2 * count)
        plan[split] = [clips[i] for i in rng.permutation(len(clips))]
    return plan


def draw_prosody(emotion: str, rng: Generator) -> Prosody:
    """One clip's prosody: the emotion's mean with Gaussian jitter, inside the limits of eSpeak NG."""
    return Prosody(*np.clip(rng.normal(PROSODY[emotion], JITTER), LOWEST, HIGHEST).tolist())


def _shape(audio: np.ndarray, prosody: Prosody) -> np.ndarray:
    """Applies tilt (of at most 18 dB), fade and emphasis to a spoken sentence, float [T]."""
    octaves = np.log2(np.maximum(np.fft.rfftfreq(len(audio), 1 / SAMPLING_RATE), 500.0) / 500.0)
    gain = 10 ** (np.clip(prosody.tilt * octaves, -18.0, 18.0) / 20)
    tilted = np.fft.irfft(np.fft.rfft(audio) * gain, len(audio))
    audio = tilted * (np.sqrt(np.mean(audio**2)) / np.sqrt(np.mean(tilted**2)))
    energy = np.cumsum(np.pad(audio**2, (641, 640)))
    envelope = np.sqrt(np.maximum(energy[1281:] - energy[:-1281], 0.0))  # over 80 ms around each sample
    envelope = np.maximum(envelope / envelope.max(), 0.1)
    fade = 10 ** (np.linspace(-0.5, 0.5, len(audio)) * prosody.fade / 20)
    return audio * fade * envelope**prosody.emphasis


def _tremble(audio: np.ndarray, rng: Generator) -> np.ndarray:
    """Adds the tremor of a frightened voice, 6 to 9 Hz in pitch (about 4 %) and loudness, to a float [T] waveform."""
    phase = 2 * np.pi * rng.uniform(6.0, 9.0) * np.arange(len(audio)) / SAMPLING_RATE + rng.uniform(0, 2 * np.pi)
    frequency = (phase[1] - phase[0]) * SAMPLING_RATE  # radians per second: a delay of a sin(wt) bends pitch by aw
    delayed = np.arange(len(audio)) + 0.04 / frequency * SAMPLING_RATE * np.sin(phase)
    return np.interp(delayed, np.arange(len(audio)), audio) * (1 + 0.5 * np.sin(phase + 1.0))


def _speak(clip: Clip, engine: Espeak, rng: Generator) -> np.ndarray:
    """One spoken clip, float [T]. A clip that is too long is spoken faster; ValueError if no rate is enough."""
    prosody = draw_prosody(clip.emotion, rng)
    limit = (LONGEST - 0.2) * SAMPLING_RATE  # leaves room for the silence around it
    while len(audio := engine.say(clip.text, clip.language, clip.voice, prosody)) > limit:
        prosody = prosody._replace(rate=prosody.rate * 1.02 * len(audio) / limit)
        if prosody.rate > HIGHEST.rate:
            raise ValueError(f"{clip.text!r} cannot be said in {LONGEST} seconds; shorten it")
    audio = _shape(audio, prosody)
    return _tremble(audio, rng) if clip.emotion == "fear" else audio


def _pink(count: int, rng: Generator) -> np.ndarray:
    """Noise with power proportional to 1/f above 20 Hz, float [count], unit variance."""
    spectrum = np.fft.rfft(rng.normal(size=count))
    noise = np.fft.irfft(spectrum / np.sqrt(np.maximum(np.fft.rfftfreq(count, 1 / SAMPLING_RATE), 20.0)), count)
    return noise / noise.std()


def _note(frequency: float, count: int, rng: Generator) -> np.ndarray:
    """A plucked note of six harmonics that die away, float [count]."""
    time = np.arange(count) / SAMPLING_RATE
    audio = np.zeros(count)
    for k in range(1, 7):
        audio += np.sin(2 * np.pi * k * frequency * time + rng.uniform(0, 2 * np.pi)) * np.exp(-k * time) / k
    return audio * np.minimum(time / 0.01, 1.0)


def _music(kind: str, count: int, rng: Generator) -> np.ndarray:
    """Two to four "chords" or four to eight notes of a "melody" in a major or minor key, float [count]."""
    scale = ((0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10))[rng.integers(2)]
    root = rng.uniform(110.0, 262.0)
    steps = rng.integers(2, 5) if kind == "chords" else rng.integers(4, 9)
    audio = np.zeros(count)
    for start, end in pairwise(np.linspace(0, count, steps + 1).astype(int)):
        tonic = int(rng.integers(7))
        for degree in (0, 2, 4) if kind == "chords" else (0,):
            octave, index = divmod(tonic + degree, 7)
            audio[start:end] += _note(root * 2 ** (octave + scale[index] / 12), end - start, rng)
    return audio


def _babble(count: int, engine: Espeak, rng: Generator) -> np.ndarray:
    """Six neutral voices at once, each repeated to fill float [count]."""
    audio = np.zeros(count)
    for language in rng.choice(list(SENTENCES), 6, replace=False).tolist():
        text = rng.choice(sentences_of(language, "neutral", "test")).item()
        voice = rng.choice(VOICES["ood"]).item()
        speech = engine.say(text, language, voice, draw_prosody("neutral", rng))
        audio += np.roll(np.resize(speech / speech.std(), count), int(rng.integers(count)))
    return audio


def _make_sound(kind: str, engine: Espeak, rng: Generator) -> np.ndarray:
    """One clip without a speaker, float [T]; `kind` is one of `NON_SPEECH`."""
    count = int(rng.uniform(1.0, LONGEST - 0.2) * SAMPLING_RATE)
    if kind.endswith("noise"):
        return rng.normal(size=count) if kind == "white_noise" else _pink(count, rng)
    if kind == "babble":
        return _babble(count, engine, rng)
    if kind in ("chords", "melody"):
        return _music(kind, count, rng)
    start, end = np.exp(rng.uniform(np.log(100.0), np.log(4000.0), size=2))  # Hz
    frequency = np.full(count, start) if kind == "tone" else np.geomspace(start, end, count)
    return np.sin(2 * np.pi * np.cumsum(frequency) / SAMPLING_RATE)


def render_clip(clip: Clip, engine: Espeak, rng: Generator) -> np.ndarray:
    """Makes the audio of a clip: the voice or sound, short silences around it, faint background noise, a level.

    Returns:
        float64 [T] at 16 kHz in (-1, 1), between 0.8 and 2.5 seconds long.
    """
    audio = _make_sound(clip.emotion, engine, rng) if clip.emotion in NON_SPEECH else _speak(clip, engine, rng)
    position = np.arange(len(audio))
    audio = audio * np.minimum(np.minimum(position, position[::-1]) / 160, 1.0)  # 10 ms ramps: no clicks
    before, after = (rng.uniform(0.02, 0.1, size=2) * SAMPLING_RATE).astype(int)
    missing = max(0, int(np.ceil(SHORTEST * SAMPLING_RATE)) - len(audio) - before - after)
    audio = np.pad(audio, (before + missing // 2, after + missing - missing // 2))
    level = np.sqrt(np.mean(audio**2))
    audio = audio + level * 10 ** (-rng.uniform(20.0, 40.0) / 20) * _pink(len(audio), rng)  # 20 to 40 dB below
    loudness = PROSODY[clip.emotion].volume if clip.emotion in PROSODY else 60.0
    audio = audio * (0.08 * loudness / 60.0 * rng.uniform(0.7, 1.4) / level)
    return audio * min(1.0, 0.98 / np.abs(audio).max())


def _table(plan: dict[str, list[Clip]], seconds: dict[str, float] | None = None) -> str:
    """A Markdown table of clips per split and label, with the seconds of audio where they are known."""
    header = ["split", *EMOTIONS, "-1", "clips"] + (["seconds"] if seconds else [])
    lines = [header, ["---"] * len(header)]
    for split, clips in plan.items():
        counts = Counter(clip.label for clip in clips)
        row = [split, *(str(counts[label]) for label in (*EMOTIONS, "-1")), str(len(clips))]
        lines.append(row + ([f"{seconds[split]:.0f}"] if seconds else []))
    return "\n".join("| " + " | ".join(f"{cell:>10}" for cell in line) + " |" for line in lines)


def _fingerprint(folder: Path, readme: str) -> str:
    """SHA-256 over the README's text and the name and content of every other path in a corpus folder."""
    digest = hashlib.sha256(readme.encode())
    for path in sorted(folder.rglob("*")):
        if path != folder / "README.md":
            digest.update(b"\0" + os.fsencode(path.relative_to(folder).as_posix()) + b"\0")
            digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


def check_output_folder(folder: Path) -> None:
    """Raises FileExistsError unless `folder` is new, empty, or an unchanged corpus of this script."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise FileExistsError(f"{folder} exists and is not a folder; give a new or empty folder")
    if not folder.exists() or not any(folder.iterdir()):
        return
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    body, _, last_line = text.rpartition(FINGERPRINT)
    if last_line.split(" ")[0] != _fingerprint(folder, body):
        problem = "is not empty, and it is no corpus of this script or was changed"
        raise FileExistsError(f"{folder} {problem}; give a new or empty folder")


def _write_split(folder: Path, clips: Sequence[Clip], engine: Espeak, seed: Sequence[int], progress: tqdm) -> float:
    """Writes one split's audio, then its `metadata.csv`; returns the seconds of audio."""
    folder.mkdir()
    samples, rows = 0, []
    for index, clip in enumerate(clips):
        audio = render_clip(clip, engine, np.random.default_rng((*seed, index)))
        name = f"{index:05d}.flac"
        soundfile.write(folder / name, audio, SAMPLING_RATE, subtype="PCM_16")
        origin = ("mmser-synthetic", "apache-2.0")
        rows.append((name, clip.label, clip.text, clip.speaker, clip.language, *origin, clip.emotion))
        samples += len(audio)
        progress.update()
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as lines:
        csv.writer(lines, lineterminator="\n").writerows([COLUMNS, *rows])
    return samples / SAMPLING_RATE


def synthesize_corpus(
    output: str | os.PathLike, seed: int = 0, clips_per_cell: int = 40, languages: Sequence[str] = tuple(SENTENCES)
) -> str:
    """Writes the corpus: `{train,validation,test,ood}/metadata.csv` with FLAC files, and a `README.md`.

    Args:
        output: folder that is new, empty, or an unchanged corpus of this script. The new corpus replaces it at the
            end; an interrupted run leaves it as it was.
        seed: of everything random.
        clips_per_cell: train clips per language and emotion; validation has 0.2, test 0.3 of it.
        languages: distinct keys of `SENTENCES`.

    Returns:
        A table of clips per split and label with their seconds.

    Raises:
        FileExistsError: `output` holds other files.
        ImportError: espeakng-loader is not installed.
        ValueError: an argument is out of range.
    """
    folder = Path(output).absolute()
    plan = plan_corpus(languages, clips_per_cell, seed)
    check_output_folder(folder)
    engine = Espeak()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        partial, seconds = Path(temporary) / "corpus", {}
        partial.mkdir()
        with tqdm(total=sum(map(len, plan.values())), unit="clip", desc="synthesizing") as progress:
            for number, (split, clips) in enumerate(plan.items()):
                seconds[split] = _write_split(partial / split, clips, engine, (seed, number), progress)
        readme = README.format(
            language_list=", ".join(languages),
            languages=" ".join(languages),
            seed=seed,
            clips_per_cell=clips_per_cell,
            shortest=SHORTEST,
            longest=LONGEST,
            table=_table(plan),
        )
        last_line = f"{FINGERPRINT}{_fingerprint(partial, readme)} -->\n"
        (partial / "README.md").write_text(readme + last_line, encoding="utf-8")
        check_output_folder(folder)  # again: it may have changed in the meantime
        if folder.exists():
            folder.rename(Path(temporary) / "previous")
        partial.rename(folder)
    return _table(plan, seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns its exit status."""
    parser = argparse.ArgumentParser(
        description="Write a small multilingual synthetic emotional speech corpus with eSpeak NG: machine speech that "
        "acts emotions by rules. Scores on it say nothing about human emotion.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("output", metavar="OUT", help="new or empty folder, or an unchanged earlier corpus to replace")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes")
    cells = "train clips per language and emotion; the other splits scale"
    parser.add_argument("--clips_per_cell", type=int, default=40, help=cells)
    parser.add_argument("--languages", nargs="+", default=list(SENTENCES), metavar="CODE", help="languages to speak")
    options = parser.parse_args(arguments)
    try:
        table = synthesize_corpus(options.output, options.seed, options.clips_per_cell, options.languages)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{table}\n\nSynthetic speech in {options.output}: scores on it say nothing about human emotion.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
