# SPDX-License-Identifier: Apache-2.0
"""A known corpus as its authors give it, made into training data: tables for each split, and what is left out.

Read in this order: `find_clips` (which files are clips, and what is known of them), `give_targets` (their classes),
`assign_splits`, `write_data`. `convert` does all of it.
"""

import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from configuration_mmser import DEFAULT_LABELS
from mmser.files import whole_folder
from mmser.known_corpora import CORPORA, OTHER, SEXES, KnownCorpus, describe_corpus
from mmser.sources import AUDIO_SUFFIXES, SPLIT_NAMES, Record
from mmser.splits import divide_by_speaker
from mmser.table_files import as_text, csv_line
from mmser.tables import format_table

OPEN_SET, OPEN_SET_KNOWN_VOICES = "ood", "ood_train"  # folders of clips of none of the classes
LEFT_OUT_NAME = "left_out.csv"
COLUMNS = ("emotion", "transcription", "speaker", "sex", "language", "corpus")
SHARES = {"test": 0.15, "validation": 0.15}  # of the speakers, as in `load_emotion_dataset`
FEW = 5  # names that a message lists


@dataclass
class Clip:
    """One clip: where it is, and the columns of its row."""

    path: Path
    name: str  # its path below the corpus, with slashes
    key: str  # what tells it from other clips of the corpus
    fields: dict[str, str]  # those of `COLUMNS`, of the corpus's extra columns, and `fold` or `split`
    target: str = ""  # its class, or `OTHER`
    split: str = ""  # of `SPLIT_NAMES`, or a folder of the open set


class LeftOut(NamedTuple):
    """A file, or a row of the corpus's tables, that is no clip to train on."""

    name: str
    reason: str


@dataclass(frozen=True)
class Options:
    """What can be chosen, see the flags of `corpus_command`."""

    all_labels: bool = False
    targets: Mapping[str, str] = field(default_factory=dict)
    fold: str | None = None
    seed: int = 42
    copy: bool = False


@dataclass
class Conversion:
    """What came of it."""

    corpus: KnownCorpus
    folder: Path
    options: Options
    clips: list[Clip]
    left_out: list[LeftOut]

    @property
    def counts(self) -> str:
        """How many clips of each label and how many speakers each split has, in Markdown."""
        labels = _labels([clip.target for clip in self.clips])
        rows = []
        for split in (*SPLIT_NAMES, OPEN_SET, OPEN_SET_KNOWN_VOICES):
            clips = [clip for clip in self.clips if clip.split == split]
            own = Counter(clip.target for clip in clips)
            speakers = len({clip.fields["speaker"] for clip in clips})
            if clips:
                rows.append({"split": split, **{label: own[label] for label in labels}, "speakers": speakers})
        return format_table(rows, ["split", *labels, "speakers"])

    @property
    def reasons(self) -> dict[str, int]:
        """Why something is left out -> how often; copies of all clips are one reason."""
        copy = "the same clip as "
        reasons = (f"{copy}another file" if entry.reason.startswith(copy) else entry.reason for entry in self.left_out)
        return dict(Counter(reasons).most_common())

    @property
    def training_command(self) -> str:
        """The line that trains on the result."""
        splits = {clip.split for clip in self.clips}
        flags = f" --ood_dir {_quoted(self.folder / OPEN_SET)}" if OPEN_SET in splits else ""
        flags += " --allow_speaker_overlap" if self.corpus.shares_speakers else ""
        flags += "" if self.options.copy else " --allow_outside_files"  # the tables name what lies elsewhere
        run = self.corpus.name.lower()
        return f"python train_hf.py --data_dir {_quoted(self.folder)}{flags} --output_dir runs/{run}"


def _quoted(path: Path) -> str:
    return f'"{path}"' if " " in str(path) else str(path)


