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

from mmser.arguments import EVALUATION_ARGUMENTS, parse_arguments
from mmser.console import run_command, set_up_logging


def main(arguments: list[str] | None = None) -> dict:
    """Evaluate as the flags say. Returns what is written to `report.json`."""
    command = sys.argv[1:] if arguments is None else arguments
    options, source = parse_arguments(EVALUATION_ARGUMENTS, command, __doc__)

    # Late: `--help` and a wrong flag do not wait for torch
    from transformers import set_seed

    from mmser import evaluation_run, model_loading, report
    from mmser.examples import EmotionDataset, reading_options
    from mmser.files import check_writable
    from mmser.plots import check_matplotlib
    from modeling_mmser import register_auto_classes

    training_arguments = evaluation_run.make_training_arguments(options)
    set_up_logging(training_arguments)
    set_seed(options.seed)
    check_matplotlib()

    register_auto_classes()  # the code of MMSER is here: the code that the checkpoint carries is not run
    config = model_loading.load_config(options.model_name_or_path)
    label_names = model_loading.label_names_of(config)
    if training_arguments.process_index == 0:
        check_writable(Path(str(options.output_dir)))
        source.bad_rows.list_in(str(options.output_dir))
    clips = evaluation_run.load_clips(source, options, label_names, config)
    processor = evaluation_run.load_processor(options.model_name_or_path)
    reading = {"max_seconds": source.max_seconds, **reading_options(processor.modalities, processor.sampling_rate)}
    clips = evaluation_run.check_clips(clips, source.bad_rows, **reading)
    source.bad_rows.write()
    make_dataset: Any = partial(EmotionDataset, seed=options.seed, **reading)
    groups = evaluation_run.group_clips(make_dataset(clips.evaluated), options.group_by)

    trainer = evaluation_run.load_trainer(options.model_name_or_path, processor, training_arguments)

    fitted = evaluation_run.calibrate(trainer, clips, make_dataset, options)
    measured = evaluation_run.measure(trainer, clips, make_dataset, groups, label_names)
    measured.baselines = evaluation_run.try_log_mel_probe(clips, make_dataset, options)
    augmented = evaluation_run.try_augmentation(trainer, make_dataset(clips.evaluated), options, label_names)
    if fitted is not None and trainer.is_world_process_zero():  # not before everything has worked with it
        folder = evaluation_run.store_calibration(trainer.model, processor, options, fitted["changed"])
        fitted["stored_in"] = str(folder)

    judged = {
        **evaluation_run.describe_evaluation(clips, source, options, command, training_arguments.device),
        **report.judge(measured, options.bootstrap_samples),
        "fitted_calibration": fitted,
        "test_time_augmentation": augmented,
    }
    if trainer.is_world_process_zero():
        path = report.write_with_plots(measured, judged, options.output_dir)
        print(f"{report.console_summary(judged)}\n\nThe report with its plots: {path}")
    return judged


def command() -> None:
    """`mmser-eval`."""
    run_command(main)


if __name__ == "__main__":
    command()
