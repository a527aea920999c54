# SPDX-License-Identifier: Apache-2.0
"""Data sets to train and evaluate on: every row is checked, every speaker is in one split."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from transformers.utils import logging

from configuration_mmser import DEFAULT_LABELS
from mmser.labels import UNKNOWN_LABEL, choose_label_names, label_id, warn_of_rare_labels
from mmser.sources import (
    SPLIT_NAMES,
    STRING_COLUMNS,
    TABLE_SUFFIXES,
    DataColumns,
    folder_records,
    hub_records,
    only_one,
    stream_hub,
    table_records,
)
from mmser.splits import check_speaker_overlap, hold_out_missing_splits

logger = logging.get_logger(__name__)


def load_emotion_dataset(
    data_dir: str | os.PathLike | None = None,
    manifest: str | os.PathLike | None = None,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    *,
    train_split: str | None = None,
    validation_split: str | None = None,
    test_split: str | None = None,
    columns: DataColumns | None = None,
    extra_columns: Sequence[str] = (),
    label_names: Sequence[str] | None = None,
    streaming: bool = False,
    validation_fraction: float = 0.15,
    test_fraction: float = 0.15,
    seed: int = 42,
    allow_speaker_overlap: bool = False,
    on_bad_example: str = "error",
) -> tuple[datasets.DatasetDict | datasets.IterableDatasetDict, list[str]]:
    """Load the training, validation and test data from one of three kinds of source.

    Without a validation split, one is held out of the training data, whole speakers at a time, and a test split as
    well if neither is given. Every row
    is checked here: its label, its audio file's existence, and that no speaker is in two splits.

    Args:
        data_dir: folder with `<split>/metadata.csv` (or `.tsv`, `.jsonl`), `<split>.csv`, or one `metadata.csv` at
            the top with an optional `split` column. Audio paths are relative to the file that lists them.
        manifest: one CSV, TSV or JSONL file with an optional `split` column.
        dataset_name, dataset_config_name: data set on the Hub (or a folder that `datasets.load_dataset` reads).
        train_split, validation_split, test_split: names of the splits in the source; default: their usual names.
        columns: names of the columns.
        extra_columns: more columns to keep, as strings under their own names. The name of one of our own columns, such
            as `corpus`, means that one.
        label_names: class names in the order of their ids; default: neutral, happy, sad, angry when the labels are
            ids or among these names, else the class names of the Hub data set or the sorted names in training data.
        streaming: read the Hub data set while training. Nothing is split or checked across rows then.
        validation_fraction, test_fraction: shares, of the speakers, to hold out where the source gives no split.
        seed: seed of the split.
        allow_speaker_overlap: accept a speaker in two splits, or a random split of data without speakers.
        on_bad_example: "error", or "skip" to leave bad rows out with a warning that counts them.

    Returns:
        The splits and the label names. Columns: `labels` (int), `row` (where the row is, for messages) and, if the
        source has them, `audio` (path, or `{"bytes", "path"}` from the Hub; not decoded), `text` (`""` = unknown),
        `speaker`, `language`, `corpus`, `sex`, and the `extra_columns`.

    Raises:
        ValueError: if the source, a column or a row is not usable, or a speaker is in two splits.
    """
    if sum(source is not None for source in (data_dir, manifest, dataset_name)) != 1:
        raise ValueError(
            "give exactly one source of data: data_dir (--data_dir), manifest (--manifest) or dataset_name "
            f"(--dataset_name); got data_dir={data_dir!r}, manifest={manifest!r}, dataset_name={dataset_name!r}"
        )
    if not (validation_fraction >= 0 and test_fraction >= 0 and validation_fraction + test_fraction < 1):
        raise ValueError(
            "validation_fraction and test_fraction must be >= 0 and sum to less than 1, got "
            f"{validation_fraction} and {test_fraction}"
        )
    check_on_bad_example(on_bad_example)
    columns = columns or DataColumns()
    given = {"train": train_split, "validation": validation_split, "test": test_split}
    wanted = {split: (name,) if name else SPLIT_NAMES[split] for split, name in given.items()}
    if streaming:
        if dataset_name is None:
            raise ValueError("streaming reads a Hub data set: give dataset_name (--dataset_name), or no --streaming")
        return stream_hub(
            dataset_name, dataset_config_name, wanted, columns, extra_columns, label_names, on_bad_example
        )

    problems: list[str] = []
    records: list[dict[str, Any]] = []
    class_names, audio_table = None, None
    if dataset_name is not None:
        records, audio_table, class_names = hub_records(
            dataset_name, dataset_config_name, wanted, columns, extra_columns
        )
    elif data_dir is not None:
        records = folder_records(Path(data_dir), wanted, columns, extra_columns, problems)
    elif manifest is not None:
        records = table_records(Path(manifest), columns, extra_columns, problems, wanted=wanted)
    training = [record for record in records if record["split"] == "train"] or records
    label_names = choose_label_names(label_names, class_names, [record["label"] for record in training])
    good = _check_records(records, label_names, problems)
    warn_of_rare_labels(training, label_names)
    _report_problems(problems, on_bad_example)

    # the splits that the source has, also those of which no row is good
    splits: dict[str, list[int]] = {split: [] for split in wanted if any(r["split"] == split for r in records)}
    for index in good:
        splits[records[index]["split"]].append(index)
    check_speaker_overlap(records, splits, allow_speaker_overlap)
    fractions = {"test": test_fraction, "validation": validation_fraction}
    splits = hold_out_missing_splits(records, splits, fractions, seed, allow_speaker_overlap)
    empty = [split for split, indices in splits.items() if not indices]
    if empty or not splits:
        raise ValueError(f"no usable row is left in {data_dir or manifest or dataset_name} {' '.join(empty)}")
    table = _to_dataset(records, extra_columns, audio_table)
    order = [split for split in wanted if split in splits]
    return datasets.DatasetDict({split: table.select(splits[split]) for split in order}), label_names


def load_emotion_split(
    path: str | os.PathLike,
    *,
    columns: DataColumns | None = None,
    extra_columns: Sequence[str] = (),
    label_names: Sequence[str] = DEFAULT_LABELS,
    allow_unknown: bool = True,
    on_bad_example: str = "error",
) -> datasets.Dataset:
    """Load one folder (with `metadata.csv`, `.tsv` or `.jsonl`) or one manifest, such as an open-set folder.

    Args:
        path: the folder or the file. A `split` column is ignored.
        columns: names of the columns.
        extra_columns: more columns to keep, as in `load_emotion_dataset`.
        label_names: class names in the order of their ids.
        allow_unknown: open-set data: -1, "unknown" and every name that is not in `label_names` become -1, and so
            does every row if there is no label column. False: the rules of `load_emotion_dataset`.
        on_bad_example: "error", or "skip" to leave bad rows out with a warning that counts them.

    Returns:
        The data set, with the columns of `load_emotion_dataset`.

    Raises:
        ValueError: if the file, a column or a row is not usable.
    """
    check_on_bad_example(on_bad_example)
    label_names = choose_label_names(label_names)
    path = Path(path)
    table: Path | None = path
    if path.is_dir():
        table = only_one([table for suffix in TABLE_SUFFIXES for table in path.glob(f"metadata{suffix}")])
    if table is None:
        raise ValueError(f"{path} has no metadata file: expected metadata.csv, metadata.tsv or metadata.jsonl")
    problems: list[str] = []
    columns = columns or DataColumns()
    records = table_records(table, columns, extra_columns, problems, root=path.parent, unlabelled=allow_unknown)
    good = _check_records(records, label_names, problems, allow_unknown)
    _report_problems(problems, on_bad_example)
    if not good:
        raise ValueError(f"no usable row is left in {path}")
    return _to_dataset(records, extra_columns).select(good)


def check_on_bad_example(on_bad_example: str) -> None:
    if on_bad_example not in ("error", "skip"):
        raise ValueError(f"on_bad_example must be 'error' or 'skip', got {on_bad_example!r}")


def _check_records(
    records: list[dict[str, Any]], label_names: Sequence[str], problems: list[str], allow_unknown: bool = False
) -> list[int]:
    """Give every record its `labels` id and return the indices of the usable ones; the rest goes to `problems`."""
    good = []
    for index, record in enumerate(records):
        record["labels"] = UNKNOWN_LABEL
        audio = record["audio"]
        try:
            record["labels"] = label_id(record["label"], label_names, record["row"], allow_unknown)
            if audio and "://" not in audio and not os.path.exists(audio):
                raise ValueError(f"{record['row']}: audio file {audio} does not exist")
            if not (audio or record["text"] or record.get("embedded")):
                raise ValueError(f"{record['row']} has neither audio nor text")
        except ValueError as error:
            problems.append(str(error))
        else:
            good.append(index)
    return good


def _report_problems(problems: list[str], on_bad_example: str) -> None:
    """Raise, or warn about, all bad rows at once: the first three and how many there are."""
    if not problems:
        return
    count = "1 bad row" if len(problems) == 1 else f"{len(problems)} bad rows"
    first = "".join(f"\n  {problem}" for problem in problems[:3])
    rest = f"\n  and {len(problems) - 3} more" if len(problems) > 3 else ""
    if on_bad_example == "skip":
        logger.warning(f"skipped {count}:{first}{rest}")
    else:
        raise ValueError(f"{count} in the data (--on_bad_example skip leaves them out):{first}{rest}")


def _to_dataset(
    records: list[dict[str, Any]], extra_columns: Sequence[str] = (), audio_table: datasets.Dataset | None = None
) -> datasets.Dataset:
    """All records as one table, without those of our own columns that are empty everywhere and were not asked for."""
    asked = set(extra_columns) & set(STRING_COLUMNS)
    kept = [key for key in ("audio", *STRING_COLUMNS) if key in asked or any(record[key] for record in records)]
    kept += [*records[0]["extra"], "row"]
    types = {**dict.fromkeys(kept, datasets.Value("string")), "labels": datasets.Value("int64")}
    rows = [{**record, **record["extra"]} for record in records]
    table = datasets.Dataset.from_dict(
        {key: [row[key] for row in rows] for key in types}, features=datasets.Features(types)
    )
    return table if audio_table is None else datasets.concatenate_datasets([audio_table, table], axis=1)


def draw_clips(split, limit: int | None, seed: int):
    """At most `limit` clips, drawn at random; all of them by default."""
    if limit is None:
        return split
    if limit < 1:
        raise ValueError(f"The number of clips to draw must be at least 1, got {limit}.")
    shuffled = split.shuffle(seed=seed)
    if isinstance(split, datasets.IterableDataset):
        return shuffled.take(limit)
    return shuffled.select(range(min(limit, len(shuffled))))
