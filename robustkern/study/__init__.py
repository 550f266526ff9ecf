"""What a classifier has learned to see, and what teaching it costs.

Measures of input gradients on tensors (`alignment(gradient, x)`, ...), inversions, accuracy against the radius,
`measure(model, data, judges, ...)` for all measures at once, figures in `robustkern.study.figures`, and whole studies:
`run(Plan("digits-28"), folder)`.  Any model that maps images in [0, 1] to logits, with images and labels of your own:

    data = Dataset("mine", x, y, ("cat", "dog"))  # of robustkern.data; x [N, C, H, W] in [0, 1], y [N]
    values = measure(model, data, Judges(robust=robust, standard=standard), Protocol(eps=8 / 255))
    print(summarise(values)["inversion_accuracy"])
    figures.inversion_grids(Path("inversions.png"), data, {"mine": model})
"""

from . import figures
from .bootstrap import bootstrap_interval
from .gradients import (
    alignment,
    edge_concentration,
    input_gradients,
    low_frequency_share,
    total_variation_ratio,
    white_noise_baseline,
)
from .inversion import inversion_accuracy, invert, noise, seeded_grid
from .measures import MEASURES, Judges, Protocol, accuracy_curve, measure, summarise
from .plan import Plan
from .study import Study, run

__all__ = [
    "MEASURES", "Judges", "Plan", "Protocol", "Study", "accuracy_curve", "alignment", "bootstrap_interval",
    "edge_concentration", "figures", "input_gradients", "inversion_accuracy", "invert", "low_frequency_share",
    "measure", "noise", "run", "seeded_grid", "summarise", "total_variation_ratio", "white_noise_baseline",
]  # fmt: skip