def convert(corpus: KnownCorpus, source: Path, folder: Path, options: Options | None = None) -> Conversion:
    """
    Make training data of a corpus that lies on the disk as its authors give it.

    Args:
        corpus: which one it is.
        source: the folder that it was unpacked to.
        folder: where the tables go, and the audio if it is copied: a new or empty folder, not within `source`.
        options: see `Options`.
    Raises:
        ValueError: `source` has no such corpus, or a part of it is missing; `folder` holds something.
    """
    options = options or Options()
    _check_folders(source, folder)
    _check_options(corpus, options)
    clips, left_out = find_clips(corpus, source)
    clips, without = give_targets(corpus, clips, options)
    assign_splits(corpus, clips, options)
    result = Conversion(corpus, folder, options, clips, sorted([*left_out, *without]))
    write_data(result)
    return result


def _check_folders(source: Path, folder: Path) -> None:
    if not source.is_dir():
        raise ValueError(f"--input {source} is not a folder")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--output {folder} is not empty: name a new folder, or delete what is in it")
    if folder.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"--output {folder} lies within --input {source}: name a folder outside the corpus")


def _check_options(corpus: KnownCorpus, options: Options) -> None:
    emotions = list(dict.fromkeys(corpus.emotions.values()))
    for emotion, target in options.targets.items():
        if emotion not in emotions:
            raise ValueError(f"--map {emotion}=...: {corpus.name} has no such emotion; it has {', '.join(emotions)}")
        if target not in (*DEFAULT_LABELS, OTHER, ""):
            raise ValueError(
                f"--map {emotion}={target}: the class is one of {', '.join(DEFAULT_LABELS)}, {OTHER} (none of the "
                "classes), or nothing (left out)"
            )
    if options.all_labels and options.targets:
        raise ValueError("--map is about the four classes, and --labels all keeps the authors' labels: choose one")
    if options.fold is not None and options.fold not in corpus.folds:
        known = f"its folds are {', '.join(corpus.folds)}" if corpus.folds else "no folds of it are in common use"
        raise ValueError(f"--fold {options.fold}: {corpus.name} has no such fold; {known}")


# -------------------------------------------------------------------------------------------------- 1. which files


def find_clips(corpus: KnownCorpus, source: Path) -> tuple[list[Clip], list[LeftOut]]:
    """
    The clips of a corpus, sorted by name, and what is left out: files with other names, second copies, clips that
    only the corpus's tables have. Hidden files, and those that are no audio, do not count.

    Raises:
        ValueError: there is no audio, none of it is of this corpus, or the tables that it needs are missing.
    """
    files = sorted(_walk(source))
    _check_names(files)
    audio = [path for path in files if path.suffix.lower() in AUDIO_SUFFIXES]
    if not audio:
        raise ValueError(_no_audio(corpus, source, files))
    top = Path(source.resolve().name)  # its name may tell something too, as "train_splits" of MELD does
    named = {path: corpus.recognise(top / path.relative_to(source)) for path in audio}
    if not any(named.values()):
        raise ValueError(_not_this_corpus(corpus, source, audio))
    tables = corpus.read_tables(files) if corpus.read_tables else {}
    if corpus.needs_tables and not tables:
        raise ValueError(f"--input {source} lacks {corpus.tables}, which has the emotions of {corpus.name}")
    clips, left_out = [], []
    keys = set()
    for path, fields in named.items():
        below = path.relative_to(source)
        try:
            if fields is None:
                raise ValueError(corpus.why_no_clip(top / below))
            fields = {**fields, **corpus.derive(fields)}
            key = corpus.key.format_map(fields)
            keys.add(key)
            clips.append(Clip(path, below.as_posix(), key, _complete(corpus, fields, tables.get(key))))
        except ValueError as error:
            left_out.append(LeftOut(below.as_posix(), str(error)))
    if corpus.needs_tables:
        left_out += [LeftOut(key, "a row of the corpus's tables without a file") for key in tables if key not in keys]
    clips, copies = _without_copies(clips)
    return clips, left_out + copies


