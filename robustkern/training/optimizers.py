"""The optimizer of a run: which parameters decay, and which learn slower than the head."""

from typing import Any

import torch
from torch import nn

from robustkern.distributed import blocks

from .config import TrainingConfig
from .errors import require


def optimizer_of(config: TrainingConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a configuration, for all parameters of a model that require grad.

    Parameters that decay or learn alike form a group; its `lr_scale` multiplies the learning rate of a step.

    Raises:
        UsageError: A layer decay for a network without blocks.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    scales = _scales(model, config.layer_decay)
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        decays = parameter.dim() > 1 or not config.decay_matrices_only
        groups.setdefault((decays, scales.get(name, 1.0)), []).append(parameter)
    parameters: list[dict[str, Any]] = []
    for (decays, scale), members in groups.items():
        group = {"params": members, "weight_decay": config.weight_decay if decays else 0.0}
        parameters.append({**group, "lr_scale": scale} if scales else group)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=config.lr, betas=(config.betas[0], config.betas[1]))
    return torch.optim.SGD(parameters, lr=config.lr, momentum=0.9, nesterov=True)


def _scales(model: nn.Module, decay: float) -> dict[str, float]:
    """The factor of each parameter, decay ** (number of blocks up to the head), by its name; none for decay 1.

    What stands before the first block is as far from the head as a block before it would be, what stands between two
    belongs to the one before, and what comes after the last one is the head.
    """
    if decay == 1:
        return {}
    found = set(blocks(model))
    innermost = [
        f"{name}."
        for name, module in model.named_modules()
        if module in found and not any(other is not module and other in found for other in module.modules())
    ]
    require(bool(innermost), "layer_decay takes a network of blocks, modules of its own in a Sequential or ModuleList")
    depths, seen = {}, 0
    for name, _ in model.named_parameters():
        place = next((number for number, prefix in enumerate(innermost, 1) if name.startswith(prefix)), 0)
        seen = max(seen, place)
        depths[name] = place or seen
    last = [name for name, _ in model.named_parameters() if name.startswith(innermost[-1])][-1]
    names = list(depths)
    for name in names[names.index(last) + 1 :]:
        depths[name] = len(innermost) + 1
    return {name: decay ** (len(innermost) + 1 - depth) for name, depth in depths.items()}
