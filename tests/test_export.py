# SPDX-License-Identifier: Apache-2.0
"""Exported checkpoints against PyTorch: any batch, length and missing modality, for both families of audio encoders.

An export takes many seconds. So one checkpoint of each family is exported once; that with the log-mel encoder has the
transformer fusion, tasks beside the emotion and pruned heads too, the other bounded pooling and the norm at the
beginning of each block. A third export goes through the command line, in the published form.
"""

import importlib.util
import json
import pickle
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import soundfile
import torch
from tiny import fit_openmax_by_chance, random_predictions, randomize
from tiny_corpus import NAMES, tiny_model, tiny_processor
from torch.torch_version import TorchVersion
from transformers import pipeline

import export_hf
import predict_hf
from mmser.arguments import ExportArguments, parse_arguments
from mmser.export import (
    EXPORTS_SINCE,
    Comparison,
    ExportedForward,
    check_tolerance,
    compare,
    example_inputs,
    export_checkpoint,
    export_onnx,
    min_audio_length,
    output_names,
)
from mmser.metrics import softmax
from mmser.quantization import quantize_onnx
from mmser.results import next_steps
from mmser.stream import MMSERStream
from modeling_mmser import MMSERForAudioClassification, MMSEROutput, register_auto_classes
from processing_mmser import MMSEROnnxForAudioClassification, MMSERPipeline

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

OUTPUTS = ["logits", "uncertainty", "unknown_probability", "open_set_probabilities", "rejection_score", "is_unknown"]
TASKS = {"sentiment": ["negative", "neutral", "positive"], "arousal": "regression"}
PRUNED = {"audio_attention_heads": 1, "text_attention_heads": 1}  # of two
JOINED = {"fusion_type": "transformer", "pooling_type": "layer_statistics", "cross_attention_layer_norm": False}
JOINED |= {"auxiliary_tasks": TASKS, **PRUNED}
STABLE = {
    "pooling_type": "bounded_attentive_statistics",
    "classifier_norm_first": True,
    "classifier_drop_path_rate": 0.5,
}
# Runs where neither this package nor a PyTorch weight is: what everybody would write
FRESH_PROCESS = """
import json, sys
import numpy as np
from transformers import pipeline

classifier = pipeline("audio-classification", model=sys.argv[1], trust_remote_code=True)
results = classifier(["clip.wav", {"text": "what a joy"}], return_uncertainty=True)
assert not [name for name in sys.modules if "modeling_mmser" in name]
json.dump(results, open("results.json", "w"))
"""


def make_checkpoint(folder, whisper, **overrides):
    torch.manual_seed(0)
    model = randomize(tiny_model(whisper=whisper, **overrides)).eval()
    if model.config.auxiliary_tasks:
        model.auxiliary.fit_targets({"arousal": [1.0, 3.0, 5.0]})
    fit_openmax_by_chance(model)
    scores = np.random.default_rng(0).gamma(2.0, size=200)
    model.openmax.fit_thresholds(scores, np.arange(200) % 4)
    model.temperature.fill_(1.7)
    model.uncertainty.error_calibration.copy_(torch.tensor([0.5, 0.4, 0.1]))
    logits, labels = random_predictions(0)
    model.prediction_sets.fit(softmax(logits / 9), labels)
    model.save_pretrained(folder)
    tiny_processor(whisper).save_pretrained(folder)


def make_wav2vec2(folder):
    make_export(folder, whisper=False, **STABLE)


def make_whisper(folder):
    make_export(folder, whisper=True, **JOINED)


def make_export(folder, whisper, **overrides):
    make_checkpoint(folder / "checkpoint", whisper, **overrides)
    report = export_checkpoint(folder / "checkpoint", folder / "onnx")
    (folder / "report.pickle").write_bytes(pickle.dumps(report))


