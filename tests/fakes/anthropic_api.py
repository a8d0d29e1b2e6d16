"""The Anthropic route: messages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from tests.fakes.engine import ApiError, Generation, Job
from tests.fakes.exchange import Exchange
from tests.fakes.native_api import ANSWER_TURN, find, prompt_of, require
from tests.fakes.openai_api import JSON, SSE, event

if TYPE_CHECKING:
    from tests.fakes.ollama_node import FakeOllama

ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_body(status: int, text: str) -> bytes:
    """Return an error in Anthropic's shape."""
    error = {"type": ERROR_TYPES.get(status, "api_error"), "message": text}
    return orjson.dumps({"type": "error", "error": error, "request_id": "req_fake"})


def _tool(body: dict[str, Any]) -> dict[str, Any] | None:
    tools, messages = body.get("tools") or [], body["messages"]
    content = messages[-1].get("content")
    answered = isinstance(content, list) and any(part.get("type") == "tool_result" for part in content)
    return None if not tools or answered else tools[0]


async def messages(node: FakeOllama, exchange: Exchange) -> None:
    """POST /v1/messages."""
    body = await node.json_body(exchange)
    if not body.get("model"):
        raise ApiError(400, "model is required")
    if not isinstance(body.get("max_tokens"), int) or body["max_tokens"] <= 0:
        raise ApiError(400, "max_tokens is required and must be positive")
    if not body.get("messages"):
        raise ApiError(400, "messages is required")
    model, name, tool = find(node, body["model"]), body["model"], _tool(body)
    think = (body.get("thinking") or {}).get("type") in ("enabled", "adaptive")
    require(model, name, tools=bool(tool), think=think, what="chat")
    prompt, limit = prompt_of(body["messages"]), body["max_tokens"]
    job = Job(model, name, prompt, limit=limit, think=think, tool=tool, answer_turn=ANSWER_TURN)
    async with Generation(node.scheduler, job) as run:
        shell = {"id": f"msg_{run.tag}", "type": "message", "role": "assistant", "model": name}

        def reason() -> str:
            return "tool_use" if tool else {"length": "max_tokens"}.get(run.stats.done_reason, "end_turn")

        def usage() -> dict[str, int]:
            return {"input_tokens": run.stats.prompt_count, "output_tokens": run.stats.eval_count}

        def block(kind: str, text: str = "") -> dict[str, Any]:
            if kind == "tool":
                call_id, function, _ = run.tool_call()
                return {"type": "tool_use", "id": call_id, "name": function, "input": {}}
            if kind == "thinking":
                return {"type": "thinking", "thinking": text, "signature": ""}
            return {"type": "text", "text": text}

        def delta(kind: str, text: str) -> dict[str, Any]:
            if kind == "tool":
                return {"type": "input_json_delta", "partial_json": orjson.dumps(run.tool_call()[2]).decode()}
            if kind == "thinking":
                return {"type": "thinking_delta", "thinking": text}
            return {"type": "text_delta", "text": text}

        if not body.get("stream"):
            thinking, text = await run.whole()
            content = [block("thinking", thinking)] if thinking else []
            content += [block("text", text)] if text else []
            content += [{**block("tool"), "input": run.tool_call()[2]}] if tool else []
            end = {"stop_reason": reason(), "stop_sequence": None, "usage": usage()}
            return await exchange.respond(200, orjson.dumps({**shell, "content": content, **end}), JSON)

        # Mid-stream errors have no shape of their own here: the stream ends without message_stop.
        index, open_kind, started = -1, None, False

        async def send(kind: str, *, last: bool = False, **fields: Any) -> None:
            await exchange.chunk(event({"type": kind, **fields}, kind), last=last)

        async def start() -> None:
            await exchange.start(SSE)
            opening = {**shell, "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage()}
            await send("message_start", message=opening)

        async for batch in run.pieces():
            if not started:
                started = True
                await start()
            for kind, text in batch:
                if kind != open_kind:
                    if open_kind is not None:
                        await send("content_block_stop", index=index)
                    index, open_kind = index + 1, kind
                    await send("content_block_start", index=index, content_block=block(kind))
                await send("content_block_delta", index=index, delta=delta(kind, text))
        if not started:
            await start()
        if open_kind is not None:
            await send("content_block_stop", index=index)
        await send("message_delta", delta={"stop_reason": reason(), "stop_sequence": None}, usage=usage())
        await send("message_stop", last=True)
        await exchange.end()
