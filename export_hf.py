# SPDX-License-Identifier: Apache-2.0
# /// script
# dependencies = ["onnx", "onnxruntime", "onnxscript", "scipy", "soundfile", "soxr", "torch", "transformers>=5.23"]
# ///
"""Make an MMSER checkpoint portable (ONNX), small (int8, float16, fewer languages), or both.

python export_hf.py --checkpoint runs/mine --output_dir runs/onnx
python export_hf.py --checkpoint runs/mine --output_dir runs/small --dtype int8 --vocabulary_text my_data/train.csv
python export_hf.py --checkpoint runs/mine --output_dir runs/pruned --format safetensors --prune 0.3 --data_dir my_data
python export_hf.py --checkpoint me/model --output_dir runs/half --format safetensors --dtype float16 --languages de en
"""

import sys
from typing import TYPE_CHECKING

from mmser.arguments import EXPORT_ARGUMENTS, parse_arguments
from mmser.console import run_command

if TYPE_CHECKING:
    from mmser.export import ExportReport


def main(arguments: list[str] | None = None) -> "ExportReport":
    """Export a checkpoint as the flags say. Prints and returns the sizes and the differences to PyTorch."""
    command = sys.argv[1:] if arguments is None else arguments
    options, data_arguments = parse_arguments(EXPORT_ARGUMENTS, command, __doc__)

    # Late: `--help` and a wrong flag do not wait for torch
    from transformers.utils import logging

    from mmser.export import export_checkpoint
    from mmser.results import next_steps
    from mmser.vocabulary import read_texts

    logging.set_verbosity_warning()
    texts = None
    if options.vocabulary_text is not None:  # now: a wrong name is told before the model is loaded
        texts = list(read_texts(options.vocabulary_text, data_arguments.common_columns.text))
    change = None
    if options.prune or options.prune_layers:
        from mmser.pruning_run import pruner  # it reads data, which no other export needs

        change = pruner(options, data_arguments)
    elif data_arguments.name:
        raise ValueError(f"Only pruning reads {data_arguments.name}: add --prune or --prune_layers, or leave it out.")
    report = export_checkpoint(
        options.model_name_or_path,
        options.output_dir,
        formats=options.format,
        dtype=options.dtype,
        languages=options.languages,
        texts=texts,
        vocabulary_size=options.vocabulary_size,
        change=change,
        check=options.check,
        tolerance=options.tolerance,
        opset=options.opset,
        overwrite=options.overwrite_output_dir,
    )
    data = data_arguments.flags if data_arguments.name else ("--data_dir", "DATA")
    steps = "\n".join(next_steps(report.folder, data))
    print(f"{report}\nThe export is in {report.folder}\n\nWhat comes next\n{steps}")
    return report


def command() -> None:
    """The installed command `mmser-export`."""
    run_command(main)


if __name__ == "__main__":
    command()
