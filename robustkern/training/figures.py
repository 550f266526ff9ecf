"""The two figures of a run: its curves, and what its input gradients look like."""

import io
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustkern._text import literal
from robustkern.data import Dataset

from .checkpoint import Row
from .evaluation import device_of, input_gradients
from .files import write_atomically

COLORS = ("#8a8f98", "#1f6f8b", "#c8553d", "#6a4c93", "#588157", "#d9a441", "#2f4858", "#9b2226")
_DPI = 160


def curves(path: Path, runs: Mapping[str, Sequence[Row]], eps: float) -> None:
    """Loss terms, accuracies and step time against the epoch, one colour per run.

    Args:
        path: Where the PNG goes.
        runs: Rows of metrics by the name of the run.
        eps: Radius of the attack, for the label.
    """
    figure, ((terms, accuracy),) = new_figure(1, 2, 10.5, 3.4)
    images = "test"
    for color, (name, rows) in zip(COLORS[1 if len(runs) == 1 else 0 :], runs.items(), strict=False):
        epochs = [row["epoch"] for row in rows]
        prefix = f"{name}: " if len(runs) > 1 else ""
        marker = "o" if len(epochs) == 1 else None
        solid = {"color": color, "marker": marker}
        dashed = {**solid, "linestyle": "--"}
        terms.plot(epochs, [row["orientation"] for row in rows], label=f"{prefix}orientation", **solid)
        if any(row["smoothness"] for row in rows):
            terms.plot(epochs, [row["smoothness"] for row in rows], label=f"{prefix}smoothness", **dashed)
        held_out = "validation_" if "validation_clean_accuracy" in rows[0] else ""
        clean = [100 * (row[f"{held_out}clean_accuracy"] or 0) for row in rows]
        measured = [row for row in rows if row[f"{held_out}robust_accuracy"] is not None]
        robust = [100 * (row[f"{held_out}robust_accuracy"] or 0) for row in measured]
        images = "validation" if held_out else "test"
        accuracy.plot(epochs, clean, label=f"{prefix}clean", **solid)
        accuracy.plot([row["epoch"] for row in measured], robust, label=f"{prefix}under attack", **dashed)
    terms.set_ylabel("mean over the training set")
    terms.set_ylim(bottom=0)
    accuracy.set_ylabel(f"{images} accuracy (%)")
    accuracy.set_ylim(-2, 102)
    accuracy.set_title(f"attack: PGD, ℓ∞, ε = {eps_text(eps)}", fontsize=10)
    terms.set_title("the two terms of the loss", fontsize=10)
    for axes in (terms, accuracy):
        axes.set_xlabel("epoch")
        plain_axes(axes)
        axes.legend(frameon=False, fontsize=8)
    save_png(path, figure)


