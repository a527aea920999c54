# SPDX-License-Identifier: Apache-2.0
"""`AppArguments`: the flags of `mmser app`, checked without an import of torch or Gradio."""

from dataclasses import dataclass, field

from mmser.prediction_arguments import chosen_checkpoint

MAX_MINUTES = 60.0


@dataclass
class AppArguments:
    """Which model answers, and where the page is."""

    _essentials = {  # noqa: RUF012 (no field)
        "Model": ("checkpoint", "device"),
        "Page": ("host", "port", "max_minutes", "open_browser"),
    }

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "aliases": ["--checkpoint"],
            "help": "MMSER checkpoint: folder, Hub name, or a folder that `mmser export` wrote. Default: the small "
            "model in the box.",
        },
    )
    device: str | None = field(
        default=None, metadata={"help": "cpu, cuda, cuda:1, mps ... Default: the GPU, if there is one."}
    )
    host: str | None = field(
        default=None,
        metadata={
            "help": "Who may open the page: 127.0.0.1 is this machine alone, 0.0.0.0 every machine that reaches it. "
            "Default: GRADIO_SERVER_NAME, else 127.0.0.1."
        },
    )
    port: int | None = field(
        default=None, metadata={"help": "Default: GRADIO_SERVER_PORT, else the first free one from 7860."}
    )
    max_minutes: float = field(default=MAX_MINUTES, metadata={"help": "Refuse recordings longer than this."})
    open_browser: bool = field(default=False, metadata={"help": "Open the page in the browser of this machine."})

    def __post_init__(self):
        if self.port is not None and not 1 <= self.port <= 65_535:
            raise ValueError(f"--port must be from 1 to 65535, got {self.port}.")
        if not self.max_minutes > 0:
            raise ValueError(f"--max_minutes must be more than 0, got {self.max_minutes}.")
        self.model_name_or_path = chosen_checkpoint(self.model_name_or_path)


APP_ARGUMENTS = (AppArguments,)
