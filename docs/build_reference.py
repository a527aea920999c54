# SPDX-License-Identifier: Apache-2.0
"""Build the reference of all public names and commands from their docstrings and help texts, as pages for a browser.

python docs/build_reference.py build/reference

`PAGES` says which names are public, a page for each module. pdoc makes the pages (extra `docs`); nothing in them is
loaded from elsewhere. The first page is `index.html`.
"""

import contextlib
import dataclasses
import importlib
import io
import re
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import mmser
from mmser import cli

START = "MMSER"  # the title of the first page
REFERENCE = re.compile(r"\[(<code>[^\n]*?</code>)\]")  # Transformers writes [`name`] where another name is meant
STYLE = "<style>.pdoc pre { white-space: pre-wrap }</style>"  # the lines of a help text fit the page
PAGES = {
    "configuration_mmser": ["MMSERConfig"],
    "modeling_mmser": [
        *("MMSERForAudioClassification", "MMSERModel", "MMSEROutput", "MMSERPreTrainedModel", "OpenMax"),
        "register_auto_classes",
    ],
    "processing_mmser": ["MMSERProcessor"],
    "pipeline_mmser": ["MMSERPipeline", "MMSEROnnxForAudioClassification", "MMSEROnnxConfig", "MMSEROnnxOutput"],
    "audio_mmser": ["load_audio", "stream_audio"],
    "quantization_mmser": ["quantize_dynamic"],
    "mmser.stream": ["MMSERStream", "StreamEvent"],
    "mmser.microphone": ["listen"],
    "mmser.explanation": ["explain", "Explanation"],
    "mmser.loading": ["load_emotion_dataset", "load_emotion_split"],
    "mmser.examples": ["EmotionDataset"],
    "mmser.augmentation": ["Augmenter"],
    "mmser.batches": ["MMSERDataCollator"],
    "mmser.training_arguments": ["MMSERTrainingArguments"],
    "mmser.trainer": ["MMSERTrainer"],
    "mmser.metrics": ["compute_classification_metrics"],
    "mmser.calibration": ["expected_calibration_error", "fit_temperature"],
    "mmser.open_set": ["auroc", "fpr_at_95_tpr", "oscr"],
    "mmser.export": ["export_checkpoint"],
    "mmser.pruning": ["prune"],
    "mmser.prediction_run": ["load_classifier"],
    "mmser.serving": ["create_app", "Limits"],
    "mmser.publishing": ["publish"],
}


def public_objects() -> Iterator[tuple[str, str, object]]:
    """The module, the name and the object of every public name."""
    for module, names in PAGES.items():
        for name in names:
            yield module, name, getattr(importlib.import_module(module), name)


def document_fields(thing: object) -> None:
    """Add the arguments of a dataclass to its docstring where they have help texts, as those that are flags have."""
    owner = next((kind for kind in getattr(thing, "__mro__", ()) if kind.__name__ == "TrainingFlags"), None)
    if owner is None or "Args:" in (thing.__doc__ or ""):
        return
    lines = [f"    {field.name}: {field.metadata['help'].replace('%%', '%')}" for field in dataclasses.fields(owner)]
    thing.__doc__ = "\n".join([f"{thing.__doc__}\n", "Args:", *lines])


def help_text(name: str) -> str:
    """What `mmser NAME --help_all` prints; `--help` of a command that has no longer one."""
    command = cli.COMMANDS[name][0]
    for flag in ("--help_all", "--help"):
        printed = io.StringIO()
        quiet = contextlib.redirect_stderr(io.StringIO())
        with contextlib.redirect_stdout(printed), quiet, contextlib.suppress(SystemExit, ValueError):
            cli.main([name, flag])
        if printed.getvalue():
            return printed.getvalue().replace(str(Path.home()), "~")
    raise ValueError(f"{command} prints no help.")


def overview() -> str:
    """The first page: every public name, with what its docstring says first, and every command."""
    lines = ["Import a name as it stands here.", "", "| name | what it is |", "|---|---|"]
    for module, name, thing in public_objects():
        said = " ".join((thing.__doc__ or "").split("\n\n")[0].split()).replace("|", "/")
        link = f"[`mmser.{name}`]({module.replace('.', '/')}.html#{name})"
        lines.append(f"| {link if name in mmser.__all__ else f'`{module}.{name}`'} | {said} |")  # pdoc links the other
    lines += ["", "## Commands", "", "| command | what it does |", "|---|---|"]
    lines += [f"| [`mmser {name}`](commands.html#mmser-{name}) | {job} |" for name, (_, job) in cli.COMMANDS.items()]
    return "\n".join(lines) + "\n"


def made_module(name: str, text: str) -> types.ModuleType:
    """A module of a docstring alone, for a page that is none of a file."""
    module = types.ModuleType(name, text)
    module.__all__ = []  # type: ignore[attr-defined]
    return module


def build(folder: Path) -> None:
    """Write all pages into `folder`."""
    from pdoc import doc, render

    commands = "".join(
        f"## mmser {name}\n\n{job}\n\n```text\n{help_text(name)}\n```\n\n" for name, (_, job) in cli.COMMANDS.items()
    )
    made = {START: overview(), "commands": f"What `--help_all` of each command prints.\n\n{commands}"}
    modules = {name: doc.Module(made_module(name, text)) for name, text in made.items()}
    for _, _, thing in public_objects():
        document_fields(thing)
    for name, names in PAGES.items():
        module: Any = importlib.import_module(name)
        module.__all__ = names  # what of the file is public
        modules[name] = doc.Module(module)
    render.configure(
        docformat="google", include_undocumented=False, show_source=False, footer_text=f"MMSER {mmser.__version__}"
    )
    for name, page_of in modules.items():
        path = folder / ("index.html" if name == START else f"{name.replace('.', '/')}.html")
        path.parent.mkdir(parents=True, exist_ok=True)
        page = REFERENCE.sub(r"\1", render.html_module(page_of, modules)).replace("</head>", f"{STYLE}</head>")
        path.write_text(page, encoding="utf-8")
    (folder / "search.js").write_text(render.search_index(modules), encoding="utf-8")
    for name in PAGES:
        del vars(sys.modules[name])["__all__"]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    build(Path(sys.argv[1]))
    print(f"The reference: {sys.argv[1]}/index.html")
