"""Importing the package: cheap, without side effects, and possible when the extension is missing or broken."""

import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import robustkern

PACKAGE = Path(robustkern.__file__).parent
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


def python(code, path=PACKAGE.parent):
    """Runs code in a fresh interpreter that finds robustkern in `path`; returns what it prints as JSON."""
    # An editable install would find the extension in the working tree, whatever folder the package comes from.
    isolate = "sys.meta_path[:] = [f for f in sys.meta_path if getattr(f, '__name__', '') != '_EditableFinder']"
    program = f"import sys, json, warnings; sys.path.insert(0, {str(path)!r})\n{isolate}\n{code}"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False, cwd=path
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.strip().split("\n")[-1])


def test_import_needs_nothing_but_torch():
    loaded = python(
        "import torch\nbefore = set(sys.modules)\nimport robustkern\nprint(json.dumps(sorted(sys.modules)))"
    )
    heavy = {"typer", "rich", "matplotlib", "sklearn", "safetensors", "PIL", "scipy", "pytest", "torch._dynamo"}
    assert not heavy & set(loaded)
    for part in ("cli", "data", "models", "training", "study", "testing"):
        assert f"robustkern.{part}" not in loaded


STATE = """
def state():
    return [torch.get_rng_state().tolist(), torch.get_num_threads(), str(torch.get_default_dtype()),
            torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),
            torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32, torch.is_autocast_enabled("cpu"),
            [str(f) for f in warnings.filters]]
"""


def test_import_changes_nothing():
    code = f"import torch\n{STATE}\nbefore = state()\nimport robustkern\nprint(json.dumps([before, state()]))"
    before, after = python(code)
    assert before == after


@pytest.fixture
def copied_package(tmp_path):
    """The package in a folder of its own, without its extensions."""
    shutil.copytree(PACKAGE, tmp_path / "robustkern", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


USE = """
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import robustkern as rk
    at_import = len(caught)
    x = torch.tensor([[3.0, 4.0]], requires_grad=True)
    for _ in range(2):
        norm = rk.ops.row_norm(x)
        loss = rk.ops.softmax_cross_entropy(x, torch.tensor([1]))
    penalty = rk.losses.GradientPenalty()(torch.nn.Linear(2, 3), x / 5, torch.tensor([1]))
    penalty.backward()
    try:
        rk.ops.row_norm(x, impl="kernel")
        refusal = None
    except RuntimeError as error:
        refusal = str(error)
print(json.dumps({"norm": norm.tolist(), "at_import": at_import, "refusal": refusal, "file": rk.__file__,
                  "warnings": [str(w.message) for w in caught], "why": rk._library.why_unavailable(),
                  "cuda": rk._library.cuda_why_unavailable()}))
"""


def assert_falls_back(result, folder, reason):
    assert result["file"].startswith(str(folder))
    assert result["norm"] == [5.0]
    assert result["at_import"] == 0
    assert len(result["warnings"]) == 1, result["warnings"]
    assert "plain PyTorch" in result["warnings"][0]
    for text in (result["warnings"][0], result["refusal"], result["why"], result["cuda"]):
        assert reason in text, text
    assert result["refusal"].startswith("row_norm: impl='kernel' is not possible: ")


def test_an_extension_that_was_not_built(copied_package):
    result = python(USE, copied_package)
    assert_falls_back(result, copied_package, "robustkern._C is not built; build it with: pip install")


@pytest.mark.parametrize("content", [b"this is no shared library", b""], ids=["garbage", "empty"])
def test_a_broken_extension(copied_package, content):
    (copied_package / "robustkern" / f"_C{SUFFIX}").write_bytes(content)
    result = python(USE, copied_package)
    assert_falls_back(result, copied_package, "robustkern._C is built but does not load with PyTorch")


def test_an_extension_for_another_pytorch(copied_package):
    """Its symbols are missing: what the loader says is passed on."""
    source = copied_package / "other.c"
    source.write_text("void *gone_in_this_version(void); void *PyInit__C(void) { return gone_in_this_version(); }")
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    target = copied_package / "robustkern" / f"_C{SUFFIX}"
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(target)], check=True)
    assert_falls_back(python(USE, copied_package), copied_package, "gone_in_this_version")


def test_a_working_copy_loads(copied_package):
    extensions = [*PACKAGE.glob("_C*.so"), *PACKAGE.glob("_aten*.so")]
    if len(extensions) < 2:
        pytest.skip("robustkern._C and robustkern._aten are not built in place")
    for extension in extensions:
        shutil.copy(extension, copied_package / "robustkern")
    result = python(USE, copied_package)
    assert result["why"] is None
    assert result["refusal"] is None
    assert result["warnings"] == []
