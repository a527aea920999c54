# SPDX-License-Identifier: Apache-2.0
"""Tests of configuration_mmser: defaults, label maps, refusals, round trips, and what a saved `config.json` says."""

import dataclasses
import inspect
import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from tiny import AUDIO_CONFIGS, tiny_config
from transformers import BertConfig, Wav2Vec2Config

import configuration_mmser
from configuration_mmser import AUTO_MAP, CHECKS, CUSTOM_PIPELINES, MMSERConfig
from mmser.model_card import _loss_table


def test_defaults_are_the_design():
    config = MMSERConfig()
    assert config.id2label == {0: "neutral", 1: "happy", 2: "sad", 3: "angry"}
    assert config.label2id == {"neutral": 0, "happy": 1, "sad": 2, "angry": 3}
    assert config.num_labels == 4
    audio, text = config.audio_config, config.text_config
    assert isinstance(audio, Wav2Vec2Config) and isinstance(text, BertConfig)
    # The shapes of facebook/wav2vec2-base and google-bert/bert-base-multilingual-cased
    assert (audio.hidden_size, audio.num_hidden_layers, audio.feat_extract_norm) == (768, 12, "group")
    assert (text.hidden_size, text.num_hidden_layers, text.vocab_size) == (768, 12, 119547)
    assert (config.cross_attention_hidden_size, config.cross_attention_heads) == (256, 8)
    assert config.fusion_norm == "standardization" and config.use_weighted_layer_sum
    assert (config.fusion_hidden_size, config.feature_size, config.anchor_size) == (512, 256, 128)
    assert (config.classifier_num_layers, config.classifier_hidden_size, config.classifier_dropout) == (35, 512, 0.15)
    assert config.classifier_checkpoint_interval == 5
    assert (config.cross_entropy_loss_weight, config.focal_loss_weight, config.anchor_loss_weight) == (1.0, 0.3, 0.1)
    assert (config.uncertainty_loss_weight, config.prototype_loss_weight) == (0.05, 0.01)
    assert (config.supervised_contrastive_loss_weight, config.distillation_loss_weight) == (0, 0)
    assert (config.label_smoothing, config.class_balanced_beta, config.focal_gamma) == (0.1, 0.9999, 2)
    assert (config.openmax_distance, config.openmax_centroids_per_class) == ("centroid", 32)
    assert (config.openmax_level, config.openmax_alpha, config.openmax_tail_size) == ("probability", 3, 20)
    assert (config.openmax_acceptance, config.openmax_threshold) == (0.95, "fitted")
    assert not config.uses_log_mel


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"num_labels": 4}, ["neutral", "happy", "sad", "angry"]),
        ({"num_labels": 7}, [f"LABEL_{i}" for i in range(7)]),
        ({"id2label": {0: "calm", 1: "tense"}}, ["calm", "tense"]),
        ({"id2label": {"0": "calm", "1": "tense"}}, ["calm", "tense"]),
        ({"label2id": {"calm": 0, "tense": 1}}, ["calm", "tense"]),
        ({"id2label": {0: "calm", 1: "tense"}, "label2id": {"calm": 0, "tense": 1}}, ["calm", "tense"]),
    ],
)
def test_labels(given, expected):
    config = tiny_config(**given)
    assert config.num_labels == len(expected)
    assert config.id2label == dict(enumerate(expected))
    assert config.label2id == {label: i for i, label in enumerate(expected)}
    again = MMSERConfig.from_dict(json.loads(config.to_json_string()))
    assert (again.id2label, again.label2id) == (config.id2label, config.label2id)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"audio_config": {"model_type": "bert"}}, "bert.*supported are wav2vec2.*whisper"),
        ({"audio_config": {"model_type": "no-such-type"}}, "no-such-type"),
        ({"audio_config": {"model_type": "wav2vec2", "add_adapter": True}}, "add_adapter"),
        ({"audio_config": "wav2vec2"}, "audio_config"),
        ({"text_config": {"model_type": "no-such-type"}}, "no-such-type"),
        ({"feature_size": 0}, "`feature_size` must be greater than 0, got 0"),
        ({"feature_size": "wide"}, "feature_size"),
        ({"anchor_temperature": 0.0}, "`anchor_temperature` must be greater than 0"),
        ({"openmax_alpha": 0}, "`openmax_alpha` must be greater than 0"),
        ({"openmax_centroids_per_class": 0}, "`openmax_centroids_per_class` must be greater than 0, got 0"),
        ({"fusion_norm": "batch_norm"}, "`fusion_norm` must be one of standardization, layer_norm, got 'batch_norm'"),
        ({"openmax_distance": "mean"}, "`openmax_distance` must be one of centroid, anchor, got 'mean'"),
        ({"openmax_level": "logit"}, "`openmax_level` must be one of probability, activation, got 'logit'"),
        ({"openmax_acceptance": 1.0}, r"`openmax_acceptance` must be None or in \(0, 1\), got 1.0"),
        ({"openmax_acceptance": 0.0}, r"`openmax_acceptance` must be None or in \(0, 1\), got 0.0"),
        ({"openmax_tail_size": 4}, "`openmax_tail_size` must be at least 5, got 4"),
        ({"classifier_num_layers": -1}, "`classifier_num_layers` must be 0 or more, got -1"),
        ({"classifier_checkpoint_interval": 0}, "classifier_checkpoint_interval"),
        ({"classifier_dropout": 1.0}, r"`classifier_dropout` must be in \[0, 1\), got 1.0"),
        ({"classifier_drop_path_rate": 1.0}, r"`classifier_drop_path_rate` must be in \[0, 1\), got 1.0"),
        ({"label_smoothing": -0.1}, "label_smoothing"),
        ({"focal_loss_weight": -1}, "`focal_loss_weight` must be 0 or more, got -1"),
        ({"class_balanced_beta": 1.0}, "class_balanced_beta"),
        ({"cross_attention_heads": 7}, "multiple of `cross_attention_heads`"),
        ({"openmax_threshold": 1.5}, r'`openmax_threshold` must be "fitted", None or in \[0, 1\], got 1.5'),
        ({"openmax_threshold": "fited"}, r"""`openmax_threshold` must be "fitted", .*, got 'fited'"""),
        ({"class_counts": [5, 6]}, "`class_counts` has 2 entries but the model has 4 labels"),
    ],
)
def test_bad_values_are_refused_by_name(given, message):
    """`StrictDataclassError` is how the library reports what a strict configuration's own checks raise."""
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        MMSERConfig(**given)


