"""Builds the stub of NVIDIA's library and writes what it says."""

import os
import subprocess
from pathlib import Path

GIB = 1 << 30
COMPILER = os.environ.get("CC", "cc")


def build(directory: Path) -> Path:
    """Compile the stub into ``directory`` and return its path."""
    library = directory / "libnvidia-ml.so.1"
    source = Path(__file__).with_name("nvml_stub.c")
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([COMPILER, *flags, "-o", library, source], check=True)
    return library


class Driver:
    """What the stub says: a file that it reads anew at every call."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._said: dict[str, object] = {}

    def say(self, **fields: object) -> None:
        """Change fields (``gpu0_error=15`` is the stub's ``0.error``); None takes one back."""
        for name, value in fields.items():
            key = name.removeprefix("gpu").replace("_", ".", 1) if name.startswith("gpu") else name
            if value is None:
                self._said.pop(key, None)
            else:
                self._said[key] = value
        draft = self.path.with_suffix(".new")
        draft.write_text("".join(f"{key}={value}\n" for key, value in self._said.items()))
        draft.replace(self.path)

    def have(self, count: int) -> None:
        """Be a driver with ``count`` GPUs, each like an RTX 3090 with 4 GiB more in use than the last."""
        self.say(init=0, count=count)
        for number in range(count):
            fields = {
                "name": "NVIDIA GeForce RTX 3090",
                "uuid": f"GPU-{number:08d}",
                "total": 24 * GIB,
                "used": 4 * GIB * number,
                "gpu_util": 37,
                "temp": 61,
                "power": 212_500,
                "limit": 350_000,
                "clock": 9751,
                "width": 384,
                "compute": "",
                "graphics": "",
            }
            self.say(**{f"gpu{number}_{name}": value for name, value in fields.items()})
