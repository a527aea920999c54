# SPDX-License-Identifier: Apache-2.0
"""What a training run was started with. A run is continued only with the same data, labels, encoders and architecture.

1. `lock_output_dir`: one training at a time in a folder
2. `describe_identity`: what must stay as it was, and the settings that may change
3. `check_output_dir`: compares it with what the output folder holds
4. `claim_output_dir`: writes it there
5. `delete_run`: for `--overwrite_output_dir`
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
from accelerate.utils import broadcast_object_list
from filelock import Timeout
from transformers import PreTrainedConfig
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from adapters_mmser import fingerprint_weights
from mmser.arguments import DataArguments, ModelArguments
from mmser.bad_rows import BAD_EXAMPLES
from mmser.division import IDENTITY_NAME
from mmser.examples import content_sample, map_in_threads
from mmser.files import locked, read_json, write_atomically
from mmser.model_card import CARD_PATTERNS, is_own_card
from mmser.model_loading import encoder_name, feature_settings, vocabulary_checksum
from mmser.progress import CURVES_NAME
from mmser.results import RESULTS_NAME, describe_data
from mmser.sources import TEXT_COLUMNS
from mmser.targets import COLUMN as TARGETS
from mmser.trainer import labels_of, last_complete_checkpoint
from mmser.training_arguments import MMSERTrainingArguments
from modeling_mmser import MMSERForAudioClassification
from processing_mmser import MMSERProcessor

logger = logging.get_logger(__name__)
LOCK = ".training.lock"  # in the folder of a run; it stays there, as who waits for it has it open
PATIENCE = 10  # seconds: workers of a training that was killed hold its lock until they notice
# Fields of the configuration that are not compared: other entries say the same, the library needs them, or they act
# after training alone
OTHER_FIELDS = {
    *("architectures", "auto_map", "class_counts", "custom_pipelines", "dtype", "id2label", "label2id"),
    *("num_labels", "transformers_version", "untrained_modalities", "use_openmax", "lora", "_name_or_path"),
}
# A run may go on with others: it is told which ones changed
TRAINING_SETTINGS = (
    *("learning_rate", "lr_multipliers", "weight_decay", "lr_scheduler_type", "warmup_steps", "optim", "seed"),
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("max_grad_norm", "weight_averaging", "train_sampling_strategy", "bf16", "fp16"),
    *("adversarial", "adversarial_epsilon", "adversarial_weight", "adversarial_head_weight", "contrastive_memory"),
    *("sampling_temperature", "adapt", "adapt_layers", "adapt_strength", "adapt_rehearsal"),
)
DATA_SETTINGS = ("augment", "augmentations", "augmented_copies", "text_dropout", "audio_dropout", "max_seconds")
# What a run writes into its folder, besides its checkpoints and the code, which every save replaces
WRITTEN_FILES = (
    *("model*.safetensors", "model*.safetensors.index.json", "adapter_model.safetensors", "adapter_config.json"),
    *("config.json", "generation_config.json"),
    *("processor_config.json", "preprocessor_config.json", "tokenizer*.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.txt", "vocab.json", "merges.txt", "*.bpe.model", "spiece.model"),
    *("training_args.json", "training_args.bin", "trainer_state.json", RESULTS_NAME, CURVES_NAME),
)
# One of them tells a checkpoint from a folder of someone's own with such a name
CHECKPOINT_FILES = (*WRITTEN_FILES, "optimizer.*", "scheduler.pt", "rng_state*.pth")


# --- what a run is ---------------------------------------------------------------------------------------------------


def describe_identity(
    splits: Mapping[str, datasets.Dataset | datasets.IterableDataset],
    label_names: list[str],
    model: MMSERForAudioClassification,
    teacher: MMSERForAudioClassification | None,
    processor: MMSERProcessor,
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    training_arguments: MMSERTrainingArguments,
) -> dict[str, Any]:
    """
    Describe a run before it starts. Nothing in it depends on where the files are or on what is drawn at random.

    Args:
        splits: the clips, by the name of the split.
        label_names: in the order of the class ids.
        model, teacher: as they are loaded; the teacher is None without distillation.
        processor: of the model.
        model_arguments, data_arguments, training_arguments: of the run.
    Returns: for JSON: `fixed` (what must stay), `names` (of the encoders, for messages), `settings` (what may change)
        and `data` (of `describe_data`, for folders that only have results).
    """
    fixed: dict[str, Any] = {"labels": label_names}
    for name in ("train", "validation", "test"):
        fixed[f"{name} clips"] = fingerprint_clips(splits[name], data_arguments) if name in splits else None
    backbone: Any = model.base_model
    for kind in ("audio", "text"):
        encoder = getattr(backbone, f"{kind}_encoder", None)
        is_random = getattr(model_arguments, f"random_{kind}_encoder")
        fixed[f"{kind} encoder"] = None if encoder is None or is_random else fingerprint_weights(encoder)
    fixed["other starting weights"] = None
    if model_arguments.model_name_or_path:
        fixed["other starting weights"] = fingerprint_weights(backbone, "_encoder.")
    fixed["teacher"] = None if teacher is None else fingerprint_weights(teacher)
    parts = ("audio", "text", "feature_encoder")
    fixed["frozen"] = [part for part in parts if getattr(model_arguments, f"freeze_{part}")]
    if model_arguments.freeze_audio_layers is not None:
        fixed["frozen"].append(f"{model_arguments.freeze_audio_layers} audio layers")
    adapters: Any = model.config.lora
    fixed["LoRA"] = adapters and {name: adapters[name] for name in ("rank", "alpha", "dropout", "target")}
    fixed["adversarial head"] = training_arguments.adversarial_head
    fixed["tokenizer"] = vocabulary_checksum(processor)
    fixed["feature extraction"] = feature_settings(processor)
    fixed |= _config_fields(model.config)
    settings = {name: getattr(training_arguments, name) for name in TRAINING_SETTINGS}
    settings |= {name: getattr(data_arguments, name) for name in DATA_SETTINGS}
    names = {f"{kind} encoder": encoder_name(model_arguments, kind) for kind in ("audio", "text")}
    data = describe_data(data_arguments.name, splits, is_hub=data_arguments.is_hub)
    entries = {"fixed": fixed, "names": names, "settings": settings, "data": data}
    return json.loads(json.dumps(entries, default=str))  # as it is read back: no tuples, no keys but strings


def fingerprint_clips(split: datasets.Dataset | datasets.IterableDataset, arguments: DataArguments) -> str:
    """
    The number of clips and a checksum of their labels, votes, texts, speakers and audio, in any order and folder.

    Of a file its size and its middle count, which is cheap and notices clips that were made anew. A stream is not
    read: its name and the flags that choose its rows count.
    """
    if isinstance(split, datasets.IterableDataset):
        names = ("dataset_config_name", "train_split", "validation_split", "test_split", "columns")
        chosen = [getattr(arguments, name) for name in (*names, "max_train_samples", "max_eval_samples")]
        if arguments.label_distribution_columns:
            chosen.append(arguments.label_distribution_columns)
        return f"streamed from {Path(arguments.name).name}, {_checksum(chosen)}"
    wanted = ("labels", "class_shares", *TEXT_COLUMNS, TARGETS)
    columns = [name for name in wanted if name in split.column_names]

    def fingerprint(index: int) -> str:
        row = split[index]
        audio = hashlib.blake2b(content_sample(row), digest_size=10).hexdigest()
        return _checksum([audio, *((name, row[name]) for name in columns if row[name] not in (None, ""))])

    rows = sorted(map_in_threads(fingerprint, len(split), "comparing clips"))
    return f"{len(rows)} clips, {_checksum(rows)}"


def _checksum(value: Any) -> str:
    content = json.dumps(value, sort_keys=True, ensure_ascii=True, default=str).encode()
    return hashlib.blake2b(content, digest_size=10).hexdigest()


def _config_fields(config: PreTrainedConfig, prefix: str = "config") -> dict[str, Any]:
    """The fields that make the architecture and the loss, those of the encoders among them, under flat names."""
    fields: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            fields |= _config_fields(part, f"{prefix}.{name}")
        elif name not in OTHER_FIELDS and not name.startswith("openmax_"):
            fields[f"{prefix}.{name}"] = value
    return fields


# --- the folder of a run ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def lock_output_dir(arguments: MMSERTrainingArguments) -> Iterator[None]:
    """
    Keep other trainings out of the output folder while the block runs.

    The operating system takes the lock back when its process ends, however that is. All processes of a run call this,
    and the first one locks. A folder that was made for the lock goes again if nothing else was written there.

    Raises:
        ValueError: another training writes there; on all processes.
    """
    folder = Path(arguments.output_dir)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    lock, said = None, [""]
    if arguments.process_index == 0:
        try:
            lock = locked(folder / LOCK, PATIENCE)
            if lock is None:
                logger.warning(
                    f"{folder} is on a file system without locks: see to it that no other training writes there."
                )
        except Timeout:
            said = [
                f"--output_dir {folder}: another training writes into this folder. Wait until it has ended, or give "
                "another folder."
            ]
    if broadcast_object_list(said)[0]:
        raise ValueError(said[0])
    try:
        yield
    finally:
        if lock is not None:
            lock.release()
        if arguments.process_index == 0 and made and not any(path.name != LOCK for path in folder.glob("*")):
            (folder / LOCK).unlink(missing_ok=True)
            for path in made:
                if any(path.iterdir()):
                    break
                path.rmdir()


def check_output_dir(
    arguments: MMSERTrainingArguments, identity: Mapping[str, Any], checkpoint: str | None = None
) -> None:
    """
    Compare a run with what its output folder holds and with what it goes on from. Nothing is written.

    Args:
        arguments: name the folder, and say whether to overwrite what is there.
        identity: of `describe_identity`.
        checkpoint: the folder of the checkpoint that the run goes on from.
    Raises:
        ValueError: the checkpoint, or the run in the folder, was started with other data or another model.
    """
    folder = Path(arguments.output_dir)
    with arguments.main_process_first(local=False):
        origin = None if checkpoint is None else Path(checkpoint).parent
        if origin is not None:
            _check_run(origin, Path(str(checkpoint)), identity)
        is_elsewhere = origin is None or origin.resolve() != folder.resolve()
        if is_elsewhere and not arguments.overwrite_output_dir and holds_run(folder):
            _check_run(folder, folder, identity)


def claim_output_dir(arguments: MMSERTrainingArguments, identity: Mapping[str, Any]) -> None:
    """
    Make the output folder that of this run: write its identity there, in place of the run that is to be overwritten.

    It comes last before training: a run that fails a check leaves the folder as it was.
    """
    folder = Path(arguments.output_dir)
    with arguments.main_process_first(local=False):
        if arguments.process_index == 0:
            if arguments.overwrite_output_dir:
                delete_run(folder)
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / IDENTITY_NAME, json.dumps(identity, indent=2, ensure_ascii=False) + "\n")


def _check_run(folder: Path, checkpoint: Path, identity: Mapping[str, Any]) -> None:
    """Compare a run with the one in `folder`; without its identity by its results and the labels of `checkpoint`."""
    now = identity["fixed"]
    try:
        earlier = json.loads((folder / IDENTITY_NAME).read_text(encoding="utf-8"))
        fixed = earlier["fixed"]
    except (OSError, ValueError, KeyError, TypeError):
        labels = labels_of(checkpoint)
        earlier, fixed = {}, _told_by_results(folder) | ({} if labels is None else {"labels": labels})
        now = _told_of_data(identity["data"]) | {"labels": now["labels"]}
        logger.warning(
            f"{folder} has no {IDENTITY_NAME}: whether its run had the same clips and encoders is not known. Only the "
            f"labels are compared, and what {RESULTS_NAME} says of the data."
        )
    changed = _differences(fixed, now, earlier.get("names", {}), identity["names"])
    if changed:
        raise ValueError(
            f"{folder} holds a run that was started with something else, so this one cannot go on from it (before -> "
            "now):\n"
            + "\n".join(f"  {line}" for line in changed)
            + "\nGive another --output_dir, or --overwrite_output_dir to delete that run and start anew."
        )
    others = _differences(earlier.get("settings", {}), identity["settings"])
    if others:
        logger.warning(f"The run in {folder} goes on with other settings (before -> now): {'; '.join(others)}.")


def _told_by_results(folder: Path) -> dict[str, Any]:
    """What the results of a run tell of its data; nothing where it has none, as it was not finished."""
    try:
        return _told_of_data(json.loads((folder / RESULTS_NAME).read_text(encoding="utf-8"))["data"])
    except (OSError, ValueError, KeyError):
        return {}


def _told_of_data(data: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `describe_data` that are compared."""
    counts = {f"clips in {split}": data["clips"].get(split) for split in ("train", "validation", "test")}
    return {"data": data["name"], **counts}


