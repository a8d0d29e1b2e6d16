"""What is kept over restarts: where it lies, and the node's id."""

from __future__ import annotations

import os
import re
import secrets
from contextlib import suppress
from pathlib import Path

_NODE_ID = re.compile(r"[0-9a-f]{16}")


def state_dir() -> Path:
    """Return ``$XDG_STATE_HOME/sollol``, by default ``~/.local/state/sollol``; it may not exist yet."""
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser() / "sollol"


def node_id(directory: Path) -> str:
    """Return this node's id, 16 hex digits, made at random the first time and kept in ``directory``.

    Raises OSError if the directory cannot be written, ValueError if the file holds something else.
    """
    path = directory / "node_id"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        draft = directory / f".node_id.{secrets.token_hex(8)}"
        draft.write_text(secrets.token_hex(8) + "\n")
        # A link appears whole and only once: of two agents that start together one makes the id.
        with suppress(FileExistsError):
            os.link(draft, path)
        draft.unlink()
    found = path.read_text().strip()
    if not _NODE_ID.fullmatch(found):
        raise ValueError(f"{path} does not hold a node id (16 hex digits); remove it to have a new one made")
    return found
