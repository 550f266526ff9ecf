"""J^T w, the gradient of outputs with respect to inputs, checked: wrong use raises and never gives a silent zero."""

import sys

import torch
from torch import Tensor

from robustkern._graph import graph_nodes


def check_tensors(function: str, x: Tensor, **outputs: Tensor) -> None:
    """Raises unless all are floating-point tensors and x requires grad.

    Args:
        function: the public function, for messages.
        x: the inputs.
        outputs: what was computed from them, by the name of the argument.
    """
    for name, value in (*outputs.items(), ("x", x)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{function}: {name} must be a tensor, got {type(value).__name__}")
        if not value.is_floating_point():
            raise TypeError(f"{function}: {name} must be a floating-point tensor, got {value.dtype}")
    if not x.requires_grad:
        raise ValueError(f"{function}: x does not require grad: call x.requires_grad_() before the forward pass")


def check_graph(function: str, name: str, outputs: Tensor) -> None:
    """Raises unless the outputs have a graph."""
    if not outputs.requires_grad:
        raise ValueError(
            f"{function}: {name} has no graph: it was computed under torch.no_grad() or detached, so it does not "
            "depend on x"
        )


def check_outputs(function: str, outputs: Tensor, x: Tensor) -> None:
    """Raises unless outputs are [B, C] or [B, C, ...] with the B of x, and have a graph."""
    check_tensors(function, x, outputs=outputs)
    if x.dim() == 0 or outputs.dim() < 2 or outputs.shape[0] != x.shape[0]:
        raise ValueError(
            f"{function}: outputs must be [B, C] or [B, C, ...] with B = {x.shape[0] if x.dim() else 1} for x of "
            f"shape {list(x.shape)}, got {list(outputs.shape)}"
        )
    if outputs.shape[1:].numel() == 0:
        raise ValueError(f"{function}: outputs of shape {list(outputs.shape)} have no entries to differentiate")
    check_graph(function, "outputs", outputs)


def input_gradient(
    function: str, name: str, outputs: Tensor, x: Tensor, cotangent: Tensor | None = None, *, create_graph: bool
) -> Tensor:
    """J^T w, of the shape of x; the graph of the outputs is kept.

    Args:
        function: the public function, for messages.
        name: its name for the outputs.
        outputs: computed from x.
        x: the inputs.
        cotangent: w, of the shape of the outputs; None for a scalar's 1.
        create_graph: whether the result is to be differentiated.
    """
    (grad,) = torch.autograd.grad(
        outputs, x, cotangent, create_graph=create_graph, retain_graph=True, allow_unused=True
    )
    return depends(function, name, grad)


def depends(function: str, name: str, grad: Tensor | None) -> Tensor:
    """The gradient of `name` in x; raises where there is none."""
    if grad is None:
        raise ValueError(
            f"{function}: {name} does not depend on x: compute it from this very tensor, after x.requires_grad_(), "
            "without detach()"
        )
    return grad


def check_differentiable(function: str, name: str, grad: Tensor) -> None:
    """Raises unless the gradient's own graph leads back to parameters or inputs."""
    if torch.compiler.is_compiling():
        return
    if not grad.requires_grad:
        raise ValueError(
            f"{function}: the input gradient has no graph, so a penalty on it would train nothing: {name} is "
            "linear in x with frozen parameters, or part of the model is detached; pass create_graph=False to "
            "measure the norm only"
        )
    if "torch._dynamo" not in sys.modules:  # nothing can have been compiled
        return
    for node in graph_nodes(grad):
        if "CompiledFunction" in node.name():
            raise RuntimeError(
                f"{function}: the model was compiled from outside, and a compiled backward cannot be differentiated "
                "again: compile the whole penalised step instead, with torch._dynamo.config.trace_autograd_ops = True, "
                "or leave the model uncompiled"
            )
