# SPDX-License-Identifier: Apache-2.0
"""MMSER in the hands of stock Transformers: its `pipeline`, its pipeline class, its `Auto*` classes.

What comes out is compared with the model called directly. That no code of a checkpoint is run is tested in
`test_hub.py`, in fresh processes.
"""

import pickle

import numpy as np
import pytest
import torch
from tiny_corpus import tiny_model, tiny_processor
from transformers import (
    AudioClassificationPipeline,
    AutoModelForAudioClassification,
    AutoProcessor,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForSequenceClassification,
    pipeline,
)

from configuration_mmser import CUSTOM_PIPELINES, MMSERConfig
from modeling_mmser import MMSERForAudioClassification, register_auto_classes
from processing_mmser import MMSERPipeline, MMSERProcessor

RATE = 16000
TASK = "audio-classification"
TEXT = "what a joy"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return tiny_model().eval()


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model, processor):
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clips():
    rng = np.random.default_rng(0)
    return [
        {"raw": rng.standard_normal(length).astype("float32"), "sampling_rate": RATE} for length in (8000, 5000, 700)
    ]


@pytest.fixture
def unregistered(monkeypatch):
    monkeypatch.setattr(MMSERConfig, "is_registered", False)


def expected(model, processor, clip, text=None):
    """label -> probability, by the model itself."""
    with torch.no_grad():
        logits = model(**processor(clip["raw"], text, sampling_rate=RATE)).logits[0]
    return dict(zip(model.config.label2id, logits.softmax(-1).tolist(), strict=True))


def scores(entries):
    return {entry["label"]: entry["score"] for entry in entries}


# --------------------------------------------------------------------------------------------- the library's own class


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_the_class_of_transformers_batches(model, processor, clips, batch_size):
    stock = AudioClassificationPipeline(model=model, feature_extractor=processor.feature_extractor, device="cpu")
    for clip, entries in zip(clips, stock(clips, batch_size=batch_size), strict=True):
        assert scores(entries) == pytest.approx(expected(model, processor, clip), abs=1e-5)


def test_no_output_without_labels_is_a_scalar(model, processor, clips):
    """A pipeline takes row i of each output."""
    outputs = model(**processor([clips[0]["raw"], clips[1]["raw"]], [TEXT, None], sampling_rate=RATE))
    assert [name for name, value in outputs.items() if isinstance(value, torch.Tensor) and value.ndim == 0] == []


# ----------------------------------------------------------------------------------------------------- `pipeline(...)`


def test_a_model_and_its_processor_in_memory(model, processor, clips):
    classifier = pipeline(TASK, model=model, processor=processor, device="cpu")
    assert type(classifier) is MMSERPipeline
    both = {**clips[0], "text": TEXT}
    assert scores(classifier(both)) == pytest.approx(expected(model, processor, clips[0], TEXT), abs=1e-6)
    assert classifier(both) != classifier(clips[0])
    for clip, entries in zip(clips, classifier(clips, batch_size=2), strict=True):
        assert scores(entries) == pytest.approx(expected(model, processor, clip), abs=1e-5)


def test_the_parts_of_a_processor_or_its_folder_will_do(model, processor, folder, clips):
    parts = {"feature_extractor": processor.feature_extractor, "tokenizer": processor.tokenizer}
    loaded = MMSERForAudioClassification.from_pretrained(folder)
    for classifier in (
        pipeline(TASK, model=model, **parts),
        pipeline(TASK, model=model, processor=str(folder)),
        pipeline(TASK, model=loaded),  # the processor lies beside its weights
        pipeline(TASK, model=loaded, feature_extractor=processor.feature_extractor),
    ):
        assert type(classifier) is MMSERPipeline
        entries = classifier({**clips[0], "text": TEXT})
        assert scores(entries) == pytest.approx(expected(model, processor, clips[0], TEXT), abs=1e-5)
    with pytest.raises(ValueError, match=r"`processor` is needed: .*pass `processor=`"):
        pipeline(TASK, model=model)


def test_workers_need_no_weights(model, processor, clips, monkeypatch):
    """Where processes are spawned (Windows, macOS, Python 3.14) what they need is pickled; wav2vec2 cannot be."""
    with pytest.raises(RuntimeError, match="parametrized modules"):
        pickle.dumps(model)
    sent = []

    class Loader(torch.utils.data.DataLoader):
        def __init__(self, dataset, **options):
            sent.append(pickle.dumps((dataset, options["collate_fn"])))
            super().__init__(dataset, **options)

    monkeypatch.setattr(torch.utils.data, "DataLoader", Loader)
    classifier = pipeline(TASK, model=model, processor=processor)
    for clip, entries in zip(clips, classifier(clips, num_workers=1, batch_size=2), strict=True):
        assert scores(entries) == pytest.approx(expected(model, processor, clip), abs=1e-5)
    dataset, collate = pickle.loads(sent[0])
    assert set(collate([dataset[0], dataset[1]])) == {"input_values", "attention_mask"}


