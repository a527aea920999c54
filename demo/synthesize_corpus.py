# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF001 -- sentences are in their native scripts, Cyrillic letters included
"""Writes a small multilingual *synthetic* emotional speech corpus: `python demo/synthesize_corpus.py OUT`.

eSpeak NG acts the emotions by rules (rate, pitch, loudness, timbre), so scores on this corpus say nothing about human
emotion; it shows that training, evaluation and open-set rejection work. Read: sentences, voices and prosody (what is
said and how), `plan_corpus` (which clips), `render_clip` (their audio), `synthesize_corpus` (the files), `main`.
The same seed gives the same bytes in a fresh process; eSpeak NG keeps state, so one process writes one corpus.
"""

import argparse
import csv
import ctypes
import hashlib
import os
import shutil
import sys
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
from tqdm.auto import tqdm

SAMPLING_RATE = 16_000  # Hz, of the files
SHORTEST, LONGEST = 0.8, 2.5  # seconds, of every clip
EMOTIONS = ("neutral", "happy", "sad", "angry")
COLUMNS = ("file_name", "label", "transcription", "speaker", "language", "corpus", "license", "emotion")
FINGERPRINT = "\n<!-- sha256 of this corpus: "  # starts the last line of its README

# eSpeak NG voice variants: women, then men. No variant is in two splits, so no speaker (language + variant) is.
VOICES = {
    "train": ("f1", "f3", "f5", "linda", "shelby", "m1", "m3", "m6", "Nguyen", "Reed"),
    "validation": ("f2", "m2"),
    "test": ("f4", "Annie", "m8"),
}
VOICES["ood"] = VOICES["validation"] + VOICES["test"]
SPLITS = tuple(VOICES)

ESPEAK_VOICE = {"pt": "pt-br"}  # where the eSpeak NG voice is not named as the language
NON_SPEECH = ("white_noise", "pink_noise", "babble", "chords", "melody", "tone", "sweep")

