# SPDX-License-Identifier: Apache-2.0
"""What a command tells on the console while it works."""

import logging as python_logging

from transformers import TrainingArguments
from transformers.utils import logging

OWN_LOGGERS = ("mmser", "audio_mmser", "encoders_mmser", "modeling_mmser", "openmax_mmser", "processing_mmser")


def set_up_logging(arguments: TrainingArguments) -> None:
    """Our own modules tell what they do, on the main process; others warn only. `--log_level` sets both."""
    level = arguments.get_process_log_level()
    logging.set_verbosity(level)
    logging.enable_default_handler()
    logging.enable_explicit_format()
    python_logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    tells = arguments.log_level == "passive" and arguments.should_log
    for name in OWN_LOGGERS:
        python_logging.getLogger(name).setLevel(python_logging.INFO if tells else level)