@pytest.fixture(scope="module", params=["wav2vec2", "whisper"])
def export(request, shared):
    """A checkpoint, its export to ONNX in float32, and the processor of both."""
    if torch.__version__ < EXPORTS_SINCE:
        pytest.skip(f"needs torch {EXPORTS_SINCE}")
    whisper = request.param == "whisper"
    folder = shared(f"export_{request.param}", make_whisper if whisper else make_wav2vec2)
    return SimpleNamespace(
        checkpoint=folder / "checkpoint",
        folder=folder / "onnx",
        report=pickle.loads((folder / "report.pickle").read_bytes()),
        model=MMSERForAudioClassification.from_pretrained(folder / "checkpoint"),
        onnx=MMSEROnnxForAudioClassification.from_pretrained(folder / "onnx"),
        processor=tiny_processor(whisper),
    )


def clips(*seconds, seed=0):
    rng = np.random.default_rng(seed)
    return [None if length is None else 0.1 * rng.standard_normal(round(16000 * length)) for length in seconds]


@torch.no_grad()
def assert_equal_outputs(model, onnx, inputs, tolerance):
    outputs, expected = onnx(**inputs), model(**inputs)
    for name in OUTPUTS:
        torch.testing.assert_close(outputs[name], expected[name], rtol=tolerance, atol=tolerance, msg=name)
    torch.testing.assert_close(outputs.probabilities, expected.logits.softmax(-1), rtol=0, atol=tolerance)


# ---------------------------------------------------------------------------------------------------- the ONNX file


@pytest.mark.parametrize(
    ("seconds", "texts"),
    [
        ([0.3], ["what a joy"]),
        ([0.025], ["stop"]),
        ([0.7, None, 0.2, 0.1], [None, "what a joy", "i miss it", "stop it now what a joy"]),
        ([1.1, 0.5], ["stop", "the table is here"]),
        ([0.4, 0.3], None),
        (None, ["stop it now", "what"]),
    ],
)
def test_any_batch_and_length_gives_what_pytorch_gives(export, seconds, texts):
    inputs = export.processor(clips(*seconds) if seconds else None, texts, sampling_rate=16000)
    assert_equal_outputs(export.model, export.onnx, inputs, 1e-4)


def test_inputs_need_no_mask(export):
    inputs = {name: value for name, value in export.processor(clips(0.3), ["stop"], sampling_rate=16000).items()}
    without = {name: value for name, value in inputs.items() if "mask" not in name}
    assert len(without) == 2
    torch.testing.assert_close(export.onnx(**without).logits, export.onnx(**inputs).logits)


def test_the_wrong_inputs_are_refused(export):
    name = export.onnx.main_input_name
    other = ({"input_values", "input_features"} - {name}).pop()
    with pytest.raises(ValueError, match=f"is `{name}`"):
        export.onnx(**{other: np.zeros((1, 8000))})
    with pytest.raises(ValueError, match="Give audio"):
        export.onnx()


def test_the_file_explains_itself_and_nothing_else(export):
    notes = export.onnx.notes
    assert json.loads(notes["labels"]) == NAMES
    assert json.loads(notes["config"])["id2label"] == {str(index): name for index, name in enumerate(NAMES)}
    assert float(notes["temperature"]) == pytest.approx(1.7)
    assert notes["dtype"] == "float32" and int(notes["sampling_rate"]) == 16000
    assert int(notes["min_audio_length"]) == min_audio_length(export.model)
    content = (export.folder / "model.onnx").read_bytes()
    assert b"site-packages" not in content and b".py" not in content
    names = {path.name for path in export.folder.iterdir()}
    assert {"model.onnx", "config.json", "processor_config.json", "tokenizer.json", "processing_mmser.py"} <= names
    assert not {"model.safetensors", "modeling_mmser.py"} & names


def test_the_shortest_audio_is_that_of_the_encoder(export):
    shortest = min_audio_length(export.model)
    assert shortest == (1 if export.model.config.uses_log_mel else 400)
    audio = torch.zeros(1, *([16] if export.model.config.uses_log_mel else []), shortest)
    assert_equal_outputs(export.model, export.onnx, {export.onnx.main_input_name: audio}, 1e-4)


