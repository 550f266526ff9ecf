"""Every operator at every level: adding one without its tests, its benchmark or its row in the documents fails here.

csrc/README.md says how an operator is added, docs/architecture.md how a loss is; each message names the step that is
missing.
"""

import ast
import graphlib
import importlib
import inspect
import itertools
import re
from pathlib import Path

import pytest
import torch

import robustkern
from cases import CASES, cotangents, recorded_calls
from robustkern import _library, attacks, coupling, jacobian, losses, ops, penalties, reference, spectral_norm
from robustkern.ops._pytorch_derivatives import DERIVATIVES
from tests.samples import samples_of

ROOT = Path(__file__).parents[1]
ORDERS = ("", "_backward", "_double_backward")
SCHEMAS = re.findall(r'"(\w+)\(', (ROOT / "csrc/ops.cpp").read_text())
STEMS = [name for name in SCHEMAS if not name.endswith(("backward", "_jvp"))]
FORWARD_MODE = [name for name in SCHEMAS if name.endswith("_jvp")]  # public too, though PyTorch begins their chain
# Differentiable once: nobody penalises the second derivative of a random direction.
DIFFERENTIABLE_ONCE = {"margin_loss", "random_cotangents"}


def orders_of(stem):
    if stem in ops.IN_PLACE:
        return ORDERS[:1]
    return ORDERS[:2] if stem in DIFFERENTIABLE_ONCE else ORDERS


CHAINS = {stem + order for stem in STEMS for order in orders_of(stem)}
# Derivatives of PyTorch's own operators, whose chains PyTorch begins.
ENDS = [name for name in SCHEMAS if name not in CHAINS]
LONGEST_FILE = 600  # lines: a file that is one thing may have as many

over_operators = pytest.mark.parametrize("op", STEMS)
over_differentiable = pytest.mark.parametrize("op", [op for op in STEMS if op not in ops.IN_PLACE])
over_schemas = pytest.mark.parametrize("schema", [name for name in SCHEMAS if name in CHAINS])
over_ends = pytest.mark.parametrize("schema", ENDS)


def has_kernel(schema, key):
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"robustkern::{schema}", key)


def text_of(path, step):
    assert (ROOT / path).is_file(), f"{step}: {path} does not exist"
    return (ROOT / path).read_text()


def sources(*patterns):
    """The project's own files that match, without what was built or downloaded."""
    found = [path for pattern in patterns for path in ROOT.glob(pattern)]
    return [p for p in found if not {".venv", "build", ".git", "__pycache__"} & set(p.relative_to(ROOT).parts)]


# ------------------------------------------------------------------ operators


def test_schemas_come_in_chains():
    assert STEMS, "csrc/ops.cpp defines no operator"
    for stem in STEMS:
        assert [stem + order for order in orders_of(stem)] == [
            s for s in SCHEMAS if s.startswith(stem) and s in stem_family(stem)
        ]
    assert sorted(ENDS) == sorted(DERIVATIVES), "register what csrc/ops.cpp declares in robustkern/ops"


