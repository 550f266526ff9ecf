"""How good a run's weights are, which ones were the best, and whether the run has collapsed.

With a validation set, that set decides everything, and the test images are looked at once, at the end.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from robustkern.attacks import FGSM, PGD
from robustkern.data import DataError, Images, generator

from .checkpoint import Row, TrainState
from .config import TrainingConfig
from .distributed import Group
from .evaluation import Attack, clean_accuracy, robust_accuracy
from .methods import METHODS

_DROP = 0.2  # of robust accuracy between two evaluations
_GAP = 0.3  # between the accuracies under a single-step and a multi-step attack of the same radius
_ACCURACIES = ("clean_accuracy", "robust_accuracy")
_PREFIXES = {"last": "", "ema": "ema_"}  # of accuracies in a row of metrics


def split(data: Images, validation: float, seed: int) -> tuple[Images, Images | None]:
    """The samples to train on, in their order, and those held out, in random order; a function of the seed.

    Args:
        data: The training set.
        validation: Share of it to hold out, below 1, or how many samples. 0: none.
        seed: Decides which ones.

    Raises:
        DataError: Nothing would be left on one side.
    """
    if not validation:
        return data, None
    count = round(validation * len(data)) if validation < 1 else int(validation)
    if not 1 <= count < len(data):
        raise DataError(
            f"{data.name}: cannot hold out {count} of {len(data)} training samples for validation: "
            "some must be left on either side"
        )
    order = torch.randperm(len(data), generator=generator(seed, "validation"))
    held_out, kept = order[:count], order[count:].sort().values
    return data.take(kept), data.take(held_out)


def overfitting(robust: float, fgsm: float | None, rows: Sequence[Row], key: str) -> str | None:
    """What looks like catastrophic overfitting, as a phrase; None if nothing does.

    Training on single-step attacks can collapse within one epoch: the network then resists them and nothing else.
    Two signs, either is enough: accuracy under PGD fell by more than 20 points since it was last measured; accuracy
    under FGSM is more than 30 points above that under PGD.

    Args:
        robust: Accuracy under PGD now.
        fgsm: Accuracy under FGSM now, if it was measured.
        rows: The epochs before.
        key: The name of accuracy under PGD in them.
    """
    before = next((value for row in reversed(rows) if (value := row.get(key)) is not None), None)
    if before is not None and before - robust > _DROP:
        return f"PGD accuracy fell from {before:.1%} to {robust:.1%}"
    if fgsm is not None and fgsm - robust > _GAP:
        return f"FGSM accuracy is {fgsm:.1%}, PGD accuracy {robust:.1%}"
    return None


class Validation:
    """Measures accuracies, keeps the best weights, watches for catastrophic overfitting.

    The weights and, if there is one, their average are measured on the validation set, or on the test set if nothing
    was held out. Of both, those with the highest robust accuracy on the validation set are the best, the earliest in
    case of a tie; without a validation set no weights are called the best. A network that is trained on single-step
    attacks is attacked by FGSM too.

    Args:
        config: Of the run.
        state: Its model and average; `best` and `progress.best` are kept there.
        test_set: The test images.
        validation_set: Those held out, if any.
        group: Processes that share the work.
        on_batch: Called after each batch; what it raises ends the evaluation.
    """

    def __init__(
        self,
        config: TrainingConfig,
        state: TrainState,
        test_set: Images,
        validation_set: Images | None,
        group: Group,
        on_batch: Callable[[], None],
    ) -> None:
        self.config, self.state, self.test_set, self.validation_set = config, state, test_set, validation_set
        self.how: dict[str, Any] = {"device": config.device, "on_batch": on_batch, "group": group}

    @property
    def _candidates(self) -> dict[str, nn.Module]:
        average = self.state.average
        of = {"last": self.state.model, **({} if average is None else {"ema": average.model})}
        return {name: self.state.undivided(model) for name, model in of.items()}

    def epoch(self, row: Row) -> str | None:
        """Put the accuracies after an epoch into its row; returns a warning of catastrophic overfitting, if any."""
        config, progress = self.config, self.state.progress
        number = progress.epoch + 1
        data, prefix = (self.test_set, "") if self.validation_set is None else (self.validation_set, "validation_")
        attacked = number % config.eval_every == 0 or number == config.epochs
        candidates = self._candidates
        for name, model in candidates.items():
            clean, robust = self._accuracies(model, data, attacked)
            start = prefix + _PREFIXES[name]
            row[f"{start}clean_accuracy"], row[f"{start}robust_accuracy"] = clean, robust
            best = progress.best
            if prefix and robust is not None and (best is None or robust > best["validation_robust_accuracy"]):
                progress.best = {
                    "epoch": number,
                    "weights": name,
                    "validation_clean_accuracy": clean,
                    "validation_robust_accuracy": robust,
                }
                self.state.best = {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
        robust = row[f"{prefix}robust_accuracy"]
        if config.watch == "off" or robust is None:
            return None
        fgsm = None
        if METHODS[config.method].single_step:
            fgsm = self._robust_accuracy(candidates["last"], data, FGSM(config.eps, random_start=False))
            row[f"{prefix}fgsm_accuracy"] = fgsm
        sign = overfitting(robust, fgsm, progress.rows, f"{prefix}robust_accuracy")
        row["overfitting"] = float(sign is not None)
        if sign is None:
            return None
        progress.ended = config.watch == "stop"
        ending = "; stopping here, as watch asks" if progress.ended else ""
        return f"epoch {number} looks like catastrophic overfitting: {sign}{ending}"

    def final(self) -> dict[str, dict[str, Any]]:
        """Accuracies on test images: of the last weights and, if there are such, of their average and the best."""
        progress, of = self.state.progress, self._candidates
        if self.validation_set is None:
            last = progress.rows[-1]
            return {
                name: {"epoch": progress.epoch, **{key: last[_PREFIXES[name] + key] for key in _ACCURACIES}}
                for name in of
            }
        if self.state.best is not None:
            of["best"] = copy.deepcopy(of["last"])
            of["best"].load_state_dict(self.state.best)
        results: dict[str, dict[str, Any]] = {}
        for name, model in of.items():
            chosen = progress.best if name == "best" else None
            accuracies = self._accuracies(model, self.test_set, True)
            results[name] = {**(chosen or {"epoch": progress.epoch}), **dict(zip(_ACCURACIES, accuracies, strict=True))}
        return results

    def _accuracies(self, model: nn.Module, data: Images, attacked: bool) -> tuple[float, float | None]:
        """Clean accuracy, and that under PGD on the first `eval_samples`."""
        clean = clean_accuracy(model, data, **self.how)
        attack = PGD(self.config.eps, steps=self.config.pgd_steps)
        return clean, self._robust_accuracy(model, data, attack) if attacked else None

    def _robust_accuracy(self, model: nn.Module, data: Images, attack: Attack) -> float:
        few = data.first(self.config.eval_samples or None)
        return robust_accuracy(model, few, attack, seed=self.config.seed, **self.how)
