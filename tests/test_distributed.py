# SPDX-License-Identifier: Apache-2.0
"""Tests of the files in `recipes/accelerate`, and of what sharding changes in a model.

Two processes with whole weights (DDP) are in `test_trainer.py`.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file  # type: ignore[import-untyped]
from accelerate.commands.launch import launch_command_parser  # type: ignore[import-untyped]
from accelerate.utils.deepspeed import HfDeepSpeedConfig as DeepSpeedSettings  # type: ignore[import-untyped]
from tiny_corpus import AUDIO, JOINT, TEXT, tiny_model
from transformers import BertConfig, Wav2Vec2Config
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from mmser.sharding import make_shardable, own_class, whole_weights
from mmser.training_arguments import MMSERTrainingArguments
from modeling_mmser import MMSERForAudioClassification

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes" / "accelerate"

# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_each_recipe_as_it_is_meant(recipe, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config_from_file(str(recipe))
    assert config.num_processes == 2 and config.mixed_precision in (None, "no")
    kind = recipe.stem.split("_")[0]
    assert str(config.distributed_type.value) == {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed": "DEEPSPEED"}[kind]
    if kind == "fsdp2":
        assert config.fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT"
        known = {action.dest for action in launch_command_parser()._actions}
        assert set(config.fsdp_config) <= known
    if kind == "deepspeed":
        settings = ROOT / config.deepspeed_config["deepspeed_config_file"]
        assert settings.stem == recipe.stem and settings.is_file()
    assert f"accelerate launch --config_file recipes/accelerate/{recipe.name} " in recipe.read_text()


class FilledConfig(HfTrainerDeepSpeedConfig, DeepSpeedSettings):
    """The class of Transformers, over that of Accelerate also where DeepSpeed is missing."""

    def __init__(self, file):
        DeepSpeedSettings.__init__(self, file)
        self._dtype, self.mismatches = None, []


@pytest.mark.parametrize("stage", [2, 3])
def test_the_settings_of_deepspeed_fit_the_flags_of_training(stage, tmp_path):
    """As Transformers fills them in, which needs no DeepSpeed: no `auto` is left, and nothing contradicts a flag."""
    config = FilledConfig(str(RECIPES / f"deepspeed_zero{stage}.json"))
    arguments = MMSERTrainingArguments(output_dir=str(tmp_path), use_cpu=True, gradient_accumulation_steps=2)
    audio_alone = MMSERForAudioClassification.from_backbones(Wav2Vec2Config(**AUDIO), None, **JOINT)
    config.trainer_config_process(arguments)
    config.trainer_config_finalize(arguments, audio_alone, num_training_steps=10)
    assert "auto" not in json.dumps(config.config)
    assert config.config["zero_optimization"]["stage"] == stage
    assert config.config["gradient_accumulation_steps"] == 2
    assert config.config["gradient_clipping"] == arguments.max_grad_norm
    assert config.config["train_micro_batch_size_per_gpu"] == arguments.per_device_train_batch_size


@pytest.mark.parametrize("modalities", ["audio text", "audio"])
def test_a_model_is_made_shardable_and_saved_as_it_was(modalities):
    """FSDP takes no parameter that is a single number, nor names of blocks that the model lacks."""
    text = BertConfig(vocab_size=9, **TEXT) if "text" in modalities else None
    model = MMSERForAudioClassification.from_backbones(Wav2Vec2Config(**AUDIO), text, **JOINT)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    plugin = SimpleNamespace(transformer_cls_names_to_wrap=None)
    scalars = make_shardable(plugin, model)
    assert scalars == {name for name, weight in model.named_parameters() if before[name].ndim == 0} != set()
    assert all(weight.ndim > 0 for weight in model.parameters())
    present = {type(module).__name__ for module in model.modules()}
    assert set(plugin.transformer_cls_names_to_wrap) <= present and plugin.transformer_cls_names_to_wrap
    assert ("BertLayer" in plugin.transformer_cls_names_to_wrap) == (text is not None)
    assert (model.get_input_embeddings() is None) == (text is None)
    saved = whole_weights(model.state_dict(), scalars)
    assert saved.keys() == before.keys()
    assert all(torch.equal(saved[name], weight) for name, weight in before.items())
    chosen = SimpleNamespace(transformer_cls_names_to_wrap=["ResidualBlock"])
    make_shardable(chosen, model)
    assert chosen.transformer_cls_names_to_wrap == ["ResidualBlock"]


def test_what_fsdp_wraps_is_saved_under_its_own_class():
    model = tiny_model()
    own = type(model)
    model.__class__ = type(f"FSDP{own.__name__}", (own,), {"__module__": "torch.distributed.fsdp"})
    with own_class(model):
        assert type(model) is own
    assert type(model).__name__ == f"FSDP{own.__name__}"
