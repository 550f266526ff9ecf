"""Finds and loads the compiled extensions.  Importing this never fails; it remembers why something is missing."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import warnings
from pathlib import Path
from types import ModuleType

import torch

BUILD = "pip install --no-build-isolation --no-deps -e . (in robustkern's source folder)"


def _load(name: str) -> tuple[ModuleType | None, str | None]:
    try:
        module = importlib.import_module(f"robustkern.{name}")
    except ModuleNotFoundError:
        return None, f"robustkern.{name} is not built; build it with: {BUILD}"
    except ImportError as error:  # built for another PyTorch, Python or machine
        return None, (
            f"robustkern.{name} is built but does not load with PyTorch {torch.__version__}: {error}; "
            f"rebuild it with: {BUILD}"
        )
    return module, None


def _load_aten() -> tuple[ModuleType | None, str | None]:
    """Like _load, but loads nothing that was built with another PyTorch: it uses PyTorch's C++ classes, whose layout
    and symbols change from version to version, and would crash rather than fail."""
    found = importlib.util.find_spec("robustkern._aten")
    if found is None or found.origin is None:
        return _load("_aten")
    mark = re.search(rb"robustkern\._aten built with PyTorch ([^\0]+)\0", Path(found.origin).read_bytes())
    built_with = mark[1].decode() if mark else "of unknown version"
    module, error = None, None
    if _release(built_with) == _release(torch.__version__):
        try:
            module = importlib.import_module("robustkern._aten")
        except ImportError as failed:
            error = failed
    return module, None if module else (
        f"robustkern._aten was built with PyTorch {built_with} and does not load with PyTorch {torch.__version__}"
        f"{f' ({error})' if error else ''}; rebuild it with: {BUILD}"
    )


def _release(version: str) -> str:
    """The version without its local part: builds for the CPU and for CUDA of one version share their C++ classes."""
    return version.split("+")[0]


# Loaded once, at import: the operators must exist before anything is traced or differentiated.
_C, _C_MISSING = _load("_C")
_ATEN, _ATEN_MISSING = _load_aten() if _C is not None else (None, _C_MISSING)
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
