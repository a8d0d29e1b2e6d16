"""All hostile requests that are told by their bytes alone, as one table."""

from __future__ import annotations

from tests.hostile.bodies import BODIES
from tests.hostile.forms import Attack
from tests.hostile.framing import CHUNKS, CODINGS, LENGTHS
from tests.hostile.heads import GIANTS, SYNTAX, TARGETS

ATTACKS: tuple[Attack, ...] = (*LENGTHS, *CODINGS, *CHUNKS, *SYNTAX, *TARGETS, *GIANTS, *BODIES)