# Per language six adverbs, and per emotion openers whose {} takes any of them. All emotions share the adverbs, so only
# the opener tells the emotion; a pair of opener and adverb is in one of train, validation and test alone.
SENTENCES = {
    "en": {
        "adverbs": ("today", "this morning", "this evening", "at home", "at work", "here"),
        "neutral": (
            "I am reading the newspaper {}.",
            "The window is open {}.",
            "We have a meeting {}.",
            "I am writing a letter {}.",
            "The radio is on {}.",
        ),
        "happy": (
            "I am so happy {}!",
            "What a wonderful surprise {}!",
            "We are celebrating with joy {}!",
            "Everything is fantastic {}!",
            "How lovely to see you {}!",
        ),
        "sad": (
            "I feel so sad {}.",
            "I am crying all alone {}.",
            "I miss my mother {}.",
            "Everything is hopeless {}.",
            "My heart is broken {}.",
        ),
        "angry": (
            "I am absolutely furious {}!",
            "Stop lying to me {}!",
            "I hate this noise {}!",
            "What a disgrace {}!",
            "You are driving me mad {}!",
        ),
        "fear": ("I am terrified {}!", "Someone is following me {}!", "Help, there is danger {}!"),
    },
    "de": {
        "adverbs": ("heute", "heute Morgen", "heute Abend", "zu Hause", "im Büro", "hier"),
        "neutral": (
            "Ich lese {} die Zeitung.",
            "Das Fenster ist {} offen.",
            "Wir haben {} eine Besprechung.",
            "Ich schreibe {} einen Brief.",
            "Das Radio ist {} an.",
        ),
        "happy": (
            "Ich bin {} so glücklich!",
            "Was für eine schöne Überraschung {}!",
            "Wir feiern {} voller Freude!",
            "Alles ist {} einfach wunderbar!",
            "Wie schön, dich {} zu sehen!",
        ),
        "sad": (
            "Ich bin {} so traurig.",
            "Ich weine {} ganz allein.",
            "Ich vermisse {} meine Mutter.",
            "Alles ist {} hoffnungslos.",
            "Mein Herz ist {} gebrochen.",
        ),
        "angry": (
            "Ich bin {} so wütend!",
            "Hör {} auf zu lügen!",
            "Ich hasse {} diesen Lärm!",
            "Was für eine Frechheit {}!",
            "Du machst mich {} wahnsinnig!",
        ),
        "fear": ("Ich habe {} schreckliche Angst!", "Jemand verfolgt mich {}!", "Hilfe, es ist {} gefährlich!"),
    },
    "fr": {
        "adverbs": ("aujourd'hui", "ce matin", "ce soir", "à la maison", "au travail", "ici"),
        "neutral": (
            "Je lis le journal {}.",
            "La fenêtre est ouverte {}.",
            "Nous avons une réunion {}.",
            "J'écris une lettre {}.",
            "La radio est allumée {}.",
        ),
        "happy": (
            "Je suis aux anges {} !",
            "Quelle merveilleuse surprise {} !",
            "Nous fêtons ça avec joie {} !",
            "Tout est formidable {} !",
            "Quel plaisir de te voir {} !",
        ),
        "sad": (
            "Je me sens si triste {}.",
            "Je pleure en silence {}.",
            "Ma mère me manque {}.",
            "Tout est sans espoir {}.",
            "J'ai le cœur brisé {}.",
        ),
        "angry": (
            "Je suis en colère {} !",
            "Arrête de mentir {} !",
            "Je déteste ce bruit {} !",
            "Quel scandale {} !",
            "Tu me rends dingue {} !",
        ),
        "fear": ("J'ai terriblement peur {} !", "Quelqu'un me suit {} !", "Au secours, c'est dangereux {} !"),
    },
    "es": {
        "adverbs": ("hoy", "esta mañana", "esta noche", "en casa", "en el trabajo", "aquí"),
        "neutral": (
            "Leo el periódico {}.",
            "La ventana está abierta {}.",
            "Tenemos una reunión {}.",
            "Escribo una carta {}.",
            "La radio está encendida {}.",
        ),
        "happy": (
            "¡Estoy muy feliz {}!",
            "¡Qué maravillosa sorpresa {}!",
            "¡Celebramos con alegría {}!",
            "¡Todo es fantástico {}!",
            "¡Qué gusto verte {}!",
        ),
        "sad": (
            "Me siento muy triste {}.",
            "Lloro en silencio {}.",
            "Echo de menos a mi madre {}.",
            "Todo es inútil {}.",
            "Tengo el corazón roto {}.",
        ),
        "angry": (
            "¡Tengo mucha rabia {}!",
            "¡Deja de mentir {}!",
            "¡Odio este ruido {}!",
            "¡Esto es indignante {}!",
            "¡Me sacas de quicio {}!",
        ),
        "fear": ("¡Tengo mucho miedo {}!", "¡Alguien me sigue {}!", "¡Socorro, hay peligro {}!"),
    },
    "it": {
        "adverbs": ("oggi", "stamattina", "stasera", "a casa", "al lavoro", "qui"),
        "neutral": (
            "Leggo il giornale {}.",
            "La finestra è aperta {}.",
            "Abbiamo una riunione {}.",
            "Scrivo una lettera {}.",
            "La radio è accesa {}.",
        ),
        "happy": (
            "Sono così felice {}!",
            "Che splendida sorpresa {}!",
            "Festeggiamo con gioia {}!",
            "Tutto è fantastico {}!",
            "Che bello vederti {}!",
        ),
        "sad": (
            "Mi sento così triste {}.",
            "Piango in silenzio {}.",
            "Mi manca mia madre {}.",
            "Tutto è inutile {}.",
            "Ho il cuore spezzato {}.",
        ),
        "angry": (
            "Ho una rabbia terribile {}!",
            "Smettila di mentire {}!",
            "Odio questo rumore {}!",
            "Che vergogna {}!",
            "Mi fai arrabbiare {}!",
        ),
        "fear": ("Ho tanta paura {}!", "Qualcuno mi segue {}!", "Aiuto, c'è pericolo {}!"),
    },
    "pt": {
        "adverbs": ("hoje", "hoje de manhã", "esta noite", "em casa", "no trabalho", "aqui"),
        "neutral": (
            "Leio o jornal {}.",
            "A janela está aberta {}.",
            "Temos uma reunião {}.",
            "Escrevo uma carta {}.",
            "O rádio está ligado {}.",
        ),
        "happy": (
            "Estou tão feliz {}!",
            "Que surpresa maravilhosa {}!",
            "Festejamos com alegria {}!",
            "Tudo está fantástico {}!",
            "Que bom ver você {}!",
        ),
        "sad": (
            "Estou tão triste {}.",
            "Choro em silêncio {}.",
            "Sinto falta da minha mãe {}.",
            "Tudo é inútil {}.",
            "Estou de coração partido {}.",
        ),
        "angry": (
            "Estou com muita raiva {}!",
            "Pare de mentir {}!",
            "Odeio esse barulho {}!",
            "Que absurdo {}!",
            "Você me irrita demais {}!",
        ),
        "fear": ("Estou com muito medo {}!", "Alguém está me seguindo {}!", "Socorro, é perigoso {}!"),
    },
    "pl": {
        "adverbs": ("dzisiaj", "dziś rano", "dziś wieczorem", "w domu", "w pracy", "tutaj"),
        "neutral": (
            "Czytam {} gazetę.",
            "Okno jest {} otwarte.",
            "Mamy {} zebranie.",
            "Piszę {} list.",
            "Radio jest {} włączone.",
        ),
        "happy": (
            "Tak się {} cieszę!",
            "Co za cudowna niespodzianka {}!",
            "Świętujemy {} z radością!",
            "Wszystko jest {} wspaniałe!",
            "Jak miło cię {} widzieć!",
        ),
        "sad": (
            "Tak mi {} smutno.",
            "Płaczę {} w samotności.",
            "Tęsknię {} za mamą.",
            "Wszystko jest {} beznadziejne.",
            "Mam {} złamane serce.",
        ),
        "angry": (
            "Ogarnia mnie {} złość!",
            "Przestań {} kłamać!",
            "Nienawidzę {} tego hałasu!",
            "Co za skandal {}!",
            "Doprowadzasz mnie {} do szału!",
        ),
        "fear": ("Strasznie się {} boję!", "Ktoś mnie {} śledzi!", "Ratunku, {} jest niebezpiecznie!"),
    },
    "tr": {
        "adverbs": ("bugün", "bu sabah", "bu akşam", "evde", "ofiste", "burada"),
        "neutral": (
            "{} gazete okuyorum.",
            "Pencere {} açık.",
            "{} bir toplantımız var.",
            "{} mektup yazıyorum.",
            "Radyo {} açık.",
        ),
        "happy": (
            "{} çok mutluyum!",
            "{} ne güzel bir sürpriz!",
            "{} sevinçle kutluyoruz!",
            "Her şey {} harika!",
            "Seni {} görmek çok güzel!",
        ),
        "sad": (
            "{} çok üzgünüm.",
            "{} tek başıma ağlıyorum.",
            "{} annemi özlüyorum.",
            "Her şey {} umutsuz.",
            "{} kalbim kırık.",
        ),
        "angry": (
            "{} çok öfkeliyim!",
            "{} yalan söylemeyi bırak!",
            "{} bu gürültüden nefret ediyorum!",
            "{} bu ne rezalet!",
            "{} beni delirtiyorsun!",
        ),
        "fear": ("{} çok korkuyorum!", "{} biri beni takip ediyor!", "İmdat, {} tehlike var!"),
    },
    "ru": {
        "adverbs": ("сегодня", "этим утром", "сегодня вечером", "дома", "на работе", "здесь"),
        "neutral": (
            "{} я читаю газету.",
            "Окно {} открыто.",
            "У нас {} собрание.",
            "{} я пишу письмо.",
            "Радио {} включено.",
        ),
        "happy": (
            "Мне {} так радостно!",
            "Какой чудесный сюрприз {}!",
            "Мы {} весело празднуем!",
            "Всё {} просто прекрасно!",
            "Как приятно видеть тебя {}!",
        ),
        "sad": (
            "Мне {} так грустно.",
            "Я {} плачу в одиночестве.",
            "Я {} скучаю по маме.",
            "Всё {} безнадёжно.",
            "Моё сердце {} разбито.",
        ),
        "angry": (
            "Я {} просто в ярости!",
            "Хватит врать {}!",
            "Я ненавижу этот шум {}!",
            "Какое безобразие {}!",
            "Ты меня {} бесишь!",
        ),
        "fear": ("Мне {} очень страшно!", "Кто-то {} следит за мной!", "Помогите, {} опасно!"),
    },
    "hi": {
        "adverbs": ("आज", "आज सुबह", "आज शाम", "घर पर", "दफ़्तर में", "यहाँ"),
        "neutral": (
            "{} अख़बार मेज़ पर है।",
            "{} खिड़की खुली है।",
            "{} हमारी बैठक है।",
            "{} एक चिट्ठी आई है।",
            "{} रेडियो चालू है।",
        ),
        "happy": (
            "मैं {} बहुत खुश हूँ!",
            "{} कितना सुंदर तोहफ़ा है!",
            "हम {} जश्न मना रहे हैं!",
            "{} सब कुछ शानदार है!",
            "{} आपसे मिलकर मज़ा आया!",
        ),
        "sad": (
            "मैं {} बहुत दुखी हूँ।",
            "{} मुझे रोना आ रहा है।",
            "{} माँ की याद आती है।",
            "{} कोई उम्मीद नहीं है।",
            "मेरा दिल {} टूट गया है।",
        ),
        "angry": (
            "मुझे {} बहुत गुस्सा है!",
            "{} झूठ बोलना बंद करो!",
            "मुझे {} इस शोर से नफ़रत है!",
            "{} यह कैसी बदतमीज़ी है!",
            "तुम मुझे {} पागल कर रहे हो!",
        ),
        "fear": ("मुझे {} बहुत डर लग रहा है!", "{} कोई मेरा पीछा कर रहा है!", "बचाओ, {} ख़तरा है!"),
    },
}