@over_ends
def test_derivatives_of_pytorch_operators(schema):
    stem = re.sub(r"(_double)?_backward$|_jvp$", "", schema)
    entry = DERIVATIVES[schema]
    for key, step in (
        ("CPU", "kernel"),
        ("Meta", "fake kernel"),
        ("Autograd", "formula"),
        ("FuncTorchBatched", "rule"),
    ):
        assert has_kernel(schema, key), f"register a {key} {step} of {schema}"
    written = sources(f"csrc/cuda/{stem}*.cu", f"csrc/aten/kernels/{stem}*.cpp")
    kernels = [p for p in written if f'"{schema}"' in p.read_text()]
    assert kernels, f"register a CUDA kernel of {schema}"
    assert schema in reference.__all__
    assert entry.reference is getattr(reference, schema)
    names = [argument.name for argument in entry.operator.default._schema.arguments]
    assert list(inspect.signature(entry.reference).parameters) == names
    for sample in samples_of(schema):
        assert list(sample.arguments) == names, f"{schema}({sample.name})"
    replacements = " ".join(p.read_text() for p in sources("csrc/aten/*.cpp"))
    assert f"robustkern::{schema}" in replacements, f"nothing in csrc/aten calls {schema}"
    for folder in ("installed", "samples"):
        assert (ROOT / f"tests/{folder}/{stem}.py").is_file(), f"write tests/{folder}/{stem}.py"
    text = inspect.getdoc(entry.reference)
    assert text, f"{schema}: the reference has no docstring"
    assert re.search(r"=|L\b", text.split("\n")[0]), f"{schema}: begin the reference's docstring with its formula"
    rows = [line for line in text_of("docs/operators.md", "write it").splitlines() if line.startswith("|")]
    assert any(schema in line for line in rows), f"add a row for {schema} to docs/operators.md"
    second = f"{stem}_double_backward"
    assert any(second in p.read_text() for p in (ROOT / "benchmarks").glob("*.py")), f"add {second} to the benchmarks"


def stem_family(stem):
    return {stem + order for order in orders_of(stem)}


def test_the_extension_holds_the_schemas_of_the_source():
    if _library.extension() is None:
        pytest.fail(f"build it: {_library.why_unavailable()}")
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if "robustkern::" in name}
    assert registered == set(SCHEMAS), "rebuild: csrc/ops.cpp and the loaded extension differ"


@over_operators
def test_public_function_reference_and_module(op):
    assert hasattr(ops, op), f"export {op} from robustkern/ops/__init__.py"
    assert op in ops.__all__, f"add {op} to __all__ of robustkern/ops/__init__.py"
    assert hasattr(reference, op), f"write robustkern/reference/{op}.py and export it"
    assert op in reference.__all__, f"add {op} to __all__ of robustkern/reference/__init__.py"
    assert (ROOT / f"tests/samples/{op}.py").is_file(), f"write samples(device, dtype) in tests/samples/{op}.py"
    assert inspect.getfile(getattr(reference, op)).endswith(f"reference/{op}.py")
    assert inspect.getfile(getattr(ops, op)).endswith(f"ops/{op}.py")
    assert ops.__all__ == sorted([*STEMS, *FORWARD_MODE])
    assert reference.__all__ == sorted([*STEMS, *ENDS])


@over_operators
def test_sources(op):
    for path in (f"csrc/math/{op}.h", f"csrc/cpu/{op}.cpp", f"csrc/cuda/{op}.cu"):
        text_of(path, "write the kernels")
    text_of(f"tests/cuda_emulator/test_{op}.cpp", "write the test of the CUDA kernels")


@over_schemas
def test_kernels(schema):
    stem = next(s for s in STEMS if schema in stem_family(s))
    assert has_kernel(schema, "CPU"), f"register {schema} in csrc/cpu/{stem}.cpp"
    cuda = text_of(f"csrc/cuda/{stem}.cu", "write the CUDA kernel")
    assert f'"{schema}"' in cuda, f"register {schema} in csrc/cuda/{stem}.cu"
    if _library.cuda_extension() is not None:
        assert has_kernel(schema, "CUDA"), f"{schema} is not registered for CUDA: rebuild robustkern._cuda"


@over_schemas
def test_fake_autograd_and_vmap(schema):
    stem = next(s for s in STEMS if schema in stem_family(s))
    module = f"robustkern/ops/{stem}.py, which robustkern/ops/__init__.py imports"
    assert has_kernel(schema, "Meta"), f"register a fake kernel of {schema} in {module}"
    if stem in ops.IN_PLACE:
        return
    assert has_kernel(schema, "Autograd"), f"register an autograd formula of {schema} in {module}"
    assert has_kernel(schema, "FuncTorchBatched"), f"register a vmap rule of {schema} in {module}"