def own_numbers():
    """The fields of our own that hold a number."""
    defaults = {field.name: field.default for field in dataclasses.fields(MMSERConfig)}
    own = {name: defaults.get(name) for name in inspect.get_annotations(MMSERConfig)}
    return {name for name, value in own.items() if isinstance(value, (int, float)) and not isinstance(value, bool)}


def test_every_number_is_checked():
    assert own_numbers() <= {name for names, _, _ in CHECKS for name in names}


def test_every_weight_of_the_loss_is_in_the_card():
    weights = {name: float(10 + i) for i, name in enumerate(sorted(own_numbers())) if name.endswith("_loss_weight")}
    table = _loss_table(MMSERConfig(**weights, auxiliary_tasks={"arousal": "regression"}))
    assert len(weights) >= 5 and all(f"| {weight:g} " in table for weight in weights.values())


def test_a_bad_value_set_later_is_refused_when_saving(tmp_path):
    config = tiny_config()
    config.feature_size = 0
    with pytest.raises(StrictDataclassError, match="feature_size"):
        config.save_pretrained(tmp_path)


def test_switching_parts_off_is_allowed():
    off = {"openmax_threshold": None, "openmax_acceptance": None}
    config = tiny_config(classifier_num_layers=0, class_counts=[1, 0, 3, 4], focal_loss_weight=0, **off)
    assert config.openmax_threshold is None and config.openmax_acceptance is None
    assert config.class_counts == [1, 0, 3, 4]


@pytest.mark.parametrize("kind", AUDIO_CONFIGS)
def test_round_trip_keeps_every_value(kind, tmp_path):
    openmax = {"openmax_threshold": None, "openmax_acceptance": None}
    openmax |= {"openmax_distance": "anchor", "openmax_level": "activation"}  # as published
    config = tiny_config(
        kind, feature_size=24, class_counts=[1, 2, 3], num_labels=3, fusion_norm="layer_norm", **openmax
    )
    config.save_pretrained(tmp_path)
    for again in (
        MMSERConfig.from_pretrained(tmp_path),
        MMSERConfig.from_dict(config.to_dict()),
        MMSERConfig.from_dict(json.loads(config.to_json_string(use_diff=False))),
    ):
        assert type(again.audio_config) is type(config.audio_config)
        assert again.feature_size == 24 and again.fusion_norm == "layer_norm" and again.class_counts == [1, 2, 3]
        assert {name: getattr(again, name) for name in openmax} == openmax
        ignored = {"_name_or_path", "transformers_version"}
        old, new = ({k: v for k, v in c.to_dict().items() if k not in ignored} for c in (config, again))
        assert new == old


