"""``/api/generate``, ``/api/chat``, ``/api/embed`` and ``/api/embeddings`` on a real llama-server.

A model with a TEMPLATE gets its prompts from :mod:`shard.chat_template`, any other from llama-server's own
jinja engine (``ServedModel.rendering`` says which and why). A handler keeps nothing outside of the request
and sends nothing before the model's first piece, so that it can be run again; only how a load goes on is
told before.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from aiohttp import web

from agent.ollama import names
from shard import bodies
from shard.answer import Answer, Message, Shape
from shard.chat_template import ChatTemplate, chat_template
from shard.go_template import TemplateError, Unsupported
from shard.llama_server import LlamaServer
from shard.models import ServedModel
from shard.node import NODE, json_answer, keep_alive_of, now, options_of, read_body
from shard.prompts import Prompt, fitted, multimodal, tokens_of, whole
from shard.replies import (
    ChatReply,
    CompletionReply,
    Piece,
    RenderedReply,
    chat_object,
    generate_object,
)
from shard.runners import Runner
from shard.thinking import ThinkingParser, without_thinking
from shard.tool_calls import ToolCallParser, preserved_tokens
from shard.translate import (
    Refusal,
    chat_body,
    completion_body,
    embed_inputs,
    generate_messages,
    infill_body,
    messages_of,
    shorten,
    surely_fits,
    think_of,
)

# What an unanswered embedding says when its text is too long (llama.cpp, tools/server).
_TOO_LONG = ("too large", "exceed", "context size", "context length")


async def chat(request: web.Request) -> web.StreamResponse:
    """POST /api/chat."""
    answer = Answer(request, chat_object)
    node, ask = request.app[NODE], await read_body(request, bodies.Chat)
    model = node.models.find(ask.get("model"))
    asked = messages_of(ask)
    if not asked and keep_alive_of(ask) == 0:
        return await _unload(request, ask, model, chat_object)
    images = any(message.get("images") for message in asked)
    ask = answer.ask = _checked(model, ask, "chat", tools=bool(ask.get("tools")), images=images)
    options = options_of(ask, model)
    messages = _conversation(model, asked)
    chat_body(ask, options)  # refuses what is malformed before a model is loaded for it
    async with node.lease(model, ask, options, answer.tell) as runner:
        answer.loaded()
        if not asked:
            return await answer.lifecycle("load")
        async with runner.slots:
            if (template := model.rendering.template) is not None:
                return await _chat_rendered(answer, runner, template, messages, options)
            if ask.get("truncate") is not False and not surely_fits(messages, options["num_ctx"]):
                render = _jinja(runner.server, ask, options)
                messages = list((await fitted(runner.server, messages, render, options["num_ctx"])).messages)
            body = chat_body(dict(ask) | {"messages": messages}, options)
            if ask.get("_debug_render_only"):
                return await answer.rendered(await _jinja(runner.server, ask, options)(messages), messages)
            reply = ChatReply(top_logprobs=bool(ask.get("top_logprobs")))
            return await answer.relay(runner, "/v1/chat/completions", body, reply)


async def generate(request: web.Request) -> web.StreamResponse:
    """POST /api/generate."""
    answer = Answer(request, generate_object)
    node, ask = request.app[NODE], await read_body(request, bodies.Generate)
    model = node.models.find(ask.get("model"))
    if not ask.get("prompt") and keep_alive_of(ask) == 0:
        return await _unload(request, ask, model, generate_object)
    if ask.get("raw") and any(ask.get(field) for field in ("template", "system", "context")):
        raise Refusal(400, "raw mode does not support template, system, or context")
    ask = _checked(model, ask, "generate", suffix=bool(ask.get("suffix")), images=bool(ask.get("images")))
    answer.ask = ask
    options = options_of(ask, model)
    completion_body(ask, options, "")  # refuses what is malformed before a model is loaded for it
    own_template = _parsed(ask["template"]) if ask.get("template") else None
    async with node.lease(model, ask, options, answer.tell) as runner:
        answer.loaded()
        if not ask.get("prompt"):
            return await answer.lifecycle("load")
        async with runner.slots:
            template = own_template or model.rendering.template
            if ask.get("suffix") and (template is None or "suffix" not in template.variables):
                reply = CompletionReply(top_logprobs=bool(ask.get("top_logprobs")))
                return await answer.relay(runner, "/infill", infill_body(ask, options), reply)
            needs_chat = "thinking" in model.capabilities or ask.get("images")
            if template is None and not ask.get("raw") and needs_chat:
                # Only the chat route separates thinking from the answer and takes images to their places.
                return await _generate_chat(answer, runner, model, options)
            return await _generate_rendered(answer, runner, model, template, options)


async def _chat_rendered(
    answer: Answer,
    runner: Runner,
    template: ChatTemplate,
    messages: Sequence[Message],
    options: Mapping[str, Any],
) -> web.StreamResponse:
    ask, server = answer.ask, runner.server
    think, tools = think_of(ask), ask.get("tools") or ()

    async def render(conversation: Sequence[Message]) -> str:
        return _filled(lambda: template.render(conversation, tools=tools, think=think))

    async def body_for(
        conversation: Sequence[Message], *, constrained: bool
    ) -> tuple[Prompt, dict[str, Any]]:
        truncate = ask.get("truncate") is not False
        prompt = await fitted(server, conversation, render, options["num_ctx"], truncate=truncate)
        field = await _prompt_field(server, prompt, render, ask, options, truncate=truncate)
        asked = ask if constrained else {**ask, "format": None}
        body = completion_body(asked, options, field)
        if tools:
            body["preserved_tokens"] = preserved_tokens(template.tool_tag)
        return prompt, body

    tags = template.thinking_tags if think else None
    # A model that thinks first answers in the format only once it has thought: two runs, one answer.
    constrain = tags is not None and ask.get("format") not in (None, "")
    prompt, body = await body_for(messages, constrained=not constrain)
    if ask.get("_debug_render_only"):
        return await answer.rendered(prompt.text, messages)
    reply = RenderedReply(
        thinking=_thinking_parser(tags, prompt.text),
        tools=ToolCallParser(template.tool_tag, tools) if tools else None,
        top_logprobs=bool(ask.get("top_logprobs")),
        constrain=constrain,
    )

    async def again() -> dict[str, Any]:
        thought = {"role": "assistant", "content": "", "thinking": reply.thought}
        _, body = await body_for([*messages, thought], constrained=True)
        reply.resume()
        return body

    return await answer.relay(runner, "/completion", body, reply, again)


async def _generate_chat(
    answer: Answer, runner: Runner, model: ServedModel, options: Mapping[str, Any]
) -> web.StreamResponse:
    ask = answer.ask
    messages: Sequence[Message] = generate_messages(ask, model.system, model.messages)
    render = _jinja(runner.server, ask, options)
    if ask.get("truncate") is not False and not surely_fits(messages, options["num_ctx"]):
        messages = (await fitted(runner.server, messages, render, options["num_ctx"])).messages
    if ask.get("_debug_render_only"):
        return await answer.rendered(await render(messages), messages)
    reply = ChatReply(top_logprobs=bool(ask.get("top_logprobs")))
    body = chat_body({**ask, "messages": list(messages)}, options)
    return await answer.relay(runner, "/v1/chat/completions", body, reply)


async def _generate_rendered(
    answer: Answer,
    runner: Runner,
    model: ServedModel,
    template: ChatTemplate | None,
    options: Mapping[str, Any],
) -> web.StreamResponse:
    ask, server = answer.ask, runner.server
    think = think_of(ask)
    truncate = ask.get("truncate") is not False
    messages: Sequence[Message] = generate_messages(ask, model.system, model.messages)

    async def render(conversation: Sequence[Message]) -> str:
        if ask.get("raw"):
            return str(conversation[-1].get("content") or "")
        if template is None:
            return await _jinja(server, ask, options)(conversation)
        if ask.get("suffix"):
            return _filled(lambda: template.render_infill(ask["prompt"], ask["suffix"], think=think))
        return _filled(lambda: template.render(conversation, think=think))

    # Only a conversation of the model's own template gives way to the context, message by message.
    shrinks = truncate and not any(ask.get(field) for field in ("raw", "suffix", "template"))
    before = list(ask.get("context") or ())
    prompt = await fitted(server, messages, render, options["num_ctx"], truncate=shrinks, before=before)
    if ask.get("_debug_render_only"):
        return await answer.rendered(prompt.text, messages)
    field = await _prompt_field(server, prompt, render, ask, options, truncate=truncate)
    if not ask.get("raw"):
        answer.context = prompt.ids
    own = model.rendering.template
    tags = own.thinking_tags if own is not None and think and not ask.get("raw") else None
    reply = RenderedReply(
        thinking=_thinking_parser(tags, prompt.text), top_logprobs=bool(ask.get("top_logprobs"))
    )
    return await answer.relay(runner, "/completion", completion_body(ask, options, field), reply)


async def _prompt_field(
    server: LlamaServer,
    prompt: Prompt,
    render: Callable[[Sequence[Message]], Awaitable[str]],
    ask: Mapping[str, Any],
    options: Mapping[str, Any],
    *,
    truncate: bool,
) -> list[int] | dict[str, Any]:
    """Return what goes to llama-server as the prompt: tokens, cut if need be, or text with images."""
    if any(message.get("images") for message in prompt.messages):
        return await multimodal(server, prompt.messages, render)
    if not truncate:
        return prompt.ids
    return prompt.cut(options["num_ctx"], options["num_keep"], shift=ask.get("shift") is not False)


def _jinja(
    server: LlamaServer, ask: Mapping[str, Any], options: Mapping[str, Any]
) -> Callable[[Sequence[Message]], Awaitable[str]]:
    """Return what renders a conversation with the GGUF's own template."""

    async def render(conversation: Sequence[Message]) -> str:
        body = chat_body({**ask, "messages": list(conversation)}, options)
        return str((await whole(server, "/apply-template", body))["prompt"])

    return render


