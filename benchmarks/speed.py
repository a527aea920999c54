# SPDX-License-Identifier: Apache-2.0
"""How fast MMSER is, and how much memory it takes: against its bare encoders, exported, cached, and over an hour.

    python benchmarks/speed.py
    python benchmarks/speed.py --sections lengths export stream --checkpoint runs/mine --data_dir my_data

Models have the default configuration at full size with random weights, on which speed does not depend. What is
told in times faster or slower ran in turns, so that whatever slows the machine slows all of it; times are medians,
and ratios are medians of the ratios of each turn. Updates `benchmarks/results/speed.json`, section by section.
"""

import argparse
import contextlib
import gc
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import soundfile
import torch
from transformers import AutoModel, BertTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2ForSequenceClassification
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.baselines import TrainingClock
from benchmarks.tables import Row, parse_arguments, publish, read_results, short_json, table, three_digits
from configuration_mmser import MMSERConfig
from mmser.batches import MMSERDataCollator
from mmser.caching import CachedStatesDataset, EncoderStateCache
from mmser.examples import EmotionDataset
from mmser.export import export_checkpoint
from mmser.loading import load_emotion_dataset
from mmser.metrics import compute_classification_metrics
from mmser.results import environment
from mmser.stream import MMSERStream, StreamEvent
from mmser.trainer import MMSERTrainer
from mmser.training_arguments import MMSERTrainingArguments
from modeling_mmser import MMSERForAudioClassification, register_auto_classes
from processing_mmser import MMSERPipeline, MMSERProcessor

RATE = 16000  # Hz
SECONDS, TOKENS = 5.0, 24
BATCH_SIZES = (1, 8, 32)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FLOOR, OURS, AUDIO_ALONE, STOCK = "bare encoders", "MMSER", "MMSER, audio alone", "Wav2Vec2ForSequenceClassification"

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
AUDIO = {"conv_dim": [8] * 7, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
TINY: dict[str, Any] = {
    "audio_config": {"model_type": "wav2vec2", **AUDIO, **SMALL},
    "text_config": {"model_type": "bert", "vocab_size": 64, **SMALL},
}


# ---- what is measured


def build_config(arguments: argparse.Namespace) -> MMSERConfig:
    """The default configuration, or a tiny one: to try this script, and for what the model does not matter to."""
    return MMSERConfig(**(TINY if arguments.size == "tiny" else {}))


def build_processor() -> MMSERProcessor:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "word"]
    return MMSERProcessor(Wav2Vec2FeatureExtractor(), BertTokenizer(vocab={word: i for i, word in enumerate(words)}))


def build_model(kind: str, arguments: argparse.Namespace, dtype: torch.dtype = torch.float32) -> Any:
    """One of `FLOOR` (a `ModuleList`), `OURS` and `STOCK`, in eval mode on the device."""
    torch.manual_seed(0)
    config = build_config(arguments)
    model: Any
    if kind == FLOOR:
        model = torch.nn.ModuleList(AutoModel.from_config(part) for part in (config.audio_config, config.text_config))
    elif kind == STOCK:
        stock: Any = config.audio_config
        stock.num_labels = config.num_labels
        model = Wav2Vec2ForSequenceClassification(stock)
    else:
        model = MMSERForAudioClassification(config)
    return model.to(arguments.device, dtype).eval()


