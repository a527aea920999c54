# SPDX-License-Identifier: Apache-2.0
"""The page of `mmser app` in Gradio: `make_page` lays it out, `serve` shows it. What it says is in `app_answers.py`.

Nothing leaves the machine: no analytics, no fonts or scripts from elsewhere, no public link.
"""

import contextlib
import functools
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from mmser.app_answers import Answers
from mmser.app_examples import Example
from mmser.app_html import STYLE
from mmser.plots import BLUE
from mmser.tables import harmless

TITLE = "MMSER: which emotion is in a voice?"
FOLDER = "GRADIO_TEMP_DIR"  # what Gradio calls the place of recordings
MAX_UPLOAD = 2**30  # bytes, without which Gradio takes all that is sent: an hour of WAV has less
KEPT = 3600  # seconds that it keeps them, checked as often
IS_LIVE = """() => {
    for (const name of ["answer", "answers"]) document.getElementById(name)?.setAttribute("aria-live", "polite");
}"""  # screen readers say what comes into these


def check_gradio() -> None:
    """Raise an ImportError that says how to install Gradio, where it is missing; switch its analytics off."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ImportError('The page needs Gradio: `pip install "mmser[app]"`') from error


@contextlib.contextmanager
def own_folder() -> Iterator[None]:
    """Recordings of pages that are made and served inside are kept in a folder that is gone afterwards."""
    before = os.environ.get(FOLDER)
    with tempfile.TemporaryDirectory(prefix="mmser-page-", ignore_cleanup_errors=True) as folder:
        os.environ[FOLDER] = folder
        try:
            yield
        finally:
            os.environ.pop(FOLDER)
            os.environ.update({FOLDER: before} if before is not None else {})


def make_page(answers: Answers, examples: Sequence[Example] = (), reason: str = "") -> Any:
    """
    The page.

    Args:
        answers: what it says.
        examples: recordings to try, a button each.
        reason: why there are none, as a sentence.

    Returns:
        `gradio.Blocks`, for `serve`.
    """
    check_gradio()
    import gradio

    labels = harmless(list(answers.classifier.labels))
    with gradio.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(KEPT, KEPT)) as page:
        gradio.Markdown(
            f"# {TITLE}\n\nThe model answers {', '.join(labels[:-1])} or {labels[-1]}, with a score for each. "
            "It often errs on voices, languages and rooms unlike those that it learned from. Do not use it to decide "
            "about people."
        )
        with gradio.Tab("One recording"):
            _add_one(gradio, answers, examples, reason)
        with gradio.Tab("Many recordings"):
            _add_many(gradio, answers)
        page.load(None, js=IS_LIVE)
    return page


def _add_one(gradio: Any, answers: Answers, examples: Sequence[Example], reason: str) -> None:
    with gradio.Row():
        with gradio.Column():
            audio = gradio.Audio(
                sources=["upload", "microphone"], type="filepath", label="Recording", buttons=["download"]
            )
            text = gradio.Textbox(
                label="What is said (optional)", info="The words alone are enough too.", lines=1, max_lines=4
            )
            button = gradio.Button("Classify", variant="primary")
            gradio.Markdown(
                "Examples, which eSpeak NG speaks: they show what the page does, not how good the model is."
                if examples
                else reason
            )
            with gradio.Row():
                shown = [gradio.Button(one.title.capitalize(), size="sm", min_width=150) for one in examples]
        with gradio.Column():
            answer = gradio.HTML(elem_id="answer", apply_default_css=False)
    classify = {"fn": answers.one, "inputs": [audio, text], "outputs": answer, "concurrency_id": "model"}
    gradio.on([button.click, text.submit], **classify, api_name="classify")
    # An answer does not stay beside another recording
    changes = [audio.upload, audio.stop_recording, audio.clear]
    gradio.on(changes, lambda: "", outputs=answer, queue=False, api_name=False)
    for example, example_button in zip(examples, shown, strict=True):
        put = functools.partial(_values, example)
        example_button.click(put, outputs=[audio, text], api_name=False).then(**classify, api_name=False)


def _values(example: Example) -> tuple[str, str]:
    return example.path, example.text


def _add_many(gradio: Any, answers: Answers) -> None:
    files = gradio.File(file_count="multiple", type="filepath", label="Recordings")
    button = gradio.Button("Classify all", variant="primary")
    answer = gradio.HTML(elem_id="answers", apply_default_css=False)
    button.click(answers.many, files, answer, concurrency_id="model", api_name="classify_many")
    gradio.on([files.upload, files.clear], lambda: "", outputs=answer, queue=False, api_name=False)


def serve(page: Any, host: str | None = None, port: int | None = None, open_browser: bool = False) -> None:
    """
    Show the page until Ctrl-C.

    Args:
        page: of `make_page`.
        host, port: see `AppArguments`.
        open_browser: open it here.

    Raises:
        OSError: a host or port that cannot be had.
    """
    try:
        _, address, _ = page.launch(**settings(), server_name=host, server_port=port, inbrowser=open_browser)
    except OSError as error:
        where = f"--host {host or '127.0.0.1'} and --port {port or 'from 7860'}"
        raise OSError(
            f"The page cannot be served at {where}, which another program may use: choose others."
        ) from error
    print(f"The page is at {address} Ctrl-C ends it.", flush=True)
    page.block_thread()


def settings() -> dict[str, Any]:
    """How the page is launched: fonts of the system, nothing from elsewhere."""
    import gradio

    theme = gradio.themes.Default(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    # Gradio's own colours of these are too pale to read (WCAG asks for a contrast of 4.5)
    blue, grey = (
        dict.fromkeys(("button_primary_background_fill", "button_primary_background_fill_dark"), BLUE),
        "*neutral_600",
    )
    theme.set(**blue, body_text_color_subdued=grey, block_label_text_color=grey, block_info_text_color=grey)
    return {
        "theme": theme,
        "css": STYLE,
        "footer_links": [],
        "quiet": True,
        "share": False,
        "ssr_mode": False,
        "prevent_thread_lock": True,
        "max_file_size": MAX_UPLOAD,
    }
