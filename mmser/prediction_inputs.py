# SPDX-License-Identifier: Apache-2.0
"""What `mmser predict` is given: recordings by file, folder or pattern, what is said in them, and who speaks.

`find_inputs` finds the files, `add_texts` and `speaker_turns` read what belongs to them.
"""

import glob
import itertools
import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

from audio_mmser import audio_length, why_silent
from mmser.boundary import Reach, of_folder
from mmser.console import mistake
from mmser.prediction_arguments import PredictionArguments
from mmser.sources import AUDIO_SUFFIXES, find_column
from mmser.table_files import find_files, near_name, read_rows
from mmser.timed_files import Span, read_rttm, read_srt

RATE = 16_000  # Hz, in which lengths are counted
FEW = 3  # bad rows that a message lists
GONE, SPECIAL = "there is no such file", "this is a device or a pipe"  # what is wrong with a file
WAY_OUT = "and is not followed: name the file itself, or give --allow_outside_files"


@dataclass
class Input:
    """
    One clip or recording.

    Args:
        source (`str`): its path or address; empty for words alone.
        text (`str`): what is said in it, if that is known.
        words (`list`): the same with times, as the pipeline takes it under `chunks`.
        seconds (`float`): its length; None if only reading it would tell.
        error (`str`): why it cannot be classified; empty if nothing is wrong with it so far.
    """

    source: str
    text: str | None = None
    words: list[dict[str, Any]] = field(default_factory=list)
    seconds: float | None = None
    error: str = ""

    @property
    def name(self) -> str:
        """What tables call it: the path as it was found, in characters that can be written."""
        return os.fsencode(self.source).decode("utf-8", "replace")

    @property
    def stem(self) -> str:
        """The name of the file without folder and ending."""
        return Path(self.name).stem


def find_inputs(words: Sequence[str], allow_outside_files: bool = False) -> list[Input]:
    """
    The recordings that words of the command line name, each once: files, all audio files below a folder, patterns
    such as `*.wav` or `**/*.wav` (where the shell has not replaced them), and addresses.

    A file that is not there is an input with an error, as long as there is another. So is a link out of the folder in
    which it was found, unless `allow_outside_files`; a link that is named itself is followed.

    Raises:
        ValueError: a folder or a pattern without audio files.
        FileNotFoundError: nothing that was named is there.
    """
    found: dict[str, Input] = {}
    for word in words:
        folder, sources = _sources(word)
        boundary = None if folder is None else of_folder(folder, Reach(allow_outside_files=allow_outside_files))
        for source in sources:
            key = os.path.normpath(source) if "://" not in source else source
            leads_out = boundary is not None and boundary.refusal(source)
            if key not in found or not leads_out:  # it may be named itself as well
                found[key] = Input(source, error=f"this is a link out of {folder}, {WAY_OUT}" if leads_out else "")
    for one in found.values():
        if not one.error and "://" not in one.source and not os.path.isfile(one.source):
            one.error = f"{SPECIAL}, and is never read as audio" if os.path.exists(one.source) else GONE
    if found and all(one.error for one in found.values()):
        first = next(iter(found.values()))
        if first.error == GONE:
            raise FileNotFoundError(f"{first.name}: {GONE} or folder.{near_name(Path(first.name))}")
        raise ValueError(f"{first.name}: {first.error}.")
    return list(found.values())


def _sources(word: str) -> tuple[Path | None, list[str]]:
    """What a word means, and the folder in which that was looked for; None where the word itself names it."""
    if "://" in word or os.path.isfile(word):
        return None, [word]
    if os.path.isdir(word):
        files = _audio_files_below(word)
        if not files:
            raise ValueError(f"{word} has no audio files: none ends in {', '.join(AUDIO_SUFFIXES)}.")
        return Path(word), files
    if not glob.has_magic(word):
        return None, [word]
    files, word = [], os.path.expanduser(word)
    for path in sorted(glob.glob(word, recursive=True)):
        files += _audio_files_below(path) if os.path.isdir(path) else [path] if _is_audio(path) else []
    if not files:
        raise ValueError(f"No audio file matches {word}.")
    return Path(*itertools.takewhile(lambda part: not glob.has_magic(part), Path(word).parts)), files


def _audio_files_below(folder: str) -> list[str]:
    """Sorted by path; what is hidden is left out."""
    files = []
    for place, subfolders, names in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        files += [os.path.join(place, name) for name in names if _is_audio(name) and not name.startswith(".")]
    return sorted(files)


def _is_audio(name: str) -> bool:
    return name.lower().endswith(AUDIO_SUFFIXES)


def measure(inputs: Sequence[Input]) -> None:
    """
    Find out how long each recording is, as far as its header tells. One that cannot be read gets its error, and so
    does one in which nothing can be heard: a model is as sure of silence as of speech.
    """
    for one in inputs:
        if one.error or not one.source or "://" in one.source:
            continue
        try:
            one.seconds = audio_length(one.source, RATE) / RATE
            one.error = why_silent(one.source)
        except (ValueError, OSError) as error:
            one.error = reason(error, one)


