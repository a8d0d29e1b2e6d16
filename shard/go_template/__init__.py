"""Go's ``text/template``, as far as the templates of Ollama's models use it.

:func:`parse` reads a template, :func:`render` fills it in. What this engine does not know is refused when
the template is read, never half-way through a prompt, so that a model's way to its prompt is decided once.
Checked against Go's own engine on the templates and the odd corners in ``tests/shard``.
"""

from __future__ import annotations

from shard.go_template.evaluator import TemplateError, render
from shard.go_template.lexer import Unsupported
from shard.go_template.nodes import Tree
from shard.go_template.parser import parse
from shard.go_template.values import JsonList, JsonMap, Record, go_json

__all__ = [
    "JsonList",
    "JsonMap",
    "Record",
    "TemplateError",
    "Tree",
    "Unsupported",
    "go_json",
    "parse",
    "render",
]
