"""What a classifier has learned to see, and what teaching it costs.

Measures of input gradients on tensors (`alignment(gradient, x)`, ...), inversions, `measure(model, data, judges, ...)`
for all of them at once, figures in `robustkern.study.figures`, and whole studies: `run(Plan("digits-28"), folder)`.
"""

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
from .measures import MEASURES, Judges, Protocol, measure, summarise
from .study import Plan, Study, run

__all__ = [
    "MEASURES",
    "Judges",
    "Plan",
    "Protocol",
    "Study",
    "alignment",
    "bootstrap_interval",
    "edge_concentration",
    "input_gradients",
    "inversion_accuracy",
    "invert",
    "low_frequency_share",
    "measure",
    "noise",
    "run",
    "seeded_grid",
    "summarise",
    "total_variation_ratio",
    "white_noise_baseline",
]