def test_the_report_compares_three_lengths_alone_and_together(export):
    comparisons = export.report.comparisons["onnx"]
    assert {(c.batch_size, c.audio_length) for c in comparisons} == {
        (size, length) for size in (1, 3) for length in {c.audio_length for c in comparisons}
    }
    assert len(comparisons) == 6 and len({c.text_length for c in comparisons}) == 3
    assert all(max(c.differences.values()) < 1e-4 for c in comparisons)
    tasks = {f"auxiliary_{name}" for name in export.model.config.auxiliary_tasks}
    assert {"probabilities", *OUTPUTS, *tasks} == comparisons[0].differences.keys()
    assert re.search(r"model\.onnx \(\d+% of the checkpoint in float32\)", str(export.report))


# ----------------------------------------------------------------------------------------------------- the pipeline


def same_results(results, expected, tolerance=1e-4):
    assert len(results) == len(expected)
    for clip, other in zip(results, expected, strict=True):
        assert [entry["label"] for entry in clip] == [entry["label"] for entry in other]
        for entry, wanted in zip(clip, other, strict=True):
            assert entry.keys() == wanted.keys()
            for name, value in wanted.items():
                assert entry[name] == (
                    value if name in ("label", "prediction_set") else pytest.approx(value, abs=tolerance)
                )


def test_the_pipeline_is_the_same(export, tmp_path):
    first, second = clips(0.4, 0.9, seed=1)
    soundfile.write(tmp_path / "clip.wav", first, 16000)
    inputs = [
        str(tmp_path / "clip.wav"),
        {"raw": second, "sampling_rate": 16000, "text": "what a joy"},
        {"text": "stop it now"},
        {"array": np.repeat(first, 2), "sampling_rate": 32000, "text": None},
    ]
    classifier = MMSERPipeline(export.model, processor=export.processor, device="cpu")
    exported = MMSERPipeline.from_onnx(export.folder)
    for options in (
        {"return_uncertainty": True},
        {"batch_size": 3, "top_k": 2, "return_uncertainty": True},
        {"allowed_labels": ["happy", "sad"]},
        {"function_to_apply": "none"},
        {"return_set": True},
        {"return_set": 0.8, "top_k": 1},
    ):
        same_results(exported(inputs, **options), classifier(inputs, **options))
    with pytest.raises(TypeError, match="`no_such_option` is no option of the pipeline"):
        exported(inputs[0], no_such_option=1)
    assert "MMSEROnnxForAudioClassification" in repr(exported)


def test_a_stream_takes_an_exported_model(export):
    pipelines = (
        MMSERPipeline(export.model, processor=export.processor, device="cpu"),
        MMSERPipeline.from_onnx(export.folder),
    )
    events = []
    for classifier in pipelines:
        stream = MMSERStream(classifier, sampling_rate=16000, chunk_length_s=1)
        events.append([event for block in clips(0.9, 0.9, seed=2) for event in stream.push(block)] + stream.flush())
    for event, other in zip(*events, strict=True):
        assert event.scores and event.scores == pytest.approx(other.scores, abs=1e-4)
        assert (event.start, event.end, event.is_unknown) == (other.start, other.end, other.is_unknown)


@pytest.mark.parametrize("export", ["whisper"], indirect=True)
def test_an_export_has_an_output_for_each_task(export, tmp_path):
    assert export.onnx.config.auxiliary_tasks == TASKS
    answers = [f"auxiliary_{name}" for name in export.model.config.auxiliary_tasks]
    assert [name for name in export.onnx.output_names if name.startswith("auxiliary")] == answers
    report = export_checkpoint(export.checkpoint, tmp_path / "out", formats=["safetensors"])
    for comparison in (*export.report.comparisons["onnx"], *report.comparisons["safetensors"]):
        assert set(answers) <= set(comparison.differences) and comparison.differences["auxiliary_arousal"] < 1e-4
    inputs = [{"raw": clip, "sampling_rate": 16000} for clip in clips(0.6, 0.3, 0.4)]
    inputs[1]["text"] = "what a joy"
    classifier = MMSERPipeline(export.model, processor=export.processor, device="cpu")
    exported = MMSERPipeline.from_onnx(export.folder)(inputs, return_auxiliary=True, batch_size=2)
    for given, expected in zip(exported, classifier(inputs, return_auxiliary=True), strict=True):
        assert given[0]["auxiliary"].keys() == TASKS.keys()
        assert given[0]["auxiliary"]["arousal"] == pytest.approx(expected[0]["auxiliary"]["arousal"], abs=1e-3)
        assert given[0]["auxiliary"]["sentiment"] == pytest.approx(expected[0]["auxiliary"]["sentiment"], abs=1e-4)


