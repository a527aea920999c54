# SPDX-License-Identifier: Apache-2.0
"""What comes of input that nobody would write: more than 20,000 generated cases, of which none may crash.

    python benchmarks/fuzz.py --cases 2500

Each target of `TARGETS` draws cases by Hypothesis (`fuzz_cases.py`) and does with them what a user does. A case may be
refused, by an error that is raised on purpose; anything else is a fault, and so is a number that is not finite. Media
run in a process of its own whose memory is limited: files of each container that are cut, changed or lie about their
size, and some that are made to fill the memory. `tests/test_fuzz.py` runs a small part of it.
"""

import argparse
import contextlib
import functools
import io
import itertools
import json
import linecache
import multiprocessing
import os
import pkgutil
import queue
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import soundfile
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from transformers import AutoConfig, BatchFeature, BertTokenizer, Wav2Vec2FeatureExtractor
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from tiny import fit_openmax_by_chance, random_predictions  # type: ignore[import-not-found]

from audio_mmser import audio_length, load_audio, stream_audio, why_silent
from benchmarks import fuzz_cases
from benchmarks.fuzz_cases import AUDIO_ENCODER, COMMANDS, RATE, SMALL, TEXT_ENCODER
from benchmarks.tables import ROOT, Row, parse_arguments, publish, read_results, table
from configuration_mmser import MMSERConfig
from mmser.arguments import parse_arguments as parse_flags
from mmser.arguments import read_recipe
from mmser.batches import MMSERDataCollator
from mmser.label_map import read_label_map
from mmser.labels import choose_label_names, gather_labels, label_id
from mmser.loading import load_emotion_dataset
from mmser.metrics import softmax
from mmser.results import environment
from mmser.sources import Record
from mmser.timed_files import format_rttm, read_rttm, read_srt
from modeling_mmser import MMSERForAudioClassification
from pipeline_mmser import text_of_chunk
from processing_mmser import MMSERPipeline, MMSERProcessor

# What a user is told: a refusal (also of Transformers' configurations), a file that cannot be read, a wrong flag
DOCUMENTED = (ValueError, TypeError, OSError, StrictDataclassError)
MEMORY = 2**30  # bytes that the process with media may take beyond those that it begins with
SHOWN = 5  # faults of a target that are kept
WORDS = ("what", "a", "joy")
MANY_WEIGHTS = 300_000  # of a configuration: more are not computed with


class Fault(AssertionError):
    """What must not be: a NaN, a score that is none, a changed value."""


# --- what is done with the cases -------------------------------------------------------------------------------------


@cache
def tiny_processor() -> Any:  # its base class hides the options of its call
    vocab = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    tokenizer = BertTokenizer(vocab=vocab, model_max_length=16)
    return MMSERProcessor(Wav2Vec2FeatureExtractor(return_attention_mask=True), tokenizer)


@cache
def tiny_classifier() -> MMSERPipeline:
    """A model of a few thousand parameters, at random, with all that is fitted to one."""
    torch.manual_seed(0)
    audio, text = (AutoConfig.for_model(**encoder) for encoder in (AUDIO_ENCODER, TEXT_ENCODER))
    model = MMSERForAudioClassification.from_backbones(audio, text, **SMALL, auxiliary_tasks={"arousal": "regression"})
    fit_openmax_by_chance(model)
    logits, labels = random_predictions(0)
    model.prediction_sets.fit(softmax(logits), labels)
    return MMSERPipeline(model.eval(), processor=tiny_processor(), device="cpu")


def check_finite(values: Any, what: str) -> None:
    """All numbers in tensors, lists and dicts are finite."""
    if isinstance(values, dict):
        for name, value in values.items():
            check_finite(value, f"{what} {name}")
    elif isinstance(values, (list, tuple)):
        for value in values:
            check_finite(value, what)
    elif isinstance(values, (torch.Tensor, np.ndarray, float)):
        tensor = torch.as_tensor(values)
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise Fault(f"{what} is not finite")


