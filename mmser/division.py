# SPDX-License-Identifier: Apache-2.0
"""What a training held out of data without splits, so that an evaluation of the same data judges those clips alone.

`describe_division` goes into `run_identity.json` beside the checkpoint; `divide_again` finds it there.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
from transformers.utils import logging

from mmser.examples import content_sample, map_in_threads
from mmser.files import read_json

logger = logging.get_logger(__name__)
IDENTITY_NAME = "run_identity.json"
FRACTIONS = {"validation_fraction", "test_fraction"}


def describe_division(splits: Mapping[str, datasets.Dataset], fractions: Mapping[str, float], seed: int) -> dict:
    """
    Describe how the clips of a run were divided.

    Args:
        splits: all clips, by the name of the split, before any are drawn or left out.
        fractions: the shares that were asked for, by the names of the arguments of `load_emotion_dataset`.
        seed: of the division.

    Returns:
        For JSON: `fractions`, `seed`, and a checksum of the audio of all `clips` and of those of each split.
    """
    parts = {name: _samples(split) for name, split in splits.items()}
    everything = [sample for part in parts.values() for sample in part]
    checksums = {name: _checksum(part) for name, part in parts.items()}
    return {"fractions": dict(fractions), "seed": seed, "clips": _checksum(everything), "splits": checksums}


def learnt_validation(checkpoint: str | Path) -> bool:
    """Whether a checkpoint learnt from the validation clips of its data, as `--adapt` does."""
    path = Path(checkpoint) / IDENTITY_NAME
    return path.is_file() and _is_adapted(read_json(path))


def divide_again(
    undivided: datasets.Dataset, checkpoint: str | Path, load: Callable[..., Mapping[str, datasets.Dataset]]
) -> Mapping[str, datasets.Dataset] | None:
    """
    Divide the clips that a checkpoint was trained on as its training did.

    Args:
        undivided: all clips, of data without splits or of a checkpoint that learnt from their validation split.
        checkpoint: folder of the checkpoint, or its name on the Hub.
        load: loads the same data with the fractions and the seed that are given to it.

    Returns:
        The splits; None if these are not the clips that the checkpoint was trained on, or if that is not known.

    Raises:
        ValueError: the clips are those of the training, but they cannot be divided as they were.
    """
    path = Path(checkpoint) / IDENTITY_NAME
    if not path.is_file():
        return None
    identity = read_json(path)
    known = identity.get("division")
    if known and not _is_division(known):
        raise ValueError(f"{path} is damaged: its `division` is none. Delete the file, and all clips are judged.")
    if not known or known["clips"] != _checksum(_samples(undivided)):
        return None
    splits = load(**known["fractions"], seed=known["seed"])
    divided = {name: splits[name] for name in known["splits"] if name in splits}
    if {name: _checksum(_samples(split)) for name, split in divided.items()} != known["splits"]:
        raise ValueError(
            f"These are the clips that {checkpoint} was trained on, and they are divided otherwise than in its "
            "training: name the columns as there (--speaker_column, --label_map), or give data with splits."
        )
    learnt = [divided["train"]]
    if _is_adapted(identity) and "validation" in divided:  # adapting takes these clips too
        learnt.append(divided.pop("validation"))
    held_out = ", ".join(f"{len(split)} for {name}" for name, split in divided.items() if name != "train")
    logger.warning(
        f"{checkpoint} was trained on these clips. They are divided as its training divided them; it held out "
        f"{held_out or 'none'}."
    )
    others = {name: split for name, split in splits.items() if name not in known["splits"]}
    return {**divided, "train": datasets.concatenate_datasets(learnt), **others}


def _is_adapted(identity: Mapping[str, Any]) -> bool:
    settings = identity.get("settings")
    return isinstance(settings, dict) and settings.get("adapt") is True


def _is_division(known: Any) -> bool:
    """Whether this is what `describe_division` gives; the file may be a stranger's."""
    kinds = {"fractions": dict, "seed": int, "clips": str, "splits": dict}
    if not isinstance(known, dict) or not all(isinstance(known.get(name), kind) for name, kind in kinds.items()):
        return False
    fractions = known["fractions"]
    return set(fractions) <= FRACTIONS and all(isinstance(share, int | float) for share in fractions.values())


def _samples(split: datasets.Dataset) -> list[str]:
    def sample(index: int) -> str:
        row = split[index]
        return hashlib.blake2b(content_sample(row) or row.get("text", "").encode(), digest_size=10).hexdigest()

    return map_in_threads(sample, len(split), "comparing clips")


def _checksum(samples: list[str]) -> str:
    return hashlib.blake2b("".join(sorted(samples)).encode(), digest_size=10).hexdigest()
