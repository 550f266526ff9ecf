"""Finds and loads the compiled extensions.  Importing this never fails; it remembers why something is missing."""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType

import torch


def _load(name: str) -> tuple[ModuleType | None, str | None]:
    try:
        module = importlib.import_module(f"robustkern.{name}")
    except ModuleNotFoundError:
        return None, f"robustkern.{name} is not built; build it with: pip install --no-build-isolation -e ."
    except ImportError as error:  # built for another PyTorch, Python or machine
        return None, f"robustkern.{name} is built but does not load with PyTorch {torch.__version__}: {error}"
    return module, None


# Loaded once, at import: the operators must exist before anything is traced or differentiated.
_C, _C_MISSING = _load("_C")
_ATEN, _ATEN_MISSING = _load("_aten") if _C is not None else (None, _C_MISSING)
_CUDA, _CUDA_MISSING = _load("_cuda") if _C is not None else (None, _C_MISSING)


def extension() -> ModuleType | None:
    """The module robustkern._C (schemas and CPU kernels), or None."""
    return _C


def cuda_extension() -> ModuleType | None:
    """The module robustkern._cuda (CUDA kernels), or None."""
    return _CUDA


def why_unavailable() -> str | None:
    """Why robustkern._C is missing; None if it is loaded."""
    return _C_MISSING


def aten_extension() -> ModuleType | None:
    """The module robustkern._aten (replacements for PyTorch's second derivatives), or None."""
    return _ATEN


def aten_why_unavailable() -> str | None:
    """Why robustkern._aten is missing; None if it is loaded."""
    return _ATEN_MISSING


def cuda_why_unavailable() -> str | None:
    """Why CUDA tensors have no kernels; None if they have."""
    if _CUDA_MISSING is None and torch.version.cuda is None:
        return "this PyTorch was built without CUDA"
    return _CUDA_MISSING


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
