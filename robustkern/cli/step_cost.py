"""What a training step of a method costs, with stock PyTorch and with the fused ops."""

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from robustkern.draw import Draw
from robustkern.training.methods import Loss

_WARM_UP = 3


@dataclass(frozen=True)
class StepCost:
    """Time of forward, loss and all backward passes of one batch.

    Attributes:
        milliseconds: The fastest round.
        ratio: Its quotient by the fastest round of the baseline.
    """

    milliseconds: float
    ratio: float


def measure(
    model: nn.Module, x: Tensor, y: Tensor, losses: Mapping[str, Loss], baseline: str, *, seconds: float = 4.0
) -> dict[str, StepCost]:
    """Time one step with each loss.

    The losses take turns, so that a machine that is slow for a while is slow for all of them. Each one's minimum is
    taken: noise only ever adds time.

    Args:
        model: Copied; the original is left alone.
        x: A batch of images.  [B, C, H, W]
        y: Its labels.  [B]
        losses: What to compare.
        baseline: The name of the one that the others are divided by.
        seconds: Roughly how long to measure in all.
    """
    model = copy.deepcopy(model).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fastest = dict.fromkeys(losses, float("inf"))
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < 2 * _WARM_UP or time.perf_counter() < end:
        for name, loss in losses.items():
            model.zero_grad(set_to_none=True)
            started = time.perf_counter()
            loss(model, x, y, Draw(step=rounds)).backward(inputs=parameters)
            elapsed = time.perf_counter() - started
            if rounds >= _WARM_UP:
                fastest[name] = min(fastest[name], elapsed)
        rounds += 1
    return {name: StepCost(1e3 * value, value / fastest[baseline]) for name, value in fastest.items()}
