"""The front page is short, and what the documents say in Python runs, a page from top to bottom in one namespace."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import robustkern as rk
from robustkern import models

ROOT = Path(__file__).parents[1]
PAGES = [p for p in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if "```python" in p.read_text()]


def test_the_front_page_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) <= 8192
    assert "make demo" in text and "make test" in text and text.count("\n![") == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_on_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": models.create("small-cnn", 10, (1, 28, 28)).state_dict()}, "weights.pt")
    text = page.read_text()
    namespace: dict[str, object] = {"__name__": "__main__"}
    try:
        for fence in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            line = text.count("\n", 0, fence.start(1))
            exec(compile("\n" * line + fence[1], str(page), "exec"), namespace)
    finally:
        rk.uninstall()


MESSAGES = re.findall(
    r"^\| `(.+?)` \|", (ROOT / "docs" / "install.md").read_text().partition("## When")[2], re.MULTILINE
)


@pytest.mark.parametrize("message", [message for message in MESSAGES if " " in message])
def test_what_an_installation_says_is_quoted_word_for_word(message):
    """A message is put together from pieces, whose words the sources hold in this order."""
    files = ("setup.py", "Makefile", "robustkern/_library.py", "robustkern/double_backward.py")
    written = " ".join(re.sub(r'"\s*\n\s*f?"', "", (ROOT / name).read_text()) for name in files)
    parts = [part for part in re.split(r"…|_aten|_cuda|_C\b", message) if part.strip(" .")]
    words = "[^\n]*?".join(re.escape(part.strip()) for part in parts)
    assert re.search(words, written), message
