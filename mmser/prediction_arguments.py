# SPDX-License-Identifier: Apache-2.0
"""`PredictionArguments`: the flags of `mmser predict`, checked without an import of torch."""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from mmser.arguments import DataArguments
from mmser.files import check_is_no_device
from mmser.flags import POSITIONAL
from mmser.names import CONFIG, checkpoint_folder

LONG_SECONDS = 30.0  # what training crops clips to by default, and what a Whisper encoder hears
CHUNK_SECONDS = 6.0  # clips of emotional speech last 2 to 6 s
BATCH_SIZE = 8
PART_SIZE = 1000
PART_FORMATS = ("parquet", "jsonl", "csv")
LAUNCHED = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}  # where no launcher says it
ENDINGS = {  # of --output: the format
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "jsonl",
    ".parquet": "parquet",
    ".srt": "srt",
    ".rttm": "rttm",
    ".txt": "audacity",
}
TIMED_FORMATS = ("srt", "rttm", "audacity")  # they hold segments
ONE_RECORDING = ("srt", "audacity")  # they have no room for the name of a recording
# In a clone the folder lies beside the package, in an installation within it
BOXES = tuple(folder / "checkpoints" / "mmser-small" for folder in Path(__file__).parents[:2])


def default_checkpoint() -> str | None:
    """The checkpoint that comes with MMSER; None where there is none."""
    return next((str(folder) for folder in BOXES if (folder / CONFIG).is_file()), None)


def chosen_checkpoint(name: str | None) -> str:
    """
    The checkpoint that `--checkpoint` names, or the one that comes with MMSER.

    Raises:
        ValueError: none is named, and none comes with MMSER.
        FileNotFoundError: see `checkpoint_folder`.
    """
    name = name or default_checkpoint()
    if name is None:
        raise ValueError(
            "--checkpoint is needed: name the folder of an MMSER checkpoint (`mmser train` makes one), its name "
            "on the Hub, or a folder that `mmser export` wrote."
        )
    return checkpoint_folder(name, "--checkpoint")


@dataclass(frozen=True)
class Share:
    """Which of several processes this is, as torchrun and `accelerate launch` say it in the environment."""

    rank: int = 0
    processes: int = 1
    local_rank: int = 0

    @classmethod
    def of_environment(cls) -> "Share":
        """
        Raises:
            ValueError: RANK, WORLD_SIZE or LOCAL_RANK is no number that makes sense.
        """
        given = {name: os.environ.get(name) or default for name, default in LAUNCHED.items()}
        try:
            rank, processes, local_rank = (int(word) for word in given.values())
        except ValueError:
            rank = processes = local_rank = -1
        if not (0 <= rank < processes and local_rank >= 0):
            words = ", ".join(f"{name}={word}" for name, word in given.items())
            raise ValueError(f"The environment says {words}: RANK is a number from 0 to WORLD_SIZE - 1.")
        return cls(rank, processes, local_rank)

    def device(self, wanted: str | None) -> str | None:
        """The device of this process: of several GPUs that of its number on this machine."""
        import torch

        if wanted not in (None, "cuda") or self.processes == 1 or not torch.cuda.is_available():
            return wanted
        return f"cuda:{self.local_rank % torch.cuda.device_count()}"


def check_encoding(text: str | None, flag: str) -> None:
    """Raise ValueError for a word of the command line that is in another encoding than the terminal's."""
    if text is not None and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(
            f"{flag}: the text is not in {sys.getfilesystemencoding().upper()}: write it in that encoding."
        )


def _column(role: str):
    """The flag of a column, as training has it, for one table."""
    flag = DataArguments.__dataclass_fields__[f"{role}_column"]
    return field(default=flag.default, metadata={"help": f"{flag.metadata['help'][:-1]}, in --transcripts."})


