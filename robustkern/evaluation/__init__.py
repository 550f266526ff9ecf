"""Evaluation of a classifier's robustness: `evaluate(model, data, Settings(eps=8 / 255))`.

    report = evaluate(model, robustkern.data.load("fashion-mnist", split="test"), Settings(eps=0.1))
    report.worst.value, report.worst.interval    # accuracy under the strongest of the attacks, sample by sample
    report.sound                                 # False if a check found a reason to doubt it

`robustkern evaluate RUN` does the same for a trained run and writes it down.
"""

from .checks import Check, Subject, run_checks
from .intervals import wilson_interval
from .measures import linearised_robustness, local_lipschitz, logit_margin
from .results import ATTACKS, Accuracy, Report, Settings
from .suite import MissingPackage, evaluate, recheck

__all__ = [
    "ATTACKS", "Accuracy", "Check", "MissingPackage", "Report", "Settings", "Subject", "evaluate",
    "linearised_robustness", "local_lipschitz", "logit_margin", "recheck", "run_checks", "wilson_interval",
]  # fmt: skip
