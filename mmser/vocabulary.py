# SPDX-License-Identifier: Apache-2.0
"""Trimming the vocabulary of a checkpoint: the table of tokens is most of a multilingual text encoder.

`choose_tokens` chooses the tokens to keep, by texts and by the scripts of languages; `trim_tokenizer` renumbers a
tokenizer; `trim_vocabulary` does both, and trims the model's table. Texts of kept tokens give the same results.
"""

import io
import json
import os
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mmser.sources import DataColumns, find_column
from mmser.table_files import is_table, read_rows, read_text
from modeling_mmser import MMSERForAudioClassification
from processing_mmser import MMSERProcessor

# Script, as the Unicode names of its letters begin: languages that use it
SCRIPTS = {
    "LATIN": "af az bs ca cs cy da de en es et eu fi fr ga gl hr hu id is it jv lt lv mg ms mt nb nl nn no pl pt ro "
    "sk sl so sq sr su sv sw tl tr uz vi xh yo zu",
    "CYRILLIC": "be bg kk ky mk mn ru sr tg tt uk",
    "ARABIC": "ar fa ku ps sd ug ur",
    "CJK": "ja zh",
    "IDEOGRAPHIC": "ja zh",  # the mark that repeats a character
    "HIRAGANA": "ja",
    "KATAKANA": "ja",
    "HANGUL": "ko",
    "DEVANAGARI": "hi mr ne sa",
    "ARMENIAN": "hy",
    "BENGALI": "as bn",
    "BOPOMOFO": "zh",
    "ETHIOPIC": "am ti",
    "GEORGIAN": "ka",
    "GREEK": "el",
    "GUJARATI": "gu",
    "GURMUKHI": "pa",
    "HEBREW": "he yi",
    "KANNADA": "kn",
    "KHMER": "km",
    "LAO": "lo",
    "MALAYALAM": "ml",
    "MYANMAR": "my",
    "ORIYA": "or",
    "SINHALA": "si",
    "TAMIL": "ta",
    "TELUGU": "te",
    "THAI": "th",
}


@dataclass
class Trimmed:
    """The sizes of a vocabulary and its model, before and after trimming."""

    tokens_before: int
    tokens_after: int
    parameters_before: int
    parameters_after: int

    def __str__(self) -> str:
        return (
            f"vocabulary {self.tokens_before:,} -> {self.tokens_after:,} tokens, "
            f"model {self.parameters_before / 1e6:.1f} M -> {self.parameters_after / 1e6:.1f} M parameters"
        )


def scripts_of(languages: Iterable[str]) -> set[str]:
    """The scripts of languages (ISO 639-1 codes). Raises ValueError for a language that is not in `SCRIPTS`."""
    wanted = set(languages)
    known = {language for users in SCRIPTS.values() for language in users.split()}
    if wanted - known:
        raise ValueError(f"Unknown languages {sorted(wanted - known)}; known ones are: {' '.join(sorted(known))}")
    return {script for script, users in SCRIPTS.items() if wanted & set(users.split())}


def is_written_in(text: str, scripts: Iterable[str]) -> bool:
    """Whether each letter of `text` is in one of the scripts; ASCII, digits and punctuation are in every one."""
    # The Unicode name of a full-width letter has its script in the second place; the name of an accent has no script
    names = [f"{width}{script}" for script in scripts for width in ("", "FULLWIDTH ", "HALFWIDTH ")]
    shared = ("COMBINING", "FEMININE ORDINAL", "MASCULINE ORDINAL", "MODIFIER LETTER", "VARIATION SELECTOR")
    return all(
        character.isascii()
        or unicodedata.category(character)[0] not in "LM"  # letters, and the vowel signs of a script
        or unicodedata.name(character, "").startswith((*names, *shared))
        for character in text
    )


def read_texts(files: Iterable[str | os.PathLike], text_column: str | None = DataColumns.text) -> Iterator[str]:
    """
    All texts of .txt files (one a line), and of the text column of .csv, .tsv and .jsonl files, which is found as in
    training data: `transcription`, or another usual name, or `text_column`.

    Raises:
        ValueError: another kind of file, a bad row, or a table without such a column.
        FileNotFoundError: no such file.
    """
    for path in map(Path, files):
        if path.suffix != ".txt" and not is_table(path):
            raise ValueError(f"{path}: texts are read from .txt, .csv, .tsv and .jsonl files")
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        if is_table(path):
            yield from _read_text_column(path, text_column)
        else:
            yield from map(str.strip, io.StringIO(read_text(path, str(path))))


