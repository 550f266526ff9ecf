"""Finds and loads the compiled extensions.  Importing this module never fails; it remembers why something is missing."""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType

import torch


@functools.cache
def _load(name: str) -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module(f"robustkern.{name}"), None
    except ModuleNotFoundError:
        return None, f"robustkern.{name} is not built; build it with: pip install --no-build-isolation -e ."
    except ImportError as error:  # built for another PyTorch, Python or machine
        return None, f"robustkern.{name} is built but does not load with PyTorch {torch.__version__}: {error}"


def extension() -> ModuleType | None:
    """The module robustkern._C (schemas and CPU kernels), or None."""
    return _load("_C")[0]


def cuda_extension() -> ModuleType | None:
    """The module robustkern._cuda (CUDA kernels), or None."""
    return _load("_cuda")[0] if extension() is not None else None


def why_unavailable() -> str | None:
    """Why robustkern._C is missing; None if it is loaded."""
    return _load("_C")[1]


def cuda_why_unavailable() -> str | None:
    """Why CUDA tensors have no kernels; None if they have."""
    reason = why_unavailable() or _load("_cuda")[1]
    if reason is None and torch.version.cuda is None:
        return "this PyTorch was built without CUDA"
    return reason


def why_no_kernel(tensor: torch.Tensor) -> str | None:
    """Why there is no kernel for this tensor's device; None if there is one."""
    kind = tensor.device.type
    if kind == "cuda":
        return cuda_why_unavailable()
    if kind in ("cpu", "meta"):
        return why_unavailable()
    return f"robustkern has no kernels for {kind} tensors"


@functools.cache
def warn_once(message: str) -> None:
    """Warns the first time it is called with this message."""
    warnings.warn(message, stacklevel=4)