def _differences(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    names_before: Mapping[str, str] | None = None,
    names_now: Mapping[str, str] | None = None,
) -> list[str]:
    """What both have and differs, in words. An entry that only one has is of another version of the code."""
    lines = []
    for key, value in now.items():
        if key in before and before[key] != value:
            shown = [_shown(key, before[key], names_before or {}), _shown(key, value, names_now or {})]
            lines.append(f"{key}: {shown[0]} -> {shown[1]}")
    return lines


def _shown(key: str, value: Any, names: Mapping[str, str]) -> str:
    if key in names:
        return names[key] if value is None else f"{names[key]} (weights {value})"
    return "none" if value is None else str(value)


def holds_run(folder: Path) -> bool:
    """Whether something of a run would be lost: a complete checkpoint, a model or results."""
    return (
        last_complete_checkpoint(folder) is not None
        or (folder / RESULTS_NAME).exists()
        or ((folder / "config.json").exists() and any(folder.glob("model*.safetensors")))
    )


def is_stopped(folder: Path) -> bool:
    """Whether a training began in this folder that did not come to its end, which is a card beside its results."""
    cards = [path for pattern in CARD_PATTERNS for path in folder.glob(pattern) if is_own_card(path, True)]
    return (folder / IDENTITY_NAME).is_file() and not (cards and (folder / RESULTS_NAME).is_file())


