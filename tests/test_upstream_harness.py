# SPDX-License-Identifier: Apache-2.0
"""Does the harness judge? A stock model passes transformers' own tests, and one broken on purpose fails them."""

import io
import re
import tarfile
import unittest

import pytest
import torch
import upstream
from transformers import BertTokenizer, ClapProcessor, PreTrainedConfig, Wav2Vec2Config, Wav2Vec2FeatureExtractor
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2Model

judge = upstream.upstream_or_skip()


# --- running upstream tests on a class ---


class AudioModelTester:
    """A tiny wav2vec2 and its inputs, in the form that `ModelTesterMixin` asks for."""

    batch_size, seq_length, hidden_size, num_hidden_layers, num_attention_heads = 3, 19, 16, 2, 2
    is_training = True

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent

    def prepare_config_and_inputs_for_common(self):
        config = Wav2Vec2Config(
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=20,
            conv_dim=(8, 8),
            conv_kernel=(10, 3),
            conv_stride=(5, 2),
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            mask_time_prob=0.0,
            layerdrop=0.0,
        )
        return config, {"input_values": judge.floats_tensor([self.batch_size, 200])}


def verdict(case: type[unittest.TestCase], name: str) -> str:
    """Run one test of a test case class; returns "passed", "skipped: reason" or "failed: traceback"."""
    result = unittest.TestResult()
    unittest.TestSuite([case(name)]).run(result)
    for _, traceback in result.failures + result.errors:
        return f"failed: {traceback}"
    for _, reason in result.skipped:
        return f"skipped: {reason}"
    return "passed"


def model_case(model_class: type) -> type[unittest.TestCase]:
    """A test case class that puts `model_class` before `ModelTesterMixin`."""

    class ModelCase(judge.ModelTesterMixin, unittest.TestCase):  # type: ignore[name-defined]  # made at run time
        all_model_classes = (model_class,)
        test_can_init_all_missing_weights_before_2023 = True  # else the test skips models without a copyright year

        def setUp(self):
            self.model_tester = AudioModelTester(self)

    return ModelCase


# --- models ---


class BatchDependentModel(Wav2Vec2Model):
    """Subtracts the mean over the batch: a clip's result depends on its neighbours."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state - output.last_hidden_state.mean(dim=0, keepdim=True)
        return output


class UnsavedModel(Wav2Vec2Model):
    """Multiplies by a tensor that no checkpoint contains."""

    def __init__(self, config):
        super().__init__(config)
        self.scale = torch.randn(config.hidden_size)

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state * self.scale
        return output


@pytest.mark.parametrize(
    ("broken", "name", "reason"),
    [
        (BatchDependentModel, "test_batching_equivalence", "Batched and Single row outputs are not equal"),
        (UnsavedModel, "test_save_load", "meta tensor|device meta"),
    ],
)
def test_a_good_model_passes_and_a_broken_one_fails_for_its_fault(broken, name, reason):
    assert verdict(model_case(Wav2Vec2Model), name) == "passed"
    assert re.search(f"^failed: .*({reason})", verdict(model_case(broken), name), flags=re.DOTALL)


def test_no_mixin_is_switched_off_by_a_missing_package():
    for mixin in (judge.ModelTesterMixin, judge.ProcessorTesterMixin):
        assert not getattr(mixin, "__unittest_skip__", False), f"{mixin.__name__}: {mixin.__unittest_skip_why__}"


# --- configurations and processors ---


def test_common_config_values_are_not_the_defaults():
    default = PreTrainedConfig()
    for name, value in upstream.config_common_kwargs.items():
        assert getattr(default, name) != value, f"a config that ignores {name} would pass"


class TextlessProcessor(ClapProcessor):
    """Loses the text when there is audio too."""

    def __call__(self, audio=None, text=None, **kwargs):
        return super().__call__(audio=audio, text=text if audio is None else None, **kwargs)


def processor_case(tested_class: type) -> type[unittest.TestCase]:
    """A test case class that puts `tested_class` before `ProcessorTesterMixin`."""

    class ProcessorCase(judge.ProcessorTesterMixin, unittest.TestCase):  # type: ignore[name-defined]  # made at run time
        processor_class = tested_class

        @classmethod
        def _setup_feature_extractor(cls):
            return Wav2Vec2FeatureExtractor()

        @classmethod
        def _setup_tokenizer(cls):
            words = [
                "[PAD]",
                "[UNK]",
                "[CLS]",
                "[SEP]",
                "[MASK]",
                "lower",
                "newer",
                "upper",
                "older",
                "longer",
                "string",
            ]
            return BertTokenizer(vocab={word: i for i, word in enumerate(words)})

    return ProcessorCase


@pytest.mark.parametrize(("tested_class", "start"), [(ClapProcessor, "passed"), (TextlessProcessor, "failed")])
def test_the_processor_mixin_tells_good_from_broken(tested_class, start):
    assert verdict(processor_case(tested_class), "test_processor_with_multiple_inputs").startswith(start)


# --- getting the files ---


def write_archive(path, *names):
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    return path


def test_unusable_archives_are_refused_and_leave_nothing(tmp_path):
    other_release = write_archive(tmp_path / "a.tar.gz", *(f"transformers-9.8/tests/{n}.py" for n in upstream.MODULES))
    truncated = tmp_path / "b.tar.gz"
    truncated.write_bytes(other_release.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"no source distribution of transformers 9\.9"):
        upstream.extract_tests(other_release, "9.9", tmp_path / "out")
    with pytest.raises(ValueError, match="not a readable"):
        upstream.extract_tests(truncated, "9.9", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar.gz", "b.tar.gz"]


def test_failed_download_names_the_way_out_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.delenv("MMSER_TRANSFORMERS_SDIST", raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # pip behaves as without a network, only faster
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(upstream.SourceDistributionUnavailable, match=r"MMSER_TRANSFORMERS_SDIST.*No matching distrib"):
        upstream.find_source_distribution("5.23.0", cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("ci", "expected"), [("true", upstream.SourceDistributionUnavailable), ("", pytest.skip.Exception)]
)
def test_unavailable_means_failure_in_ci_and_skip_elsewhere(monkeypatch, ci, expected):
    def unavailable():
        raise upstream.SourceDistributionUnavailable("no network")

    monkeypatch.setattr(upstream, "upstream_tests", unavailable)
    monkeypatch.setenv("CI", ci)
    with pytest.raises(expected, match="no network"):
        upstream.upstream_or_skip()
