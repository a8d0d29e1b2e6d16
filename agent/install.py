"""Installs SOLLOL's systemd units: writes, enables and starts them.

The units are the files of ``deploy/systemd``; only the path of ``sollol`` is put into them. What depends on
the machine goes into a drop-in beside the unit.
"""

from __future__ import annotations

import os
import shlex
import stat
import subprocess
import sys
from pathlib import Path
from typing import Literal

UnitName = Literal["agent", "proxy", "shard"]

_TEMPLATE_EXECUTABLE = "/opt/sollol/bin/sollol"
_UNITS = Path("etc/systemd/system")
_GROUPS = Path("etc/group")

# Who reads Ollama's directory of models, and why.
_READS_STORE: dict[UnitName, str] = {
    "agent": "To see how full the disk with Ollama's models is.",
    "shard": "To read Ollama's models.",
}

# Who may open /dev/dri and /dev/kfd, and who computes on what is behind them.
_GPU_GROUPS = ("render", "video")
_USES_GPUS: tuple[UnitName, ...] = ("agent", "shard")

# Homes that ProtectHome=yes hides from a service.
_HOMES = (Path("/home"), Path("/root"), Path("/run/user"))


class CannotInstall(Exception):
    """The unit was not installed; the text is one sentence that says why and what to do."""


def install_unit(
    name: UnitName,
    *,
    prefix: Path = Path("/"),
    executable: Path | None = None,
    dry_run: bool = False,
) -> list[str]:
    """Install ``sollol-<name>.service`` and return what was done, one line a step.

    A ``prefix`` other than ``/`` is an image of a system: there the unit is written and enabled, and nothing
    is started. ``executable`` is the sollol to run, by default the one of this Python. With ``dry_run``
    nothing is done but checked and told. Raises CannotInstall.
    """
    image = prefix.resolve() != Path("/")
    sollol = executable or Path(sys.executable).parent / "sollol"
    # An image is checked when it runs: its files need not be those of this machine.
    if not image:
        _check_executable(sollol)
    unit = f"sollol-{name}.service"
    files = {_UNITS / unit: render(name, sollol)}
    drop_in = machine_settings(name, sollol, prefix)
    if drop_in:
        files[_UNITS / f"{unit}.d" / "machine.conf"] = drop_in
    steps = [f"write {prefix / path}" for path in files]
    commands = _commands(unit, prefix if image else None)
    steps += [f"run {shlex.join(command)}" for command in commands]
    if not dry_run:
        _write({prefix / path: text for path, text in files.items()})
        for command in commands:
            _run(command)
    return steps


def template(name: UnitName) -> str:
    """Return the unit file as SOLLOL ships it: within the package, or in the source tree beside it."""
    package = Path(__file__).parent
    for directory in (package / "systemd", package.parent / "deploy/systemd"):
        path = directory / f"sollol-{name}.service"
        if path.exists():
            return path.read_text()
    raise CannotInstall(f"this installation of SOLLOL lacks the unit file sollol-{name}.service")


def render(name: UnitName, sollol: Path) -> str:
    """Return the unit file that runs ``sollol``."""
    return template(name).replace(f"ExecStart={_TEMPLATE_EXECUTABLE} ", f"ExecStart={_quoted(sollol)} ")


def machine_settings(name: UnitName, sollol: Path, prefix: Path = Path("/")) -> str:
    """Return the drop-in that this machine needs, empty if it needs none."""
    lines = []
    if any(sollol.is_relative_to(home) for home in _HOMES):
        lines += ["# sollol lies in a home directory.", "ProtectHome=read-only"]
    if name in _READS_STORE and _has_group(prefix / _GROUPS, "ollama"):
        lines += [f"# {_READS_STORE[name]}", "SupplementaryGroups=ollama"]
    groups = [group for group in _GPU_GROUPS if _has_group(prefix / _GROUPS, group)]
    if name in _USES_GPUS and groups:
        lines += [
            "# To compute on AMD's GPUs, and on others through Vulkan.",
            f"SupplementaryGroups={' '.join(groups)}",
        ]
    return "\n".join(["[Service]", *lines, ""]) if lines else ""


def _commands(unit: str, image: Path | None) -> list[list[str]]:
    if image is not None:
        return [["systemctl", f"--root={image}", "enable", unit]]
    return [
        ["systemctl", "daemon-reload"],
        ["systemctl", "enable", unit],
        ["systemctl", "restart", unit],  # not "enable --now": an upgrade shall run the new one
    ]


def _check_executable(sollol: Path) -> None:
    if not os.access(sollol, os.X_OK):
        raise CannotInstall(f"there is no executable {sollol}; name the sollol to run with --executable")
    # The service runs as a user of its own, who must be able to walk there, and to the Python that runs it.
    python = Path(sys.executable).resolve() if sollol.parent == Path(sys.executable).parent else sollol
    for place in (sollol, *sollol.parents, python, *python.parents):
        if not place.stat().st_mode & stat.S_IXOTH:
            raise CannotInstall(
                f"the service's user may not enter {place}; install SOLLOL where everyone may read it, "
                "for example in /opt/sollol (python3 -m venv /opt/sollol)"
            )


def _has_group(groups: Path, name: str) -> bool:
    try:
        return any(line.startswith(f"{name}:") for line in groups.read_text().splitlines())
    except OSError:
        return False


def _quoted(path: Path) -> str:
    text = str(path).replace("%", "%%").replace("$", "$$")
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"' if " " in text else text


def _write(files: dict[Path, str]) -> None:
    for path, text in files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        except PermissionError as error:
            raise CannotInstall(f"{path} may not be written; run it as root, with sudo") from error
        except OSError as error:
            raise CannotInstall(f"{path} cannot be written: {error.strerror}") from error


def _run(command: list[str]) -> None:
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except FileNotFoundError as error:
        raise CannotInstall(
            "this system has no systemctl; run `sollol agent` under its own supervisor"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise CannotInstall(f"{shlex.join(command)} did not end within 120 s") from error
    if ran.returncode:
        said = ran.stderr.strip().splitlines() or [f"exit status {ran.returncode}"]
        raise CannotInstall(f"{shlex.join(command)} failed: {said[-1]}")
