# SPDX-License-Identifier: Apache-2.0
"""Rows about processes and threads, checkpoints of other times and sizes, and a machine without a network."""

import concurrent.futures
import copy
import functools
import json
import pickle
import shutil
import socket

import numpy as np
import safetensors.torch
import tiny_corpus
import torch
from tiny_corpus import tiny_processor

from benchmarks.situations.common import RATE, ROOT, TEXT, World, close, error, pipeline, situation
from configuration_mmser import MMSERConfig
from mmser.batches import MMSERDataCollator
from modeling_mmser import MMSERForAudioClassification, register_auto_classes
from processing_mmser import MMSERPipeline, MMSERProcessor

# ---------------------------------------------------------------------------------------------------------- processes


@situation("processes", "deepcopy of model, processor and pipeline", "the same answer")
def deep_copies(world: World) -> None:
    close(world.logits(model=copy.deepcopy(world.model)), world.logits(), 0)
    world.check_scores(copy.deepcopy(world.classifier)(world.clip()))


@situation("processes", "pickle of processor, and of a pipeline with a Whisper encoder", "the same answer")
def pickles(world: World) -> None:
    processor = pickle.loads(pickle.dumps(world.processor))
    for name, values in processor([world.clips[0]], [TEXT], sampling_rate=RATE).items():
        close(values, world.inputs()[name].to(values.dtype))
    classifier = whisper_classifier()
    again = pickle.loads(pickle.dumps(classifier))
    assert again(world.clip()) == classifier(world.clip())


def whisper_classifier() -> MMSERPipeline:
    return MMSERPipeline(model=tiny_corpus.tiny_model(whisper=True).eval(), processor=tiny_processor(whisper=True))


@situation("processes", "pickle of a model with a wav2vec2 encoder", "error of PyTorch that names state_dict")
def parametrized_pickle(world: World) -> None:
    with error(RuntimeError, "state_dict"):
        pickle.dumps(world.model)


@situation("processes", "eight threads share one pipeline", "each gets its own answer")
def threads(world: World) -> None:
    rows = [row % 3 for row in range(24)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for row, entries in zip(rows, pool.map(lambda row: world.classifier(world.clip(row)), rows), strict=True):
            world.check_scores(entries, row)


SPAWN = """
import json, multiprocessing, pickle, sys

def answer(classifier, clip):
    return classifier(clip)

if __name__ == "__main__":
    classifier, clip = pickle.load(open(sys.argv[1], "rb"))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(json.dumps(pool.apply(answer, (classifier, clip))))
"""


@situation("processes", "a pipeline handed to a spawned process", "the same answer")
def spawn(world: World) -> None:
    folder, classifier = world.new_folder(), whisper_classifier()
    (folder / "task.pickle").write_bytes(pickle.dumps((classifier, world.clip())))
    (folder / "task.py").write_text(SPAWN)
    code = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, *sys.argv[1:]]))"
    found = json.loads(world.run(code, folder / "task.py", folder / "task.pickle").splitlines()[-1])
    for one, other in zip(found, classifier(world.clip()), strict=True):
        assert one["label"] == other["label"]
        close(one["score"], other["score"])


@situation("processes", "num_workers where processes are spawned (Windows, macOS)", "as without workers")
def spawned_workers(world: World) -> None:
    loader = torch.utils.data.DataLoader
    torch.utils.data.DataLoader = functools.partial(loader, multiprocessing_context="spawn")  # type: ignore
    try:
        entries = world.classifier([world.clip(row) for row in range(3)], num_workers=1, batch_size=2)
    finally:
        torch.utils.data.DataLoader = loader  # type: ignore[misc]
    for row in range(3):
        world.check_scores(entries[row], row)


class Clips(torch.utils.data.Dataset):
    def __init__(self, clips):
        self.clips = clips

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, index):
        return {"audio": self.clips[index], "text": TEXT, "labels": index, "sampling_rate": RATE}


@situation("processes", "DataLoader workers, forked and spawned, with the collator", "as without workers")
def loader_workers(world: World) -> None:
    rows, collate = Clips(world.clips), MMSERDataCollator(world.processor)
    expected = collate([rows[index] for index in range(3)])
    for context in ("fork", "spawn"):
        loader = torch.utils.data.DataLoader(
            rows, 3, collate_fn=collate, num_workers=1, multiprocessing_context=context
        )
        (batch,) = list(loader)
        for name, values in expected.items():
            close(batch[name], values, 0)


