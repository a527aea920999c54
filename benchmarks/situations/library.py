# SPDX-License-Identifier: Apache-2.0
"""Rows about Transformers' own `pipeline` and `Trainer`, `evaluate`, PEFT, and the data that training reads."""

import json
from typing import Any

import datasets
import evaluate
import numpy as np
import soundfile
import torch
import transformers
from tiny import WAVEFORM
from transformers import (
    AudioClassificationPipeline,
    AutoModelForAudioClassification,
    AutoProcessor,
    Trainer,
    TrainingArguments,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
)
from transformers.pipelines.pt_utils import KeyDataset

from benchmarks.situations.common import RATE, TEXT, World, close, error, need, pipeline, situation, warnings_of
from mmser.loading import load_emotion_dataset
from modeling_mmser import MMSERForAudioClassification, register_auto_classes
from processing_mmser import MMSERPipeline, MMSERProcessor

TASK = "audio-classification"

# ---------------------------------------------------------------------------------------------------------- pipelines


@situation("pipelines", "AudioClassificationPipeline of Transformers, batch_size 1, 2, 3", "the model's own answer")
def stock_class(world: World) -> None:
    stock: Any = AudioClassificationPipeline(model=world.model, feature_extractor=world.processor.feature_extractor)
    for batch_size in (1, 2, 3):
        for row, entries in enumerate(stock(list(map(np.copy, world.clips)), batch_size=batch_size)):
            world.check_scores(entries, row, text=None)


@situation("pipelines", "pipeline(task, model=object, processor=object)", "MMSERPipeline, with text")
def objects(world: World) -> None:
    classifier = pipeline(TASK, model=world.model, processor=world.processor)
    assert type(classifier) is MMSERPipeline
    world.check_scores(classifier(world.clip()))
    world.model.save_pretrained(world.new_folder())


@situation("pipelines", "pipeline(task, model=object) of a model from a folder", "MMSERPipeline, with text")
def model_object(world: World) -> None:
    loaded = MMSERForAudioClassification.from_pretrained(world.checkpoint)
    for options in ({}, {"feature_extractor": world.processor.feature_extractor}):
        world.check_scores(pipeline(TASK, model=loaded, **options)(world.clip()))


@situation("pipelines", "by name after register_auto_classes, no trust_remote_code", "MMSERPipeline, with text")
def registered(world: World) -> None:
    register_auto_classes()
    classifier = pipeline(TASK, model=str(world.checkpoint))
    assert type(classifier) is MMSERPipeline
    world.check_scores(classifier(world.clip()))
    assert type(AutoProcessor.from_pretrained(world.checkpoint)) is MMSERProcessor
    assert type(AutoModelForAudioClassification.from_pretrained(world.checkpoint)) is MMSERForAudioClassification


FRESH = """
import json, sys
import numpy as np
from transformers import pipeline
raw = np.load(sys.argv[2])
try:
    pipeline("audio-classification", model=sys.argv[1])
    refusal = ""
except ValueError as error:
    refusal = str(error)
classifier = pipeline("audio-classification", model=sys.argv[1], trust_remote_code=True, local_files_only=True)
scores = classifier({"raw": raw, "sampling_rate": 16000, "text": sys.argv[3]})
print()  # after the question whether to trust
print(json.dumps({"refusal": refusal, "scores": scores, "module": type(classifier).__module__}))
"""


@situation("pipelines", "by name where MMSER is not installed, with trust_remote_code", "the same answer, with text")
def trusted(world: World) -> None:
    np.save(world.folder / "clip.npy", world.clips[0])
    arguments = (world.checkpoint, world.folder / "clip.npy", TEXT)
    seen = json.loads(world.run(FRESH, *arguments, knows_mmser=False).splitlines()[-1])
    assert seen["module"].startswith("transformers_modules.")
    assert "trust_remote_code=True" in seen["refusal"], "without trust there was no refusal"
    world.check_scores(seen["scores"])


@situation("pipelines", "batch_size 3, some clips with text, some without, one of text alone", "as one by one")
def mixed_batch(world: World) -> None:
    inputs = [world.clip(0), world.clip(1, None), {"text": TEXT}, world.clip(2)]
    for one, other in zip(map(world.classifier, inputs), world.classifier(inputs, batch_size=3), strict=True):
        close([entry["score"] for entry in one], [entry["score"] for entry in other])
    world.check_scores(world.classifier(inputs, batch_size=3)[1], 1, None)


