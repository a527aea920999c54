# SPDX-License-Identifier: Apache-2.0
"""Push a checkpoint to the Hugging Face Hub, as a complete page.

mmser push runs/mine user/name --license cc-by-nc-4.0 --language en de
mmser push runs/mine user/name --dry_run      # what would be uploaded, and what the page lacks

The page has the weights and their code, a card with metadata and scores, plots of `mmser eval`, and what an Inference
Endpoint needs. The folder is not changed, and nothing is uploaded that the Hub would refuse. First: `hf auth login`.
"""

import argparse
import sys

from mmser.console import run_command
from mmser.names import checkpoint_folder


def make_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parser = argparse.ArgumentParser(
        prog="mmser push", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="checkpoint, or export")
    parser.add_argument("name", help="repository, as in user/name; it is made if there is none")
    parser.add_argument("--license", help="of the weights, as the Hub calls it: apache-2.0, cc-by-nc-4.0 ...")
    parser.add_argument("--language", nargs="+", metavar="CODE", help="languages it was trained on, as in: en de")
    parser.add_argument("--datasets", nargs="+", metavar="NAME", help="data sets on the Hub that it was trained on")
    parser.add_argument("--private", action="store_true", default=None, help="for a repository that is made")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to push to (default: main)")
    parser.add_argument("--dry_run", action="store_true", help="upload nothing")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Show what the page holds and lacks, and upload it. Returns the exit status."""
    options = make_parser().parse_args(arguments)
    folder = checkpoint_folder(options.folder, "mmser push")

    # Late: --help does not wait for torch
    from mmser.publishing import publish

    metadata = {name: getattr(options, name) for name in ("license", "language", "datasets")}
    files, notes, address = publish(
        folder, options.name, metadata, options.private, revision=options.revision, dry_run=options.dry_run
    )
    print("\n".join(f"{size / 1e6:10.3f} MB  {path}" for path, size in files.items()))
    print("\n".join(f"The page lacks: {note}" for note in notes) or "The page is complete.")
    print(f"Pushed: {address}" if address else "A dry run: nothing was uploaded.")
    return 0


def command() -> None:
    """The command alone, without those beside it: `python -m mmser.push_command`."""
    run_command(lambda: main(sys.argv[1:]))


if __name__ == "__main__":
    command()
