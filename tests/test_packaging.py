"""What is built, for whom, and what users are told to install."""

import contextlib
import importlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import setuptools
import torch
from torch.utils import cpp_extension

import described
from robustkern import _library, _packages, double_backward
from robustkern._library import _runs_on, why_no_image, why_no_kernel
from robustkern.cli import info

ROOT = Path(__file__).parents[1]
NEXT = "9.9.9+cpu"


# ------------------------------------------------------------------ another PyTorch


@pytest.fixture
def another_pytorch(monkeypatch):
    """Looks for `robustkern._aten` again, under what claims to be another PyTorch; it must not be loaded."""

    def load(version):
        def never(name):
            raise AssertionError(f"{name} was loaded")

        with monkeypatch.context() as patch:
            patch.setattr(torch, "__version__", version)
            patch.setattr(_library.importlib, "import_module", never)
            return _library._load_aten()

    return load


@pytest.mark.parametrize("version", ["2.10.0", NEXT, "2.14.0.dev20260901+cu130", "2.14.1a0+git1234567"])
def test_aten_is_not_loaded_into_another_pytorch(another_pytorch, version):
    module, why = another_pytorch(version)
    assert module is None
    assert f"was built with PyTorch {_library.extension().build_info()['torch']} and" in why
    assert f"does not load with PyTorch {version}; rebuild it with: pip install --no-build-isolation" in why
    assert "\n" not in why


def test_builds_of_one_version_for_cpu_and_cuda_share_it(monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch.__version__.split("+")[0] + "+cu999")
    assert _library._load_aten() == (_library.aten_extension(), None)


@pytest.mark.parametrize("content", [b"", b"robustkern._aten", b"\0robustkern._aten built with PyTorch 1.2.3\0"])
def test_a_foreign_file_in_its_place(another_pytorch, monkeypatch, tmp_path, content):
    file = tmp_path / "_aten.so"
    file.write_bytes(content)
    monkeypatch.setattr(_library.importlib.util, "find_spec", lambda name: type("Spec", (), {"origin": str(file)}))
    module, why = another_pytorch(torch.__version__)
    assert (
        module is None and f"was built with PyTorch {'1.2.3' if b'1.2.3' in content else 'of unknown version'}" in why
    )


def test_a_symbol_that_is_missing_is_the_same_sentence(monkeypatch):
    def undefined(name):
        raise ImportError("undefined symbol: _ZN2at4goneEv")

    monkeypatch.setattr(_library.importlib, "import_module", undefined)
    module, why = _library._load_aten()
    assert module is None
    assert re.search(
        r"was built with PyTorch \S+ and does not load with PyTorch \S+ \(undefined symbol: \S+\); re", why
    )


def test_what_says_so(another_pytorch, monkeypatch):
    """install() raises it, penalties warn of it once, `info` prints it."""
    _, why = another_pytorch(NEXT)
    monkeypatch.setattr(_library, "_ATEN", None)
    monkeypatch.setattr(_library, "_ATEN_MISSING", why)
    with pytest.raises(RuntimeError, match=re.escape(why)):
        double_backward.install()
    _library.warn_once.cache_clear()
    with pytest.warns(UserWarning, match=re.escape(why)) as caught:
        scopes = [double_backward.fused_where_possible() for _ in range(2)]
    assert all(isinstance(scope, contextlib.nullcontext) for scope in scopes)
    assert len(caught) == 1
    assert why in info.collect()["robustkern._aten"]


# ------------------------------------------------------------------ a wheel for several PyTorchs

SEVERAL = """
import robustkern
from robustkern import _library
print(_library.aten_extension() and _library.aten_extension().__file__, _library.aten_why_unavailable(), sep="\\n")
_library.aten_extension() and robustkern.install()
"""


