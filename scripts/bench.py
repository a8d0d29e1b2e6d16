"""``make bench``: what SOLLOL costs, part by part. Run it on a quiet machine; it takes minutes.

What the proxy costs beside others is for ``make bench-proxy`` to say.
"""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PARTS = (
    ("its hooks for a small request", "-O", "bench_hooks.py"),
    ("a decision", "bench_decision.py"),
    ("the agent", "bench_agent.py"),
    ("the proxy's watch over 50 nodes", "bench_watch.py"),
)


def main() -> int:
    failed = []
    for title, *options, script in PARTS:
        print(f"== {title} ({script})", flush=True)
        if subprocess.run([sys.executable, *options, HERE / script], check=False).returncode:
            failed.append(script)
        print(flush=True)
    for script in failed:
        print(f"{script} failed", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
