"""Several models over the same machines: together where memory allows, else the least valuable one goes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from shard.runners import worth
from tests.lab import Lab, needs_lab
from tests.shard.conftest import wait_until
from tests.shard.fleet import ShardFleet

pytestmark = [needs_lab, pytest.mark.timeout(300)]

OPTIONS = {"temperature": 0, "num_predict": 8}


def room_for_both(fleet: ShardFleet) -> bool:
    return fleet.lends["anna"] == "600MiB"


def names(fleet: ShardFleet) -> set[str]:
    return {row["name"] for row in fleet.http_get(f"{fleet.url}/api/ps")["models"]}


def ask(fleet: ShardFleet, model: str) -> str:
    answer = fleet.ask(
        "/api/generate", model=model, prompt="Bread is", raw=True, stream=False, options=OPTIONS
    )
    assert answer.status_code == 200, answer.text
    return str(answer.json()["response"])


@pytest.fixture(scope="module", params=["240MiB", "600MiB"])
def fleet(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, gguf_path: Path
) -> Iterator[ShardFleet]:
    """Two machines that together hold one of the two models, or both."""
    with Lab("coordinator", "anna", "bert") as lab:
        made = ShardFleet(
            lab, tmp_path_factory.mktemp("fleet"), gguf_path, ["anna", "bert"], lends=request.param
        )
        made.more_models = {"other:270m": gguf_path}
        made.start()
        yield made


def test_a_second_model_is_loaded_beside_the_first_or_in_its_place(fleet: ShardFleet) -> None:
    first = ask(fleet, "gemma3:270m")
    assert ask(fleet, "other:270m") == first, "it is the same file"
    assert names(fleet) == ({"gemma3:270m", "other:270m"} if room_for_both(fleet) else {"other:270m"})
    held = [len(worker.rpc_servers()) for worker in fleet.workers.values()]
    assert sum(held) == (len(fleet.llama_servers()) if room_for_both(fleet) else 2)


def test_a_model_at_work_is_waited_for(fleet: ShardFleet) -> None:
    ask(fleet, "gemma3:270m")
    answers: list[str] = []
    other = threading.Thread(target=lambda: answers.append(ask(fleet, "other:270m")))
    body = {"prompt": "1, 2, 3,", "raw": True, "options": OPTIONS | {"num_predict": 60}}
    with fleet.stream("/api/generate", model="gemma3:270m", **body) as lines:
        seen = [next(lines)]
        other.start()
        seen += list(lines)
    assert seen[-1]["done"] and not any("error" in line for line in seen)
    other.join(240)
    assert not other.is_alive() and answers


def test_an_idle_model_leaves_when_its_time_is_up(fleet: ShardFleet) -> None:
    answer = fleet.ask(
        "/api/generate", prompt="Bread is", raw=True, stream=False, keep_alive="1s", options=OPTIONS
    )
    assert answer.status_code == 200
    wait_until(lambda: "gemma3:270m" not in names(fleet), "the model is unloaded")


def test_worth_falls_with_idleness_and_rises_with_the_cost_of_a_load() -> None:
    assert worth(10, 0) > worth(10, 60) > worth(10, 600)
    assert worth(100, 60) > worth(10, 60)
    assert worth(600, 300) > worth(2, 1)
