# SPDX-License-Identifier: Apache-2.0
"""How fast MMSER is: against its bare encoders, against stock Wav2Vec2, exported, cached, compiled, and over an hour.

    python benchmarks/speed.py
    python benchmarks/speed.py --sections forward lengths
    python benchmarks/speed.py --sections export stream --checkpoint runs/mine --data_dir my_data

Models have the default configuration at full size with random weights, on which speed does not depend. What is
told in times faster or slower ran in turns, so that whatever slows the machine slows all of it; times are medians,
and ratios are medians of the ratios of each turn. Prints tables and updates `benchmarks/results/speed.json`, section
by section.
"""

import argparse
import contextlib
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import soundfile
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import (
    AutoModel,
    BertTokenizer,
    TrainerCallback,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForSequenceClassification,
    pipeline,
)
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent.parent))
from configuration_mmser import MMSERConfig
from mmser.arguments import MMSERTrainingArguments
from mmser.batches import MMSERDataCollator
from mmser.caching import CachedStatesDataset, EncoderStateCache
from mmser.examples import EmotionDataset
from mmser.export import export_checkpoint
from mmser.loading import load_emotion_dataset
from mmser.metrics import compute_classification_metrics
from mmser.results import environment
from mmser.tables import format_table
from mmser.trainer import MMSERTrainer
from modeling_mmser import MMSERForAudioClassification, register_auto_classes
from processing_mmser import MMSERPipeline, MMSERProcessor

Rows = list[dict[str, Any]]

RATE = 16000  # Hz
SECONDS, TOKENS = 5.0, 24
BATCH_SIZES = (1, 8, 32)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FLOOR, OURS, AUDIO_ALONE, STOCK = "bare encoders", "MMSER", "MMSER, audio alone", "Wav2Vec2ForSequenceClassification"
# Seconds at the 0, 5, ... 100 % quantiles of the 3,278 clips of ser4 (8 corpora of acted speech)
LENGTHS = (
    *(0.55, 0.9, 0.99, 1.11, 1.43, 1.6, 1.77, 1.96, 2.0, 2.12, 2.36),
    *(2.53, 2.88, 3.0, 3.0, 3.0, 3.33, 3.5, 3.67, 3.9, 8.98),
)

TINY: dict[str, Any] = {
    "audio_config": {
        "model_type": "wav2vec2",
        "conv_dim": [8] * 7,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
    },
    "text_config": {
        "model_type": "bert",
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
}


# ---- what is measured


def build_config(arguments: argparse.Namespace) -> MMSERConfig:
    """The default configuration, or a tiny one: to try this script, and for what the model does not matter to."""
    return MMSERConfig(**(TINY if arguments.size == "tiny" else {}))


def build_processor() -> MMSERProcessor:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "word"]
    return MMSERProcessor(Wav2Vec2FeatureExtractor(), BertTokenizer(vocab={word: i for i, word in enumerate(words)}))


def build_model(kind: str, arguments: argparse.Namespace, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """One of `FLOOR` (a `ModuleList`), `OURS` and `STOCK`, in eval mode on the device."""
    torch.manual_seed(0)
    config = build_config(arguments)
    if kind == FLOOR:
        model: torch.nn.Module = torch.nn.ModuleList(
            [AutoModel.from_config(config.audio_config), AutoModel.from_config(config.text_config)]
        )
    elif kind == STOCK:
        stock = config.audio_config
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
    return {"input_values": values, "attention_mask": torch.ones_like(values, dtype=torch.long)}, {
        "input_ids": ids,
        "text_attention_mask": torch.ones_like(ids),
    }


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


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(function: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def in_turns(functions: dict[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, np.ndarray]:
    """Seconds [repeats] of each function, after one run of each that is not counted."""
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats):
        names = list(functions)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(seconds_of(functions[name], device))
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


def in_child(function: str, arguments: argparse.Namespace, **options: Any) -> dict[str, Any]:
    """Call a function of this file in a process of its own, of which the memory can be told."""
    job = json.dumps({"function": function, "options": options})
    flags = ["--size", arguments.size, "--threads", str(arguments.threads), "--device", str(arguments.device)]
    command = [sys.executable, __file__, "--child", job, *flags]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def matrix_product(dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], Any], int]:
    """A large matrix product, the best that a model of such could do, and its FLOPs."""
    size, count = (8192, 10) if device.type == "cuda" else (1024, 1)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def products():
        for _ in range(count):
            a @ b

    return products, 2 * size**3 * count


