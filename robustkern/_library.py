"""Finds and loads the compiled extensions.  Importing this never fails; it records why one is missing."""

import functools
import importlib
import importlib.util
import re
import sys
import warnings
from importlib.machinery import ModuleSpec
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
        if runtime := re.search(r"libcudart\.so[.\d]*", str(error)):
            return None, (
                f"robustkern.{name} needs {runtime[0]}, the CUDA runtime of its toolkit, which PyTorch "
                f"{torch.__version__} does not bring: install a PyTorch for this CUDA, or rebuild it with: {BUILD}"
            )
        return None, (
            f"robustkern.{name} is built but does not load with PyTorch {torch.__version__}: {error}; "
            f"rebuild it with: {BUILD}"
        )
    return module, None


def _load_aten() -> tuple[ModuleType | None, str | None]:
    """Like _load, but loads nothing that was built with another PyTorch: _aten uses PyTorch's C++ classes, whose layout
    and symbols change from version to version, so a mismatch would crash instead of raising an error."""
    release = _release(torch.__version__)
    several = {path.name.split(".")[0].removeprefix("_aten_").replace("_", "."): path for path in _several_aten()}
    if several and release not in several:
        versions = ", ".join(sorted(several, key=lambda version: [int(part) for part in version.split(".")]))
        return None, (
            f"this robustkern was built for PyTorch {versions}, not for {torch.__version__}: install one of those, or "
            f"build it with: {BUILD}"
        )
    found = importlib.util.find_spec("robustkern._aten")
    if several:
        found = importlib.util.spec_from_file_location("robustkern._aten", several[release])
    if found is None or found.origin is None:
        return _load("_aten")
    mark = re.search(rb"robustkern\._aten built with PyTorch ([^\0]+)\0", Path(found.origin).read_bytes())
    built_with = mark[1].decode() if mark else "of unknown version"
    module, error = None, None
    if _release(built_with) == release:
        try:
            module = _load_from(found) if several else importlib.import_module("robustkern._aten")
        except ImportError as failed:
            error = failed
    return module, None if module else (
        f"robustkern._aten was built with PyTorch {built_with} and does not load with PyTorch {torch.__version__}"
        f"{f' ({error})' if error else ''}; rebuild it with: {BUILD}"
    )


def _several_aten() -> list[Path]:
    """The files of a wheel, which holds one for each PyTorch: _aten_2_13_0.abi3.so."""
    return list(Path(__file__).parent.glob("_aten_*.so"))


def _load_from(spec: ModuleSpec) -> ModuleType:
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    sys.modules[spec.name] = module
    return module


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


def architectures() -> tuple[str, ...]:
    """The architectures that robustkern._cuda holds code for: images such as "sm_90", and PTX such as "compute_120"."""
    return tuple(getattr(_CUDA, "architectures", "").split())


def why_no_image(index: int) -> str | None:
    """Why robustkern._cuda, which is loaded, cannot run on the CUDA device of this index; None if it can."""
    gpu = torch.cuda.get_device_properties(index)
    if any(_runs_on(architecture, gpu.major, gpu.minor) for architecture in architectures()):
        return None
    return (
        f"robustkern._cuda holds code for {', '.join(architectures())}, none of which runs on {gpu.name} "
        f"(sm_{gpu.major}{gpu.minor}); rebuild it with: TORCH_CUDA_ARCH_LIST={gpu.major}.{gpu.minor} {BUILD}"
    )


def _runs_on(architecture: str, major: int, minor: int) -> bool:
    """Whether a GPU runs this code: an image of the GPU's major version, or PTX, if it is not newer than the GPU."""
    code, number, specific = re.fullmatch(r"(sm|compute)_(\d+)([af]?)", architecture).groups()  # type: ignore[union-attr]
    built_for = divmod(int(number), 10)
    if specific == "a":
        return built_for == (major, minor)
    return built_for <= (major, minor) and (built_for[0] == major or (code == "compute" and not specific))


def runs_on_cuda(index: int) -> bool:
    """Whether the kernels run on the CUDA device of this index; warns once if not.  robustkern._aten calls it."""
    missing = why_no_image(index)
    if missing is not None:
        warn_once(f"robustkern leaves PyTorch's own derivatives on cuda:{index}: {missing}")
    return missing is None


def why_no_kernel(tensor: torch.Tensor) -> str | None:
    """Why there is no kernel for this tensor's device; None if there is one."""
    kind = tensor.device.type
    if kind == "cuda":
        missing = cuda_why_unavailable()
        # Without a GPU, a CUDA tensor can only be a fake one.
        return why_no_image(tensor.get_device()) if missing is None and torch.cuda.is_available() else missing
    if kind in ("cpu", "meta"):
        return why_unavailable()
    return f"robustkern has no kernels for {kind} tensors"


@functools.cache
def warn_once(message: str) -> None:
    """Warns the first time it is called with this message."""
    warnings.warn(message, stacklevel=4)
