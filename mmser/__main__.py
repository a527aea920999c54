# SPDX-License-Identifier: Apache-2.0
"""`python -m mmser`: the command `mmser` where it is not on the path."""

from mmser.cli import command

if __name__ == "__main__":
    command()
