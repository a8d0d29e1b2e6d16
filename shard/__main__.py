"""``python -m shard``: the shard part of the command line alone."""

from shard.cli import app

app(prog_name="sollol shard")
