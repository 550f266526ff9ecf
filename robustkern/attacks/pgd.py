"""Projected gradient descent in the Linf ball."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@contextmanager
def attacked(model: nn.Module) -> Iterator[None]:
    """The model as an attack must see it: in eval mode, so that BatchNorm is fixed, and with no parameter gradients.

    Every module's mode and every parameter's requires_grad are put back on the way out, whatever happened inside.
    """
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        # Module by module: train() would recurse and turn on what its owner had frozen.
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)


@dataclass(frozen=True)
class PGD:
    """x' = argmax of the cross-entropy over ||x' - x||_inf <= eps, x' in [0, 1], by signed gradient ascent.

    x_{t+1} = clamp(project(x_t + step_size * sign(d loss / d x_t))), from a uniformly random start. Of all iterates of
    all restarts, each sample keeps the one with the highest loss, so more steps and more restarts never weaken it.
    Source: Madry et al., Towards deep learning models resistant to adversarial attacks, ICLR 2018.

    Attributes:
        eps: Radius of the ball, in units of the images (8/255), or a tensor that broadcasts over a sample.
        step_size: Length of a step; by default 2.5 eps / steps, which lets a sample cross the ball.
        steps: Number of steps.
        restarts: Number of random starts.
        norm: "linf".
        random_start: Start inside the ball at random (True) or at x (False).
    """

    eps: float | Tensor
    step_size: float | Tensor | None = None
    steps: int = 20
    restarts: int = 1
    norm: str = "linf"
    random_start: bool = True

    def __post_init__(self) -> None:
        if self.norm != "linf":
            raise ValueError(f"PGD: norm must be 'linf', got {self.norm!r}")
        if self.steps < 1 or self.restarts < 1:
            raise ValueError(f"PGD: steps and restarts must be at least 1, got {self.steps} and {self.restarts}")
        if bool((torch.as_tensor(self.eps) < 0).any()):
            raise ValueError(f"PGD: eps must not be negative, got {self.eps}")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Adversarial examples for a batch.

        Args:
            model: Maps images to logits. It leaves as it came, and its parameters get no gradients.
            x: Clean images in [0, 1].  [B, C, H, W]
            y: Their labels.  [B]
            generator: Where the random starts come from, on the device of x; by default PyTorch's own.

        Returns:
            Images in the eps ball around x and in [0, 1], without gradient history.  [B, C, H, W]
        """
        x = x.detach()
        eps = torch.as_tensor(self.eps, dtype=x.dtype, device=x.device)
        step = 2.5 * eps / self.steps if self.step_size is None else torch.as_tensor(self.step_size).to(x)
        # The ball and the box meet in a box: one clamp projects on both.
        lowest, highest = (x - eps).clamp_(0, 1), (x + eps).clamp_(0, 1)
        best = x.clone()
        best_loss = x.new_full((len(x),), -torch.inf)
        with attacked(model), torch.enable_grad():
            for _ in range(self.restarts):
                adversary = x.clone()
                if self.random_start:
                    noise = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
                    adversary = torch.clamp(x + (2 * noise - 1) * eps, lowest, highest)
                for _ in range(self.steps):
                    adversary.requires_grad_(True)
                    loss = F.cross_entropy(model(adversary), y, reduction="none")
                    (grad,) = torch.autograd.grad(loss.sum(), adversary)
                    adversary = adversary.detach()
                    self._keep_worst(best, best_loss, adversary, loss.detach())
                    adversary = torch.clamp(adversary + step * grad.sign(), lowest, highest)
                with torch.no_grad():
                    loss = F.cross_entropy(model(adversary), y, reduction="none")
                self._keep_worst(best, best_loss, adversary, loss)
        return best

    @staticmethod
    def _keep_worst(best: Tensor, best_loss: Tensor, adversary: Tensor, loss: Tensor) -> None:
        # Not `loss > best_loss` alone: a non-finite loss is the attacker's success, and NaN compares false.
        worse = (loss > best_loss) | loss.isnan()
        best_loss.copy_(torch.where(worse, loss, best_loss))
        best.copy_(torch.where(worse.view(-1, *[1] * (best.dim() - 1)), adversary, best))
