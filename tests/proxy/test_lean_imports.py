"""The proxy is started without mitmproxy's web framework, and nobody who wants all of mitmproxy misses it."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("program", "printed"),
    [
        ("import sys, proxy_addon.launcher; print(sorted({'flask', 'ldap3'} & sys.modules.keys()))", "[]"),
        (
            "import proxy_addon.launcher; from mitmproxy.addons import block; print(block.Block.__name__)",
            "Block",
        ),
        (
            "import proxy_addon.launcher; from mitmproxy.addons import default_addons\n"
            "print({'Core', 'ProxyAuth'} <= {type(each).__name__ for each in default_addons()})",
            "True",
        ),
        (
            "import proxy_addon.launcher, mitmproxy.addons as a; print(hasattr(a, 'nothing of the kind'))",
            "False",
        ),
    ],
    ids=["lean", "a module", "everything", "nothing"],
)
def test_what_is_imported(program: str, printed: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == (printed, "")