def run_processor(case: tuple[Any, Any, Any, bool]) -> None:
    audio, text, rate, is_list = case
    given = {"audio": [audio, audio] if is_list else audio, "text": [text, text] if is_list else text}
    batch = tiny_processor()(**given, sampling_rate=rate, padding=True, return_tensors="pt")
    check_finite(dict(batch), "the batch")


def run_pipeline(case: tuple[Any, dict[str, Any]]) -> None:
    item, options = case
    answers = tiny_classifier()(item, **options)
    check_finite(answers, "an answer")
    for score in _scores(answers):
        if options.get("function_to_apply") != "none" and not 0 <= score <= 1 + 1e-6:
            raise Fault(f"a score is {score}")


def _scores(answers: Any) -> Iterator[float]:
    if isinstance(answers, list):
        for answer in answers:
            yield from _scores(answer)
    elif isinstance(answers, dict):
        yield from ([answers["score"]] if "score" in answers else _scores(list(answers.values())))


def run_collator(examples: list[dict[str, Any] | None]) -> None:
    batch = MMSERDataCollator(tiny_processor())(examples)
    check_finite(dict(batch), "the batch")
    own = {name: value for name, value in batch.items() if name in tiny_processor().model_input_names}
    with torch.no_grad():
        check_finite(tiny_classifier().model(**own).logits, "the logits")


def run_config(values: dict[str, Any]) -> None:
    config = MMSERConfig(**values)
    again = MMSERConfig.from_dict(json.loads(config.to_json_string(use_diff=False)))
    for name in ("id2label", "num_labels", "classifier_num_layers", "openmax_threshold", "modalities"):
        if getattr(again, name) != getattr(config, name):
            raise Fault(f"{name} is {getattr(config, name)!r}, and after saving {getattr(again, name)!r}")
    run_model(config)


@cache
def tiny_batch() -> BatchFeature:
    """Two clips with their texts."""
    samples = np.random.default_rng(0).normal(0, 0.1, (2, 1600)).astype(np.float32)
    return tiny_processor()(list(samples), ["what a joy", "what"], sampling_rate=RATE)


def run_model(config: MMSERConfig) -> None:
    """Make the network of a configuration, without memory; a small one computes, too."""
    with torch.device("meta"):
        model = MMSERForAudioClassification(config)
    encoders = [getattr(config, f"{modality}_config").model_type for modality in config.modalities]
    is_alike = encoders == [{"audio": "wav2vec2", "text": "bert"}[modality] for modality in config.modalities]
    if not is_alike or sum(weight.numel() for weight in model.parameters()) > MANY_WEIGHTS:
        return
    text_config: Any = config.text_config
    if "text" in config.modalities and min(text_config.vocab_size, text_config.max_position_embeddings) < 8:
        return  # the tokens of the batch are others
    names = [
        name for name in tiny_batch() if ("text" if "text" in name or "ids" in name else "audio") in config.modalities
    ]
    with torch.no_grad():
        outputs = MMSERForAudioClassification(config).eval()(
            **{name: tiny_batch()[name] for name in names}, return_dict=True
        )
    check_finite([outputs.logits, outputs.uncertainty], "a score")


