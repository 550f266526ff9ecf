"""How steep a classifier is around given images, and how far its decision is from changing."""

import torch
from torch import Tensor, nn

from robustkern import ops
from robustkern._arguments import check_choice
from robustkern._choices import Threat
from robustkern.attacks import attacked
from robustkern.jacobian import input_jacobian

_DUAL = {"linf": 1.0, "l2": 2.0, "l1": float("inf")}


def local_lipschitz(
    model: nn.Module, x: Tensor, eps: float, *, steps: int = 10, generator: torch.Generator | None = None
) -> Tensor:
    r"""max over ||x' - x||_inf <= eps of ||f(x') - f(x)||_1 / ||x' - x||_inf, for each sample: [B].

    Found by gradient ascent in `steps` signed steps from a random start: a lower bound of the local Lipschitz constant
    of the logits.
    Source: Yang et al., A closer look at accuracy vs. robustness, NeurIPS 2020.

    Args:
        model: Maps images to logits; left unchanged.
        x: Images in [0, 1].  [B, C, H, W]
        eps: Radius, in units of the images.
        steps: Steps of ascent, of eps / 4 each.
        generator: Source of the random starts.

    Raises:
        ValueError: eps is not positive.

    >>> from robustkern.evaluation import local_lipschitz
    >>> local_lipschitz(nn.Identity(), torch.full((1, 2), 0.5), 0.1).round(decimals=3).tolist()
    [2.0]
    """
    if not eps > 0:
        raise ValueError(f"local_lipschitz: eps must be positive, got {eps}")
    x = x.detach()
    with attacked(model):
        with torch.no_grad():
            clean = model(x)
        moved = ops.attack_start(x, eps=eps, generator=generator)
        best = torch.zeros(len(x), dtype=clean.dtype, device=x.device)
        for step in range(steps + 1):
            with torch.enable_grad():
                leaf = moved.detach().requires_grad_()
                change = (model(leaf) - clean).abs().sum(1)
                distance = (leaf - x).flatten(1).abs().amax(1)
                # A start may coincide with x, such as for an image all black or white with nowhere to go.
                slope = torch.where(distance > 0, change / distance.clamp_min(torch.finfo(x.dtype).tiny), 0)
                (grad,) = torch.autograd.grad(change.sum(), leaf)
            best = torch.maximum(best, slope.detach())
            if step < steps:
                moved = moved.detach()
                ops.attack_step(moved, x, grad, eps=eps, step_size=eps / 4)
    return best


def logit_margin(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """z_y - max_{j != y} z_j for each sample, negative where it is misclassified: [B].

    >>> from robustkern.evaluation import logit_margin
    >>> logit_margin(nn.Identity(), torch.tensor([[1.0, 3.0]]), torch.tensor([0])).tolist()
    [-2.0]
    """
    with attacked(model), torch.no_grad():
        return -ops.margin_loss(model(x.detach()), y, kind="cw")


def linearised_robustness(model: nn.Module, x: Tensor, y: Tensor, norm: Threat = "linf") -> Tensor:
    r"""min_{j != y} (z_y - z_j) / ||d(z_y - z_j)/dx||_q for each sample: [B].

    The distance, in the norm, at which the decision would change if the classifier were linear around x: orientation
    in the numerator, smoothness in the denominator.  Negative where the sample is misclassified; infinite where no
    logit moves.  q is dual to the norm: 1 for "linf", 2 for "l2", infinity for "l1".  Exact, by one backward pass for
    each class.
    Source: Etmann et al., On the connection between adversarial robustness and saliency map interpretability, ICML
    2019.

    Args:
        model: Maps images to logits; left unchanged.
        x: Images.  [B, C, H, W]
        y: Their labels.  [B]
        norm: "linf", "l2" or "l1".

    Raises:
        ValueError: An unknown norm.

    >>> from robustkern.evaluation import linearised_robustness
    >>> model = nn.Linear(2, 2)
    >>> model.weight.data, model.bias.data = torch.eye(2), torch.zeros(2)
    >>> linearised_robustness(model, torch.tensor([[1.0, 0.0]]), torch.tensor([0])).tolist()  # 1 over ||(1, -1)||_1
    [0.5]
    """
    check_choice("linearised_robustness", "norm", norm, tuple(_DUAL))
    with attacked(model), torch.enable_grad():
        leaf = x.detach().requires_grad_()
        logits = model(leaf)
        jacobian = input_jacobian(logits, leaf, create_graph=False).flatten(2)  # [B, C, N]
    logits, rows = logits.detach(), torch.arange(len(x), device=x.device)
    difference = logits[rows, y][:, None] - logits
    slopes = torch.linalg.vector_norm(jacobian[rows, y][:, None] - jacobian, _DUAL[norm], dim=2)
    unmoved = torch.where(difference == 0, 0, difference.sign() * torch.inf)
    distance = torch.where(slopes > 0, difference / slopes, unmoved)
    distance[rows, y] = torch.inf
    return distance.amin(1)
