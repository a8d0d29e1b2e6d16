"""The OpenAI and Anthropic routes of an embedded node, through the official clients."""

from __future__ import annotations

import json

import anthropic
import openai
import pytest
import zstandard

from tests.shard.conftest import BOUND_S, ShardNode, options

COUNT = [{"role": "user", "content": "1, 2, 3, 4,"}]


@pytest.fixture
def gpt(node: ShardNode) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{node.url}/v1", api_key="none", max_retries=0, timeout=BOUND_S)


@pytest.fixture
def claude(node: ShardNode) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=node.url, api_key="none", max_retries=0, timeout=BOUND_S)


def test_openai_chat_streamed_and_not(gpt: openai.OpenAI) -> None:
    settings = {"model": "Gemma3:270m", "messages": COUNT, "temperature": 0, "max_tokens": 6}
    whole = gpt.chat.completions.create(**settings)
    assert whole.choices[0].message.content == " 5, 6,"
    assert whole.choices[0].finish_reason == "length"
    assert whole.model == "Gemma3:270m"
    chunks = list(
        gpt.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == " 5, 6,"
    assert {chunk.model for chunk in chunks} == {"Gemma3:270m"}
    assert chunks[-1].usage and chunks[-1].usage.completion_tokens == 6


def test_openai_completions_embeddings_and_models(gpt: openai.OpenAI, node: ShardNode) -> None:
    text = gpt.completions.create(model=node.model, prompt="1, 2, 3, 4,", temperature=0, max_tokens=6)
    assert text.choices[0].text == " 5, 6,"
    ours = node.client.embed(node.model, "a fish").embeddings[0]
    theirs = (
        gpt.embeddings.create(model=node.model, input="a fish", encoding_format="float").data[0].embedding
    )
    assert theirs == pytest.approx(list(ours), abs=1e-3)
    assert [model.id for model in gpt.models.list()] == [node.model]
    assert gpt.models.retrieve(node.model).id == node.model


def test_openai_json_mode_answers_in_json(gpt: openai.OpenAI, node: ShardNode) -> None:
    answer = gpt.chat.completions.create(
        model=node.model,
        messages=[{"role": "user", "content": 'A list of {"warm": true}\n{"warm": false}\n'}],
        temperature=0,
        max_tokens=40,
        response_format={"type": "json_object"},
    )
    assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)


@pytest.mark.parametrize(
    "kind", [{"type": "json_object"}, {"type": "json_schema", "name": "a", "schema": {}}]
)
def test_openai_responses_answer_in_json(
    gpt: openai.OpenAI, node: ShardNode, kind: dict[str, object]
) -> None:
    wanted = kind | ({"schema": {"type": "object"}} if "schema" in kind else {})
    answer = gpt.responses.create(
        model=node.model,
        input='A list of {"warm": true}\n{"warm": false}\n',
        temperature=0,
        max_output_tokens=40,
        text={"format": wanted},
    )
    assert isinstance(json.loads(answer.output_text), dict)


IMAGES = {
    "/v1/chat/completions": (
        "messages",
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}},
    ),
    "/v1/responses": ("input", {"type": "input_image", "image_url": "data:image/png;base64,iVBORw0KGgo="}),
    "/v1/messages": (
        "messages",
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}},
    ),
}