@over_differentiable
def test_the_end_of_the_chain_refuses(op):
    case = next(c for c in CASES if c.op == op and not c.empty)
    call = recorded_calls(case.sample("cpu", torch.float64))[op + orders_of(op)[-1]]
    assert call.ends_chain
    name, first = next(iter(call.tensors.items()))
    result = call(**{name: first.clone().requires_grad_()})[0]
    refused = "second" if op in DIFFERENTIABLE_ONCE else "third"
    with pytest.raises(RuntimeError, match=f"{refused}-order derivatives are not supported; use impl='reference'"):
        result.sum().backward()


@over_differentiable
def test_samples_cover_every_option_and_every_operator(op):
    samples = list(samples_of(op))
    names = [sample.name for sample in samples]
    assert len(set(names)) == len(names), "names of samples must differ: tests find samples by name"
    assert all(sample.op is getattr(ops, op) for sample in samples)
    parameters = inspect.signature(getattr(ops, op)).parameters
    options = {name for name, p in parameters.items() if p.default is not inspect.Parameter.empty}
    options -= {"impl", "generator"}  # a generator makes another call of every repetition
    for option in options:
        values = {str(sample.options[option]) for sample in samples if option in sample.options}
        assert values - {str(parameters[option].default)}, f"{op}: no sample sets {option} to anything but its default"
    assert any(sample.empty for sample in samples), f"{op}: no sample is empty"
    assert any(not s.inputs[0].is_contiguous() for s in samples), f"{op}: no sample has a layout of its own"
    derivatives = ("value", "grad_x", "gg_grad", "second")[: 2 if op in DIFFERENTIABLE_ONCE else 4]
    assert any(not {*s.zero} & {*derivatives} for s in samples), f"{op}: some derivative of every sample is zero"
    for order in derivatives:
        assert any(order not in sample.zero and not sample.empty for sample in samples)
    called = set()
    for sample in samples:
        if sample.inputs[0].numel() <= 1000:
            called |= set(recorded_calls(sample))
    assert called == stem_family(op), f"{op}: the samples never call {stem_family(op) - called}"


@over_operators
def test_reference_takes_the_same_arguments(op):
    public = list(inspect.signature(getattr(ops, op)).parameters)
    plain = list(inspect.signature(getattr(reference, op)).parameters)
    assert plain == [name for name in public if name != "impl"]
    sample = next(samples_of(op, "cpu", torch.float64))
    expected = getattr(reference, op)(*(value.clone() for value in sample.inputs), **sample.options)
    torch.testing.assert_close(expected, sample(impl="kernel"))
    if op not in ops.IN_PLACE:
        cotangents(sample)


@over_operators
def test_benchmark(op):
    names = [p.name for p in (ROOT / "benchmarks").glob("*.py") if op in p.read_text()]
    own = {"op_cases.py", "bench_ops.py", "bench_attacks.py", "bench_cotangents.py", f"test_{op}.py"}
    assert own & set(names), f"add {op} to OPS and specs in benchmarks/op_cases.py, see csrc/README.md"


@over_operators
def test_documented(op):
    rows = [line for line in text_of("docs/operators.md", "write it").splitlines() if line.startswith("|")]
    assert any(line.startswith(f"| `{op}` |") for line in rows), f"add a row | `{op}` | ... to docs/operators.md"


@pytest.mark.parametrize("name", losses.__all__)
def test_losses_are_documented(name):
    rows = [line for line in text_of("docs/methods.md", "write it").splitlines() if line.startswith("|")]
    found = any(f"`rk.losses.{name}`" in line for line in rows)
    assert found, (
        f"add a row | `rk.losses.{name}` | ... to docs/methods.md, and see docs/architecture.md, Adding a loss"
    )


# ------------------------------------------------------------------ public names