@contextlib.contextmanager
def written(content: bytes, name: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fuzz_") as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        yield path


def run_label_map(case: tuple[tuple[str, bytes], list[Any]]) -> None:
    (suffix, content), labels = case
    with written(content, f"map{suffix}") as path:
        mapping = read_label_map(path)
    records = [Record("row", "train", label, "", {}, corpus="a") for label in labels]
    mapping.apply(records)
    mapping.check_targets(["happy", "sad"])


def run_labels(case: tuple[list[Any], list[Any] | None]) -> None:
    labels, names = case
    found = gather_labels((label, f"row {number}") for number, label in enumerate(labels))
    names = choose_label_names(names, None, found)
    for label in labels:
        if not -1 <= label_id(label, names, "row 1", allow_unknown=True) < len(names):
            raise Fault(f"{label!r} has no id among {names}")


@cache
def sounds() -> list[bytes]:
    """The clips that tables name, each another sound."""
    made = []
    for number in range(12):
        file = io.BytesIO()
        soundfile.write(file, np.full(800, 0.01 * (1 + number)), RATE, format="WAV")
        made.append(file.getvalue())
    return made


def run_data(case: tuple[tuple[str, bytes], dict[str, Any]]) -> None:
    (suffix, content), options = case
    with written(content, f"metadata{suffix}") as path:
        for number, sound in enumerate(sounds()):
            (path.parent / f"{number}.wav").write_bytes(sound)
        splits, names = load_emotion_dataset(path, allow_speaker_overlap=True, **options)
        for split in splits.values():
            if not all(-1 <= label < len(names) for label in split["labels"]):
                raise Fault("a label without a class")


def run_timed_files(case: tuple[str, bytes]) -> None:
    kind, content = case
    with written(content, f"a.{kind}") as path:
        if kind == "srt":
            words = read_srt(path)
            check_finite([word["timestamp"] for word in words], "a time")
            text_of_chunk(words, 0.5, 5.0)
        else:
            for name, spans in read_rttm(path).items():
                check_finite([(span.start, span.end) for span in spans], "a time")
                format_rttm(spans, name)


def run_command_line(case: tuple[str, list[str]]) -> None:
    command, words = case
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            parse_flags(COMMANDS[command], words)
        except SystemExit as error:
            if error.code not in (0, 2):
                raise Fault(f"exit code {error.code}") from error
            raise ValueError("a wrong flag, or --help") from error


def run_recipe(case: tuple[str, bytes]) -> None:
    command, content = case
    with written(content, "recipe.json") as path:
        read_recipe(str(path))
        run_command_line((command, [str(path)]))


@dataclass
class Target:
    """
    What is fed.

    Args:
        run: does with a case what a user does.
        cases: what is drawn.
        behind: functions, one of which is called as soon as the first checks are passed.
        share: how many cases, of those of a whole target.
    """

    run: Callable[[Any], None]
    cases: st.SearchStrategy
    behind: tuple[str, ...]
    share: float = 1.0


TENSORS = ("processing_mmser.MMSERProcessor._extract", "processing_mmser.MMSERProcessor._process_texts")
PARSED = tuple(f"{kind.__module__}.{kind.__name__}.__post_init__" for kinds in COMMANDS.values() for kind in kinds[:1])
MAPS = fuzz_cases.tables(fuzz_cases.MAP_CELLS, ("corpus", "label", "target"))
DATA = fuzz_cases.tables(fuzz_cases.DATA_CELLS, ("file_name", "label"), least=6, most=12)
TARGETS = {
    "processor": Target(run_processor, fuzz_cases.processor_inputs(), TENSORS),
    "pipeline": Target(run_pipeline, fuzz_cases.pipeline_calls(), ("pipeline_mmser.MMSERPipeline._forward",)),
    "collator": Target(run_collator, fuzz_cases.examples(), TENSORS),
    "configuration": Target(
        run_config, fuzz_cases.configurations(), ("configuration_mmser.MMSERConfig._check_values",), 0.4
    ),
    "label map": Target(run_label_map, st.tuples(MAPS, fuzz_cases.ANY_LABELS), ("mmser.label_map.LabelMap.apply",)),
    "labels": Target(run_labels, fuzz_cases.labels(), ("mmser.labels._check_names",)),
    "tables of data": Target(
        run_data, st.tuples(DATA, fuzz_cases.data_options()), ("mmser.loading._choose_classes",), 0.5
    ),
    "subtitles and turns": Target(
        run_timed_files, fuzz_cases.timed_files(), ("mmser.timed_files._is_index", "mmser.timed_files.Span")
    ),
    "command lines": Target(run_command_line, fuzz_cases.command_lines(), PARSED, 0.8),
    "recipes": Target(run_recipe, fuzz_cases.recipes(), PARSED, 0.8),
}


# --- one target, and all of them -------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What came of the cases of a target; `late` is how many were refused behind the first checks."""

    cases: int = 0
    answered: int = 0
    late: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def refused(self) -> int:
        return self.cases - self.answered - len(self.faults)

    def take(self, run: Callable[[Any], None], case: Any, reached: list[str]) -> None:
        """Run a case. `reached` is filled by `watched`."""
        self.cases += 1
        reached.clear()
        try:
            run(case)
            self.answered += 1
        except DOCUMENTED as error:
            if is_raised_on_purpose(error):
                self.late += bool(reached)
            else:
                self._note(error, case)
        except (Exception, RecursionError) as error:  # whatever it is, it is counted and shown
            self._note(error, case)

    def _note(self, error: BaseException, case: Any) -> None:
        where = traceback.extract_tb(error.__traceback__)[-1]
        told = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {error}"[:200]
        shown = f"{len(case):,} bytes" if isinstance(case, bytes) else f"{case!r:.300}"
        self.faults.append(f"{told} by {shown}")


def is_raised_on_purpose(error: BaseException) -> bool:
    """Whether someone wrote this error: an operation of ours that Python cannot do tells a user nothing."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    is_ours = Path(where.filename).is_relative_to(ROOT) and ".venv" not in Path(where.filename).parts
    if isinstance(error, OSError) or not is_ours:
        return True
    return linecache.getline(where.filename, where.lineno or 0).strip().startswith("raise")


@contextlib.contextmanager
def watched(names: Sequence[str]) -> Iterator[list[str]]:
    """Yield a list, to which each call of these functions adds their name."""
    reached: list[str] = []

    def noting(name: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def noted(*arguments: Any, **options: Any) -> Any:
            reached.append(name)
            return function(*arguments, **options)

        return noted

    with contextlib.ExitStack() as stack:
        for name in names:
            owner, _, attribute = name.rpartition(".")
            place = pkgutil.resolve_name(owner)
            stack.enter_context(mock.patch.object(place, attribute, noting(name, getattr(place, attribute))))
        yield reached


def feed(target: Target, cases: int, number: int = 0) -> Outcome:
    """Draw cases and run them."""
    outcome = Outcome()
    with watched(target.behind) as reached:

        @seed(number)
        @settings(
            max_examples=cases,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(target.cases)
        def each(case: Any) -> None:
            outcome.take(target.run, case, reached)

        each()
    return outcome


# --- media -----------------------------------------------------------------------------------------------------------

CONTAINERS = (
    ("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAV", "IMA_ADPCM"), ("WAVEX", "PCM_24"), ("RF64", "PCM_16"),
    ("W64", "PCM_16"), ("AIFF", "PCM_16"), ("AU", "PCM_16"), ("CAF", "PCM_16"), ("FLAC", "PCM_16"),
    ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III"),
)  # fmt: skip
AV_CONTAINERS = (
    ("mp4", "aac", RATE),
    ("webm", "libopus", 48_000),
    ("adts", "aac", RATE),
    ("matroska", "pcm_s16le", RATE),
)
DECODED = ("audio_mmser._check_samples",)
MEDIA = ("spoilt media", "media that promise much")  # which are no targets of Hypothesis
LIES = (b"\xff" * 4, b"\xff\xff\xff\x7f", b"\0" * 4, b"\0\0\0\x80", b"\xff" * 8, b"\x7f" + b"\xff" * 7)


@cache
def whole_files() -> dict[str, bytes]:
    """A third of a second in each container."""
    samples = 0.3 * np.sin(np.arange(5333) / 9) * np.linspace(0.2, 1, 5333)
    made = {}
    for container, subtype in CONTAINERS:
        file = io.BytesIO()
        soundfile.write(file, samples, RATE, format=container, subtype=subtype)
        made[f"{container} {subtype}"] = file.getvalue()
    with contextlib.suppress(ImportError):
        import av

        for container, codec, rate in AV_CONTAINERS:
            file = io.BytesIO()
            with av.open(file, "w", format=container) as output:
                stream: Any = output.add_stream(codec, rate=rate, layout="mono")
                frame = av.AudioFrame.from_ndarray(samples.astype(np.float32)[None], format="flt", layout="mono")
                frame.sample_rate = RATE
                resampler = av.AudioResampler(format=stream.format.name, layout="mono", rate=rate)
                frames = resampler.resample(frame) + resampler.resample(None)
                for packet in [packet for one in [*frames, None] for packet in stream.encode(one)]:
                    output.mux(packet)
            made[f"{container} {codec}"] = file.getvalue()
    return made


def spoilt(content: bytes, rng: np.random.Generator) -> bytes:
    """A file that is cut, changed, doubled, or says of itself what is not so."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 4))):
        place = int(rng.integers(len(data) or 1))
        early = int(rng.integers(min(len(data), 64) or 1))
        kind = int(rng.integers(7))
        if kind == 0:
            del data[place:]
        elif kind == 1 and data:
            data[place] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            lie = LIES[int(rng.integers(len(LIES)))]
            data[early : early + len(lie)] = lie
        elif kind == 3:
            data[place:place] = data[: int(rng.integers(200))]
        elif kind == 4:
            data[early : early + 8] = rng.bytes(8)
        elif kind == 5:
            del data[early : early + int(rng.integers(1, 20))]
        else:
            data += data[place:]
    return bytes(data)


def bombs() -> Iterator[tuple[str, bytes]]:
    """Small files of hours of silence, and headers that promise more than there is."""
    for container, subtype, rate, hours in (("FLAC", "PCM_16", 44_100, 3), ("OGG", "VORBIS", 48_000, 1)):
        file = io.BytesIO()
        with soundfile.SoundFile(file, "w", rate, 1, subtype, format=container) as sound:
            for _ in range(hours * 3600):  # libsndfile crashes where it writes a minute of Vorbis at once
                sound.write(np.zeros(rate, dtype=np.float32))
        yield f"{hours} h of silence in {container}", file.getvalue()
    for name, content in whole_files().items():
        for size, place in itertools.product((4, 8), range(4, min(len(content) - 8, 64), 2)):
            yield f"{name} {place}", content[:place] + b"\x7f" + b"\xff" * (size - 1) + content[place + size :]


def run_media(content: bytes) -> None:
    """All that is done with a file: each part of it may refuse, and none may do anything else."""
    held: list[Callable[[], Any]] = [
        lambda: check_finite(load_audio(content), "a sample"),
        lambda: audio_length(content),
        lambda: why_silent(content),
        lambda: check_finite(list(itertools.islice(stream_audio(content), 50)), "a sample"),
    ]
    refused = None
    for step in held:
        try:
            step()
        except DOCUMENTED as error:
            refused = error
    if refused is not None:
        raise refused


def _media_process(cases: int, number: int, are_bombs: bool, answers: Any) -> None:
    """In a process of its own: any crash, or any memory beyond the limit, ends this one alone."""
    import resource

    logging.set_verbosity_error()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # MP3 and FFmpeg write what they think of the files
    originals, rng = whole_files(), np.random.default_rng(number)
    items: Any = (
        (content for _, content in bombs())
        if are_bombs
        else (spoilt(content, rng) for content in itertools.islice(itertools.cycle(originals.values()), cases))
    )
    status = (
        Path("/proc/self/status").read_text(encoding="utf-8") if Path("/proc/self/status").exists() else "VmSize: 0 kB"
    )
    size = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmSize"))
    first = next(items)  # what makes the bombs is made without the limit
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))
    before, outcome = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, Outcome()
    with watched(DECODED) as reached:
        for content in itertools.chain([first], items):
            outcome.take(run_media, content, reached)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answers.put((outcome, (peak - before) / 1e3))