@pytest.mark.parametrize("export", ["whisper"], indirect=True)
def test_the_usual_call_in_a_fresh_process(export, tmp_path):
    """`pipeline(...)` of Transformers, with what is in the folder alone."""
    soundfile.write(tmp_path / "clip.wav", clips(0.5)[0], 16000)
    run = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, str(export.folder)],
        cwd=tmp_path,
        env={"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    classifier = MMSERPipeline(export.model, processor=export.processor, device="cpu")
    expected = classifier([str(tmp_path / "clip.wav"), {"text": "what a joy"}], return_uncertainty=True)
    same_results(json.loads((tmp_path / "results.json").read_text()), expected)


def test_registered_an_export_needs_no_trust(export):
    register_auto_classes()
    classifier = pipeline("audio-classification", model=str(export.folder))
    assert type(classifier) is MMSERPipeline and type(classifier.model) is MMSEROnnxForAudioClassification
    inputs = [{"raw": clips(0.5)[0], "sampling_rate": 16000, "text": "what a joy"}, {"text": "stop it now"}]
    expected = MMSERPipeline(export.model, processor=export.processor, device="cpu")
    same_results(classifier(inputs, batch_size=2), expected(inputs))


def test_a_file_of_something_else_is_refused(tmp_path):
    from onnx import TensorProto, helper, save

    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    node = helper.make_node("Identity", ["x"], ["y"])
    graph = helper.make_graph([node], "g", [value], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    save(model, tmp_path / "model.onnx")
    with pytest.raises(ValueError, match=r"not written by export_hf\.py"):
        MMSEROnnxForAudioClassification.from_pretrained(tmp_path)


# ---------------------------------------------------------------------------------------------------- smaller weights


def test_int8_is_close_and_does_not_depend_on_the_batch(export, tmp_path):
    quantize_onnx(export.folder / "model.onnx", tmp_path / "model.onnx")
    onnx = MMSEROnnxForAudioClassification.from_pretrained(tmp_path)
    assert onnx.notes == {**export.onnx.notes, "dtype": "int8"}
    texts = ["what a joy", None, "stop it now", "i miss it"]
    inputs = export.processor(clips(0.9, 0.3, None, 0.5), texts, sampling_rate=16000)
    outputs = onnx(**inputs)
    with torch.no_grad():
        expected = export.model(**inputs)
    difference = (outputs.probabilities - expected.logits.softmax(-1)).abs().amax()
    assert 1e-6 < difference < 0.05
    for row, (clip, text) in enumerate(zip(clips(0.9, 0.3, None, 0.5), texts, strict=True)):
        alone = onnx(**export.processor(None if clip is None else [clip], text, sampling_rate=16000))
        torch.testing.assert_close(alone.probabilities[0], outputs.probabilities[row], rtol=0, atol=5e-3)


def test_int8_stores_a_matrix_that_layers_share_once(tmp_path):
    """A table of tokens, one matrix used twice, and a matrix of one column, which stays as it is."""
    from onnx import TensorProto, helper, load, numpy_helper, save
    from onnxruntime import InferenceSession

    rng = np.random.default_rng(0)
    weights = {"table": rng.normal(size=(50, 64)), "shared": rng.normal(size=(64, 64)) / 8, "column": np.ones((64, 1))}
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["a"], "gather"),
        helper.make_node("MatMul", ["a", "shared"], ["b"], "first"),
        helper.make_node("MatMul", ["b", "shared"], ["c"], "second"),
        helper.make_node("MatMul", ["c", "column"], ["y"], "third"),
    ]
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "text"])
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "text", 1])
    constants = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "g", [ids], [output], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    save(model, tmp_path / "float32.onnx")
    quantize_onnx(tmp_path / "float32.onnx", tmp_path / "int8.onnx")
    model = load(tmp_path / "int8.onnx")
    stored = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert len(stored) == len(model.graph.initializer) == 5
    assert stored["column"] == TensorProto.FLOAT and TensorProto.INT8 in stored.values()
    session = InferenceSession(tmp_path / "int8.onnx", providers=["CPUExecutionProvider"])
    tokens = np.array([[0, 7, 49], [3, 3, 1]])
    expected = weights["table"][tokens] @ weights["shared"] @ weights["shared"] @ weights["column"]
    np.testing.assert_allclose(session.run(None, {"input_ids": tokens})[0], expected, atol=0.05 * expected.std())