def test_saving_works_after_a_pipeline_was_made(unregistered, folder, tmp_path):
    """`pipeline` writes classes into `config.custom_pipelines`, which are no JSON."""
    model = MMSERForAudioClassification.from_pretrained(folder)
    assert model.config.custom_pipelines == CUSTOM_PIPELINES
    pipeline(TASK, model=str(folder), config=model.config, trust_remote_code=True)
    model.save_pretrained(tmp_path)
    assert MMSERConfig.from_pretrained(tmp_path).to_dict()["custom_pipelines"] == CUSTOM_PIPELINES


def test_a_saved_pipeline_is_complete(model, processor, clips, tmp_path):
    pipeline(TASK, model=model, processor=processor).save_pretrained(tmp_path)
    assert (tmp_path / "processing_mmser.py").exists()  # the code for those who have no MMSER
    classifier = pipeline(TASK, model=str(tmp_path), trust_remote_code=True, local_files_only=True)
    entries = classifier({**clips[0], "text": TEXT})
    assert scores(entries) == pytest.approx(expected(model, processor, clips[0], TEXT), abs=1e-5)


# --------------------------------------------------------------------------------------------- `register_auto_classes`


def test_registered_a_name_needs_no_trust_and_the_text_counts(model, processor, folder, clips):
    register_auto_classes()
    assert type(AutoModelForAudioClassification.from_pretrained(folder)) is MMSERForAudioClassification
    assert type(AutoProcessor.from_pretrained(folder)) is MMSERProcessor
    for trust in ({}, {"trust_remote_code": True}, {"trust_remote_code": False}):
        classifier = pipeline(TASK, model=str(folder), **trust)
        assert type(classifier) is MMSERPipeline and type(classifier.model) is MMSERForAudioClassification
        entries = classifier({**clips[0], "text": TEXT})
        assert scores(entries) == pytest.approx(expected(model, processor, clips[0], TEXT), abs=1e-5)


def test_registered_what_is_saved_still_carries_its_code(folder, tmp_path):
    register_auto_classes()
    model = MMSERForAudioClassification.from_pretrained(folder)
    assert model.config.custom_pipelines == {}
    model.save_pretrained(tmp_path)
    assert '"processing_mmser.MMSERPipeline"' in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("registered", [False, True])
def test_other_models_get_what_they_always_got(tmp_path, clips, registered):
    if registered:
        register_auto_classes()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = Wav2Vec2Config(**sizes, conv_dim=[8] * 7, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
    other, extractor = Wav2Vec2ForSequenceClassification(config).eval(), Wav2Vec2FeatureExtractor()
    other.save_pretrained(tmp_path)
    by_hand = AudioClassificationPipeline(model=other, feature_extractor=extractor, device="cpu")(clips[0])
    with pytest.raises(OSError, match="preprocessor_config"):
        pipeline(TASK, model=str(tmp_path))
    extractor.save_pretrained(tmp_path)
    for options in ({"model": str(tmp_path)}, {"model": other, "feature_extractor": extractor}):
        classifier = pipeline(TASK, **options)
        assert type(classifier) is AudioClassificationPipeline
        assert scores(classifier(clips[0])) == pytest.approx(scores(by_hand), abs=1e-6)
    with pytest.raises(ValueError, match="`feature_extractor` is needed"):
        pipeline(TASK, model=other)


# ---------------------------------------------------------------------------------------------------- unknown keywords


def test_an_unknown_option_is_an_error_with_the_nearest_name(model, processor, clips):
    classifier = MMSERPipeline(model=model, processor=processor)
    with pytest.raises(TypeError, match=r"`topk` is no option of the pipeline: did you mean `top_k`\?"):
        classifier(clips[0], topk=1)
    with pytest.raises(TypeError, match=r"`return_uncertainy` .* did you mean `return_uncertainty`\?"):
        pipeline(TASK, model=model, processor=processor, return_uncertainy=True)
    with pytest.raises(TypeError, match=r"`words` is no argument .* the nearest names are `\w+`, `\w+`, `\w+`\.$"):
        processor(clips[0]["raw"], words=TEXT, sampling_rate=RATE)
    with pytest.raises(
        TypeError, match=r"`sample_rate` is no argument of the processor: did you mean `sampling_rate`\?"
    ):
        processor(clips[0]["raw"], sample_rate=RATE)


def test_a_model_saved_alone_has_the_code_that_its_configuration_names(model, processor, folder, tmp_path):
    """As the stock Trainer saves it, which knows no processor: this may be added later, from anywhere."""
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.glob("*.py")} == {file.name for file in folder.glob("*.py")}
    named = {name.split(".")[0] for name in model.config.auto_map.values()}
    named |= {options["impl"].split(".")[0] for options in CUSTOM_PIPELINES.values()}
    assert named <= {file.stem for file in tmp_path.glob("*.py")}
