# SPDX-License-Identifier: Apache-2.0
"""What a full disk does to a training, a prediction, a report and an export: a program that fills one.

    unshare --user --map-root-user --mount python tests/full_disk.py disk CORPUS FOLDER
    python tests/full_disk.py limit CORPUS FOLDER

FOLDER becomes a small disk of its own, which this process alone sees; or else no file may be larger than a limit. Each
command has done its work once. The same with other settings must end in one sentence and leave what was there, and
must do its work when there is room again. `test_full_disk.py` runs it.
"""

import contextlib
import functools
import gc
import io
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_corpus import tiny_flags, tiny_tokenizer

import eval_hf
import export_hf
import predict_hf
import train_hf
from mmser.console import run_command
from mmser.trainer import last_complete_checkpoint
from modeling_mmser import MMSERForAudioClassification

IDENTITY = "run_identity.json"  # of a training, which may go on with other settings


@contextlib.contextmanager
def full_disk(folder: Path, left: int) -> Iterator[None]:
    """A disk on which few bytes are left."""
    status, ballast = os.statvfs(folder), folder / ".ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize - left)
    try:
        yield
    finally:
        ballast.unlink()


@contextlib.contextmanager
def limited(folder: Path, left: int) -> Iterator[None]:
    """No file may be larger; Python ignores the signal that would end the process."""
    earlier = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (left, earlier[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, earlier)


def run(main: Callable, words: list[str]) -> tuple[int, str]:
    """A command as a program. Returns: its exit code, and what it wrote to stderr."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            run_command(functools.partial(main, words))
        except SystemExit as error:
            return int(error.code or 0), said.getvalue()
    return 0, said.getvalue()


def contents(folder: Path) -> dict[str, bytes]:
    """All files that a user sees."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if "/." not in f"/{name}" and IDENTITY not in name}


def suffer(main: Callable, before: list[str], after: list[str], scarce: Any, folder: Path) -> None:
    """A command on a full disk, where it has done its work once, and again when there is room."""
    code, said = run(main, before)
    assert code == 0, said
    kept, name = contents(folder), main.__module__
    with scarce:
        code, said = run(main, after)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and "Traceback" not in said, f"{name}: {said}"
    assert str(folder) in errors[0] and ("No space left" in errors[0] or "File too large. The disk" in errors[0]), (
        errors[0]
    )
    now = contents(folder)
    assert all(now.get(file) == kept[file] for file in kept), f"{name}: {[f for f in kept if now.get(f) != kept[f]]}"
    halves = [file for file in now.keys() - kept.keys() if not file.startswith("run/checkpoint-")]
    assert not halves, f"{name}: {halves}"
    hidden = [path for path in folder.rglob(".*") if path.suffix == ".tmp"]
    assert not hidden, f"{name}: {hidden}"
    code, said = run(main, after)
    assert code == 0, said
    assert contents(folder) != kept
    print(f"{name}: {errors[0]}", flush=True)


def main(kind: str, corpus: Path, folder: Path) -> None:
    if kind == "disk":
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32M", "tmpfs", folder], check=True)
    scarce = functools.partial(full_disk if kind == "disk" else limited, folder)
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    model = str(folder / "run")
    flags = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "no", "save_total_limit": 9}
    train = functools.partial(tiny_flags, corpus, model, folder / "tokenizer", **flags)
    suffer(train_hf.main, train(max_steps=2), train(max_steps=4), scarce(40_000), folder)
    assert str(last_complete_checkpoint(model)).endswith("checkpoint-4")
    own = ["--checkpoint", model]
    predict = [*own, "--output", str(folder / "answers.csv"), "--overwrite", "--device", "cpu"]
    before, after = ([str(corpus / split), *predict] for split in ("validation", "test"))
    suffer(predict_hf.main, before, after, scarce(0 if kind == "disk" else 500), folder)
    judge = [*own, "--data_dir", str(corpus), "--output_dir", str(folder / "report"), "--use_cpu"]
    judge += ["--dataloader_num_workers", "0", "--bootstrap_samples"]
    suffer(eval_hf.main, [*judge, "10"], [*judge, "20"], scarce(20_000), folder)
    export = [*own, "--output_dir", str(folder / "export"), "--overwrite_output_dir", "--format", "safetensors"]
    suffer(export_hf.main, [*export, "--dtype", "float16"], export, scarce(40_000), folder)
    for each in ("run", "export"):
        MMSERForAudioClassification.from_pretrained(folder / each)


if __name__ == "__main__":
    gc.freeze()  # the trainers collect garbage often, and what was imported is none
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