def build_batch(batch_size: int, arguments: argparse.Namespace, dtype: torch.dtype, seconds: float = SECONDS):
    """(audio, text) keyword arguments of a model: noise, and tokens without padding."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(batch_size, round(seconds * RATE), generator=generator).to(arguments.device, dtype)
    ids = torch.randint(5, 64, (batch_size, TOKENS), generator=generator).to(arguments.device)
    audio = {"input_values": values, "attention_mask": torch.ones_like(values, dtype=torch.long)}
    return audio, {"input_ids": ids, "text_attention_mask": torch.ones_like(ids)}


def forward_passes(
    models: dict[str, Any],
    batch_size: int,
    arguments: argparse.Namespace,
    dtype: torch.dtype,
    seconds: float = SECONDS,
):
    """Forward passes on one batch, by name; `models` holds, by kind, those that the passes to be called need."""
    audio, text = build_batch(batch_size, arguments, dtype, seconds)

    def bare_encoders():
        audio_encoder, text_encoder = models[FLOOR]
        audio_encoder(input_values=audio["input_values"])
        text_encoder(input_ids=text["input_ids"], attention_mask=text["text_attention_mask"])

    return {
        FLOOR: bare_encoders,
        OURS: lambda: models[OURS](**audio, **text),
        AUDIO_ALONE: lambda: models[OURS](**audio),
        STOCK: lambda: models[STOCK](input_values=audio["input_values"]),
    }


# ---- how it is measured


def seconds_of(function: Callable[[], Any], device: torch.device) -> float:
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def in_turns(functions: Mapping[Any, Callable[[], Any]], repeats: int, device: torch.device) -> dict[Any, np.ndarray]:
    """Seconds [repeats] of each function, after one run of each that is not counted."""
    for function in functions.values():
        function()
    seconds: dict[Any, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for _ in range(repeats):
        for name in names:
            seconds[name].append(seconds_of(functions[name], device))
        names = names[1:] + names[:1]
    return {name: np.array(values) for name, values in seconds.items()}


def ratio(first: np.ndarray, second: np.ndarray) -> float:
    """Median over the turns of how many times longer the first took."""
    return float(np.median(first / second))


def start_peak(device: torch.device) -> float:
    """Count the peak from here; returns the MB in use: of the device's tensors, on a CPU of the whole process."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 1e6
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # see proc(5)
    return _status("VmRSS")


def peak_memory(device: torch.device) -> float:
    """MB, since `start_peak`."""
    return torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else _status("VmHWM")