def _conversation(model: ServedModel, asked: Sequence[Message]) -> list[Message]:
    messages = model.with_defaults(asked)
    qwen3 = model.config.get("model_family") == "qwen3" or names.parse(model.name).model == "deepseek-r1"
    return [*without_thinking(messages)] if qwen3 else messages


def _thinking_parser(tags: tuple[str, str] | None, prompt: str) -> ThinkingParser | None:
    if tags is None:
        return None
    parser = ThinkingParser(*tags)
    if prompt.strip().endswith(tags[0]):
        parser.add(tags[0])  # the template has opened the thinking already
    return parser


def _parsed(source: Any) -> ChatTemplate:
    try:
        return chat_template(str(source))
    except Unsupported as error:
        raise Refusal(400, str(error)) from error


def _filled(render: Callable[[], str]) -> str:
    try:
        return render()
    except TemplateError as error:
        raise Refusal(500, f"template: {error}") from error


async def embed(request: web.Request) -> web.StreamResponse:
    """POST /api/embed."""
    started = time.monotonic_ns()
    node, ask = request.app[NODE], await read_body(request, bodies.Embed)
    model = node.models.find(ask.get("model"), 'model "{}" not found, try pulling it first')
    inputs, options = embed_inputs(ask), options_of(ask, model)
    async with node.lease(model, ask, options, embeddings=True) as runner:
        load_ns = time.monotonic_ns() - started
        if not inputs:
            return json_answer({"model": ask["model"], "embeddings": []})
        async with runner.slots:
            vectors, tokens = await _embeddings(runner, inputs, truncate=ask.get("truncate") is not False)
    return json_answer(
        {
            "model": ask["model"],
            "embeddings": [shorten(vector, ask.get("dimensions")) for vector in vectors],
            "total_duration": time.monotonic_ns() - started,
            "load_duration": load_ns,
            "prompt_eval_count": tokens,
        }
    )