@situation("pipelines", "num_workers=2", "as without")
def workers(world: World) -> None:
    inputs = [world.clip(row, None) for row in range(3)]
    for row, entries in enumerate(world.classifier(inputs, num_workers=2, batch_size=2)):
        world.check_scores(entries, row, None)


@situation("pipelines", "a generator, KeyDataset, a torch data set", "one answer for each, in order")
def streams(world: World) -> None:
    rows = [{"clip": world.clip(row)} for row in range(3)]
    for inputs in ((row["clip"] for row in rows), KeyDataset(rows, "clip")):  # type: ignore[arg-type]
        for row, entries in enumerate(world.classifier(inputs, batch_size=2)):
            world.check_scores(entries, row)


@situation("pipelines", "a recording in chunks", "each chunk as by itself")
def chunks(world: World) -> None:
    recording = np.concatenate([world.clips[0], world.clips[0]])
    result = world.classifier(recording, sampling_rate=RATE, chunk_length_s=0.5, stride_length_s=0.0)
    assert [chunk["timestamp"] for chunk in result["chunks"]] == [(0.0, 0.5), (0.5, 1.0)]
    for chunk in result["chunks"]:
        world.check_scores(chunk["scores"], text=None)


@situation("pipelines", "an option that does not exist", "error with the nearest name")
def unknown_option(world: World) -> None:
    with error(TypeError, "`topk`", "`top_k`"):
        world.classifier(world.clip(), topk=1)
    with error(TypeError, "`sample_rate`", "`sampling_rate`"):
        world.processor(world.clips[0], sample_rate=RATE)
    with error(ValueError, "speaker", "text"):
        world.classifier({**world.clip(), "speaker": 3})


@situation("pipelines", "save_pretrained of a pipeline", "a folder that loads by itself")
def saved_pipeline(world: World) -> None:
    folder = world.new_folder()
    world.classifier.save_pretrained(folder)
    world.check_scores(pipeline(TASK, model=str(folder), trust_remote_code=True)(world.clip()))


@situation("pipelines", "another model's pipeline beside MMSER", "the one it always got")
def other_model(world: World) -> None:
    folder, waveform = world.new_folder(), dict[str, Any](WAVEFORM)
    other = Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**waveform)).eval()
    other.save_pretrained(folder)
    world.processor.feature_extractor.save_pretrained(folder)
    found = pipeline(TASK, model=str(folder))
    assert type(found) is AudioClassificationPipeline
    with torch.no_grad():
        expected = other(**{name: world.inputs(0, None)[name] for name in ("input_values", "attention_mask")})
    scores = {entry["label"]: entry["score"] for entry in found(world.clips[0].copy())}
    close([scores[f"LABEL_{index}"] for index in range(2)], expected.logits[0].softmax(-1))


@situation("pipelines", "evaluate's evaluator, with a model and a data set", "the accuracy counted by hand")
def evaluator(world: World) -> None:
    if not hasattr(transformers, "TFPreTrainedModel"):  # evaluate 0.4.6 asks for the class that Transformers 5 dropped
        transformers.TFPreTrainedModel = type("TFPreTrainedModel", (), {})  # type: ignore[attr-defined]
    loaded = MMSERForAudioClassification.from_pretrained(world.checkpoint)
    data = datasets.Dataset.from_dict({"clip": [clip.tolist() for clip in world.clips], "label": [0, 1, 2]})
    data = data.map(lambda row: {"clip": {"raw": row["clip"], "sampling_rate": RATE}})
    metric = evaluate.load(str(_accuracy(world)))
    result = evaluate.evaluator(TASK).compute(
        loaded, data, metric=metric, input_column="clip", label_mapping=loaded.config.label2id, device=-1
    )
    right = sum(int(world.logits(row, None).argmax()) == row for row in range(3))
    assert abs(result["accuracy"] - right / 3) < 1e-6, result


def _accuracy(world: World):
    """A metric of `evaluate` that needs no network."""
    path = world.new_folder() / "accuracy.py"
    path.write_text(
        "import datasets\n"
        "import evaluate\n"
        "class Accuracy(evaluate.Metric):\n"
        "    def _info(self):\n"
        "        features = datasets.Features({k: datasets.Value('int32') for k in ('predictions', 'references')})\n"
        "        return evaluate.MetricInfo(description='', citation='', features=features)\n"
        "    def _compute(self, predictions, references):\n"
        "        pairs = list(zip(predictions, references))\n"
        "        return {'accuracy': sum(int(a == b) for a, b in pairs) / len(pairs)}\n"
    )
    return path


# ------------------------------------------------------------------------------------------------------------ Trainer


