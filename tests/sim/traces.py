"""The traces of the benchmark, each a pure function of its seed.

Lengths follow the Azure LLM inference trace of 2023 (Patel et al., "Splitwise", ISCA 2024): conversation has
prompts of 1,020 tokens in the median and 1,155 in the mean, answers of 129 and 211; code has prompts of 1,500
and 2,048, answers of 13 and 28. Both are drawn as lognormal with these two moments, cut to what models of
4,096 tokens take. Arrivals are a gamma renewal process with a coefficient of variation above 1, as Wang et
al. found for the chats of a campus ("BurstGPT", KDD 2025).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

from tests.fakes.store import FakeModel
from tests.fakes.tokens import expected_text
from tests.sim.hardware import (
    CODE_7B,
    EMBEDDER,
    GEMMA_2B,
    LLAMA_8B,
    LLAMA_13B,
    RTX_4090,
    SOLAR_11B,
    UNLIKE,
)
from tests.sim.trace import Arrival, Event, Trace

GAMMA_SHAPE = 0.5  #: of the gaps between arrivals: a coefficient of variation of 1.4
REQUESTS = 300
CHARACTERS = 4  #: a token, as the fakes count
WORDS = ("river", "stone", "amber", "market", "signal", "copper", "garden", "winter", "letter", "harbour")


@dataclass(frozen=True, slots=True)
class Lengths:
    """A lognormal distribution of tokens, by its median and mean."""

    median: float
    mean: float
    most: int

    def draw(self, random: Random) -> int:
        """Draw a length."""
        sigma = math.sqrt(2 * math.log(self.mean / self.median))
        return max(4, min(self.most, round(random.lognormvariate(math.log(self.median), sigma))))


@dataclass(frozen=True, slots=True)
class Client:
    """An application: what it asks in which words, how long its prompts and answers are."""

    name: str
    words: str
    prompt: Lengths
    answer: Lengths
    share: float = 1.0
    num_predict: int | None = None


CONVERSATION = Lengths(1020, 1155, 2800), Lengths(129, 211, 900)
CODE = Lengths(1500, 2048, 2800), Lengths(13, 28, 200)
CLIENTS = (
    Client("chat-a", "Let us talk about this:", *CONVERSATION, share=2),
    Client("chat-b", "I would like your opinion on the following.", *CONVERSATION, share=2, num_predict=512),
    Client("digest", "Summarize the following text:", Lengths(1020, 1155, 2800), Lengths(90, 110, 300)),
    Client("editor", "Complete the function below.", *CODE, share=2),
    Client("labels", "Classify this message as spam or not:", Lengths(200, 260, 900), Lengths(5, 6, 12)),
)


def filler(random: Random, tokens: int) -> str:
    """Return about ``tokens`` tokens of text."""
    length = tokens * CHARACTERS
    return " ".join(random.choices(WORDS, k=length // 6 + 1))[:length]


def arrival_times(random: Random, count: int, rate_per_s: float) -> list[float]:
    """Return when ``count`` requests arrive."""
    times, now_s = [], 0.0
    for _ in range(count):
        now_s += random.gammavariate(GAMMA_SHAPE, 1 / (GAMMA_SHAPE * rate_per_s))
        times.append(now_s)
    return times


def name_of(number: int) -> str:
    """Return a short id: it is a part of every token of the answer."""
    digits = "0123456789abcdefghijklmnopqrstuvwxyz"
    return (name_of(number // 36) if number >= 36 else "") + digits[number % 36]


def ask(
    random: Random, number: int, at_s: float, client: Client, model: FakeModel, system: str = ""
) -> Arrival:
    """Return a single question of ``client``."""
    prompt, answer = client.prompt.draw(random), client.answer.draw(random)
    tag = name_of(number)
    text = f"{client.words} {filler(random, prompt)} [[id:{tag}]][[n:{answer}]]"
    head = ({"role": "system", "content": system},) if system else ()
    tokens = answer if client.num_predict is None else min(answer, client.num_predict)
    return Arrival(
        tag,
        at_s,
        client.name,
        model.name,
        (*head, {"role": "user", "content": text}),
        output_tokens=tokens,
        num_predict=client.num_predict,
    )


def questions(
    random: Random,
    times: Sequence[float],
    models: Sequence[tuple[FakeModel, float]],
    clients: Sequence[Client] = CLIENTS,
) -> Iterator[Arrival]:
    """Yield a question at each of ``times``; clients and models by their shares."""
    held, shares = zip(*models, strict=True)
    for number, at_s in enumerate(times):
        client = random.choices(clients, [client.share for client in clients])[0]
        yield ask(random, number, at_s, client, random.choices(held, shares)[0])


def conversation(
    random: Random, number: int, at_s: float, model: FakeModel, client: Client, system: str, turns: int
) -> Iterator[Arrival]:
    """Yield the turns of a chat that grows: each has all that was said before."""
    said: list[dict[str, str]] = [{"role": "system", "content": system}]
    before = None
    for turn in range(turns):
        tag = f"{name_of(number)}.{name_of(turn)}"
        question = (client.prompt if turn == 0 else FOLLOW_UP).draw(random)
        answer = client.answer.draw(random)
        text = f"{client.words if turn == 0 else 'And'} {filler(random, question)} [[id:{tag}]][[n:{answer}]]"
        said.append({"role": "user", "content": text})
        yield Arrival(
            tag, at_s, f"{client.name}-{number}", model.name, tuple(said), output_tokens=answer, after=before
        )
        said.append({"role": "assistant", "content": expected_text(text)})
        at_s += random.lognormvariate(math.log(THINK_S), 0.6)
        before = tag


FOLLOW_UP = Lengths(40, 60, 200)
TURNS = 6
THINK_S = 9.0  #: from one turn's arrival to the next one's, in the median: reading, thinking, typing
CHATTER = Client("chatter", "Tell me about this:", Lengths(200, 300, 800), Lengths(80, 110, 250))


def _ordered(arrivals: Sequence[Arrival]) -> tuple[Arrival, ...]:
    return tuple(sorted(arrivals, key=lambda arrival: arrival.at_s))


# the traces

MIXED = ((GEMMA_2B, 0.35), (LLAMA_8B, 0.5), (LLAMA_13B, 0.15))
#: Requests a second: two thirds of the 4.6 that the six machines get done when all of it comes at once.
MIXED_RATE = 3.0


def mixed(seed: int) -> Trace:
    """Three models, five kinds of client, bursts."""
    random = Random(f"mixed {seed}")
    times = arrival_times(random, REQUESTS, MIXED_RATE)
    return Trace("mixed", seed, UNLIKE, tuple(questions(random, times, MIXED)))


def chats(seed: int) -> Trace:
    """Fifty conversations of six turns, two models."""
    random = Random(f"chats {seed}")
    systems = {model.name: filler(random, 400) for model in (GEMMA_2B, LLAMA_8B)}
    arrivals: list[Arrival] = []
    for number in range(REQUESTS // TURNS):
        model = random.choices((LLAMA_8B, GEMMA_2B), (0.7, 0.3))[0]
        start_s, system = random.uniform(0, 2 * THINK_S), systems[model.name]
        arrivals += conversation(random, number, start_s, model, CHATTER, system, TURNS)
    return Trace("chats", seed, UNLIKE, _ordered(arrivals))


AGENT = Client("agents", "Your task:", Lengths(250, 300, 800), Lengths(120, 150, 400))


def swarm(seed: int) -> Trace:
    """Fifty agents with one system prompt ask at once, amid other work."""
    random = Random(f"swarm {seed}")
    times = arrival_times(random, REQUESTS - 50, 0.8 * MIXED_RATE)
    arrivals = list(questions(random, times, MIXED))
    system, at_s = filler(random, 1200), 0.4 * times[-1]
    arrivals += [ask(random, 1296 + n, at_s + n * 1e-3, AGENT, LLAMA_8B, system) for n in range(50)]
    return Trace("swarm", seed, UNLIKE, _ordered(arrivals))


def embeddings(seed: int) -> Trace:
    """Batches of texts to embed beside chats."""
    random = Random(f"embeddings {seed}")
    times = arrival_times(random, REQUESTS, 1.4 * MIXED_RATE)
    arrivals = []
    for arrival in questions(random, times, MIXED):
        if random.random() < 0.4:
            texts = tuple(filler(random, random.randint(100, 500)) for _ in range(random.randint(4, 64)))
            arrival = Arrival(arrival.id, arrival.at_s, "indexer", EMBEDDER.name, texts=texts)
        arrivals.append(arrival)
    return Trace("embeddings", seed, UNLIKE, tuple(arrivals))


def swap(seed: int) -> Trace:
    """Five models, equally wanted, more than fit anywhere at once."""
    random = Random(f"swap {seed}")
    times = arrival_times(random, REQUESTS, 0.6 * MIXED_RATE)
    models = tuple((model, 1.0) for model in (GEMMA_2B, LLAMA_8B, CODE_7B, SOLAR_11B, LLAMA_13B))
    return Trace("swap", seed, UNLIKE, tuple(questions(random, times, models)))


def contexts(seed: int) -> Trace:
    """One model that is asked for at two contexts: either reloads the other's runner."""
    random = Random(f"contexts {seed}")
    times = arrival_times(random, REQUESTS, MIXED_RATE)
    arrivals = tuple(
        replace(arrival, options={"num_ctx": random.choice((4096, 8192))})
        for arrival in questions(random, times, ((LLAMA_8B, 1.0),))
    )
    return Trace("contexts", seed, UNLIKE, arrivals)


