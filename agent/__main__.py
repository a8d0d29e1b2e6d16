"""``python -m agent``: the same as ``sollol agent``."""

from agent.cli import app

app(prog_name="sollol agent")
