"""Every measure of the study for one model, with intervals over images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from robustkern.attacks import PGD
from robustkern.data import Dataset, generator
from robustkern.evaluation import linearised_robustness, local_lipschitz, wilson_interval
from robustkern.evaluation.checks import correct
from robustkern.training.evaluation import device_of

from .bootstrap import bootstrap_interval
from .gradients import alignment, edge_concentration, input_gradients, low_frequency_share, total_variation_ratio
from .inversion import inversion_accuracy, invert, noise, seeded_grid

# name: (what it is, whether a larger value counts as more recognisable or more robust)
MEASURES: dict[str, tuple[str, bool | None]] = {
    "clean_accuracy": ("accuracy", True),
    "robust_accuracy": ("accuracy under PGD-20", True),
    "gradient_norm": ("eps · ‖∂ loss / ∂x‖₁", False),
    "median_gradient_norm": ("the same, median", False),
    "local_lipschitz": ("local Lipschitz constant of the logits (lower bound)", False),
    "linearised_robustness": ("linearised robustness, Linf, median", True),
    "alignment": ("alignment |⟨x, g⟩| / ‖g‖, g = ∂z_y/∂x (Etmann et al.)", True),
    "centred_alignment": ("|cos(x, g)|, means taken out", True),
    "low_frequency_share": ("gradient energy below 0.25 cycles a pixel", True),
    "total_variation_ratio": ("total variation of the gradient", False),
    "edge_concentration": ("gradient energy on the strongest fifth of the edges, over a fifth", True),
    "inversion_accuracy": ("inversions from images that the robust judge names right", True),
    "noise_inversion_accuracy": ("inversions from noise that the robust judge names right", True),
    "inversion_transfer": ("inversions from images that the standard judge names right", None),
    "noise_inversion_transfer": ("inversions from noise that the standard judge names right", None),
}


# Measures whose median is taken; for the others it is the mean. Where the loss saturates, a few images have most of a
# gradient's norm, and a quotient by a gradient that is nearly zero can be of any size.
MEDIANS = ("median_gradient_norm", "linearised_robustness")
# Shares of images: an image's value is 0 or 1.
PROPORTIONS = tuple(name for name in MEASURES if name.endswith(("_accuracy", "_transfer")))
NOISE_INVERSIONS = "inversions from noise"  # the key of the images, among the measures


class Judges(NamedTuple):
    """Independent networks that name what inversions show.

    A network of standard training reacts to the same patterns as another one, whether a person sees anything in them or
    not: what it names right may be an adversarial example that transfers.  A network that was trained to resist such
    patterns is the better stand-in for a person.  Both are asked.

    Attributes:
        robust: Trained adversarially and independently, with a seed that no measured model has.
        standard: Trained independently, with cross-entropy alone.

    >>> from robustkern.study import Judges
    >>> Judges(robust=nn.Linear(4, 2), standard=nn.Linear(4, 2)).robust.out_features
    2
    """

    robust: nn.Module
    standard: nn.Module


@dataclass(frozen=True)
class Protocol:
    """How much is measured, and how.

    Attributes:
        eps: Radius of attacks, in units of the images (Linf).
        samples: How many test images, from the first on.
        seeds_per_class: Images of each class that inversions start from, each towards every other class.
        inversion_steps: Steps of these; published: 16.
        inversion_step: Their length, in standard deviations of each channel; published: 0.1.
        noise_images: Inversions from noise, for each class.
        noise_steps: Their steps; published: 1,024.
        noise_step: Their length, in standard deviations; published: 2/255.
        seed: Seed of attacks and noise.

    >>> from robustkern.study import Protocol
    >>> Protocol(eps=0.1).inversion_steps
    16
    """

    eps: float
    samples: int = 200
    seeds_per_class: int = 5
    inversion_steps: int = 16
    inversion_step: float = 0.1
    noise_images: int = 2
    noise_steps: int = 1024
    noise_step: float = 2 / 255
    seed: int = 0


def measure(
    model: nn.Module,
    data: Dataset,
    judges: Judges,
    protocol: Protocol,
    *,
    on_measure: Callable[[str], None] | None = None,
) -> dict[str, Tensor]:
    """Every measure of `MEASURES`: one number for each image, or for each inversion: [N, ...] float32 on the CPU.

    Under `NOISE_INVERSIONS` are the images that were made from noise, [N, C, H, W], image i towards class i modulo the
    number of classes: making them takes longest, and a figure may need them.

    Args:
        model: Maps images in [0, 1] to logits, normalisation inside; left unchanged.
        data: Test images.
        judges: Other classifiers of the same classes, each trained independently.
        protocol: How much is measured, and how.
        on_measure: Told the name of each measure before it is taken.
    """
    report = on_measure or (lambda name: None)
    few = data.first(protocol.samples)
    device = device_of(model)
    x, y = few.images.to(device), few.labels.to(device)
    _, std = data.statistics()
    scale = torch.tensor(std, device=device).view(-1, 1, 1)
    values: dict[str, Tensor] = {}

    report("clean_accuracy")
    right = correct(model, x, y)
    values["clean_accuracy"] = right
    report("robust_accuracy")
    attack = PGD(protocol.eps, steps=20, early_exit=True)
    adversary = attack(model, x, y, generator(protocol.seed, "study", device=device))
    values["robust_accuracy"] = right & correct(model, adversary, y)
    report("gradient_norm")
    values["gradient_norm"] = protocol.eps * input_gradients(model, x, y, "loss").flatten(1).abs().sum(1)
    values["median_gradient_norm"] = values["gradient_norm"].clone()  # files cannot hold one tensor under two names
    report("local_lipschitz")
    values["local_lipschitz"] = local_lipschitz(
        model, x, protocol.eps, generator=generator(protocol.seed, "study", device=device)
    )
    report("linearised_robustness")
    values["linearised_robustness"] = linearised_robustness(model, x, y)
    gradient = input_gradients(model, x, y)
    values["alignment"] = alignment(gradient, x, cosine=False)
    values["centred_alignment"] = alignment(gradient, x, centred=True)
    values["low_frequency_share"] = low_frequency_share(gradient)
    values["total_variation_ratio"] = total_variation_ratio(gradient)
    values["edge_concentration"] = edge_concentration(gradient, x)
    report("inversion_accuracy")
    starts, targets, labels = _starts(data, protocol.seeds_per_class)
    starts, targets, labels = starts.to(device), targets.to(device), labels.to(device)
    inverted = invert(model, starts, targets, steps=protocol.inversion_steps, step_size=protocol.inversion_step * scale)
    # Left out: an image driven towards its own class, which is named right from the beginning.
    for name, judge in (("inversion_accuracy", judges.robust), ("inversion_transfer", judges.standard)):
        named = inversion_accuracy(judge, inverted, targets)[targets != labels]
        values[name] = named.reshape(-1, data.num_classes - 1)  # inversions from the same image belong together
    report("noise_inversion_accuracy")
    count = protocol.noise_images * data.num_classes
    nothing = noise(count, data.in_shape, seed=protocol.seed, spread=float(scale.mean())).to(device)
    wanted = torch.arange(count, device=device) % data.num_classes
    inverted = invert(model, nothing, wanted, steps=protocol.noise_steps, step_size=protocol.noise_step * scale)
    values["noise_inversion_accuracy"] = inversion_accuracy(judges.robust, inverted, wanted)
    values["noise_inversion_transfer"] = inversion_accuracy(judges.standard, inverted, wanted)
    values[NOISE_INVERSIONS] = inverted
    return {name: values[name].detach().float().cpu() for name in (*MEASURES, NOISE_INVERSIONS)}


def accuracy_curve(
    model: nn.Module, x: Tensor, y: Tensor, radii: Sequence[float], *, steps: int = 20, seed: int = 0
) -> Tensor:
    r"""Whether each image withstands PGD within each radius (Linf), and any smaller one: bool [B, len(radii)].

    Args:
        model: Maps images in [0, 1] to logits; left unchanged.
        x: Images in [0, 1].  [B, C, H, W]
        y: Labels.  [B]
        radii: Ascending; at 0 an image counts if it is classified right.
        steps: Steps of the attack, each a quarter of the radius.
        seed: Seed of its starts.

    >>> from robustkern.study import accuracy_curve
    >>> model, x = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), torch.rand(2, 1, 2, 2)
    >>> accuracy_curve(model, x, model(x).argmax(1), [0.0, 1.0], steps=2).tolist()[0][0]
    True
    """
    standing = correct(model, x, y)
    columns = []
    for eps in radii:
        if eps:
            attack = PGD(min(eps, 1.0), steps=steps, early_exit=True)
            chosen = standing.nonzero().squeeze(1)
            adversary = attack(model, x[chosen], y[chosen], generator(seed, "study", device=x.device), indices=chosen)
            standing = standing.clone()
            standing[chosen] = correct(model, adversary, y[chosen])
        columns.append(standing)
    return torch.stack(columns, 1)


def summarise(
    values: dict[str, Tensor], confidence: float = 0.95, *, differences: bool = False
) -> dict[str, dict[str, Any]]:
    """Mean (for `MEDIANS` the median) and bootstrap interval of each measure, over the images where it is finite.

    Images are resampled, each with the values of all seeds and of everything made from it.  Where all values are 0, or
    all are 1, the interval is Wilson's.

    Args:
        values: For each measure, [N], or [N, S] for S seeds of one method on the same images, or [N, S, T] for T
            numbers of each.
        confidence: Confidence of the intervals.
        differences: Whether the values are differences between two networks.

    >>> from robustkern.study import summarise
    >>> found = summarise({"alignment": torch.linspace(0, 1, 101)})["alignment"]
    >>> round(found["value"], 3), found["images"], found["low"] < 0.5 < found["high"]
    (0.5, 101, True)
    """
    summary: dict[str, dict[str, Any]] = {}
    for name, numbers in values.items():
        if name == NOISE_INVERSIONS:  # images
            continue
        finite = numbers[numbers.isfinite().reshape(len(numbers), -1).all(1)]
        if not len(finite):
            summary[name] = {"value": None, "low": None, "high": None, "images": 0}
            continue
        low, high = bootstrap_interval(finite, statistic="median" if name in MEDIANS else "mean", confidence=confidence)
        value = centre(name, finite)
        if name in PROPORTIONS and not differences and value in (0.0, 1.0):
            low, high = wilson_interval(round(value * len(finite)), len(finite), confidence)
        summary[name] = {"value": value, "low": low, "high": high, "images": len(finite)}
    return summary


def centre(name: str, values: Tensor) -> float:
    """The mean of a measure's values, or for `MEDIANS` their median."""
    return float(values.double().quantile(0.5) if name in MEDIANS else values.double().mean())


def _starts(data: Dataset, per_class: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first images of each class with every target: starts, targets, labels."""
    chosen = torch.cat([(data.labels == label).nonzero().flatten()[:per_class] for label in range(data.num_classes)])
    starts, targets = seeded_grid(data.images[chosen], data.num_classes)
    return starts, targets, data.labels[chosen].repeat_interleave(data.num_classes)