@pytest.mark.parametrize("served", [["2.99.0", "own"], ["2.9.0", "2.99.0"]])
def test_of_several_the_one_for_this_pytorch_is_loaded(tmp_path, served):
    package, built = ROOT / "robustkern", Path(_library.aten_extension().__file__)
    shutil.copytree(package, tmp_path / "robustkern", ignore=shutil.ignore_patterns("_aten*.so", "__pycache__"))
    own = torch.__version__.split("+")[0]
    names = [f"_aten_{(own if version == 'own' else version).replace('.', '_')}.abi3.so" for version in served]
    for name in names:
        shutil.copy(built, tmp_path / "robustkern" / name)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    file, why = done.stdout.splitlines()
    if "own" in served:
        assert file == str(tmp_path / "robustkern" / names[1]) and why == "None"
    else:
        assert file == "None"
        assert why.startswith(f"this robustkern was built for PyTorch 2.9.0, 2.99.0, not for {torch.__version__}: inst")


# ------------------------------------------------------------------ GPUs


@pytest.mark.parametrize(
    "architecture, runs, does_not",
    [
        ("sm_80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (12, 0)]),
        ("sm_86", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("sm_90", [(9, 0)], [(8, 9), (10, 0)]),
        ("sm_90a", [(9, 0)], [(9, 1), (10, 0)]),
        ("sm_100f", [(10, 0), (10, 3)], [(11, 0), (12, 0)]),
        ("sm_120", [(12, 0), (12, 1)], [(11, 0), (10, 0), (13, 0)]),
        ("compute_75", [(7, 5), (8, 0), (11, 0), (13, 0)], [(7, 0), (6, 1)]),
        ("compute_90a", [(9, 0)], [(9, 1), (10, 0)]),
        ("compute_120", [(12, 0), (13, 0)], [(11, 0), (9, 0)]),
    ],
)
def test_what_code_runs_where(architecture, runs, does_not):
    assert all(_runs_on(architecture, *gpu) for gpu in runs)
    assert not any(_runs_on(architecture, *gpu) for gpu in does_not)


@pytest.fixture
def toolkit(monkeypatch, tmp_path):
    """What setup.py makes of a CUDA toolkit whose nvcc knows these architectures, and which has these files."""

    def described_with(knows, *files):
        nvcc = tmp_path / "bin" / "nvcc"
        for path in (nvcc, *(tmp_path / file for file in files)):
            path.parent.mkdir(exist_ok=True)
            path.touch()
        nvcc.write_text(f"#!/bin/sh\nprintf 'compute_%s\\n' {knows}\n")
        nvcc.chmod(0o755)
        monkeypatch.chdir(ROOT)  # what described.extensions changes is put back
        for name in ("ROBUSTKERN_CUDA", "TORCH_CUDA_ARCH_LIST"):
            monkeypatch.setenv(name, "")
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        monkeypatch.setattr(setuptools, "setup", setuptools.setup)
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", cpp_extension.CUDA_HOME)
        return described.extensions(cuda=True)["robustkern._cuda"]

    return described_with


@pytest.mark.parametrize(
    "knows, built_for",
    [
        ("75 80 86 90 100 103 120", "sm_80 sm_90 sm_100 sm_120 compute_75 compute_80"),
        ("50 60 70 75 80 86 90", "sm_80 sm_90 compute_75 compute_80"),
        ("80 90 100 120 130", "sm_80 sm_90 sm_100 sm_120 compute_80"),
    ],
)
def test_what_is_compiled_with_nvcc_of_any_age(toolkit, knows, built_for):
    extension = toolkit(knows, "lib64/libcudart.so")
    flags = [flag for flag in extension.extra_compile_args["nvcc"] if "gencode" in flag]
    assert [flag.split("code=")[-1] for flag in flags] == built_for.split()
    assert ("RK_CUDA_ARCHITECTURES", f'"{built_for}"') in extension.define_macros


@pytest.mark.parametrize(
    ("files", "folder", "name"),
    [
        (["lib64/libcudart.so", "lib64/libcudart.so.13"], "lib64", "cudart"),
        (["lib/libcudart.so.13", "lib/libcudart.so.13.0.96", "lib/libcudart_static.a"], "lib", ":libcudart.so.13"),
        (["lib64/libcudart_static.a", "lib/libcudart.so.12"], "lib", ":libcudart.so.12"),
    ],
)
@pytest.mark.parametrize("cuda", ["13.0", None])
def test_the_runtime_is_the_shared_one(toolkit, tmp_path, monkeypatch, files, folder, name, cuda):
    """PyTorch's own, where it has one; else that of the toolkit."""
    monkeypatch.setattr(torch.version, "cuda", cuda)
    extension = toolkit("80 90", *files)
    assert str(tmp_path / folder) in extension.library_dirs and name in extension.libraries
    assert not any("static" in library for library in extension.libraries)
    assert extension.runtime_library_dirs == ([] if cuda else [str(tmp_path / folder)])


def test_a_toolkit_without_a_shared_runtime(toolkit):
    with pytest.raises(SystemExit, match=r"has no libcudart\.so: install its runtime \(nvidia-cuda-runtime\), too"):
        toolkit("80 90", "lib64/libcudart_static.a")


def test_a_runtime_that_is_missing_is_one_sentence(monkeypatch):
    def missing(name):
        raise ImportError("libcudart.so.13: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(_library.importlib, "import_module", missing)
    module, why = _library._load("_cuda")
    assert module is None and "\n" not in why
    assert why.startswith("robustkern._cuda needs libcudart.so.13, the CUDA runtime of its toolkit, which PyTorch ")
    assert "install a PyTorch for this CUDA, or rebuild it with: pip install" in why


@pytest.fixture
def gpu(monkeypatch):
    """Pretends that there is a GPU of this compute capability, and CUDA kernels for other architectures."""

    def of(capability, architectures="sm_80 sm_90 sm_100 sm_120 compute_75 compute_80"):
        major, minor = capability
        properties = {"major": major, "minor": minor, "name": "Some GPU", "total_memory": 2**34}
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: type("Properties", (), properties))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(_library, "_CUDA", type("Module", (), {"architectures": architectures}))
        monkeypatch.setattr(_library, "_CUDA_MISSING", None)
        _library.warn_once.cache_clear()

    return of


class OnCuda(torch.Tensor):
    """A tensor that claims to be on a GPU."""

    device = torch.device("cuda", 0)

    def get_device(self):
        return 0


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9), (9, 0), (10, 3), (11, 0), (12, 1), (13, 0)])
def test_gpus_that_a_release_serves(gpu, capability):
    gpu(capability)
    assert why_no_image(0) is None and _library.runs_on_cuda(0)
    assert why_no_kernel(torch.ones(2).as_subclass(OnCuda)) is None