async def embeddings(request: web.Request) -> web.StreamResponse:
    """POST /api/embeddings, the older form: one text, a vector that is not normalised."""
    node, ask = request.app[NODE], await read_body(request, bodies.Embeddings)
    model = node.models.find(ask.get("model"), 'model "{}" not found, try pulling it first')
    async with node.lease(model, ask, options_of(ask, model), embeddings=True) as runner:
        if not ask.get("prompt"):
            return json_answer({"embedding": []})
        async with runner.slots:
            body = {"input": ask["prompt"], "embd_normalize": -1}
            answer = await whole(runner.server, "/v1/embeddings", body)
    return json_answer({"embedding": answer["data"][0]["embedding"]})


def _checked(
    model: ServedModel,
    ask: dict[str, Any],
    what: str,
    *,
    tools: bool = False,
    suffix: bool = False,
    images: bool = False,
) -> dict[str, Any]:
    if "completion" not in model.capabilities:
        raise Refusal(400, f'"{ask["model"]}" does not support {what}')
    for capability, needed in {"tools": tools, "insert": suffix}.items():
        if needed and capability not in model.capabilities:
            # Ollama names the model in full here.
            raise Refusal(400, f"{names.parse(model.name)} does not support {capability}")
    if images and model.projector is None:
        raise Refusal(400, "this model is missing data required for image input")
    if "thinking" in model.capabilities:
        return {"think": True} | ask if ask.get("think") is None else ask
    if ask.get("think"):
        raise Refusal(400, f'"{ask["model"]}" does not support thinking')
    return {key: value for key, value in ask.items() if key != "think"}


async def _unload(
    request: web.Request, ask: Mapping[str, Any], model: ServedModel, shape: Shape
) -> web.Response:
    await request.app[NODE].runners.unload(model)
    return json_answer(shape(ask["model"], now(), Piece()) | {"done": True, "done_reason": "unload"})


async def _embeddings(
    runner: Runner, inputs: Sequence[str], *, truncate: bool
) -> tuple[list[list[float]], int]:
    server = runner.server
    try:
        answer = await whole(server, "/v1/embeddings", {"input": inputs})
    except Refusal as refusal:
        if not any(sign in refusal.message for sign in _TOO_LONG):
            raise
        if not truncate:
            raise Refusal(400, "the input length exceeds the context length") from refusal
        # A model that does not attend causally must see a text in one batch, others may take several.
        launch = runner.launch
        limit = (launch.num_batch if "batch" in refusal.message else launch.num_ctx) - 1
        cut = [(await tokens_of(server, text))[:limit] for text in inputs]
        answer = await whole(server, "/v1/embeddings", {"input": cut})
    return [row["embedding"] for row in answer["data"]], answer["usage"]["prompt_tokens"]
