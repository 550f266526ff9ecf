"""The files of an evaluation: a JSON file, the adversarial images and a figure."""

import dataclasses
import json
import math
import platform
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustkern._text import plain
from robustkern._version import __version__
from robustkern.training.figures import COLORS, accuracy_band, eps_text, error_bars, new_figure, plain_axes, save_png
from robustkern.training.files import write_atomically
from robustkern.training.weights import read_tensors, write_tensors

from .results import Report
from .suite import recheck

FILES = ("evaluation.json", "adversaries.safetensors", "evaluation.png")
_IDENTITY = "evaluation"  # a key in the metadata of the adversarial images


def write_report(report: Report, model: nn.Module, out: Path, source: dict[str, Any]) -> None:
    """Write `adversaries.safetensors`, `evaluation.json` and `evaluation.png` into a folder, each atomically.

    The images are read back, measured and evaluated once more before the accuracies are written down; the outcome is
    one of the report's checks. Both files carry the report's identity.

    Args:
        report: What was found.
        model: The model it was found on.
        out: The folder; made if missing.
        source: What was evaluated, for the JSON file: path, data set and so on.
    """
    out.mkdir(parents=True, exist_ok=True)
    _write_adversaries(report, out)
    stored, metadata = read_tensors(out / FILES[1])
    if report.clean.right:
        report.checks.append(recheck(report, model, stored, metadata.get(_IDENTITY, "")))
    _write_json(out, to_dict(report, source))
    figure(out / FILES[2], report)  # last: trouble with a picture must not cost the numbers


def write_partial(report: Report, out: Path, source: dict[str, Any]) -> None:
    """Write what there is after some of the attacks: `adversaries.safetensors`, and `evaluation.json` without checks.

    Args:
        report: What was found so far.
        out: The folder.
        source: As for `write_report`.
    """
    _write_adversaries(report, out)
    _write_json(out, {**to_dict(report, source), "finished": False, "sound": None})


def _write_adversaries(report: Report, out: Path) -> None:
    tensors = {"clean": report.x, "labels": report.y, **report.adversaries}
    write_tensors(out / FILES[1], tensors, {_IDENTITY: report.identity})


def _write_json(out: Path, values: dict[str, Any]) -> None:
    write_atomically(out / FILES[0], json.dumps(_finite(values), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """The value, with None for numbers that JSON lacks: a model's NaN must not cost the other numbers."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_dict(report: Report, source: dict[str, Any]) -> dict[str, Any]:
    """All figures of a report, and where they come from, in JSON's types."""
    return {
        "identity": report.identity,
        "finished": True,
        "source": source,
        "robustkern": __version__,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "settings": dataclasses.asdict(report.settings),
        "samples": {"first": 0, "count": len(report.y)},
        "confidence": 0.95,
        "clean": report.clean.to_dict(),
        "attacks": [accuracy.to_dict() for accuracy in report.attacks],
        "worst": None if report.worst is None else report.worst.to_dict(),
        "per_class": report.per_class,
        "curve": report.curve,
        "steepness": report.steepness,
        "checks": [dataclasses.asdict(check) for check in report.checks],
        "unchecked": report.unchecked or None,
        "sound": report.sound,
    }


def figure(path: Path, report: Report) -> None:
    """Accuracy against the radius, and of each class that occurs, with Wilson intervals.

    Args:
        path: Where the PNG goes.
        report: What was found.
    """
    picture, ((curve, classes),) = new_figure(1, 2, 10.5, 3.6)
    accuracy_band(curve, report.curve, COLORS[1], alpha=0.18, markersize=4)
    worst = report.worst
    if worst is not None:
        ends = error_bars([worst.to_dict()], "accuracy", 100)
        at = report.settings.eps
        curve.errorbar([at], [100 * worst.value], yerr=ends, color=COLORS[2], fmt="s", capsize=3)
        curve.annotate(
            "worst case over all attacks", (at, 100 * worst.value), xytext=(-8, -12), ha="right",
            textcoords="offset points", fontsize=8, color=COLORS[2],
        )  # fmt: skip
    curve.set_xlabel(f"radius of the {'ℓ∞' if report.settings.norm == 'linf' else 'ℓ2'} ball")
    curve.set_ylabel("accuracy (%)")
    curve.set_title("under PGD-20", fontsize=10)
    rows = report.with_images[:20]
    places = list(range(len(rows)))
    classes.bar([p - 0.2 for p in places], [100 * r["clean"]["accuracy"] for r in rows], 0.4, color="#b9c4cc",
                label="clean")  # fmt: skip
    if worst is not None:
        heights = [100 * r["worst"]["accuracy"] for r in rows]
        errors = error_bars([row["worst"] for row in rows], "accuracy", 100)
        classes.bar([p + 0.2 for p in places], heights, 0.4, color=COLORS[2], label="worst case", yerr=errors,
                    error_kw={"linewidth": 0.8, "ecolor": "#5f2417"})  # fmt: skip
    names = [plain(row["class"]) for row in rows]
    long = max(map(len, names)) > 2
    classes.set_xticks(places, names, rotation=40 if long else 0, ha="right" if long else "center", fontsize=8)
    classes.set_title(f"by class, ε = {eps_text(report.settings.eps)}", fontsize=10)
    classes.legend(
        frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.3 if long else -0.12), ncols=2
    )
    for axes in (curve, classes):
        axes.set_ylim(0, 102)
        plain_axes(axes, "both" if axes is curve else "y")
    save_png(path, picture)


def export_state_dict(model: nn.Module, path: Path) -> None:
    """Write weights as RobustBench's loaders read them: `torch.load(path)["state_dict"]`, nothing but tensors.

    The names are those of the model's own `state_dict`, its normalisation included, so that inputs stay in [0, 1].

    Args:
        model: The model.
        path: The file, written atomically.
    """
    state = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    write_atomically(path, partial(torch.save, {"state_dict": state}))
