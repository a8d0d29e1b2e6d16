"""The routing benchmark's own instruments: what it would overlook, and what its clock does."""

from __future__ import annotations

import asyncio
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

from bench_routing_check import check
from bench_routing_client import Clients, Outcome, Wrong, judged, vectors_judged
from bench_routing_clock import run
from bench_routing_report import NONE, compared, document
from bench_routing_results import Figures, Results, Run, quantile
from bench_routing_subjects import BASE, ORACLE, OWN, SUBJECTS, Broken, Subject

from tests.fakes.engine import embedding
from tests.fakes.faults import fin, named
from tests.fakes.ollama_node import FakeOllama
from tests.fakes.tokens import expected_text
from tests.sim.trace import Arrival

PROMPT = "Tell me. [[id:a]][[n:6]]"
RIGHT = expected_text(PROMPT)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        (RIGHT.replace(" a-2", ""), "lost"),
        (RIGHT.removesuffix(" a-5"), "lost"),
        (RIGHT.replace(" a-2", " a-2 a-2"), "doubled"),
        (RIGHT + RIGHT, "doubled"),
        (RIGHT.replace(" a-2", " b-2"), "mixed"),
    ],
)
def test_a_spoilt_answer_is_told_from_a_right_one(text: str, verdict: str) -> None:
    assert judged(RIGHT, PROMPT, None) == 6
    with pytest.raises(Wrong) as caught:
        judged(text, PROMPT, None)
    assert caught.value.verdict == verdict


def test_a_vector_of_another_text_is_found() -> None:
    one, other = (embedding(text, 8) for text in ("one", "other"))
    vectors_judged([one, other], ["one", "other"])
    with pytest.raises(Wrong):
        vectors_judged([other, one], ["one", "other"])
    with pytest.raises(Wrong):
        vectors_judged([one], ["one", "other"])


def arrival(number: int, after: str | None = None) -> Arrival:
    said = ({"role": "user", "content": f"[[id:q{number}]][[n:4]]"},)
    return Arrival(f"q{number}", 0.0, f"client-{number}", "llama3.2", said, output_tokens=4, after=after)


async def test_what_a_node_breaks_off_or_refuses_is_no_answer() -> None:
    async with FakeOllama() as node:
        node.fail(fin("after_chunks", chunks=2, path="/api/chat"), named("runner_stopped", path="/api/chat"))
        asked = [arrival(0), arrival(1, after="q0"), arrival(2, after="q1")]
        outcomes = await Clients(asked, lambda _: node.url, 60.0).play()
    assert [outcome.verdict for outcome in outcomes][2] == "ok"
    assert {outcome.verdict for outcome in outcomes[:2]} <= {"failed", "lost"}
    assert outcomes[2].tokens == 4
    assert 0 < outcomes[2].ttft_s <= outcomes[2].total_s


def test_the_fast_clock_moves_timers_and_time_alike() -> None:
    async def main() -> tuple[float, float]:
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        await asyncio.sleep(20)
        slept_s = loop.time() - begun_s
        try:
            async with asyncio.timeout(30):
                await asyncio.Event().wait()
        except TimeoutError:
            return slept_s, loop.time() - begun_s
        raise AssertionError

    slept_s, waited_s = run(main(), speed=1000)
    assert slept_s >= 20
    assert waited_s >= slept_s + 30


def test_nginx_as_configured_streams_and_retries(tmp_path: Path) -> None:
    run(check([SUBJECTS[BASE]], tmp_path, 1.0), 1.0)


def test_the_check_finds_a_balancer_that_retries_nothing(tmp_path: Path) -> None:
    sound = SUBJECTS[BASE].command
    assert sound is not None

    def broken(nodes: object, folder: Path, port: int, speed: float) -> list[str]:
        command = sound(nodes, folder, port, speed)  # type: ignore[arg-type]
        file = folder / "nginx.conf"
        lines = file.read_text().splitlines()
        file.write_text("\n".join("proxy_next_upstream off;" if "next_upstream" in x else x for x in lines))
        return command

    with pytest.raises(Broken, match="answers with errors"):
        run(check([Subject("broken", "broken nginx", broken)], tmp_path, 1.0), 1.0)


def a_run(subject: str, *outcomes: Outcome) -> Run:
    return Run("mixed", 1, subject, 3, len(outcomes) + 1, {"nodes": 0.1}, 0.0, list(outcomes))


ANSWERED = Outcome(0.0, 1.0, 2.0, 10, "ok")
LATER = Outcome(70.0, 3.0, 10.0, 10, "ok")
FAILED = Outcome(5.0, 9.0, 9.0, 0, "failed", "HTTP 500")
MIXED = Outcome(6.0, 9.0, 9.0, 0, "mixed", "token 2")


def test_figures_are_of_answered_requests_and_failures_are_counted_beside() -> None:
    figures = Figures.of([a_run(OWN, ANSWERED, LATER, FAILED, MIXED)])
    assert (figures.asked, figures.failed, figures.spoilt) == (4, 1, 1)
    assert (figures.total.mean, figures.total.p99, figures.first_minute.mean) == (6.0, 10.0, 2.0)
    assert (figures.tok_s, figures.loads, figures.retries) == (20 / 80, 3, 1)
    assert math.isnan(Figures.of([a_run(OWN, FAILED)]).total.mean)


def test_quantiles_are_by_nearest_rank() -> None:
    ordered = [float(n) for n in range(1, 101)]
    assert [quantile(ordered, share) for share in (0, 0.01, 0.5, 0.99, 1)] == [1, 1, 50, 99, 100]


def test_results_are_read_as_they_were_kept(tmp_path: Path) -> None:
    about = {"speed": 10.0, "machine": "2 cores", "versions": ["nginx 1.22"], "date": "2026-01-01"}
    results = Results(about, [a_run(OWN, ANSWERED, FAILED), a_run(ORACLE, ANSWERED), a_run(BASE, LATER)])
    results.save(tmp_path / "kept.json")
    again = Results.load(tmp_path / "kept.json")
    assert (again.about, again.runs) == (results.about, results.runs)
    assert document(again) == document(results)


def test_ratios_stand_only_where_there_is_something_to_compare_with() -> None:
    _, [own] = compared(Results({}, [a_run(OWN, LATER)]), "mixed")
    assert own[-3:] == (NONE, NONE, NONE)
    _, rows = compared(Results({}, [a_run(OWN, LATER), a_run(ORACLE, ANSWERED)]), "mixed")
    assert rows[1][-3:] == ("5.00×", "5.00×", NONE)
