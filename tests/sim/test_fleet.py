"""The same fleet as real HTTP servers."""

from __future__ import annotations

import asyncio

import aiohttp

from tests.fakes.tokens import check_stream
from tests.sim.fleet import SimFleet
from tests.sim.trace import Event
from tests.sim.traces import TRACES


async def test_nodes_and_agents_answer_over_http() -> None:
    trace = TRACES["mixed"](1)
    async with SimFleet(trace, time_scale=0.001) as fleet, aiohttp.ClientSession() as http:
        for node, agent, arrival in zip(fleet.nodes, fleet.agents, trace.arrivals, strict=False):
            body = {**arrival.body(), "stream": False}
            async with http.post(node.url + arrival.path, json=body) as answer:
                text = (await answer.json())["message"]["content"]
            prompt = arrival.messages[-1]["content"]
            assert check_stream(text, prompt, arrival.num_predict) == arrival.output_tokens
            async with http.get(agent.url + "/v1/report") as answer:
                report = await answer.json()
            assert [row["name"] for row in report["ollama"]["resident"]] == [arrival.model]
            assert bool(report["gpus"]) == bool(node.spec.vram_bytes)


async def test_a_late_node_refuses_until_it_joins_and_a_failing_one_fails() -> None:
    trace = TRACES["late_join"](1)
    arrival = trace.arrivals[0]
    async with SimFleet(trace, time_scale=0.001) as fleet, aiohttp.ClientSession() as http:

        async def status(index: int) -> int:
            url = fleet.nodes[index].url + arrival.path
            async with http.post(url, json=arrival.body()) as answer:
                await answer.read()
                return answer.status

        late = next(iter(trace.late))
        try:
            await status(late)
        except aiohttp.ClientConnectorError:
            pass
        else:
            raise AssertionError("a node that has not joined answered")
        await fleet.befall(Event(0, late, "join"))
        assert await status(late) == 200
        await fleet.befall(Event(0, late, "fail_fast"))
        assert await status(late) == 500
        await fleet.befall(Event(0, late, "recover"))
        assert await status(late) == 200


async def test_what_is_to_be_warm_is_loaded_before_the_first_request() -> None:
    async with SimFleet(TRACES["equal10"](1), time_scale=0.001) as fleet:
        resident = await asyncio.gather(*(node.scheduler.resident() for node in fleet.nodes))
        assert [[runner.name for runner in runners] for runners in resident] == [["llama3:8b"]] * 10
        assert all(node.scheduler.loads == [] for node in fleet.nodes)
