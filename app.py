# SPDX-License-Identifier: Apache-2.0
# /// script
# dependencies = [
#     "accelerate", "datasets", "gradio>=6.31", "matplotlib", "pyarrow", "scipy", "soundfile", "soxr", "torch",
#     "transformers>=5.23",
# ]
# ///
"""The page in a browser, as a Gradio Space starts it: `python app.py`. `mmser app` does the same.

The command itself is in `mmser.app_command`: installed, a module `app` could be anybody's.
"""

from mmser.app_command import command, main

__all__ = ["command", "main"]

if __name__ == "__main__":
    command()