@pytest.mark.parametrize("kind", ["wav2vec2", "whisper"])
def test_layers_are_never_dropped(kind):
    name = "encoder_layerdrop" if kind == "whisper" else "layerdrop"
    assert getattr(tiny_config(kind, audio={name: 0.5}).audio_config, name) == 0.0
    assert Wav2Vec2Config().layerdrop > 0
    assert MMSERConfig().audio_config.layerdrop == 0.0


def test_log_mel_family():
    assert [kind for kind in AUDIO_CONFIGS if tiny_config(kind).uses_log_mel] == ["whisper"]


def test_saved_config_points_at_the_code_beside_it(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "mmser"
    assert saved["auto_map"] == {
        "AutoConfig": "configuration_mmser.MMSERConfig",
        "AutoModel": "modeling_mmser.MMSERModel",
        "AutoModelForAudioClassification": "modeling_mmser.MMSERForAudioClassification",
        "AutoProcessor": "processing_mmser.MMSERProcessor",
    }
    assert saved["custom_pipelines"]["audio-classification"]["impl"] == "processing_mmser.MMSERPipeline"


def test_auto_map_never_keeps_a_repository_prefix(tmp_path, monkeypatch):
    """Loading from the Hub writes `user/repo--` before each entry: pushed elsewhere, that would run the old code."""
    monkeypatch.setattr(MMSERConfig, "is_registered", False)
    saved = tiny_config().to_dict()
    saved["auto_map"] = {name: f"someone/somewhere--{target}" for name, target in AUTO_MAP.items()}
    saved["custom_pipelines"]["audio-classification"]["impl"] = "someone/somewhere--processing_mmser.MMSERPipeline"
    config = MMSERConfig.from_dict(saved)
    config.save_pretrained(tmp_path)
    assert config.auto_map == AUTO_MAP and config.custom_pipelines == CUSTOM_PIPELINES
    assert "someone" not in (tmp_path / "config.json").read_text()


def test_two_configurations_share_no_state(monkeypatch):
    monkeypatch.setattr(MMSERConfig, "is_registered", False)
    first, second = tiny_config(), tiny_config()
    first.auto_map["AutoModel"] = first.custom_pipelines["audio-classification"]["impl"] = "changed"
    first.id2label[0] = "changed"
    assert second.auto_map == AUTO_MAP == tiny_config().auto_map
    assert second.custom_pipelines == CUSTOM_PIPELINES
    assert second.id2label[0] == tiny_config().id2label[0] == "neutral"


def test_a_removed_field_is_refused_unless_it_has_the_only_value():
    assert not hasattr(MMSERConfig(supervised_contrastive_temperature=0.1), "supervised_contrastive_temperature")
    with pytest.raises(ValueError, match=r"cannot be set any more: it is 0\.1"):
        MMSERConfig(supervised_contrastive_temperature=0.3)


def test_a_misspelt_field_is_warned_of_and_fields_of_other_versions_are_not(monkeypatch):
    """Transformers keeps unknown names as attributes without a word; refused, old checkpoints would not load."""
    messages = []
    monkeypatch.setattr(configuration_mmser.logger, "warning_once", messages.append)
    config = MMSERConfig(clasifier_dropout=0.5)
    assert messages == ["`clasifier_dropout` is no field of MMSERConfig: did you mean `classifier_dropout`?"]
    assert config.classifier_dropout == 0.15
    MMSERConfig.from_dict({**config.to_dict(), "clasifier_dropout": 0.5})
    assert len(messages) == 2
    MMSERConfig(gone_with_another_version=1, num_labels=3, torch_dtype="float16")
    MMSERConfig.from_dict(MMSERConfig().to_dict())
    assert len(messages) == 2


def test_a_misspelt_field_is_warned_of_when_a_checkpoint_is_loaded(monkeypatch, tmp_path):
    messages = []
    monkeypatch.setattr(configuration_mmser.logger, "warning_once", messages.append)
    tiny_config().save_pretrained(tmp_path)
    MMSERConfig.from_pretrained(tmp_path, openmax_threshold=0.2, num_labels=4)
    assert not messages
    MMSERConfig.from_pretrained(tmp_path, openmax_treshold=0.2)
    assert messages == ["`openmax_treshold` is no field of MMSERConfig: did you mean `openmax_threshold`?"]


@pytest.mark.parametrize("value", ["fited", 1.5, -0.1])
def test_a_bad_threshold_that_was_set_later_is_refused_where_it_is_read(value):
    config = tiny_config()
    config.openmax_threshold = value
    with pytest.raises(ValueError, match='`openmax_threshold` must be "fitted", None or in'):
        config.rejection_probability  # noqa: B018


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"0": "calm", "2": "loud"}, r"ids of `id2label` must be 0 to 1 .* got \[0, 2\]"),
        ({1: "calm", 2: "loud"}, r"ids of `id2label` must be 0 to 1 .* got \[1, 2\]"),
        ({0: "calm", 1: "loud", 2: "calm"}, r"`id2label` has the name 'calm' twice"),
    ],
)
def test_labels_with_gaps_or_names_twice_are_refused(labels, message, tmp_path):
    config = tiny_config()
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        MMSERConfig(id2label=labels)
    with pytest.raises(ValueError, match=message):
        MMSERConfig.from_pretrained(tmp_path, id2label=labels)
    old = config.to_dict() | {"id2label": {str(i): label for i, label in labels.items()}, "label2id": None}
    assert MMSERConfig.from_dict(old).num_labels == len(labels)  # what was saved with them loads as it did


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        (
            {"id2label": {"first": "calm", "1": "loud"}},
            ValueError,
            r"ids of `id2label` must be whole numbers, got \['f",
        ),
        ({"label2id": {"calm": "0", "loud": None}}, ValueError, r"ids of `label2id` must be whole numbers, got \['0'"),
        ({"id2label": {0: ["calm"], 1: "loud"}}, TypeError, "`id2label` must have one name for each id"),
    ],
)
def test_labels_that_are_no_ids_and_names_are_refused(fields, kind, message):
    with pytest.raises(kind, match=message):
        MMSERConfig(**fields)


