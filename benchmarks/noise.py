# SPDX-License-Identifier: Apache-2.0
"""What keeps a model right in noise and in a room: augmentation, FGM, VAT, or features that hide where a clip is from?

    python benchmarks/noise.py --data_dir ser4 --audio_encoder openai/whisper-base \\
        --text_encoder intfloat/multilingual-e5-small --cache_encoder_states runs/encoder_states --work_dir runs/noise

The same clips are changed once for each condition (`noisy_speech.py`) and encoded once; all models hear the same
states, those of `recipes/real_speech.json`. Models and trainings are those of `pooled_states.py`: audio alone behind a
frozen encoder, each clip as two frames, which the adversaries add to.
"""

import argparse
import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import torch
from transformers import get_cosine_schedule_with_warmup

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.noisy_speech import CONDITIONS, choose_clips, write_noisy_split
from benchmarks.pooled_states import (
    EPOCHS,
    LR_MULTIPLIERS,
    WEIGHT_DECAY,
    Batches,
    Clips,
    batch,
    build,
    predict,
    two_frames,
)
from benchmarks.tables import (
    ROOT,
    BySeed,
    Row,
    cell,
    difference,
    parse_arguments,
    publish,
    read_csv,
    read_results,
    table,
    write_csv,
)
from configuration_mmser import DEFAULT_LABELS
from mmser import model_loading, training_run
from mmser.adversarial import DomainHead, StatePerturbation, reversal_strength
from mmser.arguments import TRAINING_ARGUMENTS
from mmser.arguments import parse_arguments as parse_training_arguments
from mmser.loading import load_emotion_split
from mmser.metrics import compute_classification_metrics
from mmser.optimizer import parameter_groups
from mmser.results import environment
from mmser.splits import speaker_key
from modeling_mmser import MMSERForAudioClassification

NUM_CLIPS = 300  # that are measured in each condition
CHOSEN_BY = ("5 dB",)  # conditions of the validation clips
# To be done in minutes on a processor: no residual blocks, and half as many steps as in `pooled_states.py`
FIELDS = {"classifier_num_layers": 0}
BATCH_SIZE, LEARNING_RATE = 128, 1e-3
COPIES = 4  # augmented ones of each training clip, as `--augmented_copies`


@dataclasses.dataclass(frozen=True)
class Variant:
    """How a model is trained; the fields but `augment` are those of `MMSERTrainingArguments`."""

    augment: bool = False
    adversarial: str = "none"
    adversarial_epsilon: float = 0.1
    adversarial_weight: float = 1.0
    adversarial_head: str = "none"
    adversarial_head_weight: float = 0.1


PLAIN = "plain"
VARIANTS = {
    PLAIN: Variant(),
    "augmentation": Variant(augment=True),
    "FGM 0.3": Variant(adversarial="fgm", adversarial_epsilon=0.3),
    "FGM 1.0": Variant(adversarial="fgm", adversarial_epsilon=1.0),
    "VAT 0.3": Variant(adversarial="vat", adversarial_epsilon=0.3),
    "corpus head 0.1": Variant(adversarial_head="corpus"),
    "speaker head 0.1": Variant(adversarial_head="speaker"),
    "augmentation, FGM 0.3": Variant(augment=True, adversarial="fgm", adversarial_epsilon=0.3),
}


# ---- clips


def pooled(examples: Any, split: datasets.Dataset) -> Clips:
    """The clips of a data set of cached states."""
    states = [torch.from_numpy(examples[row]["audio_states"]) for row in range(len(split))]
    corpora = np.array(split["corpus"])
    speakers = [speaker_key(speaker, corpus) for speaker, corpus in zip(split["speaker"], corpora, strict=True)]
    return two_frames(Clips(states, torch.tensor(split["labels"]), corpora, np.array(speakers)))