def reason(error: Exception, one: Input) -> str:
    """What is wrong with an input, without its name; raises what looks like a fault of the program."""
    message = mistake(error)
    if message is None:
        raise error
    message = re.sub(r"^(input 0|recording)( at [\d.]+ s)?: ", "", message)
    for prefix in ("audio row 0: ", f"audio '{one.source}': ", f"{one.source}: "):
        message = message.removeprefix(prefix)
    return message


def add_texts(inputs: Sequence[Input], options: PredictionArguments) -> list[str]:
    """
    Give each input what is said in it, as --text or --transcripts says.

    Returns:
        Notes for the user: inputs without a text, rows without an input.

    Raises:
        ValueError: a file that is malformed, or that names none of the inputs.
    """
    if options.text is not None:
        for one in inputs:
            one.text = options.text
    if options.subtitles:
        inputs[0].words = read_srt(Path(options.subtitles))
    elif options.transcripts:
        return _add_from_table(inputs, Path(options.transcripts), options)
    return []


def _add_from_table(inputs: Sequence[Input], path: Path, options: PredictionArguments) -> list[str]:
    problems: list[str] = []
    rows = read_rows(path, path.name, problems)
    if problems:
        more = f"; and {len(problems) - FEW} more" if len(problems) > FEW else ""
        raise ValueError(f"--transcripts {path}: {'; '.join(problems[:FEW])}{more}.")
    available = list(dict.fromkeys(column for _, row in rows for column in row))
    columns = {}
    for role in ("audio", "text"):
        name = getattr(options, f"{role}_column")
        columns[role] = find_column(role, name, available)
        if columns[role] is None:
            raise ValueError(
                f"--transcripts {path} has no {role} column {name!r}; its columns are {', '.join(available)}. Name "
                f"the right one with --{role}_column."
            )
    named = [(number, str(row.get(columns["audio"]) or ""), row.get(columns["text"])) for number, row in rows]
    files = find_files(path.parent, {name for _, name, _ in named if name}, path.name)
    places = _Places(inputs)
    given: dict[int, int] = {}  # by input: the row
    for number, name, text in named:
        index = places.find(name, files.get(name, name)) if name else None
        if index is None:
            continue
        written = str(text or "").strip() or None
        if index in given and inputs[index].text != written:
            raise ValueError(
                f"--transcripts {path}: rows {given[index]} and {number} say different things of {inputs[index].name}."
            )
        given[index], inputs[index].text = number, written
    if not given:
        raise ValueError(
            f"--transcripts {path} names none of the {len(inputs)} inputs: it has {named[0][1]!r} where there is "
            f"{inputs[0].name!r}."
        )
    notes = []
    silent = sum(one.text is None for one in inputs)
    if silent:
        notes.append(f"inputs without a text in {path.name}, whose audio alone counts: {silent} of {len(inputs)}")
    unused = len({name for _, name, _ in named}) - len(given)
    if unused > 0:
        notes.append(f"files in {path.name} that are not among the inputs: {unused}")
    return notes


class _Places:
    """The inputs by path, and by the end of their path."""

    def __init__(self, inputs: Sequence[Input]):
        self.inputs = inputs
        self.by_path = {_folded(os.path.realpath(one.source)): index for index, one in enumerate(inputs)}
        self.by_name: dict[str, list[int]] = {}
        for index, one in enumerate(inputs):
            self.by_name.setdefault(_folded(os.path.basename(one.source)), []).append(index)

    def find(self, name: str, path: str) -> int | None:
        """
        The index of the input that a table calls `name` and that may lie at `path`; None if there is none.

        Raises:
            ValueError: two inputs end in `name`.
        """
        index = self.by_path.get(_folded(os.path.realpath(path)))
        if index is not None:
            return index
        parts = [_folded(part) for part in PureWindowsPath(name).parts]  # knows both kinds of slashes
        found = [
            index
            for index in self.by_name.get("".join(parts[-1:]), [])
            if [_folded(part) for part in PureWindowsPath(self.inputs[index].source).parts][-len(parts) :] == parts
        ]
        if len(found) > 1:
            first, second = (self.inputs[index].name for index in found[:2])
            raise ValueError(f"--transcripts: {name!r} may be {first} or {second}: write more of the path.")
        return found[0] if found else None


def _folded(name: str) -> str:
    """A name as another system may write it: in another Unicode normal form, or in other case."""
    return unicodedata.normalize("NFC", name).casefold()


def speaker_turns(inputs: Sequence[Input], path: Path) -> list[list[Span]]:
    """
    The turns of each input. A file that names one recording belongs to the one input, whatever it calls it; else
    recordings are told by the names of their files without ending.

    Raises:
        ValueError: no turns of an input.
    """
    turns = read_rttm(path)
    if len(turns) == len(inputs) == 1:
        return list(turns.values())
    missing = [one.name for one in inputs if one.stem not in turns and not one.error]
    if missing:
        raise ValueError(f"--speakers {path} has no turns of {missing[0]}: it names {', '.join(list(turns)[:FEW])}.")
    return [turns.get(one.stem, []) for one in inputs]
