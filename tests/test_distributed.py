# SPDX-License-Identifier: Apache-2.0
"""Tests of the files in `recipes/accelerate`, of what sharding changes in a model, and of training with FSDP2.

Two processes with whole weights (DDP) are in `test_trainer.py`.
"""

import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from accelerate.commands.config.config_args import load_config_from_file  # type: ignore[import-untyped]
from accelerate.commands.launch import launch_command_parser  # type: ignore[import-untyped]
from accelerate.utils import DistributedType
from accelerate.utils.deepspeed import HfDeepSpeedConfig as DeepSpeedSettings  # type: ignore[import-untyped]
from safetensors.torch import load_file
from test_trainer import DETERMINISTIC, load_splits, make_trainer
from tiny_corpus import AUDIO, JOINT, TEXT, tiny_flags, tiny_model
from transformers import BertConfig, Trainer, Wav2Vec2Config
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

import train_hf
from mmser.sharding import make_shardable, own_class, whole_weights
from mmser.trainer import MMSERTrainer
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


# --- FSDP2 -----------------------------------------------------------------------------------------------------------

# What `tiny_flags` says of a new model
OF_A_NEW_MODEL = dict.fromkeys(
    (
        "random_audio_encoder",
        "audio_config_overrides",
        "random_text_encoder",
        "text_config_overrides",
        "config_overrides",
    )
)


def run(corpus, start, output_dir, batch_size, **flags):
    """`train_hf.py` on 29 clips: of the last five of an epoch, the second of two processes has one."""
    flags = {
        **OF_A_NEW_MODEL,
        **DETERMINISTIC,
        "learning_rate": 5e-3,
        "optim_args": "momentum=0.9",
        "model_name_or_path": start,
        "ood_dir": Path(corpus) / "ood",
        "max_train_samples": 29,
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": 3,
        "max_steps": 6,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "steps",
        "save_steps": 3,
        **flags,
    }
    train_hf.main(tiny_flags(corpus, output_dir, None, **flags))


def read(path):
    """A file of results without what names the run, what a clock gave, and what depends on padding."""
    others = ("time", "_per_second", "model_name", "command", "total_flos")

    def kept(value):
        if isinstance(value, list):
            return [kept(each) for each in value]
        if not isinstance(value, dict):
            return value
        names = [name for name in value if not name.endswith(others)]
        return {name: kept(value[name]) for name in names}

    return kept(json.loads(path.read_text()))


def like(value):
    """What is equal to a value, its numbers to the four digits of the log."""
    if isinstance(value, list):
        return [like(each) for each in value]
    if isinstance(value, dict):
        return {name: like(own) for name, own in value.items()}
    return pytest.approx(value, abs=2e-4, rel=1e-4) if isinstance(value, float) else value


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def largest_difference(first, second):
    """Of two models, relative where numbers are larger than 1, as those of a Weibull are."""
    first, second = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert first.keys() == second.keys()
    return max(((own - second[name]).abs() / own.abs().clamp(min=1)).max().item() for name, own in first.items())


def prepare_processes(corpus, folder):
    torch.manual_seed(0)
    flags = {"learning_rate": 5e-3, "max_steps": 60, "lr_multipliers": {"audio_encoder": 1.0, "text_encoder": 1.0}}
    start = make_trainer(tiny_model(dropout=False), load_splits(corpus), folder / "start", **flags)
    start.train()  # until it knows enough clips for OpenMax
    start.save_model()


def run_process(corpus, folder):
    """With the settings of the recipe: the training of six steps, and one that goes on from its step 3."""
    recipe = load_config_from_file(str(RECIPES / "fsdp2.yaml")).fsdp_config
    os.environ.update({name.upper(): str(value) for name, value in recipe.items()}, ACCELERATE_USE_FSDP="true")
    make_accelerator = Trainer.create_accelerator_and_postprocess

    def make_sharding_accelerator(trainer):
        assert trainer.args.device.type == "cpu" and trainer.args.world_size == 2  # and the processes are connected
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU  # else Accelerate does not shard
        make_accelerator(trainer)
        assert trainer.accelerator.is_fsdp2

    Trainer.create_accelerator_and_postprocess = make_sharding_accelerator
    rank = int(os.environ["RANK"])
    whole, resumed = (folder / f"{name}{rank}" for name in ("rank", "resumed"))  # it shows what each process writes
    for step in (3, 6) if rank else ():
        for run_folder in (whole, resumed):  # else Transformers takes it that there is no best checkpoint
            (run_folder / f"checkpoint-{step}").mkdir(parents=True)
    run(corpus, folder / "start", whole, 4)
    torch.distributed.barrier()
    if rank == 0:
        shutil.copytree(whole, folder / "both")
        shutil.copytree(folder / "rank1", folder / "both", dirs_exist_ok=True)
    torch.distributed.barrier()
    run(corpus, folder / "start", resumed, 4, resume_from_checkpoint=folder / "both" / "checkpoint-3")