@pytest.mark.parametrize(
    ("modality", "key", "value"),
    [
        ("text", "vocab_size", 0),
        ("text", "hidden_size", -16),
        ("audio", "hidden_size", 0),
        ("audio", "num_attention_heads", 0),
        ("audio", "num_conv_pos_embeddings", 0),
        ("audio", "num_conv_pos_embedding_groups", 0),
    ],
)
def test_an_encoder_of_nothing_is_refused_by_its_field(modality, key, value):
    """PyTorch and Transformers divided by zero, or looked up an index that was not there."""
    encoder = getattr(tiny_config(), f"{modality}_config").to_dict() | {key: value}
    with pytest.raises(StrictDataclassError, match=rf"`{modality}_config\.{key}` must be at least 1, got"):
        MMSERConfig(**{f"{modality}_config": encoder})


def test_names_of_fields_can_be_checked():
    MMSERConfig.check_fields(["feature_size", "num_labels", "id2label", "label2id", "problem_type"])
    with pytest.raises(TypeError, match="`feature_sise` is no field of MMSERConfig: did you mean `feature_size`"):
        MMSERConfig.check_fields(["num_labels", "feature_sise"])


@pytest.mark.parametrize("labels", [{"0": "calm", "1": "loud"}, {0: "calm", 1: "loud"}])
def test_ids_of_labels_may_be_strings(labels, tmp_path):
    """As JSON has them."""
    tiny_config().save_pretrained(tmp_path)
    for config in (MMSERConfig(id2label=labels), MMSERConfig.from_pretrained(tmp_path, id2label=labels)):
        assert config.id2label == {0: "calm", 1: "loud"} and config.label2id == {"calm": 0, "loud": 1}
        assert config.num_labels == 2
    config = MMSERConfig(label2id={"calm": "0", "loud": "1"})
    assert config.id2label == {0: "calm", 1: "loud"} and config.label2id == {"calm": 0, "loud": 1}
