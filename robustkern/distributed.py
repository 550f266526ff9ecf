"""Losses in training loops of several processes: DistributedDataParallel and FSDP2 around the whole loss.

Both average gradients by hooks that count on one forward pass of the wrapped module for each backward pass. Robust
losses call the model several times, and differentiate with respect to the input in between. So the module that is
wrapped is the loss, model inside: its forward holds every pass but the last backward.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from robustkern._sharded import is_sharded, sharded_modules
from robustkern.draw import Draw

Loss = Callable[..., Any]  # of (model, x, y, draw), giving Terms


class LossModule(nn.Module):
    """loss(model, x, y, draw) as the forward of a module, for whatever wraps modules: DDP, accelerate, Lightning.

    Its parameters, buffers and mode are the model's.  `training` is its own and belongs to no layer.

    Args:
        model: As the loss takes it.
        loss: A loss of `robustkern.losses`, or a function called like one.

    >>> module = rk.distributed.LossModule(nn.Linear(6, 3), rk.losses.GradientPenalty())
    >>> len(list(module.parameters()))
    2
    """

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, x: Tensor, y: Tensor, draw: Draw | None = None) -> Any:
        """What the loss returns, `Terms`."""
        return self.loss(self.model, x, y, draw)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """As DistributedDataParallel's: forward and backward inside accumulate gradients and send none."""
        yield


def wrap(model: nn.Module, loss: Loss, *, shard: bool = False, **options: Any) -> nn.Module:
    """A module whose forward is the loss and whose backward averages gradients over the processes.

        step = rk.distributed.wrap(model, rk.losses.TRADES())
        terms = step(x, y)                                 # x, y: this process's part of the batch
        terms.backward(inputs=step.parameters())           # gradients are means over the processes

    Gradients are those of one process that has the whole batch, if all parts are of one size; if not, multiply the
    total by `shard.share * processes` of each part's `robustkern.sharding.Shard`.  With that shard in the call's draw,
    `step(x, y, Draw(generator, shard=...))`, random numbers are those of the whole batch as well, and AWP's direction.
    BatchNorm in training mode sees the rows of its process, unless it is a SyncBatchNorm.
    `with step.no_sync():` around forward and backward accumulates gradients without sending them.

    DDP (default): each process holds the whole model; communication overlaps the last backward pass.

    FSDP2 (`shard=True`): each process holds its part of weights, gradients and optimizer state.  The weights of the
    whole model are gathered once for each call and kept until its backward pass ends: a graph that is differentiated
    again cannot wait for weights that were freed.  Make the optimizer after the call, of `model.parameters()`.
    In between, call the model for evaluation on all processes alike.

    Args:
        model: On its device, the same on all processes; must not be wrapped already.  With `shard`, a model that
            `fully_shard` was applied to is taken as it is; otherwise every block is sharded (`blocks`), then the rest.
        loss: A loss of `robustkern.losses`, or a function called like one.
        shard: FSDP2 rather than DDP.
        **options: Of DistributedDataParallel, or of `fully_shard`.

    Returns:
        A module called as `step(x, y, draw=None)`.  Without a process group: the same module without communication.

    Raises:
        TypeError: The model is no bare module.
        ValueError: An option under which gradients would be wrong.

    >>> model, x, y = nn.Linear(6, 3), torch.rand(4, 6), torch.tensor([0, 1, 2, 0])
    >>> step = rk.distributed.wrap(model, rk.losses.GradientPenalty())  # without a process group: the loss itself
    >>> step(x, y).backward(inputs=step.parameters())
    """
    if not isinstance(model, nn.Module) or isinstance(model, DistributedDataParallel):
        raise TypeError(f"wrap: model must be a module that nothing wraps yet, got {type(model).__name__}")
    if not callable(loss):
        raise TypeError(f"wrap: loss must be callable, got {type(loss).__name__}")
    if options.get("static_graph"):
        raise ValueError(
            "wrap: static_graph must be False: DDP then counts the passes inside a loss as backward passes of the "
            "step, and gradients silently stay those of one process"
        )
    if options.get("reshard_after_forward"):
        raise ValueError(
            "wrap: reshard_after_forward must be False: weights freed after a pass are missing when its graph is "
            "differentiated again"
        )
    if not dist.is_available() or not dist.is_initialized():
        return LossModule(model, loss)
    if not shard:
        return DistributedDataParallel(LossModule(model, loss), **options)
    if not is_sharded(model):
        shard_model(model, **options)
    return _ShardedLoss(model, loss)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that a network is a sequence of, innermost first.

    Of a Sequential or ModuleList, the members with parameters that are no layers of torch.nn, where there are two or
    more of them.
    """
    found: dict[nn.Module, None] = {}
    for parent in model.modules():
        if isinstance(parent, nn.Sequential | nn.ModuleList):
            members = [child for child in parent if not type(child).__module__.startswith("torch.nn.modules.")]
            members = [child for child in members if next(child.parameters(), None) is not None]
            if len(members) > 1:
                found.update(dict.fromkeys(members))
    return sorted(found, key=lambda module: sum(1 for _ in module.modules()))


def shard_model(model: nn.Module, **options: Any) -> None:
    """`fully_shard` of every block and of the rest, in place, over all processes; the options are its own."""
    fsdp = importlib.import_module("torch.distributed.fsdp")
    if "mesh" not in options:
        device = next(model.parameters()).device.type
        options["mesh"] = importlib.import_module("torch.distributed.device_mesh").init_device_mesh(
            device, (dist.get_world_size(),)
        )
    for module in [*blocks(model), model]:
        fsdp.fully_shard(module, **{**options, "reshard_after_forward": False})


class _ShardedLoss(LossModule):
    """The loss of a model that FSDP2 manages.

    FSDP2 reduces gradients and frees weights after any backward pass.  While the loss is computed it is told that
    none is the last.  In the last one it reduces a block's gradients when it is through with a pass of the block.  What
    comes later, from weights that a loss has moved or gradients that it has kept, is reduced at the end; and only there
    are weights freed, since a pass that is through with a block does not know whether another needs it.
    """

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__(model, loss)
        self._synchronise, self._last = True, False

    def forward(self, x: Tensor, y: Tensor, draw: Draw | None = None) -> Any:
        for module in sharded_modules(self.model):
            module.set_reshard_after_forward(False, recurse=False)
            module.set_reshard_after_backward(False, recurse=False)
            module.unshard()
        self._set_last(False)
        # Before FSDP2's own hook: what is queued for the end of the backward pass then comes before FSDP2's end.
        watch = self.model.register_forward_hook(self._watch, prepend=True)
        try:
            terms = self.loss(self.model, x, y, draw)
        finally:
            watch.remove()
            self._set_last(self._synchronise)
        return terms

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        self._synchronise = False
        try:
            yield
        finally:
            self._synchronise = True

    def _set_last(self, last: bool) -> None:
        self._last = last
        self.model.set_is_last_backward(last)  # type: ignore[operator]
        self.model.set_requires_gradient_sync(last)  # type: ignore[operator]

    def _watch(self, model: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(self._on_backward)

    def _on_backward(self, grad: Tensor) -> None:
        """A backward pass has begun; if it is the last, its end has work to do."""
        if self._last:
            self._last = False
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)

    def _finish(self) -> None:
        for module in sharded_modules(self.model):
            state = module._get_fsdp_state()
            for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]:
                if group is not None:
                    group.post_backward()  # nothing, where no gradient is left
            module.reshard()