@pytest.mark.skipif(torch.__version__ < EXPORTS_SINCE, reason=f"needs torch {EXPORTS_SINCE}")
def test_the_command_line(tmp_path, capsys):
    """A smaller checkpoint in float16, for PyTorch and for onnxruntime, in one folder."""
    make_checkpoint(tmp_path / "checkpoint", whisper=True)
    (tmp_path / "texts.txt").write_text("what a joy\nstop it\n")
    flags = ["--checkpoint", tmp_path / "checkpoint", "--output_dir", tmp_path / "small", "--dtype", "float16"]
    flags += ["--format", "onnx", "safetensors", "--languages", "en", "--vocabulary_text", tmp_path / "texts.txt"]
    report = export_hf.main([str(flag) for flag in flags])
    printed = capsys.readouterr().out
    assert (
        "largest differences to PyTorch, onnx" in printed and "largest differences to PyTorch, safetensors" in printed
    )
    assert str(tmp_path / "small") in printed and str(report.trimmed) in printed
    assert f"mmser eval --checkpoint {tmp_path / 'small'} --data_dir DATA" in printed
    assert "make it small" not in printed
    (tmp_path / "small" / "model.safetensors").rename(tmp_path / "weights")  # an ONNX file alone is not judged
    steps = next_steps(tmp_path / "small", ("--data_dir", "DATA"))
    assert [step.split()[:2] for step in steps] == [["use", "it:"]]
    (tmp_path / "weights").rename(tmp_path / "small" / "model.safetensors")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []

    model = MMSERForAudioClassification.from_pretrained(tmp_path / "small")
    assert model.dtype == torch.float16 and model.openmax.weibull_scale.dtype == torch.float32
    processor = type(tiny_processor()).from_pretrained(tmp_path / "small")
    assert model.config.text_config.vocab_size == len(processor.tokenizer) == report.trimmed.tokens_after
    assert len(processor.tokenizer) < len(tiny_processor().tokenizer)
    before = MMSERForAudioClassification.from_pretrained(tmp_path / "checkpoint")
    onnx = MMSEROnnxForAudioClassification.from_pretrained(tmp_path / "small")
    assert onnx.notes["dtype"] == "float16"
    audio, texts = clips(0.5, 0.3), ["what a joy", "stop it"]
    with torch.no_grad():
        expected = before(**tiny_processor(True)(audio, texts, sampling_rate=16000)).logits.softmax(-1)
        given = model.float()(**processor(audio, texts, sampling_rate=16000)).logits.softmax(-1)
    exported = onnx(**processor(audio, texts, sampling_rate=16000)).probabilities
    for probabilities in (given, exported):
        assert probabilities.dtype == torch.float32
        torch.testing.assert_close(probabilities, expected, rtol=0, atol=1e-2)


# ---------------------------------------------------------------------------------------------------- what goes wrong


