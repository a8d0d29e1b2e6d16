"""The native API of an embedded node through the official client, with real tokens."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import ollama
import pytest

from tests.shard.conftest import ShardNode, StartNode, options

QUESTION = "Question: Why is the sky blue?\nAnswer:"


def ask(text: str = QUESTION) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_streamed_tokens_add_up_to_what_the_plain_llama_server_answers(node: ShardNode) -> None:
    body = {"prompt": QUESTION, "n_predict": 24, "temperature": 0, "cache_prompt": False}
    with node.direct() as direct:
        plain = direct.post("/completion", json=body).json()
    # The model has no chat template, so one message is its own prompt.
    chunks = list(node.client.chat(node.model, ask(), stream=True, options=options(num_predict=24)))
    whole = node.client.chat(node.model, ask(), options=options(num_predict=24))

    assert "".join(chunk.message.content or "" for chunk in chunks) == plain["content"]
    assert whole.message.content == plain["content"]
    assert len([chunk for chunk in chunks if chunk.message.content]) == plain["tokens_predicted"]
    assert [chunk.done for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


def test_the_last_object_carries_the_statistics(node: ShardNode) -> None:
    with node.direct() as direct:
        prompt = direct.post("/tokenize", json={"content": QUESTION, "add_special": True}).json()["tokens"]
    first = node.client.chat(node.model, ask(), options=options(num_predict=5))
    again = node.client.chat(node.model, ask(), options=options(num_predict=5))
    for last in (first, again):
        assert (last.done, last.done_reason, last.eval_count) == (True, "length", 5)
        # Cached tokens count as well: the second answer evaluated hardly any.
        assert last.prompt_eval_count == len(prompt)
        assert last.eval_duration and last.prompt_eval_duration and last.total_duration
        assert last.total_duration >= last.eval_duration > 1_000_000
        assert last.created_at and last.created_at.endswith("Z")
    assert again.message.content == first.message.content


def test_model_names_are_matched_as_ollama_does_and_echoed_as_given(node: ShardNode) -> None:
    answer = node.client.chat("Library/Gemma3:270M", ask(), options=options(num_predict=1))
    assert answer.model == "Library/Gemma3:270M"


def test_system_and_history_reach_the_prompt(node: ShardNode) -> None:
    messages = [
        {"role": "system", "content": "The code word is plum."},
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": "The code word is"},
    ]
    answer = node.client.chat(node.model, messages, options=options(num_predict=3))
    assert "plum" in (answer.message.content or "")


def test_generate_context_continues_the_exact_tokens(node: ShardNode) -> None:
    one = node.client.generate(node.model, "Once upon a time", options=options(num_predict=8))
    two = node.client.generate(node.model, " and then", context=one.context, options=options(num_predict=4))
    assert one.context and two.context
    assert list(two.context)[: len(one.context)] == list(one.context)
    with node.direct() as direct:
        text = direct.post("/detokenize", json={"tokens": list(two.context)}).json()["content"]
    assert text == f"<bos>Once upon a time{one.response} and then{two.response}"
    assert two.prompt_eval_count == len(two.context) - 4


def test_raw_prompts_go_through_untouched(node: ShardNode) -> None:
    answer = node.client.generate(node.model, "1, 2, 3, 4,", raw=True, options=options(num_predict=6))
    assert answer.response == " 5, 6,"
    assert answer.context is None
    with pytest.raises(ollama.ResponseError, match="raw mode does not support template, system, or context"):
        node.client.generate(node.model, "x", raw=True, system="y")


def test_a_template_of_the_request_is_filled_in(node: ShardNode) -> None:
    answer = node.client.generate(
        node.model,
        "3, 4,",
        system="1, 2,",
        template="{{ .System }} {{ .Prompt }}{{ .Response }} never",
        options=options(num_predict=6),
    )
    assert answer.response == " 5, 6,"
    with pytest.raises(ollama.ResponseError, match='calls the function "html", which is not supported'):
        node.client.generate(node.model, "x", template="{{ html .Prompt }}")
    with pytest.raises(ollama.ResponseError, match="the template has no end for if"):
        node.client.generate(node.model, "x", template="{{ if .System }}a")


def test_generation_stops_at_a_stop_word(node: ShardNode) -> None:
    answer = node.client.generate(
        node.model, "1, 2, 3, 4,", raw=True, options=options(num_predict=60, stop=[" 8"])
    )
    assert answer.response == " 5, 6, 7,"
    assert answer.done_reason == "stop"


def test_format_holds_the_answer_to_json(node: ShardNode) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}, "warm": {"type": "boolean"}},
        "required": ["colour", "warm"],
    }
    # Free to put white space anywhere, the small model does so for ever unless it sees how it is done.
    hint = 'A list of {"colour": "red", "warm": true}\n{"colour": "blue", "warm": false}\n'
    settings = options(num_predict=80)
    chat = node.client.chat(node.model, ask(hint), format=schema, options=settings)
    assert set(json.loads(chat.message.content or "")) == {"colour", "warm"}
    generated = node.client.generate(node.model, hint, format=schema, options=settings)
    assert set(json.loads(generated.response)) == {"colour", "warm"}
    settings = options(num_predict=40)
    chat = node.client.chat(node.model, ask(hint), format="json", options=settings)
    assert isinstance(json.loads(chat.message.content or ""), dict)
    generated = node.client.generate(node.model, hint, format="json", options=settings)
    assert isinstance(json.loads(generated.response), dict)


def test_logprobs_come_with_their_alternatives_only_when_asked_for(node: ShardNode) -> None:
    body = {"model": node.model, "messages": ask(), "logprobs": True, "options": options(), "stream": False}
    plain = node.http.post("/api/chat", json=body).json()
    assert "".join(entry["token"] for entry in plain["logprobs"]) == plain["message"]["content"]
    assert all(entry["logprob"] <= 0 and "top_logprobs" not in entry for entry in plain["logprobs"])
    top = node.http.post("/api/chat", json=body | {"top_logprobs": 3}).json()["logprobs"]
    assert {len(entry["top_logprobs"]) for entry in top} == {3}
    refused = node.http.post("/api/chat", json=body | {"top_logprobs": 21})
    assert (refused.status_code, refused.json()) == (400, {"error": "top_logprobs must be between 0 and 20"})


def test_concurrent_answers_are_complete_and_unmixed(node: ShardNode) -> None:
    prompts = ["1, 2, 3,", "a, b, c,", "Monday, Tuesday,", "10, 20, 30,", "A, B, C,", "one, two,"]

    def answer(prompt: str) -> str:
        stream = node.client.generate(node.model, prompt, raw=True, stream=True, options=options())
        return "".join(chunk.response for chunk in stream)

    alone = [answer(prompt) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(answer, prompts))
    assert together == alone
    assert len(set(alone)) == len(prompts)


def test_embeddings_are_unit_vectors_in_the_order_asked(node: ShardNode) -> None:
    two = node.client.embed(node.model, ["the sky", "a fish"])
    one = node.client.embed(node.model, "a fish")
    assert [len(vector) for vector in two.embeddings] == [640, 640]
    assert sum(x * x for x in one.embeddings[0]) == pytest.approx(1, abs=1e-4)
    assert list(two.embeddings[1]) == pytest.approx(list(one.embeddings[0]), abs=1e-3)
    assert one.prompt_eval_count == 3
    short = node.client.embed(node.model, "a fish", dimensions=64).embeddings[0]
    assert len(short) == 64 and sum(x * x for x in short) == pytest.approx(1, abs=1e-4)
    raw = node.client.embeddings(node.model, "a fish").embedding
    scale = sum(x * x for x in raw) ** 0.5
    assert scale > 2
    assert [x / scale for x in raw] == pytest.approx(list(one.embeddings[0]), abs=1e-3)
    assert node.client.embed(node.model, []).embeddings == []


def test_a_long_text_is_cut_to_embed_unless_that_is_forbidden(node: ShardNode) -> None:
    long, small = "word " * 400, {"num_ctx": 256}
    cut = node.client.embed(node.model, long, options=small)
    assert (len(cut.embeddings[0]), cut.prompt_eval_count) == (640, 255)
    with pytest.raises(ollama.ResponseError, match="the input length exceeds the context length") as refused:
        node.client.embed(node.model, long, truncate=False, options=small)
    assert refused.value.status_code == 400


def test_the_oldest_messages_give_way_to_a_full_context(node: ShardNode) -> None:
    filler = [{"role": "user", "content": f"filler {index} " * 20} for index in range(8)]
    messages = [{"role": "system", "content": "Numbers."}, *filler, *ask("1, 2, 3, 4,")]
    settings = options(num_predict=3, num_ctx=256)
    answer = node.client.chat(node.model, messages, options=settings)
    assert answer.message.content == " 5,"
    assert answer.prompt_eval_count and 128 < answer.prompt_eval_count < 256
    body = {"model": node.model, "messages": messages, "truncate": False, "options": settings}
    refused = node.http.post("/api/chat", json=body)
    assert refused.status_code == 400
    assert "exceeds the available context size" in refused.json()["error"]


FIXED = (
    "this node serves the files that it was started with, or that Ollama stores beside it, and changes none; "
    "ask Ollama itself"
)

REFUSED = {
    "tools": (
        "/api/chat",
        {"messages": ask(), "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
        (400, "registry.ollama.ai/library/gemma3:270m does not support tools"),
    ),
    "think": (
        "/api/chat",
        {"messages": ask(), "think": True},
        (400, '"gemma3:270m" does not support thinking'),
    ),
    "suffix": (
        "/api/generate",
        {"prompt": "a", "suffix": "b"},
        (400, "registry.ollama.ai/library/gemma3:270m does not support insert"),
    ),
    "images": (
        "/api/generate",
        {"prompt": "a", "images": ["iVBORw0KGgo="]},
        (400, "this model is missing data required for image input"),
    ),
    "format": (
        "/api/chat",
        {"messages": ask(), "format": "xml"},
        (400, 'invalid format: "xml"; expected "json" or a valid JSON Schema object'),
    ),
    "option": (
        "/api/generate",
        {"prompt": "a", "options": {"temperature": "hot"}},
        (400, 'option "temperature" must be of type float32'),
    ),
    "keep_alive": (
        "/api/generate",
        {"prompt": "a", "keep_alive": "-1"},
        (400, 'time: missing unit in duration "-1"'),
    ),
    "unknown model": ("/api/chat", {"model": "nope", "messages": ask()}, (404, "model 'nope' not found")),
    "unknown to embed": (
        "/api/embed",
        {"model": "nope", "input": "a"},
        (404, 'model "nope" not found, try pulling it first'),
    ),
    "no model": ("/api/generate", {"model": ""}, (400, "model is required")),
    "pull": ("/api/pull", {"model": "nope"}, (404, f"cannot pull 'nope': {FIXED}")),
    "create": ("/api/create", {"model": "new", "from": "gemma3:270m"}, (400, FIXED)),
    "prompt": ("/api/generate", {"prompt": ["a"]}, (400, "prompt must be a string")),
    "context": ("/api/generate", {"prompt": "a", "context": ["b"]}, (400, "context[0] must be an integer")),
    "messages": ("/api/chat", {"messages": "hi"}, (400, "messages must be a list")),
    "content": (
        "/api/chat",
        {"messages": [{"role": "user", "content": 5}]},
        (400, "messages[0].content must be a string"),
    ),
    "arguments": (
        "/api/chat",
        {"messages": [*ask(), {"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}]},
        (400, "messages[1].tool_calls[0].function.arguments must be an object"),
    ),
    "tool": ("/api/chat", {"messages": ask(), "tools": [5]}, (400, "tools[0] must be an object")),
    "stream": ("/api/chat", {"messages": ask(), "stream": "no"}, (400, "stream must be true or false")),
    "dimensions": ("/api/embed", {"input": "a", "dimensions": "2"}, (400, "dimensions must be an integer")),
    "text to embed": ("/api/embeddings", {"prompt": 5}, (400, "prompt must be a string")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_have_ollamas_status_and_words(node: ShardNode, case: str) -> None:
    path, body, expected = REFUSED[case]
    answer = node.http.post(path, json={"model": node.model} | body)
    assert (answer.status_code, answer.json()["error"]) == expected
    assert answer.headers["content-type"] == "application/json; charset=utf-8"


def test_broken_bodies_and_unknown_paths(node: ShardNode) -> None:
    assert node.http.post("/api/chat").json() == {"error": "missing request body"}
    broken = node.http.post("/api/chat", content=b'{"model": ')
    assert broken.status_code == 400 and broken.json()["error"].startswith("invalid JSON")
    for method, path, expected in (
        ("GET", "/api/nope", (404, "404 page not found")),
        ("GET", "/api/chat", (405, "405 method not allowed")),
    ):
        answer = node.http.request(method, path)
        assert (answer.status_code, answer.text) == expected
        assert answer.headers["content-type"].startswith("text/plain")


def test_lists_and_show_describe_the_file(node: ShardNode) -> None:
    [row] = node.client.list().models
    assert (row.model, row.size) == (node.model, 253113024)
    assert row.digest == "35cb8bfe15c54fc56870e00a56ece6c5c1f46df2c0d7c5067a57ea7ea0cadc1b"
    details = node.http.get("/api/tags").json()["models"][0]["details"]
    assert details["parameter_size"] == "268.10M"
    assert (details["quantization_level"], details["family"]) == ("Q4_K_M", "gemma3")
    assert (details["context_length"], details["embedding_length"]) == (32768, 640)
    shown = node.client.show(node.model)
    assert shown.modelinfo and shown.modelinfo["gemma3.block_count"] == 18
    assert shown.modelinfo["tokenizer.ggml.tokens"] is None
    assert shown.capabilities == ["completion"]
    assert shown.modelfile and "\nFROM /" in shown.modelfile
    verbose = node.http.post("/api/show", json={"name": node.model, "verbose": True}).json()
    assert len(verbose["model_info"]["tokenizer.ggml.tokens"]) == 262144
    assert node.http.get("/").text == "Ollama is running"
    assert node.http.head("/").status_code == 200
    assert node.http.get("/api/version").json() == {"version": "0.33.0"}
    assert node.client.pull(node.model).status == "success"
    assert [step.status for step in node.client.pull(node.model, stream=True)][-1] == "success"


def test_keep_alive_rules_how_long_a_model_stays(node: ShardNode) -> None:
    def stays_for() -> timedelta:
        [row] = node.client.ps().models
        assert row.expires_at is not None
        return row.expires_at - datetime.now(UTC)

    node.client.generate(node.model, keep_alive="1h")
    assert timedelta(minutes=58) < stays_for() <= timedelta(hours=1)
    node.client.generate(node.model, "a", options=options(num_predict=1))
    assert timedelta(minutes=58) < stays_for(), "a request that says nothing keeps the last explicit value"
    node.client.generate(node.model, keep_alive=-1)
    assert stays_for() > timedelta(days=36500)
    [child] = node.llama_servers()
    assert node.client.generate(node.model, keep_alive=0).done_reason == "unload"
    assert node.client.ps().models == []
    assert not child.is_running()
    assert node.client.chat(node.model, [], keep_alive=0).done_reason == "unload"
    assert node.client.chat(node.model, [], keep_alive="5m").done_reason == "load"
    assert len(node.client.ps().models) == 1


def test_another_num_ctx_reloads_and_the_same_does_not(node: ShardNode) -> None:
    def run(**given: int) -> int:
        node.client.generate(node.model, "a", raw=True, options=options(num_predict=1, **given))
        [child] = node.llama_servers()
        return child.pid

    before = run()
    assert run(top_k=3) == before
    smaller = run(num_ctx=512)
    assert smaller != before
    assert node.client.ps().models[0].context_length == 512
    assert run(num_ctx=512) == smaller
    assert run() != smaller, "a request without num_ctx wants the default again"
    assert node.client.ps().models[0].context_length == 4096


def test_absurd_launch_options_do_not_kill_the_model(start_node: StartNode) -> None:
    node = start_node()
    for absurd in ({"num_ctx": 1}, {"num_batch": 0}, {"num_batch": 1}):
        answer = node.client.generate(node.model, "a", raw=True, options=options(num_predict=1) | absurd)
        assert answer.done and answer.eval_count == 1
    node.stop()


def test_a_context_is_of_what_was_said_and_not_of_the_end(node: ShardNode) -> None:
    # One answer is possible, so that the model ends by itself.
    said = node.client.generate(node.model, "The sky is", format={"enum": ["blue"]}, options=options())
    assert (said.response, said.done_reason) == ('"blue"', "stop")
    with node.direct() as direct:
        text = direct.post("/detokenize", json={"tokens": list(said.context or ())}).json()["content"]
    assert text.removeprefix("<bos>") == 'The sky is"blue"'