# -------------------------------------------------------------------------------------------------------- checkpoints

OLD = ROOT / "tests" / "data" / "old_checkpoint"


@situation("checkpoints", "one of version 0.1.0", "its logits of then")
def old_checkpoint(world: World) -> None:
    from test_hub import old_batch, old_weights

    folder = world.new_folder()
    shutil.copy(OLD / "config.json", folder)
    safetensors.torch.save_file(old_weights(), folder / "model.safetensors", {"format": "pt"})
    model = MMSERForAudioClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        output = model(**old_batch(model))
    for name, expected in json.loads((OLD / "outputs.json").read_text()).items():
        np.testing.assert_allclose(output[name].float(), expected, rtol=1e-4, atol=1e-5, err_msg=name)


@situation("checkpoints", 'id2label with string keys, {"0": "calm"}', "the labels in their order")
def string_keys(world: World) -> None:
    names = {"0": "calm", "1": "tense", "2": "bored"}
    for options in ({"id2label": names}, {"label2id": {name: int(index) for index, name in names.items()}}):
        config = MMSERConfig(**options)
        assert config.id2label == {0: "calm", 1: "tense", 2: "bored"} and config.num_labels == 3
    model = MMSERForAudioClassification.from_pretrained(
        world.checkpoint, id2label={**names, "3": "glad"}, label2id={"calm": 0, "tense": 1, "bored": 2, "glad": 3}
    )
    assert [model.config.id2label[index] for index in range(4)] == ["calm", "tense", "bored", "glad"]


@situation("checkpoints", "num_labels=7, ignore_mismatched_sizes=True", "a new head, the rest as it was")
def seven_labels(world: World) -> None:
    model = MMSERForAudioClassification.from_pretrained(
        world.checkpoint, num_labels=7, ignore_mismatched_sizes=True
    ).eval()
    with torch.no_grad():
        found, expected = model(**world.inputs()), world.model(**world.inputs())
    assert found.logits.shape == (1, 7) and found.unknown_probability is None
    close(found.fused, expected.fused)
    with error((RuntimeError, ValueError), "ignore_mismatched_sizes"):
        MMSERForAudioClassification.from_pretrained(world.checkpoint, num_labels=7)


@situation("checkpoints", "a checkpoint folder that is not there", "error that names it")
def no_checkpoint(world: World) -> None:
    with error((OSError, ValueError), "nowhere"):
        MMSERForAudioClassification.from_pretrained(world.folder / "nowhere")


@situation("checkpoints", "saved, loaded, saved again", "the same files")
def save_twice(world: World) -> None:
    folders = [world.checkpoint]
    for _ in range(2):  # the first time Transformers notes the types of the encoders' weights in config.json
        folders.append(world.new_folder())
        MMSERForAudioClassification.from_pretrained(folders[-2]).save_pretrained(folders[-1])
        MMSERProcessor.from_pretrained(folders[-2]).save_pretrained(folders[-1])
    names = {path.name for path in folders[1].iterdir() if path.is_file()}
    assert names == {path.name for path in world.checkpoint.iterdir() if path.is_file()}
    for name in sorted(names):
        assert (folders[1] / name).read_bytes() == (folders[2] / name).read_bytes(), name
    assert (folders[2] / "model.safetensors").read_bytes() == (folders[0] / "model.safetensors").read_bytes()


# ------------------------------------------------------------------------------------------------------------ offline


@situation("offline", "loading, pipeline and processor with no socket at all", "the same answer")
def no_socket(world: World) -> None:
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked for")

    register_auto_classes()
    names = ("connect", "connect_ex")
    before = {name: getattr(socket.socket, name) for name in names}
    resolve = socket.getaddrinfo
    try:
        for name in names:
            setattr(socket.socket, name, refuse)
        socket.getaddrinfo = refuse
        classifier = pipeline("audio-classification", model=str(world.checkpoint))
        world.check_scores(classifier(world.clip()))
        MMSERForAudioClassification.from_pretrained(world.checkpoint)
    finally:
        for name in names:
            setattr(socket.socket, name, before[name])
        socket.getaddrinfo = resolve
