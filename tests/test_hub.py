# SPDX-License-Identifier: Apache-2.0
"""The Hub from end to end: train from a data set on it, push, load by name where MMSER is not installed, push again.

Every party is a fresh process, as on another person's machine, and knows only the stand-in of `hub_server.py`.
`author` has the package, trains and pushes; the readers have only what they download, and cannot import MMSER.
What each of them sees comes back as JSON. They run once, one after the other; the tests compare. At the end come
checkpoints of the version before the code was split into eight files.
"""

import inspect
import json
import pickle
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import soundfile
import torch
from hub_server import HubServer
from huggingface_hub import ModelCard, snapshot_download
from tiny import WAVEFORM, tiny_batch, tiny_model
from tiny_corpus import tiny_processor
from transformers import AutoModelForAudioClassification

from mmser.averaging import WeightAverage
from modeling_mmser import MMSERForAudioClassification, register_auto_classes
from processing_mmser import MMSERProcessor

ROOT = Path(__file__).parents[1]
MODULES = [*sorted(path.stem for path in ROOT.glob("*.py")), "mmser"]
# All modules of the root whose names end so travel
CODE_FILES = tuple(sorted(path.name for path in Path(__file__).parents[1].glob("*_mmser.py")))
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".joblib")
LABELS = ["bored", "calm", "tense"]  # not the default ones: a checkpoint must explain its own labels
RECIPE = {
    "dataset_name": "me/data",
    "tokenizer_name": "tokenizer",
    "random_audio_encoder": True,
    "audio_config_overrides": WAVEFORM,
    "random_text_encoder": True,
    "text_config_overrides": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 16,
    },
    "config_overrides": {
        "cross_attention_hidden_size": 16,
        "cross_attention_heads": 2,
        "pooling_hidden_size": 8,
        "fusion_hidden_size": 32,
        "classifier_num_layers": 2,
        "classifier_hidden_size": 32,
        "classifier_bottleneck": 8,
        "feature_size": 16,
        "anchor_size": 8,
    },
    "learning_rate": 1e-2,
    "lr_multipliers": {"audio_encoder": 1.0, "text_encoder": 1.0},
    "per_device_train_batch_size": 8,
    "dataloader_num_workers": 0,
    "augment": False,
    "text_dropout": 0.0,
    "audio_dropout": 0.0,
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "use_cpu": True,
    "disable_tqdm": True,
}


# ----------------------------------------------- what the processes run: each function stands alone, with its imports


def observe(model, processor, classifier, wav):
    """Everything that must survive the way over the Hub, as plain numbers."""
    import torch

    names = ("logits", "uncertainty", "anchor_distances", "features", "unknown_probability", "is_unknown")
    numbers = {}
    for kind, audio, text in (("both", wav, "all is well"), ("audio", wav, None), ("text", None, "watch out now")):
        with torch.no_grad():
            outputs = model(**processor(audio, text))
        numbers[kind] = {name: outputs[name].tolist() for name in names}
        numbers[kind]["log_rejection_score"] = outputs.rejection_score.log1p().tolist()  # it goes up to 1e30
    state = model.state_dict()
    names = [name for name in state if name.startswith("openmax.")]
    names += ["temperature", "uncertainty.error_calibration", "prediction_sets.thresholds", "anchors.anchors"]
    numbers["state"] = {name: state[name].tolist() for name in names}
    numbers["pipeline"] = {
        "path": classifier(wav),
        "path and text": classifier({"path": wav, "text": "all is well"}, return_uncertainty=True),
    }
    return {"numbers": numbers, "labels": [model.config.id2label[index] for index in range(model.config.num_labels)]}


def provenance(*objects):
    """The module of each object's class and its file; and which project modules were imported by their own name."""
    import inspect
    import sys

    classes = [type(thing) for thing in objects]
    return {
        "modules": [cls.__module__ for cls in classes],
        "files": [inspect.getfile(cls) for cls in classes],
        "imported": sorted(name for name in sys.modules if name.endswith("_mmser") and "." not in name),
    }


