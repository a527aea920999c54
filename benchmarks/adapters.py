# SPDX-License-Identifier: Apache-2.0
"""What a few training steps cost with adapters in the audio encoder, and with that frozen or trained as a whole.

    python benchmarks/adapters.py --data_dir ser4 --checkpoint runs/real_speech

All start from one checkpoint, and the encoders are run live. Each run is a process of its own, for its memory. How
well the adapters recognise emotions is a row of `real_speech.py`.
"""

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import set_seed
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.tables import Row, parse_arguments, publish, read_results, table
from mmser.arguments import TRAINING_ARGUMENTS
from mmser.arguments import parse_arguments as parse_flags
from mmser.batches import MMSERDataCollator
from mmser.examples import EmotionDataset
from mmser.loading import load_emotion_dataset
from mmser.model_loading import load_model, load_processor
from mmser.results import environment
from mmser.trainer import MMSERTrainer
from mmser.training_run import some_clips

VARIANTS = {
    "frozen": ["--freeze_audio"],
    "LoRA, rank 16": ["--lora_rank", "16", "--lora_save", "adapter"],
    "LoRA, rank 4": ["--lora_rank", "4", "--lora_save", "adapter"],
    "all weights": [],
}
COSTS = ("encoder_parameters", "seconds", "peak_gb", "checkpoint_mb")


def measure(variant: str, options: argparse.Namespace) -> Row:
    """One run, in this process."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        fixed = ["--model_name_or_path", str(options.checkpoint), "--output_dir", folder, "--freeze_text"]
        fixed += ["--attn_implementation", "eager", "--use_cpu", "--num_train_epochs", "1", "--save_strategy", "no"]
        fixed += ["--eval_strategy", "no", "--disable_tqdm", "True", "--dataloader_num_workers", "0"]
        model_arguments, _, training_arguments = parse_flags(TRAINING_ARGUMENTS, [*fixed, *VARIANTS[variant]])
        set_seed(0)
        splits, names = load_emotion_dataset(options.data_dir)
        processor = load_processor(model_arguments)
        model = load_model(model_arguments, names, processor)
        clips = some_clips(splits["train"], options.clips)
        trainer = MMSERTrainer(
            model,
            training_arguments,
            train_dataset=EmotionDataset(clips, training=True, text_dropout=0.5),
            data_collator=MMSERDataCollator(processor),
        )
        start = time.process_time()
        trainer.train()
        seconds = time.process_time() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        trainer.save_model(folder)
        size = (Path(folder) / "model.safetensors").stat().st_size / 1e6
    trained = sum(
        each.numel() for each in cast(Any, model.base_model).audio_encoder.parameters() if each.requires_grad
    )
    costs = dict(zip(COSTS, (trained, round(seconds, 1), round(peak, 3), round(size, 1)), strict=True))
    return {"variant": variant, **costs}


def make_table(lines: Sequence[Row]) -> str:
    return table(
        [
            {
                "audio encoder": line["variant"],
                "parameters trained in it": f"{line['encoder_parameters']:,}",
                "processor time, s": f"{line['seconds']:.0f}",
                "peak memory, GB": f"{line['peak_gb']:.2f}",
                "checkpoint, MB": f"{line['checkpoint_mb']:.0f}",
            }
            for line in lines
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path)
    parser.add_argument("--checkpoint", type=Path, help="of recipes/real_speech.json")
    parser.add_argument("--clips", type=int, default=64, help="training clips, from all over the split")
    options = parse_arguments(parser, "adapters", arguments, required=("data_dir", "checkpoint"))
    report: dict[str, Any]
    if options.from_results:
        report, lines = read_results(options.output)
    else:
        lines = []
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            for variant in logging.tqdm(VARIANTS, desc="runs"):
                lines.append(pool.apply(measure, (variant, options)))
        report = {"environment": environment(), "settings": {"clips": options.clips}}
    publish({"adapters": make_table(lines)}, report, lines, options)


if __name__ == "__main__":
    main()
