# SPDX-License-Identifier: Apache-2.0
"""Tests of the model card that a training run writes: every sentence is there if and only if it is true.

`CASES` are checkpoints that differ in all that the card speaks of. `SENTENCES` says when each sentence is true, by the
model and the results alone; a line of the card that is not in this table is an error.
"""

import json
import math
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from tiny import fit_openmax_by_chance, tiny_model
from tiny_corpus import parse_strict_json, tiny_flags, tiny_tokenizer, write_corpus

import train_hf
from mmser import __version__
from mmser.arguments import TRAINING_ARGUMENTS, parse_arguments
from mmser.groups import split_groups
from mmser.model_card import TEMPLATE, is_own_card, write_model_card
from mmser.optimizer import parameter_table
from mmser.results import SHORT_TITLES, describe_data
from mmser.scores import describe_rows
from mmser.training_run import write_results
from modeling_mmser import MMSERForAudioClassification

ROOT = Path(__file__).parents[1]
FOUR = ["neutral", "happy", "sad", "angry"]
SEVEN = ["calm", "joy|glad", "überrascht", "angry: very", "a", "b", "c"]
CALIBRATED = {"temperature": 1.5, "ece_before": 0.25, "ece_after": 0.125}
FEW_ERRORS = {"uses_one_minus_max": True, "errors": 3, "clips": 30, "error_rate_interval": [0.0211, 0.2653]}
ERRORS_SEEN = {"error_auroc_before": 0.5, "error_auroc_after": 0.75}
OPEN_SET = {"openmax": {"clips": 9, "auroc": 0.75, "fpr_at_95_tpr": 0.5, "oscr": 0.625}}


# --- results and checkpoints -----------------------------------------------------------------------------------------


def scores(names, rows=("model", "audio_only", "text_only"), seed=0, **columns):
    """Scores of random outputs for 42 clips, as `mmser.training_run.evaluate` collects them."""
    rng = np.random.default_rng(seed)
    labels = np.arange(42) % len(names)
    outputs = {
        "logits": rng.normal(size=(42, len(names))).astype(np.float32),
        "uncertainty": rng.random(42).astype(np.float32),
        "fused": rng.normal(size=(42, 8)).astype(np.float32),
        "labels": labels,
    }
    groups = split_groups(datasets.Dataset.from_dict({"labels": labels, **columns}))
    return describe_rows({name: {**outputs, "index": np.arange(42)} for name in rows}, list(names), groups, outputs)


def train_table(num_clips, **columns):
    return datasets.Dataset.from_dict({"labels": [0] * num_clips, **columns})


def make_results(model, names=FOUR, **more):
    """Results of a run as `train_hf.main` collects them; `more` replaces parts of them."""
    languages = ["en", "de"] * 21
    rows = scores(names, language=languages, corpus=["x", "y", "z"] * 14)
    return {
        "model_name": "tiny",
        "license": "mit",
        "label_names": list(names),
        "encoders": {"audio": "an audio encoder", "text": "a text encoder"},
        "parameters": parameter_table(model),
        "data": describe_data("folder/corpus", {"train": train_table(42, language=languages)}),
        "training": {"epoch": 2.0, "train_runtime": 7.3, "total_runtime": 61.4, "skipped_clips": 0},
        "calibration": CALIBRATED,
        "validation": rows,
        "test": rows,
        **more,
    }


@torch.no_grad()
def never_trained(model, *modalities):
    """Put back to zero, where they start, the biases that only clips with the modality move."""
    for modality in modalities:
        getattr(model.base_model.fusion, modality).bias.zero_()
        getattr(model.base_model, f"{modality}_pooling").hidden.bias.zero_()
    return model


@dataclass
class Case:
    """A model, the results of its run, and which modalities it was trained with."""

    model: MMSERForAudioClassification
    results: dict
    trained: tuple[str, ...] = ("audio", "text")
    frozen: tuple[str, ...] = ()
    folder: Path = Path()
    card: ModelCard | None = field(default=None, repr=False)

    @property
    def config(self):
        return self.model.config

    @property
    def split(self):
        return "test" if "test" in self.results else "validation"

    @property
    def rows(self):
        return self.results.get(self.split, {})

    @property
    def opens(self):
        """Whether the model says that clips are none of the classes."""
        return self.model.openmax.is_fitted and self.config.use_openmax

    @property
    def judges_errors(self):
        """Whether its uncertainty head learned from errors."""
        return self.config.uncertainty_loss_weight * self.config.uncertainty_error_weight > 0


