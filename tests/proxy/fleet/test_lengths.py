"""What is expected of an answer's length: before anything was seen, from one's own, and from capped ones."""

from __future__ import annotations

import random
from collections.abc import Iterable
from statistics import fmean, quantiles

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy_addon.ask import Ask
from proxy_addon.fleet import lengths as module
from proxy_addon.fleet.lengths import PRIOR_MEAN_TOKENS, PRIOR_MEDIAN_TOKENS, OutputLengths
from tests.proxy.placement.worlds import ask

WITHIN_A_BUCKET = 2 ** (1 / module.PER_OCTAVE) - 1


def taught(tokens: list[int], asked: Ask | None = None) -> OutputLengths:
    lengths = OutputLengths()
    for count in tokens:
        lengths.observe(asked or ask(), count)
    return lengths


def test_before_anything_was_seen_the_published_traces_speak() -> None:
    lengths = OutputLengths().of(ask())
    assert lengths.mean == pytest.approx(PRIOR_MEAN_TOKENS, rel=0.02)
    assert lengths.quantile(0.5) == pytest.approx(PRIOR_MEDIAN_TOKENS, rel=WITHIN_A_BUCKET)
    assert lengths.quantile(0.1) < lengths.quantile(0.9) < lengths.quantile(0.99)


def test_neither_embeddings_nor_loads_have_tokens() -> None:
    lengths = taught([500])
    for asked in (ask(path="/api/embed"), ask(load_only=True)):
        assert (lengths.of(asked).mean, lengths.of(asked).quantile(0.99)) == (0, 0)
        assert lengths.of(asked).remaining(0) == 0
    lengths.observe(ask(load_only=True), 0)
    assert lengths.tables.keys() == taught([1]).tables.keys()


def test_a_population_is_learned_with_its_mean_and_quantiles() -> None:
    draw = random.Random(1)
    tokens = [max(int(draw.lognormvariate(6, 0.8)), 1) for _ in range(400)]
    lengths = taught(tokens).of(ask())
    recent = tokens[-150:]
    assert lengths.mean == pytest.approx(fmean(recent), rel=0.25)
    deciles = quantiles(recent, n=10)
    assert lengths.quantile(0.5) == pytest.approx(deciles[4], rel=0.35)
    assert lengths.quantile(0.9) == pytest.approx(deciles[8], rel=0.35)


def test_few_answers_suffice_and_a_change_is_followed() -> None:
    assert taught([1000] * 4).of(ask()).mean > 600
    assert taught([1000] * 60 + [20] * 60).of(ask()).mean < 500


def test_what_was_asked_for_before_is_followed_as_well() -> None:
    lengths = taught([1000] * 60)
    for _ in range(60):
        lengths.observe(ask(), 20)
        lengths.of(ask())
    assert lengths.of(ask()).mean == pytest.approx(taught([1000] * 60 + [20] * 60).of(ask()).mean, rel=0.1)


def test_each_client_model_and_kind_has_lengths_of_its_own() -> None:
    lengths = OutputLengths()
    for _ in range(40):
        lengths.observe(ask(client="short"), 10)
        lengths.observe(ask(client="long"), 2000)
        lengths.observe(ask(client="short", kind="summarization"), 300)
        lengths.observe(ask("other", client="short"), 100)
    means = [
        lengths.of(asked).mean
        for asked in (
            ask(client="short"),
            ask("other", client="short"),
            ask(client="short", kind="summarization"),
            ask(client="long"),
        )
    ]
    assert means == sorted(means)
    for mean, true in zip(means, (10, 100, 300, 2000), strict=True):
        assert true / (1 + WITHIN_A_BUCKET) < mean < 1.2 * true + 60, "drawn a little towards all others"


def test_a_new_client_is_expected_to_be_like_the_others() -> None:
    lengths = OutputLengths()
    for number in range(40):
        lengths.observe(ask(client=f"10.0.0.{number}"), 1000)
        lengths.observe(ask("other", client=f"10.0.0.{number}"), 10)
    assert lengths.of(ask(client="new")).mean > 800
    assert lengths.of(ask("other", client="new")).mean < 100
    assert lengths.of(ask("other", client="new", kind="extraction")).mean < 300, "the model is known"


@given(
    tokens=st.lists(st.integers(0, 100_000), max_size=30),
    cap=st.integers(1, 5000),
    done=st.floats(0, 10_000),
)
def test_no_expectation_is_beyond_the_cap_and_none_is_negative(
    tokens: list[int], cap: int, done: float
) -> None:
    learned = taught(tokens)
    free, capped = learned.of(ask()), learned.of(ask(max_tokens=cap))
    steps = [capped.quantile(q / 20) for q in range(21)]
    assert steps == sorted(steps)
    assert 0 <= steps[0] <= steps[-1] <= cap
    assert 0 < capped.mean <= min(cap, free.mean) * (1 + 1e-9)
    assert 0 <= capped.remaining(done) <= max(cap - done, 0) + 1e-6
    assert free.remaining(done) >= 0
    assert free.remaining(0) == pytest.approx(free.mean)


def test_what_has_run_long_will_run_on() -> None:
    lengths = taught([20] * 30 + [4000] * 10).of(ask())
    assert lengths.remaining(100) > 2 * lengths.remaining(0)
    assert lengths.remaining(70_000) == pytest.approx(module.OVERRUN * 70_000)
    assert lengths.remaining(3000) < lengths.remaining(100)


def test_capped_answers_teach_that_they_would_have_been_longer() -> None:
    capped = ask(max_tokens=50)
    lengths = taught([50] * 40, capped)
    assert lengths.of(capped).mean == pytest.approx(50, rel=0.1)
    assert lengths.of(ask()).mean > PRIOR_MEAN_TOKENS, "at least 50 tokens, as all of them were"
    assert lengths.of(ask()).quantile(0.05) >= 50 / (1 + WITHIN_A_BUCKET)
    ended = taught([50] * 40, ask(max_tokens=51))
    assert ended.of(ask()).mean < 80, "they ended by themselves"


def test_a_cap_does_not_hide_the_distribution_that_it_censors() -> None:
    """Half of the requests are capped at 100; the truth is 30 or 600, evenly."""
    lengths, draw = OutputLengths(), random.Random(5)
    for _ in range(300):
        true = draw.choice((30, 600))
        asked = ask(max_tokens=100) if draw.random() < 0.5 else ask()
        lengths.observe(asked, min(true, asked.max_tokens or true))
    assert lengths.of(ask()).mean == pytest.approx(315, rel=0.3)
    assert lengths.of(ask(max_tokens=100)).mean == pytest.approx(65, rel=0.25)


def test_memory_is_bounded_however_many_clients_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_TABLES", 20)
    lengths = OutputLengths()
    for number in range(100):
        asked = ask(client=f"10.0.1.{number}")
        lengths.observe(asked, 100)
        lengths.of(asked)
    assert len(lengths.tables) == 20
    assert len(lengths._cache) <= 20
    assert "generation" in lengths.tables, "what all share is kept"
    assert "generation m 10.0.1.99" in lengths.tables
    assert "generation m 10.0.1.0" not in lengths.tables


def test_a_length_is_made_up_once_per_answer_not_per_question(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = taught([100])
    made: list[object] = []
    blend = lengths._blend

    def counted(names: Iterable[str]) -> module.Distribution:
        made.append(names)
        return blend(names)

    monkeypatch.setattr(lengths, "_blend", counted)
    for _ in range(5):
        lengths.of(ask())
        lengths.of(ask(max_tokens=10))
    assert len(made) == 1
    lengths.observe(ask(), 200)
    lengths.of(ask())
    assert len(made) == 2
