# SPDX-License-Identifier: Apache-2.0
"""Windows, as far as it can be simulated on Linux: a program that trains, evaluates, classifies and exports there.
Its last lines tell how many classes three pipelines know, and what the telemetry of onnxruntime is set to.

    python tests/windows.py CORPUS FOLDER

Calls that Windows lacks are gone for our code. Names that it refuses are an error within FOLDER, and so is to replace,
rename or delete a file that is open or mapped. So is text that our modules open without an encoding. `test_windows.py`
and `test_network.py` look at one run of it.
"""

import builtins
import functools
import gc
import io
import multiprocessing
import os
import re
import sys
import types
from pathlib import Path, PureWindowsPath

ROOT = Path(__file__).parents[1]
MISSING_MODULES = ("fcntl", "grp", "pwd", "resource", "termios", "tty", "pty", "posix_ipc")
MISSING_CALLS = (
    *("fork", "forkpty", "getuid", "geteuid", "getgid", "getegid", "setsid", "killpg", "mkfifo", "mknod", "uname"),
    *("chown", "lchown", "fchown", "fchmod", "statvfs", "sync", "nice", "wait3", "wait4", "sysconf", "getloadavg"),
    *("posix_fallocate", "posix_fadvise", "sched_getaffinity", "register_at_fork", "fdatasync", "sendfile", "chroot"),
)
REFUSED = re.compile(r'[<>:"|?*\x00-\x1f]|[. ]$')  # in a part of a name


def refusal(path: str) -> str:
    """Why Windows does not take a name; empty if it does."""
    for part in path.split("/"):
        if part not in ("", ".", "..") and (REFUSED.search(part) or PureWindowsPath(part).is_reserved()):
            return part
    return "more than 260 letters" if len(path) > 260 else ""