def public_functions():
    for name in ops.__all__:
        yield f"ops.{name}", getattr(ops, name)
    for module in (coupling, jacobian, penalties, spectral_norm):
        for name, value in vars(module).items():
            if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_"):
                yield name, value
    for name in losses.__all__:
        yield f"losses.{name}", getattr(losses, name)


PUBLIC = dict(public_functions())


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings_begin_with_a_formula_and_answer_the_questions(name):
    text = inspect.getdoc(PUBLIC[name])
    assert text, f"{name} has no docstring"
    first = text.split("\n")[0]
    assert re.search(r"=|\|\|", first), f"the docstring of {name} must begin with its formula, not with: {first}"
    assert "Args:" in text, f"{name}: document the arguments"
    if inspect.isfunction(PUBLIC[name]):
        for section in ("Returns:", "Raises:", "Differentiability:", "Determinism:"):
            assert section in text, f"{name}: the docstring lacks {section!r}"
        for parameter in inspect.signature(PUBLIC[name]).parameters:
            assert re.search(rf"^\s+{parameter}: ", text, re.MULTILINE), f"{name}: document {parameter}"


@pytest.mark.parametrize("name", PUBLIC)
def test_public_functions_are_typed(name):
    target = PUBLIC[name] if inspect.isfunction(PUBLIC[name]) else PUBLIC[name].__call__
    signature = inspect.signature(target)
    assert signature.return_annotation is not inspect.Signature.empty
    for parameter in signature.parameters.values():
        assert parameter.name == "self" or parameter.annotation is not inspect.Parameter.empty, parameter


@pytest.mark.parametrize("name", [*PUBLIC, *(f"attacks.{name}" for name in attacks.__all__)])
def test_options_that_are_texts_name_them(name):
    target = PUBLIC.get(name) or getattr(attacks, name.removeprefix("attacks."))
    for parameter in inspect.signature(target).parameters.values():
        assert parameter.annotation is not str, f"{name}: give {parameter.name} a type of robustkern/_choices.py"


WITH_EXAMPLES = ("", ".attacks", ".evaluation", ".losses", ".models", ".ops", ".reference", ".testing", ".training")


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_every_public_name_has_an_example(module):
    module = importlib.import_module(f"robustkern{module}")
    for name in module.__all__:
        value = getattr(module, name)
        error = inspect.isclass(value) and issubclass(value, BaseException)
        if (inspect.isfunction(value) or inspect.isclass(value)) and not error:
            assert ">>> " in (inspect.getdoc(value) or ""), f"give {module.__name__}.{name} an example in its docstring"


@pytest.mark.parametrize("module", ["", ".attacks", ".losses", ".ops"])
def test_every_public_name_is_in_the_reference(module):
    module, page = importlib.import_module(f"robustkern{module}"), text_of("docs/reference.md", "write it")
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isfunction(value) or inspect.isclass(value):
            listed = re.search(rf"^\.\. auto(function|class):: {name}$", page, re.MULTILINE)
            assert listed, f"add {module.__name__}.{name} to docs/reference.md"


@pytest.mark.parametrize("module", ["", ".ops", ".reference", ".losses", ".testing"])
def test_all_names_exist(module):
    module = importlib.import_module(f"robustkern{module}")
    assert module.__all__ == sorted(module.__all__)
    for name in module.__all__:
        assert hasattr(module, name), f"{module.__name__}.__all__ names {name}"


def test_every_penalty_is_public():
    for name, value in PUBLIC.items():
        if value.__module__ == penalties.__name__:
            assert getattr(robustkern, name) is value, f"export {name} from robustkern/__init__.py"


# ------------------------------------------------------------------ floors

CORE = ("ops", "reference", "penalties", "jacobian", "spectral_norm", "coupling", "double_backward", "graphs")
LABORATORY = {
    "losses",
    "compiled",
    "draw",
    "sharding",
    "distributed",
    "terms",
    "attacks",
    "data",
    "models",
    "training",
    "evaluation",
    "study",
    "cli",
}


