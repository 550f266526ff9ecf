"""Which implementation serves a call: the kernel or the reference."""

import torch
from torch.autograd import forward_ad

from robustkern import _library
from robustkern._choices import IMPLS
from robustkern._dtypes import DTYPES


def check_floating(op: str, name: str, tensor: torch.Tensor) -> None:
    """Raises TypeError unless the tensor has one of the four floating-point dtypes that kernels store."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{op}: {name} must be float32, float64, float16 or bfloat16, got {tensor.dtype}")


def _composite_only() -> str | None:
    """Why only the reference will do: a transform differentiates through its formula.  None if none does."""
    if torch.compiler.is_compiling():
        return None
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation needs the reference"
    stack = torch._C._functorch.get_interpreter_stack()
    if stack and any(i.key() != torch._C._functorch.TransformType.Vmap for i in stack):
        return "torch.func.grad, vjp and jvp need the reference"
    return None


def use_kernel(op: str, impl: str, tensor: torch.Tensor, unsupported: str | None = None) -> bool:
    """True for the kernel, False for the reference.

    Args:
        op: name of the operator, for messages.
        impl: "auto" takes the kernel if it can and warns once if not; "kernel" requires it; "reference" avoids it.
        tensor: the argument whose device decides.
        unsupported: why this particular call has no kernel, if it has none.

    Raises:
        ValueError: `impl` is none of the three.
        RuntimeError: `impl` is "kernel" and there is none.
    """
    if impl == "reference":
        return False
    if impl not in IMPLS:
        raise ValueError(f"{op}: impl must be 'auto', 'kernel' or 'reference', got {impl!r}")
    missing = _library.why_no_kernel(tensor)
    reason = missing or unsupported or _composite_only()
    if reason is None:
        return True
    if impl == "kernel":
        raise RuntimeError(f"{op}: impl='kernel' is not possible: {reason}")
    if missing is not None and not torch.compiler.is_compiling():
        _library.warn_once(f"robustkern runs in plain PyTorch: {missing}")
    return False