def open_files() -> set[str]:
    """The files that this process has open or mapped."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:
            continue
    with open("/proc/self/maps", encoding="utf-8") as maps:
        return found | {line.split(maxsplit=5)[5].strip() for line in maps if line.count("/")}


def in_use(path: str | os.PathLike) -> bool:
    """Whether this process has a file open, or one in a folder."""
    real = os.path.realpath(path)
    return any(name == real or name.startswith(f"{real}/") for name in open_files())


def our_caller(frame) -> types.FrameType | None:
    """The frame, if code of this repository calls, perhaps by way of pathlib; libraries know which system this is."""
    while frame is not None and frame.f_code.co_filename.endswith("pathlib.py"):
        frame = frame.f_back
    if frame is None:
        return None
    path = Path(frame.f_code.co_filename)  # the libraries of an environment in the repository are not ours
    return frame if path.is_relative_to(ROOT) and not path.is_relative_to(sys.prefix) else None


def missing_for_us(name: str, call):
    """A call that our code does not find; nobody forks."""

    def checked(*arguments, **options):
        if our_caller(sys._getframe(1)) or name == "os.fork":
            raise AttributeError(f"Windows: there is no {name}")
        return call(*arguments, **options)

    return checked


def become_windows(folder: Path) -> None:
    """Take away what Windows lacks; there is no way back."""
    for name in MISSING_CALLS:
        if hasattr(os, name):
            setattr(os, name, missing_for_us(f"os.{name}", getattr(os, name)))
    import_module = builtins.__import__

    def import_what_is_there(name, *arguments, **options):
        if name.split(".")[0] in MISSING_MODULES and our_caller(sys._getframe(1)):
            raise ModuleNotFoundError(f"Windows: No module named {name!r}")
        return import_module(name, *arguments, **options)

    builtins.__import__ = import_what_is_there
    multiprocessing.set_start_method("spawn")
    own = str(folder)

    def refuse_names(event: str, values: tuple) -> None:
        names = {"open": values[:1], "os.mkdir": values[:1], "os.rename": values[:2]}.get(event, ())
        for name in names:
            path = os.fsdecode(name) if isinstance(name, (str, bytes, os.PathLike)) else ""
            if path.startswith(own) and (part := refusal(path[len(own) :])):
                raise OSError(22, f"Windows refuses the name {part!r}", path)

    sys.addaudithook(refuse_names)

    def refuse_in_use(call, *, last: int):
        @functools.wraps(call)
        def checked(*arguments, **options):
            for name in arguments[:last]:
                if str(name).startswith(own) and in_use(name):
                    raise PermissionError(13, "Windows: another program uses the file", str(name))
            return call(*arguments, **options)

        return checked

    for name, last in {"replace": 2, "rename": 2, "remove": 1, "unlink": 1, "rmdir": 1}.items():
        setattr(os, name, refuse_in_use(getattr(os, name), last=last))

    def no_symlink(*_, **__):
        raise OSError(1314, "Windows: a required privilege is not held by the client")

    os.symlink = no_symlink
    fsync = os.fsync

    def fsync_of_a_file(number):
        descriptor = number if isinstance(number, int) else number.fileno()
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise PermissionError(13, "Windows: a folder cannot be flushed")
        fsync(descriptor)

    os.fsync = fsync_of_a_file
    watch_encodings()


def watch_encodings() -> None:
    """Text that our modules open has an encoding: that of Windows is none that others can read."""
    real = builtins.open

    def checked(file, mode="r", buffering=-1, encoding=None, *arguments, **options):
        caller = our_caller(sys._getframe(1))
        if "b" not in mode and encoding is None and caller is not None:
            raise AssertionError(
                f"{caller.f_code.co_filename}:{caller.f_lineno}: {file} is opened without an encoding"
            )
        return real(file, mode, buffering, encoding, *arguments, **options)

    builtins.open = io.open = checked


def flags(**values) -> list[str]:
    words = []
    for name, value in values.items():
        words += (
            [f"--{name}"]
            if value is True
            else [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
        )
    return words


def use_everything(corpus: Path, folder: Path) -> None:
    """What most people do, each command twice: what is there is replaced, or gone on with."""
    from tiny_corpus import tiny_flags, tiny_tokenizer

    import eval_hf
    import export_hf
    import predict_hf
    import train_hf

    gc.freeze()  # the trainers collect garbage often, and what was imported is none
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    model = folder / "modèle"
    frozen = {
        "freeze_audio": True,
        "freeze_text": True,
        "cache_encoder_states": folder / "states",
        "augmented_copies": 1,
    }
    steps = {
        "save_strategy": "steps",
        "eval_strategy": "steps",
        "save_steps": 2,
        "eval_steps": 2,
        "save_total_limit": 1,
    }
    for number in (4, 6):  # the second goes on
        train_hf.main(tiny_flags(corpus, model, folder / "tokenizer", **frozen, **steps, max_steps=number))
    evaluation: dict[str, object] = {
        "checkpoint": model,
        "data_dir": corpus,
        "output_dir": folder / "report",
        "ood_dir": corpus / "ood",
    }
    evaluation |= {"bootstrap_samples": 10, "use_cpu": True, "dataloader_num_workers": 0, "calibrate": True}
    exported: dict[str, object] = {"checkpoint": model, "output_dir": folder / "export", "overwrite_output_dir": True}
    for turn in range(2):
        eval_hf.main(flags(**evaluation))
        export_hf.main(
            flags(**exported, **({"format": "onnx", "dtype": "float16"} if turn else {"format": "safetensors"}))
        )
        for name in ("answers.csv",) if turn else ("answers.csv", "answers.parquet"):
            output = flags(output=folder / name, checkpoint=model, device="cpu", overwrite=True)
            assert predict_hf.main([str(corpus / "test"), *output]) == 0
        parts = flags(output_dir=folder / "parts", part_size=5, checkpoint=model, device="cpu", format="csv")
        assert predict_hf.main([str(corpus / "test"), *parts]) == 0
    sound = str(next((corpus / "test").glob("*.wav")))
    onnx = flags(output=folder / "onnx.srt", checkpoint=folder / "export", overwrite=True)
    assert predict_hf.main([sound, "--segments", *onnx]) == 0
    use_pipelines(model, folder / "export", sound)


def use_pipelines(model: Path, exported: Path, sound: str) -> None:
    """As Python code uses a checkpoint and an export."""
    from transformers import pipeline

    from mmser import MMSERPipeline

    trusted = (pipeline("audio-classification", model=str(path), trust_remote_code=True) for path in (model, exported))
    for classify in (*trusted, MMSERPipeline.from_onnx(exported)):
        print(len(classify({"path": sound, "text": "what a joy"})))
    print("telemetry of onnxruntime:", os.environ["ORT_DISABLE_TELEMETRY"])


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    corpus_folder, own_folder = map(Path, sys.argv[1:])
    import torch

    torch.set_num_threads(1)
    become_windows(own_folder)
    use_everything(corpus_folder, own_folder)
    print("WORKED")
