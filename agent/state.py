"""What is kept over restarts: where it lies, whose it is, and the node's id.

A service keeps its state in a directory of its own user's. Root, who runs `sollol agent join` for it, writes
there as well; so whatever root writes is given to the owner of the directory that it is written into.
"""

from __future__ import annotations

import os
import re
import secrets
from contextlib import suppress
from pathlib import Path

_NODE_ID = re.compile(r"[0-9a-f]{16}")

# systemd's own: StateDirectory= of deploy/systemd lies below it.
SERVICES = Path("/var/lib")


def state_dir() -> Path:
    """Return ``$XDG_STATE_HOME/sollol``, by default ``~/.local/state/sollol``; it may not exist yet."""
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser() / "sollol"


def state_dir_for(service: str) -> Path:
    """Return where a command that prepares ``service`` keeps its state.

    Root means the installed service, whose directory systemd makes at its first start; anybody else, or who
    names a place in ``$XDG_STATE_HOME``, means the program that he runs himself.
    """
    directory = SERVICES / service
    if os.geteuid() == 0 and not os.environ.get("XDG_STATE_HOME") and directory.is_dir():
        return directory
    return state_dir()


def make_dir(directory: Path, mode: int = 0o755) -> None:
    """Make a directory, and those above it; raises OSError."""
    missing = [each for each in (directory, *directory.parents) if not each.exists()]
    owner = _owner(directory)
    for each in reversed(missing):
        each.mkdir(mode if each == directory else 0o755, exist_ok=True)
        if owner is not None:
            os.chown(each, *owner, follow_symlinks=False)


def write_private(path: Path, content: bytes) -> None:
    """Write ``path`` whole or not at all; raises OSError.

    Its owner alone can read it and what else is in its directory.
    """
    make_dir(path.parent, 0o700)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    _write(draft, content, 0o600)
    try:
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _write(path: Path, content: bytes, mode: int) -> None:
    """Write a file that is not there yet."""
    owner = _owner(path.parent)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            if owner is not None:
                os.fchown(descriptor, *owner)
            file.write(content)
            file.flush()
            os.fsync(descriptor)
    except BaseException:
        path.unlink()
        raise


def _owner(directory: Path) -> tuple[int, int] | None:
    """Whose shall be what is written in ``directory``, which may be missing yet; None: the writer's."""
    if os.geteuid() != 0:
        return None  # nobody else may give files away
    there = next(each for each in (directory, *directory.parents) if each.exists())
    status = there.stat()
    return status.st_uid, status.st_gid


def node_id(directory: Path) -> str:
    """Return this node's id, 16 hex digits, made at random the first time and kept in ``directory``.

    Raises OSError if the directory cannot be written, ValueError if the file holds something else.
    """
    path = directory / "node_id"
    if not path.exists():
        make_dir(directory)
        draft = directory / f".node_id.{secrets.token_hex(8)}"
        _write(draft, f"{secrets.token_hex(8)}\n".encode(), 0o644)
        # A link appears whole and only once: of two agents that start together one makes the id.
        with suppress(FileExistsError):
            os.link(draft, path)
        draft.unlink()
    found = path.read_text().strip()
    if not _NODE_ID.fullmatch(found):
        raise ValueError(f"{path} does not hold a node id (16 hex digits); remove it to have a new one made")
    return found