def _status(name: str) -> float:
    """MB, as Linux tells of this process. `getrusage` would begin with the peak of the parent."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024 / 1e6


def in_child(function: Callable[..., Row], arguments: argparse.Namespace, **options: Any) -> Row:
    """Call a function of this file in a process of its own, whose memory can be measured."""
    with ProcessPoolExecutor(1, get_context("spawn"), prepare, (arguments,)) as child:
        return child.submit(function, arguments, **options).result()


def prepare(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()


# ---- sections: each returns its rows


@torch.no_grad()
def forward(arguments: argparse.Namespace) -> list[Row]:
    """Forward passes of 5 s clips with 24 tokens. The floor is the two bare encoders, called one after the other."""
    rows: list[Row] = []
    for dtype_name, dtype in DTYPES.items():
        for batch_size in arguments.batch_sizes:
            models = {kind: build_model(kind, arguments, dtype) for kind in (FLOOR, OURS, STOCK)}
            functions = forward_passes(models, batch_size, arguments, dtype)
            seconds = in_turns(functions, arguments.repeats, arguments.device)
            for name in functions:
                row = {"batch": batch_size, "dtype": dtype_name, "model": name}
                row["ms per clip"] = 1000 * float(np.median(seconds[name])) / batch_size
                rows.append(row | {"times the floor": ratio(seconds[name], seconds[FLOOR])})
            del functions, models
            gc.collect()
    return rows


def memory(arguments: argparse.Namespace) -> list[Row]:
    """Peak memory of a forward pass at batch 8 and of a training step at batch 16, 5 s clips with 24 tokens."""
    rows = [
        in_child(forward_memory, arguments, name=name, dtype=dtype)
        for name in (FLOOR, OURS, AUDIO_ALONE, STOCK)
        for dtype in DTYPES
    ]
    return rows + [
        in_child(training_memory, arguments, checkpointing=checkpointing, dtype=dtype)
        for checkpointing in (False, True)
        for dtype in DTYPES
    ]


@torch.no_grad()
def forward_memory(arguments: argparse.Namespace, name: str, dtype: str) -> Row:
    kind = OURS if name == AUDIO_ALONE else name
    models = {kind: build_model(kind, arguments, DTYPES[dtype])}
    run = forward_passes(models, 8, arguments, DTYPES[dtype])[name]
    before = start_peak(arguments.device)
    run()
    memory = {"peak MB": peak_memory(arguments.device), "before MB": before}
    return {"what": f"{name}, forward, batch 8", "dtype": dtype, **memory}


def training_memory(arguments: argparse.Namespace, checkpointing: bool, dtype: str) -> Row:
    """Steps of AdamW on all weights; bf16 is mixed precision, as in training."""
    batch_size = 16 if arguments.size == "full" else 2
    model = build_model(OURS, arguments).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    audio, text = build_batch(batch_size, arguments, torch.float32)
    labels = torch.arange(batch_size, device=arguments.device) % 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step():
        with torch.autocast(arguments.device.type, torch.bfloat16, enabled=dtype == "bf16"):
            loss = model(**audio, **text, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes the optimiser's states
    start_peak(arguments.device)
    seconds = [seconds_of(step, arguments.device) for _ in range(2)]
    name = f"MMSER, training step, batch {batch_size}" + (", gradient checkpointing" if checkpointing else "")
    peak = peak_memory(arguments.device)
    return {"what": name, "dtype": dtype, "peak MB": peak, "s per step": float(np.median(seconds))}


def read_clips(clips: datasets.Dataset) -> list[Row]:
    """Rows of a data set as inputs of a pipeline."""
    examples: Any = EmotionDataset(clips)
    rows = (examples[index] for index in range(len(clips)))
    return [{"raw": row["audio"], "sampling_rate": RATE, "text": row["text"]} for row in rows]


def lengths(arguments: argparse.Namespace) -> list[Row]:
    """Pipelines over shuffled test clips, in batches of 16: in the order given, grouped by length, and one by one. The
    default configuration goes through 48 of them, `--checkpoint` through all."""
    if not arguments.data_dir:
        raise ValueError("section lengths needs --data_dir: it is about clips of real lengths")
    test = load_emotion_dataset(arguments.data_dir)[0]["test"]
    test = test.select(np.random.default_rng(0).permutation(len(test)))
    ours = classifier_of(build_model(OURS, arguments), build_processor(), arguments)
    rows = orders("MMSER", ours, read_clips(test.select(range(min(48, len(test))))), arguments)
    if arguments.checkpoint:
        rows += orders("trained MMSER", load_classifier(arguments.checkpoint, arguments), read_clips(test), arguments)
    return rows


def orders(name: str, classifier: MMSERPipeline, clips: Any, arguments: argparse.Namespace) -> list[Row]:
    """One pipeline over the same list of clips in several orders."""
    results: dict[str, list] = {}

    def classify(order: str, items: Any, batch_size: int) -> None:
        results[order] = list(classifier(items, batch_size=batch_size))

    given, grouped, single = "batches in the order given", "grouped by length", "one by one"
    as_dataset: Any = torch.utils.data.Subset(clips, range(len(clips)))  # pipelines group lists, but not data sets
    inputs = {given: (as_dataset, 16), grouped: (clips, 16), single: (clips, 1)}
    functions = {order: partial(classify, order, *values) for order, values in inputs.items()}
    seconds = in_turns(functions, arguments.repeats, arguments.device)

    def scores(order: str) -> np.ndarray:
        by_label = [{entry["label"]: entry["score"] for entry in result} for result in results[order]]
        return np.array([[clip[label] for label in sorted(clip)] for clip in by_label])

    return [
        {
            "model": f"{name}, {order}",
            "clips": len(clips),
            "clips/s": len(clips) / float(np.median(seconds[order])),
            "times faster than the order given": ratio(seconds[given], seconds[order]),
            "largest difference of a score": float(np.abs(scores(order) - scores(single)).max()),
        }
        for order in functions
    ]


def noise_table(folder: Path, count: int, seconds: Sequence[float]) -> datasets.Dataset:
    """The training split of a data set of noise, with four speakers and all four classes, written to a new folder."""
    rng = np.random.default_rng(0)
    names = ("neutral", "happy", "sad", "angry")
    (folder / "train").mkdir(parents=True)
    lines = ["file_name,label,transcription,speaker"]
    for index in range(count):
        wave = 0.1 * rng.standard_normal(round(RATE * seconds[index % len(seconds)])).astype(np.float32)
        soundfile.write(folder / "train" / f"{index}.wav", wave, RATE)
        lines.append(f"{index}.wav,{names[index % 4]},word word {index},s{index // 4 % 4}")
    (folder / "train" / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return load_emotion_dataset(folder, allow_speaker_overlap=True)[0]["train"]


def build_trainer(
    model, processor: MMSERProcessor, folder: str, arguments: argparse.Namespace, **data
) -> MMSERTrainer:
    """A trainer for one epoch that says and saves nothing."""
    options = MMSERTrainingArguments(
        output_dir=folder,
        num_train_epochs=1,
        eval_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_num_workers=0,
        use_cpu=arguments.device.type == "cpu",
    )
    return MMSERTrainer(model, options, data_collator=MMSERDataCollator(processor), **data)


def cache(arguments: argparse.Namespace) -> list[Row]:
    """An epoch of training with both encoders frozen, encoding each clip and reading its states from the cache."""
    processor = build_processor()
    with tempfile.TemporaryDirectory() as temporary:
        clips = noise_table(Path(temporary) / "corpus", 128 if arguments.size == "full" else 16, [SECONDS])
        model = MMSERForAudioClassification(build_config(arguments)).to(arguments.device)
        model.freeze_audio_encoder()
        model.freeze_text_encoder()
        plain = EmotionDataset(clips, training=True, text_dropout=0.0, audio_dropout=0.0)
        start = time.perf_counter()
        states = EncoderStateCache(Path(temporary) / "states", model, processor)
        cached = CachedStatesDataset(plain, states)
        filling = time.perf_counter() - start

        clocks = {"uncached": TrainingClock(), "cached": TrainingClock()}
        functions = {}
        for (name, clock), dataset in zip(clocks.items(), (plain, cached), strict=True):
            trainer = build_trainer(model, processor, temporary, arguments, train_dataset=dataset, callbacks=[clock])
            functions[name] = trainer.train
        in_turns(functions, min(3, arguments.repeats), arguments.device)
        seconds = {name: np.array(clock.epochs[1:]) for name, clock in clocks.items()}
    return [
        {
            "clips": len(clips),
            "uncached epoch, s": float(np.median(seconds["uncached"])),
            "cached epoch, s": float(np.median(seconds["cached"])),
            "times faster": ratio(seconds["uncached"], seconds["cached"]),
            "filling the cache, s": filling,
        }
    ]


def evaluation(arguments: argparse.Namespace) -> list[Row]:
    """Time and memory of an evaluation by number of clips, with a tiny model: it is the rest that is looked at."""
    return [in_child(many_clips, arguments, count=count) for count in (100, 1000, 10000)]


@torch.no_grad()
def duration(arguments: argparse.Namespace) -> list[Row]:
    """Time of one clip by its length; the exponent is that of the length since the row above."""
    models = {kind: build_model(kind, arguments) for kind in (FLOOR, OURS)}
    durations = (2.0, 4.0, 8.0, 16.0, 30.0)
    functions: dict[Any, Callable[[], Any]] = {}
    for length in durations:
        passes = forward_passes(models, 1, arguments, torch.float32, length)
        functions |= {(kind, length): passes[kind] for kind in models}
    seconds = in_turns(functions, arguments.repeats, arguments.device)
    rows: list[Row] = [{"seconds of audio": length} for length in durations]
    for kind in (OURS, FLOOR):
        medians = [float(np.median(seconds[kind, length])) for length in durations]
        exponents = np.diff(np.log(medians)) / np.diff(np.log(durations))
        for row, median, exponent in zip(rows, medians, [None, *exponents.tolist()], strict=True):
            row |= {f"{kind}, ms per clip": 1000 * median, f"{kind}, exponent": exponent}
    return rows


def many_clips(arguments: argparse.Namespace, count: int) -> Row:
    """Evaluate `count` clips with the trainer."""
    processor = build_processor()
    model = MMSERForAudioClassification(MMSERConfig(**TINY))
    with tempfile.TemporaryDirectory() as temporary:
        clips = noise_table(Path(temporary) / "corpus", 100, [0.5, 1.0, 1.5])
        clips = clips.select(np.arange(count) % len(clips))
        trainer = build_trainer(model, processor, temporary, arguments)
        trainer.evaluate(EmotionDataset(clips.select(range(64))))
        before = start_peak(arguments.device)
        seconds = seconds_of(lambda: trainer.evaluate(EmotionDataset(clips)), arguments.device)
    memory = {"peak MB": peak_memory(arguments.device), "before MB": before}
    return {"clips": count, "ms per clip": 1000 * seconds / count, **memory}


@contextlib.contextmanager
def exported(arguments: argparse.Namespace, dtypes: Sequence[str]) -> Iterator[tuple[Path, dict[str, Path]]]:
    """(checkpoint, exports by dtype); the checkpoint is `--checkpoint`, else the default with random weights."""
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint = Path(arguments.checkpoint or Path(temporary) / "checkpoint")
        if not arguments.checkpoint:
            register_auto_classes()
            MMSERForAudioClassification(build_config(arguments)).save_pretrained(checkpoint)
            build_processor().save_pretrained(checkpoint)
        folders = {dtype: Path(temporary) / dtype for dtype in dtypes}
        for dtype, folder in folders.items():
            export_checkpoint(checkpoint, folder, dtype=dtype)
        yield checkpoint, folders


def export(arguments: argparse.Namespace) -> list[Row]:
    """A clip of 5 s with 24 words at batch 1: PyTorch against onnxruntime. With `--data_dir` also the weighted F1."""
    with exported(arguments, ("float32", "int8")) as (checkpoint, folders):
        ours = "PyTorch float32"
        classifiers = {ours: load_classifier(checkpoint, arguments)}
        files = {ours: checkpoint / "model.safetensors"}
        for dtype, folder in folders.items():
            classifiers[f"onnxruntime {dtype}"] = MMSERPipeline.from_onnx(folder)
            files[f"onnxruntime {dtype}"] = folder / "model.onnx"
        wave = 0.1 * np.random.default_rng(0).standard_normal(round(SECONDS * RATE)).astype(np.float32)
        clip = {"raw": wave, "sampling_rate": RATE, "text": " ".join(["word"] * (TOKENS - 2))}
        inputs = {name: classifier.preprocess(clip) for name, classifier in classifiers.items()}

        def run(name: str) -> Any:
            return classifiers[name].forward(dict(inputs[name]))

        functions = {name: partial(run, name) for name in classifiers}
        seconds = in_turns(functions, max(7, 3 * arguments.repeats), arguments.device)
        return [
            {
                "model": name,
                "ms per clip": 1000 * float(np.median(seconds[name])),
                "times faster than PyTorch": ratio(seconds[ours], seconds[name]),
                "file, MB": files[name].stat().st_size / 1e6,
                "weighted F1, test": weighted_f1(classifier, arguments),
            }
            for name, classifier in classifiers.items()
        ]


def load_classifier(checkpoint: str | Path, arguments: argparse.Namespace) -> MMSERPipeline:
    register_auto_classes()
    model = MMSERForAudioClassification.from_pretrained(checkpoint, dtype=torch.float32)
    return classifier_of(model, MMSERProcessor.from_pretrained(checkpoint), arguments)


def classifier_of(model: Any, processor: MMSERProcessor, arguments: argparse.Namespace) -> MMSERPipeline:
    return MMSERPipeline(model=model, processor=processor, device=arguments.device, task="audio-classification")


def weighted_f1(classifier: MMSERPipeline, arguments: argparse.Namespace) -> float | None:
    """Of `--checkpoint` on the test split of `--data_dir`, if both are given."""
    if not (arguments.data_dir and arguments.checkpoint):
        return None
    splits, names = load_emotion_dataset(arguments.data_dir)[:2]
    results = classifier(read_clips(splits["test"]), batch_size=16, top_k=1)
    predictions = [names.index(result[0]["label"]) for result in results]
    return compute_classification_metrics(predictions, splits["test"]["labels"], names)["weighted_f1"]


def stream(arguments: argparse.Namespace) -> list[Row]:
    """Recordings of 6 and 60 minutes in chunks of 8 s with 1 s of context on each side, int8 with onnxruntime."""
    rows: list[Row] = []
    with exported(arguments, ("int8",)) as (_, folders), tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "recording.flac"
        for minutes in (6, 60):
            rng = np.random.default_rng(0)
            with soundfile.SoundFile(path, "w", RATE, 1) as file:
                for _ in range(minutes):
                    file.write(0.1 * rng.standard_normal(60 * RATE).astype(np.float32))
            rows.append(in_child(classify_recording, arguments, folder=folders["int8"], path=str(path)))
    return rows


def classify_recording(arguments: argparse.Namespace, folder: Path, path: str) -> Row:
    classifier = MMSERPipeline.from_onnx(folder)
    options = {"chunk_length_s": 8, "stride_length_s": 1, "batch_size": 4}
    classifier({"raw": np.zeros(40 * RATE), "sampling_rate": RATE}, **options)
    before, result = start_peak(torch.device("cpu")), {}
    seconds = seconds_of(lambda: result.update(classifier(path, **options)), arguments.device)
    duration = result["chunks"][-1]["timestamp"][1]
    return {
        "recording, min": duration / 60,
        "chunks": len(result["chunks"]),
        "seconds": seconds,
        "real-time factor": seconds / duration,
        "peak MB": peak_memory(torch.device("cpu")),
        "before MB": before,
    }


def live(arguments: argparse.Namespace) -> list[Row]:
    """A stream in pushes of 0.1 s, and one of silence. On a CPU the times are those of the processor."""
    classifier = (
        load_classifier(arguments.checkpoint, arguments)
        if arguments.checkpoint
        else classifier_of(build_model(OURS, arguments), build_processor(), arguments)
    )
    rows = [listen(classifier, seconds, False, arguments) for seconds in (2.0, 4.0, 8.0)]
    return [*rows, listen(classifier, 4.0, True, arguments)]


def listen(classifier: MMSERPipeline, chunk: float, is_silence: bool, arguments: argparse.Namespace) -> Row:
    """Push until `--repeats` pieces of a chunk have come, after one that is not counted."""
    clock = time.process_time if arguments.device.type == "cpu" else time.perf_counter
    stream = MMSERStream(classifier, sampling_rate=RATE, chunk_length_s=chunk, skip_silence=is_silence)
    samples = 1e-4 * np.random.default_rng(0).standard_normal(RATE // 10).astype(np.float32)
    events: list[StreamEvent] = []
    seconds, pushes = [], []
    while len(events) <= arguments.repeats:
        start = clock()
        new = stream.push(samples)
        if events:
            pushes.append(clock() - start)
            seconds += pushes[-1:] if new else []
        events += new
    return {
        "chunk, s": chunk,
        "what is heard": "silence" if is_silence else "all is classified",
        "piece, s": events[-1].end - events[-1].start,
        "context behind it, s": chunk / 6,
        "ms per event": 1000 * float(np.median(seconds)),
        "ms per second of audio": 1000 * sum(pushes) / (len(pushes) / 10),
    }


SECTIONS = {
    section.__name__: section
    for section in (forward, lengths, memory, cache, evaluation, duration, export, stream, live)
}


def forward_table(rows: Sequence[Row]) -> list[Row]:
    """A row for each dtype and batch size."""
    found: dict[tuple, Row] = {}
    for row in rows:
        own = found.setdefault((row["dtype"], row["batch"]), {"batch": row["batch"], "dtype": row["dtype"]})
        own[f"{row['model']}, ms per clip"] = row["ms per clip"]
        if row["model"] == OURS:
            own["times the floor"] = f"{row['times the floor']:.3f}"
    return list(found.values())


def predict_million_hours(report: Mapping[str, Any]) -> list[Row]:
    """What 1,000,000 hours of recordings would take, computed from what was measured: nobody has run it."""
    hour = max(report["stream"]["rows"], key=lambda row: row["recording, min"])
    factors = {"stream, 60 min": (hour["real-time factor"], report["stream"]["setting"]["threads"])}
    for dtype in DTYPES:
        (row,) = (
            row for row in report["forward"]["rows"] if (row["batch"], row["dtype"], row["model"]) == (8, dtype, OURS)
        )
        seconds = row["ms per clip"] / 1000 / SECONDS
        factors[f"forward, batch 8, {dtype}"] = (seconds, report["forward"]["setting"]["threads"])
    return [
        {
            "measured in": name,
            "seconds per second of audio": seconds,
            "threads": threads,
            "core-hours for 1,000,000 h": round(1e6 * seconds * threads, -2),
            "days on 1,000 cores": 1e6 * seconds * threads / 1000 / 24,
        }
        for name, (seconds, threads) in factors.items()
    ]


def make_tables(report: Mapping[str, Any]) -> dict[str, str]:
    tables = {}
    for name, section in report.items():
        rows = forward_table(section["rows"]) if name.startswith("forward") else section["rows"]
        tables[f"speed:{name.replace(', ', '_').replace(' ', '_')}"] = table(rows, three_digits)
    if {"forward", "stream"} <= report.keys() and report["forward"]["setting"]["size"] == "full":
        tables["speed:million_hours"] = table(predict_million_hours(report), three_digits)
    return tables


def parse_flags(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny: to try this script")
    parser.add_argument("--repeats", type=int, default=7, help="turns of which the median is taken")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--batch_sizes", type=int, nargs="+", help="of section forward, which is then kept beside that of all sizes"
    )
    parser.add_argument("--data_dir", help="data set whose test split gives clips (lengths) and scores (export)")
    parser.add_argument("--checkpoint", help="trained MMSER for the sections lengths, export, stream and live")
    return parse_arguments(parser, "speed", arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    parsed = parse_flags(arguments)
    prepare(parsed)
    report: dict[str, Any] = read_results(parsed.output)[0] if parsed.from_results or parsed.output.exists() else {}
    forward_name = f"forward, batch {' '.join(map(str, parsed.batch_sizes))}" if parsed.batch_sizes else "forward"
    parsed.batch_sizes = parsed.batch_sizes or BATCH_SIZES
    for section in [] if parsed.from_results else parsed.sections:
        print(f"{section}: {SECTIONS[section].__doc__}", flush=True)
        setting = {"size": parsed.size, "repeats": parsed.repeats, **environment(parsed.device)}
        if parsed.data_dir and section in ("lengths", "export"):
            setting["data"] = Path(parsed.data_dir).name
        if section in ("export", "stream", "live"):
            setting["model"] = "a trained checkpoint" if parsed.checkpoint else "random weights"
        name = forward_name if section == "forward" else section
        report[name] = {"setting": setting, "rows": SECTIONS[section](parsed)}
        print(make_tables({name: report[name]}).popitem()[1], flush=True)
        parsed.output.write_text(short_json(report), encoding="utf-8")  # a later section may fail
    publish(make_tables(report), report, [], parsed)


if __name__ == "__main__":
    main()
