# SPDX-License-Identifier: Apache-2.0
"""Do prediction sets hold the right label as often as is asked for, on speakers that they never heard?

    python benchmarks/prediction_sets.py --checkpoint runs/mine --data_dir ser4

Calibrated on the validation split and judged on the test split, whose corpora differ; and on draws of half the
speakers of both, judged on the other half: there new speakers are like the held-out ones. Neither was trained on.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.tables import Row, parse_arguments, publish, read_results, table
from conformal_mmser import PredictionSets
from mmser.arguments import EvaluationArguments
from mmser.calibration import fit_temperature
from mmser.evaluation_run import load_processor, load_trainer, make_training_arguments
from mmser.examples import EmotionDataset, reading_options
from mmser.groups import speakers_of
from mmser.loading import load_emotion_dataset
from mmser.metrics import softmax
from mmser.model_loading import load_label_names
from mmser.results import environment
from mmser.scores import describe_sets
from modeling_mmser import register_auto_classes

Outputs = dict[str, np.ndarray]  # `logits` before the temperature [N, C], `labels` [N], `speakers` [N]
SHOWN = {"covered": "covered", "mean_set_size": "labels in a set", "one_label": "sets of one label"}


def predict(checkpoint: str, data_dir: str, output_dir: Path) -> dict[str, Outputs]:
    """What the model says of the clips of the validation and the test split."""
    register_auto_classes()
    processor = load_processor(checkpoint)
    arguments = EvaluationArguments(checkpoint, output_dir=str(output_dir), per_device_eval_batch_size=16)
    trainer = load_trainer(checkpoint, processor, make_training_arguments(arguments))
    splits, _ = load_emotion_dataset(data_dir, label_names=load_label_names(checkpoint), for_training=False)
    make_dataset: Any = partial(EmotionDataset, **reading_options(processor.modalities, processor.sampling_rate))
    found = {}
    for name in ("validation", "test"):
        dataset = make_dataset(splits[name])
        outputs = trainer.predict_outputs(dataset)
        logits = outputs["logits"].astype(np.float64) * trainer.model.temperature.item()
        found[name] = {"logits": logits, "labels": outputs["labels"], "speakers": np.array(speakers_of(dataset))}
    return found


def take(outputs: Outputs, rows: np.ndarray) -> Outputs:
    return {name: values[rows] for name, values in outputs.items()}


def judge(held_out: Outputs, new: Outputs) -> dict[str, dict[str, Any]]:
    """Calibrate on clips as `MMSERTrainer.calibrate` does, and describe the sets of new ones; and the same as if the
    clips of a speaker were independent."""
    logits, labels, speakers = held_out["logits"], held_out["labels"], held_out["speakers"].tolist()
    temperature = fit_temperature(logits, labels, speakers)
    described = {}
    for units, names in (("speakers", speakers), ("clips", None)):
        sets = PredictionSets()
        sets.fit(softmax(logits / temperature), labels, names)
        described[units] = describe_sets({"logits": new["logits"] / temperature, "labels": new["labels"]}, sets)
    return described


def draw(outputs: Outputs, draws: int) -> list[Row]:
    """Sets calibrated on half the speakers, for the clips of the others."""
    rng, lines = np.random.default_rng(0), []
    speakers = np.unique(outputs["speakers"])
    for number in range(draws):
        is_held_out = np.isin(outputs["speakers"], rng.permutation(speakers)[: len(speakers) // 2])
        for units, described in judge(take(outputs, is_held_out), take(outputs, ~is_held_out)).items():
            for asked, row in described.items():
                lines.append({"draw": number, "units": units, "asked for": asked, **{key: row[key] for key in SHOWN}})
    return lines


def make_tables(report: dict[str, Any], lines: Sequence[Row]) -> dict[str, str]:
    rows = []
    for units, described in report["validation to test"].items():
        for asked, row in described.items():
            cells = {name: f"{row[key]:.3f}" for key, name in SHOWN.items()}
            rows.append({"from, to": "validation, test", "units": units, "asked for": asked, **cells})
    for units, described in report["validation to test"].items():
        for asked in described:
            own = [line for line in lines if (line["units"], line["asked for"]) == (units, asked)]
            spread = {name: np.array([line[key] for line in own]) for key, name in SHOWN.items()}
            cells = {name: f"{values.mean():.3f} ± {values.std(ddof=1):.3f}" for name, values in spread.items()}
            rows.append({"from, to": "halves of the speakers", "units": units, "asked for": asked, **cells})
    return {"prediction_sets": table(rows)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Coverage and size of prediction sets on speakers never heard.")
    parser.add_argument("--checkpoint", help="trained on the training split of --data_dir")
    parser.add_argument("--data_dir", help="clips with speakers")
    parser.add_argument("--draws", type=int, default=100, help="random halves of the speakers")
    options = parse_arguments(parser, "prediction_sets", arguments, ("checkpoint", "data_dir"))
    if options.from_results:
        report, lines = read_results(options.output)
    else:
        clips = predict(options.checkpoint, options.data_dir, options.output.parent)
        both = {name: np.concatenate([clips["validation"][name], clips["test"][name]]) for name in clips["test"]}
        lines = draw(both, options.draws)
        report = {
            "clips": {name: len(own["labels"]) for name, own in clips.items()},
            "speakers": {name: len(set(own["speakers"].tolist())) for name, own in clips.items()},
            "accuracy": {
                name: float((own["logits"].argmax(axis=1) == own["labels"]).mean()) for name, own in clips.items()
            },
            "validation to test": judge(clips["validation"], clips["test"]),
            "draws": options.draws,
            "environment": environment(),
        }
    publish(make_tables(report, lines), report, lines, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