@dataclass
class PredictionArguments:
    """What to classify, and what to do with the answers."""

    _usage = "FILE|FOLDER ... [flags]"
    _essentials = {  # noqa: RUF012 (no field)
        "What to classify": ("checkpoint", "text", "transcripts", "live"),
        "Long recordings": ("segments", "speakers", "plot"),
        "Results": ("output", "format", "overwrite", "top_k", "allowed_labels", "return_set"),
        "How": ("adapt_to_inputs", "batch_size", "device"),
    }

    inputs: list[str] = field(
        default_factory=list,
        metadata={POSITIONAL: True, "help": "Audio files, folders with such files, patterns (*.wav), or addresses."},
    )
    allow_outside_files: bool = field(
        default=False, metadata={"help": "Follow links in a folder, or found by a pattern, that lead out of it."}
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "aliases": ["--checkpoint"],
            "help": "MMSER checkpoint: folder, Hub name, or a folder that `mmser export` wrote.",
        },
    )
    text: str | None = field(
        default=None, metadata={"help": "What is said in the one clip; without a clip, the words alone."}
    )
    transcripts: str | None = field(
        default=None,
        metadata={
            "metavar": "FILE",
            "help": "What is said: a table (.csv, .tsv, .jsonl) of file names and texts, or subtitles (.srt) of one "
            "recording.",
        },
    )
    live: bool = field(
        default=False,
        metadata={"help": "Listen to the microphone until Ctrl-C, a line for each segment; needs the extra `live`."},
    )
    audio_column: str = _column("audio")
    text_column: str = _column("text")
    segments: bool = field(
        default=False,
        metadata={
            "help": f"Give the answers of each segment; so it is done for one recording above {LONG_SECONDS:g} s."
        },
    )
    segments_above: float = field(
        default=LONG_SECONDS,
        metadata={
            "metavar": "SECONDS",
            "help": "Cut recordings longer than this into segments; a whole is their mean over time.",
        },
    )
    speakers: str | None = field(
        default=None,
        metadata={"metavar": "FILE", "help": "Speaker turns (.rttm): a segment is a turn, or a piece of a long one."},
    )
    chunk_length_s: float = field(
        default=CHUNK_SECONDS,
        metadata={"metavar": "SECONDS", "help": "How much of a recording the model hears at a time."},
    )
    stride_length_s: float | None = field(
        default=None,
        metadata={
            "metavar": "SECONDS",
            "help": "How much of that, on each side, belongs to the neighbours. Default: a sixth.",
        },
    )
    output: str | None = field(
        default=None,
        metadata={"metavar": "FILE", "help": f"File to write; its ending is the format: {', '.join(ENDINGS)}."},
    )
    format: str | None = field(
        default=None,
        metadata={
            "choices": list(ENDINGS.values()),
            "help": "Format of --output, whatever its ending; without --output, of what is printed.",
        },
    )
    output_dir: str | None = field(
        default=None,
        metadata={
            "metavar": "FOLDER",
            "help": "For many files: write the answers in parts, and one file of them all. The same command goes on "
            "after a stop, and with `accelerate launch` or `torchrun` each process takes its share.",
        },
    )
    part_size: int = field(default=PART_SIZE, metadata={"help": "Inputs of each part of --output_dir."})
    overwrite: bool = field(default=False, metadata={"help": "Replace --output and --plot where they exist."})
    plot: str | None = field(
        default=None,
        metadata={"metavar": "FILE", "help": "Picture (.png) of one recording over time; needs the extra `report`."},
    )
    top_k: int | None = field(
        default=None, metadata={"help": "Classes to show on the screen, the best ones; files hold all."}
    )
    allowed_labels: list[str] | None = field(
        default=None,
        metadata={"metavar": "LABEL", "help": "Choose among these labels only; their scores sum to 1."},
    )
    return_set: float | None = field(
        default=None,
        metadata={
            "metavar": "COVERAGE",
            "help": "Also give the labels that a clip may have: the right one is among them with this probability, "
            "0.5 to 0.99.",
        },
    )
    adapt_to_inputs: bool = field(
        default=False,
        metadata={
            "help": "First adapt the model to the voices and microphones of the inputs, without labels; for 10 inputs "
            "or more of mixed emotions from one place."
        },
    )
    batch_size: int = field(default=BATCH_SIZE, metadata={"help": "Clips or segments at a time."})
    device: str | None = field(
        default=None, metadata={"help": "cpu, cuda, cuda:1, mps ... Default: the GPU, if there is one."}
    )

    def __post_init__(self):
        for name in ("segments_above", "chunk_length_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name} is a time in seconds, more than 0, got {getattr(self, name)}.")
        for name in ("batch_size", "top_k", "part_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")
        if self.allowed_labels is not None and self.return_set is not None:
            raise ValueError("--return_set speaks of all labels: leave out --allowed_labels.")
        if self.return_set is not None and not 0.5 <= self.return_set <= 0.99:
            raise ValueError(f"--return_set is a probability from 0.5 to 0.99, got {self.return_set}.")
        if self.live:
            self._check_live()
        elif not self.inputs and not self.text:
            raise ValueError("There is nothing to classify: name audio files or folders, or give --text.")
        if self.adapt_to_inputs and not self.inputs:
            raise ValueError("--adapt_to_inputs adapts the model to recordings: name some.")
        self._check_texts()
        self._check_parts()
        self._check_outputs()
        self.model_name_or_path = chosen_checkpoint(self.model_name_or_path)

    @property
    def subtitles(self) -> str | None:
        """The file of --transcripts if its texts have times."""
        return self.transcripts if Path(self.transcripts or "").suffix.lower() == ".srt" else None

    @property
    def by_segment(self) -> bool:
        """Whether segments are asked for, of inputs of any length."""
        asked = self.segments or self.speakers or self.subtitles or self.plot or self.format in TIMED_FORMATS
        return bool(asked)

    @property
    def needs_one_recording(self) -> str | None:
        """The flag that makes no sense with several recordings, if one is given."""
        if self.text is not None:
            return "--text"
        if self.format in ONE_RECORDING:
            return f"The format {self.format}"
        return "--plot" if self.plot else "--transcripts with subtitles" if self.subtitles else None

    def _check_live(self) -> None:
        flags = (
            *("inputs", "text", "transcripts", "segments", "speakers", "output", "output_dir", "format", "plot"),
            *("top_k", "allowed_labels", "return_set", "adapt_to_inputs"),
        )
        for name in flags:
            if getattr(self, name):
                what = "an input" if name == "inputs" else f"--{name}"
                raise ValueError(f"--live listens to the microphone and prints what it hears: leave out {what}.")

    def _check_texts(self) -> None:
        check_encoding(self.text, "--text")
        if self.text is not None and self.transcripts is not None:
            raise ValueError("--text and --transcripts both say what is said: give one of them.")
        for name in ("transcripts", "speakers"):
            if getattr(self, name) and not Path(getattr(self, name)).is_file():
                raise FileNotFoundError(f"--{name} {getattr(self, name)} does not exist.")
        if self.transcripts and not self.inputs:
            raise ValueError("--transcripts says what is said in audio files: name these too.")

    def _check_parts(self) -> None:
        if self.output_dir is None:
            processes = Share.of_environment().processes
            if processes > 1 and not self.live:
                raise ValueError(f"{processes} processes would each classify all: give --output_dir, not --output.")
            return
        self.format = self.format or PART_FORMATS[0]
        if self.format not in PART_FORMATS:
            raise ValueError(f"--output_dir: the --format of its parts is {', '.join(PART_FORMATS)}.")
        for name in ("output", "overwrite", "plot", "top_k", "text", "subtitles"):
            if getattr(self, name):
                raise ValueError(
                    f"--output_dir is for many files: leave out --{name.replace('subtitles', 'transcripts')}."
                )
        if Path(self.output_dir).is_file():
            raise ValueError(f"--output_dir {self.output_dir} is a file: name a folder.")

    def _check_outputs(self) -> None:
        ending = Path(self.output or "").suffix.lower()
        if self.output and self.format is None:
            if ending not in ENDINGS:
                raise ValueError(f"--output {self.output}: the ending must be one of {', '.join(ENDINGS)}.")
            self.format = ENDINGS[ending]
        if self.format == "parquet" and not (self.output or self.output_dir):
            raise ValueError("--format parquet is no text: name a file with --output.")
        if self.plot and Path(self.plot).suffix.lower() != ".png":
            raise ValueError(f"--plot {self.plot}: the picture is a PNG file, so its name must end in .png.")
        for name in ("output", "plot"):
            path = Path(getattr(self, name) or "")
            if path.is_dir() and getattr(self, name):
                raise ValueError(f"--{name} {path} is a folder: name a file.")
            check_is_no_device(path)
            if path.is_file() and not self.overwrite:
                raise ValueError(f"--{name} {path} exists: choose another name, or add --overwrite.")
        if self.by_segment and not self.inputs:
            raise ValueError("Segments are those of a recording: name one.")
        texts = "--text" if self.text is not None else f"--transcripts {self.transcripts}" if self.transcripts else ""
        if self.by_segment and texts and not self.subtitles:
            raise ValueError(
                f"{texts} has no times, so nothing says which words belong to which segment: give subtitles "
                "(--transcripts words.srt)."
            )


PREDICTION_ARGUMENTS = (PredictionArguments,)