@pytest.fixture(scope="module")
def runs(two_processes, shared):
    """
    The same training by `one` process, by two with FSDP2 (what each wrote in `rank0` and `rank1`, and in `both`), and
    by two that go on from its step 3 (`resumed0`).
    """
    corpus, start = two_processes.parent / "corpus", two_processes / "start"
    shared("fsdp_one", lambda folder: run(corpus, start, two_processes / "one", 8))
    return two_processes


def test_two_processes_with_fsdp_train_as_one(runs):
    one, two = (read(runs / name / "trainer_state.json")["log_history"] for name in ("one", "both"))
    assert sum("loss" in line for line in one) == 6 and sum("eval_loss" in line for line in one) == 2
    assert two == like(one)
    assert largest_difference(runs / "start", runs / "one" / "checkpoint-3") > 1e-3
    for name in ("checkpoint-3", "checkpoint-6", "."):  # the last one with all that is fitted to outputs
        assert largest_difference(runs / "both" / name, runs / "one" / name) < 1e-4


def test_what_fsdp_ends_with_is_that_of_one_process(runs):
    fitted = MMSERForAudioClassification.from_pretrained(runs / "both")
    assert fitted.openmax.is_fitted and sum(fitted.config.class_counts) == 29
    one, two = (read(runs / name / "eval_results.json") for name in ("one", "both"))
    assert {"test", "calibration", "open_set"} <= one.keys()
    assert two == like(one)


def test_processes_with_fsdp_write_each_file_once(runs):
    states = {f"checkpoint-{step}/rng_state_1.pth" for step in (3, 6)}
    assert files(runs / "rank1") == states
    own = {"pytorch_model_fsdp.bin", "optimizer.bin", "optimizer.pt", "rng_state.pth", "rng_state_0.pth"}
    one, first = ({name for name in files(runs / name) if Path(name).name not in own} for name in ("one", "rank0"))
    assert first == one


def test_a_checkpoint_of_fsdp_loads_in_one_process(runs):
    for folder in (runs / "both", runs / "both" / "checkpoint-3"):
        model, report = MMSERForAudioClassification.from_pretrained(folder, output_loading_info=True)
        assert not any(report.values()) and model.config.architectures == ["MMSERForAudioClassification"]
        saved = load_file(folder / "model.safetensors")
        assert all(torch.equal(saved[name], weight) for name, weight in model.state_dict().items())


def test_a_run_with_fsdp_resumes_as_if_it_had_not_stopped(runs):
    whole, resumed = (read(runs / name / "trainer_state.json")["log_history"] for name in ("both", "resumed0"))
    assert resumed[:-1] == like(whole[:-1])  # the last line has the mean of the steps that this run took
    assert largest_difference(runs / "resumed0" / "checkpoint-6", runs / "both" / "checkpoint-6") < 1e-6


def test_an_optimiser_that_fsdp_cannot_resume_is_refused_before_training(tmp_path):
    model = tiny_model()
    arguments = {"output_dir": str(tmp_path), "use_cpu": True, "optim": "sgd"}
    for more, is_refused in (({}, True), ({"optim_args": "momentum=0.9"}, False), ({"save_strategy": "no"}, False)):
        trainer = MMSERTrainer(model, MMSERTrainingArguments(**arguments, eval_strategy="no", **more))
        trainer.is_fsdp_enabled = True
        with pytest.raises(ValueError, match="momentum") if is_refused else nullcontext():
            trainer.create_optimizer()
