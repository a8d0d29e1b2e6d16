"""What the documents promise: settings as they are, an example that loads, links that lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from proxy_addon.settings import Settings, load
from scripts import settings_doc

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "deploy" / "sollol.yaml"
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)")


#: A setting that is commented out, as opposed to a sentence.
COMMENTED_OUT = re.compile(r"^( *)# ( *[a-z_0-9]+:(?: |$))", re.MULTILINE)


def test_the_table_of_settings_is_up_to_date() -> None:
    text = settings_doc.DOC.read_text("utf-8")
    assert settings_doc.renewed(text) == text, "run: python scripts/settings_doc.py"


def test_the_example_loads() -> None:
    settings = load(EXAMPLE, {})
    assert [str(node) for node in settings.nodes] == ["10.0.0.2:11434", "gpu-box.lan:11434", "10.0.0.4:11434"]
    assert (settings.nodes[2].parallel, settings.modes) == (4, ("regular@127.0.0.1:8080",))


def test_what_the_example_comments_out_are_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "all.yaml"
    path.write_text(COMMENTED_OUT.sub(r"\1\2", EXAMPLE.read_text("utf-8")), "utf-8")
    whole, default = load(path, {}), Settings()
    assert {"discovery", "placement", "timeouts", "retry", "poll"} <= whole.model_fields_set
    for name in ("discovery", "placement", "timeouts", "retry", "poll", "pull", "admission"):
        assert getattr(whole, name) == getattr(default, name)
        assert name == "placement" or getattr(whole, name).model_fields_set == set(
            getattr(whole, name).model_dump()
        )
    for name in ("hosts", "body_limit_bytes", "buffered_bytes", "any_11434"):
        assert getattr(whole.guard, name) == getattr(default.guard, name)


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name
)
def test_links_lead_somewhere(path: Path) -> None:
    links = LINK.findall(path.read_text("utf-8"))
    assert [link for link in links if not (path.parent / link).exists()] == []
