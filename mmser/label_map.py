# SPDX-License-Identifier: Apache-2.0
"""`--label_map`: a small table that says what the labels of each corpus are called here.

`read_label_map` reads it, `LabelMap.apply` gives each clip its label, or takes it out of training.
"""

import difflib
import os
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers.utils import logging

from mmser.labels import UNKNOWN_LABEL, label_key, written_label
from mmser.sources import LEFT_OUT, OTHER, Record
from mmser.table_files import read_rows

logger = logging.get_logger(__name__)

FLAG = "--label_map"
COLUMNS = ("corpus", "label", "target")
ANY = "*"  # in the column `corpus`: each corpus for which the table says nothing else
FEW = 5  # rows that a message lists


def corpus_key(name: str) -> str:
    """What the spellings of a corpus's name have in common: case and Unicode normal forms do not count."""
    return unicodedata.normalize("NFC", name.strip()).casefold()


@dataclass
class LabelMap:
    """
    What is done with the labels of each corpus.

    Args:
        name: of the file, for messages.
        targets: (corpus, label), as `corpus_key` and `label_key` write them, or `ANY` for the corpus, -> one of our
            labels; "other": a clip of none of the classes; "": a clip to leave out.
        rows: where each of these is in the file, for messages.
    """

    name: str
    targets: dict[tuple[str, str], str] = field(default_factory=dict)
    rows: dict[tuple[str, str], str] = field(default_factory=dict)

    def apply(self, records: Iterable[Record]) -> None:
        """
        Give records the labels that the map has for them; those of `other` and left-out ones get their `role`.

        A corpus is a value of the column `corpus`, or the name of a source. Of several rows that fit, one that names
        the corpus counts before one that names the source, and that before `*`. A label without a row stays. A
        warning lists the rows that fit no clip.
        """
        used = set()
        for record in records:
            label = label_key(written_label(record.label))
            keys = [(corpus_key(corpus), label) for corpus in (record.corpus, record.source)]
            key = next((key for key in (*keys, (ANY, label)) if key in self.targets), None)
            if key is None:
                continue
            used.add(key)
            record.is_mapped = True
            target = self.targets[key]
            if target == "":
                record.role = LEFT_OUT
            elif target == OTHER:
                record.role, record.label = OTHER, UNKNOWN_LABEL
            else:
                record.label = target
        unused = [row for key, row in self.rows.items() if key not in used]
        if unused:
            listed = ", ".join(unused[:FEW]) + (", ..." if len(unused) > FEW else "")
            count = "1 row fits" if len(unused) == 1 else f"{len(unused)} rows fit"
            logger.warning(f"{FLAG}: {count} no clip (is a corpus or a label misspelt?): {listed}")

    def check_targets(self, label_names: Sequence[str]) -> None:
        """Raise ValueError for a target that is none of the labels, and where `other` is both a label and a target."""
        known = {label_key(name): name for name in label_names}
        if OTHER in known and OTHER in self.targets.values():
            raise ValueError(f"{self.name}: the target {OTHER!r} means none of the classes, so no class can have it")
        for key, target in self.targets.items():
            if target not in ("", OTHER) and label_key(target) not in known:
                near = difflib.get_close_matches(label_key(target), known, 1)
                hint = f" (is {known[near[0]]!r} meant?)" if near else ""
                raise ValueError(
                    f"{self.rows[key]}: the target {target!r}{hint} is none of {', '.join(label_names)}, nor {OTHER!r}"
                )


def read_label_map(path: str | os.PathLike) -> LabelMap:
    """
    Read a table (CSV, TSV or JSONL) with the columns `corpus`, `label` and `target`.

    Raises:
        ValueError: it does not exist, lacks a column or a cell, or gives a label of a corpus two targets.
    """
    path = Path(path)
    problems: list[str] = []
    rows = read_rows(path, path.name, problems)
    if problems:
        raise ValueError(f"{FLAG}: {problems[0]}")
    available = list(dict.fromkeys(column for _, row in rows for column in row))
    columns = {name: column for column in available if (name := str(column).strip().casefold()) in COLUMNS}
    missing = [name for name in COLUMNS if name not in columns]
    if missing:
        raise ValueError(
            f"{FLAG} {path} has no column {', '.join(map(repr, missing))}: it needs {', '.join(COLUMNS)}, and has "
            f"{available}"
        )
    label_map = LabelMap(path.name)
    for number, row in rows:
        corpus, label, target = (written_label(row.get(columns[name])) for name in COLUMNS)
        where = f"{path.name} row {number} ({corpus}, {label})"
        if not corpus or not label:
            raise ValueError(f"{where} needs a corpus (or {ANY} for all of them) and a label")
        target = OTHER if target.casefold() == OTHER else target
        key = (corpus_key(corpus), label_key(label))
        if label_map.targets.setdefault(key, target) != target:
            raise ValueError(f"{where} says {target!r}, but {label_map.rows[key]} says {label_map.targets[key]!r}")
        label_map.rows.setdefault(key, where)
    return label_map