def count_flops(function: Callable[[], Any]) -> int:
    """FLOPs of matrix products, convolutions and attention."""
    fused_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    mapping = {fused_on_cpu: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        function()
    return counter.get_total_flops()


def costliest(function: Callable[[], Any], count: int = 8) -> dict[str, float]:
    """Shares of a function's time on the CPU that its costliest operations have, without what they call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        function()
    seconds = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    whole = sum(seconds.values())
    return {name: seconds[name] / whole for name in sorted(seconds, key=seconds.__getitem__, reverse=True)[:count]}


# ---- sections: each returns its rows


@torch.no_grad()
def forward(arguments: argparse.Namespace) -> Rows:
    """Forward passes of 5 s clips with 24 tokens. The floor is the two bare encoders, called one after the other."""
    rows = []
    for dtype_name, dtype in DTYPES.items():
        products, product_flops = matrix_product(dtype, arguments.device)
        for batch_size in arguments.batch_sizes:
            models = {kind: build_model(kind, arguments, dtype) for kind in (FLOOR, OURS, STOCK)}
            functions = forward_passes(models, batch_size, arguments, dtype)
            seconds = in_turns({**functions, "products": products}, arguments.repeats, arguments.device)
            rate = product_flops / seconds["products"]
            for name, function in functions.items():
                median = float(np.median(seconds[name]))
                rows.append(
                    {
                        "batch": batch_size,
                        "dtype": dtype_name,
                        "model": name,
                        "ms per clip": 1000 * median / batch_size,
                        "clips/s": batch_size / median,
                        "real-time factor": median / (batch_size * SECONDS),
                        "times the floor": ratio(seconds[name], seconds[FLOOR]),
                        "share of matrix rate": float(np.median(count_flops(function) / seconds[name] / rate)),
                    }
                )
            show(rows[-len(functions) :])
            del functions, models
            gc.collect()
    return rows


@contextlib.contextmanager
def watch(modules: dict[str, torch.nn.Module], device: torch.device) -> Iterator[dict[str, list[float]]]:
    """The seconds of each call of some modules, by name."""
    laps: dict[str, list[float]] = {name: [] for name in modules}
    starts: dict[str, float] = {}

    def before(name: str, *_):
        synchronize(device)
        starts[name] = time.perf_counter()

    def after(name: str, *_):
        synchronize(device)
        laps[name].append(time.perf_counter() - starts[name])

    hooks = []
    for name, module in modules.items():
        hooks += [module.register_forward_pre_hook(partial(before, name))]
        hooks += [module.register_forward_hook(partial(after, name))]
    try:
        yield laps
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def parts(arguments: argparse.Namespace) -> Rows:
    """Where the time of a forward pass goes: inside both encoders, as they are bare and as ours, and beyond them."""
    rows = []
    for dtype_name, dtype in DTYPES.items():
        models = {kind: build_model(kind, arguments, dtype) for kind in (FLOOR, OURS)}
        encoders = {FLOOR: models[FLOOR], OURS: (models[OURS].mmser.audio_encoder, models[OURS].mmser.text_encoder)}
        modules = {}
        for kind, (audio_encoder, text_encoder) in encoders.items():
            modules |= {f"{kind}: audio encoder": audio_encoder, f"{kind}: text encoder": text_encoder}
            modules[f"{kind}: first convolution"] = audio_encoder.feature_extractor.conv_layers[0]
        for batch_size in (1, 8):
            functions = forward_passes(models, batch_size, arguments, dtype)
            with watch(modules, arguments.device) as laps:
                totals = in_turns({kind: functions[kind] for kind in encoders}, arguments.repeats, arguments.device)
            seconds = {name: np.array(values[1:]) for name, values in laps.items()}  # the first is not counted
            for kind in encoders:
                inside = seconds[f"{kind}: audio encoder"] + seconds[f"{kind}: text encoder"]
                seconds[f"{kind}: beyond the encoders"] = totals[kind] - inside
            for part in ("audio encoder", "first convolution", "text encoder", "beyond the encoders"):
                both = {kind: 1000 * float(np.median(seconds[f"{kind}: {part}"])) / batch_size for kind in encoders}
                name = "of which the first convolution" if part == "first convolution" else part
                rows.append({"dtype": dtype_name, "batch": batch_size, "part": name})
                rows[-1] |= {f"{kind}, ms per clip": value for kind, value in both.items()}
            show(rows[-4:])
    return rows


def memory(arguments: argparse.Namespace) -> Rows:
    """Peak memory of a forward pass at batch 8 and of a training step at batch 16, 5 s clips with 24 tokens."""
    jobs = [("forward_memory", {"name": name}) for name in (FLOOR, OURS, AUDIO_ALONE, STOCK)]
    jobs += [("training_memory", {"checkpointing": value}) for value in (False, True)]
    rows = []
    for function, options in jobs:
        for dtype_name in DTYPES:
            row = in_child(function, arguments, dtype_name=dtype_name, **options)
            rows.append(row)
            show([row])
    return rows


def forward_memory(arguments: argparse.Namespace, name: str, dtype_name: str) -> dict[str, Any]:
    kind, dtype = OURS if name == AUDIO_ALONE else name, DTYPES[dtype_name]
    functions = forward_passes({kind: build_model(kind, arguments, dtype)}, 8, arguments, dtype)
    before = start_peak(arguments.device)
    with torch.no_grad():
        functions[name]()
    return {
        "what": f"{name}, forward, batch 8",
        "dtype": dtype_name,
        "peak MB": peak_memory(arguments.device),
        "before MB": before,
    }


def training_memory(arguments: argparse.Namespace, checkpointing: bool, dtype_name: str) -> dict[str, Any]:
    """Steps of AdamW on all weights; bf16 is mixed precision, as in training."""
    batch_size = 16 if arguments.size == "full" else 2
    model = build_model(OURS, arguments).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    audio, text = build_batch(batch_size, arguments, torch.float32)
    labels = torch.arange(batch_size, device=arguments.device) % 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step():
        with torch.autocast(arguments.device.type, torch.bfloat16, enabled=dtype_name == "bf16"):
            loss = model(**audio, **text, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes the optimiser's states
    start_peak(arguments.device)
    seconds = [seconds_of(step, arguments.device) for _ in range(2)]
    return {
        "what": f"MMSER, training step, batch {batch_size}" + (", gradient checkpointing" if checkpointing else ""),
        "dtype": dtype_name,
        "peak MB": peak_memory(arguments.device),
        "s per step": float(np.median(seconds)),
    }


def clips_of_real_lengths(arguments: argparse.Namespace, count: int | None) -> tuple[Rows, str]:
    """Inputs of a pipeline: clips of a data set's test split, else noise of the lengths of ser4; and what they are.
    No count takes all of a data set's."""
    rng = np.random.default_rng(0)
    if arguments.data_dir:
        table = load_emotion_dataset(arguments.data_dir)[0]["test"]
        clips = read_clips(table.select(rng.permutation(len(table))[:count]))
        return clips, f"{len(clips)} clips of {Path(arguments.data_dir).name}"
    quantiles = np.linspace(0, 1, len(LENGTHS))
    seconds = np.interp(rng.random(count), quantiles, LENGTHS)
    noise = [0.1 * rng.standard_normal(round(RATE * length)).astype(np.float32) for length in seconds]
    clips = [{"raw": wave, "sampling_rate": RATE, "text": " ".join(["word"] * 8)} for wave in noise]
    return clips, f"{count} clips of noise with the lengths of ser4"


def read_clips(table) -> Rows:
    """Rows of a data set as inputs of a pipeline."""
    examples = EmotionDataset(table)
    rows = (examples[index] for index in range(len(table)))
    return [{"raw": row["audio"], "sampling_rate": RATE, "text": row["text"]} for row in rows]


class Items(torch.utils.data.Dataset):
    """A list that pipelines go through in its order."""

    def __init__(self, items: Sequence[Any]):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def lengths(arguments: argparse.Namespace) -> Rows:
    """Pipelines over clips of real lengths, batch 16: in the order given, grouped by length, one by one, and stock; a
    trained checkpoint over all clips, if one is given and a data set is."""
    ours = MMSERPipeline(
        model=build_model(OURS, arguments),
        processor=build_processor(),
        device=arguments.device,
        task="audio-classification",
    )
    stock = pipeline(
        "audio-classification",
        model=build_model(STOCK, arguments),
        feature_extractor=Wav2Vec2FeatureExtractor(return_attention_mask=True),
        device=arguments.device,
    )
    clips, what = clips_of_real_lengths(arguments, arguments.clips)
    rows = orders("MMSER", ours, clips, what, arguments, {f"{STOCK} and its pipeline": stock})
    if arguments.checkpoint and arguments.data_dir:
        clips, what = clips_of_real_lengths(arguments, None)
        rows += orders("trained MMSER", load_classifier(arguments.checkpoint, arguments), clips, what, arguments)
    return rows


def orders(
    name: str,
    classifier: MMSERPipeline,
    clips: Rows,
    what: str,
    arguments: argparse.Namespace,
    others: Mapping[str, Any] | None = None,
) -> Rows:
    """A pipeline over clips (`what` they are) in several orders, and other pipelines that take their audio alone."""
    batch_size = 16
    audio_clips = [{"raw": clip["raw"], "sampling_rate": RATE} for clip in clips]
    results: dict[str, list] = {}

    def keep(key: str, function: Callable[[], Any]) -> Callable[[], None]:
        def run():
            results[key] = list(function())

        return run

    fixed, grouped, single = f"{name}, batches in the order given", f"{name}, grouped by length", f"{name}, one by one"
    functions: dict[str, Callable[[], Any]] = {
        fixed: keep(fixed, lambda: classifier(Items(clips), batch_size=batch_size)),
        grouped: keep(grouped, lambda: classifier(clips, batch_size=batch_size)),
        single: keep(single, lambda: classifier(clips, batch_size=1)),
        f"{grouped}, audio alone": lambda: classifier(audio_clips, batch_size=batch_size),
    }
    for other, stock in (others or {}).items():
        functions[other] = partial(stock, audio_clips, batch_size=batch_size)
    seconds = in_turns(functions, arguments.repeats, arguments.device)
    audio_seconds = sum(len(clip["raw"]) for clip in clips) / RATE

    def scores(key: str) -> np.ndarray:
        by_label = [{entry["label"]: entry["score"] for entry in result} for result in results[key]]
        return np.array([[clip[label] for label in sorted(clip)] for clip in by_label])

    rows = []
    for key in functions:
        median = float(np.median(seconds[key]))
        rows.append(
            {
                "model": key,
                "clips": what,
                "clips/s": len(clips) / median,
                "real-time factor": median / audio_seconds,
                "times faster than the order given": ratio(seconds[fixed], seconds[key]),
            }
        )
        if key in results:
            rows[-1]["largest difference of a score"] = float(np.abs(scores(key) - scores(single)).max())
    show(rows)
    return rows


@torch.no_grad()
def compiled(arguments: argparse.Namespace) -> Rows:
    """`torch.compile` of the whole model, encoders and all."""
    model = build_model(OURS, arguments)
    rows = []
    for batch_size in (1, 8):
        audio, text = build_batch(batch_size, arguments, torch.float32)
        model(**audio, **text)  # the library hooks its encoders at the first call, which would break the graph
        torch._dynamo.reset()
        graphs = torch._dynamo.explain(model)(**audio, **text).graph_count
        torch._dynamo.reset()
        functions = {
            "eager": partial(model, **audio, **text),
            "compiled": partial(torch.compile(model), **audio, **text),
        }
        seconds = in_turns(functions, arguments.repeats, arguments.device)
        rows.append(
            {
                "batch": batch_size,
                "eager, ms": 1000 * float(np.median(seconds["eager"])),
                "compiled, ms": 1000 * float(np.median(seconds["compiled"])),
                "times faster": ratio(seconds["eager"], seconds["compiled"]),
                "graphs": graphs,
            }
        )
    show(rows)
    return rows


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


class EpochTimer(TrainerCallback):
    """Seconds of each epoch, without what a trainer does before the first and after the last."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._start = time.perf_counter()

    def on_epoch_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self._start)


def cache(arguments: argparse.Namespace) -> Rows:
    """An epoch of training with both encoders frozen, encoding each clip and reading its states from the cache."""
    processor = build_processor()
    with tempfile.TemporaryDirectory() as temporary:
        table = noise_table(Path(temporary) / "corpus", arguments.cached_clips, [SECONDS])
        model = MMSERForAudioClassification(build_config(arguments)).to(arguments.device)
        model.freeze_audio_encoder()
        model.freeze_text_encoder()
        plain = EmotionDataset(table, training=True, text_dropout=0.0, audio_dropout=0.0)
        start = time.perf_counter()
        states = EncoderStateCache(Path(temporary) / "states", model, processor)
        cached = CachedStatesDataset(plain, states)
        filling = time.perf_counter() - start

        timers = {"uncached": EpochTimer(), "cached": EpochTimer()}
        functions = {}
        for (name, timer), dataset in zip(timers.items(), (plain, cached), strict=True):
            trainer = build_trainer(model, processor, temporary, arguments, train_dataset=dataset, callbacks=[timer])
            functions[name] = trainer.train
        in_turns(functions, min(3, arguments.repeats), arguments.device)
        seconds = {name: np.array(timer.seconds[1:]) for name, timer in timers.items()}
    rows = [
        {
            "clips": len(table),
            "uncached epoch, s": float(np.median(seconds["uncached"])),
            "cached epoch, s": float(np.median(seconds["cached"])),
            "times faster": ratio(seconds["uncached"], seconds["cached"]),
            "filling the cache, s": filling,
            "operations of a cached epoch": costliest(functions["cached"]),
        }
    ]
    show(rows)
    return rows


@torch.no_grad()
def growth(arguments: argparse.Namespace) -> Rows:
    """Time and memory by number of clips (with a tiny model: it is the rest that is looked at), time by length."""
    rows = []
    for count in (100, 1000, 10000):
        rows.append(in_child("many_clips", arguments, count=count))
        show(rows[-1:])
    models = {kind: build_model(kind, arguments) for kind in (FLOOR, OURS)}
    lengths = (2.0, 4.0, 8.0, 16.0, 30.0)
    functions = {}
    for length in lengths:
        passes = forward_passes(models, 1, arguments, torch.float32, length)
        functions |= {f"{kind}, {length:g} s": passes[kind] for kind in models}
    seconds = in_turns(functions, arguments.repeats, arguments.device)
    medians = {kind: [float(np.median(seconds[f"{kind}, {length:g} s"])) for length in lengths] for kind in models}
    exponents = {kind: np.diff(np.log(medians[kind])) / np.diff(np.log(lengths)) for kind in models}
    for index, length in enumerate(lengths):
        rows.append(
            {
                "what": f"one clip of {length:g} s, {arguments.size} size",
                "ms per clip": 1000 * medians[OURS][index],
                "ms per second of audio": 1000 * medians[OURS][index] / length,
                "exponent since the last": float(exponents[OURS][index - 1]) if index else None,
                f"{FLOOR}, ms per clip": 1000 * medians[FLOOR][index],
                f"{FLOOR}, exponent": float(exponents[FLOOR][index - 1]) if index else None,
            }
        )
    show(rows[-len(lengths) :])
    return rows


def many_clips(arguments: argparse.Namespace, count: int) -> dict[str, Any]:
    """Evaluate `count` clips with the trainer."""
    processor = build_processor()
    model = MMSERForAudioClassification(MMSERConfig(**TINY))
    with tempfile.TemporaryDirectory() as temporary:
        table = noise_table(Path(temporary) / "corpus", 100, [0.5, 1.0, 1.5])
        table = table.select(np.arange(count) % len(table))
        trainer = build_trainer(model, processor, temporary, arguments)
        trainer.evaluate(EmotionDataset(table.select(range(64))))
        before = start_peak(arguments.device)
        seconds = seconds_of(lambda: trainer.evaluate(EmotionDataset(table)), arguments.device)
    return {
        "what": f"evaluation of {count:,} clips, tiny model",
        "ms per clip": 1000 * seconds / count,
        "peak MB": peak_memory(arguments.device),
        "before MB": before,
    }


@contextlib.contextmanager
def exported(arguments: argparse.Namespace, dtypes: Sequence[str]) -> Iterator[tuple[Path, dict[str, Path]]]:
    """(checkpoint, exports by dtype); the checkpoint is `--checkpoint`, else the default with random weights."""
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint = Path(arguments.checkpoint or Path(temporary) / "checkpoint")
        if not arguments.checkpoint:
            register_auto_classes()
            MMSERForAudioClassification(build_config(arguments)).save_pretrained(checkpoint)
            build_processor().save_pretrained(checkpoint)
        folders = {}
        for dtype in dtypes:
            folders[dtype] = Path(temporary) / dtype
            export_checkpoint(checkpoint, folders[dtype], dtype=dtype)
        yield checkpoint, folders


def export(arguments: argparse.Namespace) -> Rows:
    """A clip of 5 s with 24 words at batch 1: PyTorch against onnxruntime. With `--data_dir` also the weighted F1."""
    rows = []
    with exported(arguments, ("float32", "int8")) as (checkpoint, folders):
        classifiers = {"PyTorch float32": load_classifier(checkpoint, arguments)}
        for dtype, folder in folders.items():
            classifiers[f"onnxruntime {dtype}"] = MMSERPipeline.from_onnx(folder)
        wave = 0.1 * np.random.default_rng(0).standard_normal(round(SECONDS * RATE)).astype(np.float32)
        clip = {"raw": wave, "sampling_rate": RATE, "text": " ".join(["word"] * (TOKENS - 2))}
        inputs = {name: classifier.preprocess(clip) for name, classifier in classifiers.items()}
        functions = {name: lambda name=name: classifiers[name].forward(dict(inputs[name])) for name in classifiers}
        seconds = in_turns(functions, max(7, 3 * arguments.repeats), arguments.device)
        weights = checkpoint / "model.safetensors"
        sizes = [weights.stat().st_size, *((folder / "model.onnx").stat().st_size for folder in folders.values())]
        scores = [weighted_f1(classifier, arguments) for classifier in classifiers.values()]
        for name, size, score in zip(classifiers, sizes, scores, strict=True):
            rows.append(
                {
                    "model": name,
                    "ms per clip": 1000 * float(np.median(seconds[name])),
                    "times faster than PyTorch": ratio(seconds["PyTorch float32"], seconds[name]),
                    "file, MB": size / 1e6,
                    "share of float32": size / sizes[0],
                    "weighted F1, test": score,
                }
            )
    show(rows)
    return rows


def load_classifier(checkpoint: str | Path, arguments: argparse.Namespace) -> MMSERPipeline:
    register_auto_classes()
    model = MMSERForAudioClassification.from_pretrained(checkpoint, dtype=torch.float32)
    processor = MMSERProcessor.from_pretrained(checkpoint)
    return MMSERPipeline(model=model, processor=processor, device=arguments.device, task="audio-classification")


def weighted_f1(classifier: MMSERPipeline, arguments: argparse.Namespace) -> float | None:
    """Of `--checkpoint` on the test split of `--data_dir`, if both are given."""
    if not (arguments.data_dir and arguments.checkpoint):
        return None
    splits, names = load_emotion_dataset(arguments.data_dir)[:2]
    clips = read_clips(splits["test"])
    results = classifier(clips, batch_size=16, top_k=1)
    predictions = [names.index(result[0]["label"]) for result in results]
    return compute_classification_metrics(predictions, splits["test"]["labels"], names)["weighted_f1"]


def stream(arguments: argparse.Namespace) -> Rows:
    """Recordings of 6 and 60 minutes in chunks of 8 s with 1 s of context on each side, int8 with onnxruntime."""
    rows = []
    with exported(arguments, ("int8",)) as (_, folders), tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "recording.flac"
        for minutes in (6, 60):
            rng = np.random.default_rng(0)
            with soundfile.SoundFile(path, "w", RATE, 1) as file:
                for _ in range(minutes):
                    file.write(0.1 * rng.standard_normal(60 * RATE).astype(np.float32))
            rows.append(in_child("classify_recording", arguments, export=str(folders["int8"]), path=str(path)))
            show(rows[-1:])
    return rows


def classify_recording(arguments: argparse.Namespace, export: str, path: str) -> dict[str, Any]:
    classifier = MMSERPipeline.from_onnx(export)
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


SECTIONS = {
    "forward": forward,
    "parts": parts,
    "lengths": lengths,
    "memory": memory,
    "compile": compiled,
    "cache": cache,
    "growth": growth,
    "export": export,
    "stream": stream,
}
CHILDREN = {
    function.__name__: function for function in (forward_memory, training_memory, many_clips, classify_recording)
}


def show(rows: Rows) -> None:
    """Print rows, with as many digits as they deserve."""

    def short_form(value: Any) -> Any:
        if isinstance(value, dict):
            return ", ".join(f"{name} {share:.0%}" for name, share in value.items())
        return f"{value:.4g}" if isinstance(value, float) else value

    short = [{name: short_form(value) for name, value in row.items()} for row in rows]
    print(format_table(short, list(dict.fromkeys(name for row in rows for name in row))), flush=True)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny: to try this script")
    parser.add_argument("--repeats", type=int, default=7, help="turns of which the median is taken")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=BATCH_SIZES, help="of section forward")
    parser.add_argument("--clips", type=int, default=64, help="clips of section lengths")
    parser.add_argument("--cached_clips", type=int, default=128, help="clips of section cache")
    parser.add_argument("--data_dir", help="data set whose test split gives clips (lengths) and scores (export)")
    parser.add_argument(
        "--checkpoint", help="trained MMSER: exported in place of random weights, and timed too by section lengths"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "speed.json")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    if parsed.repeats < 1:
        parser.error("--repeats must be at least 1")
    return parsed


def main(arguments: Sequence[str] | None = None) -> None:
    parsed = parse_arguments(arguments)
    torch.set_num_threads(parsed.threads)
    logging.set_verbosity_error()
    if parsed.child:
        print(json.dumps(CHILDREN[parsed.child["function"]](parsed, **parsed.child["options"])))
        return
    results = json.loads(parsed.output.read_text(encoding="utf-8")) if parsed.output.exists() else {}
    for section in parsed.sections:
        print(f"\n{section}: {SECTIONS[section].__doc__}", flush=True)
        rows = SECTIONS[section](parsed)
        setting = {"size": parsed.size, "repeats": parsed.repeats, **environment(parsed.device)}
        if parsed.data_dir and section in ("lengths", "export"):
            setting["data"] = Path(parsed.data_dir).name
        if section in ("export", "stream"):
            setting["model"] = "a trained checkpoint" if parsed.checkpoint else "random weights"
        results[section] = {"description": SECTIONS[section].__doc__, "setting": setting, "rows": rows}
        parsed.output.parent.mkdir(parents=True, exist_ok=True)
        parsed.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"\nwritten to {parsed.output}")


if __name__ == "__main__":
    main()