def _walk(source: Path) -> Iterator[Path]:
    """All files that are not hidden, also behind links to folders."""
    visited = set()
    for folder, folders, files in os.walk(source, followlinks=True):
        if (real := os.path.realpath(folder)) in visited:  # a link to a folder above
            folders.clear()
            continue
        visited.add(real)
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__MACOSX"]
        yield from (Path(folder, name) for name in files if not name.startswith("."))


def _check_names(files: Iterable[Path]) -> None:
    """A table in UTF-8 cannot name what an archive of another system was unpacked to under a broken name."""
    for path in files:
        try:
            str(path).encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the name of the file {str(path)!a} is not in UTF-8: rename its folder, or unpack the corpus "
                "with another program"
            ) from error


def _complete(corpus: KnownCorpus, fields: Mapping[str, str], row: Mapping[str, str] | None) -> dict[str, str]:
    """The columns of a clip, from its name and its row in the corpus's tables. ValueError says what is missing."""
    if corpus.needs_tables and row is None:
        raise ValueError(f"no row in {corpus.tables}")
    fields = {**fields, **(row or {})}
    emotion = corpus.emotions.get(fields["emotion"])
    if emotion is None:
        raise ValueError(f"the emotion {fields['emotion']!r} is none of {corpus.name}")
    columns = {
        "emotion": emotion,
        "transcription": fields.get("transcription") or corpus.sentences.get(fields.get("sentence", ""), ""),
        "speaker": fields["speaker"],
        "sex": SEXES.get(fields.get("sex", "").lower(), ""),
        "language": fields.get("language") or corpus.language,
        "corpus": corpus.name,
    }
    return columns | {name: fields.get(name, "") for name in (*corpus.extra, "fold", "split")}


def _without_copies(clips: Iterable[Clip]) -> tuple[list[Clip], list[LeftOut]]:
    """One file of each clip, WAV before others and higher folders before lower ones; copies, and empty files."""
    groups: dict[str, list[Clip]] = defaultdict(list)
    kept, left_out = [], []
    for clip in clips:
        if clip.path.stat().st_size:
            groups[clip.key].append(clip)
        else:
            left_out.append(LeftOut(clip.name, "an empty file"))
    for group in groups.values():
        best, *others = sorted(group, key=lambda clip: (_rank(clip.path.suffix), clip.name.count("/"), clip.name))
        kept.append(best)
        left_out += [LeftOut(clip.name, f"the same clip as {best.name}") for clip in others]
    return sorted(kept, key=lambda clip: clip.name), left_out


def _rank(suffix: str) -> int:
    return AUDIO_SUFFIXES.index(suffix.lower())


def _no_audio(corpus: KnownCorpus, source: Path, files: Sequence[Path]) -> str:
    archives = [path.name for path in files if path.suffix.lower() in (".zip", ".gz", ".tgz", ".tar", ".rar", ".7z")]
    hint = f": unpack {', '.join(archives[:FEW])} first" if archives else ""
    hint = hint or f"; {corpus.name} is downloaded by hand from {corpus.download}"
    return f"--input {source} has no audio files{hint}"


def _not_this_corpus(corpus: KnownCorpus, source: Path, audio: Sequence[Path]) -> str:
    """What is in the folder instead."""
    first = audio[0].relative_to(source).as_posix()
    found: Counter[str] = Counter()
    for key, other in CORPORA.items():
        for path in audio:
            found[key] += other.recognise(Path(source.resolve().name, path.relative_to(source))) is not None
    best, count = found.most_common(1)[0]
    hint = f"; they look like {CORPORA[best].name} ({best} in --list)" if 2 * count > len(audio) else ""
    return (
        f"--input {source}: none of the {len(audio)} audio files is named as in {corpus.name}, such as "
        f"{corpus.example}; the first is {first}{hint}"
    )


# ------------------------------------------------------------------------------------------- 2. classes and splits


