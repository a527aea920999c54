# SPDX-License-Identifier: Apache-2.0
# /// script
# dependencies = ["onnx", "onnxruntime", "onnxscript", "scipy", "soundfile", "soxr", "torch", "transformers>=5.20"]
# ///
"""Make an MMSER checkpoint portable (ONNX), small (int8, float16, fewer languages), or both.

python export_hf.py --checkpoint runs/mine --output_dir runs/onnx
python export_hf.py --checkpoint runs/mine --output_dir runs/small --dtype int8 --vocabulary_text my_data/train.csv
python export_hf.py --checkpoint me/model --output_dir runs/half --format safetensors --dtype float16 --languages de en
"""

from dataclasses import dataclass, field

from transformers import HfArgumentParser
from transformers.utils import logging

from export_mmser import DTYPES, FORMATS, OPSET, ExportReport, export_checkpoint
from vocabulary_mmser import read_texts


@dataclass
class ExportArguments:
    """What to export, and how."""

    model_name_or_path: str = field(
        metadata={"aliases": ["--checkpoint"], "help": "MMSER checkpoint: folder or Hub name."}
    )
    output_dir: str = field(metadata={"aliases": ["--save_dir"], "help": "Folder to write."})
    format: list[str] = field(
        default_factory=lambda: ["onnx"],
        metadata={"help": f"One or more of {', '.join(FORMATS)}: for onnxruntime, for PyTorch."},
    )
    dtype: str = field(
        default="float32",
        metadata={"choices": list(DTYPES), "help": "Of the weights. float16 is for GPUs, int8 for ONNX alone."},
    )
    languages: list[str] | None = field(
        default=None,
        metadata={
            "help": "Keep the tokens that the scripts of these languages need (ISO 639-1 codes). Languages of one "
            "script are not told apart: give texts for that."
        },
    )
    vocabulary_text: list[str] | None = field(
        default=None,
        metadata={
            "help": "Keep the tokens of the texts in these files (.txt, or .csv, .tsv, .jsonl with a column "
            "transcription or text), and single characters for all other words."
        },
    )
    check: bool = field(
        default=True, metadata={"help": "Compare the export with PyTorch, and write nothing if they differ."}
    )
    tolerance: float | None = field(
        default=None,
        metadata={"help": "Largest difference of a probability to let through. Default: depends on --dtype."},
    )
    opset: int = field(default=OPSET, metadata={"help": "Version of the ONNX operators."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace what is in --output_dir."})


def main(arguments: list[str] | None = None) -> ExportReport:
    """Export as the flags say, and print sizes and differences. Returns what is printed."""
    (options,) = HfArgumentParser(ExportArguments, description=__doc__).parse_args_into_dataclasses(arguments)
    logging.set_verbosity_warning()
    report = export_checkpoint(
        options.model_name_or_path,
        options.output_dir,
        formats=options.format,
        dtype=options.dtype,
        languages=options.languages,
        texts=None if options.vocabulary_text is None else read_texts(options.vocabulary_text),
        check=options.check,
        tolerance=options.tolerance,
        opset=options.opset,
        overwrite=options.overwrite_output_dir,
    )
    print(f"{report}\nThe export is in {report.folder}")
    return report


def command() -> None:
    """`mmser-export`."""
    main()


if __name__ == "__main__":
    command()