def encode(options: argparse.Namespace) -> dict[str, Clips]:
    """
    "train", its augmented copies "copy 0", ..., "validation" and "test", and, as "validation: 5 dB" and so on, some
    clips of the latter two in each of the conditions.
    """
    file = options.work_dir / "clips.npz"
    if file.is_file():
        return read_clips(file)
    flags = [str(ROOT / "recipes" / "real_speech.json"), "--data_dir", options.data_dir, "--disable_tqdm", "True"]
    flags += ["--audio_model_name_or_path", options.audio_encoder, "--text_model_name_or_path", options.text_encoder]
    flags += ["--cache_encoder_states", options.cache_encoder_states, "--output_dir", str(options.work_dir / "unused")]
    models, arguments, training = parse_training_arguments(TRAINING_ARGUMENTS, flags)
    data = training_run.load_data(arguments, training.seed)
    processor = model_loading.load_processor(models)
    model = model_loading.load_model(models, data.label_names, processor)
    model_loading.limit_tokens(processor, model)
    examples = training_run.Examples(arguments, training, model, processor)
    clips = {name: pooled(examples.for_evaluation(split), split) for name, split in data.splits.items()}
    copies = examples.for_training(data.splits["train"])
    for copy in range(COPIES):
        copies.set_epoch(copy)
        clips[f"copy {copy}"] = pooled(copies, data.splits["train"])
    voices = choose_clips(data.splits["train"], len(data.splits["train"]))
    wanted = {"validation": (len(data.splits["validation"]), CHOSEN_BY), "test": (NUM_CLIPS, CONDITIONS)}
    for name, (number, conditions) in wanted.items():
        chosen = choose_clips(data.splits[name], number)
        for condition in conditions:
            folder = write_noisy_split(options.work_dir / name, condition, chosen, voices, data.label_names)
            split = load_emotion_split(folder, label_names=data.label_names, allow_unknown=False)
            clips[f"{name}: {condition}"] = pooled(examples.for_evaluation(split), split)
    arrays = {}
    for name, part in clips.items():
        arrays[f"{name}/states"] = torch.stack(part.states).numpy()
        arrays[f"{name}/labels"] = part.labels.numpy()
        arrays |= {f"{name}/corpora": part.corpora, f"{name}/speakers": part.speakers}
    np.savez(file, **cast(Any, arrays))
    return clips


def read_clips(file: Path) -> dict[str, Clips]:
    arrays = np.load(file)
    clips = {}
    for name in dict.fromkeys(key.rsplit("/", 1)[0] for key in arrays):
        states, labels, corpora, speakers = (arrays[f"{name}/{own.name}"] for own in dataclasses.fields(Clips))
        clips[name] = Clips(list(torch.from_numpy(states)), torch.from_numpy(labels), corpora, speakers)
    return clips


# ---- trainings


def backward_of(model: MMSERForAudioClassification, variant: Variant, head: DomainHead | None) -> Callable[..., None]:
    """What computes the gradients of a batch, as `MMSERTrainer` does."""
    adversary = None
    if variant.adversarial != "none":
        adversary = StatePerturbation(model.mmser, variant.adversarial, variant.adversarial_epsilon)

    def backward(inputs: Mapping[str, torch.Tensor], domains: torch.Tensor, progress: float) -> None:
        def step() -> torch.Tensor:
            output = model(**inputs)
            loss = output.loss
            if adversary is not None:
                loss = adversary.loss(loss, output.logits)
                loss = loss * (variant.adversarial_weight if adversary.is_attacking else 1)
            if head is not None and not (adversary is not None and adversary.is_attacking):
                strength = variant.adversarial_head_weight * reversal_strength(progress)
                loss = loss + head(output.features, domains, strength)
            loss.backward()
            return loss.detach()

        if adversary is None:
            step()
        else:
            adversary.step(step, contextlib.nullcontext(), lambda: model(**inputs).logits)

    return backward