def test_too_large_a_difference_leaves_nothing(tmp_path):
    make_checkpoint(tmp_path / "checkpoint", whisper=False)
    with pytest.raises(ValueError, match=r"differs from PyTorch by .* in `\w+` \(tolerance 1e-12\)"):
        export_checkpoint(
            tmp_path / "checkpoint", tmp_path / "out", formats=["safetensors"], dtype="float16", tolerance=1e-12
        )
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_small_logits_of_one_batch_are_no_reason_to_refuse():
    """A clip of which the model can tell nothing has small ones; rounding moves them as it moves the others."""

    class Model:
        config = SimpleNamespace(used_modalities=["audio"], auxiliary_tasks={})

        def __init__(self, error):
            self.error, self.calls = error, 0

        def __call__(self, **inputs):
            self.calls += 1
            logits = torch.tensor([[0.5, 0.0]]) if self.calls == 1 else torch.tensor([[8.0, -8.0]])
            return MMSEROutput(logits=logits + torch.tensor([[self.error, 0.0]]), uncertainty=torch.zeros(1, 1))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "mmser.export.example_inputs", lambda *arguments, **options: {"input_values": torch.zeros(1, 80)}
        )
        patch.setattr("mmser.export.input_names", lambda model: ["input_values"])
        patch.setattr("mmser.export.max_seconds", lambda *arguments: 30.0)
        comparisons = compare(Model(0), Model(0.2), None)
    assert [comparison.differences["logits"] for comparison in comparisons] == [pytest.approx(0.025)] * 6
    check_tolerance(comparisons, 0.05)


def test_a_number_that_is_none_is_too_large_a_difference():
    comparison = Comparison(1, 100, 5, {"logits": float("nan")})
    with pytest.raises(ValueError, match="nan"):
        check_tolerance([comparison], 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int4"}, "float32, float16, int8"),
        ({"formats": ["tflite"]}, "onnx, safetensors"),
        ({"opset": 99}, "--opset must be from 18 to "),
        ({"output_dir": "full"}, "not empty"),
        ({"output_dir": "full/file"}, "is a file"),
    ],
)
def test_options_that_cannot_be(tmp_path, options, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    output_dir = tmp_path / options.pop("output_dir", "out")
    with pytest.raises(ValueError, match=message):
        export_checkpoint(tmp_path / "checkpoint", output_dir, **options)


def test_a_full_folder_is_replaced_on_demand(tmp_path):
    make_checkpoint(tmp_path / "checkpoint", whisper=False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "out", formats=["safetensors"], check=False, overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").is_file() and not (tmp_path / "out" / "old").exists()
    for folder in (tmp_path, tmp_path / "checkpoint"):
        with pytest.raises(ValueError, match="where the checkpoint itself is"):
            export_checkpoint(tmp_path / "checkpoint", folder, formats=["safetensors"], check=False, overwrite=True)
    assert (tmp_path / "checkpoint" / "model.safetensors").is_file()


def test_missing_packages_are_named(monkeypatch, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find_spec(name))
    with pytest.raises(ImportError, match="pip install onnxscript"):
        export_checkpoint(tmp_path / "checkpoint", tmp_path / "out")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match="pip install onnxruntime"):
        MMSERPipeline.from_onnx(tmp_path)


def test_an_old_torch_that_fails_is_named(monkeypatch, tmp_path):
    """A failure of a newer one stays as it is, and 2.10 is newer."""

    def fail(*arguments, **options):
        raise torch.onnx.OnnxExporterError("step 1/3")

    monkeypatch.setattr(torch.onnx, "export", fail)
    for version, error, words in (
        ("2.6.0+debian", ImportError, r"torch 2\.6\.0\+debian cannot export .*: `pip install 'torch>=2\.7'`"),
        ("2.10.0", torch.onnx.OnnxExporterError, "step 1/3"),
    ):
        monkeypatch.setattr(torch, "__version__", TorchVersion(version))
        with pytest.raises(error, match=words):
            export_onnx(tiny_model().eval(), tiny_processor(), tmp_path / "model.onnx")


def test_without_openmax_there_are_three_outputs():
    model = tiny_model().eval()
    inputs = example_inputs(model, tiny_processor(), 0.3, 2)
    forward = ExportedForward(model)
    assert output_names(model(**inputs)) == ["logits", "probabilities", "uncertainty"]
    names = ("input_values", "attention_mask", "input_ids", "text_attention_mask")
    assert len(forward(*(inputs[name] for name in names))) == 3


@pytest.mark.parametrize("std", [2e-2, 1e-4, 1e-6])
def test_int8_weights_are_close_however_small_they_are(std, tmp_path):
    """A product and a table of tokens against float64: a scale that float16 cannot hold is kept in float32."""
    rng = np.random.default_rng(0)
    matrix, table = (rng.normal(0, std, size).astype(np.float32) for size in ((128, 640), (700, 64)))
    float_type, int_type = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("MatMul", ["x", "matrix"], ["product"], "product"),
            onnx.helper.make_node("Gather", ["table", "input_ids"], ["tokens"], "tokens"),
        ],
        "small",
        [
            onnx.helper.make_tensor_value_info("x", float_type, [4, 128]),
            onnx.helper.make_tensor_value_info("input_ids", int_type, [700]),
        ],
        [
            onnx.helper.make_tensor_value_info("product", float_type, [4, 640]),
            onnx.helper.make_tensor_value_info("tokens", float_type, [700, 64]),
        ],
        [onnx.numpy_helper.from_array(matrix, "matrix"), onnx.numpy_helper.from_array(table, "table")],
    )
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9),
        tmp_path / "a.onnx",
    )
    quantize_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx")
    x = rng.normal(size=(4, 128)).astype(np.float32)
    session = onnxruntime.InferenceSession(tmp_path / "b.onnx", providers=["CPUExecutionProvider"])
    product, tokens = session.run(["product", "tokens"], {"x": x, "input_ids": np.arange(700)})
    for given, expected in ((product, x.astype(np.float64) @ matrix), (tokens, table)):
        assert np.linalg.norm(given - expected) < 0.03 * np.linalg.norm(expected)


