# SPDX-License-Identifier: Apache-2.0
"""Print the oldest versions that `setup.cfg` allows, as constraints for pip: what `make test-oldest` installs.

Torch is left to `make`: other builds of it than the one for processors bring gigabytes of CUDA.
A Python that is newer than a lower bound gets the first release with a wheel for it.
"""

import configparser
import re
import sys
from pathlib import Path

SETUP = Path(__file__).parents[1] / "setup.cfg"
# Extras whose packages the code imports; the others hold tools of ours
EXTRAS = ("av", "onnx", "report", "app", "live", "lora", "search", "serve")
# What came after the lower bound, for a Python that came after it
FIRST_WHEELS = {
    (3, 13): {"matplotlib": "3.9.2", "numpy": "2.1.0", "onnx": "1.18.0", "scikit-learn": "1.5.2"},
    (3, 14): {
        "av": "15.1.0",
        "matplotlib": "3.10.5",
        "numpy": "2.3.2",
        "onnx": "1.20.0",
        "onnxruntime": "1.24.1",
        "pyarrow": "22.0.0",
        "scikit-learn": "1.7.2",
        "scipy": "1.16.1",
    },
}


def oldest_versions(text: str, python: tuple[int, int] = (3, 11)) -> dict[str, str]:
    """
    The lower bound of each package that the code imports, or its first release with a wheel for this Python.

    Args:
        text: of a `setup.cfg`.
        python: its version, such as (3, 11).
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
    return versions | FIRST_WHEELS.get(python, {})


if __name__ == "__main__":
    found = oldest_versions(SETUP.read_text(encoding="utf-8"), sys.version_info[:2])
    sys.stdout.write("".join(f"{name}=={version}\n" for name, version in found.items() if name != "torch"))
