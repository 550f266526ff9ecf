"""The three compiled extensions; everything else about the package is in pyproject.toml.

robustkern._C     operator schemas and CPU kernels, always built
robustkern._aten  second derivatives for PyTorch's own operators, always built; serves the PyTorch it was built with
robustkern._cuda  CUDA kernels: built when nvcc is found and PyTorch has CUDA; ROBUSTKERN_CUDA=1 insists, =0 leaves it
                  out; TORCH_CUDA_ARCH_LIST chooses the GPUs

Each uses Python's limited API alone: one binary serves every Python from 3.10 on.  Nothing is compiled for an sdist,
which therefore needs no PyTorch.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    torch, missing = None, str(error)

VERSION = re.search(r'"(.+?)"', Path("robustkern/_version.py").read_text().split("__version__")[1])[1]
# An image runs on its GPU and on later ones of the same major version, PTX on any later one; 7.5 is the oldest that the
# kernels are written for.  The images are assembled from the PTX of 8.0: no kernel uses what came after it, and nvcc
# compiles once instead of four times.
CUDA_IMAGES = ["80", "90", "100", "120"]
CUDA_PTX = ["75", "80"]

DEFINES = [
    # Kernels use PyTorch's stable ABI as of 2.10: one binary serves every later version.
    ("TORCH_TARGET_VERSION", "0x020a000000000000ull"),
    ("RK_VERSION", f'"{VERSION}"'),
]
BUILT_WITH = [("RK_TORCH_VERSION", f'"{torch.__version__}"')] if torch else []
# Neither changes a value: they let the compiler vectorise comparisons and square roots, whose exception flags
# nobody reads.
VALUE_SAFE = ["-fno-math-errno", "-fno-trapping-math"]
DEBUG = os.environ.get("ROBUSTKERN_DEBUG") == "1"
CXX_FLAGS = [
    "-std=c++20",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",  # vectors are passed only between functions that are inlined
    "-fvisibility=hidden",
    *(f"-isystem{path}" for path in (cpp_extension.include_paths() if torch else [])),  # whose warnings are not ours
    *VALUE_SAFE,
    *(["-O0", "-g"] if DEBUG else ["-O3", "-g0"]),
]


# csrc/glibc.cpp says what for.
LINK_FLAGS = ["-Wl,--wrap=log", "-Wl,--wrap=pow"] if sys.platform == "linux" and platform.machine() == "x86_64" else []


def sources(pattern: str) -> list[str]:
    return sorted(str(path) for path in Path("csrc").glob(pattern))


def find_cuda() -> Path | None:
    """The CUDA toolkit: $CUDA_HOME, or the folder above nvcc."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home and (Path(home) / "bin" / "nvcc").exists():
        return Path(home)
    for toolkit in (Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"), reverse=True)):
        if (toolkit / "bin" / "nvcc").exists():
            return toolkit
    nvcc = shutil.which("nvcc")
    return Path(nvcc).resolve().parent.parent if nvcc else None


def shared_runtime(cuda: Path) -> tuple[Path, str]:
    """The folder of the toolkit's shared runtime, and its name for the linker.

    The one that PyTorch has loaded serves us too, as its soname is the same: with a second, static one, errors and
    devices would have two truths.  A toolkit of pip packages has it without the link that developers use.
    """
    for folder in (cuda / "lib64", cuda / "lib"):
        if (folder / "libcudart.so").exists():
            return folder, "cudart"
        if versions := sorted(path.name for path in folder.glob("libcudart.so.*")):
            return folder, f":{versions[0]}"  # the shortest: libcudart.so.13 before libcudart.so.13.0.96
    raise SystemExit(f"the CUDA toolkit in {cuda} has no libcudart.so: install its runtime (nvidia-cuda-runtime), too")


def architecture_flags(cuda: Path) -> list[str]:
    """nvcc's flags for $TORCH_CUDA_ARCH_LIST; by default for what it knows of CUDA_IMAGES and CUDA_PTX."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return cpp_extension._get_cuda_arch_flags()
    listed = subprocess.run([cuda / "bin" / "nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True)
    known = {line.removeprefix("compute_") for line in listed.stdout.split()}
    if lacking := [f"sm_{number}" for number in CUDA_IMAGES if number not in known]:
        print(f"robustkern: this nvcc does not know {', '.join(lacking)}", file=sys.stderr)
    return [
        *(f"-gencode=arch=compute_80,code=sm_{number}" for number in CUDA_IMAGES if number in known),
        *(f"-gencode=arch=compute_{number},code=compute_{number}" for number in CUDA_PTX if number in known),
    ]


def cuda_extension() -> Extension | None:
    """robustkern._cuda, or None; says on stderr which, and why."""
    wish, cuda = os.environ.get("ROBUSTKERN_CUDA", "auto"), find_cuda()
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"ROBUSTKERN_CUDA must be auto, 0 or 1, got {wish!r}")
    if wish == "1" and cuda is None:
        raise SystemExit("ROBUSTKERN_CUDA=1, but nvcc was not found: install the CUDA toolkit or set CUDA_HOME to it")
    if wish == "0" or cuda is None or (wish == "auto" and torch.version.cuda is None):
        why = "ROBUSTKERN_CUDA=0" if wish == "0" else "no nvcc" if cuda is None else "this PyTorch has no CUDA"
        print(f"robustkern: building without CUDA kernels ({why})", file=sys.stderr)
        return None
    print(f"robustkern: building CUDA kernels with {cuda}/bin/nvcc", file=sys.stderr)
    cpp_extension.CUDA_HOME = str(cuda)  # a PyTorch without CUDA leaves it empty
    flags = architecture_flags(cuda)
    built_for = " ".join(re.findall(r",code=(\w+)", " ".join(flags)))
    runtime, name = shared_runtime(cuda)
    return Extension(
        "robustkern._cuda",
        ["csrc/cuda/module.cpp", "csrc/glibc.cpp", *sources("cuda/*.cu")],
        include_dirs=[*cpp_extension.include_paths(), str(cuda / "include")],
        library_dirs=[*cpp_extension.library_paths(), str(runtime)],
        # A PyTorch without CUDA has loaded none.
        runtime_library_dirs=[] if torch.version.cuda else [str(runtime)],
        libraries=["c10", "torch", "torch_cpu", name, "dl"],
        define_macros=[*DEFINES, ("USE_CUDA", None), ("RK_CUDA_ARCHITECTURES", f'"{built_for}"')],
        extra_link_args=LINK_FLAGS,
        py_limited_api=True,
        extra_compile_args={
            "cxx": CXX_FLAGS,
            "nvcc": ["-std=c++20", "-O3", "-lineinfo", "-Xptxas=--warn-on-spills", "--threads=2", *flags],
        },
        language="c++",
    )


def extensions() -> list[Extension]:
    """Every extension that can be built here."""
    cpu = cpp_extension.CppExtension(
        "robustkern._C",
        ["csrc/ops.cpp", "csrc/bindings.cpp", "csrc/glibc.cpp", *sources("cpu/*.cpp")],
        define_macros=[*DEFINES, *BUILT_WITH],
        extra_compile_args={"cxx": CXX_FLAGS},
        extra_link_args=LINK_FLAGS,
        py_limited_api=True,
    )
    aten = cpp_extension.CppExtension(
        "robustkern._aten",
        ["csrc/glibc.cpp", *sources("aten/**/*.cpp")],
        define_macros=BUILT_WITH,
        extra_compile_args={"cxx": [*CXX_FLAGS]},
        libraries=["torch_python"],  # which hands over tensors; CppExtension leaves it out for the limited API
        extra_link_args=LINK_FLAGS,
        py_limited_api=True,
    )
    return [extension for extension in (cpu, aten, cuda_extension()) if extension]


def knows_precompiled_headers() -> bool:
    """Whether the compiler is gcc or clang, on Linux."""
    if sys.platform != "linux":
        return False
    asked = subprocess.run([*shlex.split(os.environ.get("CXX", "c++")), "--version"], capture_output=True, text=True)
    return "Free Software Foundation" in asked.stdout or "clang" in asked.stdout


class WithoutPyTorch(build_ext):
    """Refuses to compile, which an sdist does not need."""

    def run(self) -> None:
        raise SystemExit(
            f"robustkern is compiled against the PyTorch that it will run with ({missing}): install torch>=2.10, ninja "
            "and numpy, then run: pip install --no-build-isolation -e ."
        )


if torch:

    class WithPyTorch(cpp_extension.BuildExtension):
        """Compiles PyTorch's headers, which take most of the time, once for all files of `robustkern._aten`."""

        def build_extension(self, extension: Extension) -> None:
            if extension.name == "robustkern._aten" and self.use_ninja and knows_precompiled_headers():
                header = self.precompile("csrc/aten/precompiled.h", extension)
                extension.extra_compile_args["cxx"] += ["-Winvalid-pch", "-include", header]
            super().build_extension(extension)

        def precompile(self, header: str, extension: Extension) -> str:
            """Compiles a header with the flags of the extension's sources, which it must match; returns its path."""
            compiler, names = self.compiler, (self.compiler.src_extensions, self.compiler.obj_extension)
            compiler.src_extensions, compiler.obj_extension = [".h"], ".h.gch"
            [compiled] = compiler.compile(
                [header],
                output_dir=self.build_temp,
                macros=extension.define_macros,
                include_dirs=extension.include_dirs,
                extra_preargs=["-x", "c++-header"],
                extra_postargs=extension.extra_compile_args,
            )
            compiler.src_extensions, compiler.obj_extension = names
            return shutil.copy2(header, compiled.removesuffix(".gch"))

    with_pytorch = WithPyTorch.with_options(no_python_abi_suffix=False)
    setup(
        version=VERSION,
        ext_modules=extensions(),
        cmdclass={"build_ext": with_pytorch},
        options={
            "build_ext": {"build_temp": "build/temp"},  # also for pip install -e: compiles only what changed
            "bdist_wheel": {"py_limited_api": "cp310"},
        },
    )
else:
    setup(version=VERSION, ext_modules=[Extension("robustkern._C", [])], cmdclass={"build_ext": WithoutPyTorch})