def _read_text_column(path: Path, text_column: str | None) -> Iterator[str]:
    problems: list[str] = []
    rows = read_rows(path, str(path), problems)
    if problems:
        raise ValueError(problems[0])
    available = list(dict.fromkeys(column for _, row in rows for column in row))
    column = find_column("text", text_column, available)
    if column is None:
        raise ValueError(
            f"{path} has no text column {text_column!r}; its columns are {available}. --text_column names the one "
            "with the texts."
        )
    for _, row in rows:
        yield str(row.get(column) or "").strip()


def choose_tokens(
    tokenizer,
    texts: Iterable[str] | None = None,
    languages: Sequence[str] | None = None,
    size: int | None = None,
) -> list[int]:
    """
    The ids of the tokens to keep, ascending.

    With `languages` alone: every token whose letters are all in the scripts of these languages, so that text in these
    scripts is tokenised as before. With `texts`: the tokens of these texts, and all single characters of the texts and
    of the scripts, so that other words become smaller pieces and not "unknown". Special tokens are always kept.

    Args:
        tokenizer: a fast tokenizer with a WordPiece or Unigram model.
        texts: examples of the texts that the model will read.
        languages: ISO 639-1 codes.
        size: keep so many tokens of the texts, of which a character may then be none: special ones, and those that
            are most frequent in the texts. A character is as frequent as it is written, in whatever token.
    Raises:
        ValueError: neither languages nor a text, an unknown language, a size without texts or below the number of
            special tokens, or another kind of tokenizer.
    """
    if size is not None and texts is None:
        raise ValueError("`size` chooses among the tokens of texts: give texts (--vocabulary_text)")
    if texts is None and not languages:
        raise ValueError("Give languages, texts or both to choose tokens by; got neither")
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    pieces = _pieces(description)
    kept = {token["id"] for token in description["added_tokens"]} | set(tokenizer.all_special_ids)
    kept |= set(range(tokenizer.pad_token_id + 1))  # some encoders count positions from the padding's id: it must stay
    if description["model"]["type"] == "Unigram":
        # The score of an unknown character follows from the lowest score; without it, texts would be split differently
        scores = [score for _, score in description["model"]["vocab"]]
        kept |= {description["model"]["unk_id"], int(np.argmin(scores))}
    scripts = scripts_of(languages) if languages else set()
    if texts is None:
        kept |= {index for index, piece in enumerate(pieces) if is_written_in(piece, scripts)}
        return sorted(kept)
    if size is not None and size < len(kept):
        raise ValueError(f"`size` must be at least {len(kept)}, the number of special tokens, got {size}")
    tokens: Counter[int] = Counter()
    characters: Counter[str] = Counter()
    normalizer = tokenizer.backend_tokenizer.normalizer
    texts = iter(texts)
    while batch := list(islice(texts, 1000)):
        tokens.update(chain.from_iterable(tokenizer(batch, verbose=False)["input_ids"]))
        characters.update(chain.from_iterable(normalizer.normalize_str(t) if normalizer else t for t in batch))
    if not characters:
        raise ValueError("The texts to choose tokens by are empty: give at least a single text")
    single = [
        index
        for index, piece in enumerate(pieces)
        if len(piece) == 1 and (piece in characters or is_written_in(piece, scripts))
    ]
    if size is None:
        return sorted(kept.union(tokens, single))
    frequency = tokens | Counter({index: characters[pieces[index]] for index in single})
    others = sorted({*tokens, *single} - kept, key=lambda index: (-frequency[index], index))
    return sorted(kept.union(others[: size - len(kept)]))


def _pieces(description: dict) -> list[str]:
    """The tokens by id, without the marks for the start (Unigram) and the continuation (WordPiece) of a word."""
    model = description["model"]
    if model["type"] == "Unigram":
        return [piece.removeprefix("▁") or piece for piece, _ in model["vocab"]]
    if model["type"] == "WordPiece":
        prefix = model["continuing_subword_prefix"]
        return [piece.removeprefix(prefix) or piece for piece in sorted(model["vocab"], key=model["vocab"].get)]
    raise ValueError(
        f"The vocabulary of a {model['type']} tokenizer cannot be trimmed; that of a WordPiece or Unigram one can"
    )