def imports_of(module):
    """The modules of robustkern that the files of a module or package name in an import, wherever it stands."""
    path = ROOT / "robustkern" / module.replace(".", "/")
    files = list(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    named = set()
    for file in files:
        package = ["robustkern", *file.relative_to(ROOT / "robustkern").parts[:-1]]
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = [*package[: len(package) + 1 - node.level], *([node.module] if node.module else [])]
                source = ".".join(base) if node.level else node.module
                named |= {source, *(f"{source}.{alias.name}" for alias in node.names)}
    return {name.split(".")[1] for name in named if name.startswith("robustkern.")}


def test_the_core_knows_nothing_of_the_laboratory():
    """Users of the fused derivatives alone never load a training loop."""
    reached, left = set(), [*CORE]
    while left:
        module = left.pop()
        path = ROOT / "robustkern" / module
        if module not in reached and (path.is_dir() or path.with_suffix(".py").is_file()):
            reached.add(module)
            found = imports_of(module)
            assert not found & LABORATORY, f"robustkern/{module} imports {', '.join(sorted(found & LABORATORY))}"
            left += found
    assert {"_library", "_arguments"} < reached and {"ops", "attacks"} < imports_of("losses")
    above = re.compile(rf"robustkern\.({'|'.join(sorted(LABORATORY))})\b")
    for path in sources("csrc/**/*.cpp", "csrc/**/*.h", "csrc/**/*.cu", "csrc/**/*.cuh"):
        assert not above.search(path.read_text()), f"{path.relative_to(ROOT)} names a module of the laboratory"


# ------------------------------------------------------------------ files

CODE = sources("csrc/**/*", "robustkern/**/*.py", "tests/**/*", "benchmarks/*.py", "docs/site/*.py", "*.py", "Makefile")
CODE = [p for p in CODE if p.is_file() and p.suffix in {".py", ".cpp", ".h", ".cu", ".cuh", ".sh", ""}]


@pytest.mark.parametrize("path", CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short_and_finished(path):
    text = path.read_text()
    assert text.count("\n") <= LONGEST_FILE, f"split {path.name}: {text.count(chr(10))} lines"
    leftovers = ["TO" + "DO", "FIX" + "ME", "X" + "XX", "breakpoint" + "()", "pdb." + "set_trace", "import " + "pdb"]
    for word in leftovers:
        assert not re.search(rf"(?<!\w){re.escape(word)}", text), f"{path.name} holds {word!r}"


def test_only_the_launcher_launches():
    """It takes the device and the stream of the tensors; a raw launch takes whatever is current."""
    for path in sources("csrc/**/*.cu", "csrc/**/*.cuh"):
        if path.name != "launch.cuh":
            text = path.read_text()
            assert "<<<" not in text, f"{path.name}: use rk::cuda::launch"
            assert "cudaLaunchKernel" not in text, f"{path.name}: use rk::cuda::launch"


def test_macros_hold_no_code():
    """A debugger and a sanitizer name the lines of functions, not those of macros."""
    for path in sources("csrc/**/*"):
        if path.is_file():
            for name, body in re.findall(r"^#define (\w+)((?:.*\\\n)*.*)", path.read_text(), re.MULTILINE):
                code = body.count("\n") > 2 or re.search(r"\b(for|while|if|switch) \(", body)
                assert not code, f"{path.name}: make {name} forward to a function template"


def test_no_fast_math():
    for path in ("setup.py", "Makefile"):
        for flag in ("use_fast_math", "ffast-math", "Ofast", "march=native"):
            assert flag not in text_of(path, "write it"), f"{path}: {flag}"


def test_no_tolerance_is_typed_by_hand():
    """Only gradcheck in float64, whose finite differences are inexact by nature, may have one."""
    typed = re.compile(r"\b[ar]tol\s*=")
    for path in sources("tests/*.py"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if typed.search(line) and "gradcheck" not in line:
                pytest.fail(f"{path.name}:{number}: use robustkern.testing.assert_as_accurate_as_reference\n{line}")


# What each folder of csrc may include from, besides itself.
FLOORS = {
    "": ["cpu"],
    "math": [],
    "arguments": ["math"],
    "cpu": ["arguments", "math"],
    "cuda": ["arguments", "math"],
    "aten/kernels": ["cpu", "arguments", "math"],
    "aten": ["aten/kernels", "arguments", "math"],
}


def test_nothing_in_csrc_includes_upward_or_in_a_circle():
    graph = {}
    for path in sources("csrc/**/*"):
        if path.suffix not in {".h", ".cpp", ".cu", ".cuh"}:
            continue
        floor = path.parent.relative_to(ROOT / "csrc").as_posix().strip(".")
        included = [(path.parent / name).resolve() for name in re.findall(r'#include "([^"]+)"', path.read_text())]
        graph[path] = {header for header in included if header.name != "cuda_emulator.h"}  # in place of CUDA's
        for header in graph[path]:
            below = header.parent.relative_to(ROOT / "csrc").as_posix().strip(".")
            assert below in {floor, *FLOORS[floor]}, f"{path.relative_to(ROOT)} includes {header.relative_to(ROOT)}"
    graphlib.TopologicalSorter(graph).prepare()  # or CycleError


@pytest.mark.parametrize("path", sources("docs/*.md", "docs/tutorials/*.md"), ids=lambda path: path.stem)
def test_every_page_is_on_the_site(path):
    name = path.relative_to(ROOT / "docs").with_suffix("").as_posix()
    index = text_of("docs/index.md", "write it")
    assert name == "index" or f"\n{name}\n" in index, f"add {name} to a toctree of docs/index.md"


@pytest.mark.parametrize("path", sources("docs/**/*.md"), ids=lambda path: path.stem)
def test_headings_skip_no_level(path):
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
    levels = [len(marks) for marks in re.findall(r"^(#+) ", text, re.MULTILINE)]
    assert levels[0] == 1 and all(b <= a + 1 for a, b in itertools.pairwise(levels))


@pytest.mark.parametrize("path", sources("*.md", "*/README.md", "docs/**/*.md", "tests/*/README.md"), ids=str)
def test_paths_in_texts_exist(path):
    """From the repository's root, or from where the text stands; `<op>` and the like are anything."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
    where = (ROOT, path.parent, path.parent.parent, ROOT / "robustkern")
    names = re.findall(r"`((?:csrc|robustkern|tests|benchmarks|docs|\.ci)/[\w.<>*/-]+)`", text)
    names += [name for name in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) if ":" not in name]
    if path.parent.name == "csrc":
        names += [name for name in re.findall(r"`([\w.<>*/]+)`", text) if re.search(r"/|\.(h|cpp|cuh?|py|md)$", name)]
    for name in names:
        pattern = re.sub(r"<\w+>", "*", re.sub(r"^(\.\./)+", "", name)).rstrip("/")
        known = name.startswith(("torch/", "runs/")) or any(any(folder.glob(pattern)) for folder in where)
        assert known, f"{path.relative_to(ROOT)}: {name} does not exist"


def test_kernels_use_stable_headers_only():
    """So that one binary serves every later PyTorch, and the CUDA half compiles without a CUDA build of it."""
    allowed = re.compile(r"torch/(csrc/stable|headeronly)/|torch/csrc/inductor/aoti_torch/c/shim\.h")
    for path in sources("csrc/*.cpp", "csrc/*.h", "csrc/arguments/*", "csrc/math/*", "csrc/cpu/*", "csrc/cuda/*"):
        for header in re.findall(r"#include <((?:torch|ATen|c10)[^>]*)>", path.read_text()):
            assert allowed.match(header), f"{path.name} includes {header}"