class Rows(torch.utils.data.Dataset):
    """Three clips with labels, each as the model takes it."""

    def __init__(self, world: World):
        self.rows = [{**{k: v[0] for k, v in world.inputs(row).items()}, "labels": row} for row in range(3)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def pad(rows):
    batch = {
        name: torch.nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True)
        for name in rows[0]
        if name != "labels"
    }
    return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}


def accuracy(seen):
    return {"accuracy": float((np.argmax(seen.predictions, axis=1) == seen.label_ids).mean())}  # as tutorials say


def stock_trainer(world: World, model=None, compute_metrics=None, **options) -> Any:
    """As in the tutorials: Transformers' own Trainer and arguments, and a function that pads."""
    settings = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "max_steps": 2, "save_strategy": "no"}
    arguments = TrainingArguments(str(world.new_folder()), **{**settings, **options})
    rows = Rows(world)
    return Trainer(
        model or world.new_model(),
        arguments,
        data_collator=pad,
        train_dataset=rows,
        eval_dataset=rows,
        compute_metrics=compute_metrics,
    )


@situation("Trainer", "Transformers' Trainer with the tutorial's np.argmax(predictions, axis=1)", "accuracy by hand")
def tutorial(world: World) -> None:
    trainer = stock_trainer(world, compute_metrics=accuracy)
    before = trainer.evaluate()
    right = [int(world.logits(row).argmax()) == row for row in range(3)]
    assert abs(before["eval_accuracy"] - np.mean(right)) < 1e-6, before
    close(before["eval_loss"], _loss(world, trainer.model), 1e-3)
    trainer.train()
    assert np.isfinite(trainer.state.log_history[-1]["train_loss"])


def _loss(world: World, model) -> float:
    with torch.no_grad():
        return float(model.eval()(**pad(Rows(world).rows)).loss)


@situation("Trainer", "--label_smoothing_factor", "used, or an error that names config.label_smoothing")
def label_smoothing(world: World) -> None:
    try:
        trainer = stock_trainer(world, label_smoothing_factor=0.2)
        found = trainer.evaluate()["eval_loss"]
    except ValueError as caught:
        assert "label_smoothing" in str(caught)
        return
    log_probabilities = torch.stack([world.logits(row) for row in range(3)]).log_softmax(-1)
    own = -log_probabilities[range(3), range(3)].mean()
    close(found, 0.8 * own - 0.2 * log_probabilities.mean(), 1e-3)


@situation("Trainer", "bf16=True, gradient accumulation", "the loss of float32, nearly")
def mixed_precision(world: World) -> None:
    trainer = stock_trainer(world, bf16=True, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    close(trainer.evaluate()["eval_loss"], _loss(world, trainer.model), 0.1)
    assert np.isfinite(trainer.train().training_loss)


@situation("Trainer", "save_model and load_best_model_at_end", "the folder loads, with the same answers")
def saved_model(world: World) -> None:
    options = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 1, "eval_steps": 1}
    trainer = stock_trainer(world, load_best_model_at_end=True, **options)
    trainer.train()
    folder = world.new_folder()
    trainer.save_model(str(folder))
    loaded = MMSERForAudioClassification.from_pretrained(folder).eval()
    close(world.logits(model=loaded), world.logits(model=trainer.model.eval()), 1e-6)


@situation("Trainer", "a checkpoint saved without its processor", "error that says what is missing")
def no_processor(world: World) -> None:
    folder = world.new_folder()
    world.model.save_pretrained(folder)
    with error((OSError, ValueError), str(folder)):
        pipeline(TASK, model=str(folder), trust_remote_code=True)


@situation("Trainer", "PEFT LoRA on both encoders", "base frozen, adapters learn, reloaded adapters agree")
def lora(world: World) -> None:
    peft = need("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "query"], r=2, modules_to_save=["classifier"])
    adapted = peft.get_peft_model(world.new_model(), config)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name or "modules_to_save" in name for name in trained)
    before = world.logits(model=adapted.eval())
    close(before, world.logits(), 1e-5)  # a new adapter changes nothing
    stock_trainer(world, adapted, learning_rate=0.1).train()
    after = world.logits(model=adapted.eval())
    assert (after - before).abs().max() > 1e-3, "the adapters learned nothing"
    folder = world.new_folder()
    adapted.save_pretrained(folder)
    again = peft.PeftModel.from_pretrained(world.new_model(), folder).eval()
    close(world.logits(model=again), after, 1e-5)
    world.check_scores(pipeline(TASK, model=world.model, processor=world.processor)(world.clip()))


