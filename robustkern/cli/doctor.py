"""What `robustkern info` says about this installation, judged: what is fine, and what to do about what is not.

Needs nothing but Python and PyTorch, so that it works where everything else does not.
"""

import importlib.util
import os
import sys
from collections.abc import Iterator
from typing import NamedTuple

from robustkern._packages import pip_install

_OLDEST = (2, 10)  # PyTorch with the stable ABI that the kernels use
_PACKAGES = {
    "the command line": ("typer", "rich", "matplotlib", "sklearn", "safetensors", "yaml"),
    "AutoAttack in `robustkern evaluate`": ("pyautoattack",),
    "images in folders": ("PIL",),
    "networks of timm": ("timm",),
    "curves in TensorBoard": ("tensorboard",),
}


class Finding(NamedTuple):
    """One thing that was looked at."""

    name: str
    fine: bool
    says: str
    advice: str = ""  # what to do about it, if it is not fine
    needed: bool = True  # whether robustkern is less than whole without it


def examine() -> Iterator[Finding]:
    """Everything that is looked at, most important first."""
    import torch

    from robustkern import _library
    from robustkern.double_backward import replaced_operators

    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    yield Finding(
        "PyTorch", release >= _OLDEST, torch.__version__, f"install PyTorch {'.'.join(map(str, _OLDEST))} or newer"
    )
    yield _extension("robustkern._C", "kernels for the CPU", _library.why_unavailable())
    replaced = len(replaced_operators("cpu"))
    yield _extension("robustkern._aten", f"install() replaces {replaced} operators", _library.aten_why_unavailable())
    yield from _gpus()
    yield _vectors()
    for purpose, modules in _PACKAGES.items():
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        yield Finding(
            purpose, not missing, "installed" if not missing else "not installed", pip_install(*missing), False
        )


def _extension(name: str, serves: str, missing: str | None) -> Finding:
    if missing is None:
        return Finding(name, True, serves)
    reason, _, command = missing.partition("it with: ")
    return Finding(name, False, reason.removesuffix("; rebuild ").removesuffix("; build "), command or "build it again")


def _gpus() -> Iterator[Finding]:
    import torch

    from robustkern import _library

    if not torch.cuda.is_available():
        yield Finding("GPU", True, "none that PyTorch can use: nothing is missing")
        return
    missing = _library.cuda_why_unavailable()
    yield _extension("robustkern._cuda", f"kernels for {', '.join(_library.architectures())}", missing)
    for index in range(torch.cuda.device_count() if missing is None else 0):
        yield _extension(torch.cuda.get_device_name(index), "has kernels", _library.why_no_image(index))


def _vectors() -> Finding:
    import torch

    level = torch.backends.cpu.get_cpu_capability()
    fast = level in ("AVX2", "AVX512")
    limited = os.environ.get("ATEN_CPU_CAPABILITY")
    advice = "unset ATEN_CPU_CAPABILITY" if limited else "a processor with AVX2 is several times as fast"
    return Finding("vectors", fast, f"PyTorch and the kernels use {level}", advice, False)


def doctor_command() -> None:
    """Say what is missing or does not fit here, and what to do about it."""
    sys.exit(run([]))


def run(arguments: list[str]) -> int:
    """Print the findings; returns the exit status: 1 if something needed is missing."""
    if arguments:
        print(f"robustkern doctor takes no arguments, got {' '.join(arguments)}", file=sys.stderr)
        return 2
    findings = list(examine())
    for finding in findings:
        mark = "ok     " if finding.fine else "MISSING" if finding.needed else "without"
        print(f"{mark}  {finding.name}: {finding.says}")
        if not finding.fine:
            print(f"         do: {finding.advice}")
    whole = all(finding.fine for finding in findings if finding.needed)
    print("Everything that robustkern needs is here." if whole else "Something that robustkern needs is missing.")
    return 0 if whole else 1
