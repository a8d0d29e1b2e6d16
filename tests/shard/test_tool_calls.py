import json
import re
from typing import Any

import pytest

from shard.tool_calls import ToolCallParser, call_id, preserved_tokens

TOOLS = [{"function": {"name": name}} for name in ("get", "get_weather", "now")]


def parts(tag: str, text: str, size: int) -> tuple[list[tuple[int, str, Any]], str]:
    parser = ToolCallParser(tag, TOOLS)
    calls: list[dict[str, Any]] = []
    content = ""
    for at in range(0, len(text), size):
        found, plain = parser.add(text[at : at + size])
        calls += found
        content += plain
    content += parser.rest()
    functions = [call["function"] for call in calls]
    return [(one["index"], one["name"], one["arguments"]) for one in functions], content


LINZ = '{"city": "Linz {x}\\""}'
ARGUMENTS = json.loads(LINZ)


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
@pytest.mark.parametrize(
    ("tag", "text", "calls", "content"),
    [
        # qwen: a tag around every call, text before the first
        (
            "<tool_call>",
            f'Well.\n<tool_call>\n{{"name": "get_weather", "arguments": {LINZ}}}\n</tool_call>\n'
            '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
            [(0, "get_weather", ARGUMENTS), (1, "now", {})],
            "Well.\n",
        ),
        # mistral: one tag before a list
        (
            "[TOOL_CALLS]",
            f'[TOOL_CALLS] [{{"name": "get", "arguments": {LINZ}}}, {{"name": "now", "arguments": {{}}}}]',
            [(0, "get", ARGUMENTS), (1, "now", {})],
            "",
        ),
        # llama3.1: nothing but the object
        ("{", f'{{"name": "get", "parameters": {LINZ}}}', [(0, "get", ARGUMENTS)], ""),
        # command-r: another key for the name
        (
            "Action: ```json\n[",
            f'Action: ```json\n[ {{ "tool_name": "get_weather", "parameters": {LINZ} }} ]```',
            [(0, "get_weather", ARGUMENTS)],
            "",
        ),
        ("[", f'[get_weather({LINZ})]', [(0, "get_weather", ARGUMENTS)], ""),
        ("<tool_call>", f'<tool_call>{{"get": {LINZ}}}', [(0, "get", ARGUMENTS)], ""),
        ("<t>", '<t>{"name": "get", "arguments": "{\\"a\\": 1}"}', [(0, "get", {"a": 1})], ""),
        ("<tool_call>", '<tool_call>{"name": "now"}', [(0, "now", {})], ""),
        # no calls
        ("<tool_call>", "a < b and <tool", [], "a < b and <tool"),
        ("<tool_call>", '<tool_call>{"name": "other", "arguments": {}}', [], ""),
        ("{", '{"colour": "red"} done', [], '{"colour": "red"} done'),
        ("{", 'Take {"name": "get"}', [], 'Take {"name": "get"}'),
        ("{", '  {"name": "get", "arguments": {}}', [(0, "get", {})], "  "),
        ("{", '{"name": "get', [], '{"name": "get'),
    ],
)  # fmt: skip
def test_calls_and_text_come_apart_at_any_cut(
    tag: str, text: str, calls: list[Any], content: str, size: int
) -> None:
    assert parts(tag, text, size) == (calls, content)


def test_text_that_cannot_become_a_call_is_not_held_back() -> None:
    parser = ToolCallParser("<tool_call>", TOOLS)
    assert [parser.add(piece)[1] for piece in ("a", " <", "b")] == ["a", " ", "<b"]


def test_a_call_has_an_id_of_its_own() -> None:
    parser = ToolCallParser("{", TOOLS)
    [call], _ = parser.add('{"name": "now", "arguments": {}}')
    assert re.fullmatch("call_[a-z0-9]{8}", call["id"])
    assert call_id() != call_id()


@pytest.mark.parametrize(
    ("tag", "kept"),
    [
        ("<tool_call>", ["<tool_call>"]),
        ("[TOOL_CALLS] [", ["[TOOL_CALLS]"]),
        ("{", []),
        ("[", []),
        ("Action:", ["Action:"]),
    ],
)
def test_special_tokens_that_must_stay_in_the_text(tag: str, kept: list[str]) -> None:
    assert preserved_tokens(tag) == kept
