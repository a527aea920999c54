# SPDX-License-Identifier: Apache-2.0
"""Classify recordings on a page in the browser, on this machine.

mmser app
mmser app --checkpoint runs/mine --port 8000
"""

import sys

from mmser.app_arguments import APP_ARGUMENTS
from mmser.arguments import parse_arguments
from mmser.console import run_command


def main(arguments: list[str] | None = None) -> int:
    """Serve the page until Ctrl-C. Returns the exit code, 0."""
    command = sys.argv[1:] if arguments is None else arguments
    (options,) = parse_arguments(APP_ARGUMENTS, command, __doc__)

    # Late: `--help` and a wrong flag do not wait for torch and Gradio
    from mmser import app_answers, app_examples, app_page, prediction_run

    app_page.check_gradio()
    classifier = prediction_run.load_classifier(options.model_name_or_path, options.device)
    answers = app_answers.Answers(classifier, options.model_name_or_path, options.max_minutes * 60)
    with app_page.own_folder(), app_examples.made() as (examples, reason):
        page = app_page.make_page(answers, examples, reason)
        app_page.serve(page, options.host, options.port, options.open_browser)
    return 0


def command() -> None:
    """`app.py` as a program; `mmser app` does the same."""
    run_command(main)