class Prosody(NamedTuple):
    """How a sentence is spoken. The first four are eSpeak NG parameters, the others shape its waveform."""

    rate: float  # words per minute
    pitch: float  # 0..99
    pitch_range: float  # 0..99
    volume: float  # 0..200; a model that normalises each clip never sees it
    tilt: float  # dB per octave above 500 Hz: breathy < 0 < pressed
    fade: float  # dB from start to end
    emphasis: float  # exponent on the loudness envelope: monotonous < 0 < punched out


# Means per emotion, and the standard deviation of every clip around them: wide enough that the emotions overlap.
PROSODY = {
    "neutral": Prosody(165, 44, 34, 60, 0.0, -2.0, 0.0),
    "happy": Prosody(180, 68, 84, 72, 1.0, 0.0, 0.1),
    "sad": Prosody(128, 30, 16, 42, -3.5, -7.0, -0.2),
    "angry": Prosody(195, 52, 50, 80, 3.5, 3.0, 0.45),
    "fear": Prosody(225, 85, 60, 64, 1.5, 0.0, 0.0),
}
JITTER = Prosody(14, 8, 13, 8, 1.2, 2.5, 0.12)
PROSODY_LIMITS = ((80, 440), (0, 99), (0, 99), (20, 100))


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
    """eSpeak NG through ctypes: `say` returns what a voice speaks as a waveform.

    Raises:
        ImportError: espeakng-loader, which ships the engine, is not installed.
        RuntimeError: the engine does not start.
    """

    _CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

    def __init__(self):
        try:
            import espeakng_loader
        except ImportError as error:
            raise ImportError(
                "the synthetic corpus needs espeakng-loader (the eSpeak NG engine): pip install .[demo]"
            ) from error
        self._data = Path(espeakng_loader.get_data_path())
        self._library = ctypes.CDLL(str(espeakng_loader.get_library_path()))
        self._library.espeak_Initialize.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_int)
        self._library.espeak_Synth.argtypes = (
            *(ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_uint),
            *(ctypes.c_void_p, ctypes.c_void_p),
        )
        self._library.espeak_SetVoiceByName.argtypes = (ctypes.c_char_p,)
        # 2: synchronous, 0x8000: return an error instead of ending the process
        self.sampling_rate = self._library.espeak_Initialize(2, 0, os.fsencode(self._data.parent), 0x8000)
        if self.sampling_rate <= 0:
            raise RuntimeError(
                f"eSpeak NG cannot load its data from {self._data} ({len(str(self._data))} characters; paths of "
                "some 200 are too long for it: then use an environment in a shorter path)"
            )
        # Breathy voices (f2, f3, f5, ...) draw noise from a generator that the engine seeds with the clock.
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(1))
        self._blocks: list[np.ndarray] = []
        # Ctrl-C is raised in the main thread alone; inside a callback there, ctypes would swallow it.
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._callback = self._CALLBACK(self._receive)  # kept, or it would be collected while C holds it
        self._library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples, count, _events) -> int:
        if samples and count > 0:
            self._blocks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0  # go on

    def say(self, text: str, language: str, variant: str, prosody: Prosody) -> np.ndarray:
        """Speaks a sentence.

        Args:
            text: what to say, in the script of the language.
            language: a key of `SENTENCES`.
            variant: name of an eSpeak NG voice variant.
            prosody: rate, pitch, pitch range and volume are used here.

        Returns:
            float32 [T] at 16 kHz, without the silence around it.

        Raises:
            RuntimeError: the engine knows no such voice, or says nothing.
        """
        voice = f"{ESPEAK_VOICE.get(language, language)}+{variant}"
        # An unknown variant would be replaced by the plain voice without a word.
        known = (self._data / "voices" / "!v" / variant).is_file()
        if not known or self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise RuntimeError(f"this eSpeak NG has no voice {voice!r}")
        for parameter, value in ((1, prosody.rate), (2, prosody.volume), (3, prosody.pitch), (4, prosody.pitch_range)):
            self._library.espeak_SetParameter(parameter, round(value), 0)
        self._blocks.clear()
        encoded = text.encode() + b"\0"
        arguments = (encoded, len(encoded), 0, 1, 0, 1, None, None)  # 1: position in characters, 1: text in UTF-8
        status = self._thread.submit(self._library.espeak_Synth, *arguments).result()
        if status != 0 or not self._blocks:
            raise RuntimeError(f"eSpeak NG said nothing for {text!r} with the voice {voice!r} (status {status})")
        audio = np.concatenate(self._blocks).astype(np.float32) / 32768
        audio = soxr.resample(audio, self.sampling_rate, SAMPLING_RATE, quality="HQ")
        loud = np.flatnonzero(np.abs(audio) > 0.01 * np.abs(audio).max())
        return audio[loud[0] : loud[-1] + 1]


