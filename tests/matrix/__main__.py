"""``python -m tests.matrix``: print the summary of the fault matrix and renew it in ``docs/failover.md``."""

from __future__ import annotations

from tests.matrix.summary import DOC, lines, renewed

if __name__ == "__main__":
    print("\n".join(lines()))
    DOC.write_text(renewed(DOC.read_text("utf-8")), "utf-8")