def everything():
    """The default architecture with all that can be fitted, and all that can be reported."""
    model = tiny_model(classifier_num_layers=35, class_counts=[8, 8, 8, 18])
    fit_openmax_by_chance(model)
    model.openmax.fit_thresholds(np.linspace(0, 1, 200), np.arange(200) % 4, 0.95)
    splits = {
        "train": train_table(42, language=["en", "de"] * 21, speaker=["a", "b"] * 21),
        "test": train_table(2, speaker=["b", "c"]),
    }
    data = describe_data("me/corpus", splits, is_hub=True)
    rows = scores(FOUR, language=["en", "de"] * 21, corpus=["x", "y", "z"] * 14, sex=["f", "m"] * 21)
    training = {"epoch": 1.7, "train_runtime": 7.3, "total_runtime": 61.4, "skipped_clips": 3}
    calibration = CALIBRATED | ERRORS_SEEN
    more = {"data": data, "training": training, "calibration": calibration, "test": rows, "open_set": OPEN_SET}
    return Case(model, make_results(model, **more))


def plain_head():
    """Audio alone, no blocks, no companions, OpenMax not fitted; one split; no error to calibrate by."""
    weights = ("focal", "anchor", "uncertainty", "prototype")
    model = tiny_model(classifier_num_layers=0, **{f"{name}_loss_weight": 0.0 for name in weights})
    never_trained(model, "text").freeze_text_encoder()
    calibration = {"temperature": 1.0, "ece_before": 0.03, "ece_after": 0.03}
    results = make_results(model, validation=scores(FOUR, ["model"]), calibration=calibration)
    del results["test"]
    return Case(model, results, ("audio",))


def log_mel():
    """A frozen log-mel encoder and a frozen text encoder, 7 labels, anchors alone, a stream, no test split."""
    model = tiny_model(
        "whisper",
        num_labels=7,
        classifier_num_layers=1,
        openmax_distance="anchor",
        use_weighted_layer_sum=False,
        **{f"{name}_loss_weight": 0.0 for name in ("focal", "uncertainty", "prototype")},
    )
    model.freeze_audio_encoder()
    model.freeze_text_encoder()
    fit_openmax_by_chance(model)
    data = describe_data("me/corpus", {"train": train_table(3).to_iterable_dataset()}, is_hub=True)
    rows = scores(SEVEN, ["model"])
    calibration = {"temperature": 0.75, "ece_before": 0.25, "ece_after": 0.0625, **FEW_ERRORS}
    results = make_results(model, SEVEN, data=data, validation=rows, calibration=calibration, open_set=OPEN_SET)
    del results["test"]
    return Case(model, results, frozen=("audio", "text"))


def text_alone():
    """Text alone, OpenMax that rejects nothing, an uncertainty head that is not calibrated, nothing held out."""
    model = tiny_model(
        classifier_num_layers=2,
        openmax_threshold=None,
        cross_entropy_loss_weight=0.0,
        supervised_contrastive_loss_weight=0.5,
        distillation_loss_weight=0.25,
        prototypes_per_class=1,
        openmax_centroids_per_class=1,
        class_balanced_beta=0.0,
        class_counts=[1, 2, 3, 4],
    )
    never_trained(model, "audio").freeze_audio_encoder()
    fit_openmax_by_chance(model)
    results = make_results(model, calibration={"temperature": 1.0})
    del results["test"], results["validation"]
    return Case(model, results, ("text",))


def switched_off():
    """OpenMax is fitted but switched off; the uncertainty head is of the published form; a test split alone."""
    model = tiny_model(use_openmax=False, uncertainty_error_weight=0.0, label_smoothing=0.0)
    model.freeze_text_encoder()
    fit_openmax_by_chance(model)
    results = make_results(model, test=scores(FOUR, ["model", "text_only"]), calibration={"temperature": 1.0})
    del results["validation"]
    return Case(model, results, frozen=("text",))


def untrained():
    """A run that ended before a weight moved."""
    model = never_trained(tiny_model(), "audio", "text")
    fit_openmax_by_chance(model)
    model.openmax.fit_thresholds(np.linspace(0, 1, 200), np.arange(200) % 4, 0.95)
    model.config.openmax_acceptance = None
    return Case(model, make_results(model), ())


