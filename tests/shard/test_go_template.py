"""The Go template engine against Go's own.

``data/go_templates.json`` holds what Go 1.27's text/template, filled in as Ollama's ``Template.Execute`` does
it, says of these templates and values; null stands for an error of Go's. The templates under
``data/templates`` are built as those of Ollama's library are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shard.chat_template import chat_template
from shard.go_template import TemplateError, Unsupported, functions, parse, render

DATA = Path(__file__).parent / "data"
RECORDED = json.loads((DATA / "go_templates.json").read_text())


def library(model: str) -> str:
    return (DATA / "templates" / f"{model}.gotmpl").read_text()


@pytest.mark.parametrize(("template", "text"), RECORDED["corners"], ids=lambda value: str(value)[:40])
def test_corners(template: str, text: str | None) -> None:
    if text is None:
        with pytest.raises((Unsupported, TemplateError)):
            render(parse(template), RECORDED["data"])
    else:
        assert render(parse(template), RECORDED["data"]) == text


@pytest.mark.parametrize(
    ("what", "model"),
    [(what, model) for what, case in RECORDED["conversations"].items() for model in case["prompts"]],
)
def test_library_templates_give_ollamas_prompts(
    monkeypatch: pytest.MonkeyPatch, what: str, model: str
) -> None:
    monkeypatch.setitem(functions.FUNCTIONS, "currentDate", lambda *_: "2026-01-02")
    case = RECORDED["conversations"][what]
    asked = case["asked"]
    template = chat_template(library(model))
    prompt = template.render(asked["messages"], tools=asked.get("tools", ()), think=asked.get("think"))
    assert prompt == case["prompts"][model]


@pytest.mark.parametrize(("model", "prompt"), RECORDED["infill"].items())
def test_infill_templates(model: str, prompt: str) -> None:
    assert chat_template(library(model)).render_infill("def f(", "return 1") == prompt


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ html .Prompt }}", 'calls the function "html", which is not supported'),
        ('{{ printf "%x" 3 }}', "uses %x in printf"),
        ("{{ printf .Prompt }}", "computes the format of printf"),
        ("{{ .Prompt.Upper 3 }}", "gives arguments to something that is no function"),
        ("{{ if .Prompt }}", "no end for if"),
        ("{{ .Prompt", "unclosed action"),
        ("{{ ; }}", 'unexpected "; }}"'),
    ],
)
def test_what_is_not_supported_is_refused_before_anything_is_rendered(template: str, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        parse(template)


def test_a_template_that_calls_itself_ends() -> None:
    with pytest.raises(TemplateError, match='"a" calls itself without end'):
        render(parse('{{ define "a" }}{{ template "a" . }}{{ end }}{{ template "a" . }}'), {})


def test_dates_are_days() -> None:
    data: dict[str, Any] = {}
    today, yesterday = render(parse("{{ currentDate }} {{ yesterdayDate }}"), data).split()
    assert yesterday < today and len(today) == len("2026-01-02")
