"""Error, time and memory of one penalised step, exact and by finite differences: python -m benchmarks.bench_precision.

A step is forward, cross-entropy, the squared L2 norm of the input gradient and backward to the parameters, in float32
and under bfloat16 autocast.  The error is that of the step's gradient against stock PyTorch's in float64, all
parameters in one vector; time and peak memory are multiples of the plain step's in the same precision.  Finite
differences take six passes and hold one graph at a time; of the lengths h tried the one with the least error counts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import harness
from .markdown import sentence, table, times
from .step_cases import FINITE_DIFFERENCES, INSTALLED, PLAIN, STOCK, Case, Gradients, Spec, exact, flat

Row = dict[str, Any]

# Mean length of a sample's step in pixels' units: from below what bfloat16 resolves to the size of an attack.
LENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
TITLES = {STOCK: "stock double backward", FINITE_DIFFERENCES: "finite differences", INSTALLED: "robustkern.install()"}
_NETWORKS: dict[str, tuple[int, tuple[int, int, int], tuple[str, ...]]] = {
    "tiny": (4, (3, 8, 8), ("tiny ConvNeXt", "tiny PreAct-ResNet, GroupNorm")),
    "full": (
        16,
        (3, 32, 32),
        (
            "PreAct-ResNet-18 of width 32, BatchNorm",
            "PreAct-ResNet-18 of width 32, GroupNorm",
            "conv-BatchNorm-ReLU of PyTorch issue 3076",
            "ConvNeXt blocks",
            "ViT",
        ),
    ),
}


def finite_differences(case: Case, length: float) -> Gradients:
    """The step's gradient with the penalty's part as a difference of two plain gradients.

    The gradient in the parameters of <g, v>, with v the penalty's derivative in the input gradient g, is
    (G(x + h v) - G(x)) / h up to O(h), where G is the gradient of the loss.
    """
    x = case.x
    before = torch.autograd.grad(_loss(case, x), (x, *case.parameters))
    v = 2 * before[0] * len(x)  # of each sample's loss, of which the batch has the mean
    h = length / float(torch.linalg.vector_norm(v.flatten(1), dim=1).mean())
    after = torch.autograd.grad(_loss(case, x.detach() + h * v), case.parameters)
    share = case.weight / h
    return tuple(a * share + b * (1 - share) for a, b in zip(after, before[1:], strict=True))


def _loss(case: Case, x: Tensor) -> Tensor:
    with torch.autocast(case.device, torch.bfloat16, enabled=case.spec.autocast):
        return F.cross_entropy(case.model(x), case.y)


def measure(size: str, seconds: float, clock: Callable[[], float]) -> list[Row]:
    """A row for each network, precision and way of taking the step."""
    interleaved, rows = harness.Interleaved("cpu", clock), []
    batch, shape, models = _NETWORKS[size]
    for model in models:
        truth = exact(Spec(model, batch, shape), "cpu", STOCK)
        for autocast in (False, True):
            case = Case(Spec(model, batch, shape, autocast=autocast), "cpu")

            def error(gradients: Gradients, truth: Tensor = truth) -> float:
                return float((flat(gradients).double() - truth).norm() / truth.norm())

            errors = {length: error(finite_differences(case, length)) for length in LENGTHS}
            best = min(LENGTHS, key=errors.__getitem__)
            steps: dict[str, Callable[[], Gradients]] = {name: case.step(name) for name in (PLAIN, STOCK, INSTALLED)}
            steps[FINITE_DIFFERENCES] = partial(finite_differences, case, best)
            timings = interleaved(steps, seconds=seconds, least=5)
            peaks = {name: harness.peak_memory(step, "cpu") for name, step in steps.items()}
            for name in TITLES:
                timing = timings[name]
                low, middle, high = timing.over_quartiles(timings[PLAIN])
                row = {
                    "network": model,
                    "batch": [batch, *shape],
                    "precision": "bfloat16" if autocast else "float32",
                    "provider": name,
                    "ms": round(timing.ms, 3),
                    "rounds": timing.rounds,
                    "ratio": round(middle, 3),
                    "interval": [round(low, 3), round(high, 3)],
                    "peak": round(peaks[name] / peaks[PLAIN], 3),
                    "error": float(f"{errors[best] if name == FINITE_DIFFERENCES else error(steps[name]()):.2g}"),
                }
                if name == FINITE_DIFFERENCES:
                    row["errors"] = {str(length): float(f"{value:.2g}") for length, value in errors.items()}
                rows.append(row)
                print(
                    f"{row['network']}, {row['precision']}, {TITLES[name]}: {row['ratio']:.2f}x, "
                    f"memory {row['peak']:.2f}x, error {row['error']:.1e}",
                    flush=True,
                )
    return rows


def document(results: Row) -> str:
    """The table of a results file."""
    section = results["precision"]
    header = [
        "",
        "time",
        "interval",
        "peak memory",
        "error of the gradient",
        *(f"h = {length:g}" for length in LENGTHS),
    ]
    lines = []
    for row in section["rows"]:
        swept = [f"{row['errors'][str(h)]:.1e}" for h in LENGTHS] if "errors" in row else [""] * len(LENGTHS)
        name = f"{row['network']}, {row['precision']}, {TITLES[row['provider']]}"
        cells = [times(row["ratio"]), _interval(row), times(row["peak"]), f"{row['error']:.1e}", *swept]
        lines.append([name, *cells])
    return f"{_sentence(section)}\n\n{table(header, lines)}"


def front(results: Row) -> str:
    """The table of the front page: a row for each network, in float32."""
    section = results["precision"]
    rows = {(row["network"], row["precision"], row["provider"]): row for row in section["rows"]}
    networks = dict.fromkeys(network for network, _, _ in rows)
    header = ["", *TITLES.values(), "memory: stock", "differences", "robustkern"]
    lines = []
    for network in networks:
        found = [rows[network, "float32", provider] for provider in TITLES]
        spans = [f"{times(row['ratio'])} ({_interval(row)})" for row in found]
        lines.append([network, *spans, *(times(row["peak"]) for row in found)])
    return f"{_sentence(section)}\n\n{table(header, lines)}"


def _interval(row: Row) -> str:
    return "{:.2f} to {:.2f}".format(*row["interval"])


def _sentence(section: Row) -> str:
    batch = "x".join(map(str, section["rows"][0]["batch"]))
    clock = {"process": "processor time", "wall": "wall time"}[section["stamp"]["clock"]]
    return f"{sentence(section)} Batches of {batch}, {clock}."


_COLOURS = {STOCK: "#6b7785", FINITE_DIFFERENCES: "#c0781f", INSTALLED: "#1f6f8b"}
_MARKERS = "os^Dv"
_INK = "#333333"


def digest(section: Row) -> str:
    """A hash of what the picture shows, stored in it, so that a stale picture can be recognised."""
    keys = ("network", "precision", "provider", "ratio", "peak", "error")
    shown = [[row[key] for key in keys] for row in section["rows"]]
    return hashlib.sha256(json.dumps([shown, _COLOURS, _MARKERS]).encode()).hexdigest()[:16]


def is_current(path: Path, section: Row) -> bool:
    """Whether the picture was drawn from these figures."""
    if not path.exists():
        return False
    from PIL import Image

    with Image.open(path) as image:
        return image.info.get("Comment") == digest(section)


def draw(section: Row, title: str) -> bytes:
    """A PNG: error over time, and over peak memory; filled in float32, hollow in bfloat16."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    networks = list(dict.fromkeys(row["network"] for row in section["rows"]))
    figure, both = pyplot.subplots(1, 2, figsize=(10, 5), sharey=True, layout="constrained")
    for axes, key, label in zip(both, ("ratio", "peak"), ("time", "peak memory")):
        for row in section["rows"]:
            style = _style(row["provider"], row["precision"], _MARKERS[networks.index(row["network"])])
            axes.plot(row[key], row["error"], **style)
        axes.set_yscale("log")
        axes.set_xlabel(f"{label}, as a multiple of the plain step", fontsize=11)
        axes.grid(color="#e4e7ea", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    both[0].set_ylabel("relative error of the step's gradient", fontsize=11)
    figure.legend(handles=_legend(networks), loc="outside upper left", ncols=2, frameon=False, fontsize=10)
    figure.supxlabel(title, fontsize=7, color="#555555")
    buffer = BytesIO()
    # Software is matplotlib's version by default: the picture would change with it alone.
    figure.savefig(buffer, format="png", dpi=150, metadata={"Comment": digest(section), "Software": None})
    pyplot.close(figure)
    return buffer.getvalue()


def _style(provider: str | None, precision: str, marker: str) -> Row:
    colour = _COLOURS[provider] if provider else _INK
    face = "white" if precision == "bfloat16" else colour
    return {"marker": marker, "ls": "", "color": colour, "markerfacecolor": face, "ms": 9, "mew": 1.8, "alpha": 0.9}


def _legend(networks: list[str]) -> list[Any]:
    from matplotlib.lines import Line2D

    entries = [(TITLES[name], _style(name, "float32", "s")) for name in _COLOURS]
    entries += [(precision, _style(None, precision, "s")) for precision in ("float32", "bfloat16")]
    entries += [(network, _style(None, "float32", marker)) for marker, network in zip(_MARKERS, networks)]
    return [Line2D([], [], label=label, **style) for label, style in entries]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu",))
    parser.add_argument("--size", default="full", choices=("tiny", "full"))
    parser.add_argument("--seconds", type=float, default=5.0, help="roughly, for each network and precision")
    parser.add_argument(
        "--clock", default="wall", choices=("wall", "process"), help="process: on a machine that is shared"
    )
    parser.add_argument("--out", type=Path, help="results file; by default named after the device, none if tiny")
    options = parser.parse_args(arguments)
    out = options.out or (harness.results_path("cpu") if options.size == "full" else None)
    kept = harness.keep_pages()
    clock = time.process_time if options.clock == "process" else time.perf_counter
    stamp = {**harness.stamp("cpu"), "pages_kept": kept, "clock": options.clock}
    rows = measure(options.size, options.seconds, clock)
    if out is not None:
        harness.write_section(out, "precision", {"stamp": stamp, "complete": True, "rows": rows})
        print(f"written to {out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
