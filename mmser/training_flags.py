# SPDX-License-Identifier: Apache-2.0
"""`TrainingFlags`: the flags of training besides those of Transformers' Trainer, without an import of torch."""

from dataclasses import dataclass, field

from mmser.optimizer import PARAMETER_GROUPS

# Without a number of epochs. On 200 clips of acted speech, head and linear probe had a weighted F1
# of 0.50 and 0.54 after 105 steps, 0.59 and 0.58 after 420, 0.64 and 0.63 after 910
MIN_EPOCHS, MAX_EPOCHS, MIN_STEPS = 10, 150, 880
CLASSIFIER, OUTPUT = "classifier", "output"  # of `adapt_layers`


@dataclass
class TrainingFlags:
    """The flags of training that are ours or whose default is; `MMSERTrainingArguments` adds those of the Trainer."""

    _argument_group_name = "Training; the flags of Transformers' Trainer come last"

    output_dir: str = field(
        default="runs/mmser",
        metadata={"aliases": ["--save_dir"], "help": "Folder for the checkpoints and the results."},
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Delete the run that --output_dir holds, its checkpoints and its results, and start anew."},
    )
    hp_search: int = field(
        default=0,
        metadata={
            "help": "Train that many times with other learning rates, weight decays, batch sizes and dropouts, and "
            "say which are best on the validation clips; needs the extra `search`."
        },
    )
    adapt: bool = field(
        default=False,
        metadata={
            "help": "Fit --model_name_or_path to a few clips of new recordings, such as 20 of each class, in half a "
            "minute: its classifier and its calibration, on all training and validation clips."
        },
    )
    adapt_layers: str | None = field(
        default=None,
        metadata={
            "choices": [CLASSIFIER, OUTPUT],
            "help": "What --adapt fits. Default: the whole classifier; the output layer alone of a checkpoint that is "
            "in int8 or also answers other tasks.",
        },
    )
    adapt_strength: float | None = field(
        default=None,
        metadata={
            "help": "How far --adapt may move the logits where it fits the output layer alone, which this flag asks "
            "for too: the deviation of a Gaussian prior. Default: 2."
        },
    )
    adapt_rehearsal: float = field(
        default=1.0,
        metadata={
            "help": "How much the checkpoint's own answers to what it was trained on count in --adapt, as a share of "
            "the clips; 0: forget them."
        },
    )
    num_train_epochs: float | None = field(
        default=None,
        metadata={
            "aliases": ["--epochs"],
            "help": f"Passes over the data. Default: {MIN_EPOCHS}, and for few clips as many as make {MIN_STEPS} "
            f"steps, {MAX_EPOCHS} at most.",
        },
    )
    per_device_train_batch_size: int = field(
        default=16, metadata={"aliases": ["--batch_size"], "help": "Clips per device and training step."}
    )
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Clips per device in evaluation."})
    learning_rate: float = field(
        default=1e-4, metadata={"aliases": ["--lr"], "help": "Peak learning rate; each parameter group multiplies it."}
    )
    lr_multipliers: dict | str | None = field(
        default=None,
        metadata={
            "help": "JSON: learning rate multipliers that differ from the published ones, e.g. "
            f"'{{\"audio_encoder\": 1}}'. Groups: {', '.join(PARAMETER_GROUPS)}."
        },
    )
    weight_decay: float | None = field(  # None: the published one of each group
        default=None, metadata={"help": "One weight decay for all groups instead of the published one for each."}
    )
    use_amp: bool = field(
        default=False,
        metadata={
            "help": "Mixed precision: bf16 where the device has it, else fp16, on a processor else none. `--bf16` and "
            "`--fp16` choose one."
        },
    )
    weight_averaging: float = field(
        default=0.0,
        metadata={
            "help": "Decay per step of an exponential average of the trained weights, such as 0.99; it is what is "
            "evaluated and saved. 0: no average."
        },
    )
    adversarial: str = field(
        default="none",
        metadata={
            "choices": ["none", "fgm", "vat"],
            "help": "Train also on encoder states with what harms most added: fgm, along the gradient of the loss, or "
            "vat, where the prediction changes most.",
        },
    )
    adversarial_epsilon: float = field(
        default=0.1, metadata={"help": "Length of what is added, as a share of the length of a clip's states."}
    )
    adversarial_weight: float = field(default=1.0, metadata={"help": "Weight of the loss on what is added to."})
    adversarial_head: str = field(
        default="none",
        metadata={
            "choices": ["none", "corpus", "speaker"],
            "help": "Hide from the features which corpus or speaker a clip is from: a head learns to tell, behind a "
            "reversed gradient. It is not part of the model.",
        },
    )
    adversarial_head_weight: float = field(
        default=0.1, metadata={"help": "Strength of the reversed gradient at the end of training; it starts at 0."}
    )
    contrastive_memory: int = field(
        default=0,
        metadata={
            "help": "Clips of earlier steps that the supervised contrastive loss compares with, besides those of the "
            "same step on all processes."
        },
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule after the warm-up."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Warm-up steps; below 1: the share of all steps."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps or epoch."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save: no, steps, epoch or best."})
    save_total_limit: int | None = field(
        default=2, metadata={"help": "Checkpoints to keep (the best one is kept too)."}
    )
    load_best_model_at_end: bool = field(default=True, metadata={"help": "Go back to the best checkpoint at the end."})
    metric_for_best_model: str | None = field(
        default="weighted_f1", metadata={"help": "What makes a checkpoint best."}
    )
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={"help": "group_by_length (clips of similar length in a batch, less padding), random or sequential."},
    )
    sampling_temperature: float | None = field(
        default=None,
        metadata={
            "help": "Draw the training clips by temperature over the classes of each corpus: 1 takes each once, a "
            "large number makes all classes of all corpora equally frequent. Default: each once."
        },
    )
    dataloader_num_workers: int = field(default=2, metadata={"help": "Processes that decode and augment."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two lines of the log."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay off: clips are raw audio."})