def changed_settings(folder: Path, identity: Mapping[str, Any]) -> list[str]:
    """The settings in which a run differs from the one in `folder`, in words. All else was compared before."""
    earlier = read_json(folder / IDENTITY_NAME)
    return _differences(earlier["settings"], identity["settings"])


def delete_run(folder: Path) -> None:
    """
    Delete what a run wrote into its folder, and nothing else; the file of its identity last. One line says what.

    Every checkpoint loses the file that makes it complete first: none is taken for whole if this is interrupted.
    """
    if not (holds_run(folder) or (folder / IDENTITY_NAME).exists()):
        return
    checkpoints = [path for path in sorted(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")) if _is_checkpoint(path)]
    files = [
        path for pattern in (*WRITTEN_FILES, IDENTITY_NAME, BAD_EXAMPLES) for path in sorted(folder.glob(pattern))
    ]
    cards = [path for pattern in CARD_PATTERNS for path in sorted(folder.glob(pattern)) if is_own_card(path)]
    files = [*cards, *files]
    names = ", ".join(path.name for path in (*checkpoints, *files))
    logger.info(f"--overwrite_output_dir deletes the run in {folder}: {names}.")
    folders = [path for path in checkpoints if not path.is_symlink()]
    for path in folders:
        (path / "trainer_state.json").unlink(missing_ok=True)
    for path in folders:
        shutil.rmtree(path)
    for path in (*(path for path in checkpoints if path.is_symlink()), *files):
        path.unlink()
    if (folder / "evaluation").exists():
        logger.warning(f"{folder / 'evaluation'} is left as it is: it describes the model that was there before.")


def _is_checkpoint(path: Path) -> bool:
    """Whether a trainer wrote this folder, perhaps not to its end, or it is a link; others may have such a name."""
    if not path.name.rsplit("-", 1)[1].isdigit():
        return False
    return path.is_symlink() or any(next(path.glob(pattern), None) for pattern in CHECKPOINT_FILES)
