"""Hosts in network namespaces, with delays, rates, CPU limits and cuts: see ``lab.py``."""

import pytest

from tests.lab.lab import Host, Lab
from tests.lab.netns import LabError, missing

__all__ = ["Host", "Lab", "LabError", "needs_lab"]

#: Marks tests that build a lab: run as root they are never skipped.
needs_lab = pytest.mark.skipif(missing() is not None, reason=missing() or "")
