# SPDX-License-Identifier: Apache-2.0
"""Names of models: a folder, or a name on the Hub. What is wrong with one is said in a sentence, and soon."""

import contextlib
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from mmser.console import first_sentence
from mmser.table_files import near_path

CONFIG = "config.json"
NO_ANSWER = (407, 408, 429)  # of a proxy, or of a Hub that is too busy
WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")


@dataclass(frozen=True)
class Named:
    """A model or a data set that a flag names, and what to do without it."""

    flag: str
    name: str
    advice: str = ""
    is_dataset: bool = False

    def error(self, what: str) -> FileNotFoundError:
        near = None if self.is_dataset else near_path(Path(self.name))
        meant = f" Did you mean {near}?" if near is not None and near.is_dir() else ""
        return FileNotFoundError(f"{self.flag} {self.name} {what}{meant} {self.advice}".rstrip())


def checkpoint_folder(name: str, flag: str) -> str:
    """
    What a flag names as a checkpoint: a folder with a `config.json`, or a name on the Hub, not looked up here.

    A file such as `checkpoints/best_model.pt` means the folder beside it, as other programs keep a model in one file.

    Raises:
        FileNotFoundError: what looks like a path and is none, or a folder without a checkpoint.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        check_folder(path, flag)
        return str(path)
    if path.suffix in WEIGHT_SUFFIXES:
        for folder in (path.with_suffix(""), path.parent):
            if (folder / CONFIG).is_file():
                warnings.warn(f"{flag} {name}: a checkpoint is a folder. Taking {folder}.", stacklevel=2)
                return str(folder)
    if path.exists():
        raise FileNotFoundError(f"{flag} {name} is a file; a checkpoint is a folder with {CONFIG} and weights.")
    if _is_path(name):
        near = near_path(path)
        meant = f" Did you mean {near}?" if near is not None else ""
        raise FileNotFoundError(
            f"{flag} {name} does not exist; a checkpoint is a folder, or a name on the Hub.{meant}"
        )
    return name


def check_folder(folder: Path, flag: str) -> None:
    """Raise FileNotFoundError, with what is there instead, for a folder without a `config.json`."""
    if (folder / CONFIG).is_file():
        return
    inside = sorted((file for file in folder.glob(f"*/{CONFIG}")), key=lambda file: file.stat().st_mtime)
    hint = f" Is {inside[-1].parent} meant?" if inside else ""
    raise FileNotFoundError(f"{flag} {folder} is no model: it has no {CONFIG}.{hint}")


def _is_path(name: str) -> bool:
    if name.startswith((".", "/", "~")) or "\\" in name or Path(name).suffix in WEIGHT_SUFFIXES:
        return True
    try:
        validate_repo_id(name)
    except HFValidationError:
        return True
    return False


@contextlib.contextmanager
def reading(models: Sequence[Named]) -> Iterator[None]:
    """
    Look models up before they are read inside, and say in one sentence what is wrong with one.

    Where the Hub cannot be reached, what is in the cache is read, without an attempt for each file.

    Raises:
        FileNotFoundError: a model that is neither here nor on the Hub.
        OSError: a model that cannot be read.
        ValueError: a folder with files that are elsewhere.
    """
    from configuration_mmser import check_own_files  # here: it imports Transformers, and flags do not wait for that

    for model in models:
        check_own_files(model.name)
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = any([_is_in_cache_alone(model) for model in models]) or before
    try:
        yield
    except Exception as error:
        deep = _nested_too_deep(models) if isinstance(error, RecursionError) else None
        is_about_weights = type(error).__name__ == "SafetensorError"
        if not isinstance(error, OSError) and not is_about_weights and deep is None:
            raise
        about = ", ".join(f"{model.flag} {model.name}" for model in models)
        said = first_sentence(str(error)) if deep is None else f"{deep} is nested too deep."
        damaged = "its weights (.safetensors) are cut or damaged: " if is_about_weights else ""
        raise OSError(f"{about} cannot be read: {damaged}{said}") from error
    finally:
        constants.HF_HUB_OFFLINE = before


def _nested_too_deep(models: Sequence[Named]) -> Path | None:
    """The first JSON file in the folders of models that Python's recursion does not reach the bottom of."""
    for file in (file for model in models for file in sorted(Path(model.name).expanduser().glob("*.json"))):
        try:
            json.loads(file.read_bytes())
        except RecursionError:
            return file
        except ValueError:  # it is no JSON: another error says so, where it is read
            continue
    return None


def _is_in_cache_alone(model: Named) -> bool:
    """Whether a model can only be read from the cache; FileNotFoundError if it cannot be read at all."""
    if Path(model.name).expanduser().is_dir():
        return False
    if _is_path(model.name):
        raise model.error("does not exist.")
    if model.is_dataset:  # its files are in a cache of their own, which the library of data sets knows
        return not constants.HF_HUB_OFFLINE and bool(_why_unreachable(model))
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _why_unreachable(model)
    if not reason:
        return False
    if not isinstance(try_to_load_from_cache(model.name, CONFIG), str):
        raise model.error(f"is neither a folder nor in the cache of the Hub, and {reason}.")
    return True


def _why_unreachable(model: Named) -> str:
    """Ask the Hub once; the reason if it gives no answer, FileNotFoundError if it has no such model."""
    try:
        kind, file = ("dataset", "README.md") if model.is_dataset else ("model", CONFIG)
        url = hf_hub_url(model.name, file, repo_type=kind)
        get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except RepositoryNotFoundError as error:
        raise model.error(
            f"is neither a folder nor a {kind} on the Hub that you may read: check the name, or log in with "
            "`hf auth login`."
        ) from error
    except EntryNotFoundError:
        pass  # the Hub answers: reading says what it lacks
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in NO_ANSWER or status >= 500:  # reading would try again and again, for each file
            return f"the Hub cannot be reached (its address answers {status})"
    except Exception as error:  # no connection: the kind of error depends on the HTTP library of the Hub's version
        return f"the Hub cannot be reached ({type(error).__name__})"
    return ""