def give_targets(corpus: KnownCorpus, clips: Iterable[Clip], options: Options) -> tuple[list[Clip], list[LeftOut]]:
    """Give each clip its class; return those that have one or are `OTHER`, and those that are left out."""
    targets = {**corpus.targets, **options.targets}
    kept, left_out = [], []
    for clip in clips:
        emotion = clip.fields["emotion"]
        clip.target = targets.get(emotion, OTHER)
        if clip.target == "":
            left_out.append(LeftOut(clip.name, f"the emotion is {emotion!r}, which is left out"))
            continue
        if options.all_labels:
            clip.target = emotion
        kept.append(clip)
    if all(clip.target == OTHER for clip in kept):
        raise ValueError(f"no clip of {', '.join(DEFAULT_LABELS)} is left: is a part of {corpus.name} missing?")
    return kept, left_out


def assign_splits(corpus: KnownCorpus, clips: Sequence[Clip], options: Options) -> None:
    """
    Give each clip its split: the corpus's own, a fold, or one of its speaker. Clips of none of the classes go to the
    open set, those by speakers of the training data into a part of their own, as the model will know these voices.
    """
    if corpus.has_splits:
        splits = [clip.fields["split"] for clip in clips]
    elif corpus.folds:
        splits = _splits_by_fold(corpus, clips, options.fold)
    else:
        splits = _splits_by_speaker(clips, options)
    for clip, split in zip(clips, splits, strict=True):
        is_open = clip.target == OTHER and not options.all_labels
        clip.split = split if not is_open else OPEN_SET_KNOWN_VOICES if split == "train" else OPEN_SET


def _splits_by_fold(corpus: KnownCorpus, clips: Sequence[Clip], fold: str | None) -> list[str]:
    """One fold tests, the fold before it validates (before the first, the last one), and all others train."""
    fold = fold or corpus.folds[-1]
    before = corpus.folds[corpus.folds.index(fold) - 1]
    names = {fold: "test", before: "validation"}
    found = sorted({clip.fields["fold"] for clip in clips})
    if len(found) < 3 or not {fold, before} <= set(found):
        raise ValueError(
            f"--fold {fold} tests on fold {fold}, validates on {before} and trains on the others, but only "
            f"{', '.join(found)} of {corpus.name} is here"
        )
    return [names.get(clip.fields["fold"], "train") for clip in clips]


def _splits_by_speaker(clips: Sequence[Clip], options: Options) -> list[str]:
    """
    Whole speakers, so that each split has its share of each class, sex and language.

    One speaker trains; of two, one validates. A speaker without a clip of a class is in none of the splits, and so a
    new voice.
    """
    known = [clip for clip in clips if options.all_labels or clip.target != OTHER]
    strata = {pair: number for number, pair in enumerate(sorted({_stratum(clip) for clip in known}))}
    records = [
        Record(clip.name, "train", clip.target, "", {}, speaker=clip.fields["speaker"], labels=strata[_stratum(clip)])
        for clip in known
    ]
    speakers = len({record.speaker for record in records})
    shares = SHARES if speakers > 2 else {"validation": 0.5} if speakers == 2 else {}
    divided = divide_by_speaker(records, range(len(records)), shares, options.seed, allow_overlap=False)
    split_of = {records[index].speaker: split for split, indices in divided.items() for index in indices}
    return [split_of.get(clip.fields["speaker"], OPEN_SET) for clip in clips]


def _stratum(clip: Clip) -> tuple[str, str, str]:
    return clip.target, clip.fields["sex"], clip.fields["language"]


def _labels(targets: Iterable[str]) -> list[str]:
    """Our classes in their order, then the other labels, then those of none of the classes."""
    found = set(targets)
    others = sorted(found - {*DEFAULT_LABELS, OTHER})
    return [name for name in (*DEFAULT_LABELS, *others, OTHER) if name in found]


# ------------------------------------------------------------------------------------------------------- 3. writing


def write_data(result: Conversion) -> None:
    """Write a table for each split, `left_out.csv` and a README; copy the audio if that is wanted."""
    with whole_folder(result.folder) as folder:
        _write_into(folder, result)


