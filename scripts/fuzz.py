"""Feed the targets of ``tests/fuzz/targets.py`` with what reaches new code, for a given time (``make fuzz``).

What is kept in ``tests/fuzz/corpus/TARGET`` is where it begins; what it finds worth keeping is written to
``.fuzz/TARGET``. An input that breaks a target is left in ``.fuzz/crash-TARGET-…``: put it into the corpus,
where ``tests/fuzz/test_corpus.py`` feeds it to the target from then on.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parent.parent
CORPUS = ROOT / "tests" / "fuzz" / "corpus"
FOUND = ROOT / ".fuzz"
LONGEST_BYTES = 512
#: Whose branches guide the search: ours, and those that ours must agree with.
GUIDED_BY = ["proxy_addon.lane", "tests.fuzz.targets", "h11", "mitmproxy.net.http"]


def fuzz(target: str, seconds: int) -> None:
    """Run ``target`` in this process, which libFuzzer ends."""
    with atheris.instrument_imports(include=GUIDED_BY):
        from tests.fuzz.targets import TARGETS
    found = FOUND / target
    found.mkdir(parents=True, exist_ok=True)
    options = [
        *(f"-max_total_time={seconds}", f"-max_len={LONGEST_BYTES}", "-timeout=10", "-rss_limit_mb=1024"),
        *(f"-artifact_prefix={FOUND}/crash-{target}-", "-verbosity=0", "-print_final_stats=1"),
    ]
    dictionary = CORPUS / f"{target}.dict"
    if dictionary.exists():
        options.append(f"-dict={dictionary}")
    atheris.Setup([sys.argv[0], *options, str(found), str(CORPUS / target)], TARGETS[target])
    atheris.Fuzz()


def main() -> int:
    """Fuzz one target, or one after the other. Returns 1 if something was found."""
    names = sorted(path.name for path in CORPUS.iterdir() if path.is_dir())
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=names, help="one alone; without it each has its share")
    parser.add_argument("--seconds", type=int, default=60, help="how long, all together (%(default)s)")
    asked = parser.parse_args()
    if asked.target:
        fuzz(asked.target, asked.seconds)
    share = max(asked.seconds // len(names), 1)
    ended = [
        subprocess.run([sys.executable, __file__, "--target", name, "--seconds", str(share)]).returncode
        for name in names
    ]
    return int(any(ended))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
