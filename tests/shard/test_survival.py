"""Machines that die, stop or vanish under a model that spans them: what a client sees, and what is left.

A real llama-server over two of three real rpc-servers, each machine a lab host of its own. Any two of the
workers hold the model, one does not.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import httpx
import psutil
import pytest

from tests.lab import Lab, needs_lab
from tests.shard.conftest import BOUND_S, wait_until
from tests.shard.fleet import PLAIN, ShardFleet

pytestmark = [needs_lab, pytest.mark.timeout(300)]

WORKERS = ("anna", "bert", "carl")
PROMPT = "The capital of France is"
#: Some 1,300 tokens: three batches, a prefill of seconds on one thread. Between batches llama-server tells
#: how far it is.
LONG_PROMPT = "The quick brown fox jumps over the lazy dog. " * 130
#: Slow enough that a load takes seconds, over which the coordinator's link is shared.
SLOW_LINK_BIT_S = 160e6


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab("coordinator", *WORKERS) as made:
        yield made


@pytest.fixture(scope="module")
def started(lab: Lab, tmp_path_factory: pytest.TempPathFactory, gguf_path: Path) -> ShardFleet:
    made = ShardFleet(lab, tmp_path_factory.mktemp("fleet"), gguf_path, WORKERS, lends="240MiB")
    made.start()
    return made


@pytest.fixture
def fleet(started: ShardFleet) -> Iterator[ShardFleet]:
    """The fleet with everybody well and nothing loaded."""
    yield started
    for worker in started.workers.values():
        worker.host.mend()
    for name in started.workers:
        started.wait_for_agent(name)
    assert started.ask("/api/generate", keep_alive=0, stream=False).status_code == 200
    wait_until(lambda: not started.llama_servers(), "llama-server has ended")
    for name, worker in started.workers.items():
        wait_until(lambda worker=worker: not worker.rpc_servers(), f"{name} lends nothing any more")


@pytest.fixture(scope="module")
def expected(started: ShardFleet) -> str:
    """What the healthy fleet answers: the split of the layers must not change a word of it."""
    return str(started.generate(PROMPT)["response"])


@pytest.fixture(scope="module")
def expected_of_long(started: ShardFleet) -> str:
    return str(started.generate(LONG_PROMPT)["response"])


def kill(fleet: ShardFleet, victim: str) -> None:
    for process in fleet.workers[victim].rpc_servers():
        process.kill()


def stop(fleet: ShardFleet, victim: str) -> None:
    for process in fleet.workers[victim].rpc_servers():
        process.suspend()


def cut(fleet: ShardFleet, victim: str) -> None:
    fleet.workers[victim].host.cut()


def reset(fleet: ShardFleet, victim: str) -> None:
    """Every connection to its tunnel port is destroyed; both ends are told."""
    fleet.coordinator.host.run(
        ["ss", "-K", "dst", fleet.workers[victim].host.address, "dport", "=", "11437"], capture_output=True
    )


Fault = Callable[[ShardFleet, str], None]
FAULTS = pytest.mark.parametrize("fault", [kill, stop, cut])
#: After a reset the machine itself is well; it is left out for a while all the same.
FAULTS_AND_RESET = pytest.mark.parametrize("fault", [kill, stop, cut, reset])


class Asked(threading.Thread):
    """A request on its way, in a thread of its own."""

    def __init__(self, fleet: ShardFleet, prompt: str = PROMPT) -> None:
        super().__init__(daemon=True)
        self._fleet = fleet
        self._prompt = prompt
        self.answer: dict[str, Any] = {}
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.answer = self._fleet.generate(self._prompt)
        except (AssertionError, httpx.HTTPError) as error:
            self.error = error

    def response(self) -> str:
        self.join(4 * BOUND_S)
        assert not self.is_alive(), "the request hangs"
        if self.error is not None:
            raise self.error
        assert self.answer["done"] is True
        return str(self.answer["response"])


def phase(fleet: ShardFleet) -> str:
    return next((str(load["phase"]) for load in fleet.loads()), "")


def replanned_without(fleet: ShardFleet, victim: str) -> dict[str, Any]:
    """The latest plan, which must not have the victim and must say why it was made."""
    plan = fleet.plans()[-1]
    assert victim not in fleet.nodes_of(plan)
    assert fleet.holders() == fleet.nodes_of(plan)
    return plan


@FAULTS
def test_lost_while_idle_it_is_loaded_again_without_a_person(
    fleet: ShardFleet, expected: str, fault: Fault
) -> None:
    assert fleet.generate(PROMPT)["response"] == expected
    victim = sorted(fleet.holders())[0]
    before = len(fleet.plans())
    fault(fleet, victim)
    # Nobody asks for anything meanwhile.
    wait_until(
        lambda: len(fleet.plans()) > before and victim not in fleet.holders() and phase(fleet) == "ready",
        "the model is ready again on the others",
    )
    replanned_without(fleet, victim)
    assert fleet.generate(PROMPT)["response"] == expected


@FAULTS_AND_RESET
def test_lost_in_a_prefill_the_request_is_replayed(
    fleet: ShardFleet, expected_of_long: str, fault: Fault
) -> None:
    fleet.ask("/api/generate", keep_alive=0, stream=False)
    fleet.generate(PROMPT)  # loaded, with nothing of the long prompt in its cache
    victim = sorted(fleet.holders())[-1]
    asked = Asked(fleet, LONG_PROMPT)
    wait_until(lambda: prefilling(fleet), "the prefill is under way")
    fault(fleet, victim)
    assert asked.response() == expected_of_long
    replanned_without(fleet, victim)


@FAULTS
def test_lost_while_loading_the_load_begins_again(fleet: ShardFleet, expected: str, fault: Fault) -> None:
    fleet.coordinator.host.link(rate_bit_s=SLOW_LINK_BIT_S)
    try:
        asked = Asked(fleet)
        wait_until(lambda: 0.05 < progress(fleet) < 0.9, "a part of the model has been sent")
        loading = fleet.nodes_of(fleet.loads()[0]["plan"])
        victim = sorted(loading)[0]
        fault(fleet, victim)
        assert asked.response() == expected
    finally:
        fleet.coordinator.host.link()
    plan = replanned_without(fleet, victim)
    assert plan["reason"].startswith("the plan before failed")


@FAULTS_AND_RESET
def test_lost_in_mid_stream_the_stream_ends_with_an_error_and_the_next_request_is_served(
    fleet: ShardFleet, expected: str, fault: Fault
) -> None:
    options = {"temperature": 0, "num_predict": 3000, "repeat_penalty": 1.0}
    with fleet.stream("/api/generate", prompt="1, 2, 3,", raw=True, options=options) as lines:
        seen = [next(lines) for _ in range(5)]
        victim = sorted(fleet.holders())[0]
        fault(fleet, victim)
        seen += list(lines)
    assert "error" in seen[-1] and [line for line in seen if "error" in line] == seen[-1:]
    assert not any(line.get("done") for line in seen)
    assert victim_named(fleet, victim, seen[-1]["error"])
    assert fleet.generate(PROMPT)["response"] == expected
    replanned_without(fleet, victim)


class Freezer:
    """A cgroup that holds processes still without a signal: unlike SIGSTOP, their state does not show it."""

    def __init__(self) -> None:
        v1 = Path("/sys/fs/cgroup/freezer")
        self.group = (v1 if v1.is_dir() else Path("/sys/fs/cgroup")) / f"sollol-test-{os.getpid()}"
        self._switch, self._on, self._off = (
            ("freezer.state", "FROZEN", "THAWED") if v1.is_dir() else ("cgroup.freeze", "1", "0")
        )

    def __enter__(self) -> Self:
        self.group.mkdir()
        return self

    def freeze(self, process: psutil.Process) -> None:
        (self.group / "cgroup.procs").write_text(str(process.pid))
        (self.group / self._switch).write_text(self._on)

    def __exit__(self, *_: object) -> None:
        (self.group / self._switch).write_text(self._off)
        wait_until(lambda: not (self.group / "cgroup.procs").read_text(), "the frozen process has ended")
        self.group.rmdir()


def test_a_hang_that_no_process_shows_is_noticed_in_decode(fleet: ShardFleet, expected: str) -> None:
    """Its agent answers, its state is well, its connections stand: only the tokens stay away."""
    options = {"temperature": 0, "num_predict": 3000, "repeat_penalty": 1.0}
    with Freezer() as freezer:
        with fleet.stream("/api/generate", prompt="1, 2, 3,", raw=True, options=options) as lines:
            seen = [next(lines) for _ in range(5)]
            [process] = fleet.workers[sorted(fleet.holders())[0]].rpc_servers()
            freezer.freeze(process)
            seen += list(lines)
        assert "no token for" in seen[-1]["error"] and "although one is due" in seen[-1]["error"]
        assert not any(line.get("done") for line in seen)
        assert fleet.generate(PROMPT)["response"] == expected


def victim_named(fleet: ShardFleet, victim: str, sentence: str) -> bool:
    """Whether the client is told whose fault it was, or what llama-server died of."""
    return fleet.workers[victim].name in sentence or "process has terminated" in sentence


def test_unreachable_before_a_load_it_is_planned_around(fleet: ShardFleet, expected: str) -> None:
    victim = "anna"
    cut(fleet, victim)
    assert fleet.generate(PROMPT)["response"] == expected
    assert victim not in fleet.holders()


def test_a_dead_agent_is_planned_around_and_taken_back(fleet: ShardFleet, expected: str) -> None:
    victim = fleet.workers["bert"]
    assert victim.agent is not None
    victim.agent.kill()
    victim.agent.wait()
    assert fleet.generate(PROMPT)["response"] == expected
    assert "bert" not in fleet.holders()
    fleet.start_agent("bert")
    fleet.wait_for_agent("bert")


def test_an_agent_that_dies_takes_its_rpc_server_along(fleet: ShardFleet, expected: str) -> None:
    fleet.generate(PROMPT)
    victim = sorted(fleet.holders())[0]
    machine = fleet.workers[victim]
    [orphan] = machine.rpc_servers()
    assert machine.agent is not None
    machine.agent.kill()
    machine.agent.wait()
    wait_until(lambda: not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE, "it has ended")
    assert fleet.generate(PROMPT)["response"] == expected
    fleet.start_agent(victim)
    fleet.wait_for_agent(victim)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_llama_server_itself_is_lost_in_a_prefill(
    fleet: ShardFleet, expected_of_long: str, signum: signal.Signals
) -> None:
    fleet.ask("/api/generate", keep_alive=0, stream=False)
    fleet.generate(PROMPT)
    asked = Asked(fleet, LONG_PROMPT)
    wait_until(lambda: prefilling(fleet), "the prefill is under way")
    [child] = fleet.llama_servers()
    child.send_signal(signum)
    if signum == signal.SIGSTOP:  # nothing says that it will not go on: it is let go on, and goes on
        child.send_signal(signal.SIGCONT)
    assert asked.response() == expected_of_long


def test_the_coordinator_is_killed_and_leaves_nothing_behind(fleet: ShardFleet, expected: str) -> None:
    assert fleet.generate(PROMPT)["response"] == expected
    holders = fleet.holders()
    [child] = fleet.llama_servers()
    assert fleet.process is not None
    fleet.process.kill()
    fleet.process.wait()
    wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, "llama-server ends")
    for name in holders:
        wait_until(lambda name=name: not fleet.workers[name].rpc_servers(), f"{name} takes its memory back")
    fleet.serve()
    assert fleet.generate(PROMPT)["response"] == expected


def test_when_too_few_are_left_it_says_so_and_is_back_when_they_are(fleet: ShardFleet, expected: str) -> None:
    fleet.generate(PROMPT)
    for name in ("anna", "bert"):
        cut(fleet, name)
    answer = fleet.ask("/api/generate", prompt=PROMPT, raw=True, stream=False)
    assert answer.status_code == 500
    told = answer.json()["error"]
    assert "requires more system memory" in told
    for name in ("anna", "bert"):
        assert f"{fleet.workers[name].name} is left out" in told
    for name in ("anna", "bert"):
        fleet.workers[name].host.mend()
        fleet.wait_for_agent(name)
    assert fleet.generate(PROMPT)["response"] == expected


def test_openai_and_anthropic_streams_end_with_their_own_errors(fleet: ShardFleet) -> None:
    fleet.generate(PROMPT)
    messages = [{"role": "user", "content": "1, 2, 3,"}]
    for path, ends in (("/v1/chat/completions", "[DONE]"), ("/v1/messages", "message_stop")):
        with fleet.coordinator.host.entered():
            client = httpx.Client(timeout=2 * BOUND_S, **PLAIN)
            body = {"model": "gemma3:270m", "messages": messages, "max_tokens": 3000, "stream": True}
            response = client.send(client.build_request("POST", fleet.url + path, json=body), stream=True)
        lines = response.iter_lines()
        seen = [next(lines) for _ in range(8)]
        kill(fleet, sorted(fleet.holders())[0])
        seen += list(lines)
        text = "\n".join(seen)
        assert response.status_code == 200
        assert ends not in text
        error = json.loads(next(line for line in reversed(seen) if line.startswith("data: "))[6:])
        assert "process has terminated" in error["error"]["message"]
        client.close()


def prefilling(fleet: ShardFleet) -> bool:
    """Whether llama-server computes and no answer has begun."""
    [child] = fleet.llama_servers() or [None]
    if child is None:
        return False
    flags = child.cmdline()
    transport = httpx.HTTPTransport(uds=flags[flags.index("--host") + 1])
    with httpx.Client(base_url="http://llama-server", transport=transport, timeout=BOUND_S) as direct:
        slots = direct.get("/slots").json()
    return any(slot["is_processing"] and slot.get("n_prompt_tokens_processed", 0) > 0 for slot in slots)


def progress(fleet: ShardFleet) -> float:
    return max((float(load["progress"]) for load in fleet.loads() if load["phase"] == "loading"), default=0.0)