def _write_into(folder: Path, result: Conversion) -> None:
    splits: dict[str, list[Clip]] = defaultdict(list)
    for clip in result.clips:
        splits[clip.split].append(clip)
    if result.options.copy:
        for clip in tqdm(result.clips, desc="Copying", unit="file", disable=None):
            target = folder / clip.split / clip.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(clip.path, target)
    columns = (*COLUMNS, *result.corpus.extra)
    for split, clips in splits.items():
        (folder / split).mkdir(exist_ok=True)
        rows = [
            [
                # Slashes, so that a copied folder can be read on other systems
                clip.name if result.options.copy else os.path.abspath(clip.path),
                "unknown" if split in (OPEN_SET, OPEN_SET_KNOWN_VOICES) else clip.target,
                *(clip.fields[name] for name in columns),
            ]
            for clip in clips
        ]
        _write_table(folder / split / "metadata.csv", ["file_name", "label", *columns], rows)
    if result.left_out:
        left_out = [[as_text(cell) for cell in row] for row in result.left_out]
        _write_table(folder / LEFT_OUT_NAME, ["file_name", "reason"], left_out)
    (folder / "README.md").write_text(describe_result(result), encoding="utf-8")


def _write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        file.writelines(csv_line(row) for row in (header, *rows))


# --------------------------------------------------------------------------------------------------- 4. in words


def describe_result(result: Conversion) -> str:
    """The README of the result, in Markdown."""
    where = "beside the tables" if result.options.copy else "where it was; the tables name it"
    lines = [
        f"# {result.corpus.name} for MMSER",
        describe_corpus(result.corpus),
        f"The audio is {where}. {_describe_splits(result)}",
        result.counts,
    ]
    if result.left_out:
        reasons = "\n".join(f"- {count} x {reason}" for reason, count in result.reasons.items())
        lines.append(f"Left out, listed in `{LEFT_OUT_NAME}`:\n\n{reasons}")
    return "\n\n".join([*lines, f"```bash\n{result.training_command}\n```"]) + "\n"


def _describe_splits(result: Conversion) -> str:
    corpus = result.corpus
    if corpus.has_splits:
        shared = " Speakers are in several of them." if corpus.shares_speakers else ""
        text = f"The splits are the authors'.{shared}"
    elif corpus.folds:
        text = f"Fold {result.options.fold or corpus.folds[-1]} is the test data, and the fold before it validates."
    else:
        text = f"No speaker is in two splits (seed {result.options.seed})."
    if any(clip.split in (OPEN_SET, OPEN_SET_KNOWN_VOICES) for clip in result.clips):
        text += (
            f" `{OPEN_SET}` has the clips of other emotions for the open-set scores, and `{OPEN_SET_KNOWN_VOICES}` "
            "those by speakers of the training data, whose voices the model knows."
        )
    return text


def summarise(result: Conversion) -> str:
    """What the console tells: how many clips there are, what is left out and why, and how to go on."""
    corpus, clips = result.corpus, result.clips
    speakers = len({clip.fields["speaker"] for clip in clips})
    lines = [
        f"{corpus.name}: {len(clips):,} clips by {speakers} speakers in {result.folder} (the authors count "
        f"{corpus.clips} by {corpus.speakers}). Licence: {corpus.licence}.",
        f"{_describe_splits(result)}\n\n{result.counts}",
    ]
    if result.left_out:
        listed = "\n".join(f"  {count:,} x {reason}" for reason, count in result.reasons.items())
        lines.append(f"Left out {len(result.left_out):,}, listed in {result.folder / LEFT_OUT_NAME}:\n{listed}")
    if corpus.tables and not any(clip.fields["transcription"] for clip in clips):
        lines.append(f"There are no transcripts: they are in {corpus.tables} of the corpus.")
    if corpus.note:
        lines.append(corpus.note)
    return "\n\n".join([*lines, f"Train on it:\n  {result.training_command}"])
