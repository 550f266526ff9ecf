"""What the documents say in Python runs, a page from top to bottom in one namespace."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import robustkern as rk
from robustkern import models

ROOT = Path(__file__).parents[1]
PAGES = [p for p in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if "```python" in p.read_text()]


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
