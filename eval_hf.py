# SPDX-License-Identifier: Apache-2.0
# /// script
# dependencies = [
#     "accelerate", "datasets", "evaluate", "matplotlib", "scikit-learn", "scipy", "soundfile", "soxr", "torch",
#     "transformers>=5.23",
# ]
# ///
"""Judge an MMSER checkpoint: is it right, does its score mean what it says, does it know what it does not know.

python eval_hf.py --checkpoint runs/mine --data_dir my_data
python eval_hf.py --checkpoint runs/mine --data_dir my_data --ood_dir my_data/ood noise --calibrate --tta 1 5 10
python eval_hf.py --checkpoint me/model --dataset_name me/my_data --group_by language sex duration
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

from transformers import set_seed

from mmser.arguments import EVALUATION_ARGUMENTS, parse_arguments
from mmser.console import set_up_logging
from mmser.evaluation_run import (
    calibrate,
    check_clips,
    describe_evaluation,
    group_clips,
    load_clips,
    load_label_names,
    load_trainer,
    make_training_arguments,
    measure,
    store_calibration,
    try_augmentation,
)
from mmser.examples import EmotionDataset
from mmser.plots import check_matplotlib
from mmser.report import console_summary, draw, judge, write_report
from mmser.trainer import leave_process_group
from modeling_mmser import register_auto_classes
from processing_mmser import MMSERProcessor


def main(arguments: list[str] | None = None) -> dict:
    """Evaluate as the flags say. Returns what is written to `report.json`."""
    command = sys.argv[1:] if arguments is None else arguments
    options, source = parse_arguments(EVALUATION_ARGUMENTS, command, __doc__)
    training_arguments = make_training_arguments(options)
    set_up_logging(training_arguments)
    set_seed(options.seed)
    check_matplotlib()

    register_auto_classes()  # the code of MMSER is here: the code that the checkpoint carries is not run
    label_names = load_label_names(options.model_name_or_path)
    clips = load_clips(source, options, label_names)
    processor = MMSERProcessor.from_pretrained(options.model_name_or_path)
    reading = {"sampling_rate": processor.feature_extractor.sampling_rate, "max_seconds": source.max_seconds}
    clips = check_clips(clips, source.on_bad_example, **reading)
    make_dataset: Any = partial(EmotionDataset, seed=options.seed, **reading)
    groups = group_clips(make_dataset(clips.evaluated), options.group_by)

    trainer = load_trainer(options.model_name_or_path, processor, training_arguments)

    fitted = calibrate(trainer, clips, make_dataset, options)
    measured = measure(trainer, clips, make_dataset, groups, label_names)
    augmented = try_augmentation(trainer, make_dataset(clips.evaluated), options, label_names)
    if fitted is not None and trainer.is_world_process_zero():  # not before everything has worked with it
        fitted["stored_in"] = str(store_calibration(trainer.model, processor, options))

    report = {
        **describe_evaluation(clips, source, options, command, training_arguments.device),
        **judge(measured, options.bootstrap_samples),
        "fitted_calibration": fitted,
        "test_time_augmentation": augmented,
    }
    if trainer.is_world_process_zero():
        plots = draw(measured, report, Path(options.output_dir) / "plots")
        path = write_report(report, plots, options.output_dir)
        print(f"{console_summary(report)}\n\nThe report with its plots: {path}")
    return report


def command() -> None:
    """`mmser-eval`."""
    main()
    leave_process_group()


if __name__ == "__main__":
    command()