def feed_media(
    cases: int, number: int = 0, are_bombs: bool = False, seconds: float = 900, start_method: str = "spawn"
) -> tuple[Outcome, float]:
    """
    Feed files that are spoilt, or made to fill the memory, to a process whose memory is limited.

    Returns: what came of it, and the MB that its memory grew by. A process that crashed or hung is one fault.
    """
    context: Any = multiprocessing.get_context(start_method)
    answers = context.Queue()
    process = context.Process(target=_media_process, args=(cases, number, are_bombs, answers))
    process.start()
    end = time.monotonic() + seconds
    try:
        while process.is_alive() and time.monotonic() < end:
            with contextlib.suppress(queue.Empty):
                return answers.get(timeout=0.5)
        with contextlib.suppress(queue.Empty):
            return answers.get(timeout=0.5)
        ended = "hung" if process.is_alive() else f"ended with {process.exitcode}"
        return Outcome(cases, faults=[f"the process {ended}"]), 0.0
    finally:
        process.kill()
        process.join()


def measure(cases: int, number: int, names: Sequence[str]) -> tuple[list[Row], list[str]]:
    """A row for each of these targets, and the faults."""
    rows: list[Row] = []
    faults: list[str] = []
    for name in names:
        start, before = core_seconds(), resident()
        if name in TARGETS:
            outcome = feed(TARGETS[name], round(cases * TARGETS[name].share), number)
            megabytes = resident() - before
        else:
            outcome, megabytes = feed_media(cases, number, are_bombs=name == MEDIA[1])
        row = {"fed": name, "cases": outcome.cases, "answered": outcome.answered, "refused late": outcome.late}
        row |= {"refused early": outcome.refused - outcome.late, "faults": len(outcome.faults)}
        rows.append(row | {"core seconds": round(core_seconds() - start, 1), "MB": max(0, round(megabytes))})
        faults.extend(f"{name}: {fault}" for fault in outcome.faults[:SHOWN])
        print(rows[-1], *outcome.faults[:SHOWN], sep="\n  ", file=sys.stderr, flush=True)
    return rows, faults


