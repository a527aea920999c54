# SPDX-License-Identifier: Apache-2.0
"""Print the oldest versions that `setup.cfg` allows, as constraints for pip: what `make test-oldest` installs.

Torch is left to `make`: other builds of it than the one for processors bring gigabytes of CUDA.
"""

import configparser
import re
import sys
from pathlib import Path

SETUP = Path(__file__).parents[1] / "setup.cfg"
# Extras whose packages the code imports; the others hold tools of ours
EXTRAS = ("av", "onnx", "report", "app", "live", "lora", "search", "serve")


def oldest_versions(text: str) -> dict[str, str]:
    """
    The lower bound of each package that the code imports.

    Args:
        text: of a `setup.cfg`.
    Raises:
        ValueError: a requirement without a lower bound.
    """
    parser = configparser.ConfigParser()
    parser.read_string(text)
    needed = parser["options"]["install_requires"].split("\n")
    for extra in EXTRAS:
        needed += parser["options.extras_require"][extra].split("\n")
    versions = {}
    for requirement in filter(None, needed):
        parts = re.fullmatch(r"([\w-]+)>=([\w.]+)", requirement)
        if parts is None:
            raise ValueError(f"setup.cfg: {requirement!r} has no lower bound, such as {requirement}>=1.0.")
        versions[parts[1]] = parts[2]
    return versions


if __name__ == "__main__":
    found = oldest_versions(SETUP.read_text(encoding="utf-8"))
    sys.stdout.write("".join(f"{name}=={version}\n" for name, version in found.items() if name != "torch"))