CASES = {make.__name__: make for make in (everything, plain_head, log_mel, text_alone, switched_off, untrained)}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Each case, saved, with the card that was written beside it."""
    made = {}
    for name, make in CASES.items():
        case = make()
        case.folder = tmp_path_factory.mktemp(name)
        case.model.config.id2label = dict(enumerate(case.results["label_names"]))
        case.model.config.label2id = {label: index for index, label in enumerate(case.results["label_names"])}
        case.model.save_pretrained(case.folder)
        write_results(case.results, case.folder, ["train_hf.py", "--lr", "1"])
        case.card = ModelCard.load(case.folder / "README.md", ignore_metadata_errors=False)
        made[name] = case
    return made


# --- when each sentence is true --------------------------------------------------------------------------------------


def test_another_pooling_and_another_fusion_are_named(tmp_path):
    model = tiny_model(fusion_type="transformer", pooling_type="layer_statistics")
    with torch.no_grad():  # as of a model that was trained with both
        model.base_model.fusion.audio.bias.fill_(0.1)
        model.base_model.fusion.text.bias.fill_(0.1)
    model.save_pretrained(tmp_path)
    write_results(make_results(model), tmp_path, ["train_hf.py", "--lr", "1"])
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert (
        "Audio and text run through one small encoder, are pooled by their mean and the deviation of each audio layer "
        "and joined by attention; either may be missing." in card
    )
    assert "Okabe" not in card and "Arevalo" not in card
    with torch.no_grad():  # never trained with audio: of text there is one layer
        model.base_model.fusion.audio.bias.zero_()
    model.save_pretrained(tmp_path)
    write_results(make_results(model), tmp_path, ["train_hf.py", "--lr", "1"])
    assert "The states are pooled by their mean and deviation." in (tmp_path / "README.md").read_text(encoding="utf-8")


def untrained_sentence(case):
    config = case.config
    weights = {
        "anchors": config.anchor_loss_weight,
        "uncertainty": config.uncertainty_loss_weight,
        "prototypes": config.prototype_loss_weight,
    }
    names = [name for name, weight in weights.items() if weight == 0]
    return f"Not trained in this run, as their loss has weight 0: {', '.join(names)}."


def count(number, noun):
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def labels(case):
    return " / ".join(case.results["label_names"])


Said = str | Callable[[Case], str]
# The sentence, or what makes it of a case; and when it is true
SENTENCES: list[tuple[Said, Callable[[Case], bool]]] = [
    ("A speech emotion recogniser made with MMSER.", lambda case: True),
    (
        lambda case: f"Raw speech, its transcript or both go in; one of {labels(case)} comes out.",
        lambda case: case.trained == ("audio", "text"),
    ),
    (lambda case: f"Raw speech goes in; one of {labels(case)} comes out.", lambda case: case.trained == ("audio",)),
    (lambda case: f"A transcript goes in; one of {labels(case)} comes out.", lambda case: case.trained == ("text",)),
    (
        lambda case: f"It was not trained: its answers, one of {labels(case)}, mean nothing.",
        lambda case: case.trained == (),
    ),
    # Use
    (
        "Audio may have any sampling rate; wav, flac, ogg and mp3 need no ffmpeg.",
        lambda case: "audio" in case.trained,
    ),
    ("It was never trained with transcripts: give it audio alone.", lambda case: case.trained == ("audio",)),
    ("It was never trained with audio: give it transcripts alone.", lambda case: case.trained == ("text",)),
    (
        "`uncertainty` is 1 - the largest score: the held-out clips do not show that anything else tells errors apart "
        "better.",
        lambda case: case.results["calibration"].get("uses_one_minus_max", False),
    ),
    (
        "`uncertainty` is the probability that the label is wrong, as held-out clips have it.",
        lambda case: "error_auroc_after" in case.results["calibration"],
    ),
    (
        "`uncertainty` is higher where the label may be wrong; it is not calibrated as a probability.",
        lambda case: case.judges_errors and "error_auroc_after" not in case.results["calibration"],
    ),
    (
        "Do not rely on `uncertainty`: in this run it did not learn from errors and was not calibrated.",
        lambda case: (
            not case.judges_errors
            and not {"error_auroc_after", "uses_one_minus_max"} & set(case.results["calibration"])
        ),
    ),
    ("It cannot say that a clip is none of the classes.", lambda case: not case.opens),
    (
        "`unknown_probability` is the probability, by OpenMax (Bendale & Boult 2016), that a clip is none of the "
        "classes; no clip is rejected.",
        lambda case: case.opens and case.config.openmax_threshold is None,
    ),
    (
        "A clip `is_unknown` when OpenMax (Bendale & Boult 2016) leaves too little probability to every class; the "
        "thresholds are made to accept 95 % of known clips like the held-out ones.",
        lambda case: (
            case.opens
            and case.config.openmax_threshold is not None
            and case.model.openmax.has_thresholds
            and case.config.openmax_acceptance == 0.95
        ),
    ),
    (
        'A clip `is_unknown` when OpenMax (Bendale & Boult 2016) finds "unknown" the most probable answer, or more '
        "probable than 0.3.",
        lambda case: (
            case.opens
            and case.config.openmax_threshold is not None
            and (case.config.openmax_acceptance is None or not case.model.openmax.has_thresholds)
        ),
    ),
    # Model
    (
        "Audio encoder: an audio encoder; it takes the waveform.",
        lambda case: "audio" in case.trained and case.config.audio_config.model_type == "wav2vec2",
    ),
    (
        "Audio encoder: an audio encoder; it takes log-mel frames.",
        lambda case: "audio" in case.trained and case.config.audio_config.model_type == "whisper",
    ),
    (
        "All its layers enter a learned weighted sum.",
        lambda case: "audio" in case.trained and case.model.base_model.layer_weights is not None,
    ),
    (
        "Its last layer is used.",
        lambda case: "audio" in case.trained and case.model.base_model.layer_weights is None,
    ),
    ("Text encoder: a text encoder.", lambda case: "text" in case.trained),
    (
        "Audio and text attend to each other, are pooled by attentive statistics (Okabe et al. 2018) and joined by a "
        "gate (Arevalo et al. 2017); either may be missing.",
        lambda case: len(case.trained) == 2,
    ),
    (
        "The states are pooled by attentive statistics (Okabe et al. 2018).",
        lambda case: len(case.trained) < 2,
    ),
    (
        lambda case: f"The classifier has {count(len(case.model.classifier.blocks), 'residual block')}.",
        lambda case: len(case.model.classifier.blocks) > 0,
    ),
    (
        "The classifier is a plain head without residual blocks.",
        lambda case: len(case.model.classifier.blocks) == 0,
    ),
    (
        "Each class has a learned anchor that draws its clips together (after Miller et al. 2021).",
        lambda case: case.config.anchor_loss_weight > 0,
    ),
    (
        lambda case: (
            f"Each class has {count(case.model.prototypes.prototypes.shape[1], 'learned prototype')} "
            "(Snell et al. 2017)."
        ),
        lambda case: case.config.prototype_loss_weight > 0,
    ),
    ("An uncertainty head learned where the classifier is wrong.", lambda case: case.judges_errors),
    (
        lambda case: (
            "OpenMax goes by the distance to the nearest of "
            f"{count(case.model.openmax.centroids.shape[1], 'centroid')} of each class."
        ),
        lambda case: case.opens and case.model.openmax.has_centroids,
    ),
    (
        "OpenMax goes by the distance to the anchor of each class.",
        lambda case: case.opens and not case.model.openmax.has_centroids,
    ),
    # Training
    (
        lambda case: f"Data: {case.results['data']['name']}, 42 clips for training.",
        lambda case: "train" in case.results["data"]["clips"],
    ),
    (
        "Data: me/corpus; the clips for training were streamed and not counted.",
        lambda case: "train" not in case.results["data"]["clips"],
    ),
    (
        lambda case: (
            "By class: " + ", ".join(map(" ".join, zip(FOUR, map(str, case.config.class_counts), strict=True))) + "."
        ),
        lambda case: case.config.class_counts is not None,
    ),
    (
        "Clips that could not be read and were left out: 3.",
        lambda case: case.results["training"]["skipped_clips"] == 3,
    ),
    ("Languages: de, en.", lambda case: case.results["data"]["languages"] == ["de", "en"]),
    ("Speakers are not known.", lambda case: not case.results["data"]["overlap"]),
    ("Speakers: 2 in train, 2 in test.", lambda case: case.results["data"]["overlap"]),
    (
        "**Speakers occur in more than one split: the scores are too good for speakers never heard.**",
        lambda case: case.results["data"]["overlap"],
    ),
    (
        lambda case: f"Frozen: {' and '.join(f'the {name} encoder' for name in case.frozen)}.",
        lambda case: len(case.frozen) > 0,
    ),
    (
        untrained_sentence,
        lambda case: (
            0
            in (
                case.config.anchor_loss_weight,
                case.config.uncertainty_loss_weight,
                case.config.prototype_loss_weight,
            )
        ),
    ),
    (lambda case: f"Epochs: {case.results['training']['epoch']:g}.", lambda case: True),
    (
        lambda case: (
            f"It took 61 s on {environment(case)['device']} with {count(environment(case)['threads'], 'thread')}."
        ),
        lambda case: True,
    ),
    (
        lambda case: (
            f"Versions: MMSER {__version__}, torch {environment(case)['torch']}, "
            f"transformers {environment(case)['transformers']}."
        ),
        lambda case: True,
    ),
    # Evaluation
    ("`model` uses all that a clip has.", lambda case: "model" in case.rows),
    ("`audio_only` hides the text.", lambda case: "audio_only" in case.rows),
    ("`text_only` hides the audio.", lambda case: "text_only" in case.rows),
    (
        "`linear_probe` is a logistic regression on fused vectors.",
        lambda case: "linear_probe" in case.rows,
    ),
    ("`majority` always answers the most frequent class.", lambda case: "majority" in case.rows),
    (
        "`recall` is the mean over classes.",
        lambda case: len(case.rows) > 0,
    ),
    (
        "**There is no test split: these clips also calibrated the model, so the scores are too good.**",
        lambda case: "validation" in case.results and "test" not in case.results,
    ),
    (lambda case: f"F1 of each class on the {case.split} split:", lambda case: len(case.rows) > 0),
    (lambda case: f"Confusion matrix on the {case.split} split (rows: true):", lambda case: len(case.rows) > 0),
    ("By corpus:", lambda case: "by_corpus" in case.rows.get("model", {})),
    ("By language:", lambda case: "by_language" in case.rows.get("model", {})),
    ("By sex:", lambda case: "by_sex" in case.rows.get("model", {})),
    ("Nothing was held out, so nothing was measured.", lambda case: not {"validation", "test"} & case.results.keys()),
    (
        lambda case: f"Clips of no class, told apart on the {case.split} split (unknown is the positive class):",
        lambda case: "open_set" in case.results,
    ),
    # Calibration
    (
        "The scores are not calibrated: there was no validation split.",
        lambda case: case.results["calibration"].keys() == {"temperature"},
    ),
    (
        "The temperature stayed at 1: the validation split does not show that another is better.",
        lambda case: case.results["calibration"] == {"temperature": 1.0, "ece_before": 0.03, "ece_after": 0.03},
    ),
    (
        "The expected calibration error there is 0.03.",
        lambda case: case.results["calibration"].get("ece_after") == 0.03,
    ),
    (
        lambda case: (
            f"The scores are calibrated by a temperature of {case.results['calibration']['temperature']} "
            "(Guo et al. 2017), fitted on the validation split."
        ),
        lambda case: case.results["calibration"]["temperature"] != 1,
    ),
    (
        lambda case: (
            "The expected calibration error there was 0.25 before and is "
            f"{case.results['calibration']['ece_after']} after."
        ),
        lambda case: case.results["calibration"].get("ece_before") == 0.25,
    ),
    (
        "3 of 30 answers were wrong there. So few clips cannot tell an error rate of 2.1 % from one of 26.5 %: scores "
        "may be off by as much.",
        lambda case: "error_rate_interval" in case.results["calibration"],
    ),
    # Intended use and limits
    ("For research, and for tools whose users know that a machine is guessing.", lambda case: True),
    (
        "Not for decisions about people, such as hiring, policing, credit, insurance, diagnosis or the "
        "monitoring of employees.",
        lambda case: True,
    ),
    (
        "Scores differ by language, accent, microphone, age and speaking style: measure them on your own recordings "
        "before use.",
        lambda case: True,
    ),
    ("The licences of the encoders and of the data hold for this checkpoint too.", lambda case: True),
]


def environment(case):
    return json.loads((case.folder / "eval_results.json").read_text())["environment"]


def blocks(text):
    """The text of a card without its metadata, in blocks between blank lines; a block of code is one."""
    body = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    body = re.sub(r"\n<!-- Written by MMSER \(\w+\)\. [^\n]* -->\n\Z", "", body)  # its last line, which nobody sees
    code = re.compile(r"```.*?\n```", re.DOTALL)
    kept = code.findall(body)
    return [
        kept.pop(0) if block == "CODE" else block for block in re.split(r"\n\s*\n", code.sub("CODE", body).strip())
    ]


def prose(text):
    """The sentences of a card: all lines that are no code, heading or table."""
    paragraphs = [block for block in blocks(text) if not block.startswith(("```", "#", "|"))]
    return [line for block in paragraphs for line in block.splitlines()]


@pytest.mark.parametrize("name", CASES)
def test_the_example_looks_at_unknown_first_where_clips_are_rejected(name, cases):
    case = cases[name]
    rejects = case.opens and case.config.openmax_threshold is not None
    assert ("# Look at is_unknown first" in case.card.content) == rejects


@pytest.mark.parametrize("name", CASES)
def test_a_sentence_is_there_if_and_only_if_it_is_true(name, cases):
    case = cases[name]
    expected = [said if isinstance(said, str) else said(case) for said, is_true in SENTENCES if is_true(case)]
    assert prose(case.card.content) == expected


def test_each_sentence_is_tried_both_ways(cases):
    for said, is_true in SENTENCES:
        told = {is_true(case) for case in cases.values()}
        assert True in told, said
    sometimes = [said for said, is_true in SENTENCES if not all(is_true(case) for case in cases.values())]
    assert len(SENTENCES) - len(sometimes) == 8  # the general ones: the others must be able to go


@pytest.mark.parametrize("name", CASES)
def test_the_card_is_whole(name, cases):
    case = cases[name]
    text = case.card.content
    assert not re.search(r"\{\{|\{%|%\}|\}\}|\{#", text) and "Undefined" not in text and "None" not in text
    assert not re.search(r"\n\n\n", text) and text.endswith("\n") and not re.search(r"[ \t]\n", text)
    for block in blocks(text):
        lines = block.splitlines()
        if block.startswith("#"):
            assert len(lines) == 1, f"a heading is glued to another line: {block}"
        elif block.startswith("|"):
            assert all(line.startswith("| ") and line.endswith(" |") for line in lines), block
            assert len(lines) > 2, f"a table has no rows: {block}"
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1, block
        elif not block.startswith("```"):
            assert not any(line.startswith(("#", "|", "```")) for line in lines), block
    headings = [block for block in blocks(text) if block.startswith("#")]
    sections = ["Use", "Model", "Training", "Evaluation", "Calibration", "Intended use and limits"]
    assert headings == ["# tiny", *(f"## {section}" for section in sections)]
    assert len(" ".join(prose(text)).split()) < 430


@pytest.mark.parametrize("name", CASES)
def test_the_metadata_is_valid(name, cases):
    case = cases[name]
    data = case.card.data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "audio-classification", "mit")
    assert data.language == (["de", "en"] if case.results["data"]["languages"] else None)
    assert data.model_name == "tiny"
    both = ["multimodal"] if len(case.trained) == 2 else []
    assert data.tags == ["speech-emotion-recognition", "mmser", *both, *case.trained]
    if not case.rows:
        assert data.eval_results is None
        return
    result = data.eval_results[0]
    assert result.dataset_name == f"{case.results['data']['name']} ({case.split})"
    assert result.metric_value == round(case.rows["model"]["weighted_f1"], 4)


@pytest.mark.parametrize("name", CASES)
def test_the_example_gives_what_the_model_was_trained_with(name, cases):
    case = cases[name]
    example = next(block for block in blocks(case.card.content) if block.startswith("```python"))
    compile(example.removeprefix("```python").removesuffix("```"), name, "exec")
    assert 'pipeline("audio-classification", model="tiny", trust_remote_code=True)' in example
    assert ('"text"' in example) == ("text" in case.trained)
    assert ("clip.wav" in example) == (case.trained != ("text",))


@pytest.mark.parametrize("name", CASES)
def test_the_card_says_nothing_of_other_models(name, cases):
    text = cases[name].card.content + TEMPLATE.read_text()
    for other in ("real_speech", "RAVDESS", "CC BY", "1,866", "Wav2Vec2ForSequenceClassification"):
        assert other not in text


# --- the tables ------------------------------------------------------------------------------------------------------


def table_rows(text, first_column):
    """Rows of the Markdown table in `text` whose first column is `first_column`, by the names of eval_results.json."""
    names = {title: name for name, title in SHORT_TITLES.items()}
    lines = text[text.index(f"| {first_column} ") :].split("\n\n")[0].splitlines()
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return [dict(zip([names.get(cell, cell) for cell in header], row, strict=True)) for row in rows]


def read(folder):
    card = ModelCard.load(folder / "README.md", ignore_metadata_errors=False)
    return parse_strict_json((folder / "eval_results.json").read_text()), card.text


def test_the_tables_say_what_the_json_says(cases):
    case = cases["everything"]
    written, text = read(case.folder)
    rows = table_rows(text, "split")
    assert len(rows) == 10
    for row in rows:
        values = written[row["split"]][row["row"]]
        assert int(row["clips"]) == values["clips"]
        for name in ("weighted_f1", "unweighted_average_recall", "accuracy"):
            assert float(row[name]) == pytest.approx(values[name], abs=5e-5)
    confusion = table_rows(text, "true \\ predicted")
    assert [[int(row[name]) for name in FOUR] for row in confusion] == written["test"]["model"]["confusion_matrix"]
    for group in ("corpus", "language", "sex"):
        for row in table_rows(text, group):
            model = written["test"]["model"]
            if row[group] == "mean over corpora":
                expected = model["mean_over_corpora_weighted_f1"]
            else:
                expected = model[f"by_{group}"][row[group]]["weighted_f1"]
            assert float(row["weighted_f1"]) == pytest.approx(expected, abs=5e-5)
    assert float(table_rows(text, "score")[0]["auroc"]) == 0.75
    sizes = {row["part"]: int(row["parameters"]) for row in table_rows(text, "part")}
    assert sizes["all"] == sum(parameter.numel() for parameter in case.model.parameters())


@pytest.mark.parametrize("name", CASES)
def test_the_parts_of_the_loss_are_those_with_a_weight(name, cases):
    config = cases[name].config
    balanced = "class-balanced (Cui et al. 2019), " if name == "everything" else ""
    parts = {
        f"cross-entropy, label smoothing {config.label_smoothing:g}": config.cross_entropy_loss_weight,
        f"focal loss (Lin et al. 2017), {balanced}gamma 2": config.focal_loss_weight,
        "class anchor clustering": config.anchor_loss_weight,
        "uncertainty": config.uncertainty_loss_weight,
        "prototypes": config.prototype_loss_weight,
        "supervised contrastive loss (Khosla et al. 2020)": config.supervised_contrastive_loss_weight,
        "distillation from a teacher (Hinton et al. 2015)": config.distillation_loss_weight,
    }
    rows = table_rows(cases[name].card.content, "part of the loss")
    told = {row["part of the loss"]: float(row["weight"]) for row in rows}
    assert told == {part: weight for part, weight in parts.items() if weight > 0}


@pytest.fixture
def tiny(cases, tmp_path):
    """A case whose results can be changed, with a checkpoint of its own; `write` writes its card."""
    case = everything()
    case.model.save_pretrained(tmp_path)
    case.folder = tmp_path
    return case


def test_what_is_printed_has_the_same_tables(tiny):
    printed = write_results(tiny.results, tiny.folder)
    for title in ("Summary", "F1 of each class", "Confusion matrix", "By language", "Clips that are none"):
        assert title in printed
    del tiny.results["test"]["model"]["by_corpus"]
    assert "By corpus" not in write_results(tiny.results, tiny.folder)


def test_numbers_that_are_not_finite_are_null(tiny):
    tiny.results["test"]["model"]["error_auroc_of_uncertainty"] = float("nan")
    tiny.results["training"]["numpy"] = [
        np.float32(0.5),
        np.int64(3),
        np.float64("inf"),
        torch.tensor(2.0),
        True,
        None,
    ]
    write_results(tiny.results, tiny.folder)
    written, text = read(tiny.folder)
    assert written["test"]["model"]["error_auroc_of_uncertainty"] is None
    assert written["training"]["numpy"] == [0.5, 3, None, 2.0, True, None]
    assert math.isnan(tiny.results["test"]["model"]["error_auroc_of_uncertainty"])  # the caller's are left alone
    assert "n/a" in table_rows(text, "split")[5]["error_auroc_of_uncertainty"]


@pytest.mark.parametrize(
    ("languages", "codes"),
    [
        (("en", "zxx"), ["en"]),
        (("unknown", "German"), None),
        (("pt-BR", "zh_CN"), ["pt", "zh"]),
        (("yue", "EN"), ["en", "yue"]),
        (("", ""), None),
    ],
)
def test_only_codes_of_languages_go_into_the_metadata(languages, codes, tiny):
    table = train_table(20, language=list(languages) * 10)
    tiny.results["data"] = describe_data("folder/corpus", {"train": table})
    write_results(tiny.results, tiny.folder)
    assert ModelCard.load(tiny.folder / "README.md", ignore_metadata_errors=False).data.language == codes


def test_the_command_can_be_pasted_into_a_shell(tiny):
    command = ["train_hf.py", "--config_overrides", '{"feature_size": 16}', "--data_dir", "my data"]
    write_results(tiny.results, tiny.folder, command)
    written, text = read(tiny.folder)
    assert shlex.split(written["command"]) == command
    assert f"```\n{written['command']}\n```" in text


# --- the checkpoint beside the card ----------------------------------------------------------------------------------


def test_a_folder_without_a_checkpoint_is_an_error(tiny, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json: save the checkpoint before its card"):
        write_model_card(tiny.results, empty)
    tiny.config.save_pretrained(empty)
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        write_model_card(tiny.results, empty)


OWN = "---\nlicense: mit\n---\n# My notes\n"


@pytest.mark.parametrize("change", [lambda card: OWN, lambda card: card + "\nMore.\n", lambda card: "See: " + card])
def test_a_readme_of_the_user_is_kept_and_the_card_goes_beside_it(change, tiny, caplog):
    readme = tiny.folder / "README.md"
    write_results(tiny.results, tiny.folder)
    card = readme.read_text()
    readme.write_text(change(card))
    assert not is_own_card(readme)
    printed = write_results(tiny.results, tiny.folder)
    assert readme.read_text() == change(card)
    assert (tiny.folder / "model_card.md").read_text() == card
    assert "model_card.md (the model card)" in printed and "README.md" not in printed
    told = [record.getMessage() for record in caplog.records if "README.md" in record.getMessage()]
    assert len(told) == 1 and "is kept" in told[0] and "model_card.md" in told[0]
    write_results(tiny.results, tiny.folder)  # its own card it replaces
    assert sorted(path.name for path in tiny.folder.glob("*.md")) == ["README.md", "model_card.md"]
    (tiny.folder / "model_card.md").write_text(OWN)
    write_results(tiny.results, tiny.folder)
    assert (tiny.folder / "model_card.md").read_text() == OWN
    assert (tiny.folder / "model_card_2.md").read_text() == card


def test_a_card_that_nobody_changed_is_replaced(tiny):
    readme = tiny.folder / "README.md"
    write_results(tiny.results, tiny.folder)
    readme.write_bytes(readme.read_bytes().replace(b"\n", b"\r\n"))  # as git writes it on Windows
    assert is_own_card(readme)
    tiny.results["model_name"] = "another"
    printed = write_results(tiny.results, tiny.folder)
    assert "# another\n" in readme.read_text() and "README.md (the model card)" in printed
    assert [path.name for path in tiny.folder.glob("*.md")] == ["README.md"]


def test_weights_in_several_files_are_read(tiny):
    write_results(tiny.results, tiny.folder)
    expected = (tiny.folder / "README.md").read_text()
    (tiny.folder / "model.safetensors").unlink()
    tiny.model.save_pretrained(tiny.folder, max_shard_size="20KB")
    assert len(list(tiny.folder.glob("*.safetensors"))) > 2
    write_results(tiny.results, tiny.folder)
    assert (tiny.folder / "README.md").read_text() == expected


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(
    ("flags", "trained"),
    [
        ({}, ("audio", "text")),
        ({"text_dropout": 1.0, "audio_dropout": 0.0}, ("audio",)),
        ({"text_column": "none"}, ("audio",)),
        ({"audio_column": "none"}, ("text",)),
        ({"learning_rate": 0.0}, ()),
    ],
)
def test_a_run_knows_what_it_was_trained_with(flags, trained, tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    if "audio_column" in flags:
        for split in ("train", "validation", "test"):
            path = corpus / split / "metadata.csv"
            path.write_text(path.read_text().replace("file_name", "unused", 1))
    out = tmp_path / "out"
    # Any weight decay, dropout and averaging must leave alone what no clip reaches
    flags = {"max_steps": 4, "warmup_steps": 0, "weight_decay": 1.0, "weight_averaging": 0.5, **flags}
    train_hf.main(tiny_flags(corpus, out, tmp_path / "tokenizer", eval_strategy="no", **flags))
    sentences = prose((out / "README.md").read_text())
    opening = {
        ("audio", "text"): "Raw speech, its transcript or both go in;",
        ("audio",): "Raw speech goes in;",
        ("text",): "A transcript goes in;",
        (): "It was not trained:",
    }
    assert [text for text in opening.values() if sentences[1].startswith(text)] == [opening[trained]]


# --- the card of the repository --------------------------------------------------------------------------------------


def test_the_card_of_the_repository_can_be_read():
    """`model_card.md` is for people: prose, whole tables, valid metadata, commands that the scripts take."""
    card = ModelCard.load(ROOT / "model_card.md", ignore_metadata_errors=False)
    assert card.data.pipeline_tag == "audio-classification" and card.data.library_name == "transformers"
    assert len(card.data.language) == 7
    text = card.content
    assert not re.search(r"\{\{|\{%|%\}|\}\}", text)
    assert len(" ".join(prose(text)).split()) < 1000
    for table in (block for block in blocks(text) if block.startswith("|")):
        assert len(table.splitlines()) > 2 and len({line.count("|") for line in table.splitlines()}) == 1, table
    names = re.findall(r"<!-- real_speech:(\w+) -->", text)
    assert names == ["study", "compact", "generalisation"]
    for name in names:
        assert re.search(rf"<!-- real_speech:{name} -->\n\n\|.*\n\n<!-- /real_speech:{name} -->", text, re.DOTALL)
    commands = re.findall(r"python train_hf\.py ((?:.*\\\n)*.*)", text)
    assert len(commands) == 3
    for command in commands:
        recipe, *words = shlex.split(command.replace("\\\n", "").replace("$seed", "42"))
        model, data, training = parse_arguments(TRAINING_ARGUMENTS, [str(ROOT / recipe), *words, "--use_cpu"])
        assert data.data_dir == "ser4" and training.output_dir.startswith("runs/")
    assert model.average_with == ["runs/second_43", "runs/second_44"]  # of the last one
