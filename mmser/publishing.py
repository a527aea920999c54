# SPDX-License-Identifier: Apache-2.0
"""A checkpoint becomes a complete page on the Hub: `publish`, which `mmser push` and `--push_to_hub` call.

Read in this order: `publish`, `complete_page` (the files of the page, in a folder beside the checkpoint, which stays
as it is), `complete_card` (its README.md), `check_metadata` (what the Hub would refuse, found out without it).
"""

import json
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, metadata_save
from huggingface_hub.repocard_data import model_index_to_eval_results
from transformers.utils import logging

from configuration_mmser import MMSERConfig, check_own_files
from mmser.arguments import SourceArguments
from mmser.files import read_json
from mmser.model_card import (
    CARD_NAME,
    card_metadata,
    is_own_card,
    sign_card,
    without_signature,
    write_model_card,
)
from mmser.progress import CURVES_NAME
from mmser.results import RESULTS_NAME
from mmser.search import given_flags
from mmser.trainer import MMSERTrainer
from pipeline_mmser import MMSEROnnxConfig

logger = logging.get_logger(__name__)
HANDLER = Path(__file__).parent / "handler.py"
SUFFIXES = (".json", ".safetensors", ".onnx", ".data", ".py", ".md", ".txt", ".model")  # no pickle among them
NAMES = ("LICENSE", "NOTICE", "merges.txt")
FILES_OF_A_RUN = ("trainer_state.json", "training_args.json")  # they name folders of this machine
PICTURES = (CURVES_NAME, "evaluation/plots/*.png", "plots/*.png")  # of the training, and of `eval_hf.py`
REPORT = "evaluation/report.md"
# What the code of a checkpoint imports, and `handler.py`; the versions are those of setup.cfg
REQUIREMENTS = (
    *("huggingface_hub>=1.31", "numpy>=1.26", "safetensors>=0.8", "scipy>=1.15", "soundfile>=0.13", "soxr>=0.5"),
    *("torch>=2.6", "transformers>=5.23"),
)
ONNX_REQUIREMENT = "onnxruntime>=1.22"
PIPELINE_TAG, LIBRARY = "audio-classification", "transformers"
MANY_VALUES = 10_000
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
LANGUAGE = re.compile(r"[a-z]{2,3}|multilingual|code")
# https://huggingface.co/docs/hub/repositories-licenses
LICENSES = (
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 "
    "bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear "
    "c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 "
    "cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 "
    "cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl "
    "ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 "
    "lgpl-3.0 isc intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openrail++ "
    "osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license "
    "fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma unknown "
    "other"
)


@dataclass
class Page:
    """
    What a page on the Hub will hold.

    Args:
        folder (`Path`): with its files.
        notes (`list[str]`): what a complete page has and this one lacks, a sentence each.
    """

    folder: Path
    notes: list[str] = field(default_factory=list)

    @property
    def files(self) -> dict[str, int]:
        """The size in bytes of each file, by its path."""
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in paths}


def publish(
    folder: str | Path,
    name: str,
    metadata: Mapping[str, Any] | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    dry_run: bool = False,
) -> tuple[dict[str, int], list[str], str]:
    """
    Complete a checkpoint and upload it.

    Args:
        folder: of the checkpoint, or of an export. It is not changed.
        name (`str`): of the repository, as in "user/name"; it is made if there is none.
        metadata: fields of the card that win over what is known: `license`, `language`, `datasets`.
        private (`bool`): of a repository that is made.
        token, revision (`str`): as of `huggingface_hub`.
        dry_run (`bool`): upload nothing.

    Returns:
        The sizes of the files by path, what the page lacks, and its address ("" after a dry run).

    Raises:
        ValueError, FileNotFoundError: no checkpoint, or metadata that the Hub refuses. Nothing is uploaded then.
    """
    if not REPOSITORY.fullmatch(name):
        raise ValueError(
            f"{name} is no name of a repository: give the user and the name, as in user/{Path(name).name}."
        )
    with tempfile.TemporaryDirectory(prefix="mmser-page-") as scratch:
        page = complete_page(folder, Path(scratch), name, metadata)
        if dry_run:
            return page.files, page.notes, ""
        api = HfApi(token=token)
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=name, folder_path=scratch, revision=revision, commit_message="Upload the model and its page"
        )
        return page.files, page.notes, str(address)