def with_total(rows: Sequence[Row]) -> list[Row]:
    """The rows, in the order of the targets, and what they come to; with the share that passed the first checks."""
    order = [*TARGETS, *MEDIA]
    rows = sorted((row for row in rows if row["fed"] in order), key=lambda row: order.index(row["fed"]))
    counted = ("cases", "answered", "refused late", "refused early", "faults", "core seconds")
    total: Row = {"fed": "all", **{key: sum(row[key] for row in rows if row[key] != "-") for key in counted}}
    total |= {"core seconds": round(total["core seconds"], 1), "MB": max(row["MB"] for row in rows)}

    def share(row: Row) -> str:  # of a run that did not count it, and of all where one did not: unknown
        known = row["answered"] + row["refused late"] if row["refused late"] != "-" else None
        return "-" if known is None or known + row["refused early"] != row["cases"] else f"{known / row['cases']:.0%}"

    return [{**row, "came far": share(row)} for row in [*rows, total]]


def core_seconds() -> float:
    """What this process and those that it waited for have computed: other programs on the machine do not count."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def resident() -> float:
    """MB of memory that this process takes now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2500, help="of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--targets",
        nargs="+",
        choices=[*TARGETS, *MEDIA],
        help="feed these alone, and keep the other rows of --output",
    )
    options = parse_arguments(parser, "fuzz", arguments)
    if options.from_results:
        report, _ = read_results(options.output)
    else:
        logging.set_verbosity_error()
        os.chdir(tempfile.mkdtemp(prefix="fuzz_"))  # a word that names a file here would be found
        kept, faults = [], []
        if options.targets and options.output.is_file():
            earlier, _ = read_results(options.output)
            kept = [row for row in earlier["rows"] if row["fed"] not in options.targets]
            faults = [fault for fault in earlier["faults"] if fault.split(": ")[0] not in options.targets]
        rows, new = measure(options.cases, options.seed, options.targets or [*TARGETS, *MEDIA])
        report = {"environment": environment(), "dtype": "float32", "seed": options.seed}
        report |= {"rows": with_total([*kept, *rows]), "faults": [*faults, *new]}
    publish({"fuzz": table(report["rows"], str)}, report, [], options)
    return dict(report)


if __name__ == "__main__":
    main()
