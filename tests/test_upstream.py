# SPDX-License-Identifier: Apache-2.0
"""MMSER before transformers' own judges, as its built-in models are: models, configuration and processor.

A test replaced here is one whose set-up does not fit MMSER: the replacement checks the same, and says what differs.
"""

import contextlib
import io
import tempfile
import unittest
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from transformers import MODEL_MAPPING, BertTokenizer, Wav2Vec2FeatureExtractor
from transformers.models.auto import modeling_auto
from transformers.testing_utils import torch_device
from upstream import upstream_or_skip

from configuration_mmser import MMSERConfig
from modeling_mmser import MMSERForAudioClassification, MMSERModel
from processing_mmser import MMSERProcessor

judge = upstream_or_skip()


@pytest.fixture(scope="module", autouse=True)
def listed_as_built_in():
    """Many upstream tests pass over classes that are not in the library's own tables: list ours there meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(modeling_auto.MODEL_MAPPING_NAMES, "mmser", "MMSERModel")
        patch.setitem(
            modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES, "mmser", "MMSERForAudioClassification"
        )
        patch.setitem(MODEL_MAPPING._extra_content, MMSERConfig, MMSERModel)
        yield


class MMSERModelTester:
    """A tiny MMSER on wav2vec2 and BERT, and a padded batch for it."""

    batch_size, hidden_size, num_hidden_layers, num_attention_heads = 3, 16, 2, 2
    num_samples, seq_length = 200, 19  # 200 samples make 19 frames in the two convolutions below
    text_length, vocab_size = 7, 99
    is_training = True

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent
        self.encoder = {
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "intermediate_size": 20,
        }

    def get_audio_config(self) -> dict:
        return self.encoder | {
            "model_type": "wav2vec2",
            "conv_dim": (8, 8),
            "conv_kernel": (10, 3),
            "conv_stride": (5, 2),
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
        }

    def get_config(self) -> MMSERConfig:
        return MMSERConfig(
            audio_config=self.get_audio_config(),
            text_config=self.encoder | {"model_type": "bert", "vocab_size": self.vocab_size},
            cross_attention_hidden_size=16,
            cross_attention_heads=2,
            pooling_hidden_size=8,
            fusion_hidden_size=16,
            classifier_num_layers=2,
            classifier_hidden_size=16,
            classifier_bottleneck=4,
            feature_size=16,
            anchor_size=8,
            uncertainty_hidden_size=8,
        )

    def prepare_audio(self) -> dict[str, torch.Tensor]:
        return {
            "input_values": judge.floats_tensor([self.batch_size, self.num_samples]),
            "attention_mask": self.prepare_mask(self.num_samples),
        }

    def prepare_mask(self, length: int) -> torch.Tensor:
        lengths = torch.tensor([length - length // 4, length, length - length // 3], device=torch_device)
        return (torch.arange(length, device=torch_device) < lengths[:, None]).long()

    def prepare_config_and_inputs_for_common(self) -> tuple[MMSERConfig, dict[str, torch.Tensor]]:
        return self.get_config(), self.prepare_audio() | {
            "input_ids": judge.ids_tensor([self.batch_size, self.text_length], self.vocab_size),
            "text_attention_mask": self.prepare_mask(self.text_length),
        }


class MMSERLogMelModelTester(MMSERModelTester):
    """A tiny MMSER on the Whisper encoder and BERT."""

    num_frames, num_mels = 38, 8  # the encoder's second convolution halves the frames to `seq_length`

    def get_audio_config(self) -> dict:
        return {
            "model_type": "whisper",
            "d_model": self.hidden_size,
            "encoder_layers": self.num_hidden_layers,
            "encoder_attention_heads": self.num_attention_heads,
            "encoder_ffn_dim": 20,
            "num_mel_bins": self.num_mels,
            "max_source_positions": 30,
        }

    def prepare_audio(self) -> dict[str, torch.Tensor]:
        return {
            "input_features": judge.floats_tensor([self.batch_size, self.num_mels, self.num_frames]),
            "attention_mask": self.prepare_mask(self.num_frames),
        }


class MMSERModelTest(judge.ModelTesterMixin, unittest.TestCase):  # type: ignore[name-defined]  # made at run time
    all_model_classes: Any = (MMSERModel, MMSERForAudioClassification)
    _is_composite = True
    test_can_init_all_missing_weights_before_2023 = True  # else the test skips files without a copyright year

    def setUp(self):
        self.model_tester = MMSERModelTester(self)

    def subTest(self, *args, **kwargs):
        """Upstream opens one for each parameter: pytest would report thousands, which takes longer than to check."""
        return contextlib.nullcontext()

    def test_sdpa_can_dispatch_composite_models(self):
        """Upstream looks for both encoders under other names, and asks models like ours to replace this test."""
        for model_class in self.all_model_classes:
            with tempfile.TemporaryDirectory() as folder:
                model_class(self.model_tester.get_config()).save_pretrained(folder)
                for requested, expected in ((None, "sdpa"), ("eager", "eager")):
                    model = model_class.from_pretrained(folder, attn_implementation=requested)
                    configs = [module.config for module in model.modules() if hasattr(module, "config")]
                    self.assertEqual({config._attn_implementation for config in configs}, {expected})

    def test_can_load_ignoring_mismatched_shapes(self):
        """Upstream looks for one output layer at the top of the model; here all that depends on the labels counts."""
        old = MMSERForAudioClassification(self.model_tester.get_config())
        with tempfile.TemporaryDirectory() as folder:
            old.save_pretrained(folder)
            with self.assertRaises(RuntimeError):
                MMSERForAudioClassification.from_pretrained(folder, num_labels=42)
            new = MMSERForAudioClassification.from_pretrained(folder, num_labels=42, ignore_mismatched_sizes=True)
        new_state, fresh_buffers = new.state_dict(), dict(MMSERForAudioClassification(new.config).named_buffers())
        for name, tensor in old.state_dict().items():
            if tensor.shape == new_state[name].shape:
                torch.testing.assert_close(tensor, new_state[name], msg=f"{name} was not kept")
            else:
                self.assertEqual(new_state[name].shape, (42, *tensor.shape[1:]), name)
                started_again = (
                    torch.equal(new_state[name], fresh_buffers[name])
                    if name in fresh_buffers
                    else new_state[name].abs().max() < 10
                )
                self.assertTrue(started_again, f"{name} was not started again")
        self.assertEqual(new.config.num_labels, 42)


# Which kernels of a GPU may be used changes nothing on the processor, where the tests run: one of the two is enough
for name in dir(MMSERModelTest):
    if name.startswith("test_eager_matches_sdpa_inference") and name.endswith("sdpa_kernels"):
        setattr(MMSERModelTest, name, None)


class MMSERLogMelModelTest(MMSERModelTest):
    all_model_classes: Any = (MMSERForAudioClassification,)  # has MMSERModel inside
    test_bc_torch_dtype = None  # the slowest by far, and no encoder changes how the argument is called

    def setUp(self):
        self.model_tester = MMSERLogMelModelTester(self)


class MMSERTransformerFusionModelTester(MMSERModelTester):
    """The tiny MMSER with a joint encoder in place of the cross-modal attention."""

    def get_config(self) -> MMSERConfig:
        config = super().get_config()
        config.fusion_type = "transformer"
        return config


class MMSERTransformerFusionModelTest(MMSERModelTest):
    all_model_classes: Any = (MMSERForAudioClassification,)
    test_bc_torch_dtype = None

    def setUp(self):
        self.model_tester = MMSERTransformerFusionModelTester(self)


class MMSERConfigTest(unittest.TestCase):
    def test_config(self):
        self.model_tester = MMSERModelTester(self)
        judge.ConfigTester(self, config_class=MMSERConfig, has_text_modality=False, feature_size=16).run_common_tests()


class MMSERProcessorTest(judge.ProcessorTesterMixin, unittest.TestCase):  # type: ignore[name-defined]  # made at run time
    processor_class = MMSERProcessor

    @classmethod
    def _setup_feature_extractor(cls):
        return Wav2Vec2FeatureExtractor()

    @classmethod
    def _setup_tokenizer(cls):
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "lower", "newer", "upper", "older", "longer", "string"]
        return BertTokenizer(vocab={word: i for i, word in enumerate(words)})

    def prepare_audio_inputs(self, batch_size: int | None = None) -> list[bytes]:
        """Files: upstream gives arrays without a sampling rate, which MMSER refuses to guess."""
        file = io.BytesIO()
        soundfile.write(file, np.random.default_rng(0).uniform(-1, 1, 1000), 16000, format="WAV")
        return [file.getvalue()] * (batch_size or 1)

    def test_subprocessor_defaults_0_text(self):
        """Upstream expects the tokenizer's mask as `attention_mask`, which is the audio's here."""
        processor, text = self.get_processor(), self.prepare_text_inputs(batch_size=3)
        outputs, expected = processor(text=text), processor.tokenizer(text, padding=True, return_tensors="pt")
        for name, tokenizer_name in (("input_ids", "input_ids"), ("text_attention_mask", "attention_mask")):
            torch.testing.assert_close(outputs[name], expected[tokenizer_name])

    def test_subprocessor_defaults_3_audio(self):
        """Upstream hands the same input to the feature extractor, which takes arrays only: here with their rate."""
        clip = np.random.default_rng(0).uniform(-1, 1, 1000).astype(np.float32)
        processor, options = self.get_processor(), {"sampling_rate": 16000, "return_tensors": "pt"}
        outputs, expected = processor(audio=clip, **options), processor.feature_extractor(clip, **options)
        for name in ("input_values", "attention_mask"):
            torch.testing.assert_close(outputs[name], expected[name])
