"""The study's figures, each a function of models and data or of measured numbers, each one PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustkern.attacks import PGD
from robustkern.data import Dataset
from robustkern.training.evaluation import device_of
from robustkern.training.figures import (
    COLORS,
    accuracy_band,
    eps_text,
    error_bars,
    new_figure,
    one_of_each,
    plain_axes,
    save_png,
)

from .inversion import invert, noise, seeded_grid
from .measures import PROPORTIONS

_DPI = 110


def inversion_grids(
    path: Path,
    data: Dataset,
    networks: Mapping[str, nn.Module],
    *,
    steps: int = 16,
    step: float = 0.1,
    columns: int = 4,
) -> None:
    """For each network a grid: rows are images, one of each class; columns are the class that each is turned into.

    On the diagonal an image is driven further towards its own class. Images are shown as they are, in [0, 1].

    Args:
        path: Where the PNG goes.
        data: Images to start from.
        networks: Networks by name.
        steps: Steps of the inversion.
        step: Their length, in standard deviations of each channel.
        columns: Grids side by side.
    """
    x, _ = one_of_each(data)
    starts, targets = seeded_grid(x, data.num_classes)
    scale = torch.tensor(data.statistics()[1]).view(-1, 1, 1)
    grids = {
        name: _mosaic(_inverted(network, starts, targets, steps, step * scale), data.num_classes)
        for name, network in networks.items()
    }
    title = "inversions: row = the image begun with, column = the class it is driven to"
    _panels(path, grids, columns, f"{title} ({steps} steps of {step:.3g} σ)\n{_classes(data)}")


def noise_grids(
    path: Path,
    data: Dataset,
    networks: Mapping[str, nn.Module],
    *,
    steps: int = 1024,
    step: float = 2 / 255,
    rows: int = 2,
    made: Mapping[str, Tensor] | None = None,
) -> None:
    """For each network a strip: images made from noise for every class, one class a column.

    Args:
        path: Where the PNG goes.
        data: Gives shapes, classes and standard deviations.
        networks: Networks by name.
        steps: Steps of the inversion.
        step: Their length, in standard deviations of each channel.
        rows: Starts for each class.
        made: Images that exist already, by the name of their network, [rows * classes, C, H, W].
    """
    std = data.statistics()[1]
    scale = torch.tensor(std).view(-1, 1, 1)
    start = noise(rows * data.num_classes, data.in_shape, spread=sum(std) / len(std))
    targets = torch.arange(len(start)) % data.num_classes
    strips = {}
    for name, network in networks.items():
        images = (made or {}).get(name)
        if images is None:
            images = _inverted(network, start, targets, steps, step * scale)
        strips[name] = _mosaic(images, data.num_classes)
    _panels(path, strips, 2, f"from noise, one class a column ({steps} steps of {step:.3g} σ)\n{_classes(data)}")


def perturbations(
    path: Path, data: Dataset, networks: Mapping[str, nn.Module], eps: float, *, targeted: bool = False
) -> None:
    """The same images, attacked with a radius so large that the change can be seen: a row for each network.

    Args:
        path: Where the PNG goes.
        data: Images to choose from.
        networks: Networks by name.
        eps: Radius (Linf), several times what they were trained for.
        targeted: Whether to attack towards the next class instead of away from its own.
    """
    x, y = one_of_each(data, list(networks.values()))
    rows = {"image": _mosaic(x, len(x))}
    for name, network in networks.items():
        device = device_of(network)
        goal = (y + 1) % data.num_classes if targeted else y
        attack = PGD(min(eps, 1.0), steps=40, random_start=False, targeted=targeted)
        rows[name] = _mosaic(attack(network, x.to(device), goal.to(device)).cpu(), len(x))
    _panels(path, rows, 2, f"attacked with ε = {eps_text(eps)}\n{_classes(data)}")


def accuracy_curves(path: Path, curves: Mapping[str, Sequence[Mapping[str, float]]], title: str = "") -> None:
    """Accuracy against the radius, a line for each network, with its interval.

    Args:
        path: Where the PNG goes.
        curves: For each network, points of eps, accuracy, low, high.
        title: Title above the figure.
    """
    figure, (axes,) = _figure(1)
    for number, (name, points) in enumerate(curves.items()):
        color, style = f"C{number % 10}", ("-", "--", ":")[number // 10 % 3]
        label = f" {name}" if name.startswith("_") else name
        accuracy_band(axes, points, color, alpha=0.12, linestyle=style, markersize=3, label=label)
    axes.set_xlabel("radius of the ℓ∞ ball")
    axes.set_ylabel("accuracy under PGD-20 (%)")
    axes.set_ylim(0, 102)
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))  # many networks
    save_png(path, figure, _DPI)


def term_panels(
    path: Path, terms: Mapping[str, Sequence[Mapping[str, Any]]], captions: Mapping[str, str] | None = None
) -> None:
    """Orientation and smoothness against the epoch, a panel for each network.

    Args:
        path: Where the PNG goes.
        terms: For each network, rows of metrics.
        captions: For each network, what its smoothness term is.
    """
    from matplotlib.ticker import MaxNLocator

    figure, panels = _figure(len(terms))
    figure.supxlabel("epoch", fontsize=9)
    figure.suptitle("orientation (left axis, blue) and smoothness (right axis, red)", fontsize=10)
    for axes, (name, rows) in zip(panels, terms.items()):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        epochs = [row["epoch"] for row in rows]
        axes.plot(epochs, [row["orientation"] for row in rows], color=COLORS[1])
        axes.tick_params(axis="y", colors=COLORS[1], labelsize=7)
        axes.set_ylim(bottom=0)
        other = axes.twinx()
        other.plot(epochs, [row["smoothness"] for row in rows], color=COLORS[2])
        other.tick_params(axis="y", colors=COLORS[2], labelsize=7)
        other.set_ylim(bottom=min(0.0, *(row["smoothness"] or 0.0 for row in rows)))
        other.spines["top"].set_visible(False)
        caption = (captions or {}).get(name)
        axes.set_title(name + (f"\nsmoothness: {caption}" if caption else ""), fontsize=8)
    save_png(path, figure, _DPI)


def against_smoothness(
    path: Path, points: Sequence[Mapping[str, Any]], measures: Mapping[str, str], *, smoothness: str, label: str
) -> None:
    """Measures against smoothness: a panel for each, points joined in the order of their weight.

    Args:
        path: Where the PNG goes.
        points: Each with `line` (whose points are joined), `text`, and for every measure and `smoothness` a mapping of
            value, low and high.
        measures: Names of the panels' measures, and their titles.
        smoothness: The measure on the horizontal axis, logarithmic; less is smoother, so it runs from right to left.
        label: Its title.
    """
    from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter

    figure, panels = _figure(len(measures))
    for axes, (measure, title) in zip(panels, measures.items()):
        for color, line in zip(COLORS, dict.fromkeys(point["line"] for point in points)):
            own = [point for point in points if point["line"] == line]
            at = [point[smoothness]["value"] for point in own]
            values = [point[measure]["value"] for point in own]
            errors = error_bars([point[measure] for point in own])
            axes.errorbar(at, values, yerr=errors, color=color, marker="o", markersize=4, capsize=2, linewidth=1.2,
                          linestyle="-" if len(own) > 1 else "", label=line)  # fmt: skip
            for point, where, value in zip(own, at, values, strict=True):
                axes.annotate(point["text"], (where, value), xytext=(3, 3), textcoords="offset points", fontsize=6)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.invert_xaxis()
        axes.set_xlabel(label + "  (smoother →)", fontsize=8)
        axes.set_title(title, fontsize=9)
        if measure in PROPORTIONS:
            axes.set_ylim(0, 1)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    panels[0].legend(frameon=False, fontsize=7)
    save_png(path, figure, _DPI)


def two_by_two(path: Path, cells: Mapping[tuple[bool, bool], Mapping[str, Mapping[str, float]]],
               measures: Mapping[str, str]) -> None:  # fmt: skip
    """Orientation with and without smoothness, smoothness with and without orientation: a panel for each measure.

    Args:
        path: Where the PNG goes.
        cells: By (oriented, smooth): for each measure value, low and high.
        measures: Names of the panels' measures, and their titles.
    """
    figure, panels = _figure(len(measures))
    for axes, (measure, title) in zip(panels, measures.items()):
        for place, smooth in ((-0.2, False), (0.2, True)):
            at = [index + place for index in range(2)]
            own = [cells[oriented, smooth][measure] for oriented in (False, True)]
            axes.bar(at, [c["value"] for c in own], 0.38, yerr=error_bars(own), color=COLORS[2 if smooth else 0],
                     label="with penalty" if smooth else "without", error_kw={"linewidth": 0.9})  # fmt: skip
        axes.set_xticks([0, 1], ["labels shuffled", "true labels"], fontsize=8)
        axes.set_title(title, fontsize=9)
    panels[0].legend(frameon=False, fontsize=8)
    save_png(path, figure, _DPI)


def _classes(data: Dataset) -> str:
    """A line that says which column is which class."""
    return "left to right: " + ", ".join(data.classes)


def _inverted(network: nn.Module, starts: Tensor, targets: Tensor, steps: int, step_size: Tensor) -> Tensor:
    device = device_of(network)
    return invert(network, starts.to(device), targets.to(device), steps=steps, step_size=step_size.to(device)).cpu()


def _mosaic(images: Tensor, columns: int) -> np.ndarray:
    """Images side by side, with one white pixel between: [H, W] or [H, W, 3]."""
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    sheet = torch.ones(channels, rows * (height + 1) - 1, columns * (width + 1) - 1)
    for index, image in enumerate(images):
        top, left = (index // columns) * (height + 1), (index % columns) * (width + 1)
        # Grey images are shown as ink on paper.
        sheet[:, top : top + height, left : left + width] = 1 - image if channels == 1 else image
    return sheet[0].numpy() if channels == 1 else sheet.movedim(0, 2).numpy()


def _panels(path: Path, sheets: Mapping[str, np.ndarray], columns: int, title: str) -> None:
    columns = min(columns, len(sheets))
    rows = -(-len(sheets) // columns)
    height, width = next(iter(sheets.values())).shape[:2]
    side = 11.0 / columns
    figure, grid = new_figure(rows, columns, 11.0, rows * (side * height / width + 0.3) + 0.4)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (name, sheet) in zip(grid.flat, sheets.items()):
        axes.imshow(sheet, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(name, fontsize=9)
    figure.suptitle(title, fontsize=10)
    save_png(path, figure, _DPI)


def _figure(panels: int) -> tuple[Any, list[Any]]:
    columns = min(3, panels)
    rows = -(-panels // columns)
    figure, axes = new_figure(rows, columns, 4.0 * columns if panels > 1 else 6.0, 3.3 * rows)
    used, unused = axes.flat[:panels], axes.flat[panels:]
    for one in used:
        plain_axes(one)
    for one in unused:
        one.set_axis_off()
    return figure, list(used)
