# SPDX-License-Identifier: Apache-2.0
# /// script
# dependencies = [
#     "accelerate", "datasets", "evaluate", "scikit-learn", "scipy", "soundfile", "soxr", "torch",
#     "transformers>=5.23",
# ]
# ///
"""Fine-tune MMSER on emotional speech, evaluate it and save a checkpoint that explains itself.

python train_hf.py --data_dir my_data --output_dir runs/mine --epochs 10
python train_hf.py recipes/demo.json --learning_rate 5e-4      # flags win over the recipe
python train_hf.py --adapt --model_name_or_path runs/mine --data_dir few_clips --output_dir runs/adapted
accelerate launch train_hf.py --dataset_name me/my_data --use_amp --push_to_hub
"""

import sys
from typing import Any

from mmser.arguments import TRAINING_ARGUMENTS, parse_arguments
from mmser.console import run_command, set_up_logging


def main(arguments: list[str] | None = None) -> dict:
    """Train, evaluate and save as the flags say. Returns what is written to `eval_results.json`."""
    command = sys.argv[1:] if arguments is None else arguments
    model_arguments, data_arguments, training_arguments = parse_arguments(TRAINING_ARGUMENTS, command, __doc__)

    # Late: `--help` and a wrong flag do not wait for torch
    from mmser import run_identity, search

    set_up_logging(training_arguments)
    with run_identity.lock_output_dir(training_arguments):
        if training_arguments.hp_search:
            return search.search_with_data(command, model_arguments, data_arguments, training_arguments, main)
        return run(command, model_arguments, data_arguments, training_arguments)


def run(command: list[str], model_arguments: Any, data_arguments: Any, training_arguments: Any) -> dict:
    """One training, whose folder is locked. `command`: the words of its command line. Returns: as `main`."""
    from transformers import set_seed

    from mmser import adaptation, model_loading, publishing, run_identity, training_run

    set_seed(training_arguments.seed)
    training_run.warn_of_moot_settings(model_arguments, data_arguments)
    resumed = training_run.find_checkpoint(training_arguments)
    adapt, checkpoint = training_arguments.adapt, model_arguments.model_name_or_path
    if adapt:
        adaptation.check_arguments(model_arguments, data_arguments)

    seed = training_run.data_seed(training_arguments)
    if training_arguments.process_index == 0:
        data_arguments.bad_rows.list_in(training_arguments.output_dir)
    data = training_run.load_data(data_arguments, seed, checkpoint, learns_tasks=not adapt)
    processor = model_loading.load_processor(model_arguments)
    training_run.leave_out_unreadable(data, data_arguments, processor)
    if adapt:
        adaptation.take_all_clips(data.splits, data.label_names, checkpoint)

    model = model_loading.load_model(model_arguments, data.label_names, processor, data.auxiliary, allow_int8=adapt)
    if adapt:
        training_arguments.adapt_layers = adaptation.choose_layers(model, training_arguments)
        adaptation.freeze_all_else(model, training_arguments.adapt_layers)
    teacher = model_loading.load_teacher(model_arguments, model, processor)
    identity = run_identity.describe_identity(
        data.splits, data.label_names, model, teacher, processor, model_arguments, data_arguments, training_arguments
    )
    identity["division"] = data.division
    run_identity.check_output_dir(training_arguments, identity, resumed.folder if resumed else None)
    if (finished := training_run.finish_earlier(training_arguments, identity, data_arguments.flags)) is not None:
        return finished
    model_loading.limit_tokens(processor, model)
    examples = training_run.Examples(data_arguments, training_arguments, model, processor, teacher)
    trainer = training_run.make_trainer(model, teacher, processor, data, examples, training_arguments)
    run_identity.claim_output_dir(training_arguments, identity)
    data_arguments.bad_rows.write()
    results = training_run.describe_run(trainer, data, model_arguments, data_arguments)
    has_pretrained_audio = not (model_arguments.model_name_or_path or model_arguments.random_audio_encoder)
    standardize_clips = data_arguments.standardize_clips if has_pretrained_audio else 0
    results |= training_run.train(trainer, data, examples, standardize_clips, resumed)
    results |= training_run.evaluate(trainer, data, examples)

    if trainer.is_world_process_zero():
        token = training_arguments.hub_token  # what is written here is for everyone to read
        command = [argument.replace(token, "...") if token else argument for argument in command]
        folder, device, source = training_arguments.output_dir, training_arguments.device, data_arguments.flags
        print(training_run.write_results(results, folder, ["train_hf.py", *command], device, source))
    if training_arguments.push_to_hub:
        publishing.publish_run(trainer)
    return results


def command() -> None:
    """`mmser-train`."""
    run_command(main)


if __name__ == "__main__":
    command()
