"""Tables and sentences of rendered results."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def table(header: list[str], lines: list[list[str]]) -> str:
    numbers = ["---" if i == 0 else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, numbers, *lines))


def times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x" if value < 9.95 else f"{value:.0f}x"


def sentence(section: Row) -> str:
    """Where and when a section was measured."""
    s = section["stamp"]
    commits = dict.fromkeys(row.get("commit", s["commit"]) for row in section.get("rows", ())) or [s["commit"]]
    cuda = f", CUDA {s['cuda']}, driver {s['driver']}" if "cuda" in s else ""
    incomplete = "" if section["complete"] else " The run was stopped before all cases were measured."
    commit = f"commit{'s' * (len(commits) > 1)} {', '.join(commits)}"
    return f"{s['device']}, PyTorch {s['torch']}{cuda}, {commit}, {s['date'][:10]}.{incomplete}"