# --------------------------------------------------------------------------------------------------------------- data


def _corpus(world: World, table: bytes):
    folder = world.new_folder()
    for number in range(8):
        soundfile.write(folder / f"{number}.wav", world.clips[number % 3][: 2000 + number], RATE)
    (folder / "metadata.csv").write_bytes(table)
    return folder


def _rows(delimiter: str) -> str:
    lines = [("file_name", "label", "transcription", "speaker")]
    lines += [(f"{n}.wav", ("happy", "sad")[n % 2], "Grüße, alle", f"s{n // 2}") for n in range(8)]
    quoted = [[f'"{cell}"' if delimiter in cell else cell for cell in line] for line in lines]
    return "\n".join(delimiter.join(line) for line in quoted) + "\n"


@situation("data", "a table with ; and a byte order mark, as Excel writes it", "its rows")
def excel(world: World) -> None:
    for content in (_rows(";").encode("utf-8-sig"), _rows(",").encode("utf-8-sig"), _rows("\t").encode()):
        data, names = load_emotion_dataset(str(_corpus(world, content)))
        assert sum(len(split) for split in data.values()) == 8 and set(names) == {"happy", "sad"}
        assert {text for split in data.values() for text in split["text"]} == {"Grüße, alle"}


@situation("data", "folders by class: train/happy/x.wav", "their clips and labels")
def folders_by_class(world: World) -> None:
    folder = world.new_folder()
    for split in ("train", "validation", "test"):
        for number, name in enumerate(("bored", "calm")):
            (folder / split / name).mkdir(parents=True)
            for index in range(3):
                clip = np.roll(world.clips[number], index + 7 * len(split))
                soundfile.write(folder / split / name / f"{index}.wav", clip, RATE)
    data, names = load_emotion_dataset(str(folder))
    assert list(names) == ["bored", "calm"] and {split: len(rows) for split, rows in data.items()} == {
        **{"train": 6, "validation": 6, "test": 6}
    }
    for split in data.values():
        assert [names[label] for label in split["labels"]] == [
            "bored" if "bored" in str(path) else "calm" for path in split["audio"]
        ]


@situation("data", "labels 1, 2, 3 without names", "keep their numbers as names")
def numbers_as_labels(world: World) -> None:
    rows = [("file_name", "label", "speaker"), *((f"{n}.wav", str(n % 3 + 1), f"s{n // 2}") for n in range(8))]
    table = "\n".join(map(",".join, rows)).encode()
    _, names = load_emotion_dataset(str(_corpus(world, table)))
    assert list(names) == ["1", "2", "3"], names


@situation("data", "a label spelled in two ways (Furious, furious)", "error that names rows")
def two_spellings(world: World) -> None:
    with error(ValueError, "Furious", "furious"):
        load_emotion_dataset(
            str(_corpus(world, _rows(",").replace("happy", "furious").replace("furious", "Furious", 1).encode()))
        )


@situation("data", "a manifest in JSON lines, a Hub-like parquet", "the rows of the table")
def other_tables(world: World) -> None:
    folder = _corpus(world, _rows(",").encode())
    table = load_emotion_dataset(str(folder))[0]
    lines = [dict(zip(("file_name", "label"), (f"{n}.wav", ("happy", "sad")[n % 2]), strict=True)) for n in range(8)]
    lines = [{**line, "transcription": "Grüße, alle", "speaker": f"s{n // 2}"} for n, line in enumerate(lines)]
    (folder / "metadata.csv").unlink()
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    again = load_emotion_dataset(str(folder))[0]
    for split in table:
        assert table[split]["labels"] == again[split]["labels"] and list(table[split]["text"]) == list(
            again[split]["text"]
        )


@situation("data", "the same clips in train and test, no speakers", "an error or a warning that names rows")
def leak(world: World) -> None:
    folder = world.new_folder()
    for split in ("train", "validation", "test"):
        (folder / split).mkdir()
        rows = ["file_name,label"]
        for number in range(4):
            soundfile.write(folder / split / f"{split}{number}.wav", world.clips[0][: 3000 + number], RATE)
            rows.append(f"{split}{number}.wav,{('happy', 'sad')[number % 2]}")
        (folder / split / "metadata.csv").write_text("\n".join(rows))
    with warnings_of() as messages:
        try:
            load_emotion_dataset(str(folder))
        except ValueError as caught:
            messages.append(str(caught))
    rows = [f"{split}/metadata.csv row 2" for split in ("train", "validation")]
    assert any(all(row in message for row in rows) for message in messages), messages