def publish_run(trainer: MMSERTrainer) -> None:
    """What `--push_to_hub` does at the end of a run: the first process publishes the output folder."""
    trainer._finish_current_push()  # of a checkpoint, in the background
    if trainer.is_world_process_zero():
        arguments, name = trainer.args, str(trainer.hub_model_id)
        _, notes, address = publish(
            arguments.output_dir,
            name,
            private=arguments.hub_private_repo,
            token=arguments.hub_token,
            revision=arguments.hub_revision,
        )
        logger.info("\n".join([f"Pushed: {address}", *(f"The page lacks: {note}" for note in notes)]))


def complete_page(folder: str | Path, into: Path, name: str, metadata: Mapping[str, Any] | None = None) -> Page:
    """
    Bring all files of a page together: those of the checkpoint, plots of its evaluation, handler, requirements, card.

    Args:
        folder, name, metadata: as of `publish`.
        into: an empty folder.

    Raises:
        As `publish`.
    """
    source = Path(folder)
    if not (source / "config.json").is_file():
        reason = "it has no config.json" if source.is_dir() else "there is no such folder"
        raise FileNotFoundError(f"{source} is no checkpoint: {reason}.")
    files = _files_to_publish(source)
    check_own_files(source, files=files)
    config = read_json(source / "config.json")
    if config.get("model_type") not in (MMSERConfig.model_type, MMSEROnnxConfig.model_type):
        raise ValueError(
            f"{source} is no MMSER checkpoint: its config.json has model_type {config.get('model_type')!r}."
        )
    for path in files:
        target = into / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        _place(path, target)
    for file_name in FILES_OF_A_RUN:
        if (into / file_name).is_file():
            content = read_json(into / file_name)
            _replace(into / file_name, json.dumps(with_names_alone(content), indent=2) + "\n")
    _replace(into / "config.json", json.dumps(without_local_paths(config), indent=2, sort_keys=True) + "\n")
    shutil.copy(HANDLER, into / "handler.py")
    if not (into / "requirements.txt").is_file():
        is_onnx = config["model_type"] == MMSEROnnxConfig.model_type
        _replace(into / "requirements.txt", "\n".join([*REQUIREMENTS, *[ONNX_REQUIREMENT] * is_onnx, ""]))
    data = complete_card(source, into, name, config, metadata or {})
    return Page(into, _what_is_missing(source, into, config, data))


def _files_to_publish(source: Path) -> list[Path]:
    """Files of the checkpoint at the top, and pictures and words of its evaluation. Never pickles or checkpoints."""
    top = [path for path in source.iterdir() if path.suffix in SUFFIXES or path.name in NAMES]
    others = [path for pattern in (*PICTURES, REPORT) for path in source.glob(pattern)]
    return sorted(path for path in (*top, *others) if path.is_file() and not path.name.startswith((".", "_")))


def _place(path: Path, target: Path) -> None:
    """Weights are large: a second name for the same file, where the file system has that."""
    try:
        os.link(path.resolve(), target)
    except OSError:
        shutil.copy2(path, target)


def _replace(path: Path, text: str) -> None:
    """Write a file anew: it may be a second name of one of the user's."""
    path.unlink(missing_ok=True)
    path.write_text(text, encoding="utf-8")


