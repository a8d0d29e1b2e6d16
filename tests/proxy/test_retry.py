"""The retry table, line by line of what Ollama says, and the budget."""

from __future__ import annotations

import pytest

from proxy_addon import access
from proxy_addon.endpoints import match
from proxy_addon.retry import Budget, Meaning, backoff_s, classify, may_retry

refusal = access.loop({access.HOPS_HEADER: "us"}, "us")
LOOP = refusal.message if refusal else ""


@pytest.mark.parametrize(
    ("path", "status", "text", "meaning"),
    [
        ("/api/chat", 503, "server busy, please try again.  maximum pending requests exceeded", Meaning.FULL),
        ("/api/chat", 404, "model 'x' not found", Meaning.STALE),
        ("/api/embed", 404, 'model "x" not found, try pulling it first', Meaning.STALE),
        ("/api/chat", 508, LOOP, Meaning.STALE),
        ("/api/chat", 500, "llama-server reported out-of-memory during startup: x", Meaning.TOO_SMALL),
        ("/api/chat", 500, "cudaMalloc failed: out of memory", Meaning.TOO_SMALL),
        ("/api/chat", 500, "model requires 9 GiB but only 4 GiB are available", Meaning.TOO_SMALL),
        (
            "/api/chat",
            500,
            "model requires more system memory (9 GiB) than is available (4 GiB)",
            Meaning.TOO_SMALL,
        ),
        ("/api/chat", 500, "unable to load full model on GPU", Meaning.TOO_SMALL),
        ("/api/chat", 500, "llama-server process has terminated: signal: killed", Meaning.BROKEN),
        ("/api/chat", 500, "llama-server process no longer running: -1", Meaning.BROKEN),
        ("/api/chat", 500, "llama runner process has terminated: exit status 2", Meaning.BROKEN),
        ("/api/chat", 500, "timed out waiting for llama-server to start - progress 0.00", Meaning.BROKEN),
        ("/api/chat", 500, "timed out waiting for llama runner to start", Meaning.BROKEN),
        ("/api/chat", 500, "error starting llama-server: no such file", Meaning.BROKEN),
        ("/api/chat", 500, "model runner has unexpectedly stopped", Meaning.BROKEN),
        ("/api/chat", 500, "unexpected server status: 3", Meaning.BROKEN),
        ("/api/chat", 500, "no slots available after 10s", Meaning.BROKEN),
        ("/api/chat", 500, "model failed to load, this may be due to resource limitations", Meaning.BROKEN),
        ("/api/embed", 400, "do embedding request: Post http://127.0.0.1: EOF", Meaning.BROKEN),
        ("/v1/embeddings", 400, "llama-server process no longer running", Meaning.BROKEN),
        ("/api/chat", 400, "do embedding request: x", Meaning.ANSWER),
        ("/api/chat", 400, "invalid model name", Meaning.ANSWER),
        ("/api/chat", 400, '"m" does not support tools', Meaning.ANSWER),
        ("/api/chat", 401, "unauthorized", Meaning.ANSWER),
        ("/api/chat", 403, "", Meaning.REFUSED),
        ("/api/chat", 403, "forbidden by policy", Meaning.ANSWER),
        ("/api/chat", 500, "template: x: unexpected <nil>", Meaning.ANSWER),
        ("/api/chat", 502, '{"error":"cloud model failed"}', Meaning.ANSWER),
    ],
)
def test_what_a_status_and_its_text_mean(path: str, status: int, text: str, meaning: Meaning) -> None:
    endpoint = match(path)
    assert endpoint
    assert (
        classify("status", status, f'{{"error":"{text}"}}' if text and text[0] != "{" else text, endpoint)
        is meaning
    )


@pytest.mark.parametrize(
    ("path", "phase", "replayable", "again"),
    [
        ("/api/chat", "reset", True, True),
        ("/api/chat", "reset", False, False),
        ("/v1/messages", "connect", True, True),
        ("/api/embed", "first_line", True, True),
        ("/api/create", "reset", True, False),
        ("/api/create", "connect", True, False),
        ("/api/push", "reset", True, False),
        ("/api/blobs/sha256:1", "reset", True, False),
    ],
)
def test_which_requests_may_be_sent_again(path: str, phase: str, replayable: bool, again: bool) -> None:
    endpoint = match(path)
    assert endpoint
    assert may_retry(Meaning.DIED, phase, endpoint, replayable) is again


def test_an_answer_is_never_retried() -> None:
    endpoint = match("/api/chat")
    assert endpoint and not may_retry(Meaning.ANSWER, "status", endpoint, True)


def test_the_budget_is_a_share_of_the_requests_plus_a_floor() -> None:
    budget = Budget(ratio=0.2, min_per_s=0.1, window_s=10)
    for _ in range(50):
        budget.request(0.0)
    assert [budget.take(1.0) for _ in range(12)] == [True] * 11 + [False]
    assert [budget.take(20.0) for _ in range(2)] == [True, False]  # the requests have left the window


def test_backoff_doubles_up_to_its_cap_with_at_most_half_taken_away() -> None:
    assert [backoff_s(n, 0.1, 0.5, 0.0) for n in (1, 2, 3, 4)] == [0.1, 0.2, 0.4, 0.5]
    assert backoff_s(2, 0.1, 0.5, 0.999) == pytest.approx(0.1, rel=0.01)
