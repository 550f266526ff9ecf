"""What a bug report needs: versions, machine, and which extensions loaded, or why not.

Needs nothing but Python and PyTorch, so that it works where everything else does not.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata

_PACKAGES = ("numpy", "typer", "rich", "matplotlib", "scikit-learn", "safetensors")


def collect() -> dict[str, str]:
    """Facts about this installation, in the order in which they are shown."""
    import torch

    facts = {
        "robustkern": _version("robustkern"),
        "python": f"{platform.python_version()} ({platform.python_implementation()}, {sys.executable})",
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})",
    }
    facts.update({name: _version(name) for name in _PACKAGES})
    facts["compiler"] = _compiler()
    facts["nvcc"] = _nvcc()
    facts["system"] = f"{platform.platform()} ({_os_release()})"
    cpu = _cpu_field("model name") or platform.processor() or platform.machine()
    facts["cpu"] = f"{cpu}, {os.cpu_count()} logical cores, {torch.get_num_threads()} threads"
    facts["vectors"] = f"{_vector_level()} (PyTorch uses {torch.backends.cpu.get_cpu_capability()})"
    facts["gpu"] = _gpus()
    facts.update(_extensions())
    return facts


def info_command() -> None:
    """Print versions, machine and extensions: what a bug report needs."""
    run([])


def run(arguments: list[str]) -> int:
    """Print the facts; returns the exit status."""
    if arguments:
        print(f"robustkern info takes no arguments, got {' '.join(arguments)}", file=sys.stderr)
        return 2
    facts = collect()
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")
    return 0


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _extensions() -> dict[str, str]:
    from robustkern import _library

    extension = _library.extension()
    facts = {"robustkern._C": "loaded" if extension is not None else f"not loaded: {_library.why_unavailable()}"}
    if extension is not None and hasattr(extension, "build_info"):
        facts["  built with"] = ", ".join(f"{key} {value}" for key, value in extension.build_info().items())
    why_not = _library.cuda_why_unavailable()
    facts["robustkern._cuda"] = "loaded" if why_not is None else f"not loaded: {why_not}"
    if why_not is None:
        facts["  built for"] = ", ".join(_library.architectures())
    why_none = _library.aten_why_unavailable()
    facts["robustkern._aten"] = "loaded" if why_none is None else f"not loaded: {why_none}"
    facts.update(_replaced())
    return facts


def _replaced() -> dict[str, str]:
    """The operators whose second derivatives `robustkern.install()` replaces on each device, and why others are not."""
    from robustkern import _library
    from robustkern.double_backward import replaced_operators

    on_cpu, on_cuda = replaced_operators("cpu"), replaced_operators("cuda")
    # Matrix products are replaced because of MKL on some CPUs: on CUDA there is nothing to gain.
    left = [name for name in on_cpu if name not in on_cuda and name != "aten::mm"]
    facts = {"install() on cpu": _names(on_cpu), "install() on cuda": _names(on_cuda)}
    if left:
        facts["  not on cuda"] = f"{_names(left)}: {_library.cuda_why_unavailable()}"
    return facts


def _names(operators: list[str]) -> str:
    return ", ".join(name.removeprefix("aten::") for name in operators) or "nothing"


def _compiler() -> str:
    for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        path = shutil.which(name) if name else None
        if path:
            return f"{_first_line([path, '--version'])} ({path})"
    return "none found"


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    path = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(home, "bin"))
    if path is None:
        return "none found"
    return f"{_first_line([path, '--version'], containing='release')} ({path})"


def _first_line(command: list[str], containing: str = "") -> str:
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"does not run: {error}"
    return next((line.strip() for line in output.splitlines() if containing in line), "unknown version")


def _os_release() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "unknown distribution")
    except OSError:
        return platform.system()


def _cpu_field(name: str) -> str:
    try:
        with open("/proc/cpuinfo") as file:
            match = re.search(rf"^{name}\s*:\s*(.*)$", file.read(), re.MULTILINE)
    except OSError:
        return ""
    return match.group(1) if match else ""


def _vector_level() -> str:
    flags = set(_cpu_field("flags").split())
    if not flags:
        return f"{platform.machine()}, unknown"
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
        return "AVX-512"
    return "AVX2" if {"avx2", "fma"} <= flags else "below AVX2"


def _gpus() -> str:
    import torch

    from robustkern import _library

    if not torch.cuda.is_available():
        return "none that PyTorch can use"
    names = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        missing = _library.why_no_image(index) if _library.cuda_extension() is not None else None
        names.append(f"{properties.name} (sm_{properties.major}{properties.minor}, {memory:.0f} GiB)")
        if missing is not None:
            names[-1] += f", PyTorch's own derivatives: {missing}"
    return ", ".join(names)
