"""How an operator is differentiated: by the next one of its chain, whose arguments say what it takes.

    row_norm(x, ...) -> row_norm_backward(grad, x, norm, ...) -> row_norm_double_backward(u, grad, x, norm, ...)

An argument of the next operator is, in this order: the argument of the same name; for `grad`, `u` and `v` the next
cotangent of the results; for `need_<name>` whether that gradient is asked for; and otherwise the last result (`norm`,
`statistics`, `slopes`).  Its results are the gradients of the first arguments; one that is identically zero, or that is
not asked for, is [0].  Results beyond the cotangents have no derivative.

`robustkern._aten` does this in C++ (csrc/aten/chains.cpp).  Where it does not load, as it serves one version of PyTorch
alone, torch.library's formulas in Python do, at a tenth of a millisecond a call.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from robustkern import _library

ARGUMENT, COTANGENT, IS_NEEDED, LAST_RESULT = "ARGUMENT", "COTANGENT", "IS_NEEDED", "LAST_RESULT"
_COTANGENTS = ("grad", "u", "v")
_ORDERS = ("first", "second", "third")


class Link(NamedTuple):
    """What differentiates `op`; see csrc/aten/chains.h."""

    op: Any  # torch._ops.OpOverload
    next: Any
    sources: list[tuple[str, int]]
    inputs: list[int]
    flags: list[int]
    only: tuple[int, int] | None


def register_chain(name: str, only: tuple[str, int] | None = None) -> None:
    """Registers the derivatives of robustkern::`name`, and that the last operator of its chain has none.

    Args:
        name: the operator that gives the value.
        only: an argument of it and the one value of it for which the results depend on the inputs.
    """
    ops = torch.ops.robustkern
    chain = [getattr(ops, name + order).default for order in ("", "_backward", "_double_backward") if has(name + order)]
    for op, following in pairwise(chain):
        differentiate(link(op, following, only))
        only = None
    order = _ORDERS[len(chain) - 1]
    refuse_derivatives(chain[-1], f"{order}-order derivatives are not supported; use impl='reference'")


def has(name: str) -> bool:
    return hasattr(torch.ops.robustkern, name)


def link(op: Any, following: Any, only: tuple[str, int] | None = None) -> Link:
    """What the names of two operators' arguments say."""
    names = [argument.name for argument in op._schema.arguments]
    needed: list[str] = []
    sources: list[tuple[str, int]] = []
    cotangents = 0
    for argument in following._schema.arguments:
        if argument.name.startswith("need_"):
            sources.append((IS_NEEDED, len(needed)))
            needed.append(argument.name)
        elif argument.name in names:
            sources.append((ARGUMENT, names.index(argument.name)))
        elif argument.name in _COTANGENTS:
            sources.append((COTANGENT, cotangents))
            cotangents += 1
        else:
            sources.append((LAST_RESULT, 0))
    inputs = list(range(len(following._schema.returns)))
    unasked = len(inputs) - len(needed)  # gg_grad, the first result of a double backward, is always computed
    sources = [(kind, i + unasked) if kind == IS_NEEDED else (kind, i) for kind, i in sources]
    flags = [i for i, given in enumerate(names) if given.startswith("need_")]
    return Link(op, following, sources, inputs, flags, None if only is None else (names.index(only[0]), only[1]))


def differentiate(formula: Link) -> None:
    extension = _library.aten_extension()
    if extension is None:
        _differentiate_in_python(formula)
        return
    op, following, *rest = formula
    extension.differentiate(op._schema.name, following._schema.name, *rest)


def refuse_derivatives(op: Any, why: str) -> None:
    """Makes differentiating an operator an error rather than a zero."""
    message = f"{op._schema.name.replace('::', '.')}: {why}"
    extension = _library.aten_extension()
    if extension is not None:
        extension.refuse_derivatives(op._schema.name, message)
        return

    def backward(ctx: Any, *cotangents: Any) -> Any:
        raise RuntimeError(message)

    torch.library.register_autograd(op, backward)


def _differentiate_in_python(formula: Link) -> None:
    op, following, sources, inputs, flags, only = formula
    cotangents_taken = sum(kind == COTANGENT for kind, _ in sources)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        results = output if isinstance(output, tuple) else (output,)
        kept = [inputs[i] if kind == ARGUMENT else results[-1] if kind == LAST_RESULT else None for kind, i in sources]
        ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in kept))
        ctx.options = [None if isinstance(value, Tensor) else value for value in kept]
        ctx.vectors = [isinstance(value, Tensor) and value.dim() == 1 for value in inputs]
        ctx.constant = only is not None and inputs[only[0]] != only[1]
        absent = [result for result, flag in zip(results, flags) if not inputs[flag]]
        ctx.mark_non_differentiable(*results[cotangents_taken:], *absent)
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = [None] * len(op._schema.arguments)
        if ctx.constant or all(cotangent is None for cotangent in cotangents[:cotangents_taken]):
            return tuple(grads)
        arguments: list[Any] = []
        for (kind, i), saved, option in zip(sources, ctx.saved_tensors, ctx.options):
            if kind == COTANGENT:
                arguments.append(cotangents[i])
            elif kind == IS_NEEDED:
                arguments.append(ctx.needs_input_grad[inputs[i]])
            elif kind == LAST_RESULT:
                # A number here: the next formula differentiates it as the function of the inputs that it is.
                arguments.append(saved.detach())
            else:
                arguments.append(option if saved is None else saved)
        results = following(*arguments)
        for i, grad in zip(inputs, results if isinstance(results, tuple) else (results,)):
            if ctx.needs_input_grad[i] and (grad.dim() != 1 or ctx.vectors[i]):
                grads[i] = grad
        return tuple(grads)

    torch.library.register_autograd(op, backward, setup_context=setup_context)
