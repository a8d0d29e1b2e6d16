"""Importing this lets modules of ``mitmproxy.addons`` be imported without all the others of the package.

mitmproxy's forty addons bring a web framework, an LDAP client and more: 13 MB and half a second that a proxy
has no use for. Whoever asks the package for something else than a module, as ``mitmdump`` does, gets it all.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

NAME = "mitmproxy.addons"


class _Lean(ModuleType):
    """The package without its contents, until somebody asks for these."""

    def __getattr__(self, name: str) -> Any:
        spec = self.__spec__
        if name.startswith("__") or spec is None or spec.loader is None:
            raise AttributeError(name)
        if find_spec(f"{NAME}.{name}") is not None:
            return import_module(f"{NAME}.{name}")
        self.__class__ = ModuleType  # type: ignore[assignment]
        spec.loader.exec_module(self)
        return getattr(self, name)


def _lighten(spec: ModuleSpec) -> None:
    package = module_from_spec(spec)
    package.__class__ = _Lean
    sys.modules[NAME] = package
    import_module("mitmproxy").addons = package  # type: ignore[attr-defined]


if NAME not in sys.modules and (_spec := find_spec(NAME)) is not None:
    _lighten(_spec)