def gradients(path: Path, data: Dataset, networks: Mapping[str, nn.Module]) -> None:
    """Input gradients of each network for the same images: one column per class, one row per network.

    Shown is d z_label / dx, the gradient of the label's logit. Every gradient is divided by its own 99.5th percentile
    of |value|, for all networks alike, because their magnitudes differ by orders from image to image; colour shows
    where and with which sign, not how much. Gradients of colour images are averaged over the channels; over those of
    grey images the outline of the image is drawn.

    Args:
        path: Where the PNG goes.
        data: Images to choose from: the first of each class, up to ten classes, that every network classifies right.
        networks: Networks by the name of their row.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    x, y = one_of_each(data, list(networks.values()), 10)
    columns, rows = len(x), 1 + len(networks)
    figure, grid = new_figure(rows, columns, 1.15 * columns + 1.7, 1.15 * rows + 0.75)
    grey = x.shape[1] == 1
    for column in range(columns):
        image = x[column, 0] if grey else x[column].movedim(0, 2)
        grid[0, column].imshow(image.numpy(), cmap="gray_r" if grey else None, vmin=0, vmax=1)
        grid[0, column].set_title(data.classes[int(y[column])], fontsize=10)
    for row, (name, network) in enumerate(networks.items(), start=1):
        device = device_of(network)
        grad = input_gradients(network, x.to(device), y.to(device)).mean(dim=1).cpu()  # [B, H, W]
        for column in range(columns):
            grid[row, column].imshow(_normalised(grad[column]), cmap="RdBu_r", vmin=-1, vmax=1)
            if grey:
                grid[row, column].contour(x[column, 0].numpy(), levels=[0.5], colors="#222222", linewidths=0.8)
        # The label runs upwards, so a name has no more room than the height of its row.
        long = len(name) > 14
        grid[row, 0].set_ylabel(name.replace("-", "-\n") if long else name, fontsize=8 if long else 10)
    grid[0, 0].set_ylabel("image", fontsize=10)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set(color="#c9c9c9", linewidth=0.6)
    bar = figure.colorbar(
        ScalarMappable(Normalize(-1, 1), "RdBu_r"), ax=grid[1:, :].ravel().tolist(), shrink=0.85, pad=0.01, aspect=18
    )
    bar.set_ticks([-1, 0, 1])
    bar.outline.set_visible(False)
    bar.set_label("∂ logit of the label / ∂ pixel,\neach scaled to its 99.5th percentile", fontsize=8)
    save_png(path, figure)


def eps_text(eps: float) -> str:
    """A radius as the literature writes it: 8/255 where it is a whole number of grey levels, else the plain number."""
    levels = eps * 255
    return f"{round(levels)}/255" if abs(levels - round(levels)) < 1e-6 else f"{eps:g}"


def one_of_each(data: Dataset, networks: Sequence[nn.Module] = (), limit: int | None = None) -> tuple[Tensor, Tensor]:
    """The first image of each class that every network classifies right, else the first: images, labels.

    Args:
        data: Images to choose from; the first 50 of each class are tried.
        networks: Classifiers.
        limit: How many classes, from the first on; None: all.
    """
    chosen = []
    for label in range(data.num_classes if limit is None else min(limit, data.num_classes)):
        members = (data.labels == label).nonzero().flatten()[:50]
        if not len(members):
            continue
        right = torch.ones(len(members), dtype=torch.bool)
        for network in networks:
            device = device_of(network)
            with torch.no_grad():
                right &= network(data.images[members].to(device)).argmax(dim=1).cpu() == label
        chosen.append(int(members[int(right.int().argmax())]))
    return data.images[chosen], data.labels[chosen]


def _normalised(grad: Tensor) -> np.ndarray:
    """Divided by its 99.5th percentile of |value|: one outlying pixel must not fade the rest."""
    scale = torch.quantile(grad.abs().flatten().double(), 0.995)
    return (grad / scale.clamp_min(torch.finfo(torch.float32).tiny)).numpy() if scale > 0 else grad.numpy()


def new_figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure of so many inches, and its axes [rows, columns]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def accuracy_band(axes: Any, points: Sequence[Mapping[str, float]], color: str, *, alpha: float, **style: Any) -> None:
    """Accuracies in percent against the radius, and their intervals as a pale band."""
    radii = [point["eps"] for point in points]
    accuracy, low, high = ([100 * point[part] for point in points] for part in ("accuracy", "low", "high"))
    axes.plot(radii, accuracy, color=color, marker="o", **style)
    axes.fill_between(radii, low, high, color=color, alpha=alpha, linewidth=0)


def plain_axes(axes: Any, grid: str = "both") -> None:
    """Axes without a frame, with pale lines of a grid behind what is drawn: "x", "y" or "both"."""
    axes.grid(color="#e6e6e6", linewidth=0.7, axis=grid)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def error_bars(points: Sequence[Mapping[str, float]], value: str = "value", scale: float = 1.0) -> list[list[float]]:
    """How far the intervals of points reach below and above their values, in the form that Matplotlib takes."""
    return [
        [scale * (point[value] - point["low"]) for point in points],
        [scale * (point["high"] - point[value]) for point in points],
    ]


def save_png(path: Path, figure: Any, dpi: int = _DPI) -> None:
    """Write a figure with 256 colours, which takes a third of the bytes that all colours take.

    Args:
        path: Where the PNG goes.
        figure: Of matplotlib.
        dpi: Its resolution.
    """
    from PIL import Image

    full = io.BytesIO()
    with literal(figure):
        figure.savefig(full, format="png", dpi=dpi, facecolor="white")
    with Image.open(full) as picture:
        colours = picture.convert("RGB").quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    write_atomically(path, partial(colours.save, format="PNG", optimize=True))