def train(clips: Mapping[str, Clips], variant: Variant, seed: int) -> MMSERForAudioClassification:
    """A model in eval mode; with augmentation, epochs take turns with the copies."""
    copies = [clips[f"copy {copy}"] for copy in range(COPIES)] if variant.augment else [clips["train"]]
    names = copies[0].corpora if variant.adversarial_head == "corpus" else copies[0].speakers
    values, domains = np.unique(names, return_inverse=True)
    torch.manual_seed(seed)
    model = build(copies[0], FIELDS)
    model.mmser.fit_standardization(Batches(clips["train"]))
    groups = parameter_groups(model, LEARNING_RATE, LR_MULTIPLIERS, WEIGHT_DECAY)
    head = None
    if variant.adversarial_head != "none":
        head = DomainHead(model.config.feature_size, len(values))
        groups.append({"params": list(head.parameters()), "lr": LEARNING_RATE, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, fused=True)
    per_epoch = len(copies[0]) // BATCH_SIZE
    scheduler = get_cosine_schedule_with_warmup(optimizer, EPOCHS * per_epoch // 10, EPOCHS * per_epoch)
    backward = backward_of(model.train(), variant, head)
    for epoch in range(EPOCHS):
        order = torch.randperm(len(copies[0]))[: per_epoch * BATCH_SIZE]
        for number, rows in enumerate(order.split(BATCH_SIZE)):
            own = torch.from_numpy(domains)[rows]
            backward(batch(copies[epoch % len(copies)], rows), own, (epoch + number / per_epoch) / EPOCHS)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return model.eval()


def weighted_f1(model: MMSERForAudioClassification, clips: Clips) -> float:
    answers = predict(model, clips)["logits"].argmax(axis=1)
    return compute_classification_metrics(answers, clips.labels.numpy(), DEFAULT_LABELS)["weighted_f1"]


def measure(clips: Mapping[str, Clips], seeds: int, path: Path) -> list[Row]:
    """
    A line for each seed, variant and condition: weighted F1 on held-out clips as they are, and on the changed ones.
    What `path` has already, from a run that was stopped, is not repeated.
    """
    lines = read_csv(path) if path.is_file() else []
    done = {(line["variant"], line["seed"]) for line in lines}
    heard = [name for name in clips if name.startswith(("validation", "test"))]
    for seed, (name, variant) in itertools.product(range(seeds), VARIANTS.items()):
        if (name, seed) in done:
            continue
        model = train(clips, variant, seed)
        scores = {condition: weighted_f1(model, clips[condition]) for condition in heard}
        own = [
            {"variant": name, "seed": seed, "condition": key, "weighted_f1": score} for key, score in scores.items()
        ]
        lines += own
        write_csv(path, lines)
    return lines


# ---- tables


def by_seed(lines: Sequence[Row], variant: str, condition: str) -> BySeed:
    return {
        line["seed"]: line["weighted_f1"]
        for line in lines
        if (line["variant"], line["condition"]) == (variant, condition)
    }


def make_tables(lines: Sequence[Row]) -> dict[str, str]:
    """Weighted F1 of each variant in each condition, and what it gains at 5 dB over the plain model."""
    conditions = list(dict.fromkeys(line["condition"] for line in lines))
    rows = []
    for variant in dict.fromkeys(line["variant"] for line in lines):
        row: Row = {"trained with": variant}
        row |= {condition: cell(by_seed(lines, variant, condition)) for condition in conditions}
        change = difference(by_seed(lines, variant, "test: 5 dB"), by_seed(lines, PLAIN, "test: 5 dB"))
        rows.append({**row, "5 dB, gain": "" if variant == PLAIN else change})
    return {"noise": table(rows)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data_dir", "audio_encoder", "text_encoder", "cache_encoder_states"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/noise"))
    parser.add_argument("--seeds", type=int, default=3)
    needed = ("data_dir", "audio_encoder", "text_encoder", "cache_encoder_states")
    options = parse_arguments(parser, "noise", arguments, needed)
    if options.from_results:
        report, lines = read_results(options.output)
    else:
        torch.set_num_threads(1)
        clips = encode(options)
        lines = measure(clips, options.seeds, options.work_dir / "noise.csv")
        report = {"environment": environment(), "clips": NUM_CLIPS, "seeds": options.seeds}
    publish(make_tables(lines), report, lines, options)


if __name__ == "__main__":
    main()
