"""For people who have mitmproxy already: ``mitmdump -s …/proxy_addon/addon.py``.

    mitmdump --mode reverse:http://sollol.invalid:11434@127.0.0.1:11434 -s proxy_addon/addon.py \
        --set sollol=nodes=10.0.0.2:11434,10.0.0.3:11434

Settings come from ``sollol.yaml``, ``SOLLOL_*`` variables and ``--set sollol=KEY=VALUE`` (repeatable), as for
``sollol proxy``. The lean launcher is several times cheaper per request (docs/performance.md); this is the
same chain among mitmproxy's own addons.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from mitmproxy import ctx, exceptions
from mitmproxy.addonmanager import Loader

from proxy_addon.chain import Sollol
from proxy_addon.settings import SettingsError
from proxy_addon.settings import load as load_settings  # not "load": mitmproxy would take that for a hook


class Script:
    """Builds the chain once mitmproxy knows its options."""

    def __init__(self) -> None:
        self.addons: list[object] = []

    def load(self, loader: Loader) -> None:
        """Declare the option through which settings come."""
        loader.add_option("sollol", Sequence[str], [], "A setting of SOLLOL, KEY=VALUE; may be repeated.")

    def configure(self, updated: set[str]) -> None:
        """Read the settings; a mistake stops mitmproxy with its sentence."""
        if self.addons:
            if "sollol" in updated:
                raise exceptions.OptionsError("SOLLOL's settings are read once, when mitmproxy starts")
            return
        try:
            settings = load_settings(None, os.environ, ctx.options.sollol)
        except SettingsError as mistake:
            raise exceptions.OptionsError(str(mistake)) from mistake
        chain = Sollol(settings)
        self.addons.append(chain)
        ctx.master.addons.register(chain)


addons = [Script()]
