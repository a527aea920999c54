# SPDX-License-Identifier: Apache-2.0
# /// script
# dependencies = [
#     "accelerate", "datasets", "matplotlib", "pyarrow", "scipy", "soundfile", "soxr", "torch", "transformers>=5.23",
# ]
# ///
"""Classify recordings: one clip, folders of clips, a long recording over time, or the microphone.

mmser predict clip.wav --checkpoint runs/mine --text "What a day!"
mmser predict recordings --checkpoint runs/mine --output answers.csv
mmser predict meeting.flac --checkpoint runs/mine --output meeting.srt --plot meeting.png
mmser predict --live --checkpoint runs/mine
torchrun --nproc_per_node 8 predict_hf.py calls --checkpoint runs/mine --output_dir answers

Exit code 0: all is classified. 1: some files could not be read; they are listed. 2: wrong usage.
"""

import sys

from mmser.arguments import parse_arguments
from mmser.console import run_command
from mmser.prediction_arguments import PREDICTION_ARGUMENTS, Share


def main(arguments: list[str] | None = None) -> int:
    """Classify as the flags say, and print or write the answers. Returns the exit code: 1 if some files are bad."""
    command = sys.argv[1:] if arguments is None else arguments
    (options,) = parse_arguments(PREDICTION_ARGUMENTS, command, __doc__)

    # Late: `--help` and a wrong flag do not wait for torch
    from mmser import microphone, prediction_files, prediction_parts, prediction_run, prediction_screen

    if options.live:
        return microphone.print_live(
            options.model_name_or_path, options.device, options.chunk_length_s, options.stride_length_s
        )
    if options.output_dir:
        return prediction_parts.run(options, Share.of_environment())
    prediction_files.check_outputs(options)
    job = prediction_run.find_job(options)
    for note in job.notes:
        print(f"note: {note}", file=sys.stderr)
    classifier = prediction_run.load_classifier(options.model_name_or_path, options.device)
    if options.adapt_to_inputs:
        print(f"note: {prediction_run.adapt(classifier, job.inputs, options)}", file=sys.stderr)
    predictions = prediction_run.classify(classifier, job, options)

    labels = prediction_run.labels_of(classifier, options)
    written = prediction_files.write(predictions, labels, job.by_segment, options)
    if options.format is None or options.output:
        prediction_screen.print_answers(predictions, job.by_segment, options, written)
    return prediction_screen.print_failures(predictions)


def command() -> None:
    """`predict_hf.py` as a program; `mmser predict` does the same."""
    run_command(main)


if __name__ == "__main__":
    command()