def _sentence(opener: str, adverb: str) -> str:
    text = opener.format(adverb)
    return text[:1].upper() + text[1:]


def sentences_of(language: str, emotion: str, split: str) -> list[str]:
    """The sentences of one split: of 5 openers x 6 adverbs, 5 pairs are for validation, 5 for test, 20 for train.

    Every opener and every adverb occurs in train, no pair in two of the splits. Fear, in `ood` alone, uses all pairs.
    """
    adverbs = SENTENCES[language]["adverbs"]
    parts = {0: "test", 1: "validation"}
    return [
        _sentence(opener, adverb)
        for i, opener in enumerate(SENTENCES[language][emotion])
        for j, adverb in enumerate(adverbs)
        if split == "ood" or split == parts.get((i + j) % len(adverbs), "train")
    ]


def clips_per_cell_of(split: str, clips_per_cell: int) -> int:
    """Clips per language and emotion in a split (and per language for fear in `ood`), from those in train."""
    share = {"train": 1.0, "validation": 0.2, "test": 0.3, "ood": 0.2}[split]
    return max(1, round(share * clips_per_cell))


def plan_corpus(languages: Sequence[str], clips_per_cell: int, seed: int) -> dict[str, list[Clip]]:
    """Chooses what is said, by whom and with which emotion.

    Args:
        languages: keys of `SENTENCES`.
        clips_per_cell: train clips per language and emotion, at least 1; the other splits scale with it.
        seed: of the choice of sentences and of the order of the clips.

    Returns:
        The clips of each split in shuffled order, so that a file's number tells nothing about its label.

    Raises:
        ValueError: a language is unknown or repeated, or a number is out of range.
    """
    unknown = [language for language in languages if language not in SENTENCES]
    if unknown or not languages or len(set(languages)) != len(languages):
        raise ValueError(f"languages must be distinct names from {list(SENTENCES)}, got {list(languages)}")
    if clips_per_cell < 1:
        raise ValueError(f"clips_per_cell must be at least 1, got {clips_per_cell}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    rng = np.random.default_rng(seed)
    plan: dict[str, list[Clip]] = {}
    for split in SPLITS:
        count = clips_per_cell_of(split, clips_per_cell)
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


def draw_prosody(emotion: str, rng: np.random.Generator) -> Prosody:
    """One clip's prosody: the emotion's mean with Gaussian jitter, inside what eSpeak NG accepts."""
    values = [rng.normal(mean, spread) for mean, spread in zip(PROSODY[emotion], JITTER, strict=True)]
    for i, (low, high) in enumerate(PROSODY_LIMITS):
        values[i] = min(max(values[i], low), high)
    return Prosody(*values)


def _colour(audio: np.ndarray, decibels_per_octave: float) -> np.ndarray:
    """Tilts the spectrum above 500 Hz; the gain is bounded by 18 dB, and the overall level kept."""
    spectrum = np.fft.rfft(audio)
    octaves = np.log2(np.maximum(np.fft.rfftfreq(len(audio), 1 / SAMPLING_RATE), 500.0) / 500.0)
    decibels = np.clip(decibels_per_octave * octaves, -18.0, 18.0)
    tilted = np.fft.irfft(spectrum * 10 ** (decibels / 20), len(audio))
    return tilted * (np.sqrt(np.mean(audio**2)) / np.sqrt(np.mean(tilted**2)))


def _shape(audio: np.ndarray, prosody: Prosody) -> np.ndarray:
    """Applies tilt, fade and emphasis to a spoken sentence, float [T]."""
    audio = _colour(audio, prosody.tilt)
    energy = np.cumsum(np.pad(audio**2, (641, 640)))
    envelope = np.sqrt(np.maximum(energy[1281:] - energy[:-1281], 0.0))  # over 80 ms around each sample
    envelope = np.maximum(envelope / envelope.max(), 0.1)
    fade = 10 ** (np.linspace(-0.5, 0.5, len(audio)) * prosody.fade / 20)
    return audio * fade * envelope**prosody.emphasis


def _tremble(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Adds the tremor of a frightened voice, 6 to 9 Hz in pitch (about 4 %) and loudness, to a float [T] waveform."""
    phase = 2 * np.pi * rng.uniform(6.0, 9.0) * np.arange(len(audio)) / SAMPLING_RATE + rng.uniform(0, 2 * np.pi)
    frequency = (phase[1] - phase[0]) * SAMPLING_RATE  # radians per second: a delay of a sin(wt) bends pitch by aw
    delayed = np.arange(len(audio)) + 0.04 / frequency * SAMPLING_RATE * np.sin(phase)
    return np.interp(delayed, np.arange(len(audio)), audio) * (1 + 0.5 * np.sin(phase + 1.0))


def _speak(clip: Clip, engine: Espeak, rng: np.random.Generator) -> np.ndarray:
    """One spoken clip, float [T]; one that would be too long is spoken faster. Raises ValueError if none can."""
    prosody = draw_prosody(clip.emotion, rng)
    limit = (LONGEST - 0.2) * SAMPLING_RATE  # room for the silence around it
    audio = engine.say(clip.text, clip.language, clip.voice, prosody)
    while len(audio) > limit:
        prosody = prosody._replace(rate=prosody.rate * 1.02 * len(audio) / limit)
        if prosody.rate > PROSODY_LIMITS[0][1]:
            raise ValueError(f"{clip.text!r} is too long to be said in {LONGEST} seconds; shorten it")
        audio = engine.say(clip.text, clip.language, clip.voice, prosody)
    audio = _shape(audio, prosody)
    return _tremble(audio, rng) if clip.emotion == "fear" else audio


def _pink(count: int, rng: np.random.Generator) -> np.ndarray:
    """Noise with power proportional to 1/f above 20 Hz, float [count], unit variance."""
    spectrum = np.fft.rfft(rng.normal(size=count))
    noise = np.fft.irfft(spectrum / np.sqrt(np.maximum(np.fft.rfftfreq(count, 1 / SAMPLING_RATE), 20.0)), count)
    return noise / noise.std()


def _note(frequency: float, count: int, rng: np.random.Generator) -> np.ndarray:
    """A plucked note of six harmonics that die away, float [count]."""
    time = np.arange(count) / SAMPLING_RATE
    waves = (
        np.sin(2 * np.pi * k * frequency * time + rng.uniform(0, 2 * np.pi)) * np.exp(-k * time) / k
        for k in range(1, 7)
    )
    return sum(waves) * np.minimum(time / 0.01, 1.0)


def _music(kind: str, count: int, rng: np.random.Generator) -> np.ndarray:
    """Two to four "chords" or four to eight notes of a "melody" in a major or minor key, float [count]."""
    scale = np.array([(0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10)][rng.integers(2)])
    root = rng.uniform(110.0, 262.0)
    steps = int(rng.integers(2, 5) if kind == "chords" else rng.integers(4, 9))
    bounds = np.linspace(0, count, steps + 1).astype(int)
    degrees = (0, 2, 4) if kind == "chords" else (0,)
    audio = np.zeros(count)
    for start, end in pairwise(bounds):
        tonic = int(rng.integers(7))
        for degree in degrees:
            octave, index = divmod(tonic + degree, 7)
            audio[start:end] += _note(root * 2 ** (octave + scale[index] / 12), end - start, rng)
    return audio


def _babble(count: int, engine: Espeak, rng: np.random.Generator) -> np.ndarray:
    """Six neutral voices at once, each repeated to fill float [count]."""
    audio = np.zeros(count)
    for language in rng.choice(list(SENTENCES), 6, replace=False).tolist():
        text = rng.choice(sentences_of(language, "neutral", "test")).item()
        voice = rng.choice(VOICES["ood"]).item()
        speech = engine.say(text, language, voice, draw_prosody("neutral", rng))
        audio += np.roll(np.resize(speech / speech.std(), count), int(rng.integers(count)))
    return audio


def _make_sound(kind: str, engine: Espeak, rng: np.random.Generator) -> np.ndarray:
    """One clip without a speaker, float [T]; `kind` is one of `NON_SPEECH`."""
    count = int(rng.uniform(1.0, LONGEST - 0.2) * SAMPLING_RATE)
    if kind == "white_noise":
        return rng.normal(size=count)
    if kind == "pink_noise":
        return _pink(count, rng)
    if kind == "babble":
        return _babble(count, engine, rng)
    if kind in ("chords", "melody"):
        return _music(kind, count, rng)
    start, end = np.exp(rng.uniform(np.log(100.0), np.log(4000.0), size=2))  # Hz
    frequency = np.full(count, start) if kind == "tone" else np.geomspace(start, end, count)
    return np.sin(2 * np.pi * np.cumsum(frequency) / SAMPLING_RATE)


def render_clip(clip: Clip, engine: Espeak, rng: np.random.Generator) -> np.ndarray:
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


def _readme(plan: dict[str, list[Clip]], languages: Sequence[str], clips_per_cell: int, seed: int) -> str:
    files = "\n".join(f"  - split: {split}\n    path: {split}/**" for split in SPLITS if split != "ood")
    return f"""---
pretty_name: MMSER synthetic emotional speech (eSpeak NG)
license: apache-2.0
language: [{", ".join(languages)}]
task_categories: [audio-classification]
tags: [synthetic, speech-emotion-recognition]
configs:
- config_name: default
  data_files:
{files}
- config_name: ood
  data_files:
  - split: ood
    path: ood/**
---
# A synthetic emotional speech corpus

**This is synthetic speech. No person speaks here, and no emotion was felt: a speech engine acts four emotions by
fixed rules. Scores on it say nothing about how well a model recognises human emotion.** It shows that a
pipeline trains, evaluates and rejects unknown input, and nothing else. Never report a score on it without these words.

Made by `python demo/synthesize_corpus.py OUT --seed {seed} --clips_per_cell {clips_per_cell} \
--languages {" ".join(languages)}`
with the eSpeak NG engine, which is not part of the corpus. All clips are 16 kHz mono FLAC, {SHORTEST} to {LONGEST} s.

- Emotion is in the voice (rate, pitch, pitch range, timbre, loudness; each clip differs at random) and in the words.
- A speaker is a language and a voice variant. Train, validation and test share no variant and no sentence.
- `ood/` holds what is none of the four emotions (label -1): frightened speech by voices that are not in train, noise,
  babble, music, tones. `emotion` names it.

{_table(plan)}
"""


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
    """Makes sure that replacing a folder loses nothing but an untouched corpus of this script.

    Raises:
        FileExistsError: it is no folder, or holds anything that this script did not write.
    """
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise FileExistsError(f"{folder} exists and is not a folder; give a new or empty folder")
    if not any(folder.iterdir()):
        return
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    body, mark, last_line = text.rpartition(FINGERPRINT)
    if not mark:
        raise FileExistsError(f"{folder} is not empty and is no corpus of this script; give a new or empty folder")
    if last_line.split(" ")[0] != _fingerprint(folder, body):
        raise FileExistsError(f"the corpus in {folder} was changed, so it is not replaced; give a new or empty folder")


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


def _publish(partial: Path, folder: Path) -> None:
    """Puts a finished corpus in its place; an earlier one is removed only when the new one is there."""
    check_output_folder(folder)  # again: it may have changed in the meantime
    previous = partial.with_suffix(".previous")
    if folder.exists():
        folder.rename(previous)
    try:
        partial.rename(folder)
    except BaseException:  # an interruption too must not take the earlier corpus away
        if previous.exists():
            previous.rename(folder)
        raise
    if previous.exists():
        shutil.rmtree(previous)


def synthesize_corpus(
    output: str | os.PathLike, seed: int = 0, clips_per_cell: int = 20, languages: Sequence[str] = tuple(SENTENCES)
) -> str:
    """Writes the corpus: `{train,validation,test,ood}/metadata.csv` with FLAC files, and a `README.md`.

    Args:
        output: folder that is new, empty, or an untouched corpus of this script, which is replaced.
        seed: of everything random.
        clips_per_cell: train clips per language and emotion; validation has 0.2, test 0.3 of it.
        languages: keys of `SENTENCES`.

    Returns:
        A table of clips per split and label with their seconds.

    Raises:
        FileExistsError: `output` holds something else; nothing in it is touched.
        ImportError: espeakng-loader is not installed.
        ValueError: an argument is out of range.
    """
    folder = Path(output).absolute()
    plan = plan_corpus(languages, clips_per_cell, seed)
    check_output_folder(folder)
    engine = Espeak()
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".{folder.name}.{os.getpid()}.partial"
    partial.mkdir()
    try:
        seconds = {}
        with tqdm(total=sum(map(len, plan.values())), unit="clip", desc="synthesizing") as progress:
            for number, split in enumerate(SPLITS):
                seconds[split] = _write_split(partial / split, plan[split], engine, (seed, number), progress)
        readme = _readme(plan, languages, clips_per_cell, seed)
        last_line = f"{FINGERPRINT}{_fingerprint(partial, readme)} -->\n"
        (partial / "README.md").write_text(readme + last_line, encoding="utf-8")
        _publish(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already when all went well
    return _table(plan, seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns its exit status."""
    parser = argparse.ArgumentParser(
        description="Write a small multilingual synthetic emotional speech corpus with eSpeak NG: machine speech that "
        "acts emotions by rules: scores on it say nothing about human emotion.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("output", metavar="OUT", help="new or empty folder, or an untouched earlier corpus to replace")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes")
    parser.add_argument(
        "--clips_per_cell", type=int, default=20, help="train clips per language and emotion; the other splits scale"
    )
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