def trim_tokenizer(tokenizer, kept: Sequence[int]):
    """
    A copy of a fast tokenizer that has only the tokens `kept` (ascending ids). The i-th of them gets the id i.

    Raises:
        ValueError: a tokenizer that is neither WordPiece nor Unigram, or one that changes a vocabulary it is given.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        path = Path(folder) / "tokenizer.json"
        description = json.loads(path.read_text(encoding="utf-8"))
        _trim_description(description, {old: new for new, old in enumerate(kept)})
        path.write_text(json.dumps(description, ensure_ascii=False), encoding="utf-8")
        trimmed = type(tokenizer).from_pretrained(folder)
    loaded = json.loads(trimmed.backend_tokenizer.to_str())
    changed = [part for part in ("model", "normalizer", "pre_tokenizer") if loaded[part] != description[part]]
    if changed or trimmed.convert_ids_to_tokens(range(len(kept))) != tokenizer.convert_ids_to_tokens(list(kept)):
        raise ValueError(
            f"{type(tokenizer).__name__} cannot be trimmed: when it loads a smaller vocabulary, it changes its "
            f"{', '.join(changed) or 'order of tokens'}. Export without --languages and --vocabulary_text"
        )
    return trimmed


def _trim_description(description: dict, new_ids: dict[int, int]) -> None:
    """Renumber a parsed tokenizer.json in place, and remove the tokens that are not in `new_ids`."""
    model = description["model"]
    _pieces(description)  # raises for other kinds of tokenizers
    if model["type"] == "Unigram":
        model["vocab"] = [entry for index, entry in enumerate(model["vocab"]) if index in new_ids]
        model["unk_id"] = new_ids[model["unk_id"]]
    else:
        model["vocab"] = {piece: new_ids[index] for piece, index in model["vocab"].items() if index in new_ids}
    for token in description["added_tokens"]:
        token["id"] = new_ids[token["id"]]
    if description.get("padding"):
        description["padding"]["pad_id"] = new_ids[description["padding"]["pad_id"]]
    processor = description.get("post_processor") or {}
    for part in processor.get("processors", [processor]):
        for token in part.get("special_tokens", {}).values():  # TemplateProcessing
            token["ids"] = [new_ids[index] for index in token["ids"]]
        for name in ("sep", "cls"):  # BertProcessing, RobertaProcessing
            if name in part:
                part[name][1] = new_ids[part[name][1]]


@torch.no_grad()
def trim_vocabulary(
    model: MMSERForAudioClassification,
    processor: MMSERProcessor,
    texts: Iterable[str] | None = None,
    languages: Sequence[str] | None = None,
    size: int | None = None,
) -> tuple[MMSERProcessor, Trimmed]:
    """
    Trim the text encoder's table of tokens in place. The kept rows do not change: texts of kept tokens give the same
    results.

    Args:
        model, processor: of one checkpoint.
        texts, languages, size: see `choose_tokens`.
    Returns: the processor of the smaller model, and the sizes before and after.
    Raises:
        ValueError: as of `choose_tokens` and `trim_tokenizer`, or a table that is smaller than the vocabulary.
    """
    if "text" not in processor.modalities:
        raise ValueError("The model has no text encoder: there is no vocabulary to trim")
    kept = choose_tokens(processor.tokenizer, texts, languages, size)
    before = model.num_parameters()
    embeddings: Any = model.get_input_embeddings()
    tokens_before = len(embeddings.weight)
    if kept[-1] >= tokens_before:
        raise ValueError(
            f"The tokenizer has a token with the id {kept[-1]}, but the model has a table of {tokens_before} tokens; "
            "use the tokenizer that the model was trained with"
        )
    tokenizer = trim_tokenizer(processor.tokenizer, kept)
    weight = embeddings.weight[torch.tensor(kept, device=embeddings.weight.device)].clone()
    smaller = nn.Embedding.from_pretrained(
        weight, freeze=not embeddings.weight.requires_grad, padding_idx=tokenizer.pad_token_id
    )
    model.set_input_embeddings(smaller)
    config: Any = model.config.text_config
    config.vocab_size = len(kept)
    for name in ("pad", "bos", "eos", "sep", "cls", "mask"):
        old = getattr(config, f"{name}_token_id", None)
        if old is not None:
            setattr(config, f"{name}_token_id", kept.index(old) if old in kept else None)
    report = Trimmed(tokens_before, len(kept), before, model.num_parameters())
    return MMSERProcessor(processor.feature_extractor, tokenizer), report
