# SPDX-License-Identifier: Apache-2.0
"""Make training data of a known corpus of emotional speech that was downloaded by hand.

mmser corpus --list                                           # the corpora that are known
mmser corpus ravdess                                          # who made it, its licence, where to download it
mmser corpus ravdess --input RAVDESS --output data/ravdess    # tables that `train_hf.py --data_dir` reads
"""

import argparse
import difflib
import sys
from pathlib import Path

from mmser.console import run_command
from mmser.known_corpora import CORPORA, describe_corpus, table_of_known_corpora


def make_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parser = argparse.ArgumentParser(
        prog="mmser corpus", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", nargs="?", help="its name in --list")
    parser.add_argument("--list", action="store_true", help="show the corpora that are known")
    parser.add_argument("--input", type=Path, metavar="DIR", help="folder that the corpus was unpacked to")
    parser.add_argument("--output", type=Path, metavar="DIR", help="new folder for the tables")
    parser.add_argument(
        "--copy", action="store_true", help="copy the audio too, for a folder that can be moved (default: it stays)"
    )
    parser.add_argument(
        "--labels",
        choices=("four", "all"),
        default="four",
        help="neutral, happy, sad and angry, with the rest as open set (default), or all emotions of the authors",
    )
    parser.add_argument(
        "--map",
        nargs="+",
        default=[],
        metavar="EMOTION=CLASS",
        help="another class for an emotion, such as excitement=happy; other: none of the classes; nothing: left out",
    )
    parser.add_argument("--fold", help="the fold to test on, where a corpus has folds (default: the last)")
    parser.add_argument("--seed", type=int, default=42, help="of the division of speakers (default: 42)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns its exit status; a mistake is a ValueError with one sentence."""
    options = make_parser().parse_args(arguments)

    if options.list:
        print(table_of_known_corpora())
        return 0
    if options.corpus is None:
        raise ValueError(f"name a corpus: {', '.join(CORPORA)}; --list tells more about them")
    corpus = CORPORA.get(options.corpus.lower())
    if corpus is None:
        near = difflib.get_close_matches(options.corpus.lower(), CORPORA, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(CORPORA)}."
        raise ValueError(f"the corpus {options.corpus} is not known: {hint}")
    if options.input is None and options.output is None:
        print(f"{corpus.name}\n\n{describe_corpus(corpus)}")
        return 0
    if options.input is None or options.output is None:
        raise ValueError("give both --input, the folder with the corpus, and --output, a new folder for the tables")

    # Late: nothing above waits for torch
    from mmser import corpus_conversion

    chosen = corpus_conversion.Options(
        options.labels == "all", _read_map(options.map), options.fold, options.seed, options.copy
    )
    result = corpus_conversion.convert(corpus, options.input, options.output, chosen)
    print(corpus_conversion.summarise(result))
    return 0


def _read_map(pairs: list[str]) -> dict[str, str]:
    """EMOTION=CLASS -> the class of the emotion."""
    targets = {}
    for pair in pairs:
        emotion, separator, target = pair.partition("=")
        if not separator:
            raise ValueError(f"--map {pair}: write EMOTION=CLASS, such as calm=neutral")
        targets[emotion.strip()] = target.strip()
    return targets


def command() -> None:
    """The command alone, without those beside it: `python -m mmser.corpus_command`."""
    run_command(lambda: main(sys.argv[1:]))


if __name__ == "__main__":
    command()