@pytest.mark.parametrize("path", IMAGES)
def test_images_are_refused_by_a_model_that_sees_none(node: ShardNode, path: str) -> None:
    field, image = IMAGES[path]
    body = {"model": node.model, "max_tokens": 3, field: [{"role": "user", "content": [image]}]}
    answer = node.http.post(path, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "this model is missing data required for image input"


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_openai_embeddings_of_fewer_dimensions(gpt: openai.OpenAI, node: ShardNode, encoding: str) -> None:
    ours = node.client.embed(node.model, "a fish", dimensions=3).embeddings[0]
    settings = {"model": node.model, "input": "a fish", "dimensions": 3}
    theirs = gpt.embeddings.create(
        **settings, **({"encoding_format": "float"} if encoding == "float" else {})
    )
    assert theirs.data[0].embedding == pytest.approx(list(ours), abs=1e-3)
    assert theirs.model == node.model


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ("hi", "messages must be a list"),
        (["hi"], "messages[0] must be an object"),
        ([{"role": "user", "content": 5}], "a message's content must be a string or a list"),
        ([], None),
    ],
)
def test_malformed_conversations_are_refused_in_the_protocols_shape(
    node: ShardNode, path: str, messages: object, says: str | None
) -> None:
    body = {"model": node.model, "messages": messages, "max_tokens": 3}
    answer = node.http.post(path, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
    assert says in (None, error["message"])


def test_openai_requests_may_be_zstd(node: ShardNode) -> None:
    body = b'{"model": "gemma3:270m", "prompt": "1, 2, 3, 4,", "temperature": 0, "max_tokens": 3}'
    headers = {"Content-Encoding": "zstd", "Content-Type": "application/json"}
    answer = node.http.post("/v1/completions", content=zstandard.compress(body), headers=headers)
    assert answer.json()["choices"][0]["text"] == " 5,"
    bomb = node.http.post("/v1/completions", content=zstandard.compress(bytes(2**25)), headers=headers)
    assert (bomb.status_code, bomb.json()["error"]["message"]) == (413, "request body too large")
    broken = node.http.post("/v1/completions", content=b"no zstd", headers=headers)
    assert broken.status_code == 400
    assert broken.json()["error"]["type"] == "invalid_request_error"


def test_openai_errors(gpt: openai.OpenAI, node: ShardNode) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        gpt.chat.completions.create(model="nope", messages=COUNT)
    assert unknown.value.body == {
        "message": "model 'nope' not found",
        "type": "not_found_error",
        "param": None,
        "code": None,
    }
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    with pytest.raises(openai.BadRequestError, match="does not support tools"):
        gpt.chat.completions.create(model=node.model, messages=COUNT, tools=[tool])
    with pytest.raises(openai.NotFoundError, match="model 'nope' not found"):
        gpt.models.retrieve("nope")


def test_anthropic_messages_streamed_and_not(claude: anthropic.Anthropic, node: ShardNode) -> None:
    settings = {"model": node.model, "messages": COUNT, "temperature": 0.0, "max_tokens": 6}
    extra = {"temperature": settings.pop("temperature")}
    whole = claude.messages.create(**settings, extra_body=extra)
    assert whole.content[0].text == " 5, 6,"
    assert (whole.stop_reason, whole.usage.output_tokens, whole.model) == ("max_tokens", 6, node.model)
    with claude.messages.stream(**settings, extra_body=extra) as stream:
        assert "".join(stream.text_stream) == " 5, 6,"
        assert stream.get_final_message().stop_reason == "max_tokens"


def test_anthropic_errors(claude: anthropic.Anthropic, node: ShardNode) -> None:
    with pytest.raises(anthropic.NotFoundError) as unknown:
        claude.messages.create(model="nope", messages=COUNT, max_tokens=3)
    assert unknown.value.body == {
        "type": "error",
        "error": {"type": "not_found_error", "message": "model 'nope' not found"},
    }
    answer = node.http.post("/v1/messages", json={"model": node.model, "messages": COUNT})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert node.http.post("/v1/messages/count_tokens", json={}).status_code == 404


def test_a_passed_through_request_starts_from_ollamas_sampling(node: ShardNode) -> None:
    # Temperature 0 leaves only the penalties to tell the defaults apart: Ollama repeats less (1.1).
    prompt = "the the the the"
    ours = node.http.post(
        "/v1/completions",
        json={"model": node.model, "prompt": prompt, "max_tokens": 12, "temperature": 0},
    ).json()["choices"][0]["text"]
    native = node.client.generate(
        node.model, prompt, raw=True, options={"temperature": 0, "num_predict": 12}
    ).response
    unpenalised = node.client.generate(node.model, prompt, raw=True, options=options()).response
    assert ours == native != unpenalised
