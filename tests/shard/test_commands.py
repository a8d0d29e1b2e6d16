"""What ``sollol shard plan`` and ``serve`` say on one machine, and how they end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from shard.cli import app

MIB = 1 << 20


def run(*command: str, state_dir: Path) -> Result:
    return CliRunner().invoke(app, [*command, "--state-dir", str(state_dir), "--no-mdns"])


def test_a_plan_is_shown_with_its_layers_and_speed(gguf_path: Path, tmp_path: Path) -> None:
    shown = run("plan", "small", "--model", f"small={gguf_path}", state_dir=tmp_path)
    assert shown.exit_code == 0
    assert "this machine CPU" in shown.output and "0-17 + out" in shown.output
    assert "A context of 4096" in shown.output


def test_what_is_too_big_says_by_how_much(gguf_path: Path, tmp_path: Path) -> None:
    small = ("--model", f"small={gguf_path}", "--memory", "100MiB")
    shown = run("plan", "small", *small, state_dir=tmp_path)
    assert shown.exit_code == 1 and "Too big by" in shown.output
    told = json.loads(run("plan", "small", *small, "--json", state_dir=tmp_path).output)
    assert told["fits"] is False and told["available_bytes"] == 100 * MIB
    assert told["missing_bytes"] >= told["needed_bytes"] - 100 * MIB


@pytest.mark.parametrize("command", [("plan", "small"), ("serve", "--listen", "127.0.0.1:0")])
@pytest.mark.parametrize(
    ("given", "status", "says"),
    [
        (("--store", "/nowhere"), 1, "/nowhere is no directory of models"),
        (("--model", "small=/nowhere.gguf"), 1, "/nowhere.gguf: No such file or directory"),
        (("--model", f"small={__file__}"), 1, "is not a GGUF file"),
        (("--model", "small"), 2, "'small' is not NAME=GGUF_PATH"),
        (("--memory", "lots"), 2, "'lots' is no size, such as 20GiB"),
        (("--agents", "host:port"), 2, "--agents"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    tmp_path: Path, command: tuple[str, ...], given: tuple[str, ...], status: int, says: str
) -> None:
    ended = run(*command, *given, state_dir=tmp_path)
    assert ended.exit_code == status
    assert says in " ".join(ended.output.split()) and "Traceback" not in ended.output


def test_a_model_that_is_not_there_is_not_planned_for(gguf_path: Path, tmp_path: Path) -> None:
    ended = run("plan", "other", "--model", f"small={gguf_path}", state_dir=tmp_path)
    assert (ended.exit_code, ended.output) == (1, "sollol shard: model 'other' not found\n")