def test_a_recipe_gives_the_flags_of_the_export_too(tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps({"checkpoint": "a", "output_dir": "b", "dtype": "int8"}))
    (options,) = parse_arguments((ExportArguments,), [str(tmp_path / "recipe.json"), "--output_dir", "c"])
    assert (options.model_name_or_path, options.output_dir, options.dtype) == ("a", "c", "int8")
    with pytest.raises(SystemExit):
        parse_arguments((ExportArguments,), ["--output_dir", "c"])


def test_the_pipeline_alone_says_where_its_processor_is(monkeypatch, tmp_path):
    monkeypatch.setattr(MMSERPipeline, "processor_class", None)
    with pytest.raises(ImportError, match="from `mmser` or `processing_mmser`"):
        MMSERPipeline.from_onnx(tmp_path)


def test_a_pytorch_checkpoint_is_not_taken_for_an_export(tmp_path):
    tiny_model().config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is a PyTorch checkpoint.*pipeline\(\"audio-classification\", model="):
        MMSERPipeline.from_onnx(tmp_path)


def test_the_command_classifies_with_an_export(export, tmp_path, capsys):
    """As with the checkpoint, to the tolerance of the export."""
    soundfile.write(tmp_path / "clip.wav", np.sin(np.arange(8000) / 10), 16000)
    scores = []
    for checkpoint in (export.checkpoint, export.folder):
        words = [tmp_path / "clip.wav", "--text", "what a joy", "--checkpoint", checkpoint, "--format", "jsonl"]
        assert predict_hf.main([*map(str, words), "--device", "cpu"]) == 0
        row = json.loads(capsys.readouterr().out)
        scores.append([row[name] for name in row if name.startswith("score_")])
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(ValueError, match="onnxruntime is installed here without CUDAExecutionProvider"):
            predict_hf.main([*map(str, words), "--device", "cuda"])
    with pytest.raises(ValueError, match="an exported model runs on cpu or cuda"):
        predict_hf.main([*map(str, words), "--device", "mps"])
