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
accelerate launch train_hf.py --dataset_name me/my_data --use_amp --push_to_hub
"""

import sys

from transformers import set_seed

from mmser.arguments import TRAINING_ARGUMENTS, parse_arguments
from mmser.console import set_up_logging
from mmser.model_loading import limit_tokens, load_model, load_processor, load_teacher
from mmser.trainer import leave_process_group
from mmser.training_run import (
    Examples,
    data_seed,
    describe_run,
    evaluate,
    find_checkpoint,
    leave_out_unreadable,
    load_data,
    make_trainer,
    train,
    write_results,
)


def main(arguments: list[str] | None = None) -> dict:
    """Train, evaluate and save as the flags say. Returns what is written to `eval_results.json`."""
    command = sys.argv[1:] if arguments is None else arguments
    model_arguments, data_arguments, training_arguments = parse_arguments(TRAINING_ARGUMENTS, command, __doc__)
    set_up_logging(training_arguments)
    set_seed(training_arguments.seed)
    resumed = find_checkpoint(training_arguments)

    data = load_data(data_arguments, data_seed(training_arguments))
    processor = load_processor(model_arguments)
    leave_out_unreadable(data, data_arguments, processor.feature_extractor.sampling_rate)

    model = load_model(model_arguments, data.label_names, processor)
    teacher = load_teacher(model_arguments, data_arguments)
    limit_tokens(processor, model)

    examples = Examples(data_arguments, training_arguments, model, processor)
    trainer = make_trainer(model, teacher, processor, data, examples, training_arguments)
    results = describe_run(trainer, data, model_arguments, data_arguments)
    has_pretrained_audio = not (model_arguments.model_name_or_path or model_arguments.random_audio_encoder)
    standardize_clips = data_arguments.standardize_clips if has_pretrained_audio else 0
    results |= train(trainer, data, examples, standardize_clips, resumed)
    results |= evaluate(trainer, data, examples)

    if trainer.is_world_process_zero():
        token = training_arguments.hub_token  # what is written here is for everyone to read
        command = [argument.replace(token, "...") if token else argument for argument in command]
        folder, device = training_arguments.output_dir, training_arguments.device
        print(write_results(results, folder, ["train_hf.py", *command], device))
    if training_arguments.push_to_hub:
        trainer.push_to_hub()
    return results


def command() -> None:
    """`mmser-train`."""
    main()
    leave_process_group()


if __name__ == "__main__":
    command()