def _with(name: str, rate: float, *events: tuple[float, int, str, float]) -> Callable[[int], Trace]:
    """A trace of mixed work during which something befalls nodes, at shares of its duration."""

    def make(seed: int) -> Trace:
        random = Random(f"{name} {seed}")
        times = arrival_times(random, REQUESTS, rate * MIXED_RATE)
        arrivals = tuple(questions(random, times, MIXED))
        befalls = tuple(Event(share * times[-1], node, what, factor) for share, node, what, factor in events)  # type: ignore[arg-type]
        return Trace(name, seed, UNLIKE, arrivals, befalls)

    return make


def saturation(name: str, nodes: int) -> Callable[[int], Trace]:
    """All of the work at once, on equal nodes: how long it takes shows how much of each is used."""

    def make(seed: int) -> Trace:
        random = Random(f"saturation {seed}")
        client = Client("batch", "Work on this:", Lengths(400, 450, 900), Lengths(100, 110, 250))
        arrivals = [ask(random, n, n * 1e-3, client, LLAMA_8B) for n in range(REQUESTS)]
        kinds = (replace(RTX_4090, parallel=1),) * nodes
        return Trace(name, seed, kinds, tuple(arrivals), equal=True, warm=(LLAMA_8B,))

    return make


TRACES: dict[str, Callable[[int], Trace]] = {
    "mixed": mixed,
    "chats": chats,
    "swarm": swarm,
    "embeddings": embeddings,
    "swap": swap,
    "contexts": contexts,
    "slow_node": _with("slow_node", 0.75, (0.3, 0, "slow", 5.0), (0.7, 0, "recover", 1.0)),
    "fail_fast": _with("fail_fast", 0.75, (0.3, 1, "fail_fast", 1.0), (0.7, 1, "recover", 1.0)),
    "silent_cpu": _with("silent_cpu", 0.75, (0.3, 1, "lose_gpu", 1.0), (0.8, 1, "recover", 1.0)),
    "late_join": _with("late_join", 0.75, (0.4, 0, "join", 1.0)),
    "equal10": saturation("equal10", 10),
    "equal1": saturation("equal1", 1),
}
