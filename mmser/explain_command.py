# SPDX-License-Identifier: Apache-2.0
"""Show which seconds of a clip and which of its words moved the answer.

mmser explain clip.wav --plot clip.png
mmser explain clip.wav --text "What a day!" --checkpoint runs/mine
mmser explain --text "What a day!" --label happy

Each piece is taken away in turn, and the clip is classified again. The change is the score with the piece minus the
score without it: +0.20 says that the piece adds 0.20 to the score.
"""

import argparse
import sys
from pathlib import Path

from mmser.console import run_command
from mmser.explanation import MIN_WINDOW, explain, split_words
from mmser.flags import LIMITS, check_limits
from mmser.prediction_arguments import check_encoding, chosen_checkpoint
from mmser.table_files import near_name


def make_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parser = argparse.ArgumentParser(
        prog="mmser explain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("clip", nargs="?", help="an audio file of at most 30 s")
    parser.add_argument("--checkpoint", help="MMSER checkpoint or export (default: the one that comes with MMSER)")
    parser.add_argument("--text", help="what is said in the clip; without a clip, the words alone")
    parser.add_argument("--label", help="the class to explain (default: the answer)")
    parser.add_argument(
        "--window", type=float, default=0.5, metavar="SECONDS", help="how much is silenced at a time (default: 0.5)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="picture (.png); needs the extra `report`")
    parser.add_argument("--overwrite", action="store_true", help="replace --plot where it exists")
    parser.add_argument("--batch_size", type=int, default=8, help="clips at a time (default: 8)")
    parser.add_argument("--device", help="cpu, cuda, mps ... (default: the GPU, if there is one)")
    return parser


def _check(options: argparse.Namespace) -> None:
    """Raise a ValueError for what is wrong and can be seen without the model."""
    if options.clip is None and not options.text:
        raise ValueError("There is nothing to explain: name an audio file, or give --text.")
    if options.clip is not None and Path(options.clip).is_dir():
        raise ValueError(f"{options.clip} is a folder: name one audio file.")
    if options.clip is not None and not Path(options.clip).is_file():
        raise FileNotFoundError(f"{options.clip} does not exist.{near_name(Path(options.clip))}")
    check_encoding(options.text, "--text")
    check_limits("--batch_size", options.batch_size, *LIMITS["batch_size"])
    if not options.window >= MIN_WINDOW:
        raise ValueError(f"--window is a time in seconds, at least {MIN_WINDOW}, got {options.window}.")
    if options.plot is not None and options.clip is None and len(split_words(options.text)) == 1:
        raise ValueError("--plot has nothing to show for one word: give a clip, or more words.")
    if options.plot is not None:
        from mmser.plots import check_matplotlib

        check_matplotlib()
        if options.plot.suffix.lower() != ".png":
            raise ValueError(f"--plot {options.plot}: the picture is a .png file.")
        if not options.plot.parent.is_dir():
            raise FileNotFoundError(f"--plot {options.plot}: the folder {options.plot.parent} does not exist.")
        if options.plot.exists() and not options.overwrite:
            raise FileExistsError(f"--plot {options.plot} exists: give another name, or --overwrite.")


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns its exit status; a mistake is an error with one sentence."""
    options = make_parser().parse_args(arguments)
    _check(options)
    checkpoint = chosen_checkpoint(options.checkpoint)

    # Late: nothing above waits for torch
    from audio_mmser import load_audio, why_silent
    from mmser import prediction_run
    from mmser.tables import format_table

    if options.clip is not None and (silence := why_silent(options.clip)):
        raise ValueError(f"{options.clip}: {silence}.")
    classifier = prediction_run.load_classifier(checkpoint, options.device)
    rate = getattr(classifier.processor.feature_extractor, "sampling_rate", 16_000)
    waveform = None if options.clip is None else load_audio(options.clip, rate)
    found = explain(classifier, waveform, rate, options.text, options.label, options.window, options.batch_size)
    name = options.clip or f'"{options.text}"'
    print(f"{name}: {found.label} {found.score:.2f}\n")
    if found.rows:
        print("What each piece adds to that score: by so much it falls where the piece is taken away.\n")
    rows = [{**row, "change": f"{row['change']:+.3f}"} for row in found.rows]
    kept = [name for name in ("start", "end", "word", "change") if any(row[name] not in ("", None) for row in rows)]
    print(format_table(rows, kept) if rows else "There is nothing to take away from one word.")
    if options.plot is not None:
        from mmser.plots import plot_explanation

        sound = [(one.start, one.end, one.change) for one in found.sound]
        words = [(one.word, one.change) for one in found.words]
        title = f"What speaks for {found.label} ({found.score:.2f}), in blue, and against it, in orange"
        print(f"\nWritten: {plot_explanation(sound, words, options.plot, waveform, rate, title)}")
    return 0


def command() -> None:
    """The command alone, without those beside it: `python -m mmser.explain_command`."""
    run_command(lambda: main(sys.argv[1:]))


if __name__ == "__main__":
    command()