@pytest.mark.parametrize("capability, built_for", [((7, 0), None), ((9, 0), "sm_80 sm_120"), ((8, 0), "compute_90")])
def test_a_gpu_without_code_is_left_to_pytorch_and_named_once(gpu, capability, built_for):
    gpu(capability, *([built_for] if built_for else []))
    why = why_no_kernel(torch.ones(2).as_subclass(OnCuda))
    name = "{}.{}".format(*capability)
    assert "none of which runs on Some GPU" in why and f"TORCH_CUDA_ARCH_LIST={name} pip install" in why
    with pytest.warns(UserWarning, match=f"PyTorch's own derivatives on cuda:0: .*{re.escape(name)}") as caught:
        assert not any(_library.runs_on_cuda(0) for _ in range(3))
    assert len(caught) == 1
    assert why in info.collect()["gpu"]


def test_aten_asks_once_for_each_gpu(gpu):
    gpu((7, 0))
    with pytest.warns(UserWarning, match="PyTorch's own derivatives on cuda:101"):
        assert not _library.aten_extension().runs_on_cuda(101)
    gpu((9, 0))
    assert not _library.aten_extension().runs_on_cuda(101)
    assert _library.aten_extension().runs_on_cuda(102)


DISPATCH = """
import json, sys, torch, robustkern
from robustkern import _library
from torch._subclasses import FakeTensorMode

kernels = torch.library.Library("robustkern", "IMPL", "CUDA")  # as if robustkern._cuda were loaded
for name in torch._C._dispatch_get_all_op_names():
    if name.startswith("robustkern::") and not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"):
        kernels.impl(name.removeprefix("robustkern::"), lambda *arguments: None)
asked = []
_library.runs_on_cuda = lambda index: asked.append(index)
robustkern.install()
aten, graphs = torch.ops.aten, torch.version.cuda is not None  # without CUDA, PyTorch builds no graph of its tensors
with FakeTensorMode():
    g, x = (torch.empty(4, 6, device="cuda", requires_grad=graphs) for _ in range(2))
    mean = torch.empty(4, 1, device="cuda")
    made = [
        aten.gelu_backward(g, x), aten.silu_backward(g, x), aten._softmax_backward_data(g, x, 1, torch.float32),
        aten.native_layer_norm_backward(g, x, [6], mean, mean, None, None, [True, False, False])[0],
        aten.native_group_norm_backward(g, x, mean, mean, None, 4, 6, 1, 1, [True, False, False])[0],
    ]
print(json.dumps([asked, [t.grad_fn.name() for t in made if t.grad_fn]]))
"""