def without_local_paths(value: Any) -> Any:
    """A configuration without `_name_or_path` where that is a path of this machine, at any depth."""
    if isinstance(value, dict):
        kept = {name: without_local_paths(item) for name, item in value.items()}
        return {
            name: item
            for name, item in kept.items()
            if name != "_name_or_path" or (isinstance(item, str) and not Path(item).is_absolute())
        }
    return [without_local_paths(item) for item in value] if isinstance(value, list) else value


def with_names_alone(value: Any) -> Any:
    """What Trainer writes of a run, with the last part of each absolute path in place of it, at any depth."""
    if isinstance(value, dict):
        return {name: with_names_alone(item) for name, item in value.items()}
    if isinstance(value, list):
        return [with_names_alone(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def complete_card(
    source: Path, into: Path, name: str, config: Mapping[str, Any], metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """
    Write README.md into a page. A card of ours is made anew for `name`, with the plots; of one that somebody wrote or
    changed the words stay, and only what its metadata lack is added; without a card there is a short one.

    Returns:
        Its metadata.

    Raises:
        ValueError: metadata that the Hub refuses.
    """
    card, results = into / CARD_NAME, _results(source)
    is_ours = not card.is_file() or is_own_card(card)
    if is_ours and results and config["model_type"] == MMSERConfig.model_type:
        card.unlink(missing_ok=True)
        write_model_card({**results, "model_name": name}, into)
    elif not card.is_file():
        _replace(card, _short_card(name, config))
    content = ModelCard.load(card, ignore_metadata_errors=False)
    written = content.data.to_dict()
    check_number_of_values(written)
    known = card_metadata({**results, "model_name": name}, name, config).to_dict() if results else {}
    default = {"library_name": LIBRARY, "pipeline_tag": PIPELINE_TAG}
    data = {**default, **known, **written, **{key: value for key, value in metadata.items() if value}}
    data["tags"] = list(dict.fromkeys([*written.get("tags", ()), "speech-emotion-recognition", "mmser"]))
    check_metadata(data)
    body = without_signature(content.text) if is_ours else content.text
    body = re.sub(rf'model="([^"]*/)?{re.escape(source.resolve().name)}/?"', f'model="{name}"', body)
    pictures = [path.relative_to(into).as_posix() for pattern in PICTURES for path in sorted(into.glob(pattern))]
    missing = [path for path in pictures if path not in body]
    if is_ours and missing:
        shown = "\n\n".join(f"![{Path(path).stem.replace('_', ' ')}]({path})" for path in missing)
        body = f"{body.rstrip()}\n\n## Plots\n\n{shown}\n"
    _replace(card, body)
    metadata_save(card, data)
    if is_ours:
        _replace(card, sign_card(card.read_text(encoding="utf-8")))
    return data


def _results(source: Path) -> dict[str, Any]:
    path = source / RESULTS_NAME
    return read_json(path) if path.is_file() else {}


def _short_card(name: str, config: Mapping[str, Any]) -> str:
    labels = " / ".join((config.get("id2label") or {}).values())
    call = f'pipeline("audio-classification", model="{name}", trust_remote_code=True)'
    return (
        f"# {name}\n\nA speech emotion recogniser made with MMSER: one of {labels} comes out.\n\n## Use\n\n"
        f'```python\nfrom transformers import pipeline\n\nclassifier = {call}\nclassifier("clip.wav")\n```\n\n'
        "It comes without the results of its training: measure it on your own recordings before use.\n"
    )


def check_number_of_values(data: Any) -> None:
    """Raise ValueError for metadata of `MANY_VALUES` or more: a few lines of YAML can name the same lists for ever."""
    left, number = [data], 0
    while left:
        one, number = left.pop(), number + 1
        if number > MANY_VALUES:
            raise ValueError(f"The metadata of README.md hold more than {MANY_VALUES:,} values: shorten them.")
        left += [*one.keys(), *one.values()] if isinstance(one, dict) else one if isinstance(one, list | tuple) else ()


def check_metadata(data: Mapping[str, Any]) -> None:
    """
    Check the metadata of a card as the Hub does, by its documented lists and the parser of `huggingface_hub`.

    Raises:
        ValueError: the field, what it holds and what it may hold.
    """
    license = data.get("license")
    if license is not None and license not in LICENSES.split():
        raise ValueError(f"license: {license!r} is not one of the Hub, such as apache-2.0, cc-by-nc-4.0, or other.")
    if license == "other" and not data.get("license_name"):
        raise ValueError("license: other needs `license_name` and `license_link` in the metadata of README.md.")
    wrong = [code for code in _listed(data.get("language")) if not LANGUAGE.fullmatch(str(code))]
    if wrong:
        raise ValueError(f"language: {wrong[0]!r} is no code of two or three letters, as en, de, yue.")
    for key, pattern, example in (
        ("datasets", r"[\w.-]+(/[\w.-]+)?", "user/data"),
        ("base_model", r"[\w.-]+/[\w.-]+", "openai/whisper-base"),
        ("metrics", r"[\w.-]+", "f1"),
    ):
        wrong = [value for value in _listed(data.get(key)) if not re.fullmatch(pattern, str(value))]
        if wrong:
            raise ValueError(f"{key}: {wrong[0]!r} is no name on the Hub, as {example}.")
    if data.get("pipeline_tag") != PIPELINE_TAG:
        raise ValueError(f"pipeline_tag: {data.get('pipeline_tag')!r} must be {PIPELINE_TAG}.")
    if "model-index" in data:
        try:
            model_index_to_eval_results(data["model-index"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"model-index: {error} is missing or malformed.") from error


def _listed(value: Any) -> Sequence[Any]:
    return [] if value is None else value if isinstance(value, (list, tuple)) else [value]


def _data_flags(source: Path) -> str:
    """The flags that named the clips of a training, as its results tell; DATA stands for what they do not tell."""
    unknown = "--data_dir DATA"
    command = shlex.split(_results(source).get("command") or "")
    if len(command) < 2 or (command[1].endswith(".json") and not Path(command[1]).is_file()):
        return unknown
    given = given_flags(command[1:])
    names = [name for name in (*(item.name for item in fields(SourceArguments)), "ood_dir") if given.get(name)]
    values = {name: given[name] if isinstance(given[name], list) else [given[name]] for name in names}
    words = [[f"--{name}", *(str(one) for one in values[name] if one is not True)] for name in names]
    return " ".join(map(shlex.join, words)) or unknown


def _what_is_missing(source: Path, into: Path, config: Mapping[str, Any], data: Mapping[str, Any]) -> list[str]:
    """In the order of what a reader of the page misses most."""
    weights = [*into.glob("*.safetensors"), *into.glob("*.onnx")]
    code = {f"{str(value).split('.')[0]}.py" for value in (config.get("auto_map") or {}).values()}
    lacking = sorted(name for name in code if not (into / name).is_file())
    labels = list((config.get("id2label") or {}).values())
    notes = {
        "no weights: model.safetensors or model.onnx": not weights,
        f"no code: {', '.join(lacking) or 'auto_map'}; save the checkpoint anew": not code or bool(lacking),
        "the labels have no names, so the page shows LABEL_0": not labels or str(labels[0]).startswith("LABEL_"),
        "no license, so nobody may use it: --license apache-2.0, or what the encoders and the data allow": (
            not data.get("license")
        ),
        "no language: --language en de": not data.get("language"),
        "no data set: --datasets user/data, if it is on the Hub": not data.get("datasets"),
        "no results: train_hf.py writes eval_results.json, and the page shows its scores": "model-index" not in data,
        f"no plots: mmser eval --checkpoint {shlex.quote(str(source))} {_data_flags(source)} draws them": not any(
            path.name != CURVES_NAME for path in into.rglob("*.png")
        ),
    }
    return [note for note, is_missing in notes.items() if is_missing]