def author(wav, recipe):
    """Push a data set, train on it, push the model; take one training step on the stream of the same data set."""
    import io
    import sys
    from pathlib import Path

    import datasets
    import numpy as np
    import soundfile
    from huggingface_hub import HfApi
    from transformers import AutoModel, AutoModelForAudioClassification, AutoProcessor, BertTokenizer, pipeline

    import train_hf
    from mmser import training_run
    from mmser.loading import load_emotion_dataset
    from modeling_mmser import MMSERForAudioClassification, MMSERModel, register_auto_classes
    from processing_mmser import MMSERPipeline, MMSERProcessor

    classes = [("bored", 150, "not this again"), ("calm", 400, "all is well"), ("tense", 900, "watch out now")]
    words = sorted({word for _, _, text in classes for word in text.split()})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    BertTokenizer(vocab={token: i for i, token in enumerate(vocabulary)}).save_pretrained("tokenizer")

    rng = np.random.default_rng(0)
    pushed = {}
    for split, count in (("train", 24), ("validation", 6), ("test", 6)):
        rows = []
        for index in range(count):
            _, hertz, text = classes[index % 3]
            times = np.arange(rng.integers(3000, 5000)) / 16000
            clip = 0.3 * np.sin(2 * np.pi * hertz * rng.uniform(0.9, 1.1) * times) + 0.05 * rng.normal(size=len(times))
            file = io.BytesIO()
            soundfile.write(file, clip, 16000, format="FLAC")
            audio = {"bytes": file.getvalue(), "path": f"{split}{index}.flac"}
            # one wrong label, as in life: no temperature is best for a model that makes no mistake
            label = 2 if (split, index) == ("validation", 0) else index % 3
            rows.append({"audio": audio, "transcription": text, "label": label, "speaker": f"{split}{index % 2}"})
        features = datasets.Features(
            {
                "audio": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
                "transcription": datasets.Value("string"),
                "label": datasets.ClassLabel(names=[name for name, _, _ in classes]),
                "speaker": datasets.Value("string"),
            }
        )
        table = datasets.Dataset.from_list(rows, features=features).cast_column("audio", datasets.Audio())
        table.to_parquet(f"data/{split}-00000-of-00001.parquet")
        pushed[split] = [(row["audio"]["bytes"], row["transcription"], row["label"]) for row in rows]
    HfApi().create_repo("me/data", repo_type="dataset")
    HfApi().upload_folder(repo_id="me/data", repo_type="dataset", folder_path="data", path_in_repo="data")

    result = {"data": {}}
    for streaming in (False, True):
        loaded, names = load_emotion_dataset(dataset_name="me/data", streaming=streaming)
        same = {
            split: [(row["audio"]["bytes"], row["text"], row["labels"]) for row in loaded[split]] == rows
            for split, rows in pushed.items()
        }
        result["data"]["streamed" if streaming else "downloaded"] = {"same": same, "labels": names}

    trainers = []

    class RememberedTrainer(training_run.MMSERTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            trainers.append(self)

    training_run.MMSERTrainer = RememberedTrainer
    flags = ["--output_dir", "run", "--push_to_hub", "--hub_model_id", "me/mmser-tiny"]
    train_hf.main([recipe, *flags, "--max_steps", "30", "--save_steps", "15", "--eval_steps", "15"])
    model, processor = trainers[0].model.eval(), trainers[0].processing_class
    if not model.openmax.is_fitted:
        raise RuntimeError("the model has learned too little to fit OpenMax: this is no test of a finished model")
    result |= observe(model, processor, MMSERPipeline(model=model, processor=processor), wav)

    flags = ["--output_dir", "streamed", "--streaming", "--push_to_hub", "--hub_model_id", "me/streamed"]
    flags += ["--hub_strategy", "checkpoint", "--max_steps", "1", "--save_steps", "1", "--eval_steps", "1"]
    flags += ["--weight_averaging", "0.9"]
    result["streamed_loss"] = train_hf.main([recipe, *flags])["training"]["train_loss"]
    result["checkpoints"] = [str(path.resolve()) for path in sorted(Path().glob("*/checkpoint-*"))]

    register_auto_classes()
    classifier = pipeline("audio-classification", model="me/mmser-tiny")
    result["registered"] = [
        type(AutoModel.from_pretrained("run")) is MMSERModel,
        type(AutoModelForAudioClassification.from_pretrained("run")) is MMSERForAudioClassification,
        type(AutoProcessor.from_pretrained("run")) is MMSERProcessor,
        type(classifier) is MMSERPipeline,
        [module for module in sys.modules if module.startswith("transformers_modules.")] == [],
    ]
    result["registered_pipeline"] = classifier({"path": wav, "text": "all is well"}, return_uncertainty=True)
    return result


def reader(wav):
    """Use the pushed model by its name, then push what was loaded under another name."""
    from transformers import AutoConfig, AutoModel, AutoModelForAudioClassification, AutoProcessor, pipeline

    name, trust = "me/mmser-tiny", {"trust_remote_code": True}
    classifier = pipeline("audio-classification", model=name, **trust)
    config = AutoConfig.from_pretrained(name, **trust)
    processor = AutoProcessor.from_pretrained(name, **trust)
    base = AutoModel.from_pretrained(name, **trust)
    model = AutoModelForAudioClassification.from_pretrained(name, **trust)
    result = observe(model, processor, classifier, wav)
    result |= provenance(classifier, config, processor, base, model, classifier.model, classifier.processor)
    result["task_of_the_card"] = pipeline(model=name, **trust).task
    fused = [base(**processor(wav)).pooler_output, model(**processor(wav)).fused]
    result["base_equals_fused"] = bool((fused[0] == fused[1]).all())

    result["refusals"] = []
    for load in (
        lambda: AutoConfig.from_pretrained(name),
        lambda: AutoProcessor.from_pretrained(name),
        lambda: AutoModel.from_pretrained(name),
        lambda: AutoModelForAudioClassification.from_pretrained(name),
        lambda: pipeline("audio-classification", model=name),
    ):
        try:
            load()
            result["refusals"].append("it was loaded")
        except ValueError as error:
            result["refusals"].append(str(error))

    model.push_to_hub("me/copy")
    processor.push_to_hub("me/copy")
    return result


def offline_reader(wav, checkpoints):
    """Without a network: the copy, which was downloaded once, every checkpoint folder, and a start on other labels."""
    import torch
    from transformers import AutoModelForAudioClassification, AutoProcessor, pipeline

    name, trust = "me/copy", {"trust_remote_code": True}
    model = AutoModelForAudioClassification.from_pretrained(name, **trust)
    processor = AutoProcessor.from_pretrained(name, **trust)
    classifier = pipeline("audio-classification", model=name, **trust)
    result = observe(model, processor, classifier, wav) | provenance(model, processor, classifier)
    result["checkpoints"] = []
    for folder in checkpoints:
        loaded, report = AutoModelForAudioClassification.from_pretrained(folder, output_loading_info=True, **trust)
        processor = AutoProcessor.from_pretrained(folder, **trust)
        scores = [entry["score"] for entry in pipeline("audio-classification", model=folder, **trust)(wav)]
        logits = loaded(**processor(wav)).logits
        result["checkpoints"].append(
            {
                "not_loaded": {key: sorted(map(str, names)) for key, names in report.items() if names},
                "scores": scores,
                "expected_scores": logits[0].softmax(-1).sort(descending=True).values.tolist(),
                **provenance(loaded, processor),
            }
        )

    seven = AutoModelForAudioClassification.from_pretrained(name, num_labels=7, ignore_mismatched_sizes=True, **trust)
    seven.save_pretrained("seven")
    seven = AutoModelForAudioClassification.from_pretrained("seven", **trust)
    outputs = seven(**processor(wav, "all is well"), labels=torch.tensor([6]))
    result["seven"] = {
        "labels": [seven.config.id2label[index] for index in range(seven.config.num_labels)],
        "logits": outputs.logits.tolist(),
        "loss": outputs.loss.item(),
        "openmax_is_fitted": outputs.unknown_probability is not None,
    }
    return result


# ---------------------------------------------------------------------------------------------- how the processes run

PREAMBLE = """
import json, sys

class NotInstalled:  # an editable installation would be found even without a path
    def find_spec(self, name, path=None, target=None):
        if name in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

blocked, arguments = json.loads(sys.argv[1])
sys.meta_path.insert(0, NotInstalled())
"""


def run_process(hub, home, function, installed=False, offline=False, **arguments):
    """Run `function` in a fresh process that knows only this Hub, with the package or unable to import it."""
    environment = hub.environment(home) | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": str(int(offline))}
    environment.pop("PYTHONPATH", None)
    if installed:
        environment["PYTHONPATH"] = str(ROOT)
    sources = [textwrap.dedent(inspect.getsource(part)) for part in (observe, provenance, function)]
    call = f"result = {function.__name__}(**arguments)\nprint()\nprint(json.dumps(result))"
    blocked = [] if installed else MODULES
    home.mkdir(parents=True, exist_ok=True)
    finished = subprocess.run(
        [sys.executable, "-c", "\n".join([PREAMBLE, *sources, call]), json.dumps([blocked, arguments])],
        env=environment,
        cwd=home,
        stdin=subprocess.DEVNULL,  # a person at a terminal would be asked whether to trust the code
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-5000:]
    return json.loads(finished.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def story(shared):
    """What the processes saw, and what they left on the Hub."""
    folder = shared("hub", tell_story)
    return SimpleNamespace(folder=folder, **pickle.loads((folder / "story.pickle").read_bytes()))


def tell_story(folder):
    wav = str(folder / "clip.wav")
    left = 0.3 * np.sin(2 * np.pi * 400 * np.arange(4000) / 8000)
    soundfile.write(wav, np.stack([left, 0.5 * left], axis=1), 8000)
    recipe = folder / "recipe.json"
    recipe.write_text(json.dumps(RECIPE))
    with HubServer() as hub:
        authored = run_process(hub, folder / "author", author, installed=True, wav=wav, recipe=str(recipe))
        read = run_process(hub, folder / "reader", reader, wav=wav)
        # As `hf download` does, into a home that has never seen the first repository
        cache = folder / "offline_reader" / "hub"
        snapshot_download("me/copy", endpoint=hub.endpoint, token="hf_any_token_is_accepted", cache_dir=cache)
    offline = {"wav": wav, "checkpoints": authored["checkpoints"]}
    first = hub.repositories["model", "me/mmser-tiny"]
    story = {
        "author": authored,
        "reader": read,
        "offline_reader": run_process(hub, folder / "offline_reader", offline_reader, offline=True, **offline),
        "commits": [files for files in first.commits.values() if files],
        "first": first.commits[first.head],
        "copy": hub.files("me/copy"),
        "streamed": hub.files("me/streamed"),
        "unknown_requests": hub.unknown_requests,
    }
    (folder / "story.pickle").write_bytes(pickle.dumps(story))


# ----------------------------------------------------------------------------------------------------------- the tests


def assert_close(found, expected, tolerance, where=""):
    """Compare nested dicts and lists: numbers within a tolerance, all else exactly."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_close(found[key], expected[key], tolerance, f"{where}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_close(one, other, tolerance, f"{where}/{index}")
    else:
        assert found == (pytest.approx(expected, abs=tolerance, rel=0) if isinstance(expected, float) else expected), (
            where
        )


def assert_same_model(seen, expected):
    """The model that one process saw is the one of the author."""
    assert seen["labels"] == expected["labels"] == LABELS
    assert_close(seen["numbers"]["state"], expected["numbers"]["state"], 0.0)
    for kind in ("both", "audio", "text"):
        assert_close(seen["numbers"][kind]["logits"], expected["numbers"][kind]["logits"], 1e-6, kind)
    assert_close(seen["numbers"], expected["numbers"], 1e-5)


def assert_downloaded(seen, home):
    """Every class came from the code beside its weights."""
    assert seen["imported"] == []
    assert all(module.startswith("transformers_modules.") for module in seen["modules"]), seen["modules"]
    assert all(Path(file).is_relative_to(home / "modules") for file in seen["files"]), seen["files"]
    assert {Path(file).name for file in seen["files"]} <= set(CODE_FILES)


def auto_maps(value):
    """Every `auto_map` at any depth of a JSON value."""
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    own = [value["auto_map"]] if isinstance(value, dict) and "auto_map" in value else []
    return own + [found for child in children for found in auto_maps(child)]


def test_the_hub_understood_every_request(story):
    assert story.unknown_requests == []


def test_a_data_set_on_the_hub_is_read_whole_and_as_a_stream(story):
    same = dict.fromkeys(("train", "validation", "test"), True)
    assert story.author["data"]["downloaded"] == {"same": same, "labels": LABELS}
    assert story.author["data"]["streamed"] == {"same": same, "labels": LABELS}
    assert 0 < story.author["streamed_loss"] < 100


def test_every_push_during_training_is_complete_and_without_pickles(story):
    assert len(story.commits) > 2  # the last two are of the finished model
    for files in story.commits:
        assert {"config.json", "model.safetensors", "processor_config.json", "training_args.json"} <= files.keys()
        assert {"tokenizer.json", "tokenizer_config.json", *CODE_FILES} <= files.keys()
        assert [path for path in files if path.endswith(PICKLES)] == []


def test_what_resuming_needs_is_pushed_only_on_request(story):
    """`--hub_strategy checkpoint`: optimizer and random states are pickles, and are kept apart, as are weights that
    stand beside their average."""
    assert {
        f"last-checkpoint/{name}" for name in ("config.json", "optimizer.pt", WeightAverage.file_name, *CODE_FILES)
    } <= story.streamed.keys()
    assert WeightAverage.file_name not in story.streamed
    pickles = [path for path in story.streamed if path.endswith(PICKLES)]
    assert all(path.startswith("last-checkpoint/") for path in pickles), pickles
    assert "last-checkpoint/training_args.bin" not in story.streamed


def test_the_pushed_repository_explains_itself(story):
    for name in CODE_FILES:
        assert story.first[name] == (ROOT / name).read_bytes()
    assert story.first["handler.py"] == (ROOT / "mmser" / "handler.py").read_bytes()
    assert {"requirements.txt", "eval_results.json"} <= story.first.keys()
    assert json.loads(story.first["training_args.json"])["learning_rate"] == 1e-2
    weights = safetensors.numpy.load(story.first["model.safetensors"])
    assert weights["openmax.weibull_shape"].tolist() == story.author["numbers"]["state"]["openmax.weibull_shape"]
    for path, content in story.first.items():
        assert b"hf_any_token" not in content, path


def test_the_model_card_is_ours(story):
    card = ModelCard(story.first["README.md"].decode())
    assert card.data.pipeline_tag == "audio-classification"
    assert card.data.library_name == "transformers"
    assert card.data.license is None  # it was not said what the encoders and the data allow
    assert 'pipeline("audio-classification", model="me/mmser-tiny", trust_remote_code=True)' in card.text
    assert " / ".join(LABELS) in card.text
    reported = json.loads(story.first["eval_results.json"])["test"]["model"]["weighted_f1"]
    assert card.data.eval_results[0].metric_value == pytest.approx(reported, abs=1e-4)
    assert story.reader["task_of_the_card"] == "audio-classification"


def test_loading_by_name_gives_the_model_that_was_pushed(story):
    assert_downloaded(story.reader, story.folder / "reader")
    assert_same_model(story.reader, story.author)
    assert story.reader["base_equals_fused"]


def test_the_pipeline_result_follows_from_the_logits(story):
    """Against softmax by hand: the best label first, scores that sum to one, one uncertainty for the clip."""
    for result, kind in (("path", "audio"), ("path and text", "both")):
        entries = story.reader["numbers"]["pipeline"][result]
        logits = np.array(story.reader["numbers"][kind]["logits"][0])
        probabilities = np.exp(logits) / np.exp(logits).sum()
        order = np.argsort(-probabilities)
        assert [entry["label"] for entry in entries] == [LABELS[index] for index in order]
        np.testing.assert_allclose([entry["score"] for entry in entries], probabilities[order], atol=1e-5)
    for name in ("uncertainty", "unknown_probability"):
        values = [entry[name] for entry in entries]
        assert_close(values, [story.reader["numbers"]["both"][name][0][0]] * 3, 1e-5)


def test_code_from_the_hub_runs_only_if_it_is_trusted(story):
    assert len(story.reader["refusals"]) == 5
    for message in story.reader["refusals"]:
        assert "trust_remote_code=True" in message
        assert "me/mmser-tiny" in message


def test_a_copy_pushed_from_what_was_loaded_stands_alone(story):
    """Also without a network, and without the repository that it was made of."""
    assert_downloaded(story.offline_reader, story.folder / "offline_reader")
    assert_same_model(story.offline_reader, story.author)
    for name in CODE_FILES:
        assert story.copy[name] == story.first[name]
    config, first = (json.loads(files["config.json"]) for files in (story.copy, story.first))
    for name in ("auto_map", "custom_pipelines", "id2label", "label2id", "class_counts"):
        assert config[name] == first[name], name
    assert set(first["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForAudioClassification", "AutoProcessor"}
    assert first["custom_pipelines"]["audio-classification"]["impl"] == "processing_mmser.MMSERPipeline"
    for path in (path for path in story.copy if path.endswith(".json")):
        content = json.loads(story.copy[path])
        assert "--" not in json.dumps(auto_maps(content)), path
        assert b"me/mmser-tiny" not in story.copy[path], path
    assert [path for path in story.copy if path.endswith(PICKLES)] == []
    copied, pushed = (safetensors.numpy.load(files["model.safetensors"]) for files in (story.copy, story.first))
    assert copied.keys() == pushed.keys()
    assert all(np.array_equal(copied[name], pushed[name]) for name in pushed)


def test_every_checkpoint_folder_loads_by_itself(story):
    assert [Path(folder).name for folder in story.author["checkpoints"]] == [
        "checkpoint-15",
        "checkpoint-30",
        "checkpoint-1",
    ]
    for seen, folder in zip(story.offline_reader["checkpoints"], story.author["checkpoints"], strict=True):
        assert seen["not_loaded"] == {}
        assert_downloaded(seen, story.folder / "offline_reader")
        assert all(Path(folder).name.replace("-", "_hyphen_") in module for module in seen["modules"])
        assert_close(seen["scores"], seen["expected_scores"], 1e-5)
        assert sorted(path for path in Path(folder).glob("*.bin")) == []


def test_a_trained_checkpoint_starts_on_another_number_of_labels(story):
    """The old OpenMax fit and class counts do not come along, and what is saved loads again."""
    seven = story.offline_reader["seven"]
    assert seven["labels"] == [f"LABEL_{index}" for index in range(7)]
    assert np.isfinite(seven["logits"]).all()
    assert np.shape(seven["logits"]) == (1, 7)
    assert 0 < seven["loss"] < 100
    assert not seven["openmax_is_fitted"]


def test_registered_classes_need_no_trust(story):
    assert story.author["registered"] == [True] * 5
    assert_close(story.author["registered_pipeline"], story.author["numbers"]["pipeline"]["path and text"], 1e-5)


# ----------------------------------------------------------------------------------------- checkpoints of older code

OLD = Path(__file__).parent / "data" / "old_checkpoint"


def old_weights():
    """Weights for every name that the older version saved, the same in every run."""
    rng, weights = np.random.default_rng(0), {}
    for name, shape in json.loads((OLD / "weights.json").read_text()).items():
        values = 0.3 * rng.standard_normal(shape)
        if "weibull" in name or name.endswith("scale") or (len(shape) == 1 and name.endswith("weight")):
            values = 1 + np.clip(values, -0.5, 0.5)
        weights[name] = torch.tensor(values, dtype=torch.float32)
    weights["temperature"].fill_(1.7)
    weights["openmax.fitted"].fill_(4.0)  # the mark of distances to centroids, at the level of probabilities
    return weights


def old_batch(model):
    return tiny_batch(model, [5000, 3200, 0], [4, 0, 6])


def test_a_checkpoint_of_three_code_files_loads_and_gives_its_numbers(tmp_path):
    """The settings and the names are those that the older version wrote, the numbers those that it computed."""
    for name in ("config.json", "processor_config.json"):
        shutil.copy(OLD / name, tmp_path)
    tiny_processor().tokenizer.save_pretrained(tmp_path)
    weights = old_weights()
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    model, report = MMSERForAudioClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    state = model.state_dict()
    assert state.keys() - weights.keys() == {"prediction_sets.thresholds"}  # newer; not fitted
    assert not model.prediction_sets.is_fitted and all(torch.equal(state[name], weights[name]) for name in weights)
    processor = MMSERProcessor.from_pretrained(tmp_path)
    assert processor.feature_extractor.to_dict() == tiny_processor().feature_extractor.to_dict()
    assert "text_attention_mask" in processor(np.zeros(8000), "what a joy", sampling_rate=16000)
    with torch.no_grad():
        outputs = model(**old_batch(model))
    for name, expected in json.loads((OLD / "outputs.json").read_text()).items():
        np.testing.assert_allclose(outputs[name].float(), expected, rtol=1e-4, atol=1e-5, err_msg=name)


def test_code_of_an_older_version_is_replaced_and_not_run(tmp_path):
    """Three files of older code in the folder of a checkpoint, beside new ones or alone."""
    model, processor = tiny_model(), tiny_processor()
    old_files = ("configuration_mmser.py", "modeling_mmser.py", "processing_mmser.py")
    for name in old_files:
        (tmp_path / name).write_text("raise ImportError('of an older version')\n")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == set(CODE_FILES)
    for name in CODE_FILES:
        assert (tmp_path / name).read_bytes() == (ROOT / name).read_bytes()

    register_auto_classes()
    for name in old_files:
        (tmp_path / name).write_text("raise ImportError('of an older version')\n")
    for trust in (None, True):
        loaded = AutoModelForAudioClassification.from_pretrained(tmp_path, trust_remote_code=trust)
        assert type(loaded) is MMSERForAudioClassification
    assert type(MMSERProcessor.from_pretrained(tmp_path)) is MMSERProcessor