def test_replacements_that_call_kernels_ask_before_they_do():
    done = subprocess.run([sys.executable, "-c", DISPATCH], capture_output=True, text=True, check=True)
    asked, nodes = json.loads(done.stdout)
    assert asked == [0]
    assert not [name for name in nodes if "rk::" in name]


# ------------------------------------------------------------------ what is shipped, and what is asked for


def tracked_files():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name for name in listed.splitlines() if (ROOT / name).exists()}


SDIST = """
import runpy, sys
sys.modules.update(dict.fromkeys(("torch", "numpy")))
sys.path.insert(0, ".")
folder = sys.argv[1]
import build_backend
assert not any("torch" in name for name in build_backend.get_requires_for_build_sdist())
assert any("torch" in name for name in build_backend.get_requires_for_build_wheel())
for words in (["bdist_wheel"], ["sdist", "bdist_wheel"]):  # nothing is built without its extensions
    sys.argv = ["setup.py", *words]
    try:
        runpy.run_path("setup.py")
        raise AssertionError(words)
    except SystemExit as refusal:
        assert "install torch>=2.10" in str(refusal), refusal
print(build_backend.build_sdist(folder))
"""


def test_the_sdist_needs_no_torch_and_holds_all_that_is_tracked(tmp_path):
    tracked = tracked_files()
    for name in tracked:  # building writes beside its sources
        target = tmp_path / "tree" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    done = subprocess.run(
        [sys.executable, "-c", SDIST, str(tmp_path)], cwd=tmp_path / "tree", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / done.stdout.split()[-1]) as archive:
        shipped = {name.partition("/")[2] for name in archive.getnames()}
    assert tracked - shipped <= {".gitignore"}
    assert not [name for name in shipped if name.endswith((".so", ".pyc"))]


def test_a_wheel_is_built_with_the_pytorch_that_is_installed(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    backend = importlib.import_module("build_backend")
    for required in (backend.get_requires_for_build_wheel, backend.get_requires_for_build_editable):
        assert f"torch=={torch.__version__.split('+')[0]}" in required()
    monkeypatch.setattr(backend.metadata, "distributions", lambda **where: iter(()))
    assert "torch>=2.10" in backend.get_requires_for_build_wheel()


def test_building_without_pytorch_says_what_to_install(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(sys, "argv", ["setup.py", "build_ext"])
    with pytest.raises(SystemExit, match=r"install torch>=2\.10, .*then run: pip install --no-build-isolation -e \.$"):
        runpy.run_path("setup.py")


def test_nobody_is_sent_to_an_index_for_robustkern():
    wrong = re.compile(r"(?<!-e )['\"]?robustkern\[|pip install ['\"]?robustkern")
    for name in tracked_files():
        if name.endswith((".py", ".md", ".toml", ".sh", "Makefile")) and name not in (
            "CHANGELOG.md",
            "tests/test_packaging.py",
        ):
            found = [line for line in (ROOT / name).read_text().splitlines() if wrong.search(line)]
            assert not found, (name, found)


@pytest.mark.parametrize(
    "modules, command",
    [
        (("yaml", "sklearn"), "pip install pyyaml scikit-learn"),
        (("PIL",), "pip install pillow"),
        (("rich",), "pip install rich"),
    ],
)
def test_modules_are_asked_for_by_the_names_of_their_packages(modules, command):
    assert _packages.pip_install(*modules) == command


def test_versions_of_pytorch_are_the_same_everywhere():
    compiled = re.findall(r'"(2\.\d+\.\d+)"', (ROOT / "tests/compat.py").read_text())
    assert compiled
    for name in ("docs/install.md", "pyproject.toml"):
        text = (ROOT / name).read_text()
        assert all(version in text for version in compiled), name
